"""Scores of all tokens to scores of those that may follow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_trie_decoding.kernels import Array, Tree, expand, tensor, view

__all__ = ["check", "masked", "places", "sound"]


def masked(logits: Tensor, tree: Tree, nodes: Array) -> Tensor:
    """Return logits with -inf at every token that may not follow; no row is all -inf, none NaN.

    Args:
        logits: Shape ``[row, token]``.
        tree: What may follow.
        nodes: Shape ``[row]``: where each row is.
    """
    size = logits.shape[1]
    begin, degree = tree.span(nodes)
    if 8 * int(degree.sum()) > logits.numel():
        # so many edges only near the root, whose few nodes the rows have in common
        shared, place = torch.unique(tensor(nodes), return_inverse=True)
        banned = logits.new_full((len(shared), size), -torch.inf)
        flat = places(tree, *tree.span(view(shared)), size)
        banned.view(-1).index_fill_(0, tensor(flat), 0)
        # a sum is several times faster than a choice, and NaN where that would differ
        out = logits + (banned[place] if len(shared) > 1 else banned)
        if bool((out.amax(1) > -torch.inf).all()):
            return out
    flat = places(tree, begin, degree, size)
    given = view(logits)
    if not isinstance(given, np.ndarray):
        flat = tensor(flat)
    scores = sound(given.reshape(-1)[flat], degree)
    out = logits.new_full(logits.shape, -torch.inf)
    (view(out) if isinstance(given, np.ndarray) else out).reshape(-1)[flat] = scores
    return out


def places(tree: Tree, begin: Array, degree: Array, size: int) -> Array:
    """Return the place of each token that may follow in a flat ``[row, token]``.

    Args:
        tree: What may follow.
        begin: Shape ``[row]``: the first edge of each row.
        degree: Shape ``[row]``: how many there are.
        size: How many tokens a row has.
    """
    edge, base = expand(begin, degree, size)
    return base + tree.tokens(edge)


def sound(scores: Array, degree: Array) -> Array:
    """Return the scores of what may follow, 0 in rows where none is above -inf; NaN is -inf.

    Args:
        scores: Shape ``[edge]``.
        degree: Shape ``[row]``: how many of them are each row's, at least 1.
    """
    if not len(scores) or scores.min() > -torch.inf:  # NaN is not
        return scores
    found, counts = tensor(scores), tensor(degree)
    row = torch.repeat_interleave(counts)
    found = found.masked_fill(found.isnan(), -torch.inf)
    best = found.new_full(counts.shape, -torch.inf)
    best.scatter_reduce_(0, row, found.detach(), "amax")
    return found.masked_fill(best.isneginf()[row], 0)


def check(logits: Tensor, rows: int, num_tokens: int) -> None:
    """Refuse logits that are not those of so many rows and at least so many tokens.

    Args:
        logits: What is given.
        rows: How many nodes there are.
        num_tokens: One more than the greatest id.

    Raises:
        ArgumentError: If the shapes do not fit, or the vocabulary is too small for the index.
    """
    shape = logits.shape
    if len(shape) != 2 or shape[0] != rows:
        raise ArgumentError(
            f"`logits` must have shape [row, token] with one row for each of the {rows} "
            f"nodes. Found {list(shape)}.",
            argument="logits",
        )
    if shape[1] < num_tokens:
        raise ArgumentError(
            f"`logits` must score every token of the index, whose greatest id is "
            f"{num_tokens - 1}. Found a vocabulary of {shape[1]}. Encode the "
            f"database with the model's own vocabulary.",
            argument="logits",
        )
