"""Arithmetic on the sorted keys of a tree, for a whole batch of nodes.

The same few lines work on tensors and on numpy arrays. Batches are some hundred numbers, for which
a call into numpy takes a fifth of the time of one into torch: what is in the host's memory is
therefore looked at as numpy's (:func:`view`), without a copy; what is on a device stays there. What
a step takes is the number of calls: where several forms would do, this is the one with the fewest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Tree", "copied", "expand", "match", "tensor", "view"]

Array = Any
"""A tensor, or a numpy array."""


def view(values: Tensor) -> Array:
    """Return a tensor as it is fastest to work with."""
    there = values.is_cpu and not values.requires_grad and values.dtype is not torch.bfloat16
    return values.numpy() if there else values


def copied(values: Array) -> Array:
    """Return a copy of what :func:`view` gave."""
    return values.copy() if isinstance(values, np.ndarray) else values.clone()


def tensor(values: Array) -> Tensor:
    """Return what :func:`view` gave as a tensor again."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


class Tree(NamedTuple):
    """The edges of a tree whose nodes are numbered level by level; edge e leads to node e + 1.

    Args:
        keys: Shape ``[edge]``, ascending: parent << bits | token. The last edge is the one that
            ended rows go on by: it leaves no node, and leads nowhere.
        bits: How many bits of a key are the token.
    """

    keys: Array
    bits: int

    def span(self, nodes: Array) -> tuple[Array, Array]:
        """Return the first edge of each node and how many there are.

        The last edge is left to nodes that have none, and to -1.

        Args:
            nodes: Shape ``[row]``.
        """
        pair: Array = _pair(self.bits)
        if not isinstance(nodes, np.ndarray):
            pair = torch.from_numpy(pair).to(nodes.device)
        both = (nodes << self.bits)[:, None] + pair
        # neighbours in one search: the second finds its way in the cache
        begin, end = _places(self.keys, both).T
        degree = end - begin
        none = degree == 0
        if isinstance(none, np.ndarray) and not np.count_nonzero(none):
            return begin, degree
        return begin + none * (len(self.keys) - 1 - begin), degree + none

    def follow(self, nodes: Array, tokens: Array) -> Array:
        """Return the node that a token leads to from each node, -1 if it may not follow.

        Args:
            nodes: Shape ``[row]``; -1 leads nowhere.
            tokens: Shape ``[row]``, any whole numbers.
        """
        # a token of more bits would be that of another node; what -1 gives is below all keys
        inside = tokens & (1 << self.bits) - 1
        wanted = (nodes << self.bits) + inside
        edge = _places(self.keys, wanted)  # the last key is above all that is wanted
        return (edge + 2) * ((self.keys[edge] == wanted) & (inside == tokens)) - 1

    def tokens(self, edges: Array) -> Array:
        """Return the token of each edge."""
        return self.keys[edges] & (1 << self.bits) - 1


def expand(begin: Array, degree: Array, stride: int = 1) -> tuple[Array, Array]:
    """Return the edges of some spans, and the row of each.

    Args:
        begin: Shape ``[row]``.
        degree: Shape ``[row]``.
        stride: What rows are multiplied by.
    """
    shift = begin - degree.cumsum(0) + degree  # by the edges of the rows above
    rows = _count(begin, len(begin) * stride, stride)
    if isinstance(begin, np.ndarray):
        shift, rows = shift.repeat(degree), rows.repeat(degree)
    else:
        shift, rows = shift.repeat_interleave(degree), rows.repeat_interleave(degree)
    return shift + _count(begin, len(rows)), rows


def _count(like: Array, stop: int, step: int = 1) -> Array:
    """Return the numbers from 0, in the library and on the device of an array."""
    if isinstance(like, np.ndarray):
        return np.arange(0, stop, step)
    return torch.arange(0, stop, step, device=like.device)


def match(before: Array, now: Array) -> Array | None:
    """Return for each row of ``now`` which row of ``before`` equals it; None if one has none.

    Rows are found by a hash and then compared, since hashes may collide.

    Args:
        before: Shape ``[row, time]``, at least one row.
        now: Shape ``[other row, time]``.
    """
    weights = _weights(now.shape[1])
    if isinstance(now, np.ndarray):
        keys = before @ weights
        order = keys.argsort()
        rows = order.take(keys[order].searchsorted(now @ weights), mode="clip")
        # bytes are compared in a third of the time of numbers, whose shape is the same
        return rows if before.take(rows, 0).tobytes() == now.tobytes() else None
    factors = torch.from_numpy(weights).to(now.device)
    keys, order = (before * factors).sum(1).sort()  # devices multiply no matrices of whole numbers
    rows = order[torch.searchsorted(keys, (now * factors).sum(1)).clip(max=len(order) - 1)]
    return rows if bool((before[rows] == now).all()) else None


@lru_cache(maxsize=8)
def _pair(bits: int) -> NDArray[np.int64]:
    return np.array([0, 1 << bits])


@lru_cache(maxsize=64)
def _weights(time: int) -> NDArray[np.int64]:
    return np.arange(1, time + 1) * 0x9E3779B97F4A7C1 | 1


def _places(keys: Array, wanted: Array) -> Array:
    """Return how many of the ascending keys are below each number."""
    # numpy's own function takes twice the time of the method behind it
    if isinstance(keys, np.ndarray):
        return keys.searchsorted(wanted)
    return torch.searchsorted(keys, wanted)
