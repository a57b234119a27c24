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
    S = Q Kᵀ                  dQ = dS K         dK = dSᵀ Q

Heads are ``[head, time, feature]`` here, and where no scale s is given, queries contain it. Each
product goes into contiguous memory, and is then copied: into anything else the batched product goes
head by head, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kexue_nystromformer.checks import is_free

__all__ = [
    "by_hand",
    "from_few",
    "from_few_gradients",
    "joined_heads",
    "softmax_gradient",
    "to_few",
    "to_few_gradients",
]

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


def to_few(query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, scale: float) -> Tensor:
    """Write softmax(s Q Kᵀ) V of many queries and few keys; return log Σⱼ exp(s Q Kᵀ)ⱼ.

    It has shape ``[head, query, 1]``. There are some hundred keys, at most.
    """
    right = _as_right(key, query)
    total = query.new_empty(*query.shape[:2], 1)
    _quotients(query, right, value, scale, out, total)
    if _trusted(total):
        return total.log_()
    shift = torch.empty_like(total)
    _quotients(query, right, value, scale, out, total, shift)
    return total.log_().add_(shift)


def _quotients(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    query: Tensor,
    right: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
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
        total: Where the sums without V go.
        *shift: Where the greatest scores go, which are subtracted if there is such a place.
    """
    rooms = _rooms(query, right, value)
    for q, o, t, *shifts in _blocks(query, out, total, *shift):
        scores, mixed = (_room(x, q) for x in rooms)
        scores.baddbmm_(q, right, beta=0, alpha=scale)
        for x in shifts:
            scores.sub_(torch.amax(scores, -1, keepdim=True, out=x))
        torch.sum(scores.exp_(), -1, keepdim=True, out=t)
        torch.div(torch.bmm(scores, value, out=mixed), t, out=o)


def _as_right(few: Tensor, many: Tensor) -> Tensor:
    """Return the transpose, copied if many blocks meet it: as it is, each takes a fifth longer."""
    return few.mT.contiguous() if many.shape[1] >= 4 * _length(many) else few.mT


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
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the queries of :func:`to_few`; return those of keys and values.

    Args:
        query: Q.
        key: K.
        value: V.
        log_total: log Σⱼ exp(s Q Kᵀ)ⱼ, as it was returned.
        upstream: dO, of the shape of the output.
        d_query: Where dQ goes.
        scale: s.
    """
    d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    right_key, right_value = key.mT.contiguous(), value.mT.contiguous()
    rooms = _rooms(query, right_key, right_key, key)
    for q, t, d_out, d_q in _blocks(query, log_total, upstream, d_query):
        scores, d_weights, found = (_room(x, q) for x in rooms)
        weights = scores.baddbmm_(q, right_key, beta=0, alpha=scale).sub_(t).exp_()
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


def from_few(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """Write softmax(Q Kᵀ) V of few queries and many keys; return log Σⱼ exp(Q Kᵀ)ⱼ.

    It has shape ``[head, query, 1]``.
    """
    right = _as_right(query, key)
    total = _sums(right, key, value, None, out)
    if _trusted(total):
        out.div_(total)
        return total.log_()
    blocks = [torch.bmm(k, right).amax(1, keepdim=True) for (k,) in _blocks(key)]
    largest = torch.stack(blocks).amax(0)
    total = _sums(right, key, value, largest, out)
    out.div_(total)
    return total.log_().add_(largest.mT)


def _sums(right: Tensor, key: Tensor, value: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    """Write the sums over keys of exp(K Qᵀ − shift) times V, return those without it.

    Args:
        right: Qᵀ.
        key: K.
        value: V.
        shift: What is subtracted, shape ``[head, 1, query]``.
        out: Contiguous memory of shape ``[head, query, channel]``.
    """
    out.zero_()
    total = right.new_zeros(right.shape[0], 1, right.shape[2])
    (room,) = _rooms(key, right)
    for k, v in _blocks(key, value):
        scores = torch.bmm(k, right, out=_room(room, k))
        weights = (scores if shift is None else scores.sub_(shift)).exp_()
        total.add_(weights.sum(1, keepdim=True))
        out.baddbmm_(weights.mT, v)
    return total.mT


def from_few_gradients(  # noqa: PLR0917 -- what goes in, and where what comes out goes
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_total: Tensor,
    upstream: Tensor,
    d_key: Tensor,
    d_value: Tensor,
) -> Tensor:
    """Write the gradients of the keys and values of :func:`from_few`; return that of the queries.

    Args:
        query: Q.
        key: K.
        value: V.
        out: O, as it was returned.
        log_total: log Σⱼ exp(Q Kᵀ)ⱼ, as it was returned.
        upstream: dO, of the shape of the output.
        d_key: Where dK goes.
        d_value: Where dV goes.
    """
    d_query = query.new_zeros(query.shape)
    along = (upstream * out).sum(-1, keepdim=True)  # Σⱼ P ∘ dP, of all blocks
    rooms = _rooms(key, query.mT, query.mT, query, upstream)
    for k, v, d_k, d_v in _blocks(key, value, d_key, d_value):
        scores, d_weights, found_key, found_value = (_room(x, k) for x in rooms)
        weights = scores.view(query.shape[0], query.shape[1], -1)
        d_scores = d_weights.view(weights.shape)
        torch.bmm(query, k.mT, out=weights).sub_(log_total).exp_()
        d_v.copy_(torch.bmm(weights.mT, upstream, out=found_value))
        torch.bmm(upstream, v.mT, out=d_scores).sub_(along).mul_(weights)
        d_query.baddbmm_(d_scores, k)
        d_k.copy_(torch.bmm(d_scores.mT, query, out=found_key))
    return d_query


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all along the time; for few blocks this takes less than a split."""
    time, length = tensors[0].shape[1], _length(tensors[0])
    for start in range(0, time, length):
        size = min(length, time - start)
        yield tuple(x.narrow(1, start, size) for x in tensors)


def _length(along: Tensor) -> int:
    """Return of how many positions a block is."""
    return max(1, _BLOCK // along.shape[0])


def _rooms(along: Tensor, *beside: Tensor) -> list[Tensor]:
    """Return memory for a block of positions times the last axis of some tensors.

    Results that go into it are faster than new ones: those are often given back to the system, and
    a page that comes from there anew costs more than what is computed in it.
    """
    heads, time, _ = along.shape
    length = min(_length(along), time)
    return [along.new_empty(length, heads * x.shape[-1]) for x in beside]


def _room(memory: Tensor, block: Tensor) -> Tensor:
    """Return the beginning of it as ``[head, position, …]`` for the positions of a block."""
    heads, time, _ = block.shape
    return memory[:time].view(heads, time, memory.shape[1] // heads)
