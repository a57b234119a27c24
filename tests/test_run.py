"""Runs: from names, files and settings to a result, and from a result to files."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from kexue.core.component import Component, Example, Interface
from kexue.core.errors import ArgumentError, FileFormatError, ManifestError, UsageError
from kexue.core.files import read_arrays, read_lines, write_arrays
from kexue.core.interfaces.loss import Loss, reduce
from kexue.core.job import Job, Result
from kexue.core.registry import Registry
from kexue.core.run import (
    Request,
    execute,
    interface_of,
    options,
    purpose,
    result_json,
    write_example,
    write_result,
)

Form = Literal["flat", "steep"]


class Scaled(Loss):
    """Squared distance of a score from its target.

    Args:
        scale: Multiplies the loss.
        form: Shape.
        steps: A count.
        strict: A switch.
        name: Any text.
        widths: Several counts.
        limit: May be None.
        inner: Another component.
        anything: Whatever.
        reduction: As everywhere.
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        form: Form = "flat",
        steps: int = 1,
        strict: bool = False,
        name: str = "",
        widths: list[int] | None = None,
        limit: float | None = None,
        inner: nn.Module | None = None,
        anything: Any = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        self.kept = (form, steps, strict, name, widths, limit, anything)
        self.weight = nn.Parameter(torch.tensor(float(scale)))
        self.inner = inner

    def forward(self, scores: Float[Tensor, batch], target: Int[Tensor, batch]) -> Tensor:
        """Return the loss.

        Args:
            scores: Scores.
            target: Targets.
        """
        return reduce(self.weight * (scores - target).square(), self.reduction)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three rows."""
        inputs = {"scores": torch.randn(3, generator=generator), "target": torch.tensor([0, 1, 2])}
        params = {"scale": 1e-05, "form": "steep", "name": "a b", "strict": True}
        return Example({**params, "widths": (1, 2), "limit": None}, inputs)


def plain(scores: Float[Tensor, batch], target: Int[Tensor, batch]) -> Tensor:
    """Return the distance."""
    return (scores - target).abs()


class Echo:
    """Repeats text.

    Args:
        times: How often.
    """

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __call__(self, text: str) -> str:
        """Return the text."""
        return text * self.times

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return two lines."""
        del generator
        return Example({"times": 2}, {"text": ["eins", "zwei drei"]})


def run_echo(job: Job, *, upper: bool = False, limit: int = 100, form: str = "plain") -> Result:
    """Repeat every line of a file.

    Args:
        job: The call.
        upper: In capitals.
        limit: Lines, at most.
        form: plain or fancy.
    """
    echo = job.build()
    lines = (echo(line.upper() if upper else line) for line in read_lines(job.one_file("text")))
    return Result({"form": form, "limit": limit}, lines=lines)


def apply_echo(job: Job, *, times: int = 3) -> Result:
    """Repeat with a fitted model.

    Args:
        job: The call.
        times: How often.
    """
    return Result({"times": times, "model": str(job.model)})


def run_bare(job: Job) -> Result:
    """Do nothing."""
    del job
    return Result({"figure": float("nan"), "list": [1.0, float("inf")]})


@pytest.fixture
def registry() -> Registry:
    registry = Registry(discover=False)
    here = __name__
    registry.register(
        [
            Component("loss", "scaled", f"{here}:Scaled", "Squared distance."),
            Component("loss", "function", f"{here}:plain", "Distance."),
            Interface(
                "echo",
                f"{here}:Echo",
                "Text to text.",
                "__call__",
                f"{here}:run_echo",
                apply=f"{here}:apply_echo",
            ),
            Component("echo", "plain", f"{here}:Echo", "Repeats text."),
            Interface("bare", f"{here}:Echo", "To nothing.", "__call__", f"{here}:run_bare"),
            Component("bare", "plain", f"{here}:Echo", "Does nothing."),
        ],
        slug="tiny",
        owner="tiny",
    )
    return registry


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    write_arrays(tmp_path / "scores.npy", {"": np.array([1.0, 2.0, 4.0])})
    write_arrays(tmp_path / "target.npy", {"": np.array([1, 1, 1])})
    return [str(tmp_path / "scores.npy"), str(tmp_path / "target.npy")]


Configured = Callable[[str], Path]


@pytest.fixture
def config(tmp_path: Path) -> Configured:
    """Write a configuration."""

    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


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


def params_of(registry: Registry, files: list[str], *texts: str) -> dict[str, Any]:
    """Return the parameters that ``--set`` texts give."""
    job, _ = execute(registry, Request("scaled", files=files, params=texts))
    return dict(job.params)


