"""Random numbers that belong to tokens: padding and neighbours do not change them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core import ArgumentError

__all__ = ["BITS", "Generators", "coins", "draw_bits", "of_tokens"]

BITS = 31
"""Of each half of a draw: one decides, the other chooses."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One source for all rows, one per row, or the global one."""


def draw_bits(
    owner: str, like: Int[Tensor, "row time"], generator: Generators
) -> Int[Tensor, "row draw"]:
    """Return time + 1 numbers of 62 random bits per row.

    They are drawn for one time after the other, so that on the CPU, whose generator hands out its
    numbers in order, more padding only adds draws at the end.

    Args:
        owner: Who asks.
        like: Has the rows, the times and the device.
        generator: One for all rows, or one per row: then a row gets what it would get alone.

    Raises:
        ArgumentError: If it is on another device, or there is not one per row.
    """
    rows, time = like.shape
    high = 1 << 2 * BITS
    if generator is None or isinstance(generator, torch.Generator):
        _check_device(owner, generator, like)
        shape = (time + 1, rows)
        return torch.randint(high, shape, generator=generator, device=like.device).T
    if len(generator) != rows:
        raise ArgumentError(
            f"`generator` of {owner} must be one for all rows, or one for each of {rows}. "
            f"Found {len(generator)}.",
            argument="generator",
        )
    for one in generator:
        _check_device(owner, one, like)
    draws = [torch.randint(high, (time + 1,), generator=g, device=like.device) for g in generator]
    return torch.stack(draws) if draws else like.new_zeros((0, time + 1), dtype=torch.long)


def _check_device(owner: str, generator: torch.Generator | None, like: Tensor) -> None:
    if generator is not None and generator.device.type != like.device.type:
        raise ArgumentError(
            f"`generator` of {owner} must be on the device of the tokens, {like.device}. "
            f"Found {generator.device}. Make it by `torch.Generator({str(like.device)!r})`.",
            argument="generator",
        )


def of_tokens(
    bits: Int[Tensor, "row draw"], ranks: Int[Tensor, "row time"]
) -> Int[Tensor, "row time"]:
    """Return the bits of each token: the first draw is the row's own.

    Args:
        bits: What was drawn.
        ranks: How many tokens there are in the row up to each position; at least 1 where it counts.
    """
    return bits.gather(1, ranks)


def coins(bits: Int[Tensor, "*any"], share: float) -> Bool[Tensor, "*any"]:
    """Return true with a probability, by the upper half of the bits."""
    return (bits >> BITS) < round(share * (1 << BITS))
