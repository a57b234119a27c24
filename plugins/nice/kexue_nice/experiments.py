"""How well NICE fits digits, and what of it that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue.core.training import History
from kexue_nice.dequantisation import add_noise, bits_per_dim, cell
from kexue_nice.nice import NICE

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Fitted", "fit_digits", "fit_once", "likelihood", "split_digits"]

_POST = "https://kexue.fm/archives/5776"
_PAPER = "https://arxiv.org/abs/1410.8516"
SETTING = (
    "Digits: 1350 images of 8 × 8 pixels and 17 levels to fit, 150 to choose the epoch, 297 to "
    "test, divided anew for each seed; 4 couplings with m 32-128-128-32, Adam."
)


@dataclass(frozen=True)
class Fitted:
    """A fitted model.

    Args:
        model: With the weights of its best epoch.
        history: Of the fit.
        test: What it was not fitted to.
        nats: Mean negative log-density of the test images, made noisy as in training.
    """

    model: NICE
    history: History
    test: Tensor
    nats: float


def split_digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images to fit, to choose by, and to test."""
    images = torch.from_numpy(digits().images)
    order = torch.randperm(len(images), generator=make_generator(seed))
    train, valid, test = torch.split(images[order], [1350, 150, 297])
    return train, valid, test


def fit_digits(
    context: Context, seed: int, *, epochs: int, from_data: bool = True, sign: int | None = None,
    **given: Any,
) -> Fitted:  # fmt: skip
    """Fit a flow to digits.

    Args:
        context: Where to work.
        seed: Of the division, the weights and the batches.
        epochs: Passes over the data.
        from_data: Whether centre and scales start from the data, as they should.
        sign: Sign of all couplings instead of their own.
        given: Arguments of the flow.
    """
    parts = [part.to(context.device) for part in split_digits(seed)]
    train, valid, test = parts
    torch.manual_seed(seed)
    model = NICE(64, [8, 8], **{"hidden": [128, 128], "levels": 17, **given}).to(context.device)
    if sign is not None:
        coupling: Any
        for coupling in model.couplings:
            coupling.sign = sign
    model.initialised.fill_(not from_data)
    history = model.fit(
        train,
        valid,
        epochs=epochs,
        batch_size=128,
        seed=seed,
        make_optimizer=partial(torch.optim.Adam, lr=5e-3, fused=True),
    )
    return Fitted(model, history, test, model.evaluate(test)["loss"])


def fit_once(context: Context, seed: int, name: str, **given: Any) -> Fitted:
    """Fit a flow that several experiments look at; see :func:`fit_digits`."""
    return context.once(("nice", name, seed), partial(fit_digits, context, seed, **given))


def likelihood(context: Context) -> Report:
    """Compare flows with Gaussians, without mixing, and from another start."""
    epochs = context.pick(30, 4)
    changes: dict[str, dict[str, Any]] = {
        "NICE": {},
        "without mixing": {"mixing": "none"},
        "scales from 0, no centre": {"from_data": False},
    }
    runs = {
        name: [fit_once(context, seed, name, epochs=epochs, **given) for seed in context.seeds]
        for name, given in changes.items()
    }
    nats = {name: [run.nats for run in found] for name, found in runs.items()}
    for name, full in (("full Gaussian", True), ("diagonal Gaussian", False)):
        nats[name] = [_gaussian(seed, full=full) for seed in context.seeds]
    claims = [
        Claim(
            "NICE fits better than a Gaussian, and that better than independent pixels.",
            f"{_POST}, section “艰难的分布”; {_PAPER}, section 5.1",
            "; ".join(f"{n} {spread(nats[n], 1)}" for n in _ORDER) + " nats on test images",
            "NICE lowest and the diagonal Gaussian highest, with every seed.",
            all(a < b < c for a, b, c in zip(*(nats[n] for n in _ORDER), strict=True)),
        ),
        Claim(
            "Information must be mixed: without swapping the parts the fit is worse.",
            f"{_POST}, section “交错中前进”",
            f"{spread(_differences(nats, 'without mixing'), 1)} nats more without",
            "More than 3 nats more with every seed.",
            min(_differences(nats, "without mixing")) > 3,
        ),
        Claim(
            "Centre and scales from the data are worth more than many epochs.",
            "our deviation from post and paper",
            f"after {epochs} epochs, "
            f"{spread(_differences(nats, 'scales from 0, no centre'), 1)} nats more without",
            "More than 3 nats more with every seed.",
            min(_differences(nats, "scales from 0, no centre")) > 3,
        ),
        _overfitting(runs["NICE"]),
        _importance(runs["NICE"]),
    ]
    rows = [[n, spread(v, 2), spread(map(_bits, v))] for n, v in sorted(nats.items(), key=_mean)]
    return Report(
        claims,
        [Table("Test images", ["model", "nats", "bits per dimension"], rows)],
        [
            Figure("Bits per dimension while fitting, validation", partial(_plot_curves, runs)),
            Figure("Deviation of each latent feature beside that of its pixel",
                   partial(_plot_importance, runs["NICE"][0])),
        ],
        [SETTING, "The Gaussians are fitted in closed form to the images with their noise."],
    )  # fmt: skip


