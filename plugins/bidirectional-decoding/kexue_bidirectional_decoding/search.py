"""Beam search from both ends in step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.errors import WorkError
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language import check_prompt
from kexue_bidirectional_decoding.scorer import BidirectionalScorer
from kexue_bidirectional_decoding.targets import reverse_rows

__all__ = ["BidirectionalResult", "bidirectional_beam_search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BidirectionalResult(DecodeResult):
    """What a search from both ends found; all texts read from left to right.

    Args:
        sequences: Shape ``[batch, time]``, int64, the end token included where a text has ended,
            right-padded with PAD. One from the right that has not ended is the end of a text.
        scores: Shape ``[batch]``: sum of the logarithms of averaged probabilities, in nats.
        ended: Shape ``[batch]``: whether the text is whole.
        from_right: Shape ``[batch]``: whether the side that writes from the right was better.
        left: The best of the side from the left.
        right: The best of the side from the right, turned round.
    """

    from_right: Tensor
    left: DecodeResult
    right: DecodeResult


@torch.no_grad()
def bidirectional_beam_search(
    scorer: BidirectionalScorer,
    prompt: Int[Tensor, "row time"],
    *,
    width: int = 3,
    max_new_tokens: int = 64,
    mask: Bool[Tensor, "row time"] | None = None,
    lengths: Int[Tensor, " row"] | None = None,
    length_penalty: float = 0.0,
    both: bool = False,
) -> BidirectionalResult:
    """Write texts from both ends in step, and return the better of the two.

    Each side keeps ``width`` hypotheses. A token's probability is the mean over the hypotheses of
    the other side; those with the greatest sums of its logarithm are kept. What has ended keeps its
    place and score. A row is done once the best of one side has ended and no hypothesis of the
    other is better; after ``max_new_tokens`` the better one is returned, ended or not.

    Args:
        scorer: The two decoders.
        prompt: Sources.
        width: Hypotheses per side; 1 is greedy search.
        max_new_tokens: Tokens per side at most, the last mark included.
        mask: True at real tokens of the prompt; all are by default.
        lengths: Tokens that each text is known to have, for models that were trained without the
            states that leak; unknown by default.
        length_penalty: Exponent of the length, the last mark included, that sums are divided by
            when they are compared; 0 compares sums.
        both: Go on until the best of both sides have ended, which costs steps. Without a penalty
            it changes ``left`` or ``right``, never the better of them.

    Raises:
        ArgumentError: If an argument is out of range, or the model has no room for the tokens.
        WorkError: If the model's scores are NaN.

    References:
        https://kexue.fm/archives/6877, section “双向束搜索”.
    """
    mask = check_prompt(prompt, mask)
    _check(scorer, prompt, lengths, width=width, steps=max_new_tokens, penalty=length_penalty)
    rows, device = len(prompt), prompt.device
    found = tuple(_Found.nothing(rows, max_new_tokens, device) for _ in range(2))
    if rows and max_new_tokens:
        _search(scorer, (prompt, mask, lengths), found, width, length_penalty, both=both)
    left, right = found
    if bool((left.scores.isnan() | right.scores.isnan()).any()):
        raise WorkError(
            "The model's scores are NaN. Look at its weights, or compute in another dtype."
        )
    from_right = right.good > left.good  # of equals the one from the left, as in the post
    sides = left.result(scorer.end_id), right.result(scorer.end_id, turn=True)
    time = max(side.sequences.shape[1] for side in sides)
    wide = [
        torch.nn.functional.pad(s.sequences, (0, time - s.sequences.shape[1]), value=PAD)
        for s in sides
    ]
    sequences = torch.where(from_right[:, None], wide[1], wide[0])
    used = int((sequences != PAD).any(0).sum())
    return BidirectionalResult(
        sequences[:, :used],
        torch.where(from_right, right.scores, left.scores),
        torch.where(from_right, right.ended, left.ended),
        from_right=from_right,
        left=sides[0],
        right=sides[1],
    )


def _search(
    scorer: BidirectionalScorer,
    sources: tuple[Tensor, Tensor, Tensor | None],
    found: tuple[_Found, ...],
    width: int,
    penalty: float,
    *,
    both: bool,
) -> None:
    rows, device = len(sources[0]), sources[0].device
    live = torch.arange(rows, device=device)
    caches: list[Any] = list(scorer.begin(*sources))
    marks = (scorer.start_id, scorer.end_id)
    going = torch.ones(rows, 1, dtype=torch.bool, device=device)
    for i, mark in enumerate(marks):
        tokens = torch.full((rows, 1), mark, dtype=torch.long, device=device)
        caches[i] = scorer.read(caches[i], tokens, going, right=bool(i))
    sides: list[_Side] = []
    steps = found[0].tokens.shape[1]
    for step in range(steps):
        logits = scorer.pairs(*caches)
        if not sides:
            _check_marks(marks, logits[0].shape[-1])
            sides = [_Side(marks[1 - i], marks[i], logits[i], penalty) for i in range(2)]
        # Both are scored before either goes on: the other's hypotheses are those of the last step.
        probable = [_averaged(logits[i], sides[1 - i].scores > -math.inf) for i in range(2)]
        parents = [sides[i].extend(probable[i], width) for i in range(2)]
        best = [side.best() for side in sides]
        over = _done(best, both=both) if step + 1 < steps else torch.ones_like(live).bool()
        for i, side in enumerate(sides):
            found[i].keep(live[over], side.of(over), best[i][1][over])
        if bool(over.all()):
            return
        keep = (~over).nonzero()[:, 0]
        live = live[keep]
        for i, side in enumerate(sides):
            beams = logits[i].shape[1]
            places = parents[i] + beams * torch.arange(len(over), device=device)[:, None]
            cache = scorer.select(caches[i], places[keep])
            side.keep(keep)
            caches[i] = scorer.read(cache, side.tokens[..., -1], side.going, right=bool(i))


def _averaged(
    logits: Float[Tensor, "row own partner token"], there: Bool[Tensor, "row partner"]
) -> Float[Tensor, "row own token"]:
    """Return log-probabilities of the mean over those of the partner's hypotheses that exist."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    if logits.shape[2] == 1 or logits.stride(2) == 0:  # one, or it does not look at the partner
        alone: Tensor = logits - total.masked_fill(total == -math.inf, 0.0)
        return alone[:, :, 0]
    missing = ~there[:, None, :, None]
    total = total.masked_fill(missing | (total == -math.inf), math.inf)
    count = there.sum(1).clamp(min=1).to(logits.dtype)[:, None, None]
    return (logits - total).logsumexp(2) - count.log()


