"""Which words decide: a classifier of sentences, where the words that should decide are known."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import text
from kexue.core.text import spread
from kexue.core.training import adam
from kexue_integrated_gradients import integrated_gradients, token_scores
from kexue_integrated_gradients.pictures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["sentences"]

_POST = "https://kexue.fm/archives/7533"
_NEGATIONS = frozenset(
    [
        "not",
        "no",
        "cannot",
        "never",
        "none",
        "without",
        "nothing",
        "neither",
        "nor",
        "isn't",
        "doesn't",
        "don't",
        "can't",
        "won't",
    ]
)
_UNKNOWN, _LENGTH, _OTHERS = 0, 40, 150

_SETTING = (
    f"Lines of CPython's reference, labelled by whether one of {len(_NEGATIONS)} negations is in "
    f"them; classes are balanced in training. The model is a convolution over embeddings with a "
    f"maximum over the words, and the baseline zero vectors. It stands for the post's sentiment "
    f"classifier, whose data cannot be shipped; here the words that should decide are known. Only "
    f"sentences that are classified right are counted, as in the post, and {_OTHERS} of those "
    f"without a negation."
)


class Words(nn.Module):
    """Ids of words to the logit of each class, one sentence of any length at a time or many."""

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, ``[batch, class]``.

        Args:
            ids: Ids of words, ``[batch, time]``.
            mask: True at words, ``[batch, time]``.
        """
        real = mask[:, None]
        vectors = self.embedding(ids).transpose(1, 2) * real
        features = self.convolution(vectors).relu() * real
        logits: Tensor = self.head(features.amax(2))
        return logits


class Sentences(NamedTuple):
    """Sentences as words, ids and classes.

    Args:
        words: The words.
        ids: Shape ``[sentence, time]``.
        mask: True at words.
        labels: 1 where a word is a negation.
    """

    words: list[list[str]]
    ids: Tensor
    mask: Tensor
    labels: Tensor


class Found(NamedTuple):
    """What was measured with one seed."""

    accuracy: float
    integrated: float
    gradient: float
    chance: float
    with_word: float
    without: float


def sentences(context: Context) -> Report:
    """Ask integrated gradients for the words that a classifier of negated sentences looks at."""
    found: list[Found] = []
    with context.progress.task("sentences", len(context.seeds)) as bar:
        for seed in context.seeds:
            model, test = _trained(context, seed)
            found.append(_measure(model, test))
            bar.advance()
    model, test = _trained(context, context.seeds[0])
    columns = {name: [getattr(f, name) for f in found] for name in Found._fields}
    claims = [
        Claim(
            "Integrated gradients point at the words that decide.",
            f"{_POST}, section “个人实现”",
            f"in sentences with a negation, the word of the largest attribution is one in "
            f"{spread(columns['integrated'])} of them (chance {spread(columns['chance'])}).",
            "In at least 0.9 of them on every seed.",
            min(columns["integrated"]) >= 0.9,
        ),
        Claim(
            "The norm of the gradient points at them less often.",
            f"{_POST}, section “朴素梯度”",
            f"gradient {spread(columns['gradient'])}, integrated gradients "
            f"{spread(columns['integrated'])}.",
            "Less on every seed.",
            all(f.gradient < f.integrated for f in found),
        ),
        Claim(
            "A class that is the absence of the other's words has no words of its own to show.",
            f"{_POST}, section “个人实现”, of positive texts: “负面检测”",
            f"largest word's rise of the logit: {spread(columns['with_word'], 2)} in sentences "
            f"with a negation, {spread(columns['without'], 2)} in the others (means).",
            "In the others at most half as much, on every seed.",
            all(f.without <= f.with_word / 2 for f in found),
        ),
    ]
    rows = [[seed, *(round(v, 3) for v in f)] for seed, f in zip(context.seeds, found, strict=True)]
    header = ["seed", *(name.replace("_", " ") for name in Found._fields)]
    return Report(
        claims,
        [Table("By seed", header, rows)],
        [
            Figure(
                "Two sentences with a negation, and two without",
                partial(_plot, model, test),
                "Attributions to the logit of the right class, in the order of the words.",
            )
        ],
        [_SETTING],
    )


def _trained(context: Context, seed: int) -> tuple[Words, Sentences]:
    return context.once(("negations", seed), lambda: _train(context, seed))


