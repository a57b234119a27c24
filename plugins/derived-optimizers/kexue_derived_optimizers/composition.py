"""How the derivations of post 7094 compose, and what a piecewise-linear rate can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue_derived_optimizers.accumulation import with_grad_accumulation
from kexue_derived_optimizers.layer_adaptation import with_layer_adaptation
from kexue_derived_optimizers.lookahead import with_lazy, with_lookahead
from kexue_derived_optimizers.piecewise_linear import piecewise_linear, with_piecewise_linear_lr
from kexue_derived_optimizers.weight_decay import with_weight_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["composition"]

_POST = "https://kexue.fm/archives/7094"
_RATE, _STEPS = 0.01, 24
_SHAPES: tuple[tuple[int, ...], ...] = ((16, 8), (8,), (8, 4), (4,))
_ALL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "weight decay": (with_weight_decay, {"weight_decay_rate": 0.1}),
    "layer adaptation": (with_layer_adaptation, {}),
    "lazy": (with_lazy, {}),
    "schedule": (with_piecewise_linear_lr, {"lr_schedule": {4: 1.0, 8: 0.1}}),
    "accumulation": (with_grad_accumulation, {"grad_accum_steps": 2}),
    "Lookahead": (with_lookahead, {"slow_steps": 3}),
}
_OF_UPDATES = {"weight decay", "layer adaptation", "lazy"}
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "exponential": lambda x: math.exp(-5 * x),
    "quadratic": lambda x: (1 - x) ** 2,
}


def composition(context: Context) -> Report:
    """Follow the rate through a schedule, and take each pair of derivations in both orders."""
    knots = context.pick({1000: 1.0, 2000: 0.1}, {100: 1.0, 200: 0.1})
    rates = _rates(knots, 3 * max(knots) // 2)
    apart = _orders(context)
    claims = [_about_knots(knots, rates), _about_strategies(context), _about_order(apart)]
    note = "float64, Adam, 24 calls, three seeds; gradients are random and miss half of the rows."
    return Report(claims, [_table(apart)], _figures(knots, rates, apart), [note])


# -- schedules -------------------------------------------------------------------------------------


def _rates(knots: dict[int, float], steps: int) -> list[float]:
    """Return how far SGD moves in each step under a constant gradient."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = with_piecewise_linear_lr(torch.optim.SGD, lr_schedule=knots)([p], lr=1.0)
    moved = []
    for _ in range(steps + 1):
        with torch.no_grad():
            p.zero_()
        optimizer.step()
        moved.append(0.0 - float(p.detach()))
    return moved


def _about_knots(knots: dict[int, float], rates: Sequence[float]) -> Claim:
    warm, end = knots
    wanted = {
        0: 0.0, warm // 2: 0.5, warm: 1.0, (warm + end) // 2: 0.55, end: 0.1, len(rates) - 1: 0.1,
    }  # fmt: skip
    off = max(abs(rates[t] - ratio) for t, ratio in wanted.items())
    shown = ", ".join(f"{rates[t]:.3g} at {t}" for t in wanted)
    return Claim(
        f"With {knots} the rate rises from 0 to γ in {warm} steps, falls, and stays.",
        f"{_POST}, section “分段线性学习率” and the example",
        f"ρ is {shown}",
        "0, 0.5, 1, 0.55, 0.1 and 0.1 within 1e-12.",
        off <= 1e-12,
    )


