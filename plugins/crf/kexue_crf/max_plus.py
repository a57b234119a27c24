r"""Best scores of all prefixes and the way back: the recursions of Viterbi decoding.

.. math::
    score_{t+1}[j] = \max_i (score_t[i] + g_{t+1}[i, j]) + h_{t+1}[j]

Only the maxima are kept on the way forward; which tag attained one is found again on the way
back, for the one tag that was chosen. Step by step that is six small operations per position.

Where tag³ tables are small (``batch * tag**3`` at most :data:`CHUNK_LIMIT`: four tags, or a few
sentences) the chain is cut into about sqrt(time) pieces that advance together: the prefixes of
each piece as (max, +) products, then piece after piece, then all positions at once. That is some
``8 sqrt(time)`` operations instead of ``6 time``.

Everything is time-major, ``scores`` ``[time, batch, tag]``, the chains without gaps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue_crf.chains import Chains

__all__ = ["CHUNK_LIMIT", "Best", "Steps", "best_paths"]

CHUNK_LIMIT = 2**12
"""Up to this ``batch * tag**3`` pieces are cheaper than steps (measured on a CPU)."""

_BLOCK = 2**18
"""Sums are made and reduced in blocks of about this many numbers, so that they stay in cache."""


class Steps:
    """The transitions into each step of each chain.

    Args:
        transitions: ``[from, to]``, or ``[batch, time - 1, from, to]`` by position.
        chains: Which position is which step.
    """

    def __init__(self, transitions: Tensor, chains: Chains) -> None:
        self.transitions, self.chains = transitions, chains
        self.shared = transitions.dim() == 2
        # Where positions are masked, a step's matrices stand at different positions.
        gaps = not self.shared and chains.mask is not None
        self._flat = transitions.reshape(-1, *transitions.shape[2:]) if gaps else None

    def into(self, step: int) -> Tensor:
        """Return ``[batch, from, to]``, or ``[from, to]`` where it is shared."""
        if self.shared:
            return self.transitions
        if self._flat is None:
            return self.transitions[:, step - 1]
        # Into position p of row b leads matrix p - 1 of the row.
        rows = (self.chains.rows[step] - self.chains.batch - 1).clamp_(min=0)
        return self._flat.index_select(0, rows)

    def all(self) -> Float[Tensor, "steps batch tag tag"]:
        """Return the transitions into the steps 1, 2, …, where they are by position."""
        return torch.stack([self.into(t) for t in range(1, len(self.chains.rows))])


class Best(NamedTuple):
    """The best path of each chain, and its score."""

    path: Int[Tensor, "time batch"]
    score: Float[Tensor, " batch"]


def best_paths(scores: Float[Tensor, "time batch tag"], steps: Steps, end: Tensor | None) -> Best:
    """Return the best path of each chain; behind a chain's end, anything.

    Args:
        scores: Emissions with the start scores in the first step. Overwritten.
        steps: The transitions.
        end: Score of each tag as the last, or None.
    """
    time, batch, tags = scores.shape
    if time > 2 and batch * tags**3 <= CHUNK_LIMIT:
        return _in_chunks(scores, steps, end)
    if steps.shared:
        _accumulate_shared(scores, steps.transitions)
    else:
        _accumulate(scores, steps)
    score, tag = _at_end(scores, steps.chains, end)
    return Best(_trace(scores, steps, tag), score)


def _at_end(scores: Tensor, chains: Chains, end: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return score and last tag of the best path, once ``scores`` are those of prefixes."""
    _, batch, tags = scores.shape
    rows = torch.add(chains.batch, chains.last, alpha=batch)
    last = scores.view(-1, tags).index_select(0, rows)
    best = (last if end is None else last.add_(end)).max(1)
    return best.values, best.indices


def _accumulate(scores: Tensor, steps: Steps) -> None:
    """Turn emissions into the best scores of the prefixes that end in each tag, in place."""
    current = scores.unbind(0)
    for t in range(1, len(current)):
        current[t].add_((current[t - 1].unsqueeze(2) + steps.into(t)).amax(1))


