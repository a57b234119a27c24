"""Inputs: which file becomes which argument, and what it must be."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kexue.core.component import Component
from kexue.core.describe import Description, Input
from kexue.core.errors import ArgumentError, FileFormatError, UsageError
from kexue.core.files import write_arrays
from kexue.core.inputs import read_floats, read_inputs
from kexue.core.job import Job

Array = NDArray[Any]
NAN, INF = float("nan"), float("inf")


def row(
    name: str, dtype: str = "float", axes: str = "batch class", *, optional: bool = False
) -> Input:
    return Input(name, "Tensor", dtype, tuple(axes.split()), optional, "")


SCORES, TARGET = row("scores"), row("target", "int", "batch")
MASK = row("mask", "bool", "batch class", optional=True)


def job(
    *files: str | Path, inputs: Sequence[Input] = (SCORES, TARGET, MASK), dtype: str = "float32"
) -> Job:
    description = Description(
        component=Component("loss", "toy", "toy:Toy", "A toy."),
        doc="",
        parameters=(),
        inputs=tuple(inputs),
        method="forward",
        returns="",
        example="",
        capabilities=(),
    )
    return Job(
        description=description,
        factory=dict,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        files=[str(name) for name in files],
    )


@contextmanager
def refused(
    words: str, error: type[UsageError] = ArgumentError, **culprit: object
) -> Iterator[None]:
    """Assert a refusal in one line that names the culprit, in the text and as an attribute."""
    with pytest.raises(error, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)
    for name, value in culprit.items():
        assert str(getattr(caught.value, name)) == str(value)


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a file: text as it is, arrays by suffix."""

    def write(name: str, content: Any = None, /, **arrays: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            given = {"": content} if content is not None else arrays
            write_arrays(path, {key: np.asarray(value) for key, value in given.items()})
        return path

    return write


@pytest.fixture
def scores(save: Save) -> Path:
    return save("scores.npy", [[0.5, 1.0, 2.0], [1.5, -1.0, 0.0]])


@pytest.fixture
def target(save: Save) -> Path:
    return save("target.npy", [2, 0])


def one(path: Path | str, wanted: Input, dtype: str = "float32") -> torch.Tensor:
    """Return a file as the only input."""
    (tensor,) = read_inputs(job(path, inputs=[wanted], dtype=dtype)).values()
    return tensor


# -- which file is which input --------------------------------------------------------------------


def test_files_fill_the_inputs_in_order(scores: Path, target: Path) -> None:
    found = read_inputs(job(scores, target))
    assert list(found) == ["scores", "target"]
    assert found["scores"].dtype == torch.float32
    assert found["target"].tolist() == [2, 0]
    assert found["target"].dtype == torch.int64


def test_a_named_file_fills_its_input_in_any_order(scores: Path, target: Path) -> None:
    found = read_inputs(job(f"target={target}", scores))
    assert list(found) == ["scores", "target"]
    assert found["scores"].shape == (2, 3)


def test_a_file_of_named_arrays_fills_several(save: Save) -> None:
    both = save("both.npz", scores=[[0.5, 1.0]], target=[1], notes=[7])
    assert list(read_inputs(job(both))) == ["scores", "target"]


def test_a_file_for_one_input_gives_its_only_or_its_own_array(save: Save) -> None:
    other = save("other.npz", anything=[[0.5, 1.0]])
    both = save("both.npz", scores=[[9.0, 9.0]], target=[1])
    found = read_inputs(job(f"scores={other}", f"target={both}"))
    assert found["scores"].tolist() == [[0.5, 1.0]]
    assert found["target"].tolist() == [1]
    several = save("several.npz", a=[1], b=[2])
    with refused("must hold one array, or one named target. Found a, b", FileFormatError):
        read_inputs(job(f"target={several}", other))


def test_a_path_may_hold_an_equals_sign(save: Save, target: Path) -> None:
    inside = save("lr=0.1/scores.npy", [[0.5, 1.0], [2.0, 3.0]])
    for given in (inside, f"scores={inside}"):
        assert read_inputs(job(given, target))["scores"].shape == (2, 2)


def test_a_path_that_begins_like_an_input_of_another_name(
    save: Save, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save("lr=0.1.npy", [[0.5, 1.0], [2.0, 3.0]]).parent)
    assert read_inputs(job("lr=0.1.npy", target))["scores"].shape == (2, 2)


def test_numbers_come_from_standard_input(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("-", "scores=-"):
        stream = SimpleNamespace(buffer=io.BytesIO(b"0.5 1\n2 3\n"))
        monkeypatch.setattr(sys, "stdin", stream)
        assert read_inputs(job(given, target))["scores"].tolist() == [[0.5, 1], [2, 3]]


def test_rejects_an_input_that_is_not_there(scores: Path) -> None:
    with refused(
        r"loss/toy needs the input `target` \(int \[batch\]\). Give a file for each of: scores "
        "target",
        argument="target",
    ):
        read_inputs(job(scores))
    with refused("needs the input `scores`", argument="scores"):
        read_inputs(job())


def test_rejects_an_unknown_input(scores: Path) -> None:
    with refused(
        "has no input 'score'. Did you mean 'scores'.* It takes: scores, target, mask.*written ./",
        argument="score",
    ):
        read_inputs(job(f"score={scores}"))


def test_rejects_two_files_for_one_input(scores: Path, target: Path, save: Save) -> None:
    for files in ((scores, f"scores={target}"), (f"target={target}", f"target={scores}")):
        with refused("must be given once. Found it in .* and in"):
            read_inputs(job(*files))
    both = save("both.npz", mask=[[True]], target=[1])
    with refused("`target` of loss/toy must be given once", argument="target"):
        read_inputs(job(scores, target, both))


def test_rejects_more_files_than_inputs(scores: Path, target: Path) -> None:
    with refused("takes 2 inputs .scores, target.. Found 3 files", argument="files"):
        read_inputs(job(scores, target, target, inputs=[SCORES, TARGET]))


def test_rejects_arrays_of_other_names(save: Save) -> None:
    path = save("a.npz", logits=[[0.5]], labels=[1])
    with refused(
        "must hold arrays named scores, target, mask. Found logits, labels. `NAME=",
        FileFormatError,
        path=path,
    ):
        read_inputs(job(path))


def test_rejects_a_name_without_a_file() -> None:
    with refused("`scores=` must be followed by a file", argument="scores"):
        read_inputs(job("scores="))


def test_rejects_a_missing_file_under_a_name(tmp_path: Path) -> None:
    path = tmp_path / "none.npy"
    with refused("none.npy does not exist", FileFormatError, path=path):
        read_inputs(job(f"scores={path}"))


# -- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "values", [[1, 0], [True, False], [1.0, 0.0]], ids=["int", "bool", "float"]
)
def test_floats_take_any_numbers(save: Save, values: list[Any], dtype: str) -> None:
    found = one(save("a.npy", values), row("x", axes="batch"), dtype)
    assert found.dtype == getattr(torch, dtype)
    assert found.tolist() == [1.0, 0.0]


def test_floats_take_infinities(save: Save) -> None:
    assert one(save("a.json", "[-Infinity, 1]"), row("x", axes="batch")).tolist() == [-INF, 1.0]


@pytest.mark.parametrize(
    "values", [[1, 0], [True, False], [1.0, 0.0]], ids=["int", "bool", "float"]
)
def test_whole_numbers_take_whole_values(save: Save, values: list[Any]) -> None:
    found = one(save("a.npy", values), row("x", "int", "batch"))
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize(
    "values", [[1, 0], [True, False], [1.0, 0.0]], ids=["int", "bool", "float"]
)
def test_truth_takes_zero_and_one(save: Save, values: list[Any]) -> None:
    found = one(save("a.npy", values), row("x", "bool", "batch"))
    assert found.dtype == torch.bool
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["any", "number", ""])
@pytest.mark.parametrize(
    ("values", "kept"),
    [([1, 0], torch.int64), ([True, False], torch.bool), ([1.5, 0.0], torch.float32)],
    ids=["int", "bool", "float"],
)
def test_anything_keeps_its_kind(
    save: Save, values: list[Any], kept: torch.dtype, dtype: str
) -> None:
    found = one(save("a.npy", values), row("x", dtype, "batch"))
    assert found.dtype == kept
    assert found.tolist() == values


