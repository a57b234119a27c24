"""The manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kexue_lookahead
from kexue.core import Context
from kexue_lookahead import Lazy, Lookahead
from kexue_lookahead.experiments.lookahead import lookahead
from kexue_lookahead.experiments.rows import rows
from kexue_lookahead.experiments.text import text

README = Path(__file__).parents[1] / "README.md"


def test_manifest_names_what_exists() -> None:
    found = {c.id: c.target for c in kexue_lookahead.kexue_components()}
    assert found == {
        f"optimizer/{name}": f"{cls.__module__}:{cls.__name__}"
        for name, cls in (("lookahead", Lookahead), ("lazy", Lazy))
    }
    targets = {e.target.rpartition(":")[2] for e in kexue_lookahead.kexue_experiments()}
    assert targets == {lookahead.__name__, rows.__name__, text.__name__}
    for name in kexue_lookahead.__all__:
        assert getattr(kexue_lookahead, name).__name__ == name


def test_manifest_is_light() -> None:
    code = "import sys, kexue_lookahead; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_lookahead_measures_every_claim() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = lookahead(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 4
    assert report.claims[0].holds


def test_rows_stay_and_are_deferred() -> None:
    report = rows(Context(torch.device("cpu"), quick=True))
    assert [c.statement for c in report.claims if not c.holds] == []
    assert len(report.claims) == 2


def test_text_compares_three() -> None:
    report = text(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 1
    first, *others = report.tables[0].rows
    assert first[0] == "Adam"
    assert len(others) == 2


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kexue.cli", "run", *words, "--steps", "30", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_runs_from_the_command_line() -> None:
    shown = run("optimizer/lookahead", "rosenbrock", "--set", "lr=0.01", "--set", "slow_steps=2")
    assert shown.returncode == 0, shown.stderr
    text = json.dumps(json.loads(shown.stdout))
    first, last, state = (
        float(re.findall(rf'"{name}": ([-+.e\d]+)', text)[0])
        for name in ("first_loss", "last_loss", "state_bytes_per_parameter")
    )
    assert last < first
    assert state == pytest.approx(4 * 3 + 4 / 2)  # two moments, slow weights, and a step for two


def test_says_what_is_wrong_on_the_command_line() -> None:
    shown = run("optimizer/lookahead", "rosenbrock", "--set", "base=lbfgs")
    assert shown.returncode == 2
    assert "`base` must take steps without a closure" in shown.stderr


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
