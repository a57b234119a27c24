"""A real task of sequence to sequence: to restore the spaces of a phrase.

The source is a phrase of CPython's help topics without its spaces, the target the phrase. A model
that has seen too few phrases knows its training data by heart, copies others badly once it has lost
its place, and has never been shown how to find it again: exposure bias.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.component import PAD
from kexue.core.device import make_generator, synchronized_clock
from kexue.core.lab.data import text
from kexue.core.lab.language import CharacterSeq2Seq
from kexue.core.language import beam_search
from kexue.core.text import spread
from kexue.core.training import adam
from kexue_exposure_bias.penalty import GradientPenaltyEmbedding
from kexue_exposure_bias.replacement import TokenReplacement
from kexue_exposure_bias.scheduled import linear_decay, mix_predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["spaces"]

_POST = "https://kexue.fm/archives/7259"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz "
_SHORTEST, _LONGEST = 5, 12
_WIDTH = 64
_BATCH = 64
_LR = 8e-3
_WIDTHS = (1, 2, 3)  # of the beam, as in the post
_SHARES = (0.0, 0.05, 0.15, 0.3, 0.5)  # of corrupted tokens in the prefix
_AT = 0.15  # the share at which methods are compared

_SETTING = (
    f"Phrases of 2 to 5 words, {_SHORTEST} to {_LONGEST} characters, of CPython's help topics; "
    "those of the test are from other topics, none of them in training. A GRU reads, a GRU with "
    f"attention writes, {_WIDTH} features; Adam {_LR:g}, batches of {_BATCH}. Replacement: prob "
    "0.5, rate 0.3, from the target. Penalty: epsilon 1, on both embedding matrices. "
    "Scheduled sampling: two passes, the share of true inputs falls linearly from 1 to a half, "
    "greedy predictions."
)
_CORRUPTION = (
    "A corrupted prefix has letters drawn from the whole alphabet in the place of some: another "
    "law than that of the replacement in training. The gold characters are scored behind it."
)

Batch = dict[str, Tensor]


@dataclass
class _Run:
    """What came of one model.

    Args:
        nll: Nats per character behind prefixes with shares of corrupted tokens.
        cer: Character error rate of what beams of some widths write.
        exact: Share of phrases that a beam of 1 writes without error.
        seconds: Of training, and of these the seconds of replacing.
    """

    nll: dict[float, float] = field(default_factory=dict)
    cer: dict[int, float] = field(default_factory=dict)
    exact: float = 0.0
    seconds: float = 0.0
    replacing: float = 0.0


Runs = dict[str, list[_Run]]


# -- data ------------------------------------------------------------------------------------------


def _phrases(lines: Sequence[str]) -> list[str]:
    """Return the different phrases of some lines, cut by a fixed seed, in random order."""
    rng = random.Random(0)
    found: dict[str, None] = {}
    for line in lines:
        words = re.sub("[^a-z ]", " ", line.lower()).split()
        while words:
            count = rng.randint(2, 5)
            phrase, words = " ".join(words[:count]), words[count:]
            if _SHORTEST <= len(phrase) <= _LONGEST and " " in phrase:
                found[phrase] = None
    phrases = list(found)
    rng.shuffle(phrases)
    return phrases


def _pairs(context: Context) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    lines = text()
    train = _phrases(lines.train)[: context.pick(704, 320)]
    known = set(train)
    test = [p for p in _phrases(lines.test) if p not in known][: context.pick(300, 60)]
    first, second = ([(p.replace(" ", ""), p) for p in part] for part in (train, test))
    return first, second


def _collated(model: CharacterSeq2Seq, pairs: Sequence[tuple[str, str]], where: Tensor) -> Batch:
    return {name: rows.to(where.device) for name, rows in model.collate(pairs).items()}


def _part(batch: Batch, rows: Tensor) -> Batch:
    """Return some rows, no wider than they need."""
    part = {name: table[rows] for name, table in batch.items()}
    read, written = int(part["mask"].sum(1).max()), int((part["targets"] != PAD).sum(1).max())
    widths = {"source": read, "mask": read, "inputs": written, "targets": written}
    return {name: table[:, : widths[name]] for name, table in part.items()}


# -- training --------------------------------------------------------------------------------------


class _Training:
    """One way to train: decoder inputs, and an objective.

    Args:
        model: What is trained.
        generator: Source of randomness of the method.
    """

    def __init__(self, model: CharacterSeq2Seq, generator: torch.Generator) -> None:
        self.model = model
        self.generator = generator
        self.replacing = 0.0
        self.cross_entropy = GradientPenaltyEmbedding(0.0)

    def inputs(self, batch: Batch, done: float) -> Tensor:
        """Return what the decoder reads; ``done`` is the share of the training that is done."""
        del done
        return batch["inputs"]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.cross_entropy(logits, targets)
        return loss

    def step(self, batch: Batch, done: float) -> Tensor:
        logits = self.model(batch["source"], batch["mask"], self.inputs(batch, done))
        return self.loss(logits, batch["targets"])


class _Replacement(_Training):
    def __init__(self, model: CharacterSeq2Seq, generator: torch.Generator) -> None:
        super().__init__(model, generator)
        self.replace = TokenReplacement(exclude=model.vocabulary.special_ids)

    def inputs(self, batch: Batch, done: float) -> Tensor:
        del done
        start = synchronized_clock(self.generator.device)
        mask = batch["targets"] != PAD
        replaced: Tensor = self.replace(batch["inputs"], mask, generator=self.generator)
        self.replacing += synchronized_clock(self.generator.device) - start
        return replaced


class _Penalty(_Training):
    def __init__(self, model: CharacterSeq2Seq, generator: torch.Generator) -> None:
        super().__init__(model, generator)
        self.criterion = GradientPenaltyEmbedding()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        matrices = [self.model.embedding.weight, self.model.source_embedding.weight]
        loss: Tensor = self.criterion(logits, targets, embedding=matrices)
        return loss


class _Scheduled(_Training):
    def inputs(self, batch: Batch, done: float) -> Tensor:
        with torch.no_grad():
            logits = self.model(batch["source"], batch["mask"], batch["inputs"])
        return mix_predictions(
            batch["inputs"],
            logits,
            linear_decay(done, slope=0.5),
            mask=batch["targets"] != PAD,
            generator=self.generator,
        )


_METHODS: dict[str, type[_Training]] = {
    "teacher forcing": _Training,
    "replacement": _Replacement,
    "gradient penalty": _Penalty,
    "scheduled sampling": _Scheduled,
}


def _train(
    context: Context, method: type[_Training], pairs: Sequence[tuple[str, str]], seed: int
) -> tuple[CharacterSeq2Seq, _Run]:
    torch.manual_seed(seed)
    model = CharacterSeq2Seq(_ALPHABET, width=_WIDTH).to(context.device)
    training = method(model, make_generator(seed, context.device))
    batch = _collated(model, pairs, model.output.weight)
    optimizer = adam(model.parameters(), lr=_LR)
    epochs = context.pick(14, 1)
    steps = epochs * -(-len(pairs) // _BATCH)
    start, step = time.perf_counter(), 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(pairs)), _BATCH):
            optimizer.zero_grad()
            loss = training.step(_part(batch, rows), step / steps)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    seconds = synchronized_clock(context.device) - start
    return model.eval(), _Run(seconds=seconds, replacing=training.replacing)


# -- measuring -------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(model: CharacterSeq2Seq, pairs: Sequence[tuple[str, str]], run: _Run) -> None:
    batch = _collated(model, pairs, model.output.weight)
    mask, targets = batch["targets"] != PAD, batch["targets"]
    size, special = model.vocabulary.size, model.vocabulary.special_ids
    for share in _SHARES:
        corrupt = TokenReplacement(1.0, share, pool="vocab", num_tokens=size, exclude=special)
        generator = make_generator(0, targets.device)  # the same prefixes for every model
        read = corrupt(batch["inputs"], mask, generator=generator)
        logits = model(batch["source"], batch["mask"], read)
        run.nll[share] = float(GradientPenaltyEmbedding(0.0)(logits, targets))
    length = sum(len(target) for _, target in pairs)
    for width in _WIDTHS:
        found = beam_search(
            model, batch["source"], mask=batch["mask"], width=width, max_new_tokens=_LONGEST + 10
        )
        written = [model.vocabulary.decode(row) for row in found.tolist()]
        errors = [_distance(a, b) for a, (_, b) in zip(written, pairs, strict=True)]
        run.cer[width] = sum(errors) / length
        if width == 1:
            run.exact = errors.count(0) / len(errors)


def _distance(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


# -- the report ------------------------------------------------------------------------------------


def spaces(context: Context) -> Report:
    """Train with each method, on every seed, and let the models write."""
    train, test = _pairs(context)
    runs: Runs = {name: [] for name in _METHODS}
    with context.progress.task("restoring spaces", len(runs) * len(context.seeds)) as bar:
        for seed in context.seeds:
            for name, method in _METHODS.items():
                model, run = _train(context, method, train, seed)
                _measure(model, test, run)
                runs[name].append(run)
                bar.advance()
    notes = [_SETTING, _CORRUPTION, f"{len(train)} phrases to train, {len(test)} to test."]
    if context.quick:
        notes.append("The quick run ends long before the models have learned to copy.")
    return Report(
        _claims(runs),
        [_table(runs)],
        [
            Figure(
                "Behind a wrong prefix",
                partial(_plot_nll, runs),
                "Nats per true character behind prefixes with wrong letters; a line per seed.",
            ),
            Figure(
                "What is written",
                partial(_plot_cer, runs),
                "Character error rate by the width of the beam; a point per seed, bars the means.",
            ),
        ],
        notes,
    )


def _nll(runs: Sequence[_Run], share: float) -> list[float]:
    return [run.nll[share] for run in runs]


def _cer(runs: Sequence[_Run], width: int) -> list[float]:
    return [run.cer[width] for run in runs]


def _claims(runs: Runs) -> list[Claim]:
    plain, ours, penalty, _ = runs.values()
    table, adversarial = f"{_POST}, section “构建负样本”", f"{_POST}, section “对抗训练”"
    return [
        _robust(plain, ours, table),
        _greedy(plain, ours, table),
        _beams("Replacement", ours, "teacher forcing", plain, table),
        _beams("The gradient penalty", penalty, "teacher forcing", plain, adversarial),
        _beams("The gradient penalty", penalty, "replacement", ours, adversarial),
        _cost(ours, table),
    ]


def _robust(plain: Sequence[_Run], ours: Sequence[_Run], source: str) -> Claim:
    before, after = (_nll(r, _AT) for r in (plain, ours))
    return Claim(
        "A decoder that was trained with replacement goes on well behind wrong tokens.",
        source,
        f"nats per character behind prefixes with {_AT:.0%} wrong letters: replacement "
        f"{spread(after)}, teacher forcing {spread(before)}.",
        "Below 0.6 of teacher forcing on every seed.",
        all(b < 0.6 * a for a, b in zip(before, after, strict=True)),
    )


def _greedy(plain: Sequence[_Run], ours: Sequence[_Run], source: str) -> Claim:
    before, after = (_cer(r, 1) for r in (plain, ours))
    return Claim(
        "Replacement makes what a model writes better.",
        source,
        f"character error rate, greedy: replacement {spread(after)}, teacher forcing "
        f"{spread(before)}; phrases without error {fmean(run.exact for run in ours):.3f} and "
        f"{fmean(run.exact for run in plain):.3f}.",
        "A mean error rate below 0.9 of that of teacher forcing.",
        fmean(after) < 0.9 * fmean(before),
    )


def _beams(
    name: str, ours: Sequence[_Run], other: str, theirs: Sequence[_Run], source: str
) -> Claim:
    pairs = {w: (_cer(ours, w), _cer(theirs, w)) for w in _WIDTHS}
    apart = [a - b for a, b in zip(*pairs[1], strict=True)]
    return Claim(
        f"{name} is better than {other} with beams of 1, 2 and 3.",
        source,
        "character error rate: "
        + "; ".join(f"beam {w} {spread(a)} and {spread(b)}" for w, (a, b) in pairs.items())
        + f"; difference seed by seed, beam 1: {spread(apart)}.",
        "A lower mean error rate with every width.",
        all(fmean(a) < fmean(b) for a, b in pairs.values()),
    )


def _cost(ours: Sequence[_Run], source: str) -> Claim:
    shares = [run.replacing / run.seconds for run in ours]
    return Claim(
        "Replacement costs next to nothing: decoding stays parallel in training.",
        source,
        f"share of the seconds of training: {spread(shares)}.",
        "At most 0.05 on every seed.",
        max(shares) <= 0.05,
    )


def _table(runs: Runs) -> Table:
    plain = runs["teacher forcing"]
    rows = []
    for name, of in runs.items():
        ratios = [a.seconds / b.seconds for a, b in zip(of, plain, strict=True)]
        cells = [spread(_nll(of, share)) for share in (0.0, _AT)]
        cells += [spread(_cer(of, w)) for w in _WIDTHS]
        rows.append([name, *cells, spread(run.exact for run in of), spread(ratios, 2)])
    columns = ["method", "nats, true prefix", f"nats, {_AT:.0%} wrong"]
    columns += [f"error rate, beam {w}" for w in _WIDTHS]
    return Table(
        "Restoring spaces", [*columns, "without error, beam 1", "time of training, relative"], rows
    )


_COLOURS = {
    "teacher forcing": "#7f8c8d",
    "replacement": "#c0392b",
    "gradient penalty": "#2c6fbb",
    "scheduled sampling": "#27865a",
}


def _plot_nll(runs: Runs, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, colour in _COLOURS.items():
        for i, run in enumerate(runs[name]):
            values = list(run.nll.values())
            style = "o--" if name == "gradient penalty" else "o-"  # it lies on teacher forcing
            label = None if i else name
            axes.plot(_SHARES, values, style, color=colour, markersize=3, label=label)
    axes.set(xlabel="share of wrong letters in the prefix", ylabel="nats per character")
    axes.legend()


def _plot_cer(runs: Runs, canvas: Canvas) -> None:
    axes = canvas.subplots()
    wide = 0.8 / len(_COLOURS)
    for place, (name, colour) in enumerate(_COLOURS.items()):
        for width in _WIDTHS:
            values = _cer(runs[name], width)
            x = width + (place - (len(_COLOURS) - 1) / 2) * wide
            label = name if width == _WIDTHS[0] else None
            axes.bar(x, fmean(values), wide * 0.9, color=colour, alpha=0.5, label=label)
            axes.plot([x] * len(values), values, "o", color=colour, markersize=4)
    axes.set(xlabel="width of the beam", ylabel="character error rate", xticks=_WIDTHS)
    axes.legend(ncols=len(_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