def _pieces(shape: Callable[[float], float], pieces: int, end: int) -> dict[int, float]:
    return {end * i // pieces: shape(i / pieces) for i in range(pieces + 1)}


def _about_strategies(context: Context) -> Claim:
    end, pieces = context.pick(3200, 320), 32
    off = {
        name: max(
            abs(piecewise_linear(knots, t) - shape(t / end)) for t in range(0, end + 1, end // 320)
        )
        for name, shape in _SCHEDULES.items()
        for knots in [_pieces(shape, pieces, end)]
    }
    return Claim(
        f"Piecewise-linear rates come close to the common strategies ({pieces} equal pieces).",
        f"{_POST}, section “分段线性学习率”",
        "greatest distance: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()),
        "At most 0.01 of γ.",
        max(off.values()) <= 0.01,
    )


# -- order -----------------------------------------------------------------------------------------


def _run(order: Sequence[str], seed: int) -> list[nn.Parameter]:
    make: Any = torch.optim.Adam
    for name in order:
        derivation, options = _ALL[name]
        make = derivation(make, **options)
    generator = torch.Generator().manual_seed(seed)
    own = [nn.Parameter(torch.randn(s, generator=generator).double()) for s in _SHAPES]
    optimizer = make(own, lr=_RATE)
    for _ in range(_STEPS):
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator).double()
            if p.ndim > 1:  # as of words that a batch does not hold
                p.grad[torch.randperm(len(p), generator=generator)[: len(p) // 2]] = 0
        optimizer.step()
    return own


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


def _orders(context: Context) -> dict[tuple[str, str], float]:
    """Return for each pair how far its two orders come apart, over three seeds."""
    return {
        (a, b): max(_distance(_run((a, b), seed), _run((b, a), seed)) for seed in context.seeds)
        for a, b in itertools.combinations(_ALL, 2)
    }


def _about_order(apart: dict[tuple[str, str], float]) -> Claim:
    within = {pair for pair in apart if set(pair) <= _OF_UPDATES}
    free = max(value for pair, value in apart.items() if pair not in within)
    return Claim(
        "The derivations do not contradict each other: any are combined, and the order matters "
        "only between those that change the update.",
        f"{_POST}, section “参考实现”",
        f"the {len(apart) - len(within)} pairs with another one, both orders: {free:.1e} apart; "
        f"the {len(within)} others: "
        + ", ".join(f"{a} and {b} {apart[a, b]:.1e}" for a, b in sorted(within))
        + ".",
        "0, bit for bit, and more than 1e-6 apart.",
        free == 0 and min(apart[pair] for pair in within) > 1e-6,
    )


# -- what is shown ---------------------------------------------------------------------------------


def _table(apart: dict[tuple[str, str], float]) -> Table:
    rows = [[f"{a}, {b}", value] for (a, b), value in apart.items()]
    return Table("The two orders of each pair", ["pair", "greatest difference"], rows)


def _figures(
    knots: dict[int, float],
    rates: Sequence[float],
    apart: dict[tuple[str, str], float],
) -> list[Figure]:
    return [
        Figure(
            "The rate of each update",
            partial(_plot_rates, knots, rates),
            "Left: how far SGD moves under a constant gradient, and the knots. Right: common "
            "strategies (lines) and eight pieces for each (dots, dashed).",
        ),
        Figure(
            "Where the order matters",
            partial(_plot_orders, apart),
            "Greatest difference of the parameters between the two orders of a pair; white is 0, "
            "bit for bit.",
        ),
    ]


def _plot_rates(knots: dict[int, float], rates: Sequence[float], canvas: Canvas) -> None:
    left, right = canvas.subplots(1, 2, sharey=True)
    left.plot(rates)
    left.plot([0, *knots], [0.0, *knots.values()], "o", color="black")
    left.set(xlabel="update t", ylabel="ρ", title=str(knots))
    ts = torch.linspace(0, 1, 201).tolist()
    for name, shape in _SCHEDULES.items():
        (line,) = right.plot(ts, [shape(t) for t in ts], label=name)
        at = [i / 8 for i in range(9)]
        right.plot(at, [shape(t) for t in at], "o--", color=line.get_color(), markersize=4)
    right.set(xlabel="share of the steps")
    right.legend()


def _plot_orders(apart: dict[tuple[str, str], float], canvas: Canvas) -> None:
    names = list(_ALL)
    shown = torch.full((len(names), len(names)), math.nan)
    for (a, b), value in apart.items():
        i, j = names.index(a), names.index(b)
        shown[i, j] = shown[j, i] = math.log10(value) if value else math.nan
    axes = canvas.subplots()
    picture = axes.imshow(shown.numpy(), cmap="Oranges", vmin=-2.0, vmax=0.0)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (a, b), value in apart.items():
        for i, j in ((names.index(a), names.index(b)), (names.index(b), names.index(a))):
            axes.text(j, i, f"{value:.0e}" if value else "0", ha="center", va="center", size=8)
    canvas.colorbar(picture, label="log₁₀ difference")
