"""The manifest, the experiments and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kexue_nice
from kexue.cli import main
from kexue.core import Context
from kexue_nice import NICE
from kexue_nice.exactness import exactness
from kexue_nice.experiments import fit_digits, likelihood
from kexue_nice.sampling import sampling

Kexue = Callable[..., str]


@pytest.fixture
def kexue(capsys: pytest.CaptureFixture[str]) -> Kexue:
    """The command line in this process; returns what it says, or its error."""

    def run(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == status, err
        return out if status == 0 else err

    return run


def test_manifest_names_what_exists() -> None:
    (component,) = kexue_nice.kexue_components()
    assert component.id == "generator/nice"
    assert component.target == f"{NICE.__module__}:{NICE.__name__}"
    targets = {e.target for e in kexue_nice.kexue_experiments()}
    assert targets == {f"{f.__module__}:{f.__name__}" for f in (exactness, likelihood, sampling)}
    for name in kexue_nice.__all__:
        assert getattr(kexue_nice, name).__doc__


def test_manifest_is_light() -> None:
    code = "import sys, kexue_nice; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# -- experiments ----------------------------------------------------------------------------------


def test_exactness_holds() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    report = exactness(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) == 5
    timed = "The inverse costs no more than the forward pass."
    assert [c.statement for c in report.claims if not c.holds and c.statement != timed] == []


def test_digits_are_fitted_better_than_by_independent_pixels() -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    run = fit_digits(Context(torch.device("cpu"), quick=True), 0, epochs=4)
    losses = [row["valid_loss"] for row in run.history.epochs]
    assert losses == sorted(losses, reverse=True)
    assert run.nats < -30  # the diagonal Gaussian has -27
    assert run.model.initialised


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of forty pictures, white below a line of random height."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = np.zeros((6, 5), np.uint8)
        pixels[generator.integers(1, 5) :] = generator.integers(150, 256)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


FAST = ("--epochs", 10, "--batch-size", 8, "--set", "hidden=[16]", "--seed", 3)


def test_folder_of_images_to_samples(kexue: Kexue, images: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    said = json.loads(kexue("fit", "generator/nice", images, "-o", model, *FAST, "--json"))
    assert said["summary"]["parameters"]["levels"] == 256
    assert 0 < said["summary"]["best_valid_bits_per_dim"] < 9
    pictures = sorted(p.name for p in (model / "samples").iterdir())
    assert pictures == ["epoch-0005.png", "epoch-0010.png"]
    out = tmp_path / "samples.png"
    run = ("run", "generator/nice", "--model", model)
    said_ = kexue(*run, "-n", 64, "-o", out)
    assert "samples: 64" in said_
    with Image.open(out) as picture:
        assert picture.width > 500
    kexue(*run, "-n", 50, "-o", tmp_path / "warm.npy")
    kexue(*run, "-n", 50, "-o", tmp_path / "cold.npy", "--set", "temperature=0")
    warm, cold = (np.load(tmp_path / f"{name}.npy") for name in ("warm", "cold"))
    assert warm.shape == cold.shape == (50, 6, 5)
    assert warm.min() >= 0
    assert warm.max() <= 1
    assert np.allclose(warm * 255, np.round(warm * 255), atol=1e-4)
    assert warm[:, 5].mean() > warm[:, 0].mean() + 0.3
    assert np.ptp(cold, axis=0).max() == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"garbage", "is not a .npy file"),
        (np.array([[1.0, np.nan]] * 5), "must not hold NaN"),
        (np.ones(5), "must be rows"),
        (np.ones((5, 1)), "`num_features` of NICE must be at least 2"),
        (np.full((5, 2), np.inf), "`examples` of NICE must be finite"),
        (np.zeros((0, 3)), "must be rows"),
    ],
    ids=["empty", "garbage", "nan", "one axis", "one feature", "inf", "no rows"],
)
def test_bad_files_are_refused(kexue: Kexue, content: Any, words: str, tmp_path: Path) -> None:
    path, out = tmp_path / "data.npy", tmp_path / "model"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    said = kexue("fit", "generator/nice", path, "-o", out, status=2)
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_bad_calls_are_refused(kexue: Kexue, images: Path, tmp_path: Path) -> None:
    said = kexue("fit", "generator/nice", images, "-o", tmp_path / "m", "--ema", 2, status=2)
    assert "`ema` of fit must be between 0 and 1" in said
    said = kexue(
        "fit", "generator/nice", images, "-o", tmp_path / "m", "--set", "levels=1", status=2
    )
    assert "`levels` of NICE must be at least 2" in said
    said = kexue("run", "generator/nice", status=2)
    assert "kexue fit generator/nice" in said
