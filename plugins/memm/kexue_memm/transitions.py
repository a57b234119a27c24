"""The transition scores g(a, b), as a matrix or as a product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Transitions"]


@dataclass(frozen=True, slots=True)
class Transitions:
    """Scores of neighbouring tags, ``g[a, b]`` of ``a`` standing to the left of ``b``.

    Args:
        left: g itself, ``[tag, tag]``; or L of ``g = L Rᵀ``, ``[tag, rank]``.
        right: R, ``[tag, rank]``; None where ``left`` is g itself.
    """

    left: Float[Tensor, "tag rank"]
    right: Float[Tensor, "tag rank"] | None = None

    def reversed(self) -> Transitions:
        """Return the transposed scores, those of a chain read from right to left."""
        if self.right is None:
            return Transitions(self.left.T)
        return Transitions(self.right, self.left)

    def scaled(self, factor: float) -> Transitions:
        """Return the scores times ``factor``."""
        return self if factor == 1 else Transitions(self.left * factor, self.right)

    def matrix(self) -> Float[Tensor, "tag tag"]:
        """Return g as one matrix."""
        return self.left if self.right is None else self.left @ self.right.T

    def rows(
        self,
        tags: Int[Tensor, " token"],
        boundary: Bool[Tensor, " token"] | None = None,
        *,
        out: Float[Tensor, "token tag"] | None = None,
    ) -> Float[Tensor, "token tag"]:
        """Return ``g[tags]``, without forming g where it has a low rank.

        Args:
            tags: The left tags.
            boundary: True where there is no tag to the left, and the row is 0.
            out: Where to write the rows, without a gradient; a new tensor by default.
        """
        if self.right is None:
            rows = torch.index_select(self.left, 0, tags, out=out)
            return rows if boundary is None else rows.masked_fill(boundary.unsqueeze(1), 0)
        left = self.left.index_select(0, tags)
        if boundary is not None:
            left = left.masked_fill(boundary.unsqueeze(1), 0)
        return torch.mm(left, self.right.T, out=out)

    def pairs(
        self, before: Int[Tensor, "token candidate"], after: Int[Tensor, "token candidate"]
    ) -> Float[Tensor, "token candidate candidate"]:
        """Return ``g[before[:, :, None], after[:, None, :]]``."""
        if self.right is None:
            return self.left[before.unsqueeze(2), after.unsqueeze(1)]
        return self.left[before] @ self.right[after].mT
