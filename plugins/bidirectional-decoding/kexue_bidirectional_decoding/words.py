"""The task of the experiments: words of real text, restored where letters are hidden."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from kexue.core import Context
from kexue.core.device import make_generator
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.lab.data import text
from kexue.core.language import pad_ids
from kexue_bidirectional_decoding.model import BidirectionalSeq2Seq
from kexue_bidirectional_decoding.pseudo import Partners, pseudo_targets
from kexue_bidirectional_decoding.search import bidirectional_beam_search
from kexue_bidirectional_decoding.targets import (
    BidirectionalTargets,
    bidirectional_cross_entropy,
    make_bidirectional,
)

__all__ = [
    "HIDDEN",
    "Kind",
    "Restored",
    "Shares",
    "Words",
    "begun",
    "hold_out",
    "restore",
    "vocabulary_of_text",
]

HIDDEN = 0.1
"""Share of the letters that are hidden."""

Kind = Literal["none", "post", "mask", "pseudo"]
"""What the decoders of a model know of each other, and from what they were trained to know it."""


_RATE = 8e-3  # of Adam


@dataclass(frozen=True)
class Words:
    """Words as ids, and which letters of the held-out ones are hidden.

    Args:
        alphabet: The letters.
        train: Ids of the words to fit to, padded, and the mask of real letters.
        test: The same of those that are held out.
        hidden: Which letters of the held-out words are hidden.
    """

    alphabet: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    hidden: Tensor


def vocabulary_of_text() -> list[str]:
    """Return the words of 7 to 12 letters of CPython's reference text, each once, in order."""
    split = text()
    lines = " ".join([*split.train, *split.valid, *split.test])
    found = {word.lower() for word in re.findall(r"[A-Za-z]+", lines)}
    return sorted(word for word in found if 7 <= len(word) <= 12)


