"""Beside captum: the same numbers, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue_integrated_gradients import integrated_gradients
from kexue_integrated_gradients.quadrature import Rule

captum = pytest.importorskip("captum.attr", reason="the peer")

SAME: list[tuple[Rule, str]] = [
    ("gauss-legendre", "gausslegendre"),
    ("midpoint", "riemann_middle"),
    ("left", "riemann_left"),
    ("right", "riemann_right"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


X = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
START = torch.rand(5, 8, generator=torch.Generator().manual_seed(2))
TARGET = torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize(("rule", "method"), SAME)
def test_values_and_errors_are_captums(rule: Rule, method: str) -> None:
    model = network()
    theirs, delta = captum.IntegratedGradients(model).attribute(
        X, START, target=TARGET, n_steps=11, method=method, return_convergence_delta=True
    )
    ours = integrated_gradients(model, X, START, target=TARGET, steps=11, rule=rule, tolerance=9)
    torch.testing.assert_close(ours.values, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.error, delta, rtol=1e-4, atol=1e-6)


def test_captums_trapezoids_do_not_cover_the_line() -> None:
    """Its weights add up to (n - 1) / n, so that even a linear model is off by 1 / n."""
    model, n = network(), 11
    theirs = captum.IntegratedGradients(model).attribute(
        X, START, target=TARGET, n_steps=n, method="riemann_trapezoid"
    )
    ours = integrated_gradients(
        model, X, START, target=TARGET, steps=n, rule="trapezoid", tolerance=9
    )
    torch.testing.assert_close(ours.values, theirs * n / (n - 1), rtol=1e-5, atol=1e-6)
    linear = nn.Linear(8, 1)
    exact = (X - START) * linear.weight.detach()
    ours = integrated_gradients(linear, X, START, steps=n, rule="trapezoid")
    torch.testing.assert_close(ours.values, exact)
    theirs = captum.IntegratedGradients(linear).attribute(
        X, START, n_steps=n, method="riemann_trapezoid"
    )
    torch.testing.assert_close(theirs, exact * (n - 1) / n)


def test_float64_is_captums_to_its_precision() -> None:
    model = network().double()
    theirs = captum.IntegratedGradients(model).attribute(X.double(), target=TARGET, n_steps=20)
    ours = integrated_gradients(model, X.double(), target=TARGET, steps=20)
    torch.testing.assert_close(ours.values, theirs, rtol=1e-6, atol=1e-8)


def test_several_inputs_and_further_arguments_are_captums() -> None:
    model = network()

    def two(p: Tensor, q: Tensor, scale: Tensor, power: int) -> Any:
        return model(p * q.exp()) * scale[:, None] ** power

    scale = torch.arange(1.0, 6)
    theirs = captum.IntegratedGradients(two).attribute(
        (X, START), (START, X), target=1, additional_forward_args=(scale, 2), n_steps=16
    )
    ours = integrated_gradients(
        two, (X, START), (START, X), target=1, additional=(scale, 2), steps=16, tolerance=9
    )
    torch.testing.assert_close(ours.values, theirs, rtol=1e-5, atol=1e-6)


def test_outputs_of_several_axes_are_captums() -> None:
    model = network()

    def square(p: Tensor) -> Any:
        return model(p).view(-1, 2, 2)

    target = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]
    theirs = captum.IntegratedGradients(square).attribute(X, target=target, n_steps=16)
    ours = integrated_gradients(square, X, target=target, steps=16, tolerance=9)
    torch.testing.assert_close(ours.values, theirs, rtol=1e-5, atol=1e-6)


def test_embeddings_are_captums() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    ids, pads = torch.tensor([[1, 2, 3], [8, 8, 1]]), torch.zeros(2, 3, dtype=torch.int64)
    theirs = captum.LayerIntegratedGradients(model, model[0]).attribute(
        ids, pads, target=2, n_steps=16
    )
    ours = integrated_gradients(model, ids, pads, target=2, layer="0", steps=16)
    torch.testing.assert_close(ours.values, theirs, rtol=1e-5, atol=1e-6)