def _done(
    best: list[tuple[Float[Tensor, " row"], Int[Tensor, " row"], Bool[Tensor, " row"]]],
    *,
    both: bool,
) -> Bool[Tensor, " row"]:
    (left, _, l_ended), (right, _, r_ended) = best
    nothing = left.isneginf() & right.isneginf()
    if both:
        return nothing | ((l_ended | left.isneginf()) & (r_ended | right.isneginf()))
    return nothing | (l_ended & (left >= right)) | (r_ended & (right >= left))


class _Side:
    """The hypotheses of one side, of all rows that are not done.

    Args:
        last: What they end with.
        first: What they begin with, which never comes again.
        logits: Of the first token.
        penalty: Exponent of the length.
    """

    def __init__(self, last: int, first: int, logits: Tensor, penalty: float) -> None:
        rows, device = len(logits), logits.device
        half = logits.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else logits.dtype
        self.last, self.first, self.penalty = last, first, penalty
        self.scores = torch.zeros(rows, 1, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.going = torch.ones(rows, 1, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(rows, 1, 0, dtype=torch.long, device=device)

    @property
    def good(self) -> Float[Tensor, "row own"]:
        """What hypotheses are compared by."""
        return self.scores / self.lengths.clamp(min=1).to(self.scores.dtype) ** self.penalty

    def extend(self, probable: Float[Tensor, "row own token"], width: int) -> Tensor:
        """Keep the best continuations; return which hypothesis each of them goes on from."""
        size = probable.shape[2]
        total = self.scores[..., None] + probable
        total[..., self.first] = -math.inf
        # What has ended has one continuation, itself, and stands at the place of its last token.
        itself = torch.arange(size, device=total.device) == self.last
        stays = torch.where(itself, self.scores[..., None], -math.inf)
        total = torch.where(self.going[..., None], total, stays)
        lengths = self.lengths + self.going
        good = total / lengths[..., None].to(total.dtype) ** self.penalty
        flat = good.flatten(1).topk(min(width, good[0].numel()), 1).indices
        parents, tokens = flat // size, flat % size
        going = self.going.gather(1, parents)
        self.scores = total.flatten(1).gather(1, flat)
        self.lengths = lengths.gather(1, parents)
        tokens = tokens.masked_fill(~going, PAD)
        history = self.tokens.gather(1, parents[..., None].expand(-1, -1, self.tokens.shape[2]))
        self.tokens = torch.cat([history, tokens[..., None]], 2)
        self.going = going & (tokens != self.last)
        return parents

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return how good the best of each row is, which it is, and whether it has ended."""
        good, place = self.good.max(1)
        ended = ~self.going.gather(1, place[:, None])[:, 0]
        return good, place, ended & ~good.isneginf()

    def of(self, rows: Bool[Tensor, " row"]) -> tuple[Tensor, ...]:
        """Return goodness, scores, tokens, and what goes on, of some rows."""
        return self.good[rows], self.scores[rows], self.tokens[rows], self.going[rows]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some rows."""
        self.scores, self.lengths = self.scores[rows], self.lengths[rows]
        self.going, self.tokens = self.going[rows], self.tokens[rows]


@dataclass(slots=True)
class _Found:
    """The best of one side, of all rows."""

    good: Tensor
    scores: Tensor
    tokens: Tensor
    ended: Tensor

    @classmethod
    def nothing(cls, rows: int, time: int, device: torch.device) -> _Found:
        worst = torch.full((rows,), -math.inf, device=device)
        tokens = torch.full((rows, time), PAD, dtype=torch.long, device=device)
        return cls(worst, worst, tokens, torch.zeros(rows, dtype=torch.bool, device=device))

    def keep(self, rows: Tensor, side: tuple[Tensor, ...], place: Tensor) -> None:
        """Take the best hypothesis of rows that are done."""
        good, scores, tokens, going = (
            part[torch.arange(len(rows), device=rows.device), place] for part in side
        )
        if self.scores.dtype != scores.dtype:
            self.good, self.scores = self.good.to(scores.dtype), self.scores.to(scores.dtype)
        self.good = self.good.index_copy(0, rows, good)
        self.scores = self.scores.index_copy(0, rows, scores)
        there = ~good.isneginf()
        self.ended[rows] = ~going & there
        self.tokens[rows, : tokens.shape[1]] = tokens.masked_fill(~there[:, None], PAD)

    def result(self, end_id: int, *, turn: bool = False) -> DecodeResult:
        """Return texts from left to right, with the end token where they have one."""
        sequences = self.tokens
        if turn:
            # The last mark stays where the text ends, and becomes the end token.
            lengths = (sequences != PAD).sum(1)
            sequences = reverse_rows(sequences, lengths - self.ended.long())
            last = (lengths - 1).clamp(min=0)[:, None]
            if sequences.shape[1]:
                ends = torch.where(self.ended[:, None], end_id, sequences.gather(1, last))
                sequences = sequences.scatter(1, last, ends)
        used = int((sequences != PAD).any(0).sum())
        return DecodeResult(sequences[:, :used], self.scores, self.ended)


# -- arguments -----------------------------------------------------------------------------------


def _check(
    scorer: BidirectionalScorer,
    prompt: Tensor,
    lengths: Tensor | None,
    *,
    width: int,
    steps: int,
    penalty: float,
) -> None:
    if width < 1:
        raise ArgumentError(f"`width` must be at least 1. Found {width}.", argument="width")
    if steps < 0:
        raise ArgumentError(
            f"`max_new_tokens` must be at least 0. Found {steps}.",
            argument="max_new_tokens",
        )
    if not math.isfinite(penalty) or penalty < 0:
        raise ArgumentError(
            f"`length_penalty` must be a finite number of at least 0. Found {penalty}.",
            argument="length_penalty",
        )
    room = scorer.max_length
    if room is not None and steps > room + 1:  # the last mark is written, not read
        raise ArgumentError(
            f"`max_new_tokens` must be at most {room + 1}: the model reads {room} tokens per side. "
            f"Found {steps}.",
            argument="max_new_tokens",
        )
    if lengths is not None and (
        lengths.shape != prompt.shape[:1]
        or lengths.dtype.is_floating_point
        or (len(lengths) and int(lengths.min()) < 0)
    ):
        raise ArgumentError(
            f"`lengths` must be whole numbers of at least 0, of shape [{len(prompt)}]. Found "
            f"{lengths.dtype} of shape {list(lengths.shape)}.",
            argument="lengths",
        )


def _check_marks(marks: tuple[int, int], size: int) -> None:
    for name, token in zip(("start_id", "end_id"), marks, strict=True):
        if not 0 <= token < size:
            raise ArgumentError(
                f"`{name}` must be one of the model's {size} tokens. Found {token}: no text from "
                f"the {'right' if name == 'start_id' else 'left'} would ever end.",
                argument=name,
            )
