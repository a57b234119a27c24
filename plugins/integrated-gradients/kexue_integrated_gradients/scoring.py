"""The number that is explained: one output of a model, row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError
from kexue_integrated_gradients.attribution import Target

__all__ = ["Score", "as_index", "measuring", "row_by_row"]


@contextlib.contextmanager
def measuring(model: Callable[..., Any]) -> Iterator[None]:
    """Let gradients flow, with the model as in ``eval()``; afterwards all is as it was.

    In training, dropout would make the path random and batch normalisation would mix its points.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    # cuDNN goes back through recurrent networks in training mode only
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    try:
        for module in training:
            module.training = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield
    finally:
        for module in training:
            module.training = True


def as_index(target: Target | None, rows: int) -> Tensor | None:
    """Return a target as one index per row, ``[rows, axes of the output]``.

    Raises:
        ArgumentError: If it is not whole numbers, or not one per row.
    """
    if target is None:
        return None
    per_row = isinstance(target, list | Tensor) or getattr(target, "ndim", 0) > 0
    try:
        index = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        index = torch.empty(0)
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if rows == 0 and not index.numel():
        return torch.zeros(0, 1, dtype=torch.int64)
    if not whole or not (1 <= index.ndim <= 2 if per_row else index.ndim <= 1):
        raise ArgumentError(
            f"`target` must be a whole number, a tuple of them for outputs of several axes, or a "
            f"list or tensor of one per row. Found {_shown(target)}.",
            argument="target",
        )
    if not per_row:
        return index.long().reshape(1, -1).expand(rows, -1)
    if len(index) != rows:
        raise ArgumentError(
            f"`target` must have one index for each of the {rows} rows of `inputs`. "
            f"Found {len(index)}.",
            argument="target",
        )
    return index.long().reshape(rows, -1)


def _shown(target: Any) -> str:
    if isinstance(target, Tensor):
        dtype = str(target.dtype).removeprefix("torch.")
        return f"a tensor of {dtype} with shape {list(target.shape)}"
    return repr(target)


def row_by_row(argument: Any, block: slice, rows: int, copies: int = 1) -> Any:
    """Return some rows of an argument if it has as many as the batch, else the argument.

    Args:
        argument: Anything.
        block: Which rows.
        rows: Size of the batch.
        copies: How often, one after the other.
    """
    if not isinstance(argument, Tensor) or not argument.ndim or len(argument) != rows:
        return argument
    chosen = argument[block]
    return chosen.repeat(copies, *[1] * (chosen.ndim - 1)) if copies > 1 else chosen


class Score:
    """F: rows of inputs to one number each.

    Args:
        model: Rows to outputs.
        additional: Further arguments; tensors whose first axis is the batch are taken row by row.
        index: One index per row of the batch into the outputs; None if there is one output.
        rows: Size of the batch.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        additional: tuple[Any, ...],
        index: Tensor | None,
        rows: int,
    ) -> None:
        self.model = model
        self.additional = additional
        self.index = index
        self.rows = rows
        self.checked = False  # reading values back from a device takes time

    def __call__(self, points: tuple[Tensor, ...], block: slice, copies: int) -> Tensor:
        """Return the score of ``copies`` points for each row of a block, ``[copies * rows]``.

        Args:
            points: The inputs, all rows of the first copy before those of the second.
            block: Which rows of the batch they belong to.
            copies: How many points there are for each.
        """
        arguments = [row_by_row(a, block, self.rows, copies) for a in self.additional]
        outputs = self._checked(self.model(*points, *arguments), len(points[0]))
        if self.index is None:
            return outputs.reshape(len(outputs))
        index = self.index[block].to(outputs.device)
        if not self.checked:
            self._check_index(index, outputs)
        rows = torch.arange(len(outputs), device=outputs.device)
        return outputs[(rows, *index.repeat(copies, 1).unbind(1))]

    def _checked(self, outputs: Any, rows: int) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ArgumentError(
                f"`model` must return a tensor. Found {type(outputs).__name__}; wrap it, as in "
                f"`lambda x: model(x).logits`.",
                argument="model",
            )
        if not outputs.ndim or len(outputs) != rows:
            raise ArgumentError(
                f"`model` must return one output per row, {rows} here. "
                f"Found shape {list(outputs.shape)}.",
                argument="model",
            )
        if not outputs.is_floating_point():
            raise ArgumentError(
                f"`model` must return floating-point scores, such as logits. "
                f"Found {str(outputs.dtype).removeprefix('torch.')}.",
                argument="model",
            )
        if self.index is None and outputs.numel() != rows:
            raise ArgumentError(
                f"`target` must say which of the outputs {list(outputs.shape[1:])} of a row is "
                f"explained. Found None.",
                argument="target",
            )
        return outputs

    def _check_index(self, index: Tensor, outputs: Tensor) -> None:
        if outputs.ndim == 1 or outputs.ndim - 1 != index.shape[1]:
            raise ArgumentError(
                f"`target` must have one index for each of the {outputs.ndim - 1} axes of a row's "
                f"output, {list(outputs.shape[1:])}. Found {index.shape[1]}.",
                argument="target",
            )
        sizes = torch.tensor(outputs.shape[1:], device=index.device)
        beyond = ((index < 0) | (index >= sizes)).any(1)
        if beyond.any():
            raise ArgumentError(
                f"`target` must be below the sizes {list(outputs.shape[1:])} of a row's output, "
                f"and not negative. Found {index[beyond][0].tolist()}.",
                argument="target",
            )
        self.checked = True
