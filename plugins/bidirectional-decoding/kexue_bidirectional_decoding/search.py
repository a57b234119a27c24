"""Beam search from both ends in step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

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
    _check(
        scorer, (prompt, mask), lengths, width=width, steps=max_new_tokens, penalty=length_penalty
    )
    found = _Found.nothing(len(prompt), max_new_tokens, prompt.device)
    if len(prompt) and max_new_tokens:
        _search(scorer, (prompt, mask, lengths), found, width, length_penalty, both=both)
    if bool(found.scores.isnan().any()):
        raise WorkError(
            "The model's scores are NaN. Look at its weights, or compute in another dtype."
        )
    from_right = found.good[1] > found.good[0]  # of equals the one from the left, as in the post
    left, right = found.results(scorer.end_id)
    time = max(side.sequences.shape[1] for side in (left, right))
    wide = [F.pad(s.sequences, (0, time - s.sequences.shape[1]), value=PAD) for s in (left, right)]
    sequences = torch.where(from_right[:, None], wide[1], wide[0])
    used = int((sequences != PAD).any(0).sum())
    return BidirectionalResult(
        sequences[:, :used],
        torch.where(from_right, found.scores[1], found.scores[0]),
        torch.where(from_right, found.ended[1], found.ended[0]),
        from_right=from_right,
        left=left,
        right=right,
    )


def _search(
    scorer: BidirectionalScorer,
    sources: tuple[Tensor, Tensor, Tensor | None],
    found: _Found,
    width: int,
    penalty: float,
    *,
    both: bool,
) -> None:
    live = torch.arange(len(sources[0]), device=sources[0].device)
    cache = scorer.begin(*sources)
    logits = scorer.pairs(cache)
    _check_ends(scorer, logits.shape[-1])
    sides = _Sides(scorer, logits, penalty)
    steps = found.tokens.shape[2]
    for step in range(steps):
        # Both are scored before either goes on: the other's hypotheses are those of the last step.
        places = sides.extend(_averaged(logits, sides.there), width)
        over = sides.done(both=both) if step + 1 < steps else torch.ones_like(live).bool()
        if over is not None and bool(over.any()):
            found.keep(live, over, sides)
            if bool(over.all()):
                return
            kept = (~over).nonzero()[:, 0]
            live, places = live[kept], places[:, kept]
            sides.keep(kept)
            cache = scorer.select(cache, places)
        elif places.numel() > 2 * len(live) or logits.shape[2] > 1:
            cache = scorer.select(cache, places)  # a single hypothesis goes on from itself
        cache = scorer.read(cache, sides.tokens[..., -1], sides.stopped)
        logits = scorer.pairs(cache)


def _averaged(
    logits: Float[Tensor, "side row own partner token"],
    there: Bool[Tensor, "side row own"] | None,
) -> Float[Tensor, "side row own token"]:
    """Return log-probabilities of the mean over those of the partner's hypotheses that exist."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    alone = logits.shape[3] == 1 or logits.stride(3) == 0  # or it does not look at the partner
    if alone:
        logits = logits[:, :, :, :1]
    probable = logits.log_softmax(-1)
    if math.isnan(float(probable[..., 0].sum())):  # a NaN among them, or nothing that is possible
        nothing = logits.amax(-1, keepdim=True) == -math.inf
        probable = probable.masked_fill(nothing, -math.inf)
    if alone:
        return probable[:, :, :, 0]
    if there is None:
        return probable.logsumexp(3) - math.log(logits.shape[3])
    partners = there.flip(0)
    probable = probable.masked_fill(~partners[:, :, None, :, None], -math.inf)
    count = partners.sum(2).clamp(min=1).to(logits.dtype)
    return probable.logsumexp(3) - count.log()[:, :, None, None]


