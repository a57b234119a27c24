"""What the plugin's methods accept: checked once, at the boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError

__all__ = ["check_ids", "check_mask", "check_number", "check_share"]


def check_share(owner: str, name: str, value: Any) -> float:
    """Return a number in [0, 1].

    Raises:
        ArgumentError: If it is none.
    """
    return check_number(owner, name, value, 1.0)


def check_number(owner: str, name: str, value: Any, most: float = float("inf")) -> float:
    """Return a finite number from 0 to ``most``.

    Raises:
        ArgumentError: If it is none.
    """
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value <= most or value == float("inf"):
        wanted = "a finite number, at least 0" if most == float("inf") else f"in [0, {most:g}]"
        raise ArgumentError(
            f"`{name}` of {owner} must be {wanted}. Found {value!r}.", argument=name
        )
    return float(value)


def check_ids(owner: str, name: str, ids: Any) -> None:
    """Refuse what is not a table of token ids.

    Raises:
        ArgumentError: If it is not an integer tensor of two axes.
    """
    if not isinstance(ids, Tensor):
        raise ArgumentError(
            f"`{name}` of {owner} must be a tensor of token ids [row, time]. "
            f"Found {type(ids).__name__}.",
            argument=name,
        )
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or not whole:
        raise ArgumentError(
            f"`{name}` of {owner} must hold integer token ids of shape [row, time]. "
            f"Found {ids.dtype} of shape {list(ids.shape)}.",
            argument=name,
        )


def check_mask(owner: str, name: str, mask: Any, shape: torch.Size, of: str) -> None:
    """Refuse a mask that is not boolean and of the shape of what it masks; None passes.

    Args:
        owner: The component.
        name: The mask's.
        mask: The mask.
        shape: What its shape must be.
        of: What it masks.

    Raises:
        ArgumentError: With what was found.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        found = (
            f"{mask.dtype} of shape {list(mask.shape)}"
            if isinstance(mask, Tensor)
            else type(mask).__name__
        )
        raise ArgumentError(
            f"`{name}` of {owner} must be boolean, true at real tokens, with the shape "
            f"{list(shape)} of `{of}`. Found {found}.",
            argument=name,
        )
