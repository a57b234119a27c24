"""Attributions: a model and its inputs to what each input contributed to the output."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kexue.core.interfaces.base import Contract

__all__ = ["Attribution", "Attributions", "Baseline", "Target"]

Target = int | tuple[int, ...] | Sequence[int] | Sequence[tuple[int, ...]] | Tensor
"""Which output is explained: one index for all rows, or a list or tensor of one per row."""

Baseline = float | Tensor | tuple[float | Tensor, ...]
"""What the inputs are compared with; a tuple where a model takes several inputs."""

_ROUNDINGS = 64  # of a model, after which outputs that should be equal may differ


class Attributions(NamedTuple):
    """What each input contributed.

    Args:
        values: Shape of the inputs; a tuple where a model takes several. Signed, in the unit of
            the output.
        error: The completeness error, shape ``[batch]``: the sum of a row's values less the
            difference F(x) - F(x̄) that they are to add up to.
        outputs: F(x), shape ``[batch]``.
        baseline_outputs: F(x̄), shape ``[batch]``; the mean over several baselines.
    """

    values: Any
    error: Tensor
    outputs: Tensor
    baseline_outputs: Tensor

    @property
    def relative_error(self) -> float:
        """Mean absolute completeness error over mean absolute difference; 0 for no rows.

        0 also where neither is more than the last bits of the outputs.
        """
        ends = [self.outputs, self.baseline_outputs]
        wrong, whole = float(self.error.abs().sum()), float((ends[0] - ends[1]).abs().sum())
        last_bits = _ROUNDINGS * torch.finfo(self.outputs.dtype).eps
        if max(wrong, whole) <= last_bits * sum(float(end.abs().sum()) for end in ends):
            return 0.0
        return wrong / whole if whole else math.inf


class Attribution(Contract):
    """An attribution maps a model and its inputs to what each input contributed to the output."""

    complete: ClassVar[bool] = False
    """The values of a row add up to F(x) - F(x̄)."""

    implementation_invariant: ClassVar[bool] = False
    """Models that compute the same function get the same values."""

    @abstractmethod
    def attribute(
        self,
        model: Callable[..., Tensor],
        inputs: Any,
        baselines: Any = None,
        *,
        target: Target | None = None,
        layer: nn.Module | str | None = None,
        additional: tuple[Any, ...] = (),
    ) -> Attributions:
        """Explain an output of a model.

        Args:
            model: A module, or any function of tensors ``[batch, ...]``, whose output is
                ``[batch]`` or ``[batch, ...]``.
            inputs: What it is applied to, ``[batch, ...]``.
            baselines: What the inputs are compared with.
            target: Which output, where there are several.
            layer: A layer within the model, to attribute to its output in place of the inputs.
            additional: Further arguments of the model, to which nothing is attributed.
        """
