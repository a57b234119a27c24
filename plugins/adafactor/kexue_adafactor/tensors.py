"""Tensors in lists, stacked or not, and those that are spread over processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from kexue_adafactor.rounding import stochastic_round

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Tensors",
    "assign",
    "is_distributed",
    "joined",
    "moved",
    "numbers",
    "rounded",
    "settled",
    "total",
]

Tensors = list[Tensor] | tuple[Tensor, ...]  # what torch takes for a list

_LAST = (-2, -1)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors on a new first axis; a single one is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def moved(tensor: Tensor, dims: tuple[int, int] | None, *, back: bool = False) -> Tensor:
    """Return a view with rows and columns as the last two axes, or back from there.

    Args:
        tensor: Shape ``[*any]``.
        dims: Which axes these are, counted from the last, negative; None for none.
        back: Whether they are the last two now.
    """
    if dims is None or dims == _LAST:
        return tensor
    return tensor.movedim(_LAST, dims) if back else tensor.movedim(dims, _LAST)


def numbers(tensors: Sequence[Tensor], like: Tensor) -> Tensor | int:
    """Return how many numbers each tensor has, in the type and on the device of ``like``."""
    if len(tensors) == 1:
        return tensors[0].numel()
    return _on_device(tuple([t.numel() for t in tensors]), like.dtype, like.device)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def total(tensor: Tensor, kept: int) -> Tensor:
    """Sum over all axes but the first ``kept``."""
    return tensor if tensor.ndim == kept else tensor.sum(dim=tuple(range(kept, tensor.ndim)))


def assign(targets: Tensors, values: Tensors) -> None:
    """Copy values to targets; lists of DTensors cannot be, at once."""
    if len(targets) == 1:
        targets[0].copy_(values[0])
    else:
        torch._foreach_copy_(targets, values)


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, also where torch is built without them."""
    return hasattr(tensor, "placements")


def settled(tensor: Tensor) -> Tensor:
    """Finish the sums over processes that a DTensor still owes."""
    if is_distributed(tensor) and any(p.is_partial() for p in tensor.placements):
        from torch.distributed.tensor import Replicate

        done = [Replicate() if p.is_partial() else p for p in tensor.placements]
        finished: Tensor = tensor.redistribute(placements=done)
        return finished
    return tensor


def rounded(weights: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round to a 16-bit type at random, each process its own part of a DTensor."""
    if not is_distributed(weights):
        return stochastic_round(weights, dtype, generator=generator)
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        stochastic_round(weights.to_local(), dtype, generator=generator),
        weights.device_mesh,
        weights.placements,
        shape=weights.shape,
        stride=weights.stride(),
        run_check=False,
    )
    return whole