@pytest.mark.parametrize(
    ("dtype", "values", "words"),
    [
        (
            "float",
            [[0.5, NAN], [NAN, 1]],
            r"must not hold NaN. Found 2, the first at index \[0, 1\]",
        ),
        ("any", [[NAN]], "must not hold NaN"),
        ("", [[NAN]], "must not hold NaN"),
        ("int", [[1.0, NAN]], r"must not hold NaN. Found 1, the first at index \[0, 1\]"),
        ("int", [[1, 1.5]], r"must be whole numbers below 2\*\*53. Found 1.5 at index \[0, 1\]"),
        ("int", [[1e300]], r"must be whole numbers below 2\*\*53. Found 1e\+300"),
        ("int", [[1, INF]], "must be whole numbers.* Found inf"),
        (
            "int",
            np.array([[2**63]], dtype=np.uint64),
            r"must be .* below 2\*\*63. Found 9223372036854775808",
        ),
        ("number", np.array([[2**63]], dtype=np.uint64), r"must be whole numbers below 2\*\*63"),
        ("bool", [[0, 1, 2]], r"must be true/false or 0/1. Found 2 at index \[0, 2\]"),
        ("bool", [[0.5]], "must be true/false or 0/1. Found 0.5"),
        ("bool", [[NAN]], "must be true/false or 0/1. Found nan"),
        ("bool", [[-1]], "must be true/false or 0/1. Found -1"),
    ],
)
def test_rejects_wrong_values(save: Save, dtype: str, values: Any, words: str) -> None:
    path = save("a.npy", values)
    with refused(f"`x` in .*a.npy {words}", argument="x"):
        one(path, row("x", dtype))


