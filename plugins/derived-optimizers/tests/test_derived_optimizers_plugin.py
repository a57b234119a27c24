"""The contract, the manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kexue_derived_optimizers
from kexue.core import Context
from kexue.core.conformance import conformance
from kexue.core.loading import load_target

README = Path(__file__).parents[1] / "README.md"


@conformance("derived-optimizers")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_manifest_names_what_exists() -> None:
    components = kexue_derived_optimizers.kexue_components()
    assert len(components) == 7
    for component in components:
        assert load_target(component.target).__name__ in kexue_derived_optimizers.__all__
    names = {"with_weight_decay", "with_layer_adaptation", "with_piecewise_linear_lr"}
    names |= {"with_grad_accumulation", "with_lookahead", "with_lazy"}
    assert names <= set(kexue_derived_optimizers.__all__)


def test_manifest_is_light() -> None:
    code = "import sys, kexue_derived_optimizers; print({'torch', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["experiments:identities", "composition:composition"])
def test_identities_hold(name: str) -> None:
    experiment = load_target(f"kexue_derived_optimizers.{name}")
    report = experiment(Context(torch.device("cpu"), quick=True))
    assert [c.statement for c in report.claims if not c.holds] == []


def test_training_measures_every_claim() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    experiment = load_target("kexue_derived_optimizers.training:training")
    report = experiment(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 2
    assert all("±" in claim.measured for claim in report.claims)


def kexue(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kexue.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_compares_optimizers_on_the_command_line(tmp_path: Path) -> None:
    words = ["run", "optimizer/lamb", "optimizer/adamw-lr", "optimizer/grad-accumulation"]
    words += ["rosenbrock", "--steps", "60", "--set", "lr=0.02", "--plot", "all.png", "--json"]
    words += ["--set", "adamw-lr.lr_schedule={20: 1.0}", "--set", "grad-accumulation.base=lars"]
    done = kexue(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert list(summary) == ["lamb", "adamw-lr", "grad-accumulation"]
    assert all(run["last_loss"] < run["first_loss"] for run in summary.values())
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    words = ["run", "optimizer/grad-accumulation", "beale", "--set", "grad_accum_steps=0"]
    done = kexue(*words, folder=tmp_path)
    assert done.returncode == 2
    assert "Error: `grad_accum_steps` must be an int of at least 1. Found 0." in done.stderr


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
