"""Rates and dynamics: inverses of each other, limits, and what the optimizers make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.core import ArgumentError
from kexue_momentum import (
    HalfNesterov,
    Momentum,
    Nesterov,
    beta_for_lr,
    from_dynamics,
    optimal_rates,
    spectral_radius,
    stability_limit,
    to_dynamics,
)

FORMS: list[tuple[Any, float]] = [(Momentum, 0.0), (HalfNesterov, 0.5), (Nesterov, 1.0)]


@settings(derandomize=True, deadline=None)
@given(gamma=st.floats(1e-3, 10), share=st.floats(1e-3, 1))
def test_dynamics_and_rates_are_inverse(gamma: float, share: float) -> None:
    friction = share * 2 / gamma * (1 - 1e-9)
    rates = from_dynamics(gamma, friction)
    half = gamma * friction / 2
    assert rates.momentum == pytest.approx((1 - half) / (1 + half))
    assert rates.lr == pytest.approx(gamma**2 / (1 + half))
    back = to_dynamics(*rates)
    assert back.gamma == pytest.approx(gamma, rel=1e-9)
    assert back.friction == pytest.approx(friction, rel=1e-6)


@settings(derandomize=True, deadline=None)
@given(momentum=st.floats(0.01, 0.999), ratio=st.floats(1e-4, 2))
def test_the_exact_momentum_keeps_the_friction(momentum: float, ratio: float) -> None:
    found = beta_for_lr(momentum, ratio, exact=True)
    if found:
        before, after = to_dynamics(0.01, momentum), to_dynamics(0.01 * ratio, found)
        assert after.friction == pytest.approx(before.friction, rel=1e-7)
    rule = beta_for_lr(momentum, ratio)
    assert rule == max(0.0, 1 - (1 - momentum) * math.sqrt(ratio))
    if momentum >= 0.9 and ratio <= 1:
        assert rule == pytest.approx(found, abs=1e-3)


def test_values_of_the_rule() -> None:
    assert beta_for_lr(0.9, 0.1) == pytest.approx(0.968377, abs=1e-6)
    assert beta_for_lr(0.9, 0.1, exact=True) == pytest.approx(0.967818, abs=1e-6)
    assert beta_for_lr(0.5, 0.1, exact=True) == pytest.approx(0.825569, abs=1e-6)
    assert beta_for_lr(0.5, 1.0, exact=True) == pytest.approx(0.5)
    assert beta_for_lr(0.5, 100.0) == beta_for_lr(0.5, 100.0, exact=True) == 0.0
    assert beta_for_lr(0.5, 0.0) == beta_for_lr(0.5, 0.0, exact=True) == 1.0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(a=st.floats(0.01, 4), momentum=st.floats(0, 0.99), form=st.sampled_from(FORMS))
def test_the_radius_is_that_of_the_optimizer(
    a: float, momentum: float, form: tuple[Any, float]
) -> None:
    """The matrix of one step, read off the optimizer itself, has eigenvalues of that modulus."""
    cls, ahead = form
    columns = []
    for theta, gradient in ((1.0, 0.0), (0.0, 1.0)):  # Θ and v, the latter by a first step
        p = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        optimizer = cls([p], 1.0, momentum or 1e-9)
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        state = np.array([p.item(), optimizer.velocity(p).item()])
        p.grad = a * p.detach()
        optimizer.step()
        columns.append((state, np.array([p.item(), optimizer.velocity(p).item()])))
    before = np.stack([c[0] for c in columns], 1)
    after = np.stack([c[1] for c in columns], 1)
    matrix = after @ np.linalg.inv(before)
    wanted = max(abs(np.linalg.eigvals(matrix)))
    found = spectral_radius(1.0, momentum or 1e-9, a, ahead)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    limit = stability_limit(momentum, ahead)
    if abs(a - limit) > 1e-6:
        assert (found < 1) == (a < limit)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_polyaks_rates_are_best_at_both_ends(condition: float) -> None:
    lr, momentum = optimal_rates(2.0, 2.0 * condition)
    root = math.sqrt(condition)
    rate = (root - 1) / (root + 1)
    for curvature in (2.0, 2.0 * condition):
        assert spectral_radius(lr, momentum, curvature) == pytest.approx(rate, abs=1e-6)
    worse = max(spectral_radius(lr * 1.05, momentum, k) for k in (2.0, 2.0 * condition))
    assert condition == 1 or worse > rate + 1e-4


def test_the_leapfrog_scheme_is_of_second_order() -> None:
    """θ'' + ½θ' = −θ from rest, whose motion is known."""

    def error(steps: int, *, half: bool) -> float:
        p = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = Momentum([p], *from_dynamics(2.0 / steps, 0.5), half_step_start=half)
        for _ in range(steps):
            p.grad = p.detach().clone()
            optimizer.step()
        w = math.sqrt(1 - 0.0625)
        exact = math.exp(-0.5) * (math.cos(2 * w) + 0.25 / w * math.sin(2 * w))
        return abs(p.item() - exact)

    assert error(50, half=True) / error(100, half=True) == pytest.approx(4, rel=0.05)
    assert error(50, half=False) / error(100, half=False) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: from_dynamics(0.0, 1.0), "gamma"),
        (lambda: from_dynamics(math.inf, 1.0), "gamma"),
        (lambda: from_dynamics(0.1, 0.0), "friction"),
        (lambda: from_dynamics(0.1, 21.0), "friction"),
        (lambda: to_dynamics(0.0, 0.9), "lr"),
        (lambda: to_dynamics(0.1, 1.0), "momentum"),
        (lambda: beta_for_lr(1.0, 0.1), "momentum"),
        (lambda: beta_for_lr(0.9, -0.1), "ratio"),
        (lambda: beta_for_lr(0.9, math.nan), "ratio"),
        (lambda: optimal_rates(0.0, 1.0), "smallest"),
        (lambda: optimal_rates(2.0, 1.0), "largest"),
        (lambda: stability_limit(-1.0), "momentum"),
        (lambda: stability_limit(0.9, 2.0), "look_ahead"),
        (lambda: spectral_radius(0.1, 0.9, 1.0, -1.0), "look_ahead"),
    ],
)
def test_rejects_what_is_out_of_range(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}` must be .* Found") as caught:
        call()
    assert caught.value.argument == argument
