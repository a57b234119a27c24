"""The manifest, the kind, files on the command line, the experiments, and the README."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse  # type: ignore[import-untyped]

import kexue_repetition
from kexue.core import Context, Report
from kexue.core.conformance import Subject, check_component, conformance
from kexue.core.errors import ArgumentError, FileFormatError, KexueError
from kexue.core.job import Result
from kexue.core.lab.language import CharacterModel
from kexue.core.loading import load_target
from kexue.core.registry import Registry, registry
from kexue.core.run import Request, execute, write_result
from kexue.core.scaffold import new_plugin
from kexue_repetition import RepetitionAnalyzer, repetition_index
from kexue_repetition.analyzer import Repetition
from kexue_repetition.conformance import checks

README = Path(__file__).parents[1] / "README.md"
NAME = "analyzer/repetition"


@conformance("repetition")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_manifest_names_what_exists() -> None:
    records: tuple[Any, ...] = (
        *kexue_repetition.kexue_components(),
        *kexue_repetition.kexue_interfaces(),
        *kexue_repetition.kexue_experiments(),
    )
    for record in records:
        assert callable(load_target(record.target))
    (kind,) = kexue_repetition.kexue_interfaces()
    assert registry.interface("analyzer") == kind
    for name in kexue_repetition.__all__:
        if not name.startswith("kexue_"):
            assert getattr(kexue_repetition, name) is not None


def test_manifest_is_light() -> None:
    code = "import sys, kexue_repetition; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


class Positional(RepetitionAnalyzer):
    def analyze(self, transitions: Any) -> Repetition:
        found = super().analyze(transitions)
        return found._replace(value=found.per_token[0])


class Trusting(RepetitionAnalyzer):
    def analyze(self, transitions: Any) -> Repetition:
        safe = torch.as_tensor(np.asarray(torch.as_tensor(transitions).to_dense())).double()
        safe = safe.nan_to_num(0).abs() / 9
        return super().analyze(safe[: safe.shape[-1], : safe.shape[0]])


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (Positional, "the order of tokens does not matter"),
        (Trusting, "refuses what are no probabilities"),
    ],
)
def test_the_checks_find(
    wrong: type[RepetitionAnalyzer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(registry, registry.get(NAME))
    monkeypatch.setitem(vars(subject), "target", wrong)
    monkeypatch.setattr(registry, "create", lambda _, **params: wrong(**params))
    (check,) = [check for check in checks() if check.name == name]
    with pytest.raises(AssertionError):
        check.run(subject)


def test_the_template_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = new_plugin("staying", registry.interface("analyzer"), tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    mine = Registry(discover=False)
    mine.register(kexue_repetition.kexue_interfaces(), slug="kind")
    mine.register(load_target("kexue_staying:kexue_components")(), slug="staying", owner="staying")
    findings = check_component(mine, mine.get("analyzer/staying"))
    assert [f for f in findings if f.state == "failed"] == []
    assert len([f for f in findings if f.state == "passed"]) > 12


# -- files ----------------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run on files of a folder."""
    monkeypatch.chdir(tmp_path)
    Path("en.txt").write_text("a b a b a b c\n\nb c a b a\n", encoding="utf-8")
    Path("zh.txt").write_text("忐忑的心忐忑的心忐忑的心\n心的$_忐忑\n", encoding="utf-8")
    Path("rows.jsonl").write_text('"a b a"\n{"text": "b a"}\n["a", "b"]\n', encoding="utf-8")
    Path("tokens.txt").write_text("x\ny\nz\n", encoding="utf-8")
    Path("blank.txt").write_text("\n", encoding="utf-8")
    Path("wrong.jsonl").write_text("{}\n", encoding="utf-8")
    p = np.array([[0.1, 0.6, 0.2], [0.5, 0.2, 0.3], [0.3, 0.3, 0.3]])
    np.save("p.npy", p)
    np.save("bad.npy", 2 * p)
    np.savez("two.npz", a=p, b=p)
    np.savetxt("p.csv", p, delimiter=",")
    sparse.save_npz("p.npz", sparse.csr_array(p))
    Path("broken.npz").write_bytes(b"PK\x03\x04nothing")

    def run(*files: str, params: tuple[str, ...] = (), **options: Any) -> Result:
        request = {k: options.pop(k) for k in ("model", "seed") if k in options}
        return execute(
            registry, Request(NAME, files=files, params=params, options=options, **request)
        )[1]

    return run


