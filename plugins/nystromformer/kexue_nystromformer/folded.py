"""Nyström attention of a layer with its projections folded into the landmarks.

A score of a query and a landmark is linear in the features x of the query's position, and so is
what a value adds to the output. With W the projections of a head, M its matrix of the middle, a
landmark with a tilde, and s the scale::

    s (W_q x + b_q) · k̃   = x · (s W_qᵀ k̃) + s b_q · k̃
    s q̃ · (W_k x + b_k)   = (s W_kᵀ q̃) · x + what is the same for all keys, and cancels
    Σ P (W_v x + b_v)     = W_v (Σ P x) + b_v                     rows of P sum to 1
    W_o (P M)             = P (M W_oᵀ)

so that queries, keys and values of all positions are never computed: four products of features and
heads × landmarks take the place of four projections and four products per head. Folding takes four
small products per row, which pays for long rows, and where a head has no more landmarks than
features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_nystromformer.checks import is_free
from kexue_nystromformer.landmarks import even_means
from kexue_nystromformer.pseudo_inverse import solve_stochastic

__all__ = ["attend_folded", "worth_folding"]

_LONG = 4  # times the features of a position, from which length on it takes less time

Projection = tuple[Tensor, Tensor | None]
"""A weight and perhaps a bias."""


def worth_folding(features: Tensor, *weights: Tensor, num_heads: int, num_landmarks: int) -> bool:
    """Whether folding takes less time, and nobody wants to see known operations.

    Args:
        features: Shape ``[batch, time, feature]``, all real.
        weights: Of the projections.
        num_heads: Heads.
        num_landmarks: m.
    """
    _, time, width = features.shape
    return (
        is_free(features, *weights)
        and features.numel() > 0
        and num_heads * num_landmarks <= width
        and time > num_landmarks
        and time >= _LONG * width
    )


def attend_folded(
    features: Tensor,
    inward: Projection,
    outward: Projection,
    *,
    num_heads: int,
    num_landmarks: int,
    iterations: int,
) -> Tensor:
    """Return the output of the layer.

    Args:
        features: x, shape ``[batch, time, feature]``, more than m positions.
        inward: W_q, W_k and W_v, one below the other, shape ``[3 feature, feature]``; their b.
        outward: W_o, shape ``[feature, feature]``; its bias.
        num_heads: Heads.
        num_landmarks: m.
        iterations: Steps of the pseudo-inverse.
    """
    in_weight, in_bias = inward
    out_weight, out_bias = outward
    width = features.shape[2]
    heads = (num_heads, -1)
    scale = (width // num_heads) ** -0.5
    pooled = even_means(features.unsqueeze(1), num_landmarks).squeeze(1)
    two = None if in_bias is None else in_bias[: 2 * width]
    landmarks = F.linear(pooled, in_weight[: 2 * width], two) * scale**0.5
    q, k = (torch.unflatten(x, 2, heads).transpose(1, 2) for x in landmarks.chunk(2, 2))
    to_query, to_key, to_value = torch.unflatten(in_weight, 0, (3, *heads))  # head, feature, width

    of_keys = torch.matmul(q, to_key * scale**0.5).flatten(1, 2)
    pooling = _softmax(torch.matmul(of_keys, features.mT))  # softmax(s Q̃ Kᵀ) of all heads
    values = torch.matmul(torch.unflatten(torch.matmul(pooling, features), 1, heads), to_value.mT)
    if in_bias is not None:
        values = values + in_bias[2 * width :].view(num_heads, 1, -1)
    matrix = torch.softmax(torch.matmul(q, k.mT), -1).flatten(0, 1)
    middle = solve_stochastic(matrix, iterations, values.flatten(0, 1))
    from_heads = torch.unflatten(out_weight, 1, heads).permute(1, 2, 0)  # head, feature, width
    outputs = torch.matmul(middle.view_as(values), from_heads).flatten(1, 2)

    of_queries = torch.matmul(k, to_query * scale**0.5).flatten(1, 2)
    shift = None
    if in_bias is not None:
        shift = torch.matmul(k, in_bias[:width].view(num_heads, -1, 1) * scale**0.5).flatten(1)
    scores = torch.unflatten(_affine(features, of_queries.mT, shift), 2, heads)
    weights = _softmax(scores).flatten(2)  # softmax(s Q K̃ᵀ), heads side by side
    shift = None if out_bias is None else out_bias.expand(len(weights), -1)
    return _affine(weights, outputs, shift)


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last axis, in the memory of the scores unless it is recorded."""
    return torch.softmax(scores, -1, out=None if scores.requires_grad else scores)


def _affine(features: Tensor, factor: Tensor, shift: Tensor | None) -> Tensor:
    """Return the product row by row, plus a shift ``[batch, channel]``."""
    if shift is None:
        return torch.bmm(features, factor)
    return torch.baddbmm(shift.unsqueeze(1), features, factor)