# -- running --------------------------------------------------------------------------------------


def test_runs_on_files(registry: Registry, files: list[str]) -> None:
    job, result = execute(registry, Request("loss/scaled", files=files, params=["scale=2"]))
    assert job.id == "loss/scaled"
    assert result.arrays["values"].tolist() == [0.0, 2.0, 18.0]
    assert result.summary == {"rows": 3, "mean": pytest.approx(20 / 3), "sum": 20.0}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "fp16"])
def test_computes_in_the_dtype(registry: Registry, files: list[str], dtype: str) -> None:
    job, result = execute(registry, Request("scaled", files=files, dtype=dtype))
    assert result.arrays["values"].dtype == job.dtype
    assert result_json(job, result, [])["dtype"] == str(job.dtype).removeprefix("torch.")


def test_rejects_unknown_devices_dtypes_and_seeds(registry: Registry, files: list[str]) -> None:
    with refused("`device` must be a device", argument="device"):
        execute(registry, Request("scaled", files=files, device="gpu0"))
    with refused("`dtype` must be one of", argument="dtype"):
        execute(registry, Request("scaled", files=files, dtype="int8"))
    with refused("`seed` must be from 0", argument="seed"):
        execute(registry, Request("scaled", files=files, seed=-1))


def test_rejects_the_verb_that_a_kind_has_not(registry: Registry, tmp_path: Path) -> None:
    with refused("loss/scaled cannot be fitted.*Kinds that are: decoder, generator"):
        execute(registry, Request("scaled", verb="fit"))
    with refused("loss/scaled cannot be run with a fitted model"):
        execute(registry, Request("scaled", model=tmp_path))


# -- options of a kind ----------------------------------------------------------------------------


def test_reads_the_options_of_a_kind_from_source(registry: Registry) -> None:
    found = options(registry.interface("echo"), "run")
    assert [(p.name, p.annotation, p.default, p.doc) for p in found] == [
        ("upper", "bool", "False", "In capitals."),
        ("limit", "int", "100", "Lines, at most."),
        ("form", "str", "'plain'", "plain or fancy."),
        ("times", "int", "3", "How often."),
    ]
    assert options(registry.interface("echo"), "fit") == ()
    assert options(registry.interface("bare"), "run") == ()


def test_says_what_a_kind_does(registry: Registry) -> None:
    assert purpose(registry.interface("echo"), "run") == "Repeat every line of a file."
    assert purpose(registry.interface("echo"), "fit") == ""


