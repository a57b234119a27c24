"""Which places are drawn anew, step by step.

With n free places and b of them a step, a sweep of a chain is ⌈n / b⌉ steps. Chains of different
lengths have sweeps of different lengths, each its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kexue_bert_sampling.randomness import Randomness

__all__ = ["SCANS", "Scan", "choose"]

Scan = Literal["random", "systematic", "permutation"]
SCANS: tuple[Scan, ...] = ("random", "systematic", "permutation")

_ORDER = 1  # the purpose of random numbers that say which place comes next


def choose(
    scan: Scan, counts: Tensor, block: int, steps: range, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    """Return the places of some steps, as indices into each chain's list of free ones.

    Args:
        scan: ``"random"``: any, as if the steps before had not been; ``"systematic"``: from first
            to last, and again; ``"permutation"``: all, in an order that is drawn for each sweep.
        counts: Free places of each chain, shape ``[chain]``.
        block: Places a step, none of them twice.
        steps: Numbers of the steps, without a gap.
        randomness: Source of the orders.

    Returns:
        The indices and whether there is such a place, both ``[step, chain, block]``. A chain with
        fewer free places than a step takes, or fewer left in its sweep, has not all of them.
    """
    step = torch.arange(steps.start, steps.stop, device=counts.device)[:, None]
    slot = torch.arange(block, device=counts.device)
    if scan == "random":
        return _anywhere(counts, block, step, slot, randomness)
    groups = (counts + block - 1).div(block, rounding_mode="floor").clamp(min=1)
    inside = (step % groups)[..., None] * block + slot
    exists = inside < counts[:, None]
    inside = inside.clamp(max=_widest(counts) - 1)
    if scan == "systematic":
        return inside, exists
    sweep = step // groups  # [step, chain]
    first = sweep[0]
    ahead = sweep - first  # sweeps since the first of these steps
    needed = torch.arange(int(ahead.max()) + 1, device=counts.device)[:, None]
    orders = _order(counts, needed + first, randomness)  # [sweep, chain, place]
    orders = orders[ahead, torch.arange(len(counts), device=counts.device)]
    return orders.gather(2, inside), exists


def _anywhere(
    counts: Tensor, block: int, step: Tensor, slot: Tensor, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    exists = (slot < counts[:, None]).expand(len(step), -1, -1)
    if block == 1:
        chain = torch.arange(len(counts), device=counts.device)
        uniform = randomness.uniform(_ORDER, step, chain, torch.zeros_like(chain))
        return (uniform * counts).long()[..., None], exists
    order = _order(counts, step.expand(-1, len(counts)), randomness)
    return order[..., slot.clamp(max=order.shape[-1] - 1)], exists


def _order(counts: Tensor, time: Tensor, randomness: Randomness) -> Tensor:
    """Return a random order of each chain's places at each time, ``[time, chain, place]``."""
    chain = torch.arange(len(counts), device=counts.device)[:, None]
    place = torch.arange(_widest(counts), device=counts.device)
    keys = randomness.uniform(_ORDER, time[..., None], chain, place)
    return keys.masked_fill(place >= counts[:, None], 2.0).argsort(-1)


def _widest(counts: Tensor) -> int:
    return max(1, int(counts.max()))
