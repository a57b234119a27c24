"""The schemes beside torch's SGD and the equation of motion: order, stability, the β-rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue_momentum.dynamics import (
    beta_for_lr,
    from_dynamics,
    spectral_radius,
    stability_limit,
    to_dynamics,
)
from kexue_momentum.momentum import HalfNesterov, Momentum, Nesterov

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["discretisation"]

_POST = "https://kexue.fm/archives/5655"
_FRICTION, _TIME = 0.5, 2.0
_SCHEMES: dict[str, tuple[Any, float]] = {
    "momentum": (Momentum, 0.0),
    "half Nesterov": (HalfNesterov, 0.5),
    "Nesterov": (Nesterov, 1.0),
}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def discretisation(context: Context) -> Report:
    """Compare the schemes with torch's, with the motion, and with each other."""
    orders = {name: _slope(errors) for name, errors in _errors(context).items()}
    rows = [
        [name, *(f"{e:.3g}" for e in errors), f"{orders[name]:.2f}"]
        for name, errors in _errors(context).items()
    ]
    header = ["scheme", *(f"γ = {_TIME / n:g}" for n in _counts(context)), "order"]
    stability, limits = _stability()
    claims = [
        *_beside_torch(context),
        *_order(orders),
        *stability,
        *_rule(),
    ]
    figures = [
        Figure(
            "Distance from the exact motion",
            partial(_plot_errors, context, _errors(context)),
            "Two of the lines are twice as steep; gradient descent is beside its own equation.",
        ),
        Figure(
            "How fast errors shrink",
            _plot_radii,
            "The factor per step, β = 0.9, over α times the curvature. Above the dotted line it "
            "diverges.",
        ),
    ]
    tables = [
        Table("Distance from the motion at a time of 2", header, rows),
        Table(
            "Limits of stability: α times the curvature",
            ["scheme", "β", "measured", "2(1 + β)/(1 + 2hβ)"],
            limits,
        ),
    ]
    note = (
        f"Order: θ'' + {_FRICTION}θ' = −(θ + θ³/2), at rest at θ = 1, against steps that are 64 "
        "times finer than the finest; errors at the end, slope by least squares. Nesterov's forms "
        "are compared at θ, not at the Θ that the model holds."
    )
    return Report(claims, tables, figures, [note])


# -- torch -----------------------------------------------------------------------------------------


def _beside_torch(context: Context) -> list[Claim]:
    steps = context.pick(300, 60)
    apart, dropped, rescaled = [], [], []
    for seed in context.seeds:
        for name, nesterov in (("momentum", False), ("Nesterov", True)):
            peer: Any = partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=nesterov)
            ours: Any = partial(_SCHEMES[name][0], lr=0.02, momentum=0.9)
            kept = partial(ours, rescale_velocity="lr")
            apart.append(_distance(ours, peer, seed, steps))
            dropped.append(_distance(ours, peer, seed, steps, drop=0.1))
            rescaled.append(_distance(kept, peer, seed, steps, drop=0.1))
    where = f"{_POST}, eq. (16) and the last of section “Nesterov动量”"
    return [
        Claim(
            "At a constant rate, eq. (16) and the Θ-form of Nesterov are what torch computes.",
            where,
            f"greatest difference from torch.optim.SGD in float64, {steps} steps on a random "
            f"quartic of 20 parameters, three seeds: {max(apart):.1e}",
            "at most 1e-12",
            max(apart) <= 1e-12,
        ),
        Claim(
            "After a drop of the rate they differ, unless v goes with the rate.",
            f"{_POST}, eq. (15): v = γη includes the rate, torch's buffer does not",
            f"rate × 0.1 half-way: v kept, they differ by {min(dropped):.2g} to {max(dropped):.2g}"
            f" on the way; with rescale_velocity='lr' by {max(rescaled):.1e}.",
            "More than 1e-6; at most 1e-12.",
            min(dropped) > 1e-6 and max(rescaled) <= 1e-12,
        ),
    ]


