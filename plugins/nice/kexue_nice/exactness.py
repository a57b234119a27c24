"""What NICE has by construction, measured: inverse, determinant, mixing, normalisation."""

from __future__ import annotations

import math
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report
from kexue.core.device import make_generator, synchronized_clock
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_nice.nice import NICE

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["exactness"]

_POST = "https://kexue.fm/archives/5776"
_PAPER = "https://arxiv.org/abs/1410.8516"
_COUPLINGS = (4, 6, 8, 10)
_WIDE = (1000,) * 5  # the post's and the paper's m


def exactness(context: Context) -> Report:
    """Check inverse, determinant, mixing and integral."""
    errors = {dtype: _inverse_errors(context, dtype) for dtype in (torch.float32, torch.float64)}
    single, double = ([e for row in found.values() for e in row] for found in errors.values())
    planes = [_plane(context, seed) for seed in context.seeds]
    claims = [
        Claim(
            "The decoder undoes the encoder, after 4 to 10 couplings.",
            f"{_POST}, section “分块耦合层”",
            f"greatest error on digits: {max(single):.2g} in float32, {max(double):.2g} in float64",
            "Below 1e-5 and 1e-13.",
            max(single) < 1e-5 and max(double) < 1e-13,
        ),
        _determinant(context),
        _cost(context),
        _mixing(context),
        Claim(
            "The density integrates to 1.",
            f"{_POST}, section “直面概率积分”",
            f"sum over a grid, after fitting two half-moons: "
            f"{spread([mass for _, mass in planes], 5)}",
            "Within 0.002 of 1.",
            all(abs(mass - 1) <= 2e-3 for _, mass in planes),
        ),
    ]
    return Report(
        claims,
        figures=[
            Figure("Greatest error of decode(encode(x))", partial(_plot_errors, errors)),
            Figure("Half-moons, their density, and what they are encoded to",
                   partial(_plot_plane, planes[0][0])),
        ],
    )  # fmt: skip


def _on_digits(seed: int, context: Context, **given: object) -> tuple[NICE, Tensor]:
    """Return a flow that was prepared for 500 digits, and these with noise."""
    torch.manual_seed(seed)
    images = torch.from_numpy(digits().images[:500]).flatten(1).to(context.device)
    model = NICE(64, levels=17, **given).to(context.device)  # type: ignore[arg-type]
    model.prepare(images)
    return model, model.dequantize(images, generator=make_generator(seed, context.device))


def _inverse_errors(context: Context, dtype: torch.dtype) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for couplings in _COUPLINGS:
        for seed in context.seeds:
            model, x = _on_digits(seed, context, num_couplings=couplings)
            model, x = model.to(dtype), x.to(dtype)
            with torch.no_grad():
                error = float((model.decode(model.encode(x)) - x).abs().max())
            found.setdefault(couplings, []).append(error)
    return found


def _determinant(context: Context) -> Claim:
    apart, volume = [], []
    for seed in context.seeds:
        model, x = _on_digits(seed, context, hidden=[64])
        model, row = model.double(), x[0].double()
        apart.append(abs(_log_det(model, row) - model.scale.log_det.item()))
        nn.init.zeros_(model.scale.log_scale)
        volume.append(abs(_log_det(model, row)))
    return Claim(
        "Couplings preserve volume; the log-determinant of the flow is that of its scale.",
        f"{_POST}, eqs. 8, 11, 14; {_PAPER}, sections 3.2 and 3.3",
        f"log |det| of autograd's 64 × 64 Jacobian: {max(volume):.2g} without the scale; "
        f"{max(apart):.2g} from Σ log s with it.",
        "Both at most 1e-9.",
        max(volume) <= 1e-9 and max(apart) <= 1e-9,
    )


def _log_det(model: NICE, row: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x[None])[0], row)  # type: ignore[no-untyped-call]
    return float(torch.linalg.slogdet(jacobian).logabsdet)


