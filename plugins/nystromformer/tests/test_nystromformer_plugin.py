"""The manifest, the experiments, the command line, and what the README shows."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import kexue_nystromformer
from kexue.core import Context
from kexue.core.plots import draw
from kexue_nystromformer import NystromAttention
from kexue_nystromformer.experiments import inverse, photographs, training
from kexue_nystromformer.scaling import _crossover, scaling

README = Path(__file__).parents[1] / "README.md"
QUICK = Context(torch.device("cpu"), quick=True)


def test_manifest_names_what_exists() -> None:
    (component,) = kexue_nystromformer.kexue_components()
    assert component.id == "layer/nystrom-attention"
    assert component.target == f"{NystromAttention.__module__}:{NystromAttention.__name__}"
    for name in kexue_nystromformer.__all__:
        assert callable(getattr(kexue_nystromformer, name))
    targets = {e.target.rpartition(":")[2] for e in kexue_nystromformer.kexue_experiments()}
    assert targets == {f.__name__ for f in (inverse, photographs, scaling, training)}


def test_manifest_is_light() -> None:
    code = "import sys, kexue_nystromformer; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# -- the experiments ------------------------------------------------------------------------------


def test_the_iteration_reaches_softmax_attention() -> None:
    report = inverse(QUICK)
    start, limit, six, true, normal = report.claims
    assert start.holds
    assert limit.holds
    assert normal.holds
    assert not six.holds
    assert not true.holds
    for figure in report.figures:
        draw(figure.plot)


def test_photographs_measure_both_pictures() -> None:
    pytest.importorskip("sklearn", reason="carries the photographs")
    report = photographs(QUICK)
    china, flower = report.claims
    assert china.holds
    assert not flower.holds
    for figure in report.figures:
        draw(figure.plot)


def test_memory_grows_linearly() -> None:
    report = scaling(QUICK)
    memory = report.claims[-1]  # the others are of time, which a busy machine disturbs
    assert memory.holds, memory.measured
    for figure in report.figures:
        draw(figure.plot)


def test_training_measures_its_claim() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = training(QUICK)
    assert len(report.claims) == 1
    for figure in report.figures:
        draw(figure.plot)


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ({100: 1.0, 400: 1.0}, {100: 0.5, 400: 2.0}, 200.0),
        ({100: 1.0, 400: 1.0}, {100: 0.5, 400: 0.9}, math.inf),
        ({100: 1.0, 400: 1.0}, {100: 2.0, 400: 8.0}, 100.0),
        ({1: 1.0, 4: 1.0, 16: 1.0}, {1: 2.0, 4: 0.5, 16: 2.0}, 8.0),
    ],
)
def test_the_crossover(ours: dict[int, float], theirs: dict[int, float], wanted: float) -> None:
    assert _crossover({"Nyström": ours, "exact": theirs}) == pytest.approx(wanted)


# -- the command line -----------------------------------------------------------------------------


def kexue(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kexue.cli", "run", "layer/nystrom-attention", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_runs_on_files_with_weights_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    save_file(attention.state_dict(), tmp_path / "weights.safetensors")
    features = torch.randn(2, 12, 8)
    np.save(tmp_path / "x.npy", features.numpy())
    words = ["x.npy", "--weights", "weights.safetensors", "--set", "num_heads=2", "-o", "out.npy"]
    done = kexue(*words, "--plot", "out.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted, _ = attention(features, features, features)
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_prints_json(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4), np.float32))
    done = kexue("x.npy", "--set", "num_heads=1", "--json", folder=tmp_path)
    assert json.loads(done.stdout)["summary"]["shape"] == [1, 3, 4]


@pytest.mark.parametrize(
    ("array", "setting", "message"),
    [
        (np.zeros((3, 4)), "num_heads=2", "`features` in x.npy must have 3 axes"),
        (np.zeros((1, 3, 4)), "num_heads=3", "`num_heads` of NystromAttention must divide"),
    ],
)
def test_says_what_is_wrong(array: np.ndarray, setting: str, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    done = kexue("x.npy", "--set", setting, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
