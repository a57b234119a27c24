"""What a step reads and writes of a parameter: the part that this process has, as real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["distributed", "local", "pieces", "touched"]


def distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, also where torch is built without them."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, laid out as ``like``; complex as pairs of reals.

    Args:
        tensor: A parameter, its gradient or its state, shape ``[*any]``.
        like: The parameter, shape ``[*any]``.

    Returns:
        A view of ``tensor``, unless its placements had to be made those of ``like``.
    """
    if distributed(tensor):
        if distributed(like) and tensor.placements != like.placements:
            tensor = tensor.redistribute(placements=like.placements)
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def pieces(tensors: Sequence[Tensor], most: float) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one size alike, into flat views of at most so many numbers.

    Args:
        tensors: Of one shape ``[*any]``; they are left whole if one is not contiguous.
        most: How many numbers in a piece.
    """
    whole = tensors[0].numel() <= most
    if whole or not all(t.is_contiguous() for t in tensors):
        return [tuple(tensors)]
    return list(zip(*(torch.split(t.view(-1), int(most)) for t in tensors), strict=True))


def touched(parameters: Sequence[Tensor]) -> None:
    """Tell autograd that DTensors were written through their local parts."""
    for parameter in parameters:
        if distributed(parameter):
            torch.autograd.graph.increment_version(parameter)
