"""The segmentation task that several posts are measured on: characters to words.

Text without its spaces, tagged B, M, E, S; one small convolutional encoder, one head per run. Runs
are kept for the length of a ``kexue reproduce``, so that plugins that compare with the same head
train it once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from kexue.core.device import synchronized_clock
from kexue.core.experiments import Context
from kexue.core.lab.data import Sentence, Split, segmentation
from kexue.core.lab.tagging import Tagger, span_f1

__all__ = [
    "ENCODERS",
    "SETTING",
    "Corpus",
    "Run",
    "Scores",
    "corpus",
    "illegal_pairs",
    "measure",
    "seconds_per_step",
    "train",
    "train_all",
]

ENCODERS: Mapping[str, int] = {"weak": 1, "strong": 4}
"""Encoders by name: how many convolutions of three characters."""

SETTING = (
    "CPython's reference text without its spaces; train, validation and test lines come from "
    "different topics, and no test line occurs in the training part. Weak and strong encoder: one "
    "and four convolutions of three characters, width 64. 3000 lines, Adam 5e-3, batches of 32, "
    "four epochs, of which the best on the validation part counts; weights averaged with decay "
    "0.98. (The quick version: 240 lines, width 32, batches of 16, three epochs.)"
)
"""What a report says of the task."""

Corpus = Split[Sentence]
MakeHead = Callable[[int], nn.Module]

_FOLLOWERS = {"": "BS", "B": "ME", "M": "ME", "E": "BS", "S": "BS"}


class Scores(NamedTuple):
    """What a tagger reaches on the test part.

    Args:
        f1: F1 of the words.
        accuracy: Accuracy of the tags.
        illegal: Pairs of neighbouring tags that no segmentation has, per thousand tags.
    """

    f1: float
    accuracy: float
    illegal: float


@dataclass(frozen=True)
class Run:
    """A tagger that was trained and tested.

    Args:
        head: Name of the head.
        encoder: Name of the encoder.
        seed: Seed of weights and order.
        scores: What it reaches on the test part.
        epoch_seconds: Median seconds of an epoch.
        tagger: The tagger.
    """

    head: str
    encoder: str
    seed: int
    scores: Scores
    epoch_seconds: float
    tagger: Tagger


def corpus(context: Context) -> Corpus:
    """Return the part of the embedded corpus that is learnt from and tested on."""

    def load() -> Corpus:
        full = segmentation()
        train, valid, test = context.pick((3000, 300, 537), (240, 60, 120))
        return Split(full.train[:train], full.valid[:valid], full.test[:test])

    return context.once("segmentation corpus", load)


def train(context: Context, head: str, make_head: MakeHead, *, encoder: str, seed: int) -> Run:
    """Train and test one tagger; the epoch that is best on the validation part counts.

    Args:
        context: The reproduction it is part of.
        head: Name of the head, the same for the same head in all experiments.
        make_head: Builds it for a number of tags.
        encoder: One of :data:`ENCODERS`.
        seed: Seed of weights and order.
    """

    def run() -> Run:
        data = corpus(context)
        torch.manual_seed(seed)
        tagger = Tagger.for_corpus(
            data.train,
            make_head,
            width=context.pick(64, 32),
            layers=ENCODERS[encoder],
            dropout=0.0,
        ).to(context.device)
        history = tagger.fit(
            data.train,
            data.valid,
            epochs=context.pick(4, 3),
            batch_size=context.pick(32, 16),  # the quick version has few lines, not few steps
            lr=5e-3,
            ema=0.98,
            seed=seed,
            progress=context.progress,
        )
        scores = measure(context, tagger)
        context.progress.say(f"{head}, {encoder} encoder, seed {seed}: F1 {scores.f1:.4f}")
        seconds = statistics.median(row["seconds"] for row in history.epochs)
        return Run(head, encoder, seed, scores, seconds, tagger)

    return context.once(("segmentation run", head, encoder, seed), run)


def train_all(context: Context, heads: Mapping[str, MakeHead]) -> dict[tuple[str, str], list[Run]]:
    """Train and test every head on every encoder with every seed.

    Args:
        context: The reproduction it is part of.
        heads: Builders by name; see :func:`train`.

    Returns:
        The runs by head and encoder, one per seed.
    """
    keys = list(itertools.product(heads, ENCODERS))
    runs: dict[tuple[str, str], list[Run]] = {key: [] for key in keys}
    with context.progress.task("taggers", len(keys) * len(context.seeds)) as bar:
        for (head, encoder), seed in itertools.product(keys, context.seeds):
            runs[head, encoder].append(
                train(context, head, heads[head], encoder=encoder, seed=seed)
            )
            bar.advance()
    return runs


def measure(context: Context, tagger: Tagger, head: nn.Module | None = None) -> Scores:
    """Test a tagger.

    Args:
        context: The reproduction it is part of.
        tagger: The tagger.
        head: Decodes in the place of the tagger's own head.
    """
    data = corpus(context)
    own = tagger.head
    tagger.head = own if head is None else head
    try:
        predicted = tagger.predict([tokens for tokens, _ in data.test])
    finally:
        tagger.head = own
    found = span_f1(predicted, [tags for _, tags in data.test])
    illegal = 1e3 * sum(map(illegal_pairs, predicted)) / max(sum(map(len, predicted)), 1)
    return Scores(found["f1"], found["accuracy"], illegal)


def illegal_pairs(tags: Sequence[str]) -> int:
    """Count the places where B, M, E, S follow each other as no segmentation does.

    Example:
        >>> illegal_pairs(["B", "E", "S"]), illegal_pairs(["B", "S", "M"])
        (0, 3)
    """
    pairs = zip(["", *tags], [*tags, ""], strict=True)
    return sum(b not in _FOLLOWERS[a] if b else a in {"B", "M"} for a, b in pairs)


def seconds_per_step(
    context: Context, heads: Mapping[str, MakeHead], *, encoder: str, steps: int = 20
) -> dict[str, float]:
    """Time one training step with each head, in turn, and return the median seconds by name.

    Args:
        context: The reproduction it is part of.
        heads: What to compare.
        encoder: One of :data:`ENCODERS`.
        steps: Rounds; each takes one step with every head.
    """
    data = corpus(context)
    batch_of = data.train[:64]
    taggers = {
        name: Tagger.for_corpus(data.train[:500], make, layers=ENCODERS[encoder], dropout=0.0).to(
            context.device
        )
        for name, make in heads.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for step in range(steps + 2):
        for name, tagger in taggers.items():
            batch = {k: v.to(context.device) for k, v in tagger.collate(batch_of).items()}
            start = synchronized_clock(context.device)
            tagger.zero_grad()
            tagger.loss(batch).backward()  # type: ignore[no-untyped-call]
            if step >= 2:
                seconds[name].append(synchronized_clock(context.device) - start)
    return {name: statistics.median(rows) for name, rows in seconds.items()}
