"""``kexue run attribution/integrated-gradients`` on files of every sort."""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from kexue.core.errors import ArgumentError, FileFormatError, KexueError, WorkError
from kexue.core.job import Result
from kexue.core.registry import registry
from kexue.core.run import Request, execute, write_example, write_result
from kexue_integrated_gradients import integrated_gradients, token_scores

NAME = "attribution/integrated-gradients"
SOURCE = """
import torch
from torch import nn

torch.manual_seed(0)
table = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
value = nn.Linear(4, 1)
image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
colour = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
flat = nn.Sequential(nn.Linear(36, 3))
VOCABULARY = {"a": 1, "good": 2, "film": 3, "<b>": 4}


class Words(nn.Module):
    def __init__(self, second=False):
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.other = nn.Embedding(2, 2) if second else None
        self.head = nn.Linear(5, 2)

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh().mean(1))


words = Words()
two = Words(second=True)


def last(x):
    return x.view(len(x), 2, 2).square()


def picky(x):
    raise RuntimeError("only on Sundays\\nand more")


def ids(text):
    return [VOCABULARY.get(word, 0) for word in text.split()]


def both(text):
    return torch.tensor(ids(text)), [f"{word}!" for word in text.split()]


def broken(text):
    return {"good": [], "film": [[1]], "a": ([1, 2], ["x"])}.get(text, text)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "m.py").write_text(SOURCE, encoding="utf-8")
    generator = np.random.default_rng(0)
    np.save(folder / "x.npy", generator.normal(size=(5, 4)).astype("float32"))
    np.savetxt(folder / "x.csv", np.load(folder / "x.npy"), delimiter=",", header="a,b,c,d")
    for kind, shape in (("grey", (6, 6)), ("rgb", (6, 6, 3))):
        (folder / kind).mkdir()
        for number in range(3):
            pixels = generator.integers(0, 256, shape).astype("uint8")
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    (folder / "ids.jsonl").write_text("[1, 2, 3]\n[4]\n[5, 6, 7]\n", encoding="utf-8")
    (folder / "texts.txt").write_text("a good film\n\n<b> film\n", encoding="utf-8")
    np.save(folder / "nan.npy", np.array([[1, np.nan, 0, 0]]))
    np.save(folder / "empty.npy", np.zeros((0, 4)))
    np.save(folder / "three.npy", np.zeros((2, 3)))
    np.save(folder / "half.npy", np.full(5, 0.5))
    np.save(folder / "cube.npy", np.zeros((2, 2, 2), dtype="int64"))
    for name, text in (
        ("hole.jsonl", "[1]\n[]\n"),
        ("high.jsonl", "[99]\n"),
        ("one.txt", "good\n"),
        ("two.txt", "a\n"),
        ("blank.txt", "\n\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


Run = Callable[..., Result]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run on files of the folder."""
    monkeypatch.chdir(folder)

    def run(*files: str, params: tuple[str, ...] = (), **options: Any) -> Result:
        settings = {key: options.pop(key) for key in ("dtype", "weights") if key in options}
        request = Request(NAME, files=files, params=params, options=options, **settings)
        return execute(registry, request)[1]

    return run


def module(name: str) -> Any:
    """Return a model of the file, made anew."""
    space: dict[str, Any] = {"__name__": "again"}
    exec(SOURCE, space)  # noqa: S102 -- our own source
    return space[name]


def table(folder: Path) -> torch.Tensor:
    values: NDArray[np.float32] = np.load(folder / "x.npy")
    return torch.from_numpy(values)


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["x.npy", "x.csv"])
def test_explains_the_highest_output_of_a_table(run: Run, folder: Path, file: str) -> None:
    result = run("m.py:table", file)
    model, x = module("table"), table(folder)
    target = model(x).argmax(1)
    wanted = integrated_gradients(model, x, target=target)
    assert list(result.arrays) == ["attributions", "target", "output", "baseline_output", "error"]
    torch.testing.assert_close(result.arrays["attributions"], wanted.values)
    torch.testing.assert_close(result.arrays["output"], wanted.outputs)
    assert result.arrays["target"].tolist() == target.tolist()
    assert result.summary["relative_error"] == pytest.approx(wanted.relative_error, abs=1e-6)
    assert "warning" not in result.summary


def test_takes_targets_and_baselines(run: Run, folder: Path) -> None:
    model, x = module("table"), table(folder)
    np.save(folder / "t.npy", np.array([0, 1, 2, 1, 0]))
    np.save(folder / "b.npy", np.array([[0.0, 0, 0, 0], [1, 1, 1, 1]], dtype="float32"))
    np.save(folder / "one.npy", np.ones(4, dtype="float32"))
    cases: list[tuple[tuple[str, ...], dict[str, Any], Any, Any]] = [
        (("target=t.npy",), {}, [0, 1, 2, 1, 0], None),
        ((), {"target": "2"}, 2, None),
        ((), {"target": "1", "baseline": "mean"}, 1, x.mean(0)),
        ((), {"target": "1", "baseline": "-0.5"}, 1, -0.5),
        (("baselines=b.npy",), {"target": "1"}, 1, [0.0, 1.0]),
        (("baselines=one.npy",), {"target": "1"}, 1, 1.0),
    ]
    for files, options, target, start in cases:
        result = run("m.py:table", "x.npy", *files, **options)
        wanted = integrated_gradients(model, x, start, target=target)
        torch.testing.assert_close(result.arrays["attributions"], wanted.values)


