"""Enumeration: the oracle of these tests. It shares no code with the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Enumerated(NamedTuple):
    """All paths of one row, in lexicographic order of the reversed path, and their scores."""

    positions: list[int]
    paths: Tensor
    scores: Tensor

    @property
    def log_partition(self) -> Tensor:
        return self.scores.logsumexp(0)

    @property
    def probabilities(self) -> Tensor:
        return self.scores.softmax(0)


Enumerate = Callable[..., list[Enumerated]]


def _enumerate(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Enumerated]:
    batch, time, tags = emissions.shape
    rows = []
    for b in range(batch):
        positions = [p for p in range(time) if mask is None or mask[b, p]]
        n = len(positions)
        codes = torch.arange(tags**n)
        paths = torch.stack([codes // tags**k % tags for k in range(n)], 1) if n else codes[:, None]
        scores = emissions.new_zeros(tags**n)
        for k, p in enumerate(positions):
            scores = scores + emissions[b, p][paths[:, k]]
            if k:
                # By position, the matrix that leads into p.
                matrix = transitions if transitions.dim() == 2 else transitions[b, p - 1]
                scores = scores + matrix[paths[:, k - 1], paths[:, k]]
        if n and start is not None:
            scores = scores + start[paths[:, 0]]
        if n and end is not None:
            scores = scores + end[paths[:, -1]]
        rows.append(Enumerated(positions, paths[:, :n], scores))
    return rows


@pytest.fixture(scope="session")
def enumerate_rows() -> Enumerate:
    """Return the function that enumerates the paths of each row."""
    return _enumerate


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded source of randomness."""
    return torch.Generator().manual_seed(5542)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed what is initialised by modules."""
    torch.manual_seed(5542)


class CountTransfers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers that go from a tensor to Python one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers() -> CountTransfers:
    """Return a context manager whose ``count`` is the number of single transfers within."""
    return CountTransfers()  # type: ignore[no-untyped-call]
