"""Exact attention between many positions and few landmarks, and its gradients.

``scaled_dot_product_attention`` is made for many queries and many keys. Where one side is a few
dozen landmarks, on a CPU, plain products over blocks of the long side take up to a third less time
if a sequence is long and of many heads, because their scores stay in a cache. In short ones their
calls cost more than they save. Softmaxes are quotients of sums of exp(S), without a shift, which
halves their time; where such a sum is so great or so small that it could not be trusted, all are
computed again with the greatest scores as their shifts. The gradients form the weights P of a block
anew::

    O = P V                   dV = Pᵀ dO        dP = dO Vᵀ
    P = softmax(S)            dS = P ∘ (dP − Σⱼ P ∘ dP)
    S = s Q Kᵀ                dQ = s dS K       dK = s dSᵀ Q

Heads are ``[head, time, feature]`` here, s is any scale. Each product goes into contiguous memory,
and is then copied: into anything else the batched product goes head by head, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from kexue_nystromformer.checks import is_free

__all__ = [
    "by_hand",
    "from_few",
    "from_few_gradients",
    "joined_heads",
    "log_totals",
    "rooms_for",
    "softmax_gradient",
    "to_few",
    "to_few_gradients",
]

# Sums of exp(S − shift), and the shift if there is one.
Totals = tuple[Tensor, Tensor | None]

_BLOCK = 2**12  # positions times heads at once
_WORTH = 2**18  # weights of one sequence, all heads together, from which on it takes less time
_MUCH = 2.0**64  # sums of weights beyond this, or its inverse, could overflow or vanish with values


def by_hand(*tensors: Tensor, few: int) -> bool:
    """Whether plain products are faster than the fused kernel, and nobody wants to see it.

    Args:
        tensors: Queries, keys and values, ``[batch, head, time, feature]``.
        few: How many landmarks there are.
    """
    return is_free(*tensors) and few * max(x.shape[1] * x.shape[2] for x in tensors) >= _WORTH


def joined_heads(like: Tensor, width: int) -> Tensor:
    """Return room for ``[batch, head, time, width]``, laid out for the heads to be joined."""
    batch, heads, time, _ = like.shape
    return like.new_empty(batch, time, heads, width).transpose(1, 2)


def log_totals(total: Tensor, shift: Tensor | None) -> Tensor:
    """Return log Σⱼ exp(S)ⱼ of what :func:`to_few` and :func:`from_few` return."""
    return total.log() if shift is None else total.log().add_(shift)


def to_few(
    query: Tensor,
    right: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    rooms: Sequence[Tensor],
    scale: float,
) -> Totals:
    """Write softmax(s Q Kᵀ) V of many queries and few keys; return Σⱼ exp(s Q Kᵀ)ⱼ.

    Its parts have shape ``[head, query, 1]``. There are some hundred keys, at most.

    Args:
        query: Q.
        right: Kᵀ, best contiguous: as it is, each block takes a fifth longer.
        value: V.
        out: Where the output goes.
        rooms: From :func:`rooms_for`, for the widths of keys and values.
        scale: s.
    """
    total = query.new_empty(*query.shape[:2], 1)
    _quotients(query, right, value, scale, out, rooms, total)
    if _trusted(total):
        return total, None
    shift = torch.empty_like(total)
    _quotients(query, right, value, scale, out, rooms, total, shift)
    return total, shift


def _quotients(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    query: Tensor,
    right: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
    rooms: Sequence[Tensor],
    total: Tensor,
    *shift: Tensor,
) -> None:
    """Write sums over keys of exp(s Q Kᵀ − shift) times V by those without it, which are written.

    Args:
        query: Q.
        right: Kᵀ.
        value: V.
        scale: s.
        out: Where the quotients go.
        rooms: Memory for the scores and the sums of a block.
        total: Where the sums without V go.
        *shift: Where the greatest scores go, which are subtracted if there is such a place.
    """
    for q, o, t, *shifts in _blocks(query, out, total, *shift):
        scores, mixed = _scores(q, right, scale, rooms[0]), _room(rooms[1], q, value.shape[2])
        for x in shifts:
            scores.sub_(torch.amax(scores, -1, keepdim=True, out=x))
        torch.sum(scores.exp_(), -1, keepdim=True, out=t)
        torch.div(torch.bmm(scores, value, out=mixed), t, out=o)


def _scores(block: Tensor, right: Tensor, scale: float, room: Tensor) -> Tensor:
    return _room(room, block, right.shape[2]).baddbmm_(block, right, beta=0, alpha=scale)


def _trusted(total: Tensor) -> bool:
    least, greatest = torch.aminmax(total)
    return least.item() > 1 / _MUCH and greatest.item() < _MUCH  # neither, if it is not a number


def to_few_gradients(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_total: Tensor,
    upstream: Tensor,
    d_query: Tensor,
    *,
    rooms: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the queries of :func:`to_few`; return those of keys and values.

    Args:
        query: Q.
        key: K.
        value: V.
        log_total: log Σⱼ exp(s Q Kᵀ)ⱼ, from :func:`log_totals`.
        upstream: dO, of the shape of the output.
        d_query: Where dQ goes.
        rooms: From :func:`rooms_for`, two for the number of keys and one for the width of queries.
        scale: s.
    """
    d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    right_key, right_value = key.mT.contiguous(), value.mT.contiguous()
    few, width = key.shape[1:]
    for q, t, d_out, d_q in _blocks(query, log_total, upstream, d_query):
        d_weights, found = _room(rooms[1], q, few), _room(rooms[2], q, width)
        weights = _scores(q, right_key, scale, rooms[0]).sub_(t).exp_()
        d_value.baddbmm_(weights.mT, d_out)
        torch.bmm(d_out, right_value, out=d_weights)
        d_scores = softmax_gradient(d_weights, weights, out=d_weights)
        d_key.baddbmm_(d_scores.mT, q, alpha=scale)
        d_q.copy_(found.baddbmm_(d_scores, key, beta=0, alpha=scale))
    return d_key, d_value


