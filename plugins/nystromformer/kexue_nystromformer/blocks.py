"""Exact attention between many positions and few landmarks, and its gradients.

``scaled_dot_product_attention`` is made for many queries and many keys. Where one side is a few
dozen landmarks, on a CPU, plain products over blocks of the long side take up to a third less time
if a sequence is long and of many heads, because their scores stay in a cache. In short ones their
calls cost more than they save. A block of queries has softmaxes of its own. For blocks of keys one
shift does, the greatest score of the first, unless a later one is so far above it that exp would
overflow; then all are looked through for the greatest. The gradients form the weights P of a block
anew::

    O = P V                   dV = Pᵀ dO        dP = dO Vᵀ
    P = softmax(S)            dS = P ∘ (dP − Σⱼ P ∘ dP)
    S = Q Kᵀ                  dQ = dS K         dK = dSᵀ Q

Heads are ``[head, time, feature]`` here, and the scale is already in the landmarks. Each product
goes into contiguous memory, and is then copied: into anything else the batched product goes head by
head, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_nystromformer.checks import is_free

__all__ = [
    "attention",
    "by_hand",
    "from_few",
    "from_few_gradients",
    "joined_heads",
    "softmax_gradient",
    "to_few",
    "to_few_gradients",
]

_BLOCK = 512  # positions at once
_WORTH = 2**21  # weights of one sequence, all heads together, from which on it takes less time
_MUCH = 2.0**64  # sums of weights beyond this could overflow when they meet values


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
) -> Tensor:
    """Return softmax(s Q Kᵀ) V.

    Args:
        query: Q, shape ``[batch, head, query, feature]``.
        key: K, shape ``[batch, head, key, feature]``, with at least one key.
        value: V, shape ``[batch, head, key, channel]``.
        mask: True at keys that count, as ``scaled_dot_product_attention`` takes it; None for all.
        scale: s.
    """
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    few = min(query.shape[2], key.shape[2])
    if mask is not None or recorded or not by_hand(query, key, value, few=few):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    # row by row, because then no view of them is copied
    if query.shape[2] > key.shape[2]:
        out = joined_heads(query, value.shape[3])
        for q, k, v, o in zip(query, key * scale, value, out, strict=True):
            to_few(q, k, v, o)
        return out
    out = value.new_empty(*query.shape[:3], value.shape[3])
    for q, k, v, o in zip(query * scale, key, value, out, strict=True):
        if k.shape[1] <= _BLOCK:  # one softmax, which is one kernel
            torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v, out=o)
        else:
            o.copy_(from_few(q, k, v)[0])
    return out


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


def to_few(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Write softmax(Q Kᵀ) V of many queries and few keys; of some hundred, at most."""
    right = key.mT.contiguous()  # a transposed factor at the right takes a fifth longer
    rooms = _rooms(query, right, value)
    for q, o in _blocks(query, out):
        scores, mixed = (_room(x, q) for x in rooms)
        weights = torch.softmax(torch.bmm(q, right, out=scores), -1, out=scores)
        o.copy_(torch.bmm(weights, value, out=mixed))


def to_few_gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, d_query: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the queries of :func:`to_few`; return those of keys and values.

    Args:
        query: Q.
        key: K.
        value: V.
        upstream: dO, of the shape of the output.
        d_query: Where dQ goes.
    """
    d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    right_key, right_value = key.mT.contiguous(), value.mT.contiguous()
    rooms = _rooms(query, right_key, right_key, key)
    for q, d_out, d_q in _blocks(query, upstream, d_query):
        scores, d_weights, found = (_room(x, q) for x in rooms)
        weights = torch.softmax(torch.bmm(q, right_key, out=scores), -1, out=scores)
        d_value.baddbmm_(weights.mT, d_out)
        torch.bmm(d_out, right_value, out=d_weights)
        d_scores = softmax_gradient(d_weights, weights, out=d_weights)
        d_key.baddbmm_(d_scores.mT, q)
        d_q.copy_(torch.bmm(d_scores, key, out=found))
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


def from_few(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(Q Kᵀ) V of few queries and many keys, and log Σⱼ exp(Q Kᵀ)ⱼ.

    Shapes ``[head, query, channel]`` and ``[head, query, 1]``.
    """
    largest = _greatest(query, key[:, :_BLOCK])
    out, total = _sums(query, key, value, largest)
    if not total.amax() < _MUCH:  # or it is not a number
        blocks = [_greatest(query, k) for (k,) in _blocks(key)]
        largest = torch.stack(blocks).amax(0)
        out, total = _sums(query, key, value, largest)
    return out.div_(total), total.log_().add_(largest)


def _greatest(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query, key.mT).amax(-1, keepdim=True)


def _sums(query: Tensor, key: Tensor, value: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over keys of exp(Q Kᵀ − shift) V, and without V."""
    out, total = query.new_zeros(*query.shape[:2], value.shape[2]), torch.zeros_like(shift)
    (room,) = _rooms(key, query.mT)
    for k, v in _blocks(key, value):
        scores = _room(room, k).view(*query.shape[:2], -1)
        weights = torch.bmm(query, k.mT, out=scores).sub_(shift).exp_()
        total.add_(weights.sum(-1, keepdim=True))
        out.baddbmm_(weights, v)
    return out, total


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
    """Cut all along the time."""
    return zip(*(torch.split(x, _BLOCK, 1) for x in tensors), strict=True)


def _rooms(along: Tensor, *beside: Tensor) -> list[Tensor]:
    """Return memory for a block of positions times the last axis of some tensors.

    Results that go into it are faster than new ones: those are often given back to the system, and
    a page that comes from there anew costs more than what is computed in it.
    """
    heads, time, _ = along.shape
    return [along.new_empty(min(_BLOCK, time), heads * x.shape[-1]) for x in beside]


def _room(memory: Tensor, block: Tensor) -> Tensor:
    """Return the beginning of it as ``[head, position, …]`` for the positions of a block."""
    heads, time, _ = block.shape
    return memory[:time].view(heads, time, memory.shape[1] // heads)
