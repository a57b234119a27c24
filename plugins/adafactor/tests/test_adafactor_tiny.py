"""Very small matrices, many at once: the same numbers as one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue_adafactor import Adafactor, stacks
from kexue_adafactor.tiny import are_tiny, means, scaled


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    lead=st.lists(st.integers(1, 5), max_size=3),
    row=st.integers(1, 8),
    column=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_matches_sums_and_products_along_axes(
    lead: list[int], row: int, column: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*lead, row, column), (*lead, row), (*lead, column)]
    x, r, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    assert are_tiny(x)
    over_columns, over_rows = means(x)
    torch.testing.assert_close(over_columns, x.mean(-1), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(over_rows, x.mean(-2), rtol=1e-13, atol=1e-14)
    wanted = x * r.unsqueeze(-1) * c.unsqueeze(-2)
    torch.testing.assert_close(scaled(x, r, c), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 8), (2, 30, 3)])
def test_larger_matrices_are_not_tiny(shape: tuple[int, ...]) -> None:
    assert not are_tiny(torch.ones(shape))
    assert not are_tiny(torch.ones(3, 5).t())


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_step_as_they_would_one_by_one(
    dtype: torch.dtype, beta1: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for tiny in (True, False):
        if not tiny:
            monkeypatch.setattr(stacks, "are_tiny", lambda matrices: False)
        torch.manual_seed(0)
        own = [nn.Parameter(torch.randn(8, 5, 3, 3).to(dtype)) for _ in range(3)]
        optimizer = Adafactor(own, lr=0.1, beta1=beta1, clip=0.5)
        for _ in range(4):
            for p in own:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        results.append(own)
    rtol, atol = (2e-2, 1e-3) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
