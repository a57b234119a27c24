"""Transport beside linear programming, and Sinkhorn's interval."""

from __future__ import annotations

import math

import numpy as np
import ot  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_wrd import sinkhorn, transport, transport_plan
from kexue_wrd.transport import optimal_cost

Problem = tuple[Tensor, Tensor, Tensor]


def problem(n: int, m: int, seed: int, *batch: int, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(*batch, n, generator=generator, dtype=torch.float64) + 0.01
    q = torch.rand(*batch, m, generator=generator, dtype=torch.float64) + 0.01
    cost = torch.rand(*batch, n, m, generator=generator, dtype=torch.float64) * 3
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return p.to(dtype), q.to(dtype), cost.to(dtype)


def linear_program(p: Tensor, q: Tensor, cost: Tensor) -> float:
    """The post's reference: all row and column sums but the last, as a linear program."""
    n, m = cost.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = linprog(cost.flatten().numpy(), A_eq=sums[:-1], b_eq=torch.cat([p, q]).numpy()[:-1])
    return float(found.fun)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 999))
def test_matches_linear_programming(n: int, m: int, seed: int) -> None:
    p, q, cost = problem(n, m, seed)
    expected = linear_program(p, q, cost)
    assert transport(p, q, cost).item() == pytest.approx(expected, abs=1e-9)
    assert optimal_cost(p.numpy(), q.numpy(), cost.numpy()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_equal_masses_are_an_assignment(n: int) -> None:
    _, _, cost = problem(n, n, n)
    p = torch.full((n,), 1 / n, dtype=torch.float64)
    found = optimal_cost(p.numpy(), p.numpy(), cost.numpy())
    assert found == pytest.approx(transport(p, p, cost).item(), abs=1e-12)


def test_matches_pot() -> None:
    p, q, cost = problem(30, 20, 1)
    expected = ot.emd2(p.numpy(), q.numpy(), cost.numpy())
    assert transport(p, q, cost).item() == pytest.approx(expected, abs=1e-9)
    assert optimal_cost(p.numpy(), q.numpy(), cost.numpy()) == pytest.approx(expected, abs=1e-9)


def test_the_plan_is_feasible_and_costs_what_is_said() -> None:
    p, q, cost = problem(5, 8, 0, 3)
    plan = transport_plan(p, q, cost)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(-1), p)
    torch.testing.assert_close(plan.sum(-2), q)
    torch.testing.assert_close((plan * cost).sum((-2, -1)), transport(p, q, cost))


def test_batch_equals_one_by_one_and_views_are_taken() -> None:
    p, q, cost = problem(4, 3, 2, 2, 5)
    expected = [[transport(p[i, j], q[i, j], cost[i, j]).item() for j in range(5)] for i in (0, 1)]
    assert transport(p, q, cost).tolist() == expected
    turned = cost.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transport(p, q, turned).tolist() == expected
    assert transport(p[:0], q[:0], cost[:0]).shape == (0, 5)


def test_zero_masses_are_padding() -> None:
    p, q, cost = problem(4, 3, 3)
    expected = transport(p, q, cost)
    longer = torch.nn.functional.pad(cost, (0, 2, 0, 1), value=-7.0)
    padded = [torch.nn.functional.pad(p, (0, 1)), torch.nn.functional.pad(q, (0, 2)), longer]
    torch.testing.assert_close(transport(*padded), expected)
    found = sinkhorn(*padded)
    torch.testing.assert_close(found.cost, sinkhorn(p, q, cost).cost, rtol=0.05, atol=0)