_ORDER = ("NICE", "full Gaussian", "diagonal Gaussian")


def _mean(row: tuple[str, Sequence[float]]) -> float:
    return fmean(row[1])


def _bits(nats: float) -> float:
    return float(bits_per_dim(torch.tensor(nats), 64, 17))


def _differences(nats: Mapping[str, Sequence[float]], name: str) -> list[float]:
    return [a - b for a, b in zip(nats[name], nats["NICE"], strict=True)]


def _gaussian(seed: int, *, full: bool) -> float:
    """Return the nats of test images under a Gaussian fitted to the training images."""
    generator = make_generator(seed)
    train, _, test = (
        add_noise(part.flatten(1).double(), cell(17), generator) for part in split_digits(seed)
    )
    covariance = train.T.cov()
    if not full:
        covariance = covariance.diagonal().diag()
    fitted = torch.distributions.MultivariateNormal(train.mean(0), covariance)
    return -float(fitted.log_prob(test).mean())  # type: ignore[no-untyped-call]


def _overfitting(runs: Sequence[Fitted]) -> Claim:
    rises, gaps = [], []
    for run in runs:
        last = run.history.epochs[-1]
        rises.append(last["valid_loss"] - run.history.best["valid_loss"])
        gaps.append(last["valid_loss"] - last["loss"])
    return Claim(
        "It overfits small data: the best epoch must be chosen on other images.",
        "the default of `kexue fit`, which holds out every tenth row",
        f"validation {spread(rises, 1)} nats above its best epoch at the last one, and "
        f"{spread(gaps, 1)} above training",
        "More than 1 nat above with every seed.",
        min(rises) > 1,
    )


def _deviations(run: Fitted) -> tuple[Tensor, Tensor]:
    """Return σ = 1 / s of each feature, and the deviation of its pixel."""
    train, _, _ = split_digits(0)
    pixels = train.flatten(1).std(0)[run.model.orders[0].cpu()]
    return torch.exp(-run.model.scale.log_scale.detach()).cpu(), pixels


def _importance(runs: Sequence[Fitted]) -> Claim:
    correlations, smallest = [], []
    for run in runs:
        sigma, pixels = _deviations(run)
        ranks = torch.stack([sigma.argsort().argsort(), pixels.argsort().argsort()]).double()
        correlations.append(float(ranks.corrcoef()[0, 1]))
        smallest.append(float(sigma.min() / sigma.max()))
    return Claim(
        "The scale finds the features that hardly vary, and shrinks them towards a point.",
        f"{_POST}, section “尺度变换层”",
        f"rank correlation of σ = 1/s with the deviation of the pixel {spread(correlations)}; "
        f"least over greatest σ {spread(smallest)}",
        "Correlation above 0.7, ratio below 0.1, with every seed.",
        min(correlations) > 0.7 and max(smallest) < 0.1,
    )


def _plot_curves(runs: Mapping[str, Sequence[Fitted]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for number, (name, found) in enumerate(runs.items()):
        for run in found:
            curve = [row["valid_bits_per_dim"] for row in run.history.epochs]
            label = name if run is found[0] else None
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{number}", label=label)
    axes.set(xlabel="epoch", ylabel="bits per dimension", ylim=(None, math.log2(17)))
    axes.legend()


def _plot_importance(run: Fitted, canvas: Canvas) -> None:
    sigma, pixels = _deviations(run)
    left, right = canvas.subplots(1, 2)
    left.loglog(pixels.clamp_min(1e-3), sigma, ".")
    left.set(xlabel="deviation of the pixel (at least 0.001)", ylabel="σ = 1/s")
    picture = torch.empty(64)
    picture[run.model.orders[0].cpu()] = sigma
    shown = right.imshow(picture.view(8, 8), cmap="viridis")
    right.set(title="σ at the place of the pixel")
    right.axis("off")
    canvas.colorbar(shown, ax=right)