def _accumulate_shared(scores: Tensor, transitions: Tensor) -> None:
    """The same with one matrix for all: ``from`` outermost, so that maxima are of long rows."""
    _, batch, tags = scores.shape
    blocks = torch.split(transitions.unsqueeze(1), max(1, _BLOCK // (batch * tags)))
    table = scores.new_empty(len(blocks[0]), batch, tags)
    best, part = scores.new_empty(2, batch, tags).unbind(0)
    current = scores.unbind(0)
    leaving = [group.unbind(0) for group in torch.split(_columns(scores), len(table), 1)]
    for t in range(1, len(current)):
        torch.add(leaving[0][t - 1], blocks[0], out=table)
        torch.amax(table, 0, out=best)
        for others, block in zip(leaving[1:], blocks[1:], strict=True):
            sums = table[: len(block)]
            torch.add(others[t - 1], block, out=sums)
            torch.maximum(best, torch.amax(sums, 0, out=part), out=best)
        current[t].add_(best)


def _columns(scores: Tensor) -> Tensor:
    """Return a view ``[time, tag, batch, 1]``."""
    return scores.transpose(1, 2).unsqueeze(3)


def _trace(scores: Tensor, steps: Steps, last_tag: Tensor) -> Tensor:
    """Follow the best path backwards, choosing again only for the tag that was chosen."""
    time, batch, tags = scores.shape
    path = last_tag.new_empty(time, batch)
    path[-1] = last_tag
    # From a chain's end on +inf makes its last tag the choice, so that no step asks for lengths.
    reached = torch.arange(time, device=scores.device).unsqueeze(1) >= steps.chains.last
    is_last = torch.arange(tags, device=scores.device) == last_tag.unsqueeze(1)
    scores.masked_fill_(reached.unsqueeze(2) & is_last, torch.inf)
    if not steps.shared:
        return _trace_by_position(scores, steps, path)
    into = steps.transitions.T.contiguous()
    sums = scores.new_empty(batch, tags)
    rows, current = path.unbind(0), scores.unbind(0)
    for t in range(time - 2, -1, -1):
        torch.index_select(into, 0, rows[t + 1], out=sums)
        torch.argmax(sums.add_(current[t]), 1, out=rows[t])
    return path


def _trace_by_position(scores: Tensor, steps: Steps, path: Tensor) -> Tensor:
    tags = scores.shape[2]
    for t in range(len(path) - 2, -1, -1):
        into = path[t + 1].view(-1, 1, 1).expand(-1, tags, 1)
        path[t] = steps.into(t + 1).gather(2, into).squeeze(2).add_(scores[t]).argmax(1)
    return path


def _in_chunks(scores: Tensor, steps: Steps, end: Tensor | None) -> Best:
    """The same in pieces.

    Step ``1 + c * length + k`` is number k of piece c; pieces and rows lie innermost, together,
    so that every operation is on long rows: ``[k, from, to, piece · row]``.
    """
    time, batch, tags = scores.shape
    length = math.isqrt(time - 1)
    fold = _Fold(length, -(-(time - 1) // length), batch)
    edges = steps.transitions.reshape(1, tags, tags, 1) if steps.shared else fold(steps.all())
    prefixes = edges + fold(scores[1:]).unsqueeze(1)
    starts = _starts(scores[0], _multiply_up(prefixes), fold.pieces)
    after = prefixes.add_(starts.unsqueeze(2)).amax(1)
    scores[1:] = fold.back(after)[: time - 1]
    score, tag = _at_end(scores, steps.chains, end)
    before = torch.cat([starts, after[:-1]])
    choices = _first_argmax(before.unsqueeze(2) + edges)
    return Best(_trace_in_chunks(choices, fold, tag, steps.chains), score)


def _multiply_up(prefixes: Tensor) -> Tensor:
    """Turn steps into (max, +) products of each piece's steps so far, in place; return the last."""
    products = prefixes.unbind(0)
    tags = prefixes.shape[1]
    table = prefixes.new_empty(tags, *products[0].shape)
    for k in range(1, len(products)):
        torch.add(products[k - 1].unsqueeze(2), products[k], out=table)
        torch.amax(table, 1, out=products[k])
    return products[-1]


def _starts(first: Tensor, whole: Tensor, pieces: int) -> Tensor:
    """Return the best scores before each piece, ``[1, tag, piece · row]``."""
    batch, tags = first.shape
    whole = whole.view(tags, tags, pieces, batch)
    starts = first.new_empty(tags, pieces, batch)
    starts[:, 0] = first.T
    for c in range(1, pieces):
        starts[:, c] = (starts[:, c - 1].unsqueeze(1) + whole[:, :, c - 1]).amax(0)
    return starts.view(1, tags, -1)


class _Fold:
    """Between steps and pieces.

    Args:
        length: Steps of a piece.
        pieces: Number of pieces.
        batch: Number of rows.
    """

    def __init__(self, length: int, pieces: int, batch: int) -> None:
        self.length, self.pieces, self.batch = length, pieces, batch

    def __call__(self, values: Tensor) -> Tensor:
        """Turn ``[steps, batch, …]`` into ``[length, …, pieces · batch]``; missing steps are 0."""
        missing = self.length * self.pieces - len(values)
        if missing:
            values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
        values = values.reshape(self.pieces, self.length, *values.shape[1:])
        return values.movedim((0, 2), (-2, -1)).flatten(-2)

    def back(self, values: Tensor) -> Tensor:
        """Turn ``[length, …, pieces · batch]`` into ``[steps, batch, …]``."""
        values = values.reshape(*values.shape[:-1], self.pieces, self.batch)
        return values.movedim((-2, -1), (0, 2)).flatten(0, 1)


def _first_argmax(sums: Tensor) -> Tensor:
    """Return the lowest index of the maximum in axis 1.

    By three passes that are vectorised along the last axis, where ``argmax`` of an outer axis
    takes one number at a time. An index is found even where a masked position brought a NaN.
    """
    count = sums.shape[1]
    rank = torch.arange(count, 0, -1, dtype=torch.int16, device=sums.device).view(-1, 1, 1)
    hits = (sums == sums.amax(1, keepdim=True)) * rank
    return (count - hits.amax(1).long()).clamp_(max=count - 1)


def _trace_in_chunks(choices: Tensor, fold: _Fold, last_tag: Tensor, chains: Chains) -> Tensor:
    """Compose choices within the pieces, then walk over the pieces."""
    length, tags, _ = choices.shape
    step = torch.arange(fold.length * fold.pieces, device=choices.device)
    reached = fold(step.unsqueeze(1) >= chains.last).unsqueeze(1)
    choices = torch.where(reached, last_tag.repeat(fold.pieces), choices)
    for k in range(length - 2, -1, -1):
        choices[k] = choices[k].gather(0, choices[k + 1])
    whole = choices[0].view(tags, fold.pieces, fold.batch)
    ends = last_tag.repeat(fold.pieces, 1)
    for c in range(fold.pieces - 1, 0, -1):
        ends[c - 1] = whole[:, c].gather(0, ends[c : c + 1])
    ends = ends.view(1, 1, -1).expand(length, 1, -1)
    path = fold.back(choices.gather(1, ends).squeeze(1))
    return torch.cat([path[: len(chains.rows) - 1], last_tag.unsqueeze(0)])
