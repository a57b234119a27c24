"""The manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kexue_adafactor
from kexue.core import Context
from kexue_adafactor import Adafactor
from kexue_adafactor.experiments import factoring, training

README = Path(__file__).parents[1] / "README.md"


def test_manifest_names_what_exists() -> None:
    (component,) = kexue_adafactor.kexue_components()
    assert component.id == "optimizer/adafactor"
    assert component.target == f"{Adafactor.__module__}:{Adafactor.__name__}"
    assert list(kexue_adafactor.__all__) == ["Adafactor"]
    targets = {e.target.rpartition(":")[2] for e in kexue_adafactor.kexue_experiments()}
    assert targets == {factoring.__name__, training.__name__}


def test_manifest_is_light() -> None:
    code = "import sys, kexue_adafactor; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_factors_are_optimal_and_small() -> None:
    report = factoring(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 3
    assert [c.statement for c in report.claims if not c.holds] == []


def test_training_measures_every_claim() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = training(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 4
    clipped, scale = report.claims[2:]
    assert clipped.holds
    assert scale.holds


@pytest.mark.parametrize("problem", ["rosenbrock", "made.py:make"])
def test_runs_from_the_command_line(problem: str, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        "import torch\n\n\ndef make():\n"
        "    weight = torch.nn.Parameter(torch.ones(40, 30))\n"
        "    return weight, lambda: weight.square().mean()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "kexue.cli", "run", "optimizer/adafactor", problem]
    command += ["--set", "lr=0.01", "--set", "beta1=0.5", "--steps", "30", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert shown.returncode == 0, shown.stderr
    text = json.dumps(json.loads(shown.stdout))
    found = {
        name: float(re.findall(rf'"{name}": ([-+.e\d]+)', text)[0])
        for name in ("first_loss", "last_loss", "state_bytes_per_parameter", "steps_per_second")
    }
    assert found["last_loss"] < found["first_loss"]
    assert found["steps_per_second"] > 0
    numbers = (
        2.0 if problem == "rosenbrock" else (40 + 30 + 40 * 30) / (40 * 30)
    )  # V̂ or its factors, and the momentum
    assert found["state_bytes_per_parameter"] == pytest.approx(4 * numbers)


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