def hold_out(
    words: Sequence[str], seed: int, *, times: int, most: int, device: torch.device
) -> Words:
    """Hold some 15 % of the words out, and hide letters of these.

    Args:
        words: All words.
        seed: Decides which are held out, and which letters are hidden.
        times: How often each of these is asked for, with other letters hidden.
        most: How many words to fit to at most, and to hold out.
        device: Where.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(words), generator=generator).tolist()
    held = max(1, round(0.15 * len(words)))
    alphabet = "".join(sorted({c for word in words for c in word}))
    known = BidirectionalSeq2Seq(alphabet, width=2, heads=1).vocabulary
    test = pad_ids([known.encode(words[i]) for i in order[:held][:most] for _ in range(times)])
    train = pad_ids([known.encode(words[i]) for i in order[held:][:most]])
    hidden = (torch.rand(test[0].shape, generator=generator) < HIDDEN) & test[1]
    return Words(
        alphabet,
        (train[0].to(device), train[1].to(device)),
        (test[0].to(device), test[1].to(device)),
        hidden.to(device),
    )


@dataclass(frozen=True)
class Restored:
    """What a model makes of held-out words.

    Args:
        training: Nats per letter in the last pass over the words it was fitted to.
        held_out: The same of held-out words, given the letters before, and of the partner what it
            was given in training.
        left: Shares of letters and words that are right, written from the left.
        right: The same from the right.
        chosen: Share of words that are right where the better-scored direction is taken.
        from_right: Share of words for which that is the one from the right.
        parameters: Of the model.
    """

    training: float
    held_out: float
    left: Shares
    right: Shares
    chosen: float
    from_right: float
    parameters: int


@dataclass(frozen=True)
class Shares:
    """Shares that are right.

    Args:
        first: Of the first four letters.
        last: Of the last four, counted from the end.
        letters: Of all letters, counted from the start.
        words: Of words.
    """

    first: float
    last: float
    letters: float
    words: float


def begun(
    context: Context, words: Words, *, seed: int, epochs: int, width: int
) -> BidirectionalSeq2Seq:
    """Fit two decoders that know nothing of each other: where all models of a seed begin.

    Args:
        context: Of the experiment.
        words: The words.
        seed: Of weights, order and hidden letters.
        epochs: Passes over the words.
        width: Of the model.
    """
    torch.manual_seed(seed)
    model = BidirectionalSeq2Seq(words.alphabet, width=width, heads=4, interaction="none")
    model = model.to(context.device)
    _fit(context, model, words, f"both alone, seed {seed}", seed=seed, epochs=epochs, rise=0.1)
    return model.eval()


def restore(
    context: Context,
    words: Words,
    first: BidirectionalSeq2Seq,
    kind: Kind,
    *,
    seed: int,
    epochs: int,
) -> Restored:
    """Go on with a model as one of some kind, and restore the words that are held out.

    What is new in it, the attention between the decoders, at first adds nothing.

    Args:
        context: Of the experiment.
        words: The words.
        first: What :func:`begun` returned; it also writes the pseudo-targets.
        kind: What the decoders know of each other.
        seed: Of new weights, order and hidden letters; the same for all kinds.
        epochs: Passes over the words.
    """
    torch.manual_seed(seed)
    config = first.config() | {"interaction": "post" if kind == "pseudo" else kind}
    model = BidirectionalSeq2Seq.from_config(config).to(context.device)
    model.load_state_dict(first.state_dict(), strict=False)
    if kind != "none":
        for weight in model.crosses.parameters():
            torch.nn.init.zeros_(weight)
    writer = first if kind == "pseudo" else None
    name = f"{kind}, seed {seed}"
    training = _fit(
        context, model, words, name, seed=seed + 1000, epochs=epochs, rise=0.0, writer=writer
    )
    return _measured(model.eval(), words, training, writer)


def _fit(
    context: Context,
    model: BidirectionalSeq2Seq,
    words: Words,
    name: str,
    *,
    seed: int,
    epochs: int,
    rise: float,
    writer: BidirectionalSeq2Seq | None = None,
) -> float:
    """Fit a model; return the mean loss of the last pass.

    The rate rises in a share of the steps and then stays; without a rise, it falls to nothing.
    """
    ids, mask = words.train
    size, batch = len(ids), 64
    steps = epochs * -(-size // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, fused=True)

    def rate(step: int) -> float:
        return min((step + 1) / (rise * steps), 1.0) if rise else 1.0 - step / steps

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = make_generator(seed, context.device)
    losses: list[float] = []
    model.train()
    with context.progress.task(name, epochs) as task:
        for _ in range(epochs):
            order = torch.randperm(size, generator=generator, device=ids.device)
            hidden = torch.rand(ids.shape, generator=generator, device=ids.device) < HIDDEN
            partners = _partners(writer, ids, mask, hidden)
            losses = []
            for rows in torch.split(order, batch):
                read = None if partners is None else Partners(*(part[rows] for part in partners))
                loss = _loss(model, ids[rows], mask[rows], hidden[rows], read)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            task.advance()
    return fmean(losses)


def _partners(
    writer: BidirectionalSeq2Seq | None, ids: Tensor, mask: Tensor, hidden: Tensor
) -> Partners | None:
    if writer is None:
        return None
    source = ids.masked_fill(hidden, writer.vocabulary.mask_id)
    return pseudo_targets(writer, source, mask, time=ids.shape[1] + 1)


def _loss(
    model: BidirectionalSeq2Seq,
    ids: Tensor,
    mask: Tensor,
    hidden: Tensor,
    partners: Partners | None,
) -> Tensor:
    marks = {"start_id": model.start_id, "end_id": model.end_id}
    targets: BidirectionalTargets = make_bidirectional(ids, mask, **marks)
    source = ids.masked_fill(hidden, model.vocabulary.mask_id)
    # Words of the batch are padded to the longest of all: cut off what none of them has.
    time = int(targets.lengths.max())
    if partners is not None:
        left, right, *steps = partners
        partners = Partners(left[:, : time + 1], right[:, : time + 1], *steps)
    left, right = model(
        source[:, :time],
        mask[:, :time],
        targets.left_in,
        targets.right_in,
        targets.lengths,
        partners=partners,
    )
    return bidirectional_cross_entropy(left, right, targets)


@torch.no_grad()
def _measured(
    model: BidirectionalSeq2Seq,
    words: Words,
    training: float,
    writer: BidirectionalSeq2Seq | None,
) -> Restored:
    ids, mask = words.test
    partners = _partners(writer, ids, mask, words.hidden)
    source = ids.masked_fill(words.hidden, model.vocabulary.mask_id)
    found = bidirectional_beam_search(
        model,
        source,
        mask=mask,
        lengths=mask.sum(1),
        width=3,
        max_new_tokens=ids.shape[1] + 4,
        both=True,
    )
    wanted = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    ends = {model.start_id, model.end_id}

    def letters(side: DecodeResult) -> list[list[int]]:
        return [[i for i in row if i not in ends] for row in side.tolist()]

    chosen = [a == b for a, b in zip(letters(found), wanted, strict=True)]
    return Restored(
        training,
        float(_loss(model, ids, mask, words.hidden, partners)),
        _shares(letters(found.left), wanted),
        _shares(letters(found.right), wanted),
        fmean(chosen),
        float(found.from_right.float().mean()),
        sum(p.numel() for p in model.parameters()),
    )


def _shares(found: list[list[int]], wanted: list[list[int]]) -> Shares:
    pairs = list(zip(found, wanted, strict=True))

    def right(a: list[int], b: list[int], count: int) -> float:
        return sum(x == y for x, y in zip(a[:count], b[:count], strict=False)) / count

    return Shares(
        fmean(right(a, b, 4) for a, b in pairs),
        fmean(right(a[::-1], b[::-1], 4) for a, b in pairs),
        fmean(right(a, b, len(b)) for a, b in pairs),
        fmean(a == b for a, b in pairs),
    )