def test_models_of_one_output_need_no_target(run: Run) -> None:
    result = run("m.py:value", "x.npy")
    assert "target" not in result.arrays
    assert result.summary["rows"] == 5
    assert result.plot is not None


def test_outputs_of_two_axes(run: Run, folder: Path) -> None:
    result = run("m.py:last", "x.npy", target="1,0")
    x = table(folder)
    torch.testing.assert_close(result.arrays["attributions"][:, 2], x[:, 2] ** 2)
    assert result.arrays["target"].tolist() == [[1, 0]] * 5


def test_settings_types_and_weights_reach_the_model(run: Run, folder: Path) -> None:
    weights = {k: v + 1 for k, v in module("table").state_dict().items()}
    save_file(weights, folder / "w.safetensors")
    model = module("table").double()
    model.load_state_dict(weights)
    result = run(
        "m.py:table",
        "x.npy",
        params=("steps=3", "rule=right", "tolerance=9"),
        dtype="float64",
        weights=folder / "w.safetensors",
        target="0",
    )
    x = table(folder).double()
    wanted = integrated_gradients(model, x, target=0, steps=3, rule="right", tolerance=9)
    torch.testing.assert_close(result.arrays["attributions"], wanted.values)
    assert result.arrays["attributions"].dtype == torch.float64


