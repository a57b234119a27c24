"""The real positions of a padded batch, packed into one axis and chained to their neighbours.

All local normalisers of a Markov model are independent of each other, so a batch is a list of
tokens: ``[batch, time]`` under a mask becomes ``[token]`` in row-major order. The neighbour of a
real position is then the next entry of the list, whatever stood between them: right padding, a
masked first position and holes are one case, and what stands at a masked position is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

__all__ = ["Tokens"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a batch and where its chains begin.

    Args:
        shape: Batch size and time of the padded batch.
        positions: Where each token stands in the flattened batch; None where all are real.
        begins: True at the token that each chain is read from; None where all are real.
        step: 1, or -1 where the chains are read from right to left.
    """

    shape: tuple[int, int]
    positions: Int[Tensor, " token"] | None = None
    begins: Bool[Tensor, " token"] | None = None
    step: int = 1

    @classmethod
    def of(cls, values: Shaped[Tensor, " batch time *rest"], mask: Tensor | None) -> Tokens:
        """Return the tokens of ``values`` under ``mask``.

        Args:
            values: Gives batch size and time.
            mask: Shape ``[batch, time]``, true at real positions; None where all are.
        """
        batch, time = values.shape[:2]
        if mask is None:
            return cls((batch, time))
        positions = mask.reshape(-1).nonzero().squeeze(1)
        if len(positions) == batch * time:
            return cls((batch, time))
        rows = positions // time
        begins = rows != rows.roll(1)
        begins[:1] = True  # where all tokens are in one row, too
        return cls((batch, time), positions, begins)

    def __len__(self) -> int:
        """Return how many tokens there are."""
        return self.shape[0] * self.shape[1] if self.positions is None else len(self.positions)

    def reversed(self) -> Tokens:
        """Return the same tokens, their chains read from the other end."""
        begins = None if self.begins is None else self.begins.roll(-self.step)
        return replace(self, begins=begins, step=-self.step)

    def previous(
        self, values: Shaped[Tensor, " token *rest"], fill: float
    ) -> Shaped[Tensor, " token *rest"]:
        """Return, for each token, the value of the one before it, ``fill`` where there is none."""
        if not len(self):
            return values
        if self.begins is None:
            padded = values.view(*self.shape, *values.shape[1:])
            rest = (0, 0) * (values.dim() - 1)
            return F.pad(padded, (*rest, self.step, -self.step), value=fill).flatten(0, 1)
        begins = self.begins.view(-1, *(1 for _ in values.shape[1:]))
        return values.roll(self.step, 0).masked_fill_(begins, fill)

    def following(
        self, values: Shaped[Tensor, " token *rest"], fill: float
    ) -> Shaped[Tensor, " token *rest"]:
        """Return, for each token, the value of the one after it, ``fill`` where there is none."""
        return self.reversed().previous(values, fill)

    def neighbours(
        self, values: Int[Tensor, " token"], fill: int, *, step: int
    ) -> Int[Tensor, "2 token"]:
        """Return :meth:`previous`, and :meth:`following` plus ``step``, in one tensor."""
        if self.begins is None and self.step > 0 and len(self):
            batch, time = self.shape
            padded = F.pad(values.view(batch, time), (1, 1), value=fill)
            # Two windows of each row, from its first and from its third place.
            windows = padded.as_strided((2, batch, time), (2, time + 2, 1)).contiguous()
            windows[1].add_(step)
            return windows.view(2, -1)
        return torch.stack((self.previous(values, fill), self.following(values, fill) + step))

    def is_first(self, values: Shaped[Tensor, " token *rest"]) -> Bool[Tensor, " token"]:
        """Return True for the token that each chain is read from, on the device of ``values``."""
        return self.previous(values.new_zeros(len(values), dtype=torch.bool), fill=True)

    def pack(self, values: Shaped[Tensor, " batch time *rest"]) -> Shaped[Tensor, " token *rest"]:
        """Return the values of the tokens."""
        flat = values.reshape(self.shape[0] * self.shape[1], *values.shape[2:])
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def unpack(self, values: Shaped[Tensor, " token *rest"]) -> Shaped[Tensor, " batch time *rest"]:
        """Return the values at their positions, 0 where the batch is masked."""
        batch, time = self.shape
        if self.positions is not None:
            flat = values.new_zeros(batch * time, *values.shape[1:])
            values = flat.index_copy(0, self.positions, values)
        return values.view(batch, time, *values.shape[1:])

    def sum_rows(self, values: Shaped[Tensor, " token"]) -> Shaped[Tensor, " batch"]:
        """Return the sum of each row, 0 for one without a token."""
        return self.unpack(values).sum(1)

    def count_rows(self) -> int | Int[Tensor, ""]:
        """Return how many rows have a token, at least 1, without waiting for the device."""
        if self.begins is None:
            return max(self.shape[0], 1)
        return self.begins.sum().clamp(min=1)

    def place(self, token: int) -> str:
        """Return where a token stands, in words for an error."""
        flat = token if self.positions is None else int(self.positions[token])
        return f"row {flat // self.shape[1]} at time {flat % self.shape[1]}"
