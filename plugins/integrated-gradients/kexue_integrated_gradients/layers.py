"""A model seen from one of its layers, by replacing the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, did_you_mean
from kexue_integrated_gradients.scoring import row_by_row

__all__ = ["FromLayer", "find_layer"]


def find_layer(model: Callable[..., Any], layer: nn.Module | str) -> nn.Module:
    """Return a layer of a model.

    Args:
        model: The model.
        layer: The layer, or its name as in ``model.named_modules()``.

    Raises:
        ArgumentError: If there is no such layer, or it takes no hooks.
    """
    if isinstance(layer, nn.Module):
        found = layer
    else:
        named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        if layer not in named or not layer:
            names = [name for name in named if name]
            raise ArgumentError(
                f"`layer` must be a layer of `model`. Found {layer!r}.{did_you_mean(layer, names)} "
                f"It has: {', '.join(names) or 'no named layers'}.",
                argument="layer",
            )
        found = named[layer]
    if isinstance(found, torch.jit.ScriptModule):
        raise ArgumentError(
            "`layer` must not be in TorchScript, whose layers cannot be replaced. Use the module "
            "that it was made from, or `torch.export`.",
            argument="layer",
        )
    return found


class FromLayer:
    """A model as a function of a layer's output, followed by the model's own arguments.

    Args:
        model: The model.
        layer: The layer; it must be called once in a forward pass and return a tensor of the
            batch first.
    """

    def __init__(self, model: Callable[..., Any], layer: nn.Module) -> None:
        self.model = model
        self.layer = layer

    def output(self, arguments: tuple[Any, ...], rows: int, max_rows: int) -> Tensor:
        """Return what the layer gives when the model is applied to its arguments.

        Args:
            arguments: The arguments; tensors of so many rows are taken row by row.
            rows: Size of the batch.
            max_rows: At most so many rows in a forward pass.
        """
        parts: list[Tensor] = []
        for first in range(0, max(rows, 1), max_rows):
            block = slice(first, first + max_rows)
            found: list[Any] = []

            def look(_: nn.Module, __: Any, output: Any, found: list[Any] = found) -> None:
                found.append(output)

            with torch.no_grad():
                self._call(look, found, tuple(row_by_row(a, block, rows) for a in arguments))
            parts.append(self._tensor(found[0]).detach())
        return torch.cat(parts)

    def __call__(self, output: Tensor, *arguments: Any) -> Any:
        """Return the model's output where the layer gives ``output``."""
        seen: list[Any] = []

        def replace(_: nn.Module, __: Any, given: Any) -> Tensor:
            seen.append(given)
            if self._tensor(given).shape != output.shape:
                raise ArgumentError(
                    f"`layer` must return one row per row of `inputs`. Found "
                    f"{list(given.shape)} in place of {list(output.shape)}.",
                    argument="layer",
                )
            return output.to(given.dtype)

        return self._call(replace, seen, arguments)

    def _call(self, hook: Callable[..., Any], calls: list[Any], arguments: tuple[Any, ...]) -> Any:
        handle = self.layer.register_forward_hook(hook)
        try:
            result = self.model(*arguments)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise ArgumentError(
                f"`layer` must be called once in a forward pass of `model`. "
                f"Found {len(calls)} calls.",
                argument="layer",
            )
        return result

    def _tensor(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.ndim:
            raise ArgumentError(
                f"`layer` must return a floating-point tensor. Found {type(output).__name__}.",
                argument="layer",
            )
        return output
