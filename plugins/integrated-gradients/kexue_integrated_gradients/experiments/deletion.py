"""Which pixels decide: deleting the most important ones, by several measures of importance."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_integrated_gradients import integrated_gradients
from kexue_integrated_gradients.experiments.networks import (
    SETTING,
    Digits,
    digit_network,
    gradient,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["deletion"]

_POST = "https://kexue.fm/archives/7533"
_COUNTS = (2, 4, 8, 16)
_PENALTY = 0.3
_IG, _ABS_IG = "integrated gradients", "|integrated gradients|"
_GRADIENT, _TIMES = "|gradient|", "gradient × difference"
_RANDOM = "random"

Probabilities = dict[str, dict[int, list[float]]]


def deletion(context: Context) -> Report:
    """Blacken the pixels that a measure calls most important, and look at the probability."""
    trained = [digit_network(context, seed) for seed in context.seeds]
    found: Probabilities = {}
    for seed, data in zip(context.seeds, trained, strict=True):
        for name, scores in _scores(data, seed).items():
            for count in _COUNTS:
                left = found.setdefault(name, {}).setdefault(count, [])
                left.append(_left(data, scores, count))
    rows = [[name, *(spread(p) for p in of.values())] for name, of in found.items()]
    claims = [_beats_gradient(found), _beats_first_order(found), _sign(found)]
    claims.append(_steered(context, trained))
    columns = ["by", *(f"{count} pixels" for count in _COUNTS)]
    return Report(
        claims,
        [Table("Probability of the predicted class after deletion", columns, rows)],
        [
            Figure(
                "What is left after deletion",
                partial(_plot_curves, found),
                "Mean over three networks; the lower, the better the pixels were chosen.",
            ),
            Figure(
                "Gradient and integrated gradient",
                partial(_plot_maps, trained[0]),
                "From top to bottom: image, absolute gradient, integrated gradient (red speaks for "
                "the predicted class, blue against it).",
            ),
        ],
        [SETTING],
    )


def _scores(data: Digits, seed: int) -> dict[str, Tensor]:
    slope = gradient(data.model, data.x, data.predicted)
    values = integrated_gradients(data.model, data.x, target=data.predicted, steps=50).values
    generator = torch.Generator().manual_seed(seed)
    return {
        _IG: values,
        _ABS_IG: values.abs(),
        _TIMES: slope * data.x,
        _GRADIENT: slope.abs(),
        _RANDOM: torch.rand(values.shape, generator=generator),
    }


def _left(data: Digits, scores: Tensor, count: int) -> float:
    """Return the mean probability of the predicted class without the best pixels."""
    deleted = data.x.scatter(1, scores.topk(count, 1).indices, 0.0)
    with torch.no_grad():
        probabilities = data.model(deleted).softmax(1)
    return float(probabilities.gather(1, data.predicted[:, None]).mean())


def _pairs(found: Probabilities, one: str, other: str, count: int) -> list[tuple[float, float]]:
    return list(zip(found[one][count], found[other][count], strict=True))


def _beats_gradient(found: Probabilities) -> Claim:
    return Claim(
        "Integrated gradients show what matters better than the gradient does.",
        f"{_POST}, sections “积分恒等” and “原始效果”",
        f"probability without the 8 best pixels: {spread(found[_IG][8])}, by the absolute gradient "
        f"{spread(found[_GRADIENT][8])}, at random {spread(found[_RANDOM][8])}.",
        "Less than half of the gradient's for 4 pixels and more, on every seed.",
        all(a < b / 2 for n in _COUNTS[1:] for a, b in _pairs(found, _IG, _GRADIENT, n)),
    )


def _beats_first_order(found: Probabilities) -> Claim:
    return Claim(
        "They also do better than gradient times difference, because the identity is exact.",
        f"{_POST}, section “积分恒等”",
        "; ".join(
            f"{n} pixels: {spread(found[_IG][n], 4)} against {spread(found[_TIMES][n], 4)}"
            for n in _COUNTS
        ),
        "Lower on average for every number of pixels.",
        all(sum(a - b for a, b in _pairs(found, _IG, _TIMES, n)) < 0 for n in _COUNTS),
    )


def _sign(found: Probabilities) -> Claim:
    return Claim(
        "Absolute values rank the inputs by importance.",
        f"{_POST}, eq. (6), where the papers keep the sign",
        f"probability without the 8 best pixels: by absolute value {spread(found[_ABS_IG][8])}, by "
        f"signed value {spread(found[_IG][8])}.",
        "At most 0.02 above the signed value's for every number of pixels.",
        all(a <= b + 0.02 for n in _COUNTS for a, b in _pairs(found, _ABS_IG, _IG, n)),
    )


def _steered(context: Context, trained: list[Digits]) -> Claim:
    """A penalty on the gradient is what adversarial training comes to (post 7234)."""
    sizes, rises, drops, rates = [], [], [], []
    for seed, plain in zip(context.seeds, trained, strict=True):
        other = digit_network(context, seed, penalty=_PENALTY)
        (norm, rise), (before, rise_before) = (_size(data) for data in (other, plain))
        sizes.append(norm / before)
        rises.append(rise / rise_before)
        drops.append(plain.accuracy - other.accuracy)
        rates.append(other.accuracy)
    return Claim(
        "Training can make the gradient small without harm to the predictions, so being sensitive "
        "is not being important.",
        f"{_POST}, section “朴素梯度”",
        f"trained with {_PENALTY:g} ‖∇ₓ loss‖² added: the norm of ∇F is {spread(sizes)} of what it "
        f"was without, F(x) - F(x̄) {spread(rises)}; accuracy {spread(rates)}, lower by "
        f"{spread(drops)}.",
        "At most half the norm on every seed; accuracy at most 0.01 lower on average.",
        max(sizes) <= 0.5 and sum(drops) / len(drops) <= 0.01,
    )


def _size(data: Digits) -> tuple[float, float]:
    """Return the means of ‖∇F(x)‖ and of F(x) - F(x̄), F being the logit of the predicted class."""
    slope = gradient(data.model, data.x, data.predicted)
    with torch.no_grad():
        rise = data.model(data.x) - data.model(torch.zeros_like(data.x))
    above = rise.gather(1, data.predicted[:, None])
    return float(torch.linalg.vector_norm(slope, dim=1).mean()), float(above.mean())


def _plot_curves(found: Probabilities, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, of in found.items():
        axes.plot(list(of), [sum(p) / len(p) for p in of.values()], "o-", label=name)
    axes.set(xlabel="pixels deleted", ylabel="probability of the predicted class", ylim=(0, 1))
    axes.set_xticks(_COUNTS)
    axes.legend()


def _plot_maps(data: Digits, canvas: Canvas) -> None:
    first = [int((data.predicted == label).nonzero()[0]) for label in range(10)]
    x, target = data.x[first], data.predicted[first]
    slope = gradient(data.model, x, target).abs()
    values = integrated_gradients(data.model, x, target=target, steps=50).values
    canvas.set_size_inches(8, 2.8)
    grid = canvas.subplots(3, len(first))
    for axes in grid.flat:
        axes.axis("off")
    for column in range(len(first)):
        top = float(values[column].abs().max())
        grid[0, column].imshow(x[column].view(8, 8), cmap="gray_r")
        grid[1, column].imshow(slope[column].view(8, 8), cmap="Reds")
        grid[2, column].imshow(values[column].view(8, 8), cmap="RdBu_r", vmin=-top, vmax=top)
