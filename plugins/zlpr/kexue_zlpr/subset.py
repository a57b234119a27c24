"""Softmax over subsets: of a fixed number of labels, or of at most so many."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kexue.core.component import Example
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.loss import Loss, reduce
from kexue_zlpr.polynomials import count_tree, inclusion_odds
from kexue_zlpr.targets import (
    accumulated,
    check_count,
    check_logits,
    check_mask,
    check_target,
    make_threshold,
    not_hard,
    reject_faults,
    threshold_repr,
)
from kexue_zlpr.two_sided import softplus

__all__ = ["SubsetSoftmax"]

# Of a bracket of width log(4 k class) < 28. With log2(k) / 2 more, the expected number of labels is
# within 3.5 standard deviations of k, and P(N = k) not below about e^-6 of the mode.
_HALVINGS = 2


class SubsetSoftmax(Loss):
    r"""Combinatorial softmax: R^class and a set of labels to R, per row.

    A softmax whose alternatives are all subsets of k labels, or of at most K. Choose it where the
    number of labels is known or bounded and their joint probability matters; it is the maximum
    likelihood of independent labels given their number. :class:`~kexue_zlpr.ZLPR` is simpler,
    faster, and what the post recommends in the end.

    With the scores s (``logits``), the labels P (``target``) and the elementary symmetric
    polynomials :math:`Z_k = e_k(e^{s_1}, \dots, e^{s_n})` (post 7359, the section on the
    combinatorial softmax), for k = ``num_labels``

    .. math::
        \log Z_k - \sum_{j \in P} s_j

    and for K = ``max_labels``, with a class of score :math:`s_0` (``threshold``) that may be
    repeated and fills up the rest,

    .. math::
        \log \bar Z_K - \sum_{j \in P} s_j - (K - |P|) s_0, \qquad
        \bar Z_m = Z_m + e^{s_0} \bar Z_{m-1}.

    The gradient is the probability that a label is in the subset, minus 1 for labels: these
    probabilities (:meth:`marginals`) lie in (0, 1) and sum to k. One label is the softmax
    cross-entropy; ``max_labels`` at the number of classes is the sum of binary cross-entropies.
    Predict with :class:`~kexue_zlpr.ThresholdDecoder`: ``min_labels=k, max_labels=k``, or
    ``max_labels=K`` with the threshold.

    Time O(batch class k) in log(class) rounds, memory O(batch class log k).

    Deviations from the post: Newton's identities, its recursion for Z_k, subtract large terms: from
    about 50 classes on Z comes out wrong or negative. Here the scores are shifted by the
    :math:`\tau` at which independent labels of probability sigmoid(s + :math:`\tau`) are k in
    expectation; Z_k is the probability that they are k, times a factor known in closed form. Being
    a mode, that probability is never small, and it is a product of polynomials with positive
    coefficients. The value is exact for any :math:`\tau`; its absolute error is some units of
    rounding: a loss below 1e-6 is not resolved in float32, its gradient is.

    Args:
        num_labels: k, exactly so many labels in each row.
        max_labels: K, at most so many labels in each row. Give one of the two.
        threshold: s_0, with ``max_labels``.
        learnable: Make the threshold a parameter that starts there.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the rows.

    Raises:
        ArgumentError: If not exactly one of ``num_labels`` and ``max_labels`` is given, if it is
            not positive, or if there is a threshold without ``max_labels``.

    Example:
        >>> import torch
        >>> from kexue_zlpr import SubsetSoftmax
        >>> logits = torch.tensor([[2.0, -1.0, -3.0, 1.0]])
        >>> SubsetSoftmax(num_labels=2)(logits, torch.tensor([[1, 0, 0, 1]]))
        tensor(0.1915)
        >>> SubsetSoftmax(num_labels=2).marginals(logits)
        tensor([[0.9526, 0.1536, 0.0214, 0.8724]])

    References:
        - https://kexue.fm/archives/7359
    """

    def __init__(
        self,
        num_labels: int | None = None,
        max_labels: int | None = None,
        *,
        threshold: float = 0.0,
        learnable: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        if (num_labels is None) == (max_labels is None):
            raise ArgumentError(
                f"`num_labels` of SubsetSoftmax, or else `max_labels`, must be given, not both. "
                f"Found {num_labels} and {max_labels}.",
                argument="num_labels",
            )
        self.threshold = make_threshold("SubsetSoftmax", threshold, learnable=learnable)
        if num_labels is not None:
            check_count("SubsetSoftmax", "num_labels", num_labels, 1)
            if learnable or threshold:
                raise ArgumentError(
                    "`threshold` of SubsetSoftmax must be 0 and not learnable with `num_labels`: "
                    f"it has no effect then. Found {threshold}. Use `max_labels`.",
                    argument="threshold",
                )
        if max_labels is not None:
            check_count("SubsetSoftmax", "max_labels", max_labels, 1)
        self.num_labels = num_labels
        self.max_labels = max_labels

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        if self.num_labels is not None:
            return f"num_labels={self.num_labels}, reduction={self.reduction!r}"
        rest = threshold_repr(self.threshold, self.reduction)
        return f"max_labels={self.max_labels}, {rest}"

    def forward(
        self,
        logits: Float[Tensor, "*batch class"],
        target: Shaped[Tensor, "*batch class"],
        mask: Bool[Tensor, "*batch class"] | None = None,
    ) -> Tensor:
        """Return the loss, in nats; for each row with ``reduction="none"``, shape ``[*batch]``.

        Args:
            logits: The scores, any real numbers; -inf for a class that cannot be a label. For
                float16 and bfloat16 the loss is computed and returned in float32.
            target: 1 for a label, 0 for none, boolean or of any number type; exactly
                ``num_labels`` or at most ``max_labels`` ones in each row.
            mask: True where a class takes part. The others are in no subset, whatever logits and
                target say there.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, a target is neither 0 nor 1, or a row
                has the wrong number of labels.
        """
        scores = self._scores(logits, mask)
        check_target("SubsetSoftmax", target, logits)
        if mask is not None:
            target = target.masked_fill(~mask, 0)
        self._check_labels(target)
        values: Tensor = _SubsetCrossEntropy.apply(  # type: ignore[no-untyped-call]  # as in torch
            scores.reshape(-1, scores.shape[-1]),
            target.reshape(-1, scores.shape[-1]),
            self._size,
            self.num_labels is None,
        )
        return reduce(values.reshape(logits.shape[:-1]), self.reduction)

    def marginals(
        self,
        logits: Float[Tensor, "*batch class"],
        *,
        mask: Bool[Tensor, "*batch class"] | None = None,
    ) -> Float[Tensor, "*batch class"]:
        """Return the probability that each class is in the subset, without gradient.

        Args:
            logits: The scores, as for the loss.
            mask: True where a class takes part.

        Returns:
            float32 for half-precision input; NaN for a row with fewer than ``num_labels`` classes.

        Raises:
            ArgumentError: If shapes or dtypes do not fit.
        """
        with torch.no_grad():
            scores = self._scores(logits, mask)
            rows = scores.reshape(-1, scores.shape[-1])
            subsets = _Subsets(rows, self._size, at_most=self.num_labels is None)
            present = subsets.marginals()[1].clamp(max=1.0)  # against rounding
            return present.t().reshape(scores.shape)

    @property
    def _size(self) -> int:
        return self.num_labels or self.max_labels or 1

    def _scores(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Return s - s_0, -inf at masked classes: only the differences enter."""
        check_logits("SubsetSoftmax", logits)
        check_mask("SubsetSoftmax", mask, logits)
        if self.num_labels is not None and self.num_labels > logits.shape[-1]:
            raise ArgumentError(
                f"`num_labels` of SubsetSoftmax must be at most the number of classes, "
                f"{logits.shape[-1]}. Found {self.num_labels}.",
                argument="num_labels",
            )
        scores = accumulated(logits)
        if isinstance(self.threshold, Tensor) or self.threshold:
            scores = scores - self.threshold
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    def _check_labels(self, target: Tensor) -> None:
        """Refuse targets other than 0 and 1 and rows with the wrong number of labels."""
        counts = target.bool().sum(dim=-1)
        wrong = counts != self._size if self.num_labels else counts > self._size
        faults = not_hard(target)
        if not (faults.any() | wrong.any()):  # one synchronisation
            return
        if faults.any():
            reject_faults("SubsetSoftmax", target, faults, "0 or 1")
        row = wrong.nonzero()[0].tolist()
        bound = "exactly `num_labels`" if self.num_labels else "at most `max_labels`"
        raise ArgumentError(
            f"`target` of SubsetSoftmax must have {bound} = {self._size} labels in each row. "
            f"Found {counts[tuple(row)].item()} in row {row}.",
            argument="target",
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return four rows of six classes with two labels each, some classes masked."""
        logits = torch.randn(4, 6, generator=generator) * 2
        target = torch.zeros(4, 6, dtype=torch.bool)
        target.scatter_(1, torch.tensor([[0, 1], [2, 5], [3, 0], [1, 2]]), value=True)
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[2, 4:] = False
        return Example({"num_labels": 2}, {"logits": logits, "target": target, "mask": mask})


class _Subsets:
    """The subsets of a row under independent labels of probability sigmoid(s + tau).

    With N the number of labels and A = sum_i log(1 + e^(s_i + tau)),

        log Z_k = log P(N = k) + A - k tau,
        log Z-bar_K - K s_0 = log sum_{j <= K} P(N = j) e^((K - j) tau) + A - K tau.

    Args:
        scores: Shape ``[batch, class]``.
        size: k or K.
        at_most: Whether it is K.
    """

    def __init__(self, scores: Tensor, size: int, *, at_most: bool) -> None:
        self.size = size
        self.tilt = _tilt(scores.detach(), size, at_most=at_most)
        self.tilted = scores.t().contiguous() + self.tilt  # [class, batch] from here on
        leaves = torch.stack([-self.tilted, self.tilted]).sigmoid_()
        self.levels = count_tree(leaves, min(size, scores.shape[1]))
        counts = self.levels[-1].squeeze(1)
        if at_most:
            rest = size - torch.arange(len(counts), device=scores.device).unsqueeze(1)
            self.weights = torch.exp(rest * self.tilt)
        else:
            self.weights = torch.zeros_like(counts)
            self.weights[-1] = 1.0
        self.total = (self.weights * counts).sum(dim=0)

    def cross_entropy(self, label: Tensor) -> Tensor:
        """Return the loss per row, for labels ``[class, batch]``.

        The sum A less the labels' s + tau is taken term by term: log(1 + e^-(s + tau)) at labels.
        """
        missing = self.size - label.sum(dim=0)
        surprise = softplus(torch.where(label, -self.tilted, self.tilted)).sum(dim=0)
        return self.total.log() + surprise - missing * self.tilt

    def marginals(self) -> Tensor:
        """Return the probabilities that a class is not, and is, in the subset.

        Shape ``[2, class, batch]``.
        """
        return inclusion_odds(self.levels, self.weights / self.total).mul_(self.levels[0])


def _tilt(scores: Tensor, size: int, *, at_most: bool) -> Tensor:
    """Return tau, at which about ``size`` labels are expected; with ``at_most`` it is not positive.

    Any tau gives the exact result; this one keeps P(N = size) from vanishing. The brackets: at
    ``high`` the best k classes have 1/2 less than k labels, at ``low`` the others have 1/2.

    Args:
        scores: Shape ``[batch, class]``.
        size: The number of labels.
        at_most: Whether fewer are allowed.
    """
    classes = scores.shape[1]
    if at_most and size >= classes:
        return scores.new_zeros(scores.shape[:1])
    best = scores.topk(min(size + 1, classes)).values
    last = best[:, size - 1]
    high = (math.log(2 * size) - last).where(last.isfinite(), 0.0)
    low = high
    if size < classes:
        next_best = best[:, size]
        low = (-math.log(2 * (classes - size)) - next_best).where(next_best.isfinite(), high)
    for _ in range(_HALVINGS + math.ceil(math.log2(size) / 2)):
        middle = (low + high) / 2
        few = (scores + middle.unsqueeze(1)).sigmoid_().sum(dim=1) < size
        low, high = middle.where(few, low), high.where(few, middle)
    tilt = (low + high) / 2
    return tilt.clamp(max=0.0) if at_most else tilt


class _SubsetCrossEntropy(torch.autograd.Function):
    """The loss per row, its gradient from the same product tree."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, size: int, at_most: bool) -> Tensor:
        subsets = _Subsets(scores, size, at_most=at_most)
        label = target.t().bool().contiguous()
        gradient = None
        if ctx.needs_input_grad[0]:
            absent, present = subsets.marginals()
            gradient = torch.where(label, -absent, present).t().contiguous()
        ctx.size, ctx.at_most = size, at_most
        ctx.save_for_backward(scores, label, gradient)
        return subsets.cross_entropy(label)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        scores, label, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: through the tree, by autograd
            values = _Subsets(scores, ctx.size, at_most=ctx.at_most).cross_entropy(label)
            (grad,) = torch.autograd.grad(values, scores, grad_values, create_graph=True)
            return grad, None, None, None
        return gradient * grad_values.unsqueeze(1), None, None, None
