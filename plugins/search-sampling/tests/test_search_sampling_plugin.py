"""The contract, the manifest, the experiments, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kexue_search_sampling
from kexue.core import Context
from kexue.core.conformance import conformance
from kexue.core.loading import load_target


@conformance("search-sampling")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_the_manifest_names_what_exists() -> None:
    components = kexue_search_sampling.kexue_components()
    assert len(components) == 5
    for component in components:
        assert load_target(component.target).__name__ in kexue_search_sampling.__all__
    assert all(callable(load_target(e.target)) for e in kexue_search_sampling.kexue_experiments())


@pytest.mark.parametrize("name", ["independent"])
def test_experiments_hold(name: str) -> None:
    target = f"kexue_search_sampling.experiments:{name}"
    report = load_target(target)(Context(torch.device("cpu"), quick=True))
    assert [c.statement for c in report.claims if not c.holds] == []
    assert report.figures


def kexue(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kexue.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_command_line_draws_and_plots(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text(
        "density: gaussian-mixture\nweights: [1, 3]\nmeans: [[-1], [1]]\n", encoding="utf-8"
    )
    words = ["run", "sampler/metropolis-hastings", "mixture.yaml", "--num-samples", "4000"]
    words += ["--set", "num_chains=40", "--dtype", "float64", "-o", "draws.npz", "--plot", "a.png"]
    done = kexue(*words, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert summary["samples"] == 4000
    assert summary["r_hat"] < 1.2
    with np.load(tmp_path / "draws.npz") as arrays:
        assert arrays["chains"].shape == (40, 100, 1)
        assert arrays["values"].dtype == np.float64
        assert float(arrays["values"].mean()) == pytest.approx(0.5, abs=0.3)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampler/gibbs", "banana"], "`target` of Gibbs must have conditionals"),
        (["sampler/rejection", "banana", "--set", "max_tries=0"], "`max_tries` of Rejection"),
        (["sampler/importance", "empty.yaml"], "empty.yaml is empty"),
        (["sampler/metropolis-hastings", "here.py:flat"], "`num_features` of MetropolisHastings"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "here.py").write_text("def flat(x):\n    return 0 * x.sum(1)\n", encoding="utf-8")
    done = kexue("run", *words, folder=tmp_path)
    assert done.returncode == 2
    assert f"Error: {message}" in done.stderr
