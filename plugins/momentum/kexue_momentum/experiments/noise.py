"""Where noise leaves the ball: temperature and friction on a quadratic, batches on digits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_momentum.dynamics import from_dynamics
from kexue_momentum.experiments.threads import one_thread
from kexue_momentum.langevin import Langevin
from kexue_momentum.momentum import Momentum

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["noise"]

_POST = "https://kexue.fm/archives/5655"
_SMITH = "https://arxiv.org/abs/1711.00489"
_GAMMA = 0.1
_BATCHES = (8, 16, 32, 64)
_DECAY = 0.01
_RATE = 0.2


class _Digits(NamedTuple):
    """Softmax regression: features, one-hot labels, and the least loss with weight decay."""

    x: Tensor
    y: Tensor
    least: float
    best: Tensor


def noise(context: Context) -> Report:
    """Measure variances in the long run, and losses that batches leave."""
    with one_thread():
        laws, rows, heated = _laws(context)
        data = _data()
        gradients, variances = _gradient_noise(context, data)
        floors, left = _floors(context, data)
        schedules, curves = _schedules(context, data)
    claims = [*laws, gradients, *floors, schedules]
    figures = [
        Figure(
            "Heat without and with friction",
            partial(_plot_heat, heated),
            "Variance of many balls in the bowl L = θ²/2 under noise of strength 1.",
        ),
        Figure(
            "Batches and noise, digits",
            partial(_plot_batches, variances, left),
            "Both lines fall like one over the batch.",
        ),
        Figure(
            "A smaller rate, or a larger batch, half-way",
            partial(_plot_schedules, curves),
            "Loss above the least, mean over the seeds.",
        ),
    ]
    tables = [
        Table("Variance of θ in the bowl L = θ²/2", ["what", "measured", "expected"], rows),
        Table(
            "Digits: loss above the least in the long run",
            ["learning rate", "batch", "excess loss"],
            [[lr, batch, spread(found, 4)] for (lr, batch), found in left.items()],
        ),
    ]
    white = (
        "ξ is white noise of unit strength: ⟨ξ(t)ξ(s)⟩ = δ(t − s), a step of γ adds √γ σ ξ. If the "
        "post meant 2δ, its (9) is right as it stands."
    )
    about = (
        f"Digits: softmax regression on all 1797 images, weight decay {_DECAY}, batches drawn with "
        "replacement."
    )
    return Report(claims, tables, figures, [white, about])


# -- laws in the long run ------------------------------------------------------------------------


def _laws(context: Context) -> tuple[list[Claim], list[list[str]], dict[str, list[float]]]:
    chains = context.pick(10_000, 3000)
    slack = context.pick(0.03, 0.06)
    langevin = [
        _variance(s, chains, (_GAMMA / 2, 0.0), temperature=0.5, steps=150) for s in context.seeds
    ]
    discrete = [_sgd_variance(s, chains) for s in context.seeds]
    kramers = {}
    for friction in (0.5, 1.0):
        rates, steps = from_dynamics(_GAMMA, friction), context.pick(400, 300)
        kramers[friction] = [
            _variance(s, chains, rates, temperature=1 / (2 * friction), steps=steps)
            for s in context.seeds
        ]
    heated = {f"λ = {f:g}": _heat(chains, f) for f in (0.0, 0.5, 1.0)}
    early, late = (heated["λ = 0"][i] for i in (199, 399))
    means = {f: statistics.fmean(v) for f, v in kramers.items()}
    euler = 0.5 / (1 - _GAMMA / 4)  # Langevin's equation in steps of 0.05
    sgd = 0.08 / (2 - 0.08)
    rows = [
        ["Langevin, σ = 1", spread(langevin), f"{euler:.4f}; 1 by (9)"],
        ["SGD, γ = 0.08, noise of variance 1", spread(discrete, 4), f"γσ²/(2 − γ) = {sgd:.4f}"],
        *(
            [f"Kramers, λ = {f:g}, σ = 1", spread(v), f"σ²/(2λ) = {0.5 / f:.2f}"]
            for f, v in kramers.items()
        ),
        ["Kramers, λ = 0, at times 20 and 40", f"{early:.2f}, {late:.2f}", "10, 20: σ²t/2"],
    ]
    return (
        [
            Claim(
                "Langevin's equation settles at P ∝ exp(−L/σ²).",
                f"{_POST}, eq. (9)",
                f"L = θ²/2, σ = 1: variance {spread(langevin)}, that is exp(−2L/σ²).",
                f"1 within {slack:.0%}.",
                abs(statistics.fmean(langevin) - 1) <= slack,
            ),
            Claim(
                "With temperature T = σ²/2, Langevin settles at exp(−L/T), and SGD of gradient "
                "noise σ² at the variance γσ²/(2 − γ).",
                "the exact variance of the linear recursion",
                f"variance {spread(langevin)} and {spread(discrete, 4)}.",
                f"{euler:.4f} and {sgd:.4f} within {slack:.0%}.",
                abs(statistics.fmean(langevin) / euler - 1) <= slack
                and abs(statistics.fmean(discrete) / sgd - 1) <= slack,
            ),
            Claim(
                "Without friction, Kramers' equation settles at exp(−(η²/2 + L)/σ²).",
                f"{_POST}, eq. (22)",
                f"λ = 0, σ = 1: variance {early:.2f} at a time of 20 and {late:.2f} at 40; it "
                "grows for ever.",
                "The variance at 40 within 10 % of that at 20.",
                abs(late / early - 1) <= 0.1,
            ),
            Claim(
                "With friction it settles at exp(−(2λ/σ²)(η²/2 + L)).",
                "fluctuation and dissipation: T = σ²/(2λ)",
                "; ".join(f"λ = {f:g}: {spread(v)}" for f, v in kramers.items()),
                f"1 and 0.5 within {slack:.0%}.",
                all(abs(m * 2 * f - 1) <= slack for f, m in means.items()),
            ),
        ],
        rows,
        heated,
    )


def _variance(
    seed: int, chains: int, rates: tuple[float, float], *, temperature: float, steps: int
) -> float:
    p = nn.Parameter(torch.zeros(chains))
    generator = torch.Generator().manual_seed(seed)
    lr, momentum = rates
    optimizer = Langevin([p], lr, temperature, momentum=momentum, generator=generator)
    for _ in range(steps):
        p.grad = p.detach().clone()
        optimizer.step()
    return float(p.detach().square().mean())


def _sgd_variance(seed: int, chains: int) -> float:
    p = nn.Parameter(torch.zeros(chains))
    generator = torch.Generator().manual_seed(seed)
    optimizer = Momentum([p], 0.08, 0.0)
    for _ in range(80):
        p.grad = p.detach() + torch.randn(chains, generator=generator)
        optimizer.step()
    return float(p.detach().square().mean())


def _heat(chains: int, friction: float, steps: int = 400) -> list[float]:
    """Return the variance after each step of the leapfrog scheme of Kramers' equation, σ = 1."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.zeros(chains), torch.zeros(chains)
    half = friction * _GAMMA / 2
    found = []
    for _ in range(steps):
        kick = _GAMMA**1.5 * torch.randn(chains, generator=generator) - _GAMMA**2 * x
        v = ((1 - half) * v + kick) / (1 + half)
        x = x + v
        found.append(float(x.square().mean()))
    return found


