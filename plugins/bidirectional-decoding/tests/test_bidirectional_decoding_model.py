"""The small model: fitted, saved, and run by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Result
from kexue.core.registry import Registry
from kexue.core.run import Request, execute
from kexue_bidirectional_decoding import BidirectionalBeam, BidirectionalSeq2Seq

ID = "decoder/bidirectional-beam"
PAIRS = [(text, text[::-1]) for text in ("科学空间", "ab", "空间ab", "学", "b科", "间空a") * 4]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="module")
def fitted(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bidirectional")
    pairs = folder / "pairs.tsv"
    lines = ["\t".join(pair) for pair in PAIRS]
    pairs.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    options = {"epochs": 40, "batch_size": 6, "lr": 0.02, "width": 16, "dropout": 0.0}
    request = Request(
        ID, "fit", [str(pairs)], options={**options, "patience": 40}, out=folder / "model"
    )
    _, result = execute(registry, request)
    assert result.summary["examples"] == 22
    assert result.summary["best_loss"] < 0.2
    return folder / "model"


def run(
    registry: Registry, model: Path | None, lines: list[str], folder: Path, **options: object
) -> Result:
    path = folder / "sources.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return execute(registry, Request(ID, files=[str(path)], model=model, options=options))[1]


def test_learns_pairs_and_answers_lines(registry: Registry, fitted: Path, tmp_path: Path) -> None:
    sources = [source for source, _ in PAIRS[:6]]
    wanted = [target for _, target in PAIRS[:6]]
    known = run(registry, fitted, sources, tmp_path, same_length=True)
    assert list(known.lines or ()) == wanted
    assert known.summary["texts"] == 6
    assert known.summary["cut off"] == 0
    assert known.arrays["scores"].shape == (6,)
    # Without the length the partner's states are others than in training.
    together, single = (
        run(registry, fitted, sources, tmp_path, batch_size=rows) for rows in (64, 1)
    )
    lines = list(together.lines or ())
    assert lines == list(single.lines or ())
    assert sum(a == b for a, b in zip(lines, wanted, strict=True)) >= 4
    assert list(run(registry, fitted, [], tmp_path).lines or ()) == []


def test_the_same_seed_gives_the_same_text(registry: Registry, fitted: Path) -> None:
    model = BidirectionalSeq2Seq.load(fitted).eval()
    source = torch.tensor([model.vocabulary.encode("间学?")])  # one character is not known
    first, again = (BidirectionalBeam().decode(model, prompt=source) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert torch.equal(first.scores, again.scores)
    assert model.config()["interaction"] == "mask"


def test_refuses_files_and_folders(registry: Registry, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a fitted model: `--model folder`"):
        run(registry, None, ["ab"], tmp_path)
    with pytest.raises(ArgumentError, match="Line 2 must hold a source"):
        run(registry, fitted, ["ab", " "], tmp_path)
    with pytest.raises(ArgumentError, match="`--batch-size` must be at least 1"):
        run(registry, fitted, ["ab"], tmp_path, batch_size=0)
    (tmp_path / "other").mkdir()
    config = tmp_path / "other" / "config.yaml"
    config.write_text("{component: generator/nice, model: {form: causal}, weights: w}")
    with pytest.raises(FileFormatError, match="It was fitted with generator/nice"):
        run(registry, tmp_path / "other", ["ab"], tmp_path)
    for text, words in (
        ("ab\tba\nabba\n", r"Line 2 of .* a source, a tab, and a target. Found 'abba'"),
        ("ab\tba\n" * 3, "has 3 examples, too few"),
        ("ab\t\n", "Line 1 of"),
        ("a\tb\tc\n", "Line 1 of"),
    ):
        path = tmp_path / "pairs.tsv"
        path.write_text(text)
        with pytest.raises(FileFormatError, match=words):
            execute(registry, Request(ID, "fit", [str(path)], out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_refuses_sizes() -> None:
    with pytest.raises(ArgumentError, match="`interaction` must be 'mask', 'post' or 'none'"):
        BidirectionalSeq2Seq("ab", interaction="both")
    with pytest.raises(ArgumentError, match=r"`width` must be even. Found 7"):
        BidirectionalSeq2Seq("ab", width=7)


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = BidirectionalSeq2Seq("科学空间ab", width=16).double().eval()
    alone = []
    for pair in PAIRS[:6]:
        batch = model.collate([pair])
        alone.append(float(model.loss(batch).detach()) * (len(pair[1]) + 1))
    together = float(model.loss(model.collate(PAIRS[:6])).detach())
    assert together == pytest.approx(sum(alone) / sum(len(t) + 1 for _, t in PAIRS[:6]), abs=1e-9)