def test_rejects_a_wrong_single_value(save: Save) -> None:
    with refused("must not hold NaN. Found 1, the first .", argument="x"):
        one(save("a.npy", NAN), row("x", axes=""))
    with refused("Found 1.5.$", argument="x"):
        one(save("a.npy", 1.5), row("x", "int", ""))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.csv", "a.json", "a.jsonl"])
def test_rejects_nan_in_a_file_of_any_type(save: Save, name: str) -> None:
    path = save(name, [[0.5, 1.0], [NAN, 1.0]])
    with refused(r"must not hold NaN. Found 1, the first at index \[1, 0\]", argument="scores"):
        read_inputs(job(f"scores={path}", inputs=[SCORES]))


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 70000.0), ("bfloat16", -3.4e38 * 1.01), ("float32", 1e39)]
)
def test_rejects_numbers_that_would_overflow(save: Save, dtype: str, value: float) -> None:
    path = save("a.npy", [[0.5, value, INF]])
    with refused(
        rf"must be within {dtype}, up to .*at index \[0, 1\]. Use `--dtype f", argument="x"
    ):
        one(path, row("x"), dtype)
    assert one(path, row("x"), "float64").tolist() == [[0.5, value, INF]]


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6.0).reshape(2, 3).astype(">f8"),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.arange(12.0).reshape(2, 6)[:, ::2].astype(np.float16),
        np.arange(6, dtype=np.uint16).reshape(2, 3),
    ],
    ids=["fortran", "big-endian", "big-endian int", "half", "uint16"],
)
def test_arrays_of_any_layout_become_tensors(save: Save, array: Array) -> None:
    assert one(save("a.npy", array), row("x")).tolist() == array.tolist()


def test_the_file_is_not_touched_through_the_tensor(scores: Path) -> None:
    before = scores.read_bytes()
    one(scores, row("x"), "float64").zero_()
    assert scores.read_bytes() == before


# -- shapes ---------------------------------------------------------------------------------------


def test_rejects_a_wrong_number_of_axes(save: Save, target: Path) -> None:
    with refused(
        r"`scores` in .* must have 2 axes, \[batch, class\]. Found shape \[2, 1, 3\]",
        argument="scores",
    ):
        read_inputs(job(save("a.npy", np.zeros((2, 1, 3))), target))
    with refused(r"must have 1 axis, \[batch\]. Found shape \[\]", argument="target"):
        read_inputs(job(save("b.npy", [[0.5]]), save("c.json", "3")))


def test_rejects_axes_that_disagree(scores: Path, save: Save, target: Path) -> None:
    with refused(
        r"`target` in .* must have shape \[batch\] = \[2\], with the batch axis of `scores`. "
        r"Found \[3\]",
        argument="target",
    ):
        read_inputs(job(scores, save("a.npy", [1, 2, 0])))
    with refused(
        r"`mask` .* must have shape \[batch, class\] = \[2, 3\], with the class axis of `scores`. "
        r"Found \[2, 2\]",
        argument="mask",
    ):
        read_inputs(job(scores, target, save("b.npy", np.ones((2, 2)))))


def test_rejects_an_axis_that_disagrees_with_itself(save: Save) -> None:
    with refused(r"must have shape \[tag, tag\] = \[2, 2\]. Found \[2, 3\]", argument="x"):
        one(save("a.npy", np.zeros((2, 3))), row("x", axes="tag tag"))


def test_rejects_an_axis_of_another_fixed_size(save: Save) -> None:
    assert one(save("a.npy", np.zeros((5, 2))), row("x", axes="batch 2")).shape == (5, 2)
    with refused(r"must have shape \[batch, 2\] = \[5, 2\]. Found \[5, 3\]", argument="x"):
        one(save("b.npy", np.zeros((5, 3))), row("x", axes="batch 2"))


def test_nameless_axes_may_differ(save: Save) -> None:
    assert one(save("a.npy", np.zeros((2, 3))), row("x", axes="_ _")).shape == (2, 3)


