"""Lazy updates: which rows of an embedding move, and the deferred form."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report
from kexue.core.text import spread
from kexue_lookahead.embedding import Lazy
from kexue_lookahead.experiments.topics import Classifier, padded, sentences
from kexue_lookahead.lazy import with_lazy

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["rows"]

_POST = "https://kexue.fm/archives/6869"


def rows(context: Context) -> Report:
    """Look at rows that are not in the batch, and at the deferred form."""
    ids, labels, vocabulary = sentences()
    moved: dict[str, list[float]] = {name: [] for name in ("Adam", "lazy", "Lazy")}
    absent: list[float] = []
    for seed in context.seeds:
        for name, shares in moved.items():
            share, out = _moved(ids, labels, vocabulary, name, seed)
            shares.append(share)
            absent.append(out)
    apart = {
        kind: max(_apart(seed, context.pick(400, 100), kind) for seed in context.seeds)
        for kind in (torch.float64, torch.float32)
    }
    claims = [
        Claim(
            "With momentum, words that are not in the batch are moved all the same; with lazy "
            "updates they are not.",
            f"{_POST}, section “LazyOptimizer”",
            f"of the words that had been in a batch before and were not in that of step 50 "
            f"({statistics.fmean(absent):.0%} of these), Adam moves {spread(moved['Adam'])}, "
            f"the derivation {spread(moved['lazy'])}, `Lazy` {spread(moved['Lazy'])}.",
            "All of them, none to the last bit, none to the last bit.",
            min(moved["Adam"]) == 1.0 and max(moved["lazy"] + moved["Lazy"]) == 0.0,
        ),
        Claim(
            "Moments of rows that are not touched can be decayed when they are: the dense form "
            "exactly, in time of the touched rows.",
            "β^Δ is Δ times β",
            f"greatest difference of the tables (entries of 0.1): {apart[torch.float64]:.2g} in "
            f"float64, {apart[torch.float32]:.2g} in float32.",
            "At most 1e-15 and 5e-7.",
            apart[torch.float64] <= 1e-15 and apart[torch.float32] <= 5e-7,
        ),
    ]
    ways = _ways()
    return Report(
        claims,
        [],
        [
            Figure(
                "A row that is sampled once in 25 steps",
                partial(_plot_ways, ways),
                "Its one number, with gradient 1 in the marked steps and 0 in all others. Adam "
                "goes on by its momentum; the moments of the frozen form remember the last time.",
            )
        ],
        [f"Reference text of CPython, {len(ids)} lines, {vocabulary} words, batches of 32 lines."],
    )


def _moved(
    ids: list[Tensor], labels: Tensor, vocabulary: int, name: str, seed: int
) -> tuple[float, float]:
    """Return the share of absent rows that a step moves, and the share of rows that are absent."""
    torch.manual_seed(seed)
    model = Classifier(vocabulary, int(labels.max()) + 1)
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "Adam": lambda: torch.optim.Adam([model.embed.weight], lr=1e-2),
        "lazy": lambda: with_lazy("adam")([model.embed.weight], lr=1e-2),
        "Lazy": lambda: Lazy([model.embed.weight], lr=1e-2),
    }
    optimizer = made[name]()
    met = torch.zeros(vocabulary, dtype=torch.bool)
    for _ in range(50):
        batch = torch.randint(len(ids), (32,))
        words = padded([ids[i] for i in batch.tolist()])
        optimizer.zero_grad()
        F.cross_entropy(model(words), labels[batch]).backward()  # type: ignore[no-untyped-call]
        before = model.embed.weight.detach().clone()
        optimizer.step()
        here = torch.zeros_like(met).index_fill_(0, words.flatten(), value=True)
        waiting = met & ~here
        met |= here
    changed = (model.embed.weight.detach() != before).any(1)
    return float(changed[waiting].double().mean()), float(waiting.sum() / met.sum())


def _apart(seed: int, steps: int, dtype: torch.dtype) -> float:
    """Return how far the deferred form is from the dense one, at default settings."""
    generator = torch.Generator().manual_seed(seed)
    start = 0.1 * torch.randn(200, 8, generator=generator, dtype=torch.float64)
    tables = [nn.Parameter(start.to(dtype)) for _ in range(2)]
    optimizers = (Lazy([tables[0]]), with_lazy("adam")([tables[1]]))
    for _ in range(steps):
        ids = torch.randint(200, (10,), generator=generator)
        values = torch.randn(10, 8, generator=generator, dtype=torch.float64).to(dtype)
        gradient = torch.zeros(200, 8, dtype=dtype).index_add_(0, ids, values)
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.grad = gradient.clone()
            optimizer.step()
    return float((tables[0] - tables[1]).detach().abs().max())


def _ways() -> dict[str, list[float]]:
    """Return the way of one row under each method."""
    made: dict[str, Any] = {
        "Adam": partial(torch.optim.Adam, lr=0.1),
        "lazy, moments decay (post)": partial(Lazy, lr=0.1),
        "lazy, moments frozen": partial(Lazy, lr=0.1, state="freeze"),
    }
    ways = {}
    for name, make in made.items():
        row = nn.Parameter(torch.zeros(1, 1))
        optimizer = make([row])
        way = [0.0]
        for step in range(100):
            row.grad = torch.full((1, 1), float(step % 25 == 0))
            optimizer.step()
            way.append(float(row.detach()))
        ways[name] = way
    return ways


def _plot_ways(ways: dict[str, list[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for step in range(0, 100, 25):
        axes.axvline(step, color="0.85", zorder=0)
    for name, way in ways.items():
        axes.plot(way, label=name)
    axes.set(xlabel="step", ylabel="value")
    axes.legend()
