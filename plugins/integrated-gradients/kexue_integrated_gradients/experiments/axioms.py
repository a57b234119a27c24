"""The identity behind integrated gradients: how exact it is, and what it is not fooled by."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_integrated_gradients import integrated_gradients
from kexue_integrated_gradients.experiments.networks import (
    SETTING,
    Digits,
    digit_network,
    gradient,
)
from kexue_integrated_gradients.quadrature import RULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["axioms"]

_POST = "https://kexue.fm/archives/7533"
_PAPER = "https://arxiv.org/abs/1703.01365"
_SCRIPT = "post's script"
_NAMES = {"left": "left (the post's sum)", "right": "right (the paper's sum)"}

Errors = dict[str, dict[int, list[float]]]


def axioms(context: Context) -> Report:
    """Measure completeness by rule and steps, saturation, and invariance to the wiring."""
    steps = context.pick((5, 10, 20, 50, 100, 200), (5, 10, 20, 50))
    trained = [digit_network(context, seed) for seed in context.seeds]
    errors: Errors = {rule: {n: [] for n in steps} for rule in (*RULES, _SCRIPT)}
    with context.progress.task("quadrature", len(trained) * len(steps)) as bar:
        for data in trained:
            for n in steps:
                for rule in errors:
                    errors[rule][n].append(_error(data, rule, n))
                bar.advance()
    claims = [
        _identity(trained, context.pick(300, 100)),
        _convergence(errors, steps[-1]),
        _fewer_steps(errors),
        _polynomials(),
        _saturation(trained),
        _wiring(trained),
    ]
    rows = [
        [_NAMES.get(rule, rule), *(sum(e) / len(e) for e in of.values())]
        for rule, of in errors.items()
    ]
    return Report(
        claims,
        [Table("Mean relative completeness error", ["rule", *map(str, steps)], rows)],
        [
            Figure(
                "Completeness error over the number of steps",
                partial(_plot_errors, errors),
                "Mean over three networks. ReLU networks are piecewise linear, so that no rule "
                "reaches the order that it has for smooth functions.",
            ),
            Figure(
                "Probability of the predicted class on the way from black to the image",
                partial(_plot_paths, trained[0]),
                "Eight images. The gradient at the image, the slope at the right end, is almost 0.",
            ),
        ],
        [SETTING, f"The {_SCRIPT} takes k/(n - 1), k from 0, with equal weights."],
    )


def _error(data: Digits, rule: str, steps: int) -> float:
    """Return the mean absolute completeness error over the mean absolute difference."""
    if rule == _SCRIPT:
        values = data.x * _script_average(data, steps)
        with torch.no_grad():
            ends = [data.model(p).gather(1, data.predicted[:, None]) for p in (data.x, 0 * data.x)]
        difference = (ends[0] - ends[1])[:, 0]
        return float((values.sum(1) - difference).abs().mean() / difference.abs().mean())
    found = integrated_gradients(
        data.model,
        data.x,
        target=data.predicted,
        steps=steps,
        rule=rule,  # type: ignore[arg-type]
        tolerance=9.0,
    )
    return found.relative_error


def _script_average(data: Digits, steps: int) -> Tensor:
    alphas = [k / (steps - 1) for k in range(steps)]
    slopes = [gradient(data.model, alpha * data.x, data.predicted) for alpha in alphas]
    return torch.stack(slopes).mean(0)


def _identity(trained: list[Digits], steps: int) -> Claim:
    exact, linear = [], []
    for data in trained:
        found = integrated_gradients(data.model, data.x, target=data.predicted, steps=steps)
        difference = found.outputs - found.baseline_outputs
        first_order = (gradient(data.model, data.x, data.predicted) * data.x).sum(1)
        exact.append(found.relative_error)
        linear.append(float((first_order - difference).abs().mean() / difference.abs().mean()))
    return Claim(
        "The integral decomposes F(x) - F(x̄) exactly, where gradient times difference, the first "
        "order of the Taylor series, does so only approximately.",
        f"{_POST}, section “积分恒等”, eqs. (2) and (3)",
        f"relative error of the sum: {spread(exact, 5)} with {steps} nodes, first order "
        f"{spread(linear)}.",
        "At most 0.001, and more than 0.02.",
        max(exact) <= 1e-3 and min(linear) > 0.02,
    )


def _convergence(errors: Errors, most: int) -> Claim:
    """A rule of order 1 on a kinked integrand: the error falls like 1/n."""
    first, last = errors["left"][5], errors["left"][most]
    ratios = [a / b for a, b in zip(first, last, strict=True)]
    return Claim(
        "The average of gradients over n points of the line converges to the integral.",
        f"{_POST}, section “离散近似”",
        f"relative error with 5 points {spread(first, 4)}, with {most} {spread(last, 4)}; "
        f"{min(ratios):.1f} times less or better.",
        f"At least {0.5 * most / 5:g} times less, half of what order 1 gives.",
        min(ratios) >= 0.5 * most / 5,
    )


def _fewer_steps(errors: Errors) -> Claim:
    ours, post = errors["gauss-legendre"][20], errors["left"][50]
    return Claim(
        "Gauss–Legendre quadrature needs fewer steps: 20 of its nodes are nearer than 50 points "
        "of the plain average.",
        f"{_PAPER}, section 5, advises 20 to 300 points of the plain average",
        f"relative error: {spread(ours, 4)} against {spread(post, 4)}.",
        "Less on every seed.",
        all(a < b for a, b in zip(ours, post, strict=True)),
    )


def _polynomials() -> Claim:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    worst = 0.0
    for steps in range(1, 9):
        for power in range(1, 2 * steps + 1):
            found = integrated_gradients(lambda p, n=power: p.pow(n).sum(1), x, steps=steps)
            worst = max(worst, float((found.values / x**power - 1).nan_to_num().abs().max()))
    return Claim(
        "n Gauss–Legendre nodes are exact for polynomials up to degree 2n.",
        "Gauss–Legendre quadrature",
        f"n from 1 to 8, x from -2 to 2, float64: greatest relative error {worst:.1e}.",
        "At most 1e-12.",
        worst <= 1e-12,
    )


def _saturation(trained: list[Digits]) -> Claim:
    shares, integrals, counts = [], [], []
    for data in trained:
        probabilities = nn.Sequential(data.model, nn.Softmax(1))
        with torch.no_grad():
            sure = probabilities(data.x).amax(1) > 0.99
        x, target = data.x[sure], data.predicted[sure]
        found = integrated_gradients(probabilities, x, target=target, steps=100)
        difference = found.outputs - found.baseline_outputs
        first_order = (gradient(probabilities, x, target) * x).sum(1)
        shares.append(float((first_order / difference).abs().median()))
        integrals.append(float((found.values.sum(1) / difference).median()))
        counts.append(int(sure.sum()))
    return Claim(
        "Where a model is saturated the gradient vanishes and shows nothing; the integral does not "
        "suffer from it.",
        f"{_POST}, section “朴素梯度”; {_PAPER}, section 2.1",
        f"{min(counts)} to {max(counts)} images with a probability above 0.99: gradient times "
        f"difference makes up {spread(shares, 4)} of its rise from the baseline (median), the "
        f"integral {spread(integrals, 4)}.",
        "At most 0.1, and 1 to within 0.02.",
        max(shares) <= 0.1 and all(abs(i - 1) <= 0.02 for i in integrals),
    )


def _wiring(trained: list[Digits]) -> Claim:
    worst = 0.0
    for data in trained:
        other = _rewired(data.model)
        a, b = (
            integrated_gradients(m, data.x, target=data.predicted).values
            for m in (data.model, other)
        )
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return Claim(
        "Two networks that compute the same function get the same attributions.",
        f"{_PAPER}, section 2.2 (implementation invariance)",
        f"each hidden unit split into two that share its outgoing weight, 0.3 to 0.7, in another "
        f"order, float64: greatest difference {worst:.1e} of the largest value.",
        "At most 1e-9.",
        worst <= 1e-9,
    )


def _rewired(model: nn.Sequential) -> nn.Sequential:
    """Return a network of twice the first hidden width that computes the same."""
    first, second = cast(nn.Linear, model[0]), cast(nn.Linear, model[2])
    order = torch.randperm(2 * first.out_features)
    wide = nn.Linear(first.in_features, 2 * first.out_features).double()
    after = nn.Linear(2 * first.out_features, second.out_features).double()
    with torch.no_grad():
        wide.weight.copy_(first.weight.repeat(2, 1)[order])
        wide.bias.copy_(first.bias.repeat(2)[order])
        after.weight.copy_(torch.cat([0.3 * second.weight, 0.7 * second.weight], 1)[:, order])
        after.bias.copy_(second.bias)
    return nn.Sequential(wide, model[1], after, *list(model)[3:]).eval()


def _plot_errors(errors: Errors, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for rule, of in errors.items():
        means = [sum(e) / len(e) for e in of.values()]
        style = "--" if rule == _SCRIPT else "-"
        axes.plot(list(of), means, f"o{style}", label=_NAMES.get(rule, rule), markersize=4)
    axes.set(xlabel="steps", ylabel="relative completeness error", xscale="log", yscale="log")
    steps = list(errors[_SCRIPT])
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.legend()


def _plot_paths(data: Digits, canvas: Canvas) -> None:
    axes = canvas.subplots()
    alphas = torch.linspace(0, 1, 101, dtype=torch.float64)
    for image, label in zip(data.x[:8], data.predicted[:8], strict=True):
        with torch.no_grad():
            path = data.model(alphas[:, None] * image).softmax(1)[:, label]
        axes.plot(alphas, path, label=str(int(label)))
    axes.set(xlabel="α, from the baseline to the image", ylabel="probability")
    axes.legend(title="class", fontsize=8)