@pytest.mark.parametrize("axes", ["*batch class", "... class", ""])
def test_variadic_and_unknown_shapes_take_anything(save: Save, axes: str) -> None:
    assert one(save("a.npy", np.zeros((2, 3, 4))), row("x", axes=axes)).shape == (2, 3, 4)


@pytest.mark.parametrize("axes", ["*batch class", "... class", "batch *class", "*#batch class"])
def test_variadic_shapes_need_their_other_axes(save: Save, axes: str) -> None:
    assert one(save("a.npy", np.zeros(2)), row("x", axes=axes)).shape == (2,)
    with refused(r"must have at least 1 axis, \[.*\]. Found shape \[\]", argument="x"):
        one(save("b.npy", 1.0), row("x", axes=axes))


def test_a_variadic_axis_between_others_takes_none_of_theirs(save: Save) -> None:
    inner = row("x", axes="batch *time class")
    assert one(save("a.npy", np.zeros((2, 3))), inner).shape == (2, 3)
    with refused(r"must have at least 2 axes, .* Found shape \[2\]", argument="x"):
        one(save("b.npy", np.zeros(2)), inner)


def test_rejects_variadic_axes_that_disagree(save: Save) -> None:
    inputs = [row("x", axes="*batch class"), row("y", axes="*batch"), row("z", axes="class")]
    x = save("x.npy", np.zeros((2, 3, 4)))
    good = save("y.npy", np.zeros((2, 3))), save("good.npy", np.zeros(4))
    assert len(read_inputs(job(x, *good, inputs=inputs))) == 3
    with refused(
        r"must have shape \[\*batch\] = \[2, 3\], with the \*batch axis of `x`. Found \[3, 2\]",
        argument="y",
    ):
        read_inputs(job(x, save("y.npy", np.zeros((3, 2))), good[1], inputs=inputs))
    with refused(r"\[class\] = \[4\], with the class axis of `x`. Found \[3\]", argument="z"):
        read_inputs(job(x, save("z.npy", np.zeros(3)), inputs=[inputs[0], inputs[2]]))


def test_axes_that_broadcast_may_differ(save: Save) -> None:
    inputs = [row("x", axes="#batch class"), row("y", axes="#batch class")]
    x, y = save("x.npy", np.zeros((2, 3))), save("y.npy", np.zeros((1, 3)))
    assert len(read_inputs(job(x, y, inputs=inputs))) == 2


def test_a_table_of_one_column_has_the_axes_that_are_asked_for(save: Save) -> None:
    path = save("a.csv", "x\n0.5\n1\n")
    assert one(path, row("x", axes="batch class")).tolist() == [[0.5], [1.0]]
    assert one(path, row("x", axes="batch")).tolist() == [0.5, 1.0]
    with refused(r"must have 2 axes.*Found shape \[2\]"):
        one(save("a.npy", [0.5, 1.0]), row("x", axes="batch class"))


def test_ragged_rows_arrive_padded(save: Save) -> None:
    path = save("a.jsonl", "[1]\n[]\n[2, 3]\n")
    assert one(path, row("x", "int", "batch label")).tolist() == [[1, -1], [-1, -1], [2, 3]]


def test_inputs_may_have_no_rows(save: Save) -> None:
    path = save("a.json", '{"scores": [], "target": []}')
    found = read_inputs(job(path, inputs=[row("scores", axes="batch"), TARGET]))
    assert [t.shape for t in found.values()] == [(0,), (0,)]
    assert found["target"].dtype == torch.int64


# -- one array of floats --------------------------------------------------------------------------


def test_reads_the_only_array(save: Save) -> None:
    found = read_floats(job(dtype="float64"), str(save("a.npz", anything=[1, 2])), "target")
    assert found.dtype == torch.float64
    assert found.tolist() == [1.0, 2.0]


def test_rejects_several_arrays_where_one_is_wanted(save: Save) -> None:
    path = save("a.npz", a=[1], b=[2])
    with refused("must hold one array. Found 2: a, b", FileFormatError, path=path):
        read_floats(job(), str(path), "target")


def test_rejects_nan_where_floats_are_wanted(save: Save) -> None:
    with refused("`target` in .* must not hold NaN", argument="target"):
        read_floats(job(), str(save("a.npy", [NAN])), "target")


def test_one_column_is_rows_on_request(save: Save) -> None:
    path = str(save("a.csv", "1\n2\n"))
    assert read_floats(job(), path, "x").shape == (2,)
    assert read_floats(job(), path, "x", rows=True).shape == (2, 1)
    assert read_floats(job(), str(save("a.npy", [1, 2])), "x", rows=True).shape == (2,)