# -- batches -------------------------------------------------------------------------------------


def _data() -> _Digits:
    images = digits()
    x = torch.from_numpy(images.images).flatten(1).float()
    y = nn.functional.one_hot(torch.from_numpy(images.labels), 10).float()
    weight = nn.Parameter(torch.zeros(64, 10))
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(x, y, weight)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    best = weight.detach().clone()
    return _Digits(x, y, float(_loss(x.double(), y.double(), best.double())), best)


def _loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    log_p = torch.log_softmax(x @ weight, -1)
    return -(log_p * y).sum() / len(x) + _DECAY / 2 * weight.square().sum()


def _gradient(data: _Digits, weight: Tensor, rows: Tensor) -> Tensor:
    x, y = data.x[rows], data.y[rows]
    return x.T @ (torch.softmax(x @ weight, -1) - y) / len(rows) + _DECAY * weight


def _gradient_noise(context: Context, data: _Digits) -> tuple[Claim, dict[int, list[float]]]:
    draws = context.pick(200, 100)
    mean = _gradient(data, data.best, torch.arange(len(data.x)))
    found: dict[int, list[float]] = {batch: [] for batch in _BATCHES}
    for seed in context.seeds:
        generator = torch.Generator().manual_seed(seed)
        for batch in _BATCHES:
            apart = 0.0
            for _ in range(draws):
                rows = torch.randint(len(data.x), (batch,), generator=generator)
                apart += float((_gradient(data, data.best, rows) - mean).square().sum())
            found[batch].append(apart / draws)
    slopes = [_slope([found[b][i] for b in _BATCHES]) for i in range(len(context.seeds))]
    claim = Claim(
        "The larger the batch, the smaller the variance σ² of the gradient.",
        f"{_POST}, section “结果启发”, definition (7)",
        f"digits, at the minimum: σ² ∝ batch^p, p = {spread(slopes)}, for batches of "
        f"{_BATCHES[0]} to {_BATCHES[-1]}.",
        "−1 ± 0.1",
        all(abs(p + 1) <= 0.1 for p in slopes),
    )
    return claim, found


def _slope(values: Sequence[float]) -> float:
    """Return the exponent of values over batches that double."""
    logs = [math.log2(v) for v in values]
    middle = (len(logs) - 1) / 2
    return sum((i - middle) * y for i, y in enumerate(logs)) / sum(
        (i - middle) ** 2 for i in range(len(logs))
    )


Schedule = Callable[[int], tuple[float, int]]
"""Learning rate and batch at each step."""


