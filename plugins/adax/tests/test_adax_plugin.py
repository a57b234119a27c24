"""The manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kexue_adax
from kexue.core import Context, Report
from kexue_adax import AdaX, AdaXW
from kexue_adax.experiments import forms, shares
from kexue_adax.training import training

README = Path(__file__).parents[1] / "README.md"


def test_manifest_names_what_exists() -> None:
    components = kexue_adax.kexue_components()
    assert [c.id for c in components] == ["optimizer/adax", "optimizer/adaxw"]
    for component, made in zip(components, (AdaX, AdaXW), strict=True):
        assert component.target == f"{made.__module__}:{made.__name__}"
    assert sorted(kexue_adax.__all__) == ["AdaX", "AdaXW", "from_official"]
    targets = {e.target.rpartition(":")[2] for e in kexue_adax.kexue_experiments()}
    assert targets == {forms.__name__, shares.__name__, training.__name__}


def test_manifest_is_light() -> None:
    code = "import sys, kexue_adax; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("experiment", [forms, shares])
def test_both_forms_and_the_decay_are_as_claimed(experiment: Callable[[Context], Report]) -> None:
    report = experiment(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) >= 2
    assert [c.statement for c in report.claims if not c.holds] == []


def test_training_measures_every_claim() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = training(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 3
    assert report.claims[2].holds


def test_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kexue.cli", "run", "optimizer/adax", "optimizer/adaxw"]
    command += ["rosenbrock", "--set", "lr=0.05", "--steps", "60", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert shown.returncode == 0, shown.stderr
    found = re.findall(r'"(first_loss|last_loss)": ([-+.e\d]+)', shown.stdout)
    assert [name for name, _ in found] == ["first_loss", "last_loss"] * 2
    assert float(found[1][1]) < float(found[0][1]) / 2
    assert float(found[3][1]) < float(found[2][1]) / 2


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kexue.cli", "run", "optimizer/adax", "rosenbrock"]
    command += ["--set", "lr=-1"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert shown.returncode == 2
    assert "`lr` of AdaX must be" in shown.stderr


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