def _distance(ours: Make, theirs: Make, seed: int, steps: int, drop: float = 1.0) -> float:
    """Return the greatest difference on the way between two optimizers of a quartic."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    slopes = 0.1 + torch.rand(20, generator=generator, dtype=torch.float64)
    points = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [make([p]) for make, p in zip((ours, theirs), points, strict=True)]
    greatest = 0.0
    for step in range(steps):
        for p, optimizer in zip(points, optimizers, strict=True):
            if step == steps // 2:
                optimizer.param_groups[0]["lr"] *= drop
            p.grad = (slopes * p + p**3).detach()
            optimizer.step()
        greatest = max(greatest, float((points[0] - points[1]).detach().abs().max()))
    return greatest


# -- order -----------------------------------------------------------------------------------------


def _force(x: Tensor) -> Tensor:
    return -(x + x**3 / 2)


def _end(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int) -> float:
    for _ in range(steps):
        p.grad = -_force(p.detach())
        optimizer.step()
    return float(p.detach())


def _one() -> nn.Parameter:
    return nn.Parameter(torch.ones((), dtype=torch.float64))


def _leapfrog(steps: int, *, half: bool) -> float:
    p = _one()
    rates = from_dynamics(_TIME / steps, _FRICTION)
    return _end(Momentum([p], *rates, half_step_start=half), p, steps)


def _naive(cls: type[Any], ahead: float, steps: int) -> float:
    """β = 1 − λγ, α = γ², eq. (18); where the model looks ahead, return θ = Θ − hβv."""
    p = _one()
    gamma = _TIME / steps
    optimizer = cls([p], gamma**2, 1 - _FRICTION * gamma)
    end = _end(optimizer, p, steps)
    return end - ahead * (1 - _FRICTION * gamma) * float(optimizer.velocity(p))


def _descent(steps: int) -> float:
    p = _one()
    return _end(Momentum([p], _TIME / steps, 0.0), p, steps)


def _counts(context: Context) -> Sequence[int]:
    return context.pick((20, 40, 80, 160), (20, 40, 80))


def _errors(context: Context) -> dict[str, list[float]]:
    return context.once("momentum orders", partial(_measure_errors, context))


def _measure_errors(context: Context) -> dict[str, list[float]]:
    fine = 64 * _counts(context)[-1]
    motion = _fine(fine, inertia=True)
    flow = _fine(fine, inertia=False)
    schemes: dict[str, tuple[Callable[[int], float], float]] = {
        "leapfrog (15), half-step start": (partial(_leapfrog, half=True), motion),
        "leapfrog (15), v = 0 at first": (partial(_leapfrog, half=False), motion),
        "momentum, β = 1 − λγ, α = γ²": (partial(_naive, Momentum, 0.0), motion),
        "half Nesterov (20)": (partial(_naive, HalfNesterov, 0.5), motion),
        "Nesterov": (partial(_naive, Nesterov, 1.0), motion),
        "gradient descent (2)": (_descent, flow),
    }
    return {
        name: [abs(end(n) - exact) for n in _counts(context)]
        for name, (end, exact) in schemes.items()
    }


def _fine(steps: int, *, inertia: bool) -> float:
    """Return the end of the motion (10), or of the flow (4), by the method of Runge and Kutta."""

    def slope(x: float, v: float) -> tuple[float, float]:
        pull = -(x + x**3 / 2)
        return (v, pull - _FRICTION * v) if inertia else (pull, 0.0)

    h, x, v = _TIME / steps, 1.0, 0.0
    for _ in range(steps):
        a = slope(x, v)
        b = slope(x + h / 2 * a[0], v + h / 2 * a[1])
        c = slope(x + h / 2 * b[0], v + h / 2 * b[1])
        d = slope(x + h * c[0], v + h * c[1])
        x += h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
        v += h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
    return x


def _slope(errors: Sequence[float]) -> float:
    """Return by which power of γ errors shrink, γ being halved each time."""
    logs = [math.log2(e) for e in errors]
    middle = (len(logs) - 1) / 2
    top = sum((middle - i) * y for i, y in enumerate(logs))
    return top / sum((i - middle) ** 2 for i in range(len(logs)))


def _order(orders: dict[str, float]) -> list[Claim]:
    half, zero, naive, post, nesterov, descent = orders.values()
    return [
        Claim(
            "Momentum is a scheme of second order, gradient descent one of first.",
            f"{_POST}, eq. (13) to (16)",
            f"order {half:.2f} with half a step at the start, {zero:.2f} from v = 0; "
            f"β = 1 − λγ, α = γ²: {naive:.2f}; gradient descent {descent:.2f}.",
            "2.0 ± 0.1 with the half step; 1.0 ± 0.15 of gradient descent.",
            abs(half - 2) <= 0.1 and abs(descent - 1) <= 0.15,
        ),
        Claim(
            "Momentum and both forms of Nesterov are all of second order.",
            f"{_POST}, section “Nesterov动量”",
            f"momentum {half:.2f}; with β = 1 − λγ, α = γ² of (18): the post's form {post:.2f}, "
            f"Nesterov's {nesterov:.2f}, momentum {naive:.2f}.",
            "2.0 ± 0.1 each.",
            all(abs(order - 2) <= 0.1 for order in (half, post, nesterov)),
        ),
    ]


# -- stability -------------------------------------------------------------------------------------


def _stability() -> tuple[list[Claim], list[list[Any]]]:
    rows: list[list[Any]] = []
    worst = 0.0
    limits: dict[tuple[str, float], float] = {}
    for momentum in (0.5, 0.9):
        for name, (cls, ahead) in _SCHEMES.items():
            found = _section(cls, momentum, 1000)
            limits[name, momentum] = found
            wanted = stability_limit(momentum, ahead)
            worst = max(worst, abs(found - wanted) / wanted)
            rows.append([name, momentum, found, wanted])
    radii = [spectral_radius(0.1, 0.9, 1.0, ahead) for _, ahead in _SCHEMES.values()]
    smallest, largest = limits["Nesterov", 0.9], limits["momentum", 0.9]
    return [
        Claim(
            "The schemes are stable up to 2(1 + β)/(1 + 2hβ), h the look-ahead.",
            "linear stability on a quadratic; the limits are the plugin's documentation",
            f"by sections of an interval, β = 0.5 and 0.9: within {worst:.1e} of it.",
            "within 1e-3, relatively",
            worst <= 1e-3,
        ),
        Claim(
            "Nesterov's method is implicit, and so its region of stability is wider.",
            f"{_POST}, section “Nesterov动量”",
            f"at β = 0.9, α times the curvature may be up to {largest:.3f} for momentum, "
            f"{limits['half Nesterov', 0.9]:.3f} for the post's form, {smallest:.3f} for "
            "Nesterov's: both are explicit.",
            "Nesterov's limit above momentum's.",
            smallest > largest,
        ),
        Claim(
            "Nesterov's method does better than momentum.",
            f"{_POST}, section “Nesterov动量”",
            "errors shrink per step, β = 0.9, α times the curvature 0.1, by "
            + ", ".join(f"{r:.3f} ({n})" for n, r in zip(_SCHEMES, radii, strict=True)),
            "Each below the one before.",
            radii[0] > radii[1] > radii[2],
        ),
    ], rows


def _section(cls: type[Any], momentum: float, steps: int) -> float:
    """Return the greatest curvature at which the optimizer, α = 1, does not diverge.

    Each round cuts the interval into as many parts as it has curvatures, all moved at once.
    """
    low, high = 0.1, 8.0
    for _ in range(2):
        curvatures = torch.linspace(low, high, 2000, dtype=torch.float64)
        p = nn.Parameter(torch.ones_like(curvatures))
        optimizer = cls([p], 1.0, momentum)
        for _ in range(steps):
            p.grad = curvatures * p.detach()
            optimizer.step()
        diverges = ~(p.detach().abs() < 10)  # NaN does
        first = int(diverges.double().argmax())
        low, high = float(curvatures[first - 1]), float(curvatures[first])
    return (low + high) / 2


# -- the β-rule ------------------------------------------------------------------------------------


def _rule() -> list[Claim]:
    pairs = {b: (beta_for_lr(b, 0.1), beta_for_lr(b, 0.1, exact=True)) for b in (0.5, 0.9, 0.99)}
    apart = {b: abs(rule - exact) for b, (rule, exact) in pairs.items()}
    friction = {b: to_dynamics(0.01, b).friction for b in pairs}
    changes = {
        b: (
            to_dynamics(0.001, rule).friction / friction[b],
            to_dynamics(0.001, b).friction / friction[b],
        )
        for b, (rule, _) in pairs.items()
    }
    said = "; ".join(
        f"β = {b}: {rule:.6f} by the rule, {exact:.6f} exactly"
        for b, (rule, exact) in pairs.items()
    )
    return [
        Claim(
            "When the rate becomes r times, β → 1 − (1 − β)√r keeps the friction.",
            f"{_POST}, section “如何加速？”",
            f"r = 0.1: {said}. The friction becomes "
            + ", ".join(f"{by_rule:.3f}" for by_rule, _ in changes.values())
            + f" times; {changes[0.9][1]:.2f} times if β stays at 0.9.",
            "Within 0.001 of the exact β for β ≥ 0.9.",
            apart[0.9] <= 0.001 and apart[0.99] <= 0.001,
        )
    ]


# -- pictures --------------------------------------------------------------------------------------


def _plot_errors(context: Context, errors: dict[str, list[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    steps = [_TIME / n for n in _counts(context)]
    for name, line in errors.items():
        axes.plot(steps, line, "o-", label=name, markersize=4)
    axes.set(xlabel="time step γ", ylabel="error", xscale="log", yscale="log")
    axes.legend(fontsize="small")


def _plot_radii(canvas: Canvas) -> None:
    axes = canvas.subplots()
    grid = [10 ** (-3 + 3.7 * i / 400) for i in range(401)]
    for name, (_, ahead) in _SCHEMES.items():
        axes.plot(grid, [spectral_radius(a, 0.9, 1.0, ahead) for a in grid], label=name)
    axes.plot(grid, [abs(1 - a) for a in grid], "--", color="grey", label="gradient descent")
    axes.axhline(1.0, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="α · curvature", ylabel="factor per step", xscale="log", ylim=(0.6, 1.15))
    axes.legend()