def _train(data: _Digits, seed: int, steps: int, schedule: Schedule, start: Tensor) -> list[float]:
    """Return the loss above the least, every tenth step."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(start.clone())
    optimizer = Momentum([weight], _RATE, 0.0)
    excess = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"], batch = schedule(step)
        rows = torch.randint(len(data.x), (batch,), generator=generator)
        weight.grad = _gradient(data, weight.detach(), rows)
        optimizer.step()
        if step % 10 == 9:
            excess.append(float(_loss(data.x, data.y, weight.detach())) - data.least)
    return excess


def _floors(
    context: Context, data: _Digits
) -> tuple[list[Claim], dict[tuple[float, int], list[float]]]:
    """Begin at the minimum, and see where noise of each batch and rate leaves the loss."""
    steps = context.pick(800, 250)
    found: dict[tuple[float, int], list[float]] = {}
    for lr, batch in [*((_RATE, b) for b in _BATCHES), (_RATE / 2, 8), (_RATE / 2, 16)]:
        runs = [
            _train(data, s, steps, lambda _, fixed=(lr, batch): fixed, data.best)  # type: ignore[misc]
            for s in context.seeds
        ]
        found[lr, batch] = [statistics.fmean(run[len(run) // 3 :]) for run in runs]
    slopes = [_slope([found[_RATE, b][i] for b in _BATCHES]) for i in range(len(context.seeds))]
    ratios = [
        a / b
        for batch in (8, 16)
        for a, b in zip(found[_RATE / 2, batch], found[_RATE, 2 * batch], strict=True)
    ]
    return [
        Claim(
            "The larger the batch, the nearer to the minimum SGD settles.",
            f"{_POST}, section “结果启发”",
            f"digits, learning rate {_RATE}: excess loss ∝ batch^p, p = {spread(slopes)}.",
            "−1 ± 0.2",
            all(abs(p + 1) <= 0.2 for p in slopes),
        ),
        Claim(
            "Half the learning rate leaves as little noise as twice the batch.",
            f"{_POST}, section “结果启发”; {_SMITH}",
            f"excess loss at half the rate over that at twice the batch: {spread(ratios)}.",
            "Between 0.75 and 1.33.",
            all(0.75 <= r <= 1.33 for r in ratios),
        ),
    ], found


def _schedules(context: Context, data: _Digits) -> tuple[Claim, dict[str, list[float]]]:
    steps = context.pick(800, 200)
    half = steps // 2
    plan: dict[str, Schedule] = {
        "rate 0.2, batch 8": lambda _: (_RATE, 8),
        "rate / 8 half-way": lambda t: (_RATE / (1 if t < half else 8), 8),
        "batch × 8 half-way": lambda t: (_RATE, 8 if t < half else 64),
    }
    start = torch.zeros_like(data.best)
    runs = {
        name: [_train(data, s, steps, schedule, start) for s in context.seeds]
        for name, schedule in plan.items()
    }
    ends = {
        name: [statistics.fmean(run[-len(run) // 5 :]) for run in found]
        for name, found in runs.items()
    }
    fixed, decayed, grown = (statistics.fmean(e) for e in ends.values())
    claim = Claim(
        "Begin with small batches and a large rate; then a larger batch does what a smaller rate "
        "does.",
        f"{_POST}, section “结果启发”; {_SMITH}",
        f"digits, excess loss in the last fifth of {steps} steps: "
        + "; ".join(f"{name}: {spread(e, 4)}" for name, e in ends.items()),
        "Each at most half of what nothing changed leaves, within a factor of 1.5 of each other.",
        max(decayed, grown) <= fixed / 2 and max(decayed, grown) <= 1.5 * min(decayed, grown),
    )
    curves = {
        name: [statistics.fmean(column) for column in zip(*found, strict=True)]
        for name, found in runs.items()
    }
    return claim, curves


# -- pictures ------------------------------------------------------------------------------------


def _plot_heat(heated: Mapping[str, Sequence[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, line in heated.items():
        axes.plot([_GAMMA * (i + 1) for i in range(len(line))], line, label=name)
    axes.axhline(1.0, color="black", linestyle=":", linewidth=1, label="the post's (22), λ = 0")
    axes.set(xlabel="time", ylabel="variance of θ", yscale="log")
    axes.legend()


def _plot_batches(
    variances: Mapping[int, Sequence[float]],
    left: Mapping[tuple[float, int], Sequence[float]],
    canvas: Canvas,
) -> None:
    one, two = canvas.subplots(1, 2)
    one.plot(list(variances), [statistics.fmean(v) for v in variances.values()], "o-")
    one.set(xlabel="batch", ylabel="variance of the gradient", xscale="log", yscale="log")
    for rate in (_RATE, _RATE / 2):
        line = {b: statistics.fmean(v) for (lr, b), v in left.items() if lr == rate}
        two.plot(list(line), list(line.values()), "o-", label=f"learning rate {rate:g}")
    two.set(xlabel="batch", ylabel="excess loss", xscale="log", yscale="log")
    two.legend()


def _plot_schedules(curves: Mapping[str, Sequence[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, line in curves.items():
        axes.plot([10 * (i + 1) for i in range(len(line))], line, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="excess loss, nats", yscale="log")
    axes.legend()
