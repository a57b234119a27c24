"""Lookahead: the variance on a noisy quadratic, and steadiness on digits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_lookahead.lookahead import with_lookahead

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["lookahead"]

_POST = "https://kexue.fm/archives/6869"
_PAPER = "https://arxiv.org/abs/1907.08610"
_QUADRATICS = ((0.3, 5, 0.5), (0.1, 5, 0.5), (0.5, 5, 0.2))  # γh, k, α
_RATES = (0.05, 0.1, 0.2)
_LAST = 100


def lookahead(context: Context) -> Report:
    """Compare the variance on a noisy quadratic with the formula, and train on digits."""
    ratios = [
        (setting, _ratios(*setting, context.seeds, context.pick(20000, 5000)))
        for setting in _QUADRATICS
    ]
    off = max(abs(statistics.fmean(r) / _formula(*s) - 1) for s, r in ratios)
    claims = [
        Claim(
            "On a noisy quadratic, Lookahead divides the stationary variance of SGD as in the "
            "formula.",
            f"{_PAPER}, proposition 2",
            f"ratios {', '.join(f'{statistics.fmean(r):.3f}' for _, r in ratios)}, the formula's "
            f"{', '.join(f'{_formula(*s):.3f}' for s, _ in ratios)}: off by {off:.1%} or less.",
            "Within 3 %.",
            off <= 0.03,
        )
    ]
    curves, runs = _digits_runs(context)
    for statement, what in (
        ("Lookahead steadies SGD with momentum in small batches.", "std"),
        ("Lookahead lowers the loss of SGD with momentum in small batches.", "mean"),
    ):
        pairs = {
            rate: [[run[what] for run in runs[name, rate]] for name in ("SGD", "Lookahead")]
            for rate in _RATES
        }
        told = (
            f"{spread(sgd)} and {spread(slow)} at {rate:g}" for rate, (sgd, slow) in pairs.items()
        )
        label = {"std": "deviation", "mean": "mean"}[what]
        claims.append(
            Claim(
                statement,
                f"{_PAPER}, sections 3 and 5",
                f"{label} of the test loss (nats) over the last {_LAST} steps, SGD and Lookahead: "
                f"{'; '.join(told)}.",
                "Lower at every rate.",
                all(statistics.fmean(slow) < statistics.fmean(sgd) for sgd, slow in pairs.values()),
            )
        )
    adam, slow = ([run["accuracy"] for run in runs[name, 1e-3]] for name in ("Adam", "Adam, k"))
    gap = statistics.fmean(slow) - statistics.fmean(adam)
    claims.append(
        Claim(
            "Around Adam at its usual rate, Lookahead changes nothing to speak of.",
            f"{_POST}, section “Lookahead”, the author's own trial",
            f"test accuracy: Adam {spread(adam)}, with Lookahead {spread(slow)}.",
            "At most 0.01 apart on average.",
            abs(gap) <= 0.01,
        )
    )
    rows = [
        [name, rate, *(spread([run[what] for run in found]) for what in found[0])]
        for (name, rate), found in runs.items()
    ]
    return Report(
        claims,
        [
            Table(
                f"Digits, the last {_LAST} steps",
                ["optimizer", "rate", "mean loss", "deviation", "accuracy"],
                rows,
            )
        ],
        [
            Figure(
                "Test loss in small batches",
                partial(_plot_curves, curves),
                "SGD with momentum 0.9 and the same with Lookahead (k = 5, α = 0.5), one seed.",
            )
        ],
        [
            "Digits: 1437 images to train, 360 to test; a perceptron 64-128-10, batches of 16.",
            "SGD has momentum 0.9. Losses are taken after every step, of the fast weights.",
        ],
    )


def _formula(share: float, k: int, size: float) -> float:
    """Return V_Lookahead / V_SGD for γh, k, α."""
    one, two = (1 - (1 - share) ** n for n in (k, 2 * k))
    return size**2 * two / (size**2 * two + 2 * size * (1 - size) * one)


def _ratios(share: float, k: int, size: float, seeds: Sequence[int], chains: int) -> list[float]:
    """Return, for each seed, the ratio of the variances of many chains after 60 cycles."""
    found = []
    for make in (torch.optim.SGD, with_lookahead("sgd", slow_steps=k, slow_step_size=size)):
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        theta = nn.Parameter(torch.zeros(len(seeds), chains))
        optimizer = make([theta], lr=share)
        for _ in range(60 * k):
            noise = torch.stack([torch.randn(chains, generator=source) for source in sources])
            theta.grad = noise.add_(theta.detach())
            optimizer.step()
        found.append(theta.detach().var(1))
    ratios: list[float] = (found[1] / found[0]).tolist()
    return ratios


_Run = dict[str, float]


def _digits_runs(
    context: Context,
) -> tuple[dict[str, list[float]], dict[tuple[str, float], list[_Run]]]:
    images = digits()
    x = torch.from_numpy(images.images).flatten(1)
    y = torch.from_numpy(images.labels)
    sgd = partial(torch.optim.SGD, momentum=0.9)
    slow = partial(with_lookahead(torch.optim.SGD), momentum=0.9)
    plan: list[tuple[str, Any, float]] = [
        (name, make, rate) for rate in _RATES for name, make in (("SGD", sgd), ("Lookahead", slow))
    ]
    plan += [("Adam", torch.optim.Adam, 1e-3), ("Adam, k", with_lookahead("adam"), 1e-3)]
    curves: dict[str, list[float]] = {}
    runs: dict[tuple[str, float], list[_Run]] = {}
    with context.progress.task("digits", len(plan)) as bar:
        for name, make, rate in plan:
            losses, right = _train(
                x, y, context.seeds, partial(make, lr=rate), context.pick(600, 100)
            )
            figures = (losses.mean(0), losses.std(0), right.mean(0))
            runs[name, rate] = [
                dict(zip(("mean", "std", "accuracy"), row, strict=True))
                for row in torch.stack(figures, 1).tolist()
            ]
            if rate in _RATES:
                curves[f"{name}, rate {rate:g}"] = losses[:, 0].tolist()
            bar.advance()
    return curves, runs


def _train(
    x: Tensor,
    y: Tensor,
    seeds: Sequence[int],
    make: Callable[[Any], torch.optim.Optimizer],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Train one network for each seed, all at once.

    Returns:
        The test losses of the last steps, and the accuracies, ``[step, seed]`` each.
    """
    parameters: list[nn.Parameter] = []
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    for rows, columns in ((64, 128), (128, 10)):
        for shape in ((rows, columns), (1, columns)):
            drawn = torch.stack([torch.rand(shape, generator=source) for source in sources])
            parameters.append(nn.Parameter((2 * drawn - 1) / rows**0.5))  # as nn.Linear
    optimizer = make(parameters)
    order = torch.stack([torch.randperm(len(x), generator=source) for source in sources])
    test, train = order[:, :360], order[:, 360:]

    def scores(chosen: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.baddbmm(parameters[1], x[chosen], parameters[0]).relu()
        found = torch.baddbmm(parameters[3], hidden, parameters[2])
        losses = F.cross_entropy(found.transpose(1, 2), y[chosen], reduction="none")
        return losses.mean(1), (found.argmax(2) == y[chosen]).double().mean(1)

    kept = []
    for step in range(steps):
        picks = [torch.randint(train.shape[1], (16,), generator=source) for source in sources]
        optimizer.zero_grad()
        scores(train.gather(1, torch.stack(picks)))[0].sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step >= steps - _LAST:
            with torch.no_grad():
                kept.append(torch.stack(scores(test)))
    losses, right = torch.stack(kept).unbind(1)
    return losses, right


def _plot_curves(curves: dict[str, list[float]], canvas: Canvas) -> None:
    panels = canvas.subplots(1, len(_RATES), sharey=True)
    for axes, rate in zip(panels, _RATES, strict=True):
        for name in ("SGD", "Lookahead"):
            axes.plot(curves[f"{name}, rate {rate:g}"], label=name, linewidth=1)
        axes.set(title=f"rate {rate:g}", xlabel=f"of the last {_LAST} steps", yscale="log")
    panels[0].set_ylabel("test loss, nats")
    panels[0].legend()