class _Sides:
    """The hypotheses of both sides, of all rows that are not done; best first.

    Args:
        scorer: What ends them, and what never comes.
        logits: Of the first tokens.
        penalty: Exponent of the length.
    """

    def __init__(self, scorer: BidirectionalScorer, logits: Tensor, penalty: float) -> None:
        rows, size, device = logits.shape[1], logits.shape[-1], logits.device
        half = logits.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else logits.dtype
        self.penalty = penalty
        self.last = torch.tensor(scorer.ends, device=device)[:, None, None]
        token = torch.arange(size, device=device)
        # What has ended has one continuation, itself, and stands at the place of its last token.
        self.itself = torch.where(token == self.last[..., None], 0.0, -math.inf).to(dtype)
        self.never: Tensor | None = None
        if scorer.begins is not None:
            self.never = token == torch.tensor(scorer.begins, device=device)[:, None, None, None]
        self.scores = torch.zeros(2, rows, 1, dtype=dtype, device=device)
        self.tokens = torch.zeros(2, rows, 1, 0, dtype=torch.long, device=device)
        self.going = torch.ones(2, rows, 1, dtype=torch.bool, device=device)
        # Most steps have no hypothesis that has ended or does not exist, and need no masks.
        self.stopped: Tensor | None = None
        self.there: Tensor | None = None

    @property
    def good(self) -> Float[Tensor, "side row own"]:
        """What hypotheses are compared by."""
        return self._penalised(self.scores, (self.tokens != PAD).sum(-1))

    def _penalised(self, scores: Tensor, lengths: Tensor) -> Tensor:
        return scores / lengths.clamp(min=1).to(scores.dtype) ** self.penalty

    def extend(self, probable: Float[Tensor, "side row own token"], width: int) -> Tensor:
        """Keep the best continuations.

        Returns:
            Which hypothesis each goes on from, ``[side, row, own]``, counted through both sides.
        """
        _, rows, own, size = probable.shape
        total = probable + self.scores[..., None]
        if self.never is not None:
            total.masked_fill_(self.never, -math.inf)
        if self.stopped is not None:
            stays = self.scores[..., None] + self.itself
            total = torch.where(self.stopped[..., None], stays, total)
        good = total
        if self.penalty:
            lengths = (self.tokens != PAD).sum(-1) + self.going
            good = self._penalised(total, lengths[..., None])
        best, flat = good.flatten(2).topk(min(width, own * size), 2)
        self.scores = total.flatten(2).gather(2, flat) if self.penalty else best
        first = torch.arange(0, 2 * rows * own, own, device=flat.device).view(2, rows, 1)
        places = flat.div(size, rounding_mode="floor") + first
        tokens = flat.remainder(size)[..., None]
        going = tokens[..., 0] != self.last
        if self.stopped is not None:
            went = self.going.flatten()[places]
            tokens = tokens.masked_fill(~went[..., None], PAD)
            going &= went
        self.tokens = torch.cat([self.tokens.flatten(0, 2)[places], tokens], 3)
        self.going = going
        self._look()
        return places

    def _look(self) -> None:
        self.stopped = None if bool(self.going.all()) else ~self.going
        worst = float(self.scores[..., -1].min())
        self.there = None if worst > -math.inf else self.scores > -math.inf

    def done(self, *, both: bool) -> Bool[Tensor, " row"] | None:
        """Return which rows are done; None if no row is."""
        if self.stopped is None and self.there is None:
            return None
        left, right = good = self.good[..., 0]
        nothing = good.isneginf()
        l_ended, r_ended = ~self.going[..., 0] & ~nothing
        over: Tensor
        if both:
            over = (l_ended | nothing[0]) & (r_ended | nothing[1])
        else:
            over = (l_ended & (left >= right)) | (r_ended & (right >= left))
        return over | nothing.all(0)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some rows."""
        self.scores, self.going = self.scores[:, rows], self.going[:, rows]
        self.tokens = self.tokens[:, rows]
        self._look()


@dataclass(slots=True)
class _Found:
    """The best of both sides, of all rows."""

    good: Tensor  # [side, row]
    scores: Tensor
    tokens: Tensor
    ended: Tensor

    @classmethod
    def nothing(cls, rows: int, time: int, device: torch.device) -> _Found:
        worst = torch.full((2, rows), -math.inf, device=device)
        tokens = torch.full((2, rows, time), PAD, dtype=torch.long, device=device)
        return cls(worst, worst, tokens, torch.zeros(2, rows, dtype=torch.bool, device=device))

    def keep(self, live: Tensor, over: Bool[Tensor, " row"], sides: _Sides) -> None:
        """Take the best hypotheses of rows that are done."""
        rows = live[over]
        good, scores = sides.good[:, over, 0], sides.scores[:, over, 0]
        if self.scores.dtype != scores.dtype:
            self.good, self.scores = self.good.to(scores.dtype), self.scores.to(scores.dtype)
        self.good = self.good.index_copy(1, rows, good)
        self.scores = self.scores.index_copy(1, rows, scores)
        nothing = good.isneginf()
        self.ended[:, rows] = ~sides.going[:, over, 0] & ~nothing
        tokens = sides.tokens[:, over, 0].masked_fill(nothing[..., None], PAD)
        self.tokens[:, rows, : tokens.shape[2]] = tokens

    def results(self, end_id: int) -> tuple[DecodeResult, DecodeResult]:
        """Return texts of both sides, from left to right, with the end token where they end."""
        left, right = self.tokens
        # The last mark stays where the text ends, and becomes the end token.
        lengths = (right != PAD).sum(1)
        right = reverse_rows(right, lengths - self.ended[1].long())
        if right.shape[1]:
            last = (lengths - 1).clamp(min=0)[:, None]
            ends = torch.where(self.ended[1][:, None], end_id, right.gather(1, last))
            right = right.scatter(1, last, ends)
        used = [int((tokens != PAD).any(0).sum()) for tokens in (left, right)]
        return (
            DecodeResult(left[:, : used[0]], self.scores[0], self.ended[0]),
            DecodeResult(right[:, : used[1]], self.scores[1], self.ended[1]),
        )


# -- arguments -----------------------------------------------------------------------------------


def _check(
    scorer: BidirectionalScorer,
    sources: tuple[Tensor, Tensor],
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
    prompt, mask = sources
    longest = int(mask.sum(1).max()) if mask.numel() else 0
    room = scorer.room(longest)
    if room is not None and steps > room:
        raise ArgumentError(
            f"`max_new_tokens` must be at most {room}, as the model has room for, behind a prompt "
            f"of {longest} tokens. Found {steps}.",
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


def _check_ends(scorer: BidirectionalScorer, size: int) -> None:
    for name, token in zip(("left", "right"), scorer.ends, strict=True):
        if not 0 <= token < size:
            argument = "end_id" if token == scorer.end_id else "start_id"
            raise ArgumentError(
                f"`{argument}` must be one of the model's {size} tokens. Found {token}: no text "
                f"from the {name} would ever end.",
                argument=argument,
            )