def softmax_gradient(d_weights: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return P ∘ (dP − Σⱼ P ∘ dP), in one kernel; ``out`` may be dP."""
    kernel = torch.ops.aten._softmax_backward_data  # noqa: SLF001 -- autograd's own
    gradient: Tensor = (
        kernel(d_weights, weights, -1, weights.dtype)
        if out is None
        else kernel(d_weights, weights, -1, weights.dtype, grad_input=out)
    )
    return gradient


def from_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    rooms: Sequence[Tensor],
    scale: float,
) -> Totals:
    """Write softmax(s Q Kᵀ) V of few queries and many keys; return Σⱼ exp(s Q Kᵀ)ⱼ.

    Its parts have shape ``[head, query, 1]``.

    Args:
        query: Q.
        key: K.
        value: V.
        out: Contiguous memory, where the output goes.
        rooms: From :func:`rooms_for`; the first one for the number of queries.
        scale: s.
    """
    many = key.shape[1] >= 4 * _length(key)  # blocks: for few it does not pay to copy
    right = query.mT.contiguous() if many else query.mT
    total = _sums(right, key, value, scale, None, out, rooms[0])
    if _trusted(total):
        out.div_(total)
        return total, None
    scores = (_scores(k, right, scale, rooms[0]) for (k,) in _blocks(key))
    largest = torch.stack([x.amax(1, keepdim=True) for x in scores]).amax(0)
    total = _sums(right, key, value, scale, largest, out, rooms[0])
    out.div_(total)
    return total, largest.mT


def _sums(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    right: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    shift: Tensor | None,
    out: Tensor,
    room: Tensor,
) -> Tensor:
    """Write the sums over keys of exp(s K Qᵀ − shift) times V, return those without it.

    Args:
        right: Qᵀ.
        key: K.
        value: V.
        scale: s.
        shift: What is subtracted, shape ``[head, 1, query]``.
        out: Contiguous memory of shape ``[head, query, channel]``.
        room: Memory for the scores of a block.
    """
    totals: list[Tensor] = []
    for k, v in _blocks(key, value):
        scores = _scores(k, right, scale, room)
        weights = (scores if shift is None else scores.sub_(shift)).exp_()
        out.baddbmm_(weights.mT, v, beta=1 if totals else 0)  # what was in it before is nothing
        totals.append(weights.sum(1, keepdim=True))
    return reduce(torch.add, totals).mT


def from_few_gradients(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_total: Tensor,
    upstream: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    *,
    rooms: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """Write the gradients of the keys and values of :func:`from_few`; return that of the queries.

    Args:
        query: Q.
        key: K.
        value: V.
        out: O, as it was returned.
        log_total: log Σⱼ exp(s Q Kᵀ)ⱼ, from :func:`log_totals`.
        upstream: dO, of the shape of the output.
        d_key: Where dK goes.
        d_value: Where dV goes.
        rooms: From :func:`rooms_for`, two for the number of queries and one for the greater of the
            widths of keys and values.
        scale: s.
    """
    d_query = query.new_zeros(query.shape)
    along = (upstream * out).sum(-1, keepdim=True)  # Σⱼ P ∘ dP, of all blocks
    few = query.shape[1]
    for k, v, d_k, d_v in _blocks(key, value, d_key, d_value):
        weights, d_scores = (_room(x, k, few).view(len(query), few, -1) for x in rooms[:2])
        weights.baddbmm_(query, k.mT, beta=0, alpha=scale).sub_(log_total).exp_()
        found = _room(rooms[2], k, upstream.shape[2])
        d_v.copy_(torch.bmm(weights.mT, upstream, out=found))
        torch.bmm(upstream, v.mT, out=d_scores).sub_(along).mul_(weights)
        d_query.baddbmm_(d_scores, k, alpha=scale)
        found = _room(rooms[2], k, query.shape[2])
        d_k.copy_(found.baddbmm_(d_scores.mT, query, beta=0, alpha=scale))
    return d_query


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all along the time; for few blocks this takes less than a split."""
    time, length = tensors[0].shape[1], _length(tensors[0])
    if time <= length:
        yield tensors
        return
    for start in range(0, time, length):
        size = min(length, time - start)
        yield tuple(x.narrow(1, start, size) for x in tensors)


def _length(along: Tensor) -> int:
    """Return of how many positions a block is."""
    return max(1, _BLOCK // along.shape[0])


def rooms_for(along: Tensor, *widths: int) -> list[Tensor]:
    """Return memory for blocks of ``[head, time, …]``, one for each of these widths.

    Results that go into it are faster than new ones: those are often given back to the system, and
    a page that comes from there anew costs more than what is computed in it.
    """
    heads, time, _ = along.shape
    length = min(_length(along), time)
    return [along.new_empty(length * heads * x) for x in widths]


def _room(memory: Tensor, block: Tensor, width: int) -> Tensor:
    """Return the beginning of it as ``[head, position, width]`` for the positions of a block."""
    heads, time, _ = block.shape
    size = heads * time * width
    used = memory if size == len(memory) else memory.narrow(0, 0, size)
    return used.view(heads, time, width)
