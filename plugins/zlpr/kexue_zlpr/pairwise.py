"""The unified pairwise form of softmax cross-entropy: every positive above every negative."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kexue.core.component import Example
from kexue.core.interfaces.loss import Loss, reduce
from kexue_zlpr.targets import (
    accumulated,
    check_logits,
    check_mask,
    check_number,
    check_target,
    grade_target,
    not_hard,
    reject_faults,
)
from kexue_zlpr.two_sided import dense_log_sums, softplus

__all__ = ["PairwiseSoftmax"]


class PairwiseSoftmax(Loss):
    r"""Pairwise softmax cross-entropy: R^class x {0, 1}^class to R, per row.

    Choose it where the number of labels is known at prediction, which then takes the highest
    scores, or where only the order of the scores matters. It has no threshold: adding a constant
    to all scores changes nothing. Choose :class:`~kexue_zlpr.ZLPR` if the number of labels varies.

    With the scores s (``logits``), the negatives N and the positives P:

    .. math::
        \log\Big(1 + \sum_{i \in N} \sum_{j \in P} e^{\gamma (s_i - s_j + m)}\Big)
        = \log\Big(1 + \sum_{i \in N} e^{\gamma (s_i + m)} \sum_{j \in P} e^{-\gamma s_j}\Big)

    (post 7359; Circle Loss paper, Eq. 1). With one positive, :math:`\gamma = 1` and m = 0 it is the
    softmax cross-entropy; without positives, or without negatives, it is 0.

    Time and memory O(batch class), as for ZLPR. The gradient can be differentiated again.

    Deviations from the post: none; ``mask`` is added.

    Args:
        gamma: The scale :math:`\gamma`, positive.
        margin: m, by how much a positive is to exceed a negative.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the rows.

    Raises:
        ArgumentError: If ``gamma`` is not positive, ``margin`` not finite or ``reduction`` unknown.

    Example:
        >>> import torch
        >>> from kexue_zlpr import PairwiseSoftmax
        >>> logits = torch.tensor([[2.0, -1.0, -3.0]])
        >>> PairwiseSoftmax()(logits, torch.tensor([[1, 0, 0]]))
        tensor(0.0550)
        >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0]))
        tensor(0.0550)

    References:
        - https://kexue.fm/archives/7359
        - Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization,
          CVPR 2020, https://arxiv.org/abs/2002.10857, Eq. (1)
    """

    def __init__(self, gamma: float = 1.0, margin: float = 0.0, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.gamma = check_number("PairwiseSoftmax", "gamma", gamma, positive=True)
        self.margin = check_number("PairwiseSoftmax", "margin", margin)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"gamma={self.gamma:g}, margin={self.margin:g}, reduction={self.reduction!r}"

    def forward(
        self,
        logits: Float[Tensor, "*batch class"],
        target: Shaped[Tensor, "*batch class"],
        mask: Bool[Tensor, "*batch class"] | None = None,
    ) -> Tensor:
        """Return the loss, in nats; for each row with ``reduction="none"``, shape ``[*batch]``.

        Args:
            logits: The scores, any real numbers; -inf takes a class out of both sums, like
                ``mask``. For float16 and bfloat16 the loss is computed and returned in float32.
            target: 1 for a label, 0 for none, boolean or of any number type.
            mask: True where a class takes part. The others are in neither sum, whatever logits and
                target say there.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, or a target is neither 0 nor 1.
        """
        check_logits("PairwiseSoftmax", logits)
        check_target("PairwiseSoftmax", target, logits)
        check_mask("PairwiseSoftmax", mask, logits)
        scores = accumulated(logits)
        if mask is not None:
            target = target.masked_fill(~mask, 0)
        weights, soft = grade_target("PairwiseSoftmax", target, scores.dtype)
        if soft:
            reject_faults("PairwiseSoftmax", target, not_hard(target), "0 or 1")
        if self.gamma != 1:
            scores = self.gamma * scores
        log_negatives, log_positives = dense_log_sums(scores, weights, mask, soft=False)
        values = softplus(log_negatives + log_positives + self.gamma * self.margin)
        return reduce(values, self.reduction)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return four rows of six classes, one without a label, some classes masked."""
        logits = torch.randn(4, 6, generator=generator) * 2
        target = torch.rand(4, 6, generator=generator) < 0.4
        target[1] = False
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[2, 4:] = False
        return Example({}, {"logits": logits, "target": target, "mask": mask})
