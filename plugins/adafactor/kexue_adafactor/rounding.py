"""Stochastic rounding to float16 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_round"]


def stochastic_round(
    values: Tensor, dtype: torch.dtype, *, generator: torch.Generator | None = None
) -> Tensor:
    """Round to one of the two neighbours in a 16-bit type, so that the mean is the value.

    A value x between neighbours a < x < b becomes b with probability (x − a) / (b − a). Beyond the
    greatest finite number it becomes that number; infinities and NaN stay.

    Args:
        values: Float32, shape ``[*any]``.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        generator: Source of randomness, on the device of the values; the global one by default.

    Returns:
        Shape ``[*any]``, of type ``dtype``.
    """
    near = values.to(dtype)
    magnitude = values.abs()
    # Sign and magnitude: adding one to the bits goes to the next number away from zero.
    bits = near.view(torch.int16)
    lower = (bits - (near.float().abs() > magnitude).to(torch.int16)).view(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    below = lower.float().abs()
    share = (magnitude - below) / (upper.float().abs() - below)  # NaN if not finite: never chosen
    draws = torch.rand(values.shape, device=values.device, generator=generator)
    return torch.where(draws < share, upper, lower)
