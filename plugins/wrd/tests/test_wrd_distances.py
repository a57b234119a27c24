"""The two distances and their bounds, on vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import ot  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_wrd import relaxed_wmd, relaxed_wrd, wcd, wmd, wrd, wrd_centroid_bound
from kexue_wrd.geometry import squared_distances

Distance = Callable[..., Tensor]


def words(n: int, seed: int, features: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator, dtype=torch.float64).to(dtype)


def plain_wmd(x: Tensor, y: Tensor) -> float:
    """The definition, with POT: uniform masses, Euclidean cost."""
    p, q = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    cost = (x[:, None] - y).norm(dim=-1)
    return float(ot.emd2(p, q, cost.numpy()))


def plain_wrd(x: Tensor, y: Tensor) -> float:
    """The definition, with POT: masses by norm, cost 1 - cos."""
    p, q = x.norm(dim=1), y.norm(dim=1)
    cost = 1 - (x @ y.T) / (p[:, None] * q)
    return float(ot.emd2((p / p.sum()).numpy(), (q / q.sum()).numpy(), cost.numpy()))


sizes = {"n": st.integers(1, 7), "m": st.integers(1, 7), "seed": st.integers(0, 999)}


@settings(derandomize=True, max_examples=40, deadline=None)
@given(**sizes)
def test_match_their_definitions(n: int, m: int, seed: int) -> None:
    x, y = words(n, seed), words(m, seed + 1000)
    assert wmd(x, y).item() == pytest.approx(plain_wmd(x, y), abs=1e-9)
    assert wrd(x, y).item() == pytest.approx(plain_wrd(x, y), abs=1e-9)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(**sizes, scale=st.sampled_from([1e-3, 1.0, 100.0]), shift=st.sampled_from([0.0, 3.0]))
def test_bounds_are_below(n: int, m: int, seed: int, scale: float, shift: float) -> None:
    x, y = scale * (words(n, seed) + shift), scale * words(m, seed + 1000)
    tolerance = 1e-9 * max(scale, 1)
    assert wcd(x, y) <= wmd(x, y) + tolerance
    assert relaxed_wmd(x, y) <= wmd(x, y) + tolerance
    assert wrd_centroid_bound(x, y) <= wrd(x, y) + 1e-9
    assert relaxed_wrd(x, y) <= wrd(x, y) + 1e-9
    assert 0 <= wrd(x, y) <= 2


def test_bounds_are_tight_for_one_word() -> None:
    x, y = words(1, 0), words(1, 1)
    for bound in (wcd, relaxed_wmd):
        torch.testing.assert_close(bound(x, y), wmd(x, y))
    for bound in (wrd_centroid_bound, relaxed_wrd):
        torch.testing.assert_close(bound(x, y), wrd(x, y))


@settings(derandomize=True, max_examples=30, deadline=None)
@given(**sizes, k=st.integers(1, 7))
def test_wmd_is_a_metric_and_both_are_symmetric(n: int, m: int, k: int, seed: int) -> None:
    x, y, z = words(n, seed), words(m, seed + 1000), words(k, seed + 2000)
    assert wmd(x, z) <= wmd(x, y) + wmd(y, z) + 1e-12
    for distance in (wmd, wrd):
        torch.testing.assert_close(distance(x, y), distance(y, x))
        assert distance(x, x.clone()).item() == 0


def test_counts_are_repetitions() -> None:
    x, y = words(3, 0), words(2, 1)
    for distance in (wmd, wrd):
        repeated = distance(x[[0, 0, 1, 2]], y[[0, 1, 1, 1]])
        counted = distance(
            x, y, x_counts=torch.tensor([2.0, 1, 1]), y_counts=torch.tensor([1.0, 3])
        )
        torch.testing.assert_close(counted, repeated)


def test_wrd_sees_directions_and_relative_norms_only() -> None:
    x, y = words(3, 0), words(4, 1)
    torch.testing.assert_close(wrd(1e-200 * x, 1e150 * y), wrd(x, y))
    assert wrd(x, -x[:1]).item() != pytest.approx(wrd(x * torch.tensor([[9.0], [1], [1]]), -x[:1]))


def test_wrd_leaves_zero_vectors_out() -> None:
    x, y = words(3, 0), words(2, 1)
    padded = torch.cat([x, torch.zeros(2, 4, dtype=torch.float64)])
    torch.testing.assert_close(wrd(padded, y), wrd(x, y))
    with pytest.raises(ArgumentError, match="All 2 weigh 0"):
        wrd(padded[3:], y)


@pytest.mark.parametrize("distance", [wmd, wrd, wcd, wrd_centroid_bound, relaxed_wmd, relaxed_wrd])
def test_gradient(distance: Distance) -> None:
    x, y = words(3, 2).requires_grad_(), words(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(distance, (x, y))


def test_gradient_is_finite_where_words_coincide() -> None:
    x = words(3, 2).requires_grad_()
    for distance in (wmd, wrd):
        (slope,) = torch.autograd.grad(distance(x, x.detach()[:2]), x)
        assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype: torch.dtype) -> None:
    x, y = words(4, 0, dtype=dtype), words(3, 1, dtype=dtype)
    for distance in (wmd, wrd):
        found = distance(x, y)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(distance(x.double(), y.double()).item(), abs=1e-5)


def test_near_points_keep_their_digits() -> None:
    x = words(5, 0) + 1e3
    y = x + 1e-7
    exact = (x[:, None] - y).square().sum(-1)
    torch.testing.assert_close(squared_distances(x, y).diagonal(), exact.diagonal())
    assert (squared_distances(x, x).diagonal() == 0).all()
    assert (squared_distances(x[None], x[None])[0] >= 0).all()


@pytest.mark.parametrize("distance", [wmd, wrd, wcd, wrd_centroid_bound, relaxed_wmd, relaxed_wrd])
@pytest.mark.parametrize(
    ("x", "y", "argument", "message"),
    [
        (torch.ones(0, 2), torch.ones(1, 2), "x", r"at least one word. Found \[0, 2\]"),
        (torch.ones(1, 2), torch.ones(2), "y", r"Found \[2\]"),
        (torch.ones(1, 2), torch.ones(1, 3), "y", "the features of `x`, 2. Found 3"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(1, 1), "x", "finite. Word 1 is not"),
        (torch.ones(1, 2), torch.ones(1, 2).long(), "y", "floating point. Found torch.int64"),
    ],
)
def test_rejects(distance: Distance, x: Tensor, y: Tensor, argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        distance(x, y)
    assert caught.value.argument == argument


def test_rejects_counts() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(ArgumentError, match=r"`x_counts` must have shape \[2\].* Found \[3\]"):
        wmd(x, x, x_counts=torch.ones(3))
    with pytest.raises(ArgumentError, match="`y_counts` must be finite and not negative"):
        wmd(x, x, y_counts=torch.tensor([1.0, -1.0]))


@pytest.mark.filterwarnings("ignore")  # the compiler's own; graph breaks are allowed
@pytest.mark.parametrize("distance", [wmd, wrd])
def test_compiles(distance: Distance) -> None:
    x, y = words(3, 0).requires_grad_(), words(4, 1)
    torch.compiler.reset()
    found = torch.compile(distance, backend="aot_eager")(x, y)
    torch.testing.assert_close(found, distance(x, y))
    slopes = [torch.autograd.grad(value, x)[0] for value in (found, distance(x, y))]
    torch.testing.assert_close(*slopes)