def _cost(context: Context) -> Claim:
    """Time both directions with the post's perceptrons in turn."""
    model = NICE(64, hidden=context.pick(_WIDE, (256, 256))).to(context.device)
    x = torch.randn(128, 64, device=context.device)
    ratios = []
    with torch.no_grad():
        z = model.encode(x)
        model.decode(z)
        for _ in range(context.pick(9, 5)):
            start = synchronized_clock(context.device)
            model.encode(x)
            middle = synchronized_clock(context.device)
            model.decode(z)
            ratios.append((synchronized_clock(context.device) - middle) / (middle - start))
    return Claim(
        "The inverse costs no more than the forward pass.",
        f"{_POST}, section “分块耦合层”",
        f"time of decode over that of encode, median of {len(ratios)}: {median(ratios):.2f}",
        "At most 1.25.",
        median(ratios) <= 1.25,
    )


def _mixing(context: Context) -> Claim:
    kept: dict[str, list[float]] = {"none": [], "swap": [], "shuffle": []}
    for mixing, found in kept.items():
        for seed in context.seeds:
            model, x = _on_digits(seed, context, mixing=mixing)
            with torch.no_grad():
                h = model.scale.inverse(model.encode(x))
            unchanged = torch.isclose(h, (x - model.center)[:, model.orders[0]], atol=1e-6)
            found.append(float(unchanged.all(0).double().mean()))
    return Claim(
        "Without mixing, half of the features pass through all couplings unchanged; with it none.",
        f"{_POST}, eqs. 12 and 13",
        "share of features that no coupling changed: "
        + ", ".join(f"{name} {max(found):.2f}" for name, found in kept.items()),
        "Exactly 0.5 without, 0 with.",
        set(kept["none"]) == {0.5} and not any(kept["swap"]) and not any(kept["shuffle"]),
    )


# -- the plane -----------------------------------------------------------------------------------


def _moons(rows: int, seed: int) -> Tensor:
    generator = make_generator(seed)
    angle = math.pi * torch.rand(rows, generator=generator)
    upper = torch.arange(rows) % 2 == 0
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.08 * torch.randn(rows, 2, generator=generator)


def _plane(context: Context, seed: int) -> tuple[NICE, float]:
    """Return a flow fitted to half-moons, and the integral of its density."""
    torch.manual_seed(seed)
    model = NICE(2, num_couplings=6, hidden=[64, 64]).to(context.device)
    rows = _moons(2000, seed).to(context.device)
    model.fit(rows, epochs=context.pick(10, 3), batch_size=200, lr=5e-3, seed=seed)
    log_density, area = _grid(model, reach=5.0, steps=401)
    return model, float(log_density.double().exp().sum()) * area


@torch.no_grad()
def _grid(model: NICE, *, reach: float, steps: int) -> tuple[Tensor, float]:
    """Return log q on a square around the middle of the moons, and the area of a cell."""
    axis = torch.linspace(-reach, reach, steps, device=model.center.device)
    x, y = torch.meshgrid(axis + 0.5, axis + 0.25, indexing="xy")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    return model.log_prob(points).view(steps, steps), (2 * reach / (steps - 1)) ** 2


def _plot_errors(errors: dict[torch.dtype, dict[int, list[float]]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for dtype, found in errors.items():
        name = str(dtype).removeprefix("torch.")
        axes.plot([*found], [max(row) for row in found.values()], "o-", label=name)
    axes.set(xlabel="couplings", ylabel="greatest error, three seeds", yscale="log")
    axes.set_xticks(_COUPLINGS)
    axes.legend()


def _plot_plane(model: NICE, canvas: Canvas) -> None:
    rows = _moons(1000, 7).to(model.center)
    density, _ = _grid(model, reach=2.0, steps=201)
    with torch.no_grad():
        z = model.encode(rows).cpu()
    left, middle, right = canvas.subplots(1, 3)
    colours = [f"C{i % 2}" for i in range(len(rows))]
    left.scatter(*rows.cpu().T, s=2, c=colours)
    middle.imshow(density.exp().cpu(), origin="lower", extent=(-1.5, 2.5, -1.75, 2.25))
    right.scatter(*z.T, s=2, c=colours)
    for axes, title in ((left, "x"), (middle, "q(x)"), (right, "z")):
        axes.set(title=title, aspect="equal")
    left.set(xlim=(-1.5, 2.5), ylim=(-1.75, 2.25))
