"""Time and memory of Nyström attention against the length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator, synchronized_clock
from kexue_nystromformer.attention import nystrom_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["scaling"]

_POST = "https://kexue.fm/archives/8180"
_PAPER = "https://arxiv.org/abs/2102.03902"
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
_HEADS, _WIDTH, _LANDMARKS = 2, 64, 64
_FORMED = 4096  # the longest whose matrix of weights is formed

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Line = dict[int, float]


def scaling(context: Context) -> Report:
    """Measure seconds of a forward pass, and bytes kept for the gradient."""
    lengths = context.pick(_LENGTHS, _LENGTHS[:5])
    ways: dict[str, Attention] = {
        "Nyström": partial(nystrom_attention, num_landmarks=_LANDMARKS),
        "exact": F.scaled_dot_product_attention,
        "exact, as written": _as_written,
    }
    seconds: dict[str, Line] = {name: {} for name in ("Nyström", "exact")}
    kept: dict[str, Line] = {name: {} for name in ways}
    with context.progress.task("lengths", len(lengths)) as bar:
        for length in lengths:
            generator = make_generator(length)
            shape = (3, 1, _HEADS, length, _WIDTH)
            q, k, v = torch.randn(shape, generator=generator).to(context.device)
            timed = _seconds([partial(ways[name], q, k, v) for name in seconds], context)
            for name, value in zip(seconds, timed, strict=True):
                seconds[name][length] = value
            for name, way in ways.items():
                if way is not _as_written or length <= _FORMED:
                    kept[name][length] = _bytes_kept(way, q, k, v)
            bar.advance()
    return Report(
        _claims(seconds, kept),
        [_table(seconds, kept)],
        [
            Figure(
                "Time of a forward pass",
                partial(_plot, seconds, "milliseconds", 1e3, _crossover(seconds)),
                "The least of several runs in turn; the dotted line is the crossover.",
            ),
            Figure(
                "Memory kept for the gradient",
                partial(_plot, kept, "MiB", 2.0**-20, math.nan),
                "Exact attention as written keeps its weights; torch's kernel does not.",
            ),
        ],
        [
            (
                f"{_HEADS} heads of {_WIDTH} features, {_LANDMARKS} landmarks, float32, one "
                f"sequence, {torch.get_num_threads()} threads. `exact` is torch's "
                "scaled_dot_product_attention."
            )
        ],
    )


def _as_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(_WIDTH**-0.5 * q @ k.mT, -1) @ v


def _claims(seconds: Mapping[str, Line], kept: Mapping[str, Line]) -> list[Claim]:
    *_, first, _, _, longest = sorted(seconds["Nyström"])
    power = {name: _exponent(line) for name, line in seconds.items()}
    bytes_ = {name: _exponent(line) for name, line in kept.items()}
    crossover = _crossover(seconds)
    gain = seconds["exact"][longest] / seconds["Nyström"][longest]
    return [
        Claim(
            "The time of Nyström attention grows linearly with the length, that of softmax "
            "attention with its square.",
            f"{_POST}, section “双重Softmax”; {_PAPER}, section 3",
            f"from {first} to {longest} positions time ∝ n^{power['Nyström']:.2f}, exact "
            f"n^{power['exact']:.2f}",
            "Exponents at most 1.3, and above 1.6.",
            power["Nyström"] <= 1.3 and power["exact"] > 1.6,
        ),
        Claim(
            "Beyond a certain length it is the faster one.",
            f"{_PAPER}, section 4",
            f"faster from about {crossover:.0f} positions on; {gain:.1f} times at {longest}",
            "A crossover, and at least 3 times at the greatest length.",
            math.isfinite(crossover) and gain >= 3,
        ),
        Claim(
            "Its memory grows linearly with the length, that of softmax attention as written with "
            "its square.",
            f"{_PAPER}, section 3",
            f"bytes kept for the gradient ∝ n^{bytes_['Nyström']:.2f}, as written "
            f"n^{bytes_['exact, as written']:.2f}; torch's fused kernel n^{bytes_['exact']:.2f}",
            "Exponents at most 1.1, and above 1.7.",
            bytes_["Nyström"] <= 1.1 and bytes_["exact, as written"] > 1.7,
        ),
    ]


def _seconds(calls: Sequence[Callable[[], Tensor]], context: Context) -> list[float]:
    """Return the least time of each call, in turn, so that disturbances meet all of them."""
    spent: list[list[float]] = [[] for _ in calls]
    budget = context.pick(1.0, 0.2)
    with torch.no_grad():
        for _ in range(50):
            for call, times in zip(calls, spent, strict=True):
                if len(times) < 3 or sum(times) < budget:
                    start = synchronized_clock(context.device)
                    call()
                    times.append(synchronized_clock(context.device) - start)
    return [min(times) for times in spent]


def _bytes_kept(way: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the bytes of different tensors that autograd keeps, inputs and output included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = way(*leaves)
    return float(sum(storages.values())) if out.requires_grad else math.nan


def _exponent(line: Line) -> float:
    """Return the slope of log y over log n, by least squares over the longer half."""
    last = sorted(line)[-4:]
    x = [math.log(n) for n in last]
    slope, _ = statistics.linear_regression(x, [math.log(line[n]) for n in last])
    return slope


def _crossover(seconds: Mapping[str, Line]) -> float:
    """Return the length from which on Nyström attention is faster; infinite if there is none.

    Between two measured lengths the logarithm of the ratio is taken as linear in log length.
    """
    ratios = {n: seconds["exact"][n] / t for n, t in seconds["Nyström"].items()}
    slower = [n for n, ratio in ratios.items() if ratio <= 1]
    if not slower:
        return float(min(ratios))
    left = max(slower)
    if left == max(ratios):
        return math.inf
    right = min(n for n in ratios if n > left)
    a, b = math.log(ratios[left]), math.log(ratios[right])
    return left * math.exp(math.log(right / left) * -a / (b - a))


def _table(seconds: Mapping[str, Line], kept: Mapping[str, Line]) -> Table:
    columns = ["length", *(f"{name}, ms" for name in seconds), "ratio"]
    columns += [f"{name}, MiB" for name in kept]
    rows = [
        [
            n,
            *(1e3 * line[n] for line in seconds.values()),
            seconds["exact"][n] / seconds["Nyström"][n],
            *(line.get(n, math.nan) / 2**20 for line in kept.values()),
        ]
        for n in seconds["Nyström"]
    ]
    return Table("Seconds of a forward pass, and what is kept for the gradient", columns, rows)


def _plot(
    lines: Mapping[str, Line], unit: str, factor: float, crossover: float, canvas: Canvas
) -> None:
    axes = canvas.subplots()
    for name, line in lines.items():
        axes.plot(list(line), [factor * y for y in line.values()], "o-", label=name)
    if math.isfinite(crossover):
        axes.axvline(crossover, ls=":", color="grey", label=f"n = {crossover:.0f}")
    axes.set(xlabel="length n", ylabel=unit, xscale="log", yscale="log")
    lengths = list(next(iter(lines.values())))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.legend()
