"""The end of a cycle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue_lookahead import mixing, with_lookahead
from kexue_lookahead.mixing import mix

SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 2), (40_000,), (2, 3, 4, 5)]


def make(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("share", [1e-3, 0.5, 0.8, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["kernel", "two passes", "views"])
def test_both_go_where_the_slow_ones_go(
    way: str, dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = make(dtype, 0), make(dtype, 1)
    if way == "kernel":  # or it would be the other way that is tested
        assert mixing._has_fused() == hasattr(torch, "_fused_sgd_")
    if way == "two passes":
        monkeypatch.setattr(mixing, "_has_fused", lambda: False)
    if way == "views":
        fast[0], slow[0] = (x[0].new_ones(5, 3).mul(x[0].T).T for x in (fast, slow))
        assert not fast[0].is_contiguous()
    wanted = [
        s.double() + share * (f.double() - s.double()) for f, s in zip(fast, slow, strict=True)
    ]
    mix(fast, slow, share)
    loose = 8 * torch.finfo(dtype).eps
    for f, s, w in zip(fast, slow, wanted, strict=True):
        torch.testing.assert_close(s.double(), w, rtol=loose, atol=4 * loose)
        torch.testing.assert_close(f, s, rtol=loose, atol=4 * loose)


def test_the_kernel_is_tried_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise TypeError("takes other arguments")

    def does_something_else(fast: list[Tensor], *args: Any, **kwargs: Any) -> None:
        fast[0].zero_()

    for kernel in (fails, does_something_else):
        monkeypatch.setattr(torch, "_fused_sgd_", kernel)
        mixing._has_fused.cache_clear()
        try:
            weight = nn.Parameter(torch.tensor([1.0]))
            weight.grad = torch.tensor([1.0])
            loop: Any = with_lookahead(torch.optim.SGD, slow_steps=1)
            loop([weight], lr=0.5, fused=False).step()
            assert weight.item() == 0.75
        finally:
            mixing._has_fused.cache_clear()
