"""Losses: scores and targets to a value to be minimised."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, did_you_mean
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import histogram

__all__ = ["Loss", "reduce", "run"]


class Loss(nn.Module, Contract):
    """A loss maps scores and targets, a row each, to one value per row, and reduces these.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the rows, or a further one that the
            class lists in :attr:`reductions`.

    Raises:
        ArgumentError: If ``reduction`` is unknown.
    """

    differentiable: ClassVar[bool] = True
    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum")

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in self.reductions:
            raise ArgumentError(
                f"`reduction` of {type(self).__name__} must be one of "
                f"{', '.join(map(repr, self.reductions))}. Found {reduction!r}."
                f"{did_you_mean(str(reduction), self.reductions)}",
                argument="reduction",
            )
        self.reduction = reduction

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss: a scalar, or one value per row with ``reduction="none"``.

        The first argument are the scores, the second the targets.
        """


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Reduce one value per row.

    Args:
        values: Shape ``[...]``.
        reduction: ``"mean"`` (0 for no rows at all, where torch says NaN), ``"sum"`` or ``"none"``.
    """
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / max(values.numel(), 1)


def run(job: Job, *, grad: bool = False) -> Result:
    """Compute a loss on files of scores and targets, one value per row.

    Args:
        job: The call.
        grad: Also give the gradient with respect to the scores.
    """
    tensors = job.tensors()
    loss = job.build(reduction="none", **job.sizes(tensors))
    scores = next(iter(tensors))
    if grad and not tensors[scores].is_floating_point():
        raise ArgumentError(
            f"`--grad` of {job.id} needs `{scores}` of floating-point numbers. "
            f"Found {str(tensors[scores].dtype).removeprefix('torch.')}.",
            argument="grad",
        )
    tensors[scores].requires_grad_(grad)
    values: Tensor = loss(**tensors)
    if grad and not values.requires_grad:
        raise ArgumentError(
            f"`--grad` has no use here: {job.id} is not differentiable.", argument="grad"
        )
    kept = values.detach()
    exact = kept.double()
    summary = {"rows": kept.numel(), "mean": float(exact.mean()), "sum": float(exact.sum())}
    arrays = {"values": kept}
    if grad:
        (arrays["gradient"],) = torch.autograd.grad(values.sum(), tensors[scores])
    return Result(summary, arrays, plot=lambda figure: histogram(figure, kept, "value per row"))
