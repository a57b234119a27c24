"""ZLPR: softmax cross-entropy for any number of labels, with a threshold class."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kexue.core.component import Example
from kexue.core.interfaces.loss import Loss, reduce
from kexue_zlpr.targets import (
    accumulated,
    check_count,
    check_logits,
    check_mask,
    check_target,
    grade_target,
    label_slots,
    make_threshold,
    threshold_repr,
)
from kexue_zlpr.two_sided import dense_log_sums, softplus, sparse_log_sums

__all__ = ["ZLPR"]

_ENOUGH = 16  # so many logits in (0, 1) do not happen by chance


class ZLPR(Loss):
    r"""Zero-bounded log-sum-exp & pairwise rank-based loss: R^class x [0, 1]^class to R, per row.

    Choose it for multi-label classification with many classes and few labels: it compares scores
    with each other, as softmax does, so needs no class weights and no threshold to be tuned, where
    a sum of binary cross-entropies is swamped by the negatives. Where these are already tuned and
    balanced it gains little.

    With the scores s (``logits``), the targets t, and the threshold :math:`s_0`:

    .. math::
        \log\Big(e^{s_0} + \sum_i (1 - t_i) e^{s_i}\Big)
        + \log\Big(e^{-s_0} + \sum_j t_j e^{-s_j}\Big)

    For t in {0, 1} the sums run over negatives and positives (post 7359, the final loss and the
    formula with s_0 before it). For soft t (label smoothing, mixup) this is post 9064, whose
    minimum is at s_i - s_0 = logit(t_i) / 2: hence sigmoid(2 (s - s_0)) is the probability
    (:meth:`~kexue_zlpr.ThresholdDecoder.probabilities`), and s_i > s_0 the prediction.

    With ``sparse`` the target lists each row's labels: the value and gradient of the 0/1 target
    that the list stands for, which is never built. Choose it for thousands of classes. The
    negatives' sum is taken with the positives overwritten by -inf. Subtracting their exponentials
    from the total instead, as other implementations do, leaves nothing but rounding where the
    positives have won: for s = (20, -20, -20, -20) and label 0 the loss is 8.2e-9, not 3.88.

    With a single positive t the loss is log(1 + e^(s_0 - s_t)) + log(1 + sum_i e^(s_i - s_0)) over
    the others: the binary cross-entropy of t plus the softmax cross-entropy whose target is the
    threshold class, t left out.

    Time and memory O(batch class), sparse O(batch class + batch label log label); no
    synchronisation for boolean targets, one for others. The gradient can be differentiated again;
    the target gets none.

    Deviations from the posts: what is absent is -inf, not -1e12; soft targets are not clipped;
    label lists and ``mask`` are added, and the threshold can be learned. A first batch whose logits
    all lie between 0 and 1 brings a warning: these are probabilities, where the posts ask for
    logits in all of R.

    Args:
        threshold: s_0, the score that positives are to exceed and negatives to stay below.
        sparse: Whether targets list the labels of each row, instead of 0/1 for each class.
        padding_index: Fills the lists of rows with fewer labels. If it is a class, then one that
            can never be a label; it stays a negative unless it is masked.
        learnable: Make the threshold a parameter that starts there.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the rows.

    Raises:
        ArgumentError: If ``threshold`` is not finite, ``padding_index`` not an integer, or
            ``reduction`` unknown.

    Example:
        >>> import torch
        >>> from kexue_zlpr import ZLPR
        >>> logits = torch.tensor([[2.0, -1.0, -3.0], [-2.0, 0.0, 1.0]])
        >>> target = torch.tensor([[1, 0, 0], [0, 1, 1]])
        >>> ZLPR(reduction="none")(logits, target)
        tensor([0.4759, 0.9889])
        >>> smoothed = target * 0.9 + 0.05
        >>> ZLPR(reduction="none")(logits, smoothed)
        tensor([1.3881, 1.2551])
        >>> labels = torch.tensor([[0, -1], [2, 1]])
        >>> ZLPR(sparse=True, reduction="none")(logits, labels)
        tensor([0.4759, 0.9889])

    References:
        - https://kexue.fm/archives/7359 and https://kexue.fm/archives/9064
        - Su et al., ZLPR: A Novel Loss for Multi-label Classification, 2022,
          https://arxiv.org/abs/2208.02955
    """

    def __init__(
        self,
        threshold: float = 0.0,
        *,
        sparse: bool = False,
        padding_index: int = -1,
        learnable: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        self.threshold = make_threshold("ZLPR", threshold, learnable=learnable)
        self.sparse = sparse
        self.padding_index = check_count("ZLPR", "padding_index", padding_index)
        self._seen = False

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        rest = threshold_repr(self.threshold, self.reduction)
        return f"sparse=True, padding_index={self.padding_index}, {rest}" if self.sparse else rest

    def forward(
        self,
        logits: Float[Tensor, "*batch class"],
        target: Shaped[Tensor, "*batch class_or_label"],
        mask: Bool[Tensor, "*batch class"] | None = None,
    ) -> Tensor:
        """Return the loss, in nats; for each row with ``reduction="none"``, shape ``[*batch]``.

        Args:
            logits: The scores, any real numbers; -inf takes a class out of both sums, like
                ``mask``. For float16 and bfloat16 the loss is computed and returned in float32.
            target: 1 for a label, 0 for none, boolean or of any number type; floating point may
                lie between. With ``sparse`` the labels of each row, integers in any order, filled
                with ``padding_index``; one that is listed twice counts once, and the axis may be
                empty. A constant: it gets no gradient.
            mask: True where a class takes part. The others are in neither sum, whatever logits and
                target say there.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, a target is outside [0, 1], or a label
                is out of range.
        """
        check_logits("ZLPR", logits)
        check_mask("ZLPR", mask, logits)
        self._seen = _saw_probabilities("ZLPR", logits, seen=self._seen)
        scores = accumulated(logits)
        if self.sparse:
            labels, counts = label_slots("ZLPR", target, logits, self.padding_index)
            if mask is not None:
                counts = counts & mask.gather(-1, labels)
            log_negatives, log_positives = sparse_log_sums(scores, labels, counts, mask)
        else:
            check_target("ZLPR", target, logits, " For lists of labels use `sparse=True`.")
            if mask is not None:
                target = target.masked_fill(~mask, 0)
            weights, soft = grade_target("ZLPR", target, scores.dtype)
            log_negatives, log_positives = dense_log_sums(scores, weights, mask, soft=soft)
        return reduce(_against(self.threshold, log_negatives, log_positives), self.reduction)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return four rows of six classes, one without a label, some classes masked."""
        logits = torch.randn(4, 6, generator=generator) * 2
        target = torch.rand(4, 6, generator=generator) < 0.3
        target[1] = False
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[2, 4:] = False
        return Example({}, {"logits": logits, "target": target, "mask": mask})


def _against(threshold: float | Tensor, log_negatives: Tensor, log_positives: Tensor) -> Tensor:
    """Return log(e^s_0 + e^N) + log(e^-s_0 + e^P), in which +s_0 and -s_0 before the logs cancel.

    As softplus it keeps its relative precision when both sums vanish beside the threshold.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold.to(log_negatives.dtype)
    return softplus(log_negatives - threshold) + softplus(log_positives + threshold)


def _saw_probabilities(owner: str, logits: Tensor, *, seen: bool) -> bool:
    """Warn if the first batch looks like probabilities; later ones cost nothing."""
    if seen or torch.compiler.is_compiling() or logits.numel() < _ENOUGH:
        return seen
    low, high = torch.stack(logits.detach().aminmax()).tolist()
    if low > 0 and high < 1:
        warnings.warn(
            f"All `logits` of {owner} lie between 0 and 1, as if they came from a sigmoid or "
            f"softmax. {owner} takes the scores before that: any real numbers.",
            UserWarning,
            stacklevel=5,
        )
    return True
