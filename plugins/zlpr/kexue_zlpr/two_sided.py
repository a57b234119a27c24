r"""Sums of exponentials over the negatives and over the positives of a row.

:func:`dense_log_sums` and :func:`sparse_log_sums` map scores :math:`s` and targets to

.. math::
    N = \log \sum_i (1 - t_i) e^{s_i}, \qquad P = \log \sum_j t_j e^{-s_j}

(:math:`-\infty` for an empty sum), from which ZLPR and the pairwise loss are a softplus away. Each
side is one softmax kernel, whose weights are the gradient and are kept for it. Masking is by
``minimum`` with plus or minus infinity: exact, and free of branches, which cost ten times an
exponential where positives are many. The gradient can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_log_sums", "softplus", "sparse_log_sums"]

_INF = float("inf")
_NAN = float("nan")
_Gradients = tuple[Tensor | None, ...]


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x); from 40 on this is x to the last bit of float64, too."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def dense_log_sums(
    scores: Tensor, target: Tensor, mask: Tensor | None, *, soft: bool
) -> tuple[Tensor, Tensor]:
    """Return the two log sums per row for dense targets.

    Args:
        scores: Shape ``[..., class]``, float32 or float64.
        target: Shape of ``scores``: boolean, or in [0, 1] and of the dtype of ``scores``.
        mask: Shape of ``scores``, false where a class is in neither sum; None for all.
        soft: Whether any entry of ``target`` is neither 0 nor 1.

    Returns:
        The negatives' and the positives', both of shape ``[...]``.
    """
    sums: tuple[Tensor, Tensor]
    sums = _DenseLogSums.apply(scores, target, mask, soft)  # type: ignore[no-untyped-call]
    return sums


def sparse_log_sums(
    scores: Tensor, labels: Tensor, counts: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the two log sums per row for lists of labels.

    Args:
        scores: Shape ``[..., class]``, float32 or float64.
        labels: Shape ``[..., label]``: the positives.
        counts: Shape of ``labels``: which slots hold a positive, each positive once.
        mask: Shape of ``scores``, false where a class is in neither sum; None for all.

    Returns:
        The negatives' and the positives', both of shape ``[...]``.
    """
    sums: tuple[Tensor, Tensor]
    sums = _SparseLogSums.apply(scores, labels, counts, mask)  # type: ignore[no-untyped-call]
    return sums


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over the last axis and log sum exp; writes to ``x``.

    A row of nothing but -inf has the sum -inf. Its softmax, which would be NaN, is put on the first
    entry: it only meets gradients through e^-inf = 0.
    """
    peak = x.amax(dim=-1, keepdim=True)
    x[..., :1].masked_fill_(peak == -_INF, 0.0)
    weights = torch.softmax(x, dim=-1)
    # The largest weight is 1 / sum e^(x - peak).
    log_sum = peak - weights.amax(dim=-1, keepdim=True).log()
    return weights, log_sum.squeeze(-1)


def _absent(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill_(~mask, -_INF)


def _dense_softmaxes(
    scores: Tensor, target: Tensor, mask: Tensor | None, *, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return softmax and log sum exp of the negatives and of the positives.

    A class with the score -inf is on neither side, even if the target says so: that is a mask, too.
    What is not needed any more is let go, for fresh memory costs more here than the arithmetic.
    """
    if soft:
        negative = target.neg().log1p_() + scores
        negatives = _normalise(_absent(negative, mask))
        # log t where t = 0 is not used; clamped since log(0) is ten times as slow as log.
        log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log_()
        within = (target > 0) & (scores != -_INF)
        positive = torch.where(within, log_target - scores, -_INF)
    else:
        # Converting int8 is vectorised, converting bool is not: 3 times as fast on CPU.
        number = target.view(torch.int8) if target.dtype == torch.bool else target
        bound = number.to(scores.dtype, copy=True).sub_(0.5).mul_(-_INF)  # -inf at positives
        negatives = _normalise(_absent(torch.minimum(scores, bound), mask))
        positive = torch.maximum(scores, bound).neg_().nan_to_num_(_NAN, -_INF, -_INF)
        del bound
    return *negatives, *_normalise(_absent(positive, mask))


class _DenseLogSums(torch.autograd.Function):
    """dN/ds = softmax over the negatives, dP/ds = -softmax over the positives."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, target: Tensor, mask: Tensor | None, soft: bool
    ) -> tuple[Tensor, Tensor]:
        sides = _dense_softmaxes(scores, target, mask, soft=soft)
        negatives, log_negatives, positives, log_positives = sides
        ctx.soft = soft
        ctx.save_for_backward(scores, target, mask, negatives, positives)
        return log_negatives, log_positives

    @staticmethod
    def backward(ctx: Any, grad_negative: Tensor, grad_positive: Tensor) -> _Gradients:
        scores, target, mask, negatives, positives = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: as functions of the scores
            sides = _dense_softmaxes(scores, target, mask, soft=ctx.soft)
            negatives, _, positives, _ = sides
        grad = negatives * grad_negative.unsqueeze(-1)
        grad.addcmul_(positives, grad_positive.unsqueeze(-1), value=-1)
        return grad, None, None, None


def _sparse_softmaxes(
    scores: Tensor, labels: Tensor, counts: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return softmax and log sum exp of the negatives, ``[..., class + 1]``, and the positives.

    The positives leave the negatives' sum by being overwritten; taking their exponentials out of
    the total instead cancels to nothing where the positives win. The last column takes the writes
    of the slots that do not count. The score -inf is a mask, as for dense targets.
    """
    negative = torch.cat([scores, torch.full_like(scores[..., :1], -_INF)], dim=-1)
    _absent(negative[..., :-1], mask)
    negative.scatter_(-1, torch.where(counts, labels, scores.shape[-1]), -_INF)
    positive = scores.gather(-1, labels).neg_().nan_to_num_(_NAN, -_INF, -_INF)
    return *_normalise(negative), *_normalise(_absent(positive, counts))


class _SparseLogSums(torch.autograd.Function):
    """As for dense targets; the positives' part is added at their labels."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, labels: Tensor, counts: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sides = _sparse_softmaxes(scores, labels, counts, mask)
        negatives, log_negatives, positives, log_positives = sides
        ctx.save_for_backward(scores, labels, counts, mask, negatives, positives)
        return log_negatives, log_positives

    @staticmethod
    def backward(ctx: Any, grad_negative: Tensor, grad_positive: Tensor) -> _Gradients:
        scores, labels, counts, mask, negatives, positives = ctx.saved_tensors
        if torch.is_grad_enabled():
            sides = _sparse_softmaxes(scores, labels, counts, mask)
            negatives, _, positives, _ = sides
        grad = negatives[..., :-1] * grad_negative.unsqueeze(-1)
        grad.scatter_add_(-1, labels, positives * -grad_positive.unsqueeze(-1))
        return grad, None, None, None