def test_passes_options_to_the_kind(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\n")
    request = Request("echo/plain", files=[str(tmp_path / "a.txt")], options={"upper": True})
    _, result = execute(registry, request)
    assert list(result.lines or ()) == ["EINS"]
    _, result = execute(registry, Request("echo/plain", model=tmp_path, options={"times": 5}))
    assert result.summary == {"times": 5, "model": str(tmp_path)}


def test_rejects_options_that_the_kind_has_not_here(
    registry: Registry, files: list[str], tmp_path: Path
) -> None:
    with refused("`--num-samples` has no use here: loss/scaled takes --grad without `--model`"):
        execute(registry, Request("scaled", files=files, options={"num_samples": 3}))
    with refused("echo/plain takes --times with `--model`", argument="upper"):
        execute(registry, Request("echo/plain", model=tmp_path, options={"upper": True}))
    with refused("bare/plain takes no options of its own", argument="upper"):
        execute(registry, Request("bare/plain", options={"upper": True}))


def test_a_component_may_have_commands_of_its_own(registry: Registry, tmp_path: Path) -> None:
    here = __name__
    own = Component(
        "loss", "own", f"{here}:Scaled", "Squared.", run=f"{here}:run_bare",
        fit=f"{here}:run_bare", apply=f"{here}:apply_echo",
    )  # fmt: skip
    registry.register([own], slug="own", owner="own")
    interface = interface_of(registry, registry.get("loss/own"))
    assert [p.name for p in options(interface, "run")] == ["times"]
    assert math.isnan(execute(registry, Request("own"))[1].summary["figure"])
    assert math.isnan(execute(registry, Request("own", verb="fit"))[1].summary["figure"])
    _, result = execute(registry, Request("own", model=tmp_path, options={"times": 2}))
    assert result.summary["times"] == 2
    kind = interface_of(registry, registry.get("loss/scaled"))
    assert kind == registry.interface("loss")


def test_a_component_s_commands_must_be_targets() -> None:
    with pytest.raises(ManifestError, match="`target` of component loss/own must be"):
        Component("loss", "own", "a:b", "Squared.", run="no target")


# -- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("scale=2", 2),
        ("scale=1e-3", 0.001),
        ("scale=-.5", -0.5),
        ("scale=inf", float("inf")),
        ("form=steep", "steep"),
        ("steps=3", 3),
        ("strict=on", True),
        ("strict=no", False),
        ("name=no", "no"),
        ("name=on", "on"),
        ("name=1", "1"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("name=[1, 2]", "[1, 2]"),
        ("name=!!python/object:os.system", "!!python/object:os.system"),
        ("widths=[1, 2]", [1, 2]),
        ("widths=None", None),
        ("limit=None", None),
        ("limit=null", None),
        ("limit=1e3", 1000.0),
        (" scale =3", 3),
    ],
)
def test_parses_what_is_set(registry: Registry, files: list[str], text: str, value: object) -> None:
    (found,) = params_of(registry, files, text).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words", "argument"),
    [
        ("scale", "`--set` must be NAME=VALUE. Found 'scale'", "set"),
        ("scale=high", "`scale` of loss/scaled must be float. Found 'high'", "scale"),
        ("scale=true", "`scale` of loss/scaled must be float. Found 'true'", "scale"),
        ("scale=None", "`scale` of loss/scaled must be float", "scale"),
        ("form=round", "`form` of loss/scaled must be 'flat' or 'steep'. Found 'round'", "form"),
        ("steps=1.5", "`steps` of loss/scaled must be int", "steps"),
        ("steps=yes", "`steps` of loss/scaled must be int", "steps"),
        ("strict=2", "`strict` of loss/scaled must be bool", "strict"),
        ("limit=a", "`limit` of loss/scaled must be float", "limit"),
        ("scael=2", "has no parameter 'scael'. Did you mean 'scale'.* It takes: scale,", "scael"),
        ("=2", "has no parameter ''", ""),
    ],
)
def test_rejects_what_cannot_be_set(
    registry: Registry, files: list[str], text: str, words: str, argument: str
) -> None:
    with refused(words, argument=argument):
        params_of(registry, files, text)


def test_the_last_setting_counts(registry: Registry, files: list[str]) -> None:
    assert params_of(registry, files, "scale=2", "scale=3") == {"scale": 3}


def test_the_component_itself_may_refuse_a_value(registry: Registry, files: list[str]) -> None:
    with refused("`reduction` of Scaled must be one of", argument="reduction"):
        params_of(registry, files, "reduction=median")


# -- configurations -------------------------------------------------------------------------------


def test_runs_from_a_configuration(
    registry: Registry, files: list[str], config: Configured
) -> None:
    text = f"use: loss/scaled\nwith: {{scale: 2, form: steep}}\nfiles: {json.dumps(files)}\n"
    job, result = execute(
        registry, Request("scaled", config=config(text + "options: {grad: true}"))
    )
    assert dict(job.params) == {"scale": 2, "form": "steep"}
    assert set(result.arrays) == {"values", "gradient"}


def test_what_is_typed_goes_before_the_configuration(
    registry: Registry, files: list[str], config: Configured
) -> None:
    path = config("with: {scale: 2, steps: 5}\nfiles: [nowhere.npy]\noptions: {grad: true}\n")
    request = Request(
        "scaled", config=path, params=["scale=3"], files=files, options={"grad": False}
    )
    job, result = execute(registry, request)
    assert dict(job.params) == {"scale": 3, "steps": 5}
    assert set(result.arrays) == {"values"}


def test_a_configuration_may_hold_components(
    registry: Registry, files: list[str], config: Configured
) -> None:
    path = config("with: {inner: {use: loss/scaled, with: {scale: 7}}}")
    job, _ = execute(registry, Request("scaled", config=path, files=files))
    assert job.params["inner"].weight.item() == 7.0
    assert "Scaled" in result_json(job, Result(), [])["params"]["inner"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-.inf", float("-inf")), ("1.0e-05", 1e-5), ("null", None), ("[no]", [False])],
)
def test_values_of_a_configuration_keep_their_type(
    registry: Registry, files: list[str], config: Configured, text: str, value: object
) -> None:
    for name in ("anything", "limit"):
        if name == "limit" and isinstance(value, list):
            continue
        path = config(f"with: {{{name}: {text}}}")
        job, _ = execute(registry, Request("scaled", config=path, files=files))
        assert job.params[name] == value
        assert type(job.params[name]) is type(value)


