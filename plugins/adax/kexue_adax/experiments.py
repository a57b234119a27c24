"""What post 7387 and the paper claim of AdaX: its two forms, and the decay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue_adax.adax import AdaX
from kexue_adax.decay import adafactor_share, adam_share, adax_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["SHARES", "forms", "one_thread", "shares"]

_POST = "https://kexue.fm/archives/7387"
_PAPER = "https://arxiv.org/abs/2004.09740"
SHARES: dict[str, Callable[[int], float]] = {
    "Adam": adam_share,
    "Adafactor": adafactor_share,
    "AdaX": adax_share,
}
_HORIZON = 1_000_000


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep threads from waiting for each other over tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- two forms -----------------------------------------------------------------------------------


def forms(context: Context) -> Report:
    """Compare the average v̂ with the growing v of the paper's code, also where v overflows."""
    with one_thread():
        near = {dtype: _side_by_side(context.seeds, dtype, 1e-4, _NEAR)[0] for dtype in _BOUNDS}
        error, lost = _side_by_side(context.seeds, torch.float32, 1e-2, _FAR)
    claims = [
        Claim(
            "The average v̂ with β̂_t = 1 − β₂ / ((1 + β₂)^t − 1) gives the steps of the growing v.",
            f"{_POST}, section “等价形式变换”",
            f"{_NEAR} steps, greatest difference of θ from the paper's arithmetic in float64: "
            + ", ".join(f"{found:.2g} in {_name(dtype)}" for dtype, found in near.items()),
            ", ".join(f"at most {bound:g} in {_name(dtype)}" for dtype, bound in _BOUNDS.items()),
            all(near[dtype] <= bound for dtype, bound in _BOUNDS.items()),
        ),
        Claim(
            "v itself explodes, while what corrects the rate, v̂, does not.",
            f"{_POST}, section “等价形式变换”",
            f"β₂ = 0.01, float32: v is infinite from step {lost}; after {_FAR} steps of AdaX θ "
            f"differs from the paper's arithmetic in float64 by {error:.2g}.",
            f"Infinite before step {_FAR}; a difference of at most 1e-4.",
            0 < lost < _FAR and error <= 1e-4,
        ),
    ]
    note = (
        "Three draws of 50 × 4 gradients per step, of sizes from 1e-3 to 10, between −1 and 1 in "
        "mean; lr 1e-3, eps_mode 'raw' with ε = 1e-12, where the paper's code has it."
    )
    limits = [
        [_name(dtype), beta2, math.ceil(math.log(torch.finfo(dtype).max) / math.log1p(beta2))]
        for dtype in (torch.float16, torch.float32)
        for beta2 in (1e-4, 1e-2)
    ]
    table = Table("Where v overflows if g² = 1", ["type", "β₂", "step"], limits)
    return Report(claims, [table], notes=[note])


