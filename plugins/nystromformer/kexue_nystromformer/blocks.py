"""Exact attention between many positions and few landmarks, and its gradients.

``scaled_dot_product_attention`` is made for many queries and many keys. Where one side is a few
dozen landmarks, on a CPU, plain products over blocks of the long side take a tenth to a quarter
less time if a sequence is long and of many heads, because their scores stay in a cache. In short
ones their calls cost more than they save, and in batches of short ones far more. A block of queries
has softmaxes of its own; blocks of keys are joined by the greatest score so far (Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867). The gradients form the weights P of a block
anew::

    O = P V                   dV = Pᵀ dO        dP = dO Vᵀ
    P = softmax(S)            dS = P ∘ (dP − Σⱼ P ∘ dP)
    S = Q Kᵀ                  dQ = dS K         dK = dSᵀ Q

Heads are ``[head, time, feature]`` here, and the scale is already in the landmarks. Each product
gets a new, contiguous result, which is then copied: into anything else the batched product goes
head by head, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_nystromformer.checks import is_plain

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
_WORTH = 2**20  # numbers of one sequence, all heads together, from which on it takes less time
_TYPES = {torch.float32, torch.float64}


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
    if mask is not None or recorded or not by_hand(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    # row by row, because then no view of them is copied
    if query.shape[2] > key.shape[2]:
        out = joined_heads(query, value.shape[3])
        for q, k, v, o in zip(query, key * scale, value, out, strict=True):
            to_few(q, k, v, o)
        return out
    out = value.new_empty(*query.shape[:3], value.shape[3])
    for q, k, v, o in zip(query * scale, key, value, out, strict=True):
        if k.shape[1] <= _BLOCK:
            to_few(q, k, v, o)  # one softmax, which is one kernel
        else:
            o.copy_(from_few(q, k, v)[0])
    return out


def by_hand(*tensors: Tensor) -> bool:
    """Whether plain products are faster than the fused kernel, and nobody wants to see it."""
    return (
        is_plain(*tensors)
        and max(x.shape[1:].numel() for x in tensors) >= _WORTH
        and all(x.device.type == "cpu" and x.dtype in _TYPES for x in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def joined_heads(like: Tensor, width: int) -> Tensor:
    """Return room for ``[batch, head, time, width]``, laid out for the heads to be joined."""
    batch, heads, time, _ = like.shape
    return like.new_empty(batch, time, heads, width).transpose(1, 2)


def to_few(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Write softmax(Q Kᵀ) V of many queries and few keys; of some hundred, at most."""
    for q, o in _blocks(query, out):
        o.copy_(torch.bmm(torch.softmax(torch.bmm(q, key.mT), -1), value))


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
    for q, d_out, d_q in _blocks(query, upstream, d_query):
        weights = torch.softmax(torch.bmm(q, key.mT), -1)
        d_value.baddbmm_(weights.mT, d_out)
        d_scores = softmax_gradient(torch.bmm(d_out, value.mT), weights)
        d_key.baddbmm_(d_scores.mT, q)
        d_q.copy_(torch.bmm(d_scores, key))
    return d_key, d_value


def softmax_gradient(d_weights: Tensor, weights: Tensor) -> Tensor:
    """Return P ∘ (dP − Σⱼ P ∘ dP), in one kernel."""
    gradient: Tensor = torch.ops.aten._softmax_backward_data(  # noqa: SLF001 -- autograd's own
        d_weights, weights, -1, weights.dtype
    )
    return gradient


def from_few(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(Q Kᵀ) V of few queries and many keys, and log Σⱼ exp(Q Kᵀ)ⱼ.

    Shapes ``[head, query, channel]`` and ``[head, query, 1]``.
    """
    largest = query.new_full((*query.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(largest)
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for k, v in _blocks(key, value):
        scores = torch.bmm(query, k.mT)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        kept = before.sub_(largest).exp_()  # what the sums so far are worth
        total.mul_(kept).add_(weights.sum(-1, keepdim=True))
        out.mul_(kept).baddbmm_(weights, v)
    return out.div_(total), total.log_().add_(largest)


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
    for k, v, d_k, d_v in _blocks(key, value, d_key, d_value):
        weights = torch.bmm(query, k.mT).sub_(log_total).exp_()
        d_v.copy_(torch.bmm(weights.mT, upstream))
        d_scores = torch.bmm(upstream, v.mT).sub_(along).mul_(weights)
        d_query.baddbmm_(d_scores, k)
        d_k.copy_(torch.bmm(d_scores.mT, query))
    return d_query


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all along the time."""
    return zip(*(torch.split(x, _BLOCK, 1) for x in tensors), strict=True)