def test_numbers_of_a_configuration_are_numbers(
    registry: Registry, files: list[str], config: Configured
) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    job, _ = execute(registry, Request("scaled", config=config("with: {scale: 1e-3}"), files=files))
    assert job.params["scale"] == 0.001


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("usse: loss/scaled", "has no use for 'usse'. Did you mean 'use'.* It may hold: use, with"),
        ("use: loss/other", "is for loss/other, and loss/scaled was asked for"),
        ("use: [loss/scaled]", "is for ..loss/scaled.., and loss/scaled"),
        ("with: [1, 2]", r"`with` in .* must be a mapping of names to values. Found \[1, 2\]"),
        ("with: {1: 2}", "`with` in .* must be a mapping of names"),
        ("options: grad", "`options` in .* must be a mapping of names"),
        ("files: scores.npy", "`files` in .* must be a list of file names. Found 'scores.npy'"),
        ("files: [1]", "`files` in .* must be a list of file names"),
        ("- a\n- b", "must hold a mapping. Found list"),
        ("just text", "must hold a mapping. Found str"),
        ("with: {scale: 2", "is not valid YAML"),
        ("with: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_rejects_configurations(
    registry: Registry, config: Configured, text: str, words: str
) -> None:
    path = config(text)
    with refused(words, FileFormatError, path=path):
        execute(registry, Request("scaled", config=path))


@pytest.mark.parametrize(
    ("text", "words", "argument"),
    [
        ("with: {scael: 2}", "has no parameter 'scael'. Did you mean 'scale'", "scael"),
        ("with: {scale: high}", "`scale` of loss/scaled must be float. Found 'high'", "scale"),
        ("with: {scale: true}", "`scale` of loss/scaled must be float", "scale"),
        ("with: {scale: null}", "`scale` of loss/scaled must be float", "scale"),
        ("with: {form: round}", "must be 'flat' or 'steep'", "form"),
        (
            "with: {name: no}",
            "`name` of loss/scaled must be str. Found False; .* needs quotes",
            "name",
        ),
        ("with: {name: 1}", "`name` of loss/scaled must be str. Found 1; .* needs quotes", "name"),
        ("with: {inner: {use: loss/none}}", "inner: No component named 'loss/none'", None),
        ("options: {grad: much}", "`grad` of `options` must be bool. Found 'much'", "grad"),
        ("options: {steps: 3}", "`--steps` has no use here", "steps"),
    ],
)
def test_rejects_values_of_a_configuration(
    registry: Registry, config: Configured, text: str, words: str, argument: str | None
) -> None:
    culprit = {} if argument is None else {"argument": argument}
    with refused(words, UsageError, **culprit):
        execute(registry, Request("scaled", config=config(text)))


def test_an_empty_configuration_says_nothing(
    registry: Registry, files: list[str], config: Configured
) -> None:
    execute(registry, Request("scaled", config=config("# nothing yet\n"), files=files))


def test_rejects_a_configuration_that_is_not_there(registry: Registry, tmp_path: Path) -> None:
    with refused("none.yaml does not exist", FileFormatError, path=tmp_path / "none.yaml"):
        execute(registry, Request("scaled", config=tmp_path / "none.yaml"))
    with refused("is a folder", FileFormatError, path=tmp_path):
        execute(registry, Request("scaled", config=tmp_path))


# -- weights --------------------------------------------------------------------------------------


