"""Exact attention between many positions and few landmarks.

``scaled_dot_product_attention`` is made for many queries and many keys. Where one side is a few
dozen landmarks, on a CPU and without a gradient, plain products over blocks of the long side take a
quarter to a half less time, because their scores stay in a cache. A block of queries has softmaxes
of its own; blocks of keys are joined by the greatest score so far (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867). With a gradient, to be formed from the scores anew, the fused
kernel is the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_nystromformer.checks import is_plain

__all__ = ["attention"]

_BLOCK = 512  # positions at once
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
    if mask is not None or not _by_hand(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    batch, heads, time, _ = query.shape
    # Laid out for the heads to be joined; row by row, because then no view of them is copied.
    out = value.new_empty(batch, time, heads, value.shape[3]).transpose(1, 2)
    for q, k, v, o in zip(query, key, value, out, strict=True):
        if time > key.shape[2]:
            _many_queries(q, k * scale, v, o)
        else:
            _many_keys(q * scale, k, v, o)
    return out


def _by_hand(*tensors: Tensor) -> bool:
    """Whether plain products are faster than the fused kernel."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return (
        all(x.device.type == "cpu" and x.dtype in _TYPES for x in tensors)
        and not recorded
        and not torch.is_autocast_enabled("cpu")
        and is_plain(*tensors)
    )


def _many_queries(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Write softmax(Q Kᵀ) V, of heads ``[head, time, feature]``."""
    for q, o in zip(torch.split(query, _BLOCK, 1), torch.split(out, _BLOCK, 1), strict=True):
        torch.bmm(torch.softmax(torch.bmm(q, key.mT), -1), value, out=o)


def _many_keys(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Write softmax(Q Kᵀ) V, of heads ``[head, time, feature]``."""
    largest = query.new_full((*query.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(largest)
    out.zero_()
    for k, v in zip(torch.split(key, _BLOCK, 1), torch.split(value, _BLOCK, 1), strict=True):
        scores = torch.bmm(query, k.mT)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        kept = before.sub_(largest).exp_()  # what the sums so far are worth
        total.mul_(kept).add_(weights.sum(-1, keepdim=True))
        out.mul_(kept).baddbmm_(weights, v)
    out.div_(total)
