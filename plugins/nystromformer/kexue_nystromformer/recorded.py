"""Nyström attention in blocks of positions, with its gradient written out.

With landmarks Q̃ = M Q and K̃ = M K, the means of segments, and s the scale::

    Y = softmax(s Q̃ Kᵀ) V      A = softmax(s Q̃ K̃ᵀ)      W = A^† Y      O = softmax(s Q K̃ᵀ) W

A block's weights are formed anew for the gradient, so that nothing of n × m numbers is kept. What
flows back to the landmarks is gathered first, and goes to the positions of a segment in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kexue_nystromformer.blocks import (
    from_few,
    from_few_gradients,
    joined_heads,
    log_totals,
    rooms_for,
    softmax_gradient,
    to_few,
    to_few_gradients,
)
from kexue_nystromformer.checks import without_autocast
from kexue_nystromformer.landmarks import add_shares, even_landmarks
from kexue_nystromformer.pseudo_inverse import (
    inverse_gradient,
    recorded_steps,
    solve_stochastic,
)

__all__ = ["RecordedAttention", "attend_in_blocks"]


def attend_in_blocks(  # noqa: PLR0917 -- as what records it takes them
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_landmarks: int, iterations: int
) -> Tensor:
    """Return O of Q, K, V ``[batch, head, time, feature]`` of more than m real positions each."""
    return _attend((query, key, value), scale, num_landmarks, iterations, recorded=False)[0]


def _attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    num_landmarks: int,
    iterations: int,
    *,
    recorded: bool,
) -> tuple[Tensor, int, list[Tensor]]:
    """Return O, what Q̃ and K̃ are multiplied by, and what the gradient needs besides the inputs."""
    query, key, value = inputs
    queries, size = even_landmarks(query, num_landmarks)  # Q̃ and K̃, `size` times
    keys, _ = even_landmarks(key, num_landmarks)
    width = value.shape[3]
    pooled = value.new_empty(*keys.shape[:3], width)
    rooms = rooms_for(query[0], num_landmarks, width)
    rows = _rows(queries, key, value, pooled)
    of_keys = [from_few(*row, rooms=rooms, scale=scale / size) for row in rows]
    right = keys.mT.contiguous()
    scores = query.new_empty(keys.shape[0] * keys.shape[1], num_landmarks, num_landmarks)
    factors = queries.flatten(0, 1), right.flatten(0, 1)
    matrix = torch.softmax(scores.baddbmm_(*factors, beta=0, alpha=scale / size**2), -1)
    flat = pooled.flatten(0, 1)
    kept: list[Tensor] = []
    if recorded:
        inverse, steps = recorded_steps(matrix, iterations)
        kept = [inverse, *steps]
        middle = torch.bmm(inverse, flat).view_as(pooled)
    else:
        middle = solve_stochastic(matrix, iterations, flat).view_as(pooled)
    out = joined_heads(query, width)
    rows = _rows(query, right, middle, out)
    of_queries = [to_few(*row, rooms=rooms, scale=scale / size) for row in rows]
    if recorded:
        totals = (torch.stack([log_totals(*x) for x in part]) for part in (of_keys, of_queries))
        kept = [queries, keys, pooled, middle, *totals, *kept]
    return out, size, kept


def _rows(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield the rows of a batch; for one this takes less than a tensor's own iterator."""
    for i in range(len(tensors[0])):
        yield [x.select(0, i) for x in tensors]


class RecordedAttention(torch.autograd.Function):
    """What :func:`attend_in_blocks` returns. The gradient cannot be differentiated in its turn."""

    @staticmethod
    def forward(  # noqa: D102, PLR0917 -- autograd's, which takes no keywords
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        num_landmarks: int,
        iterations: int,
    ) -> Tensor:
        inputs = (query, key, value)
        out, size, kept = _attend(inputs, scale, num_landmarks, iterations, recorded=True)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102 -- autograd's
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, queries, keys, pooled, middle, *rest = ctx.saved_tensors
        log_keys, log_queries, inverse, *steps = rest
        scale = ctx.scale / ctx.size
        with without_autocast(upstream.device.type):  # as forward was
            d_query, d_key = (joined_heads(query, x.shape[3]) for x in (query, key))
            d_value = joined_heads(query, value.shape[3])
            few, width = keys.shape[2:]
            rooms = rooms_for(query[0], few, few, max(width, value.shape[3]))
            rows = _rows(query, keys, middle, log_queries, upstream, d_query)
            pairs = [to_few_gradients(*row, rooms=rooms, scale=scale) for row in rows]
            d_keys, d_middle = (torch.stack(x) for x in zip(*pairs, strict=True))

            flat = d_middle.flatten(0, 1)
            d_pooled = torch.bmm(inverse.mT, flat).view_as(pooled)
            d_matrix = inverse_gradient(steps, torch.bmm(flat, pooled.flatten(0, 1).mT))
            d_scores = softmax_gradient(d_matrix, steps[0]).mul_(scale / ctx.size)
            d_scores = d_scores.view(*keys.shape[:3], -1)

            rows = _rows(queries, key, value, pooled, log_keys, d_pooled, d_key, d_value)
            d_queries = torch.stack(
                [from_few_gradients(*row, rooms=rooms, scale=scale) for row in rows]
            )
            add_shares(d_query, d_queries + torch.matmul(d_scores, keys))
            add_shares(d_key, d_keys + torch.matmul(d_scores.mT, queries))
            return d_query, d_key, d_value, None, None, None
