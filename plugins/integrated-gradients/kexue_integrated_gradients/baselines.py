"""Baselines: what inputs are compared with, brought to their shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError

__all__ = ["baseline_sets"]

_Tensors = tuple[Tensor, ...]


def baseline_sets(
    baselines: Any,
    ends: _Tensors,
    embed: Callable[[_Tensors], Tensor] | None = None,
    ids: _Tensors = (),
) -> list[_Tensors]:
    """Return the baselines, each as one tensor per input and in its shape.

    Args:
        baselines: A number, tensor or tuple; a list of them; or None for zeros.
        ends: x, what the path ends in.
        embed: Brings inputs to where the path is, if that is a layer.
        ids: The inputs themselves, if the path is in a layer.

    Raises:
        ArgumentError: If one does not broadcast to the inputs, or is not finite.
    """
    if isinstance(baselines, list) and not baselines:
        raise ArgumentError(
            "`baselines` must hold at least one baseline. Found an empty list.",
            argument="baselines",
        )
    several = baselines if isinstance(baselines, list) else [baselines]
    found: list[_Tensors] = []
    for one in several:
        if embed is not None and _replaces_inputs(one):
            found.append((embed(_like(one, ids)),))
        else:
            found.append(_like(0.0 if one is None else one, ends))
    return found


def _replaces_inputs(baseline: Any) -> bool:
    """Whether a baseline is ids, which go through the layer."""
    first = baseline[0] if isinstance(baseline, tuple) and baseline else baseline
    return isinstance(first, Tensor) and not first.is_floating_point()


def _like(baseline: Any, inputs: _Tensors) -> _Tensors:
    parts = baseline if isinstance(baseline, tuple) else (baseline,) * len(inputs)
    if len(parts) != len(inputs) or (
        len(inputs) > 1 and isinstance(baseline, Tensor) and baseline.ndim
    ):
        raise ArgumentError(
            f"`baselines` must be a tuple of one baseline for each of the {len(inputs)} inputs; a "
            f"list is averaged over. Found {type(baseline).__name__}"
            f"{f' of {len(parts)}' if isinstance(baseline, tuple) else ''}.",
            argument="baselines",
        )
    return tuple(_broadcast(part, x) for part, x in zip(parts, inputs, strict=True))


def _broadcast(baseline: Any, inputs: Tensor) -> Tensor:
    if not isinstance(baseline, int | float | Tensor) or isinstance(baseline, bool):
        raise ArgumentError(
            f"`baselines` must be numbers or tensors. Found {type(baseline).__name__}.",
            argument="baselines",
        )
    if not isinstance(baseline, Tensor) and math.isfinite(baseline):
        return torch.full_like(inputs, baseline)
    tensor = torch.as_tensor(baseline, device=inputs.device).detach().to(inputs.dtype)
    if not torch.isfinite(tensor).all():
        raise ArgumentError("`baselines` must be finite. Found NaN or inf.", argument="baselines")
    try:
        return tensor.expand(inputs.shape).clone()
    except RuntimeError as error:
        raise ArgumentError(
            f"`baselines` must broadcast to the shape {list(inputs.shape)}. "
            f"Found {list(tensor.shape)}.",
            argument="baselines",
        ) from error
