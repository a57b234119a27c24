"""All 2⁶ combinations beside the post's formulas, in float64 and in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue_derived_optimizers import (
    with_grad_accumulation,
    with_layer_adaptation,
    with_lazy,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)

SHAPES: list[tuple[int, ...]] = [(6, 4), (5, 3), (4,), ()]
RATE, DECAY, WINDOW, SLOW, SHARE = 0.05, 0.3, 2, 3, 0.6
SCHEDULE = {3: 1.0, 6: 0.25}
BETAS, EPS, MOMENTUM = (0.9, 0.99), 1e-8, 0.8

DERIVATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "decay": (with_weight_decay, {"weight_decay_rate": DECAY}),
    "layers": (with_layer_adaptation, {}),
    "schedule": (with_piecewise_linear_lr, {"lr_schedule": SCHEDULE}),
    "window": (with_grad_accumulation, {"grad_accum_steps": WINDOW}),
    "slow": (with_lookahead, {"slow_steps": SLOW, "slow_step_size": SHARE}),
    "lazy": (with_lazy, {}),
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": RATE, "betas": BETAS, "eps": EPS}),
    "sgd": (torch.optim.SGD, {"lr": RATE, "momentum": MOMENTUM}),
}
SUBSETS = [
    names for size in range(7) for names in itertools.combinations(DERIVATIONS, size)
]  # fmt: skip


class Oracle:
    """θ ← θ + u, written out tensor by tensor.

    The base gives u = −γ ρ_t h_t; what changes u does so in the order in which it is named.
    """

    def __init__(self, base: str, order: Sequence[str], start: Sequence[Tensor]) -> None:
        self.base, self.order = base, order
        self.theta = [x.detach().clone() for x in start]
        self.slow = [x.clone() for x in self.theta]
        self.m = [torch.zeros_like(x) for x in self.theta]
        self.v = [torch.zeros_like(x) for x in self.theta]
        self.pending: list[list[Tensor]] = []
        self.updates = 0

    def step(self, grads: list[Tensor]) -> None:
        if "window" in self.order:
            self.pending.append(grads)
            if len(self.pending) < WINDOW:
                return
            grads = [
                sum(rows, torch.zeros(())) / WINDOW for rows in zip(*self.pending, strict=True)
            ]
            self.pending = []
        rate = RATE * (piecewise(self.updates) if "schedule" in self.order else 1.0)
        self.updates += 1
        for i, (theta, g) in enumerate(zip(self.theta, grads, strict=True)):
            u = -rate * self.direction(i, g)
            for name in self.order:
                if name == "decay":
                    u = u - rate * DECAY * theta
                elif name == "layers" and u.norm() > 0 and theta.norm() > 0:
                    u = u * rate * theta.norm() / u.norm()
                elif name == "lazy" and g.ndim > 1:
                    u = u * (g != 0).flatten(1).any(1).to(u)[:, None]
            self.theta[i] = theta + u
        if "slow" in self.order and self.updates % SLOW == 0:
            pairs = zip(self.slow, self.theta, strict=True)
            self.slow = [slow + SHARE * (fast - slow) for slow, fast in pairs]
            self.theta = [x.clone() for x in self.slow]

    def direction(self, i: int, g: Tensor) -> Tensor:
        """Return h_t = f(g_≤t)."""
        if self.base == "sgd":
            self.m[i] = MOMENTUM * self.m[i] + g
            return self.m[i]
        self.m[i] = BETAS[0] * self.m[i] + (1 - BETAS[0]) * g
        self.v[i] = BETAS[1] * self.v[i] + (1 - BETAS[1]) * g * g
        m, v = (
            x / (1 - b**self.updates) for x, b in zip((self.m[i], self.v[i]), BETAS, strict=True)
        )
        return m / (v.sqrt() + EPS)


def piecewise(t: int) -> float:
    """Return ρ_t of the schedule above: from (0, 0) to (3, 1) to (6, 0.25)."""
    if t < 3:
        return t / 3
    return 1 - 0.75 * (t - 3) / 3 if t < 6 else 0.25


def start(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [nn.Parameter(x) for x in made]


def gradients(t: int) -> list[Tensor]:
    """Return gradients that miss some rows, as those of an embedding do."""
    generator = torch.Generator().manual_seed(100 + t)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    made[0][torch.randperm(6, generator=generator)[:4]] = 0
    return made


def derived(base: str, order: Sequence[str], own: list[nn.Parameter], **more: Any) -> Any:
    make, settings = BASES[base]
    for name in order:
        derivation, options = DERIVATIONS[name]
        make = derivation(make, **options)
    return make(own, **settings, **more)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [names[i] for i in order]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("base", BASES)
def test_matches_the_formulas(base: str, names: tuple[str, ...]) -> None:
    """Two orders of each combination; 14 calls, so that windows and cycles end in the middle."""
    for seed in range(2):
        order = shuffled(names, seed)
        own = start()
        optimizer, oracle = derived(base, order, own), Oracle(base, order, own)
        for t in range(14):
            for p, g in zip(own, gradients(t), strict=True):
                p.grad = g
            optimizer.step()
            oracle.step(gradients(t))
        for p, wanted in zip(own, oracle.theta, strict=True):
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-11, atol=1e-12)
