"""What post 6869 and the paper claim: variance, steadiness, rows that stay, accuracy."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_lookahead.embedding import Lazy
from kexue_lookahead.lazy import with_lazy
from kexue_lookahead.lookahead import with_lookahead

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["lookahead", "rows", "text"]

_POST = "https://kexue.fm/archives/6869"
_PAPER = "https://arxiv.org/abs/1907.08610"
_QUADRATICS = ((0.3, 5, 0.5), (0.1, 5, 0.5), (0.5, 5, 0.2))  # γh, k, α
_RATES = (0.05, 0.1, 0.2)
_LAST = 100
_TEXT_RATES = (1e-3, 5e-3, 2e-2)
_WIDTH = 32


# -- Lookahead -------------------------------------------------------------------------------------


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


# -- lazy updates: which rows move -----------------------------------------------------------------


def rows(context: Context) -> Report:
    """Look at rows that are not in the batch, and at the deferred form."""
    ids, labels, vocabulary = _sentences()
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
    model = _Classifier(vocabulary, int(labels.max()) + 1)
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "Adam": lambda: torch.optim.Adam([model.embed.weight], lr=1e-2),
        "lazy": lambda: with_lazy("adam")([model.embed.weight], lr=1e-2),
        "Lazy": lambda: Lazy([model.embed.weight], lr=1e-2),
    }
    optimizer = made[name]()
    met = torch.zeros(vocabulary, dtype=torch.bool)
    for _ in range(50):
        batch = torch.randint(len(ids), (32,))
        words = _padded([ids[i] for i in batch.tolist()])
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


# -- lazy updates: accuracy ------------------------------------------------------------------------


def text(context: Context) -> Report:
    """Tell the topic of lines of text, with and without lazy updates of the embedding."""
    ids, labels, vocabulary = _sentences()
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "Adam": torch.optim.Adam,
        "lazy, moments decay (post)": with_lazy("adam", lazy_include=("embed",)),
        "lazy, moments frozen": with_lazy("adam", lazy_include=("embed",), lazy_state="freeze"),
    }
    found: dict[tuple[str, float], list[float]] = {}
    rates = context.pick(_TEXT_RATES, (5e-3,))
    with context.progress.task("topics", len(made) * len(rates) * len(context.seeds)) as bar:
        for name, make in made.items():
            for rate in rates:
                for seed in context.seeds:
                    best = _classify(
                        ids,
                        labels,
                        vocabulary,
                        seed=seed,
                        make=partial(make, lr=rate, fused=True),
                        epochs=context.pick(6, 1),
                    )
                    found.setdefault((name, rate), []).append(best)
                    bar.advance()
    bests = {
        name: max((found[name, rate] for rate in rates), key=statistics.fmean) for name in made
    }
    adam, post, _ = bests.values()
    return Report(
        [
            Claim(
                "Lazy updates of the embedding make a classifier of text more accurate.",
                f"{_POST}, section “LazyOptimizer”: IMDB 84.9 % against 83.7 %",
                f"best test accuracy over the epochs, at the best rate of each: Adam "
                f"{spread(adam)}, lazy {spread(post)}.",
                "Higher on average.",
                statistics.fmean(post) > statistics.fmean(adam),
            )
        ],
        [
            Table(
                "Best test accuracy over the epochs",
                ["optimizer", *(f"rate {rate:g}" for rate in rates)],
                [[name, *(spread(found[name, rate]) for rate in rates)] for name in made],
            )
        ],
        notes=[
            f"{len(ids)} lines, {int(labels.max()) + 1} topics, {vocabulary} words; a fifth tests.",
            "A linear layer on the mean of embeddings; not the IMDB reviews and LSTM of the post.",
        ],
    )


class _Classifier(nn.Module):
    """The mean of embeddings and a linear layer; word 0 fills up lines."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, _WIDTH, padding_idx=0)
        self.out = nn.Linear(_WIDTH, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Return the scores of lines, ``[line, word]`` to ``[line, class]``."""
        counts = words.ne(0).sum(1, keepdim=True)
        scores: Tensor = self.out(self.embed(words).sum(1) / counts)
        return scores


def _sentences() -> tuple[list[Tensor], Tensor, int]:
    """Return the words of lines as numbers from 1, the topics of the lines, and how many words.

    Topics are those with at least forty lines; lines that several topics share are left out.
    """
    from pydoc_data.topics import topics

    lines = {
        name: {" ".join(re.findall(r"[a-z_]+", line.lower())) for line in value.splitlines()}
        for name, value in topics.items()
    }
    owners = Counter(line for value in lines.values() for line in value)
    kept = {
        name: sorted(x for x in value if owners[x] == 1 and len(x.split()) >= 5)
        for name, value in sorted(lines.items())
    }
    kept = {name: value for name, value in kept.items() if len(value) >= 40}
    numbers: dict[str, int] = {}
    ids, labels = [], []
    for label, value in enumerate(kept.values()):
        for line in value:
            words = [numbers.setdefault(word, len(numbers) + 1) for word in line.split()]
            ids.append(torch.tensor(words))
            labels.append(label)
    return ids, torch.tensor(labels), len(numbers) + 1


def _padded(lines: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(lines), batch_first=True)


def _classify(
    ids: list[Tensor],
    labels: Tensor,
    vocabulary: int,
    *,
    seed: int,
    make: Callable[[Any], torch.optim.Optimizer],
    epochs: int,
) -> float:
    """Return the best accuracy on the test part after an epoch."""
    torch.manual_seed(seed)
    model = _Classifier(vocabulary, int(labels.max()) + 1)
    optimizer = make(model.named_parameters())
    words = _padded(ids)
    order = torch.randperm(len(ids))
    test, train = order[: len(ids) // 5], order[len(ids) // 5 :]
    best = 0.0
    for _ in range(epochs):
        for batch in torch.split(train[torch.randperm(len(train))], 64):
            optimizer.zero_grad()
            F.cross_entropy(model(words[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            right = model(words[test]).argmax(1) == labels[test]
        best = max(best, float(right.double().mean()))
    return best