_NEAR, _FAR = 2000, 10_000
_BOUNDS = {torch.float32: 5e-6, torch.float64: 1e-11}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gradients(seeds: Sequence[int], steps: int) -> Iterator[Tensor]:
    """Yield gradients ``[seed, 50, 4]`` that swing, with noise; all numbers are apart in a step."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (steps, 50, 4)
    noise = [torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]
    swing = torch.arange(steps, dtype=torch.float64).div(100).cos()[:, None, None, None]
    sizes = torch.logspace(-3, 1, 4, dtype=torch.float64)
    yield from torch.stack(noise, 1).add_(swing).mul_(sizes)


class _Growing:
    """The paper's arithmetic.

    Args:
        theta: Where it starts.
        beta2: β₂.
    """

    def __init__(self, theta: Tensor, beta2: float) -> None:
        self.theta, self.m, self.v = theta, torch.zeros_like(theta), torch.zeros_like(theta)
        self.beta2, self.t = beta2, 0

    def step(self, g: Tensor) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = (1 + self.beta2) * self.v + self.beta2 * g * g
        rate = 1e-3 * math.sqrt((1 + self.beta2) ** self.t - 1)
        self.theta = self.theta - rate * self.m / (self.v.sqrt() + 1e-12)


def _side_by_side(
    seeds: Sequence[int], dtype: torch.dtype, beta2: float, steps: int
) -> tuple[float, int]:
    """Return our distance in ``dtype`` from the paper's arithmetic in float64 after some steps.

    And the step from which its v is infinite in ``dtype``; 0 for none.
    """
    start = torch.ones(len(seeds), 50, 4, dtype=torch.float64)
    ours = nn.Parameter(start.to(dtype, copy=True))
    wanted, growing = _Growing(start, beta2), _Growing(start.to(dtype), beta2)
    optimizer = AdaX([ours], lr=1e-3, betas=(0.9, beta2), eps=1e-12, eps_mode="raw")
    lost = 0
    for g in _gradients(seeds, steps):
        ours.grad = g.to(dtype)
        optimizer.step()
        wanted.step(g)
        if not lost:
            growing.step(ours.grad)
            lost = 0 if float(growing.v.max()) < math.inf else growing.t
    return float((ours.detach() - wanted.theta).abs().max()), lost


# -- the decays ------------------------------------------------------------------------------------


def shares(context: Context) -> Report:
    """Compare the decays β̂_t of Adam, Adafactor and AdaX, and follow one to a wrong end."""
    steps = range(1, _HORIZON + 1, context.pick(10, 100))
    values = {name: [share(t) for t in steps] for name, share in SHARES.items()}
    falls = {n: all(a >= b for a, b in pairwise(v)) for n, v in values.items()}
    first = {name: 1 - line[0] for name, line in values.items()}
    last = {name: line[-1] for name, line in values.items()}
    with one_thread():
        adam, ours = (_reddi(make) for make in (torch.optim.Adam, AdaX))
    claims = [
        Claim(
            "The decay of AdaX, like Adafactor's, goes from 0 to 1.",
            f"{_POST}, section “衰减策略比较”",
            "; ".join(
                f"{n}: β̂₁ = {first[n]:.3g}, 1 − β̂ at step 10⁶ {last[n]:.2g}"
                for n in ("AdaX", "Adafactor")
            ),
            "0 at first, never falling, and within 1e-4 of 1.",
            all(first[n] == 0 and falls[n] and last[n] <= 1e-4 for n in ("AdaX", "Adafactor")),
        ),
        Claim(
            "The decay of Adam goes from 0 to β₂ < 1: the present gradient keeps a weight.",
            f"{_POST}, section “衰减策略比较”",
            f"β̂₁ = {first['Adam']:.3g}, 1 − β̂ at step 10⁶ {last['Adam']:.6g} with β₂ = 0.999",
            "0 at first, and 0.001 within 1e-9.",
            abs(first["Adam"]) <= 1e-12 and abs(last["Adam"] - 1e-3) <= 1e-9,
        ),
        Claim(
            "Where short memory leads Adam to the worst point, AdaX goes to the best.",
            f"{_PAPER}, after Reddi et al. 2018",
            "gradients 4, −1, −1, … on [−1, 1], whose mean is 2/3: from "
            f"{_listed(_STARTS)}, Adam with β₂ = 1/17 ends at {_listed(adam)}, AdaX at "
            f"{_listed(ours)}.",
            "Adam above 0.9, AdaX below −0.9.",
            min(adam) > 0.9 and max(ours) < -0.9,
        ),
    ]
    some = [1, 10, 100, 1000, 10_000, 100_000, _HORIZON]
    rows = [[t, *(share(t) for share in SHARES.values())] for t in some]
    return Report(
        claims,
        [Table("Weight 1 − β̂_t of the present squared gradient", ["step", *SHARES], rows)],
        [
            Figure(
                "Weight of the present squared gradient",
                _plot_shares,
                "Adam stops at 1 − β₂. AdaX follows 1/t, and falls faster beyond 1/β₂ steps.",
            )
        ],
        ["Adam with β₂ = 0.999, Adafactor with c = 0.8, AdaX with β₂ = 1e-4."],
    )


_STARTS = (-0.5, 0.0, 0.9)


def _reddi(make: Callable[..., torch.optim.Optimizer], steps: int = 3000) -> list[float]:
    """Return the ends from ``_STARTS``, with β₁ = 0 and rates 0.1/√t, kept in [−1, 1]."""
    x = nn.Parameter(torch.tensor(_STARTS, dtype=torch.float64))
    optimizer = make([x], lr=0.1, betas=(0.0, 1e-4 if make is AdaX else 1 / 17))
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / math.sqrt(t + 1)
        x.grad = torch.full_like(x, 4.0 if t % 3 == 0 else -1.0)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
    return x.detach().tolist()


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in values)


def _plot_shares(canvas: Canvas) -> None:
    axes = canvas.subplots()
    steps = sorted({round(10 ** (i / 20)) for i in range(121)})
    for name, share in SHARES.items():
        axes.plot(steps, [share(t) for t in steps], label=name)
    axes.set(xlabel="step t", ylabel="1 − β̂_t", xscale="log", yscale="log", ylim=(1e-9, 2))
    axes.legend()