def test_warns_in_the_summary(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run("m.py:table", "x.npy", params=("steps=1", "rule=left"))
    assert "use more steps" in result.summary["warning"]
    assert result.summary["relative_error"] > 0.05


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "images", "shape"),
    [
        ("image", "grey", (3, 1, 6, 6)),
        ("colour", "rgb", (3, 3, 6, 6)),
        ("flat", "grey", (3, 36)),
        ("image", "grey/0.png", (1, 1, 6, 6)),
    ],
)
def test_explains_images(
    run: Run, tmp_path: Path, model: str, images: str, shape: tuple[int, ...]
) -> None:
    result = run(f"m.py:{model}", images, layout="flat" if model == "flat" else "channels-first")
    assert tuple(result.arrays["attributions"].shape) == shape
    written = write_result(result, tmp_path / "out.npy", tmp_path / "maps.png")
    assert [path.name for path in written] == ["out.npy", "maps.png"]
    assert np.load(tmp_path / "out.npy").shape == shape
    with Image.open(tmp_path / "maps.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


# -- tokens ---------------------------------------------------------------------------------------


def test_rows_of_ids_are_explained_without_padding(run: Run) -> None:
    result = run("m.py:words", "ids.jsonl", target="1")
    model = module("words")
    scores = result.arrays["attributions"]
    assert result.arrays["length"].tolist() == [3, 1, 3]
    for number, ids in enumerate([[1, 2, 3], [4], [5, 6, 7]]):
        found = integrated_gradients(model, torch.tensor([ids]), target=1, layer="embedding")
        torch.testing.assert_close(scores[number, : len(ids)], token_scores(found.values)[0])
        assert not scores[number, len(ids) :].any()
        assert float(result.arrays["output"][number]) == pytest.approx(float(found.outputs))


def test_the_baseline_of_tokens_is_zero_or_an_id(run: Run) -> None:
    model = module("words")
    ids = torch.tensor([[1, 2, 3], [5, 6, 7]])
    result = run("m.py:words", "ids.jsonl", target="0", baseline="1", pooling="l2")
    start = torch.ones_like(ids)
    found = integrated_gradients(model, ids, start, target=0, layer="embedding")
    wanted = token_scores(found.values, "l2")
    torch.testing.assert_close(result.arrays["attributions"][[0, 2]], wanted)
    assert not result.arrays["attributions"][0, 0]


@pytest.mark.parametrize(("tokenizer", "shown"), [("ids", "&lt;b&gt;"), ("both", "&lt;b&gt;!")])
def test_texts_become_a_page(run: Run, tmp_path: Path, tokenizer: str, shown: str) -> None:
    result = run("m.py:words", "texts.txt", tokenizer=f"m.py:{tokenizer}")
    assert result.arrays["length"].tolist() == [3, 2]
    (page,) = write_result(result, None, tmp_path / "t.html")
    text = page.read_text(encoding="utf-8")
    assert shown in text
    assert "<b>" not in text
    (picture,) = write_result(result, None, tmp_path / "t.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_programs_take_ids(run: Run, folder: Path) -> None:
    ids = torch.tensor([[1, 2, 3], [5, 6, 7]])
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module("words").eval(), (ids,), dynamic_shapes=shapes)
        torch.export.save(program, folder / "words.pt2")
    result = run("words.pt2", "ids.jsonl", layer="embedding", target="1")
    wanted = run("m.py:words", "ids.jsonl", target="1")
    torch.testing.assert_close(result.arrays["attributions"], wanted.arrays["attributions"])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "options", "error", "words"),
    [
        (("m.py:table",), {}, ArgumentError, "a model and its inputs.*Found 1 file\\."),
        (("m.py:table", "x.npy", "x.npy"), {}, ArgumentError, "Found 3 files"),
        (("m.py:table", "y.npy"), {}, FileFormatError, "y.npy does not exist"),
        (("m.py:tabel", "x.npy"), {}, ArgumentError, "Did you mean 'table'"),
        (("m.py:table", "nan.npy"), {}, ArgumentError, "must not hold NaN"),
        (("m.py:table", "empty.npy"), {}, FileFormatError, "holds no rows"),
        (("m.py:table", "three.npy"), {}, WorkError, r"failed on inputs of shape \[2, 3\]"),
        (("m.py:picky", "x.npy"), {}, WorkError, r"RuntimeError: only on Sundays\.$"),
        (("m.py:table", "x.npy"), {"target": "3"}, ArgumentError, r"below the sizes \[3\]"),
        (("m.py:table", "x.npy"), {"target": "a"}, ArgumentError, "predicted, an index"),
        (("m.py:last", "x.npy"), {}, ArgumentError, "--target 0,0"),
        (("m.py:table", "x.npy", "target=half.npy"), {}, ArgumentError, "whole numbers"),
        (("m.py:table", "x.npy", "target=three.npy"), {}, ArgumentError, "each of the 5 rows"),
        (("m.py:table", "x.npy", "baselines=three.npy"), {}, ArgumentError, r"a row, \[4\]"),
        (("m.py:table", "x.npy"), {"baseline": "x"}, ArgumentError, "zero, mean or a number"),
        (("m.py:table", "x.npy"), {"pooling": "x"}, ArgumentError, "'absmax'"),
        (("m.py:image", "grey"), {"layout": "x"}, ArgumentError, "channels-last"),
        (("m.py:words", "ids.jsonl"), {"baseline": "mean"}, ArgumentError, "id of a token"),
        (("m.py:words", "ids.jsonl"), {"layer": "embeding"}, ArgumentError, "Did you mean"),
        (("m.py:two", "ids.jsonl"), {}, ArgumentError, "`--layer`.*embedding, other"),
        (("m.py:words", "hole.jsonl"), {}, FileFormatError, "an empty row"),
        (("m.py:words", "cube.npy"), {}, FileFormatError, r"\[row, time\]"),
        (("m.py:words", "high.jsonl"), {}, WorkError, "IndexError: index out of range"),
        (
            ("m.py:words", "texts.txt"),
            {"tokenizer": "m.py:words"},
            WorkError,
            "m.py:words failed on",
        ),
        (("m.py:words", "one.txt"), {"tokenizer": "m.py:broken"}, ArgumentError, "ids and tokens"),
        (("m.py:words", "two.txt"), {"tokenizer": "m.py:broken"}, ArgumentError, "as many tokens"),
        (("m.py:words", "x.npy"), {"tokenizer": "m.py:VOCABULARY"}, ArgumentError, "Found dict"),
        (("m.py:words", "blank.txt"), {"tokenizer": "m.py:ids"}, FileFormatError, "no rows"),
    ],
)
def test_refuses(
    run: Run,
    files: tuple[str, ...],
    options: dict[str, Any],
    error: type[KexueError],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        run(*files, **options)
    assert "\n" not in str(caught.value)


def test_the_example_runs_as_it_is_written(tmp_path: Path) -> None:
    words = shlex.split(write_example(registry, NAME, tmp_path / "try"))
    assert words[3] == "kexue_integrated_gradients.integrated_gradients:example_model"
    assert words[5].startswith("target=")
    _, result = execute(registry, Request(NAME, files=words[3:]))
    assert result.summary["rows"] == 3


def test_runs_as_a_command(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(4, 2)))
        scripted.save(str(folder / "m.pt"))
    command = [sys.executable, "-m", "kexue.cli", "run", NAME, "m.pt", "x.npy", "--target", "1"]
    command += ["-o", "out.npz", "--plot", "bars.svg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "relative error: " in done.stdout
    assert done.stderr.split() == ["wrote", "out.npz", "wrote", "bars.svg"]
    with np.load(folder / "out.npz") as arrays:
        assert arrays["attributions"].shape == (5, 4)
        assert {"error", "output", "baseline_output", "target"} <= set(arrays.files)
