"""What NICE refuses, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kexue.core import ArgumentError

__all__ = [
    "check_choice",
    "check_data",
    "check_noise",
    "check_rows",
    "check_sizes",
    "check_temperature",
]


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse what is not one of a few words."""
    if value not in known:
        raise ArgumentError(
            f"`{name}` of NICE must be one of {', '.join(known)}. Found {value!r}.", argument=name
        )


def check_sizes(
    num_features: int,
    shape: Sequence[int],
    num_couplings: int,
    hidden: Sequence[int],
    levels: int | None,
) -> None:
    """Refuse sizes that no flow has."""
    if num_features < 2:
        raise ArgumentError(
            f"`num_features` of NICE must be at least 2, one for each part of a coupling. "
            f"Found {num_features}.",
            argument="num_features",
        )
    if math.prod(shape) != num_features:
        raise ArgumentError(
            f"`shape` of NICE must hold num_features = {num_features} numbers. "
            f"Found {list(shape)}, {math.prod(shape)} numbers.",
            argument="shape",
        )
    if num_couplings < 1:
        raise ArgumentError(
            f"`num_couplings` of NICE must be at least 1. Found {num_couplings}.",
            argument="num_couplings",
        )
    if any(width < 1 for width in hidden):
        raise ArgumentError(
            f"`hidden` of NICE must be widths of at least 1. Found {list(hidden)}.",
            argument="hidden",
        )
    if levels is not None and levels < 2:
        raise ArgumentError(
            f"`levels` of NICE must be at least 2, or None for continuous data. Found {levels}.",
            argument="levels",
        )


def check_noise(noise: Sequence[float] | None) -> None:
    """Refuse what is not a range."""
    if noise is None:
        return
    ends = list(noise)
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
        raise ArgumentError(
            f"`noise` of NICE must be a range of two numbers, such as [-0.01, 0]. Found {ends}.",
            argument="noise",
        )


def check_temperature(temperature: float) -> None:
    """Refuse what is not a factor of a standard deviation."""
    if not 0 <= temperature < math.inf:
        raise ArgumentError(
            f"`temperature` of NICE must be a finite number of at least 0. Found {temperature}.",
            argument="temperature",
        )


def check_rows(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Refuse rows of another shape; flat rows are taken too."""
    flat = math.prod(shape)
    if x.ndim and list(x.shape[1:]) in ([*shape], [flat]) and x.is_floating_point():
        return
    also = "" if len(shape) == 1 else f" or [batch, {flat}]"
    found = f"Found {list(x.shape)}" if x.is_floating_point() else f"Found {x.dtype}"
    raise ArgumentError(
        f"`{name}` of NICE must be floating-point rows of shape "
        f"[batch, {', '.join(map(str, shape))}]{also}. {found}.",
        argument=name,
    )


def check_data(x: Tensor, levels: int | None, *, noisy: bool) -> None:
    """Refuse data that are not finite or not in [0, 1], and warn of values that repeat.

    Args:
        x: Rows, flat.
        levels: The number of grey levels, if there are any.
        noisy: Whether noise will be added to them.
    """
    if not torch.isfinite(x).all():
        raise ArgumentError("`examples` of NICE must be finite. Found NaN or inf.", argument="data")
    low, high = float(x.min()), float(x.max())
    if levels is not None and not (low >= 0 and high <= 1):
        raise ArgumentError(
            f"`examples` of NICE must be in [0, 1], since `levels` is {levels}. "
            f"Found {low:.4g} to {high:.4g}.",
            argument="data",
        )
    if noisy or len(x) < 20:
        return
    ranked = x.sort(0).values
    repeated = (ranked[1:] == ranked[:-1]).double().mean(0)
    if (repeated > 0.5).any():
        warnings.warn(
            f"{int((repeated > 0.5).sum())} of {x.shape[1]} features mostly repeat their values: a "
            f"density of them grows without bound. Set `levels` for grey levels k / (levels - 1), "
            f"or `noise`.",
            stacklevel=4,
        )
