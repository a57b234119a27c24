"""Two gloo processes take the steps of one: norms are global, windows and cycles resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--nproc-per-node", "2", str(WORKER)],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    (line,) = [x for x in ran.stdout.splitlines() if x.startswith("FOUND ")]
    measured: dict[str, float] = json.loads(line.removeprefix("FOUND "))
    return measured


CHOICES = ("lamb", "lars", "clamped", "decay", "everything")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "checkpoint"])
def test_two_processes_match_one(found: dict[str, float], way: str, choice: str) -> None:
    assert found[f"moved, {choice}"] > 1e-3
    assert found[f"{way}, {choice}"] < 1e-12


def test_sharded_columns_match_one_process(found: dict[str, float]) -> None:
    assert found["columns"] < 1e-12
