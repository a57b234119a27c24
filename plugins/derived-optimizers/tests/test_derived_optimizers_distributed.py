"""Two gloo processes take the steps of one: norms are global, windows and cycles resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from kexue.core.conformance.distributed import has_gloo, run_processes

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(not has_gloo(), reason="torch is built without gloo")


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return run_processes(WORKER)


CHOICES = ("lamb", "lars", "clamped", "decay", "everything", "files")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "checkpoint"])
def test_two_processes_match_one(found: dict[str, float], way: str, choice: str) -> None:
    assert found[f"moved, {choice}"] > 1e-3
    assert found[f"{way}, {choice}"] < 1e-12


def test_sharded_columns_match_one_process(found: dict[str, float]) -> None:
    assert found["columns"] < 1e-12


def test_a_first_gradient_of_some_shards_counts(found: dict[str, float]) -> None:
    assert found["warm-up"] == 0
