"""What the post says of noise, signs and temperature, and its pictures, on digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator
from kexue.core.plots import images
from kexue.core.text import spread
from kexue_nice.experiments import SETTING, Fitted, fit_digits, fit_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["sampling"]

_POST = "https://kexue.fm/archives/5776"
_NOISES: Mapping[str, Sequence[float]] = {
    "[-0.01, 0]": (-0.01, 0.0),
    "[-0.005, 0.005]": (-0.005, 0.005),
    "[-1/16, 0]": (-1 / 16, 0.0),
    "almost none": (-1e-5, 1e-5),
}
_TEMPERATURES = (0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
_DRAWN = 1000


def sampling(context: Context) -> Report:
    """Fit with several noises and signs; draw at several temperatures."""
    epochs = context.pick(15, 4)
    noisy = {
        name: [fit_digits(context, s, epochs=epochs, noise=noise) for s in context.seeds]
        for name, noise in _NOISES.items()
    }
    signed = {
        sign: [
            fit_digits(context, s, epochs=epochs, relu_output=True, sign=sign, from_data=False)
            for s in context.seeds
        ]
        for sign in (-1, 1)
    }
    levelled = [
        fit_once(context, seed, "NICE", epochs=context.pick(30, 6)) for seed in context.seeds
    ]
    measured = [_distances(context, run) for run in levelled]
    return Report(
        [
            _noise_claim(noisy),
            _overfitting_claim(noisy),
            _sign_claim(context, signed),
            *_temperature_claims(measured),
        ],
        [_table(noisy)],
        [
            *_pictures(context, noisy, levelled[0]),
            Figure("Samples and test images", partial(_plot_distances, measured),
                   "Least is best; one line per seed."),
        ],
        [SETTING, f"{epochs} epochs for each noise and sign; {_DRAWN} samples per temperature."],
    )  # fmt: skip


# -- noise ---------------------------------------------------------------------------------------


def _gap(run: Fitted) -> float:
    """Return validation less training loss of the last epoch."""
    last = run.history.epochs[-1]
    return last["valid_loss"] - last["loss"]


def _noise_claim(noisy: Mapping[str, Sequence[Fitted]]) -> Claim:
    means = {
        name: fmean(run.nats for run in noisy[name]) for name in ("[-0.01, 0]", "[-0.005, 0.005]")
    }
    apart = max(means.values()) - min(means.values())
    return Claim(
        "Where the noise lies makes hardly a difference to the loss.",
        f"{_POST}, section “模型细节”",
        f"nats on test images: {', '.join(f'{n} {m:.1f}' for n, m in means.items())}",
        "Within 3 nats of each other on average.",
        apart <= 3,
    )


def _overfitting_claim(noisy: Mapping[str, Sequence[Fitted]]) -> Claim:
    gaps = {name: [_gap(run) for run in noisy[name]] for name in ("[-1/16, 0]", "almost none")}
    return Claim(
        "Noise prevents overfitting.",
        f"{_POST}, section “模型细节”",
        "validation less training images in the last epoch, nats: "
        + "; ".join(f"noise {n} {spread(g, 1)}" for n, g in gaps.items()),
        "A smaller gap with noise of the width of a level, for every seed.",
        all(a < b for a, b in zip(*gaps.values(), strict=True)),
    )


def _table(noisy: Mapping[str, Sequence[Fitted]]) -> Table:
    rows = [
        [name, spread([r.nats for r in runs], 1), spread(map(_gap, runs), 1)]
        for name, runs in noisy.items()
    ]
    return Table("Noise", ["range", "test nats", "validation less training"], rows)


# -- signs ---------------------------------------------------------------------------------------


@torch.no_grad()
def _below_zero(context: Context, run: Fitted) -> float:
    """Return the mean of how far pixels of samples are below 0, before they are clipped."""
    z = torch.randn(_DRAWN, 64, generator=make_generator(0)).to(context.device)
    return float(run.model.decode(z).clamp_max(0).abs().mean())


def _sign_claim(context: Context, signed: Mapping[int, Sequence[Fitted]]) -> Claim:
    found = {sign: [_below_zero(context, run) for run in runs] for sign, runs in signed.items()}
    return Claim(
        "With m ≥ 0, an encoder that subtracts makes samples tend to be positive.",
        f"{_POST}, section “参考代码”",
        f"mean of how far pixels are below 0: {spread(found[-1])} if the decoder adds, "
        f"{spread(found[1])} if it subtracts",
        "Less if it adds, for every seed.",
        all(a < b for a, b in zip(found[-1], found[1], strict=True)),
    )


# -- temperature ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Distances:
    """How far samples are from test images, by temperature.

    Args:
        energy: The energy distance between the two distributions.
        nearest: The mean distance from a sample to the nearest image.
    """

    energy: Mapping[float, float]
    nearest: Mapping[float, float]


def _distances(context: Context, run: Fitted) -> _Distances:
    test = run.test.flatten(1)
    energy, nearest = {}, {}
    for temperature in _TEMPERATURES:
        generator = make_generator(0, context.device)
        drawn = run.model.generate(_DRAWN, temperature=temperature, generator=generator).flatten(1)
        between = torch.cdist(drawn, test)
        energy[temperature] = float(2 * between.mean() - _within(drawn) - _within(test))
        nearest[temperature] = float(between.min(1).values.mean())
    return _Distances(energy, nearest)


def _within(rows: Tensor) -> Tensor:
    """Return the mean distance of two different rows."""
    return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))


def _temperature_claims(measured: Sequence[_Distances]) -> list[Claim]:
    best = [min(found.energy, key=found.energy.__getitem__) for found in measured]
    gains = [1 - found.nearest[0.75] / found.nearest[1.0] for found in measured]
    return [
        Claim(
            "Samples of deviation 0.75 look more like images than those of deviation 1.",
            f"{_POST}, section “退火参数”",
            f"mean distance to the nearest test image: smaller by {spread(gains)} at 0.75",
            "Smaller with every seed.",
            min(gains) > 0,
        ),
        Claim(
            "The best deviation to sample with is rather below 1 than 1.",
            f"{_POST}, section “退火参数”",
            f"least energy distance from the test images at {', '.join(map(str, best))}",
            "Below 1 with every seed.",
            max(best) < 1,
        ),
    ]


def _plot_distances(measured: Sequence[_Distances], canvas: Canvas) -> None:
    left, right = canvas.subplots(1, 2)
    for found in measured:
        left.plot([*found.energy], [*found.energy.values()], "o-")
        right.plot([*found.nearest], [*found.nearest.values()], "o-")
    left.set(xlabel="temperature", ylabel="energy distance")
    right.set(xlabel="temperature", ylabel="distance to the nearest image")


# -- pictures ------------------------------------------------------------------------------------


def _pictures(context: Context, noisy: Mapping[str, Sequence[Fitted]], run: Fitted) -> list[Figure]:
    def drawn(model: Any, temperature: float = 0.75) -> Tensor:
        generator = make_generator(0, context.device)
        rows: Tensor = model.generate(32, temperature=temperature, generator=generator)
        return rows

    def picture(rows: Tensor, columns: int = 8) -> Callable[[Canvas], None]:
        return partial(images, pixels=rows.cpu(), columns=columns)

    plain, post, bare = run.model, noisy["[-0.01, 0]"][0].model, noisy["almost none"][0].model
    cooled = torch.cat([drawn(plain, t)[:8] for t in (0.5, 0.75, 1.0, 1.2)])
    return [
        Figure("Test images", picture(run.test[:32])),
        Figure("Samples, noise of the width of a level", picture(drawn(plain))),
        Figure("Samples, the post's noise [-0.01, 0]", picture(drawn(post))),
        Figure("Samples, almost no noise", picture(drawn(bare)), "All at temperature 0.75."),
        Figure(
            "Temperatures 0.5, 0.75, 1 and 1.2", picture(cooled, 8), "One row each, the same z."
        ),
        Figure("From one test image to another, along a line in z", picture(_path(run), 9)),
        Figure(
            "One latent feature at a time, from -3 to 3",
            picture(_traversal(run), 9),
            "The features of greatest σ = 1/s, one row each, others from a test image.",
        ),
    ]


@torch.no_grad()
def _path(run: Fitted) -> Tensor:
    rows = run.model.interpolate(run.test[:5], run.test[5:10], 9)
    return rows.transpose(0, 1).flatten(0, 1).clamp(0, 1)


@torch.no_grad()
def _traversal(run: Fitted) -> Tensor:
    z = run.model.encode(run.test[:1])
    values = torch.linspace(-3, 3, 9, device=z.device)
    rows = []
    for feature in run.model.scale.log_scale.argsort()[:5]:
        changed = z.repeat(9, 1)
        changed[:, feature] = values
        rows.append(run.model.decode(changed))
    return torch.cat(rows).clamp(0, 1)
