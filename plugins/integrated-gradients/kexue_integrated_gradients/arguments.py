"""What may be attributed to, and with which settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError

__all__ = ["as_tensors", "check_floating", "check_settings", "usable"]

_Tensors = tuple[Tensor, ...]


def check_settings(model: Any, max_rows: int | None, tolerance: float) -> None:
    """Refuse settings outside their range.

    Raises:
        ArgumentError: Naming the setting.
    """
    if not callable(model):
        raise ArgumentError(
            f"`model` must be a module or a function. Found {type(model).__name__}.",
            argument="model",
        )
    whole = isinstance(max_rows, int) and not isinstance(max_rows, bool)
    if max_rows is not None and not (whole and max_rows >= 1):
        raise ArgumentError(
            f"`max_rows` must be a whole number, at least 1. Found {max_rows!r}.",
            argument="max_rows",
        )
    if not tolerance >= 0:
        raise ArgumentError(
            f"`tolerance` must be a share, at least 0. Found {tolerance!r}.", argument="tolerance"
        )


def as_tensors(inputs: Any) -> _Tensors:
    """Return a model's inputs as a tuple of tensors that can take part in a gradient.

    Raises:
        ArgumentError: If they are not tensors of one number of rows.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if not given or not all(isinstance(t, Tensor) and t.ndim for t in given):
        found = (
            f"{type(t).__name__} of shape {list(t.shape)}"
            if isinstance(t, Tensor)
            else type(t).__name__
            for t in given
        )
        raise ArgumentError(
            f"`inputs` must be a tensor [batch, ...], or a tuple of them. "
            f"Found {', '.join(found) or 'nothing'}.",
            argument="inputs",
        )
    if len({len(t) for t in given}) > 1:
        raise ArgumentError(
            f"`inputs` must have as many rows each. Found {', '.join(str(len(t)) for t in given)}.",
            argument="inputs",
        )
    return tuple(usable(t) for t in given)


def usable(tensor: Tensor) -> Tensor:
    """Return a tensor that can take part in a gradient, those of inference mode included."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_floating(inputs: _Tensors) -> None:
    """Refuse inputs that have no gradient.

    Raises:
        ArgumentError: If they are not floating point, or not finite.
    """
    for tensor in inputs:
        if not tensor.is_floating_point():
            raise ArgumentError(
                f"`inputs` must be floating point; a gradient needs it. "
                f"Found {str(tensor.dtype).removeprefix('torch.')}. Ids of tokens need "
                f"`layer=`, the embedding that they go through.",
                argument="inputs",
            )
        if not torch.isfinite(tensor).all():
            raise ArgumentError("`inputs` must be finite. Found NaN or inf.", argument="inputs")