def test_texts_are_analysed(run: Run) -> None:
    result = run("en.txt")
    assert result.summary["texts"] == 2
    assert result.summary["tokens"] == 12
    assert result.summary["longest_repeated_block"] == 3 - 1  # a b, a b, not overlapping
    assert result.summary["R"] == float(result.arrays["value"])
    lines = list(result.lines or ())
    assert "'b' → 'a'" in "\n".join(lines)
    assert run("rows.jsonl").summary["tokens"] == 7
    both = run("en.txt", "rows.jsonl").summary
    assert (both["texts"], both["tokens"]) == (5, 19)


def test_matrices_are_analysed(run: Run) -> None:
    wanted = repetition_index(np.load("p.npy")).value
    for file in ("p.npy", "p.csv", "p.npz", "transitions=p.npy"):
        assert run(file).summary["R"] == pytest.approx(wanted)
    named = run("p.npy", "tokens=tokens.txt")
    assert "'x' → 'y'" in "\n".join(named.lines or ())
    cut = run("p.npy", params=("top_k=1",)).summary
    assert cut["R"] == float("inf")
    assert cut["never_left"] == "'0' → '1'"


def test_settings_of_texts(run: Run) -> None:
    plain = run("zh.txt", tokenizer="characters").summary
    merged = run("zh.txt", tokenizer="characters", gamma=0.3).summary
    assert merged["phrases"] > 0
    assert merged["tokens"] < plain["tokens"]
    loose = run("zh.txt", tokenizer="characters", unseen=1.0).summary
    assert loose["R"] < plain["R"]
    assert run("en.txt", ended=False).summary["R"] > run("en.txt").summary["R"]


@pytest.mark.parametrize(
    ("file", "options"), [("p.npy", {}), ("zh.txt", {"tokenizer": "characters"})]
)
def test_a_picture_is_drawn(run: Run, file: str, options: dict[str, Any]) -> None:
    result = run(file, **options)
    write_result(result, Path("out.npz"), Path("out.png"))
    with Image.open("out.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert set(np.load("out.npz").files) >= {"value", "per_token", "pairs", "by_length"}


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ((), {}, "takes one transition matrix"),
        (("p.npy", "en.txt"), {}, "takes one transition matrix"),
        (("bad.npy",), {}, "bad.npy: `transitions` must have rows"),
        (("two.npz",), {}, "must hold one array"),
        (("broken.npz",), {}, "not a whole .npz"),
        (("blank.txt",), {}, "holds no texts"),
        (("wrong.jsonl",), {}, "line 1 must be a text"),
        (("gone.txt",), {}, "does not exist"),
        (("p.npy",), {"gamma": 0.5}, "`--gamma` merges pairs of texts"),
        (("p.npy",), {"unseen": 0.5}, "`--unseen` is about texts"),
        (("en.txt",), {"unseen": -0.5}, "`unseen` must be at least 0"),
        (("en.txt",), {"gamma": 2.0}, r"`gamma` must be in \(0, 1\)"),
        (("en.txt",), {"tokenizer": "word"}, "`--tokenizer` must be one of.*Did you mean"),
        (("en.txt", "tokens=tokens.txt"), {}, "`tokens=` names the rows"),
        (("en.txt",), {"params": ("top_p=3",)}, "`top_p`"),
    ],
)
def test_wrong_calls(
    run: Run, files: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KexueError, match=message) as caught:
        run(*files, **options)
    assert isinstance(caught.value, ArgumentError | FileFormatError)


def test_models_are_analysed(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CharacterModel("ab c", width=8)
    model.component = NAME
    model.fit(["ab ab", "ba c"] * 4, epochs=1, folder=tmp_path / "lm")
    folder = tmp_path / "lm"
    result = run(model=folder, samples=20, max_new_tokens=15, seed=1)
    assert result.summary["texts"] == 20
    again = run(model=folder, samples=20, max_new_tokens=15, seed=1)
    assert again.summary == result.summary
    greedy = run("en.txt", model=folder, samples=1, max_new_tokens=15, params=("top_k=1",))
    assert greedy.summary["texts"] == 3
    assert greedy.summary["tokens"] <= 45


# -- the experiments and the README ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["bounds", "decoding", "rebalancing"])
def test_experiments_measure_their_claims(name: str) -> None:
    run = load_target(f"kexue_repetition.experiments.{name}:{name}")
    report: Report = run(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) >= 5
    assert report.claims[0].holds or name == "rebalancing"
    assert all(type(claim.holds) is bool for claim in report.claims)
    assert report.figures


def test_readme_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102 -- our own README
