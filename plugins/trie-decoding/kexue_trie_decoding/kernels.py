"""Arithmetic on the sorted keys of a tree, for a whole batch of nodes.

The same few lines work on tensors and on numpy arrays. Batches are some hundred numbers, for which
a call into numpy takes a fifth of the time of one into torch: what is in the host's memory is
therefore looked at as numpy's (:func:`view`), without a copy; what is on a device stays there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["expand", "match", "search", "span", "tensor", "view"]

Array = Any
"""A tensor of int64, or a numpy array."""


def view(values: Tensor) -> Array:
    """Return a tensor as it is fastest to work with."""
    return values.numpy() if values.is_cpu else values


def tensor(values: Array) -> Tensor:
    """Return what :func:`view` gave as a tensor again."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _library(values: Array) -> Any:
    return np if isinstance(values, np.ndarray) else torch


def span(keys: Array, nodes: Array, bits: int) -> tuple[Array, Array]:
    """Return the first edge of each node and how many there are.

    The last edge is left to nodes that have none, and to -1.

    Args:
        keys: Shape ``[edge]``, ascending: parent << bits | token.
        nodes: Shape ``[row]``.
        bits: How many bits of a key are the token.
    """
    library = _library(nodes)
    begin = library.searchsorted(keys, nodes << bits)
    degree = library.searchsorted(keys, (nodes + 1) << bits) - begin
    none = degree == 0
    return library.where(none, len(keys) - 1, begin), degree + none


def expand(begin: Array, degree: Array) -> tuple[Array, Array]:
    """Return the edges of some spans, and the row of each.

    Args:
        begin: Shape ``[row]``.
        degree: Shape ``[row]``.
    """
    shift = begin - degree.cumsum(0) + degree
    rows: Array
    if isinstance(begin, np.ndarray):
        rows = np.repeat(np.arange(len(degree)), degree)
        return shift[rows] + np.arange(len(rows)), rows
    rows = torch.repeat_interleave(degree)
    return shift[rows] + torch.arange(len(rows), device=rows.device), rows


def search(sorted_keys: Array, wanted: Array) -> tuple[Array, Array]:
    """Return the place of each number in an ascending array, and whether it is there.

    Args:
        sorted_keys: Shape ``[key]``, at least one.
        wanted: Shape ``[row]``.
    """
    place = _library(wanted).searchsorted(sorted_keys, wanted)
    place = place.clip(max=len(sorted_keys) - 1)
    return place, sorted_keys[place] == wanted


def match(before: Array, now: Array) -> Array | None:
    """Return for each row of ``now`` which row of ``before`` equals it; None if one has none.

    Rows are found by a hash and then compared, since hashes may collide.

    Args:
        before: Shape ``[row, time]``, at least one row.
        now: Shape ``[other row, time]``.
    """
    weights: Array = np.arange(1, now.shape[1] + 1) * 0x9E3779B97F4A7C1 | 1
    if not isinstance(now, np.ndarray):
        weights = torch.from_numpy(weights).to(now.device)
    keys = (before * weights).sum(1)
    order = keys.argsort()
    place, _ = search(keys[order], (now * weights).sum(1))
    rows = order[place]
    return rows if bool((before[rows] == now).all()) else None
