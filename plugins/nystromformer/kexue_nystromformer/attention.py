"""Nyström attention as a function of queries, keys and values.

Symbols: Q, K, V queries, keys and values of n positions, Q̃, K̃ their m landmarks, s the scale.

::

    softmax(s Q Kᵀ) V ≈ softmax(s Q K̃ᵀ) · softmax(s Q̃ K̃ᵀ)^† · softmax(s Q̃ Kᵀ) V

The first and the last factor, each times what is right of it, are ordinary attentions: of n queries
to m keys, and of m queries to n keys. No matrix of n rows is kept: they are computed in blocks, or
by ``scaled_dot_product_attention``; time is O(n m d + m³), memory O(n d + m²).

References: Su 2021, https://kexue.fm/archives/8180; Xiong et al. 2021, algorithm 1,
https://arxiv.org/abs/2102.03902.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kexue_nystromformer.blocks import by_hand
from kexue_nystromformer.checks import (
    check_count,
    check_queries,
    check_unsupported,
    padding_mask,
    without_autocast,
)
from kexue_nystromformer.landmarks import Segments, even_means
from kexue_nystromformer.pseudo_inverse import solve_stochastic
from kexue_nystromformer.recorded import RecordedAttention, attend_in_blocks

__all__ = ["attend", "nystrom_attention"]


def nystrom_attention(  # noqa: PLR0917 -- the arguments of scaled_dot_product_attention
    query: Float[Tensor, "batch head time feature"],
    key: Float[Tensor, "batch head time feature"],
    value: Float[Tensor, "batch head time channel"],
    attn_mask: Bool[Tensor, "batch 1 1 time"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    middle_matrix: bool = True,
) -> Float[Tensor, "batch head time channel"]:
    """Return what ``scaled_dot_product_attention`` returns, approximated in linear time.

    It takes the same arguments. A row of at most ``num_landmarks`` real positions gets exact
    attention. Each row is computed from its own real positions alone: neither padding nor the rest
    of the batch has any influence.

    Args:
        query: Q, shape ``[batch, head, time, feature]``.
        key: K, of the same shape: what is pooled into landmarks is a sequence attending to itself.
        value: V, perhaps with another number of features.
        attn_mask: True at real positions, the same for all heads and queries: shape
            ``[batch, 1, 1, time]``. Whatever stands elsewhere in query, key and value, NaN
            included, is not seen, and the output there is 0.
        dropout_p: Must be 0; the weights that it would drop are never formed.
        is_causal: Must be false: a landmark mixes the past of a position with its future.
        scale: s; 1/√feature by default.
        num_landmarks: m. The paper takes 64, for lengths up to 8192.
        iterations: Steps of the pseudo-inverse. Not the more, the better: see
            :func:`~kexue_nystromformer.pseudo_inverse`.
        middle_matrix: Whether the pseudo-inverse stands in the middle. Without it this is the
            post's step before it: softmax(s Q K̃ᵀ) softmax(s Q̃ Kᵀ) V.

    Returns:
        Shape ``[batch, head, time, feature]`` of the values. float16 and bfloat16 stay what they
        are; their pseudo-inverse is computed in float32.

    Raises:
        ArgumentError: If shapes or types do not fit, the mask differs between queries, or causal
            attention, cross-attention or dropout is asked for.

    Example:
        >>> import torch
        >>> from kexue_nystromformer import nystrom_attention
        >>> q, k, v = torch.randn(3, 2, 8, 1000, 64)
        >>> nystrom_attention(q, k, v, num_landmarks=64).shape
        torch.Size([2, 8, 1000, 64])
    """
    check_unsupported(dropout_p=dropout_p, is_causal=is_causal)
    check_queries(query, key, value)
    check_count("nystrom_attention", "num_landmarks", num_landmarks, least=1)
    check_count("nystrom_attention", "iterations", iterations, least=0)
    mask = padding_mask(attn_mask, query)
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        query, key, value = (x.masked_fill(hidden, 0) for x in (query, key, value))
    out = attend(
        query,
        key,
        value,
        mask,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        num_landmarks=num_landmarks,
        iterations=iterations,
        middle_matrix=middle_matrix,
    )
    return out if mask is None else out.masked_fill(hidden, 0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    num_landmarks: int,
    iterations: int,
    middle_matrix: bool = True,
) -> Tensor:
    """Return the attention; at padding, what comes in must be finite and what comes out is free.

    Args:
        query: Q, shape ``[batch, head, time, feature]``.
        key: K.
        value: V.
        mask: True at real positions, shape ``[batch, time]``; None if all are.
        scale: s.
        num_landmarks: m.
        iterations: Steps of the pseudo-inverse.
        middle_matrix: Whether there is one.
    """
    keys = None if mask is None else _seen(mask)
    if query.shape[2] <= num_landmarks:
        return F.scaled_dot_product_attention(query, key, value, keys, scale=scale)
    inputs = (query, key, value)
    plain = mask is None and middle_matrix and query.numel() > 0
    if plain and by_hand(*inputs, few=num_landmarks):
        arguments = (*inputs, scale, num_landmarks, iterations)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            out: Tensor = RecordedAttention.apply(*arguments)  # type: ignore[no-untyped-call]
            return out
        return attend_in_blocks(*arguments)
    if mask is None:
        segments = present = None
        queries_, keys_ = even_means(query, num_landmarks), even_means(key, num_landmarks)
    else:
        segments = Segments.of(mask, num_landmarks)
        present = _seen(segments.counts > 0)
        queries_, keys_ = segments.means(query), segments.means(key)  # Q̃ and K̃
    pooled = F.scaled_dot_product_attention(queries_, key, value, keys, scale=scale)
    if middle_matrix:
        pooled = _inverted(queries_, keys_, pooled, scale, iterations)
    if mask is not None and segments is not None:
        # Where each landmark is one position, K̃ = K and softmax(s Q K̃ᵀ) V is exact.
        covered = mask.sum(-1) <= num_landmarks
        pooled = torch.where(covered[:, None, None, None], segments.means(value), pooled)
    return F.scaled_dot_product_attention(query, keys_, pooled, present, scale=scale)


def _seen(mask: Tensor) -> Tensor:
    """Give a mask the axes of an attention mask; a row without positions sees them all, as 0."""
    return (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]


def _inverted(
    queries: Tensor, keys: Tensor, pooled: Tensor, scale: float, iterations: int
) -> Tensor:
    """Return softmax(s Q̃ K̃ᵀ)^† times what was pooled, computed at least in float32."""
    exact = torch.promote_types(pooled.dtype, torch.float32)
    with without_autocast(pooled.device.type):
        q, k, y = (x.to(exact).flatten(0, 1) for x in (queries, keys, pooled))
        matrix = torch.softmax(scale * torch.bmm(q, k.mT), -1)
        return solve_stochastic(matrix, iterations, y).view_as(pooled).to(pooled.dtype)