def _train(context: Context, seed: int) -> tuple[Words, Sentences]:
    lines = text()
    words = [_split(line) for line in lines.train]
    kept = sorted({w for row in words for w in row})
    vocabulary = {word: number for number, word in enumerate(kept, start=1)}
    train = _encoded(words, vocabulary)
    test = _encoded([_split(line) for line in (*lines.valid, *lines.test)], vocabulary)
    torch.manual_seed(seed)
    model = Words(len(vocabulary) + 1)
    optimizer = adam(model.parameters(), lr=3e-3)
    parts = [(train.labels == label).nonzero()[:, 0] for label in (0, 1)]
    for _ in range(context.pick(300, 150)):
        rows = torch.cat([part[torch.randint(len(part), (32,))] for part in parts])
        loss = F.cross_entropy(model(train.ids[rows], train.mask[rows]), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.double().eval(), test


def _split(line: str) -> list[str]:
    return re.findall(r"[a-z']+|[^\sa-z']", line.lower())[:_LENGTH]


def _encoded(words: list[list[str]], vocabulary: dict[str, int]) -> Sentences:
    rows = [torch.tensor([vocabulary.get(w, _UNKNOWN) for w in row]) for row in words]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    labels = torch.tensor([int(bool(_NEGATIONS & set(row))) for row in words])
    return Sentences(words, ids, mask, labels)


def _measure(model: Words, test: Sentences) -> Found:
    with torch.no_grad():
        right = model(test.ids, test.mask).argmax(1) == test.labels
    accuracy = (right[test.labels == 1].double().mean(), right[test.labels == 0].double().mean())
    others = (right & (test.labels == 0)).nonzero()[:_OTHERS, 0]
    chosen = torch.cat([(right & (test.labels == 1)).nonzero()[:, 0], others])
    scores = _integrated(model, test, chosen)
    slopes = _gradient_norms(model, test, chosen)
    labels, mask = test.labels[chosen], test.mask[chosen]
    hits = torch.zeros_like(mask)
    for row, number in enumerate(chosen.tolist()):
        for place, word in enumerate(test.words[number]):
            hits[row, place] = word in _NEGATIONS
    negated = labels == 1
    best = scores.masked_fill(~mask, -torch.inf)
    steepest = slopes.masked_fill(~mask, -torch.inf)

    def rate(of: Tensor) -> float:
        top = hits[negated].gather(1, of[negated].argmax(1, keepdim=True))
        return float(top.double().mean())

    share = hits[negated].sum(1).double() / mask[negated].sum(1)
    return Found(
        float(sum(accuracy) / 2),
        rate(best),
        rate(steepest),
        float(share.mean()),
        float(best[negated].amax(1).mean()),
        float(best[~negated].amax(1).mean()),
    )


def _integrated(model: Words, test: Sentences, rows: Tensor) -> Tensor:
    found = integrated_gradients(
        model,
        test.ids[rows],
        target=test.labels[rows],
        layer="embedding",
        additional=(test.mask[rows],),
        steps=24,
    )
    return token_scores(found.values)


def _gradient_norms(model: Words, test: Sentences, rows: Tensor) -> Tensor:
    """Return the norm of the gradient at the vector of each word."""
    vectors: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        vectors.append(output)

    handle = model.embedding.register_forward_hook(keep)
    outputs = model(test.ids[rows], test.mask[rows])
    handle.remove()
    chosen = outputs.gather(1, test.labels[rows][:, None]).sum()
    (slope,) = torch.autograd.grad(chosen, vectors)
    return token_scores(slope, "l2")


def _plot(model: Words, test: Sentences, canvas: Canvas) -> None:
    with torch.no_grad():
        right = model(test.ids, test.mask).argmax(1) == test.labels
    lengths = test.mask.sum(1)
    shown = torch.cat(
        [
            (right & (test.labels == label) & (lengths > 5) & (lengths < 13)).nonzero()[:2, 0]
            for label in (1, 0)
        ]
    )
    scores = _integrated(model, test, shown)
    texts = [test.words[number] for number in shown.tolist()]
    rows = [row[: len(words)].numpy() for row, words in zip(scores, texts, strict=True)]
    titles = ["with a negation" if label else "without" for label in test.labels[shown].tolist()]
    bars(canvas, rows, titles, texts)
