"""Rows and columns of very small matrices, many at once, as those of kernels of convolutions.

Sums over, and products along, a last axis of 3 run through loops of 3 numbers: on a CPU they take
up to forty times as long as the same numbers in one stretch. A product with a matrix of zeros and
ones does the same to all of the small matrices in one call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["are_tiny", "means", "scaled", "spread_means"]

_SHORT = 8  # the last axis, and
_NUMBERS = 64  # numbers in one matrix, at most


def are_tiny(matrices: Tensor) -> bool:
    """Whether the functions below are faster, and no less exact.

    Args:
        matrices: Shape ``[*any, row, column]``.
    """
    row, column = matrices.shape[-2:]
    return (
        column <= _SHORT
        and row * column <= _NUMBERS
        and matrices.device.type == "cpu"  # elsewhere products may be computed in TF32
        and not hasattr(matrices, "placements")
        and not torch.is_autocast_enabled("cpu")
        and matrices.is_contiguous()
    )


def means(matrices: Tensor, plus: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the means over columns, ``[*any, row]``, and over rows, ``[*any, column]``.

    Args:
        matrices: Shape ``[*any, row, column]``, contiguous.
        plus: What is added to the means.

    Example:
        >>> import torch
        >>> from kexue_adafactor.tiny import means
        >>> [x.tolist() for x in means(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))]
        [[1.5, 4.5], [2.0, 4.0]]
    """
    *lead, row, column = matrices.shape
    by_row, by_column = _spread(row, column, matrices.dtype)
    flat = matrices.view(-1, row * column)
    over_columns = torch.mm(flat, by_row.t()).div_(column).add_(plus)
    over_rows = torch.mm(flat, by_column.t()).div_(row).add_(plus)
    return over_columns.view(*lead, row), over_rows.view(*lead, column)


def scaled(matrices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``matrices * rows[..., None] * columns[..., None, :]``, in this order.

    Args:
        matrices: Shape ``[*any, row, column]``, contiguous.
        rows: Shape ``[*any, row]``, finite.
        columns: Shape ``[*any, column]``, finite.
    """
    row, column = matrices.shape[-2:]
    by_row, by_column = _spread(row, column, matrices.dtype)
    product = torch.mm(rows.reshape(-1, row), by_row).mul_(matrices.view(-1, row * column))
    product.mul_(torch.mm(columns.reshape(-1, column), by_column))
    return product.view(matrices.shape)


def spread_means(rows: Tensor) -> Tensor:
    """Return the means over the last axis in the place of each entry.

    Args:
        rows: Shape ``[*any, row]``, contiguous.
    """
    row = rows.shape[-1]
    return torch.mm(rows.view(-1, row), _uniform(row, rows.dtype)).view(rows.shape)


@functools.lru_cache(maxsize=64)
def _uniform(row: int, dtype: torch.dtype) -> Tensor:
    return torch.full((row, row), 1 / row, dtype=dtype)


@functools.lru_cache(maxsize=64)
def _spread(row: int, column: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return matrices ``[row, row * column]`` and ``[column, row * column]`` that repeat rows."""
    by_row = torch.eye(row, dtype=dtype).repeat_interleave(column, dim=1)
    return by_row, torch.eye(column, dtype=dtype).repeat(1, row)
