"""From multi-label scores to label sets."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kexue.core.component import Example
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import PAD, Decoder, DecodeResult
from kexue_zlpr.targets import accumulated, check_count, check_logits, check_mask, check_number

__all__ = ["ThresholdDecoder"]


class ThresholdDecoder(Decoder):
    r"""Threshold decoding: scores R^class to the set of labels, per row.

    For scores trained with ZLPR the labels are the classes above the threshold class,
    {i : s_i > s_0} (post 7359). With :math:`a \le |S| \le b` the result is the set S that
    maximises

    .. math::
        \sum_{i \in S} (s_i - s_0),

    that is: the classes above :math:`s_0`, only the best b of them, or the best a where those are
    fewer. ``min_labels=k, max_labels=k`` gives the best k whatever the threshold: the prediction
    for :class:`~kexue_zlpr.PairwiseSoftmax` and :class:`~kexue_zlpr.SubsetSoftmax` with k labels.

    Time O(batch class), with a bound O(batch class log b). Ties at a bound are broken arbitrarily.
    Deviations from the post: none; ``min_labels`` and ``mask`` are added.

    Args:
        threshold: s_0: ``loss.threshold.item()`` if the loss learned it.
        max_labels: At most so many labels; any number by default.
        min_labels: At least so many labels, as far as there are classes.

    Raises:
        ArgumentError: If ``threshold`` is not finite, or not 0 <= min_labels <= max_labels.

    Example:
        >>> import torch
        >>> from kexue_zlpr import ThresholdDecoder
        >>> logits = torch.tensor([[2.0, -1.0, 3.0], [-2.0, -0.5, -1.0]])
        >>> found = ThresholdDecoder().decode(logits)
        >>> found.sequences.tolist(), found.scores.tolist()
        ([[0, 2], [-1, -1]], [5.0, 0.0])
        >>> ThresholdDecoder(max_labels=1, min_labels=1).decode(logits).tolist()
        [[2], [1]]

    References:
        - https://kexue.fm/archives/7359 and, for the probabilities, https://kexue.fm/archives/9064
    """

    def __init__(
        self, threshold: float = 0.0, *, max_labels: int | None = None, min_labels: int = 0
    ) -> None:
        self.threshold = check_number("ThresholdDecoder", "threshold", threshold)
        self.min_labels = check_count("ThresholdDecoder", "min_labels", min_labels, 0)
        if max_labels is not None:
            check_count("ThresholdDecoder", "max_labels", max_labels, max(min_labels, 1))
        self.max_labels = max_labels

    def decode(
        self,
        logits: Float[Tensor, "batch class"],
        *,
        mask: Bool[Tensor, "batch class"] | None = None,
    ) -> DecodeResult:
        """Return the label set of each row and its score.

        Args:
            logits: The scores. A class with -inf is never a label.
            mask: True where a class takes part; the others are never labels.

        Returns:
            ``sequences``: the labels in ascending order, ``[batch, most labels of a row]``,
            right-padded with -1. ``scores``: the sum of s_i - s_0 over them, ``[batch]``, float32
            for half-precision input, NaN for a row with a NaN.

        Raises:
            ArgumentError: If shapes or dtypes do not fit.
        """
        above = self._above(logits, mask)
        chosen = self._choose(above)
        counts = chosen.sum(dim=-1)
        width = int(counts.max()) if len(counts) else 0
        row, label = chosen.nonzero(as_tuple=True)
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        sequences = label.new_full((len(counts), width), PAD)
        sequences[row, slot] = label
        total = above.where(chosen | above.isnan(), 0.0).sum(dim=-1)
        return DecodeResult(sequences, total)

    def probabilities(
        self,
        logits: Float[Tensor, "*batch class"],
        *,
        mask: Bool[Tensor, "*batch class"] | None = None,
    ) -> Float[Tensor, "*batch class"]:
        """Return the probability of each label, sigmoid(2 (s - s_0)), 0 for masked classes.

        Not sigmoid(s): ZLPR is lowest where this is the soft target (post 9064).

        Args:
            logits: The scores.
            mask: True where a class takes part.

        Raises:
            ArgumentError: If shapes or dtypes do not fit.
        """
        check_logits("ThresholdDecoder", logits)
        check_mask("ThresholdDecoder", mask, logits)
        probability = torch.sigmoid(2 * (logits - self.threshold))
        return probability if mask is None else probability.masked_fill(~mask, 0.0)

    def _above(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Return s - s_0, -inf at masked classes."""
        check_logits("ThresholdDecoder", logits)
        if logits.dim() != 2:
            raise ArgumentError(
                f"`logits` of ThresholdDecoder must have shape [batch, class]. "
                f"Found {list(logits.shape)}.",
                argument="logits",
            )
        check_mask("ThresholdDecoder", mask, logits)
        above = accumulated(logits.detach()) - self.threshold
        return above if mask is None else above.masked_fill(~mask, -torch.inf)

    def _choose(self, above: Tensor) -> Tensor:
        """Return which classes are labels."""
        chosen = above > 0
        if self.max_labels is not None and self.max_labels < above.shape[-1]:
            chosen &= _best(above, self.max_labels)
        if self.min_labels:
            chosen |= _best(above, min(self.min_labels, above.shape[-1])) & (above > -torch.inf)
        return chosen

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return four rows of six classes, some masked, and at most three labels."""
        logits = torch.randn(4, 6, generator=generator) * 2
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[2, 4:] = False
        return Example({"max_labels": 3}, {"logits": logits, "mask": mask})


def _best(above: Tensor, count: int) -> Tensor:
    """Return which classes are the ``count`` highest of their row."""
    return torch.zeros_like(above, dtype=torch.bool).scatter_(
        -1, above.topk(count, dim=-1).indices, value=True
    )
