"""What is asked of the arguments of MEMM, and the sentences that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError, did_you_mean

__all__ = ["check_choice", "check_emissions", "check_mask", "check_positive", "check_tags"]


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    known = tuple(choices)
    if value not in known:
        raise ArgumentError(
            f"`{name}` of MEMM must be one of {', '.join(map(repr, known))}. "
            f"Found {value!r}.{did_you_mean(str(value), known)}",
            argument=name,
        )


def check_positive(name: str, value: float, *, whole: bool) -> None:
    """Raise unless ``value`` is a positive finite number, or a positive whole one."""
    if (whole and not isinstance(value, int)) or not 0 < value < math.inf:
        kind = "a positive whole number" if whole else "positive and finite"
        raise ArgumentError(f"`{name}` of MEMM must be {kind}. Found {value!r}.", argument=name)


def check_emissions(emissions: Tensor, num_tags: int, device: torch.device) -> None:
    """Raise unless ``emissions`` are floating-point scores ``[batch, time, num_tags]``."""
    if emissions.dim() != 3 or emissions.shape[2] != num_tags:
        raise ArgumentError(
            f"`emissions` of MEMM must have shape [batch, time, tag] with num_tags = {num_tags} "
            f"tags. Found {list(emissions.shape)}.",
            argument="emissions",
        )
    if not emissions.is_floating_point():
        raise ArgumentError(
            f"`emissions` of MEMM must be floating-point scores. Found {emissions.dtype}; "
            f"convert them with `emissions.float()`.",
            argument="emissions",
        )
    if emissions.device != device:
        raise ArgumentError(
            f"`emissions` of MEMM must be on the device of its transitions, {device}. "
            f"Found {emissions.device}; move the module with `.to(emissions.device)`.",
            argument="emissions",
        )


def check_tags(tags: Tensor, emissions: Tensor) -> None:
    """Raise unless ``tags`` are integers ``[batch, time]``."""
    _check_like(tags, "tags", emissions)
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise ArgumentError(
            f"`tags` of MEMM must be integers. Found {tags.dtype}; "
            f"convert them with `tags.long()`.",
            argument="tags",
        )


def check_mask(mask: Tensor | None, emissions: Tensor) -> None:
    """Raise unless ``mask`` is None or bool ``[batch, time]``."""
    if mask is None:
        return
    _check_like(mask, "mask", emissions)
    if mask.dtype != torch.bool:
        raise ArgumentError(
            f"`mask` of MEMM must be bool, true at real positions. Found {mask.dtype}; "
            f"convert it with `mask.bool()`.",
            argument="mask",
        )


def _check_like(value: Tensor, name: str, emissions: Tensor) -> None:
    if value.shape != emissions.shape[:2]:
        raise ArgumentError(
            f"`{name}` of MEMM must have shape [batch, time] = {list(emissions.shape[:2])}, "
            f"the first two axes of `emissions`. Found {list(value.shape)}.",
            argument=name,
        )
    if value.device != emissions.device:
        raise ArgumentError(
            f"`{name}` of MEMM must be on the device of `emissions`, {emissions.device}. "
            f"Found {value.device}; move it with `.to(emissions.device)`.",
            argument=name,
        )