def test_loads_weights(registry: Registry, files: list[str], tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.npz"):
        write_arrays(tmp_path / name, {"weight": np.array(10.0, dtype=np.float32)})
        _, result = execute(registry, Request("scaled", files=files, weights=tmp_path / name))
        assert result.arrays["values"].tolist() == [0.0, 10.0, 90.0]
    save_file({"weight": torch.tensor(2.0, dtype=torch.bfloat16)}, tmp_path / "h.safetensors")
    _, result = execute(
        registry, Request("scaled", files=files, weights=tmp_path / "h.safetensors")
    )
    assert result.arrays["values"].tolist() == [0.0, 2.0, 18.0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"wieght": np.array(1.0)}, 'Missing key.* "weight"'),
        ({"weight": np.array(1.0), "bias": np.array(1.0)}, 'Unexpected key.* "bias"'),
        ({"weight": np.ones(2)}, "size mismatch for weight"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_rejects_weights_of_something_else(
    registry: Registry, files: list[str], tmp_path: Path, weights: dict[str, Any], words: str
) -> None:
    path = tmp_path / "w.safetensors"
    write_arrays(path, weights)
    with refused(
        f"w.safetensors does not hold the weights of loss/scaled: .*{words}",
        FileFormatError,
        path=path,
    ):
        execute(registry, Request("scaled", files=files, weights=path))


def test_rejects_weights_where_there_are_none(
    registry: Registry, files: list[str], tmp_path: Path
) -> None:
    with refused("echo/plain has no weights to load", argument="weights"):
        execute(registry, Request("echo/plain", files=files[:1], weights=tmp_path / "w.npz"))
    pickled = tmp_path / "w.pt"
    torch.save({"weight": torch.tensor(1.0)}, pickled)
    with refused("looks like a pickle", FileFormatError, path=pickled):
        execute(registry, Request("scaled", files=files, weights=pickled))


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", [".npy", ".npz", ".safetensors", ".csv", ".tsv", ".json", ".jsonl", ".txt"]
)
def test_writes_arrays_by_suffix(
    registry: Registry, files: list[str], tmp_path: Path, suffix: str
) -> None:
    named = {".npz", ".safetensors", ".json"}
    out = tmp_path / f"out{suffix}"
    request = Request("scaled", files=files, out=out, options={"grad": True})
    job, result = execute(registry, request)
    assert write_result(result, out, None) == [out]
    found = read_arrays(out)
    assert found.get("values", found.get("", np.zeros(0))).tolist() == [0.0, 1.0, 9.0]
    assert set(found) == ({"values", "gradient"} if suffix in named else {""})
    document = result_json(job, result, [out])
    assert document["files"] == [str(out)]
    assert "values" not in document


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".csv", ".json"])
def test_writes_results_of_any_dtype(
    registry: Registry, files: list[str], tmp_path: Path, suffix: str, dtype: str
) -> None:
    out = tmp_path / f"out{suffix}"
    _, result = execute(registry, Request("scaled", files=files, dtype=dtype))
    write_result(result, out, None)
    assert next(iter(read_arrays(out).values())).tolist() == [0.0, 1.0, 9.0]


