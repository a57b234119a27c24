"""What a step reads and writes of a parameter: the part that this process has, as real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["distributed", "own_parts", "pieces", "touched"]


_PLAIN = (Tensor, torch.nn.Parameter)


def distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, also where torch is built without them."""
    # a plain tensor or parameter is told by its type: this is asked of each parameter in each step
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements")


def own_parts(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return this process's parts, laid out as the first; complex numbers as pairs of real ones.

    Args:
        tensors: A parameter, its gradient and its state, shapes ``[*any]``.

    Returns:
        Views, but for a gradient whose placements had to be made those of the parameter.
    """
    found = [t for t in tensors if t is not None]
    first = found[0]
    if distributed(first):
        found = [_local(t, first) for t in found]
    return [torch.view_as_real(t) for t in found] if first.is_complex() else found


def _local(tensor: Tensor, like: DTensor) -> Tensor:
    if not distributed(tensor):
        return tensor
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    part: Tensor = tensor.to_local()
    return part


def pieces(tensors: Sequence[Tensor], most: float) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one size alike, into flat views of at most so many numbers.

    Args:
        tensors: Of one shape ``[*any]``; they are left whole if one is not contiguous.
        most: How many numbers in a piece.
    """
    if tensors[0].numel() <= most or not all(t.is_contiguous() for t in tensors):
        return [tuple(tensors)]
    return list(zip(*(torch.split(t.view(-1), int(most)) for t in tensors), strict=True))


def touched(parameters: Sequence[Tensor]) -> None:
    """Tell autograd that DTensors were written through their local parts."""
    for parameter in parameters:
        if distributed(parameter):
            torch.autograd.graph.increment_version(parameter)
