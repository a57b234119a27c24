"""What decoding makes of a transition matrix: temperature, top-k, nucleus, greedy."""

from __future__ import annotations

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from kexue.core.errors import ArgumentError
from kexue_repetition.transitions import Floats, Matrix, Transitions

__all__ = ["check_truncation", "truncate_transitions"]


def check_truncation(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings outside their range.

    Raises:
        ArgumentError: Naming the setting.
    """
    if not 0 < temperature < float("inf"):
        raise ArgumentError(
            f"`temperature` must be positive; greedy decoding is `top_k=1`. Found {temperature!r}.",
            argument="temperature",
        )
    if not isinstance(top_k, int) or top_k < 0:
        raise ArgumentError(
            f"`top_k` must be a whole number, 0 for all tokens. Found {top_k!r}.", argument="top_k"
        )
    if not 0 < top_p <= 1:
        raise ArgumentError(f"`top_p` must be in (0, 1]. Found {top_p!r}.", argument="top_p")


def truncate_transitions(
    transitions: Matrix, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Transitions:
    """Return the matrix that is left of P when decoding keeps the likeliest tokens only.

    In each row, the end token among the candidates: probabilities to the power 1/temperature, then
    the ``top_k`` largest, then the fewest that make up ``top_p``; the rest becomes 0, and what is
    left is divided by its sum. Of equally likely candidates the first stay, the end token last.

    Args:
        transitions: P; see :meth:`Transitions.of`.
        temperature: Above 0.
        top_k: Candidates per row; 0 for all, 1 for greedy decoding.
        top_p: Mass of the nucleus, in (0, 1].

    Raises:
        ArgumentError: If a setting is outside its range, or ``transitions`` are not.

    Example:
        >>> from kexue_repetition import truncate_transitions
        >>> truncate_transitions([[0.1, 0.6], [0.2, 0.2]], top_k=2).dense()
        tensor([[0.0000, 0.6667],
                [0.2500, 0.0000]], dtype=torch.float64)
    """
    check_truncation(temperature, top_k, top_p)
    decoder = Transitions.of(transitions)
    matrix, n = decoder.matrix, len(decoder)
    if not matrix.nnz:
        return decoder
    rows = np.repeat(np.arange(n), np.diff(matrix.indptr))
    end = np.maximum(1.0 - np.bincount(rows, matrix.data, n), 0.0)
    end[end < 1e-9] = 0.0  # rounding, not an end
    # the end as a last entry of its row
    rows = np.concatenate([rows, np.arange(n)])
    columns = np.concatenate([matrix.indices.astype(np.int64), np.full(n, n)])
    values = np.concatenate([matrix.data, end])
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    if temperature != 1.0:
        largest = np.zeros(n)
        np.maximum.at(largest, rows, values)
        values = (values / largest[rows]) ** (1.0 / temperature)  # no underflow of the largest
    begins = np.searchsorted(rows, np.arange(n))
    kept = np.ones(len(rows), dtype=bool)
    if top_k:
        kept = np.arange(len(rows)) - begins[rows] < top_k
    values = _normalised(np.where(kept, values, 0.0), rows, n)
    if top_p < 1.0:
        before = _cumulative_before(values, rows, begins)
        kept &= before < top_p - 1e-9  # rounding of the sum
        values = _normalised(np.where(kept, values, 0.0), rows, n)
    inner = kept & (columns < n) & (values > 0)
    found = sparse.csr_array((values[inner], (rows[inner], columns[inner])), shape=(n, n))
    found.sort_indices()
    return decoder.replaced(found)


def _normalised(values: Floats, rows: np.ndarray, n: int) -> Floats:
    found: Floats = values / np.bincount(rows, values, n)[rows]
    return found


def _cumulative_before(values: Floats, rows: np.ndarray, begins: np.ndarray) -> Floats:
    """Return the sum of a row's values before each."""
    total = np.cumsum(values) - values
    found: Floats = total - total[begins][rows]
    return found
