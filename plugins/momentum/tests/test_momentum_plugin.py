"""The manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kexue_momentum
from kexue.core import Context
from kexue_momentum import HalfNesterov, Langevin, Momentum, Nesterov
from kexue_momentum.experiments.discretisation import discretisation
from kexue_momentum.experiments.motion import motion
from kexue_momentum.experiments.noise import noise

README = Path(__file__).parents[1] / "README.md"
QUICK = Context(torch.device("cpu"), quick=True)


def test_manifest_names_what_exists() -> None:
    components = {c.id: c.target for c in kexue_momentum.kexue_components()}
    classes = {
        "optimizer/momentum": Momentum,
        "optimizer/nesterov": Nesterov,
        "optimizer/half-nesterov": HalfNesterov,
        "optimizer/langevin": Langevin,
    }
    assert components == {k: f"{c.__module__}:{c.__name__}" for k, c in classes.items()}
    targets = {e.target.rpartition(":")[2] for e in kexue_momentum.kexue_experiments()}
    assert targets == {discretisation.__name__, motion.__name__, noise.__name__}
    assert all(hasattr(kexue_momentum, name) for name in kexue_momentum.__all__)


def test_manifest_is_light() -> None:
    code = "import sys, kexue_momentum; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_schemes_are_what_they_are_said_to_be() -> None:
    report = discretisation(QUICK)
    failed = [c.source for c in report.claims if not c.holds]
    assert len(report.claims) == 8
    assert len(failed) == 2  # of second order, all of them; and of wider stability
    assert all("Nesterov动量" in source for source in failed)


def test_the_ball_does_what_balls_do() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = motion(QUICK)
    assert len(report.claims) == 7
    failed = [c.statement for c in report.claims if not c.holds]
    assert [f for f in failed if "best momentum" not in f] == []


def test_noise_leaves_what_theory_says() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = noise(QUICK)
    assert len(report.claims) == 8
    first, scaled, frictionless, kramers, gradient, *_ = (c.holds for c in report.claims)
    assert scaled
    assert kramers
    assert gradient
    assert not first  # the post's law, for noise of unit strength
    assert not frictionless


def test_compares_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kexue.cli", "run", "optimizer/momentum", "optimizer/langevin"]
    command += ["--problem", "ravine", "--set", "lr=0.002", "--steps", "120", "--json"]
    command += ["--plot", "ways.png"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert shown.returncode == 0, shown.stderr
    summary = json.loads(shown.stdout)["summary"]
    assert set(summary) == {"momentum", "langevin"}
    assert 0 < summary["momentum"]["steps_to_target"] < 120
    assert summary["langevin"]["steps_to_target"] == "not reached"
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")


def test_says_what_is_wrong_with_a_call() -> None:
    command = [sys.executable, "-m", "kexue.cli", "run", "optimizer/nesterov", "ravine"]
    shown = subprocess.run(
        [*command, "--set", "lr=-1"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 2
    wanted = "Error: `lr` of Nesterov must be positive and finite. Found -1."
    assert shown.stderr.strip() == wanted


def test_readme_examples_run() -> None:
    for code in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        assert len(code.strip().splitlines()) <= 12
        exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