def test_lines_are_written_as_they_come(registry: Registry, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("eins\nzwei\n")
    request = Request("echo/plain", files=[str(source)], params=["times=2"], out=out)
    _, result = execute(registry, request)
    assert isinstance(result.lines, Iterator)
    assert write_result(result, out, None) == [out]
    assert out.read_text() == "einseins\nzweizwei\n"
    assert result.lines is None


def test_a_line_that_fails_leaves_no_file(registry: Registry, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"eins\nzw\xffei\n")
    _, result = execute(registry, Request("echo/plain", files=[str(source)], out=out))
    with refused("line 2 is not UTF-8", FileFormatError, path=source):
        write_result(result, out, None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_says_where_it_cannot_write_before_it_works(
    registry: Registry, files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "missing" / "out.npy"
    with refused("there is no folder", FileFormatError, path=out):
        execute(registry, Request("scaled", files=["nowhere.npy"], out=out))
    with refused("no place to write to", FileFormatError, path="-"):
        execute(registry, Request("scaled", files=files, out=Path("-")))
    _, result = execute(registry, Request("scaled", files=files, out=tmp_path))
    with refused("must end in one of", FileFormatError, path=tmp_path):
        write_result(result, tmp_path, None)


def test_rejects_a_result_that_nothing_can_be_written_of(
    registry: Registry, tmp_path: Path
) -> None:
    _, result = execute(registry, Request("bare/plain"))
    with refused("nothing to write of this result", argument="out"):
        write_result(result, tmp_path / "out.npy", None)
    with refused("nothing to plot of this result", argument="plot"):
        write_result(result, None, tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_writes_plots(registry: Registry, files: list[str], tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"plot{suffix}"
    _, result = execute(registry, Request("scaled", files=files))
    assert write_result(result, None, plot) == [plot]
    beginnings = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert plot.read_bytes().startswith(beginnings[suffix.lower()])


def test_writes_a_page(tmp_path: Path) -> None:
    place = tmp_path / "page.HTML"
    assert write_result(Result(page=lambda: "<p>é</p>"), None, place) == [place]
    assert place.read_text(encoding="utf-8") == "<p>é</p>"
    with refused(r"nothing to plot of this result\. Name an \.html file\.", argument="plot"):
        write_result(Result(page=lambda: "text"), None, tmp_path / "a.png")
    with refused("folder", FileFormatError, path=tmp_path / "x" / "a.html"):
        write_result(Result(page=lambda: "text"), None, tmp_path / "x" / "a.html")


def test_writes_nothing_when_the_plot_cannot_be(
    registry: Registry, files: list[str], tmp_path: Path
) -> None:
    _, result = execute(registry, Request("scaled", files=files))
    for plot, words in (
        ("a.gif", "must end in one of .png .svg .pdf. Found '.gif'"),
        ("a.html", "must end in one of .png .svg .pdf. Found '.html'"),
        ("x/a.png", "folder"),
    ):
        with refused(words, FileFormatError, path=tmp_path / plot):
            write_result(result, tmp_path / "out.npy", tmp_path / plot)
        assert not (tmp_path / "out.npy").exists()


def test_a_run_is_one_json_document(registry: Registry, files: list[str]) -> None:
    job, result = execute(registry, Request("scaled", files=files, params=["scale=2"], seed=3))
    document = result_json(job, result, [])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document == {
        "component": "loss/scaled",
        "params": {"scale": 2},
        "device": str(job.device),
        "dtype": "float32",
        "seed": 3,
        "summary": {"rows": 3, "mean": pytest.approx(20 / 3), "sum": 20.0},
        "values": [0.0, 2.0, 18.0],
        "files": [],
    }


def test_json_has_null_for_what_is_no_number(registry: Registry, tmp_path: Path) -> None:
    job, result = execute(registry, Request("bare/plain"))
    result.arrays = {"values": torch.tensor([[0.5, float("nan")], [float("-inf"), 1.0]])}
    document = result_json(job, result, [])
    assert document["summary"] == {"figure": None, "list": [1.0, None]}
    assert document["values"] == [[0.5, None], [None, 1.0]]
    json.dumps(document, allow_nan=False)


def test_lines_are_part_of_the_document(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\nzwei\n")
    job, result = execute(registry, Request("echo/plain", files=[str(tmp_path / "a.txt")]))
    assert result_json(job, result, [])["lines"] == ["eins", "zwei"]


# -- examples -------------------------------------------------------------------------------------


def test_a_component_that_runs_on_a_fitted_model_alone_says_so_and_writes_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scaled, "needs_fitting", True)
    with pytest.raises(ArgumentError, match=r"loss/scaled .* fitted model.*kexue fit loss/scaled"):
        write_example(registry, "scaled", tmp_path / "try")
    assert not list(tmp_path.iterdir())


def test_an_example_can_be_run_as_it_is_written(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "within"
    words = shlex.split(write_example(registry, "scaled", folder))
    assert words[:3] == ["kexue", "run", "loss/scaled"]
    params = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    job, result = execute(registry, Request(words[2], files=words[3:5], params=params))
    assert dict(job.params) == {**Scaled.example().params, "widths": [1, 2]}
    assert result.summary["rows"] == 3
    assert sorted(path.name for path in folder.iterdir()) == ["scores.npy", "target.npy"]


def test_an_example_of_text_is_lines(registry: Registry, tmp_path: Path) -> None:
    command = write_example(registry, "echo/plain", tmp_path)
    assert command == f"kexue run echo/plain {tmp_path}/text.txt --set times=2"
    assert (tmp_path / "text.txt").read_text() == "eins\nzwei drei\n"


class Calling(Echo):
    """Its example is called with a function."""

    @classmethod
    def example(cls, *, generator: object = None) -> Example:
        del generator
        return Example({}, {"text": plain})


def test_an_example_names_functions_by_their_target(registry: Registry, tmp_path: Path) -> None:
    component = Component("echo", "calling", f"{__name__}:Calling", "Calls a function.")
    registry.register([component], slug="calling", owner="calling")
    assert write_example(registry, "calling", tmp_path) == (
        f"kexue run echo/calling {__name__}:plain"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_example_never_replaces_other_files(registry: Registry, tmp_path: Path) -> None:
    write_example(registry, "scaled", tmp_path)
    write_example(registry, "scaled", tmp_path)
    (tmp_path / "scores.npy").unlink()
    (tmp_path / "target.npy").write_bytes(b"mine")
    with refused("holds something else", FileFormatError, path=tmp_path / "target.npy"):
        write_example(registry, "scaled", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["target.npy"]


def test_rejects_places_for_examples(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "within"):
        with refused("cannot be made", FileFormatError, path=path):
            write_example(registry, "scaled", path)


def test_says_that_there_is_no_example(registry: Registry, tmp_path: Path) -> None:
    with refused("loss/function gives no example", argument="example"):
        write_example(registry, "function", tmp_path)
