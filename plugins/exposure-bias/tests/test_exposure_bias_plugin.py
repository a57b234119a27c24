"""The contract, the manifest, the experiments, and the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kexue_exposure_bias
from kexue.core import Context, create
from kexue.core.conformance import conformance
from kexue.core.errors import UsageError
from kexue.core.job import Result
from kexue.core.lab.language import CharacterSeq2Seq
from kexue.core.loading import load_target
from kexue.core.registry import registry
from kexue.core.run import Request, execute
from kexue_exposure_bias import GradientPenaltyEmbedding, TokenReplacement, step_by_step


@conformance("exposure-bias")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_the_manifest_names_what_exists() -> None:
    components = kexue_exposure_bias.kexue_components()
    assert {c.id for c in components} == {
        "sampler/token-replacement",
        "loss/gradient-penalty-embedding",
    }
    for component in components:
        assert load_target(component.target).__name__ in kexue_exposure_bias.__all__
        assert not component.run or callable(load_target(component.run))
    assert isinstance(create("sampler/token-replacement", rate=0.1), TokenReplacement)
    assert isinstance(create("loss/gradient-penalty-embedding"), GradientPenaltyEmbedding)


@pytest.mark.parametrize("name", ["beams", "law"])
def test_experiments_hold(name: str) -> None:
    target = f"kexue_exposure_bias.experiments.laws:{name}"
    report = load_target(target)(Context(torch.device("cpu"), quick=True))
    assert [c.statement for c in report.claims if not c.holds] == []


def test_a_seq2seq_model_trains_step_by_step_and_with_the_penalty() -> None:
    torch.manual_seed(0)
    model = CharacterSeq2Seq("abcd ", width=8)
    batch = model.collate([("abcd", "ab cd"), ("dc", "d c"), ("a", "a")])
    mask = batch["targets"] >= 0
    memory, state = model.encode(batch["source"], batch["mask"])
    cache = (state, memory, batch["mask"])
    stepped = step_by_step(model.advance, cache, batch["inputs"], 1.0, mask=mask)
    logits = model(batch["source"], batch["mask"], batch["inputs"])
    assert torch.allclose(stepped[mask], logits[mask], atol=1e-6)
    matrices = [model.embedding.weight, model.source_embedding.weight]
    GradientPenaltyEmbedding()(logits, batch["targets"], embedding=matrices).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# -- the command line ------------------------------------------------------------------------------

COMPONENT = "sampler/token-replacement"


def run(*files: Path, params: Sequence[str] = (), **rest: Any) -> Result:
    """Return what ``kexue run`` makes of a call."""
    request = Request(COMPONENT, files=[str(f) for f in files], params=params, device="cpu", **rest)
    return execute(registry, request)[1]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_runs_from_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kexue.cli", "run", COMPONENT, "--set", "prob=1"]
    command += ["--unit", "words", "--plot", "a.png"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, input="一 二 三 四 五\n"
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[0].split()) <= set("一二三四五")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_replaces_characters_of_lines(tmp_path: Path) -> None:
    lines = ["to be or not to be", "从语言模型到Seq2Seq", "", "a"]
    path = written(tmp_path / "lines.txt", "\n".join(lines) + "\n")
    result = run(path, params=["prob=1"], options={"num_samples": 3})
    assert result.summary["rows"] == 4
    assert 0 < result.summary["changed_tokens"] < 0.6
    found = list(result.lines or ())
    assert len(found) == 12
    for i, line in enumerate(found):
        assert len(line) == len(lines[i // 3])
        assert set(line) <= set(lines[i // 3])


@pytest.mark.parametrize("pool", ["source_target", "vocab", "batch"])
def test_replaces_words_of_targets(tmp_path: Path, pool: str) -> None:
    path = written(tmp_path / "pairs.tsv", "sein oder nicht\tto be or not to be\n")
    params = ["prob=1", "rate=1", f"pool={pool}"]

    def line(seed: int) -> str:
        (found,) = run(path, params=params, options={"unit": "words"}, seed=seed).lines or ()
        return found

    source, _, target = line(0).partition("\t")
    assert source == "sein oder nicht"
    assert len(target.split()) == 6
    assert set(target.split()) <= {"sein", "oder", "nicht", "to", "be", "or", "not"}
    assert line(0) == line(0) != line(1)


def test_many_lines_are_done_in_pieces(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(3000)]
    result = run(written(tmp_path / "a.txt", "\n".join(lines)), params=["prob=0"])
    assert list(result.lines or ()) == lines
    assert result.summary["rows"] == 3000


def test_takes_ids(tmp_path: Path) -> None:
    path = written(tmp_path / "ids.jsonl", "[5, 6, 7, 8, 9]\n[4]\n")
    values = run(path, params=["prob=1"], options={"num_samples": 20}).arrays["values"]
    assert values.shape == (20, 2, 5)
    assert (values[:, 1] == torch.tensor([4, -1, -1, -1, -1])).all()
    assert set(values[:, 0].flatten().tolist()) == {5, 6, 7, 8, 9}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("broken.txt", {}, "broken.txt, line 2 is not UTF-8 text"),
        ("nowhere.txt", {}, "nowhere.txt does not exist"),
        ("empty.txt", {}, "empty.txt holds no lines"),
        ("tabs.tsv", {}, "Line 1 of .*tabs.tsv must be a target, or a source, a tab and a target"),
        ("line.txt", {"params": ["pool=source_target"]}, "`source` must be in every line"),
        ("line.txt", {"options": {"unit": "letters"}}, "`--unit` must be one of characters, words"),
        ("line.txt", {"options": {"num_samples": 0}}, "`--num-samples` must be at least 1"),
        ("line.txt", {"params": ["rate=2"]}, r"`rate` of TokenReplacement must be in \[0, 1\]"),
        ("half.jsonl", {}, "`target`"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, given: dict[str, Any], message: str) -> None:
    (tmp_path / "broken.txt").write_bytes(b"good\n\xff\n")
    (tmp_path / "empty.txt").touch()
    written(tmp_path / "tabs.tsv", "a\tb\tc\n")
    written(tmp_path / "line.txt", "a line\n")
    written(tmp_path / "half.jsonl", "[1.5, 2]\n")
    with pytest.raises(UsageError, match=message):
        run(tmp_path / name, **given)
