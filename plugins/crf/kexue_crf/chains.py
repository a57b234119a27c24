"""Batches of sequences with any mask, as time-major chains without gaps.

A recursion over time wants each step contiguous and each chain to begin at step 0. One gather
does both: row ``b`` of a batch becomes the chain of its real positions, in order, and step ``t``
of all chains lies together. Right padding, a masked first position and holes are then the same
case, and what stands at a masked position is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

__all__ = ["Chains", "computing_dtype", "widest_dtype"]


@dataclass(frozen=True, slots=True)
class Chains:
    """The real positions of a batch, row by row, in order.

    The masked positions follow behind them, so that steps and positions of a row are permutations
    of each other and nothing indexes out of range.

    Args:
        lengths: How many real positions each row has.
        last: The last step of each chain, 0 for an empty one.
        batch: The indices of the rows, 0 … batch - 1.
        steps: ``steps[b, p]`` is the step of position ``p``.
        rows: ``rows[t, b]`` is where step ``t`` of chain ``b`` stands in a flattened
            ``[batch * time, …]`` tensor.
        valid: True at the steps that a chain has.
        mask: The mask, true at real positions; None where all are.
    """

    lengths: Int[Tensor, " batch"]
    last: Int[Tensor, " batch"]
    batch: Int[Tensor, " batch"]
    steps: Int[Tensor, "batch time"]
    rows: Int[Tensor, "time batch"]
    valid: Bool[Tensor, "time batch"]
    mask: Bool[Tensor, "batch time"] | None = None

    @classmethod
    def of(cls, values: Shaped[Tensor, "batch time *rest"], mask: Tensor | None) -> Chains:
        """Return the chains of ``values`` under ``mask``.

        Args:
            values: Gives batch size, time and device; time is at least 1.
            mask: Shape ``[batch, time]``, true at real positions; None where all are.
        """
        size, time = values.shape[:2]
        here = torch.arange(time, device=values.device)
        batch = torch.arange(size, device=values.device)
        positions = steps = here.expand(size, time)
        if mask is None:
            lengths = torch.full_like(batch, time)
        else:
            mask = mask.contiguous()
            counted = mask.cumsum(1)
            lengths = counted[:, -1]
            steps = torch.where(mask, counted - 1, (here - counted).add_(lengths[:, None]))
            positions = torch.empty_like(steps).scatter_(1, steps, positions)
        rows = positions.T + batch * time
        valid = here[:, None] < lengths
        return cls(
            lengths, (lengths - 1).clamp_(min=0), batch, steps, rows.contiguous(), valid, mask
        )

    @property
    def ends(self) -> Int[Tensor, " batch"]:
        """The row of each chain's last step."""
        return self.rows.gather(0, self.last.unsqueeze(0)).squeeze(0)

    def mirrored(self) -> Int[Tensor, "time batch"]:
        """Return the steps counted from the chain's other end; behind it, what they were."""
        steps = torch.arange(len(self.rows), device=self.rows.device).unsqueeze(1)
        return torch.where(self.valid, self.last - steps, steps)

    def gather(
        self, values: Shaped[Tensor, "batch time *rest"]
    ) -> Shaped[Tensor, "time batch *rest"]:
        """Return ``values`` time-major, a copy; masked positions stand behind the chains' ends."""
        flat = values.reshape(-1, *values.shape[2:])
        rows = flat.index_select(0, self.rows.view(-1))
        return rows.view(*self.rows.shape, *values.shape[2:])

    def scatter(
        self, values: Shaped[Tensor, "time batch"], fill: float
    ) -> Shaped[Tensor, "batch time"]:
        """Return ``values`` at the positions of the input, ``fill`` where it is masked."""
        placed = values.T.gather(1, self.steps)
        return placed if self.mask is None else placed.masked_fill_(~self.mask, fill)


def computing_dtype(*scores: Tensor | None) -> torch.dtype:
    """Return what ``scores`` are accumulated in: float64 if one of them is, else float32."""
    double = any(score is not None and score.dtype == torch.float64 for score in scores)
    return torch.float64 if double else torch.float32


def widest_dtype(scores: Tensor) -> torch.dtype:
    """Return what long sums are taken in: float64, or float32 on a device without it."""
    try:
        return scores.new_empty(0, dtype=torch.float64).dtype
    except (TypeError, RuntimeError):
        return torch.float32