@pytest.mark.parametrize(("n", "m"), [(3, 4), (4, 4), (1, 3)])
def test_gradient(n: int, m: int) -> None:
    p, q, cost = problem(n, m, 4)
    logits = [p.log().requires_grad_(), q.log().requires_grad_()]

    def value(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return transport(a.softmax(-1), b.softmax(-1), c)

    assert torch.autograd.gradcheck(value, (*logits, cost.requires_grad_()))


def test_gradient_at_padding_is_the_cost_of_a_little_mass_there() -> None:
    cost = torch.tensor([[0.0, 1.0], [5.0, 2.0]], dtype=torch.float64)
    p = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.5], dtype=torch.float64)
    (slope,) = torch.autograd.grad(transport(p, q, cost), p)
    moved = transport(torch.tensor([1 - 1e-6, 1e-6], dtype=torch.float64), q, cost)
    assert float(slope[1] - slope[0]) == pytest.approx((moved.item() - 0.5) / 1e-6, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p = torch.full((8,), 1 / 8, dtype=dtype)
    cost = problem(8, 8, 5)[2]
    found = transport(p, p, cost.to(dtype))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(transport(p.double(), p.double(), cost).item(), abs=0.02)


def test_what_is_at_rest_costs_exactly_nothing() -> None:
    p, _, cost = problem(9, 9, 6)
    cost.fill_diagonal_(0)
    assert transport(p, p, cost).item() == 0
    assert optimal_cost(p.numpy(), p.numpy(), cost.numpy()) == 0
    assert transport(p, p, cost - 1).item() < 0  # but not where moving pays


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    regularization=st.sampled_from([0.5, 0.05, 0.005]),
    iterations=st.sampled_from([1, 10, 100]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_the_exact_cost_is_within_sinkhorns_interval(  # noqa: PLR0917
    n: int, m: int, regularization: float, iterations: int, scale: float, seed: int
) -> None:
    p, q, cost = problem(n, m, seed, 3)
    exact = transport(p, q, scale * cost)
    found = sinkhorn(p, q, scale * cost, regularization=regularization, iterations=iterations)
    tolerance = 1e-9 * scale
    assert (found.lower <= exact + tolerance).all()
    assert (found.cost >= exact - tolerance).all()
    assert (found.error >= -tolerance).all()


def test_sinkhorn_comes_near() -> None:
    p, q, cost = problem(12, 15, 7, 50)
    exact = transport(p, q, cost)
    coarse, default = sinkhorn(p, q, cost, iterations=5), sinkhorn(p, q, cost)
    fine = sinkhorn(p, q, cost, regularization=0.002, iterations=1000)
    assert ((default.cost - exact) / exact).mean() < 0.05
    assert (fine.cost / exact - 1).mean() < 0.005 < (coarse.cost / exact - 1).mean()
    assert fine.error.mean() < default.error.mean() < coarse.error.mean()


def test_sinkhorn_where_nothing_costs() -> None:
    p, q, cost = problem(3, 4, 8)
    found = sinkhorn(p, q, 0 * cost)
    assert found.cost.item() == found.lower.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinkhorn_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=dtype)
    found = sinkhorn(p, p, torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert found.cost.isfinite()
    assert found.lower.isfinite()
    assert found.cost.dtype == torch.float32


@pytest.mark.parametrize("solve", [transport, sinkhorn, transport_plan])
@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        ({"p": torch.tensor([0.5, 0.6])}, "p", "must sum to 1 in each row. Found 1.1"),
        ({"q": torch.tensor([1.5, -0.5])}, "q", "must not be negative. Found -0.5"),
        ({"cost": torch.full((2, 2), math.nan)}, "cost", r"finite. Found nan at \[0, 0\]"),
        ({"cost": torch.full((2, 2), math.inf)}, "cost", "finite. Found inf"),
        ({"cost": torch.ones(2, 3)}, "cost", r"Found \[2, 3\], \[2\] and \[2\]"),
        ({"p": torch.ones(0), "cost": torch.ones(0, 2)}, "cost", "at least 1"),
        ({"p": torch.tensor([1, 0])}, "p", "floating-point tensor. Found torch.int64"),
        ({"q": [0.5, 0.5]}, "q", "floating-point tensor. Found list"),
    ],
)
def test_rejects(solve: object, changes: dict[str, object], argument: str, message: str) -> None:
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(ArgumentError, match=message) as caught:
        solve(**{"p": half, "q": half, "cost": torch.ones(2, 2), **changes})  # type: ignore[operator]
    assert caught.value.argument == argument


def test_sinkhorn_rejects() -> None:
    p, q, cost = problem(2, 2, 0)
    with pytest.raises(ArgumentError, match=r"`regularization` must be positive\. Found 0"):
        sinkhorn(p, q, cost, regularization=0)
    with pytest.raises(ArgumentError, match=r"`iterations` must be at least 1\. Found 0"):
        sinkhorn(p, q, cost, iterations=0)
