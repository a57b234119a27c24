"""Sequences to the flat arrays of their prefix tree, level by level, without a loop over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD

__all__ = ["Arrays", "Flat", "bits_of", "flatten", "grow"]

Ints = NDArray[np.int64]


class Flat(NamedTuple):
    """Sequences, one after the other.

    Args:
        tokens: Shape ``[token]``.
        lengths: Shape ``[sequence]``.
    """

    tokens: Ints
    lengths: Ints

    def padded(self) -> Ints:
        """Return them as ``[sequence, time]``, right-padded."""
        inside = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        matrix = np.full(inside.shape, PAD)
        matrix[inside] = self.tokens
        return matrix


class Arrays(NamedTuple):
    """A tree whose nodes are numbered level by level, siblings by token; see ``TrieIndex``.

    Args:
        keys: Shape ``[edge]``, ascending: parent << bits | token; edge e leads to node e + 1.
        num_tokens: One more than the greatest id.
        levels: Shape ``[level + 1]``: the first node of each level, and how many nodes there are.
        leaves: Shape ``[entry]``, ascending: the node that ends each.
        firsts: Shape ``[entry + 1]``: where the rows of each entry begin.
        rows: Shape ``[row]``: the sequences that are each entry, ascending within it.
    """

    keys: Ints
    num_tokens: int
    levels: list[int]
    leaves: Ints
    firsts: Ints
    rows: Ints


def flatten(sequences: Any, end_id: int, *, may_be_none: bool = False) -> Flat:
    """Return sequences of any accepted form, without the end token.

    Args:
        sequences: Sequences of ids; or an array or tensor ``[sequence, time]`` of whole numbers,
            right-padded with :data:`~kexue.core.component.PAD`.
        end_id: The end token, at most once and last in a sequence.
        may_be_none: Whether there may be no sequence.

    Raises:
        ArgumentError: If there is none, or an id is negative, no whole number, or the end token
            inside a sequence.
    """
    if isinstance(sequences, Tensor | np.ndarray):
        flat = _from_matrix(sequences.cpu().numpy() if isinstance(sequences, Tensor) else sequences)
    else:
        flat = _from_lists(sequences)
    if not len(flat.lengths) and not may_be_none:
        raise ArgumentError(
            "`sequences` must hold at least one sequence: nothing can be decoded from an empty "
            "database. Found none.",
            argument="sequences",
        )
    _check_ids(flat)
    return _without_end(flat, end_id)


def _from_matrix(matrix: NDArray[Any]) -> Flat:
    if matrix.ndim != 2 or matrix.dtype.kind not in "iu":
        raise ArgumentError(
            f"`sequences` as an array must be whole numbers of shape [sequence, time], padded with "
            f"{PAD}. Found {matrix.dtype} of shape {list(matrix.shape)}.",
            argument="sequences",
        )
    real = matrix != PAD
    lengths = real.sum(1)
    gaps = np.flatnonzero((real != (np.arange(matrix.shape[1]) < lengths[:, None])).any(1))
    if len(gaps):
        raise ArgumentError(
            f"`sequences` must be padded with {PAD} at the end alone. Row {gaps[0]} has {PAD} "
            f"before an id.",
            argument="sequences",
        )
    return Flat(matrix[real].astype(np.int64), lengths.astype(np.int64))


def _from_lists(sequences: Iterable[Sequence[int]]) -> Flat:
    try:
        sequences = sequences if isinstance(sequences, list | tuple) else list(sequences)
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        # `index` refuses 1.5, which numpy would cut off
        ids = map(index, chain.from_iterable(sequences))
        tokens = np.fromiter(ids, dtype=np.int64, count=int(lengths.sum()))
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(
            f"`sequences` must be sequences of token ids, whole numbers: {error}. Encode text "
            f"with the model's vocabulary first.",
            argument="sequences",
        ) from error
    return Flat(tokens, lengths)


def _check_ids(flat: Flat) -> None:
    wrong = np.flatnonzero((flat.tokens < 0) | (flat.tokens >= 2**31))
    if len(wrong):
        row = int(np.searchsorted(np.cumsum(flat.lengths), wrong[0], side="right"))
        raise ArgumentError(
            f"`sequences` must hold token ids from 0 to 2**31 - 1. Found {flat.tokens[wrong[0]]} "
            f"in sequence {row}.",
            argument="sequences",
        )


def _without_end(flat: Flat, end_id: int) -> Flat:
    """Drop an end token that stands last."""
    ends = flat.tokens == end_id
    if not ends.any():
        return flat
    stops = np.cumsum(flat.lengths)
    filled = flat.lengths > 0
    last = np.zeros_like(ends)
    last[stops[filled] - 1] = True
    inside = np.flatnonzero(ends & ~last)
    if len(inside):
        row = int(np.searchsorted(stops, inside[0], side="right"))
        raise ArgumentError(
            f"`sequences` may hold the end token `end_id` {end_id} only at their end. Found it "
            f"inside sequence {row}.",
            argument="sequences",
        )
    lengths = flat.lengths.copy()
    lengths[filled] -= ends[stops[filled] - 1]
    return Flat(flat.tokens[~ends], lengths)


def grow(flat: Flat, end_id: int) -> Arrays:
    """Return the tree of some sequences, each ended by the end token.

    A level is the sorted pairs of node and token of the sequences that reach it, without
    repetition; what was sorted above is nearly in order below. Time is that of sorting the tokens
    of all sequences once, at worst; memory some numbers per sequence.

    Args:
        flat: The sequences.
        end_id: What ends each.
    """
    starts = np.cumsum(flat.lengths) - flat.lengths
    num_tokens = max(int(flat.tokens.max(initial=0)), end_id) + 1
    bits = bits_of(num_tokens)
    leaves = np.zeros(len(flat.lengths), dtype=np.int64)
    live = np.arange(len(flat.lengths))  # the sequences that reach the level, by node
    node = np.zeros_like(live)  # the node of each
    levels, keys = [0, 1], []
    for depth in range(int(flat.lengths.max()) + 1):
        ended = flat.lengths[live] == depth
        token = np.full(len(live), end_id)
        token[~ended] = flat.tokens[starts[live[~ended]] + depth]
        key = (node << bits) + token
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            key, live, ended = key[order], live[order], ended[order]
        first = np.ones(len(key), dtype=bool)
        np.not_equal(key[1:], key[:-1], out=first[1:])
        keys.append(key[first])
        node = levels[-1] - 1 + np.cumsum(first)
        leaves[live[ended]] = node[ended]
        levels.append(levels[-1] + len(keys[-1]))
        live, node = live[~ended], node[~ended]
    rows = np.argsort(leaves, kind="stable")
    leaves, counts = np.unique(leaves, return_counts=True)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    return Arrays(np.concatenate(keys), num_tokens, levels, leaves, firsts, rows)


def bits_of(num_tokens: int) -> int:
    """Return how many bits of a key are the token."""
    return max(1, (num_tokens - 1).bit_length())
