"""The transition matrix of a Markov decoder, dense or sparse, and walks by it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError

__all__ = ["Floats", "Matrix", "Transitions", "sample_walks"]

Floats = NDArray[np.float64]
Matrix = Any
"""A tensor or array ``[token, token]``, a sparse tensor, a matrix of scipy, or Transitions."""

_ROUNDING = 1e-3
"""By how much a row's sum may be above 1: what rounding to four digits leaves."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """A decoder that looks at the last token only.

    Args:
        matrix: P without the column of the end token: P_ij is the probability that j follows i,
            and what a row lacks to 1 is the probability of the end. A ``csr_array`` of scipy,
            float64; use :meth:`of`, which checks.
        tokens: What the tokens are, where that is known.
        start: Probability of each token to be the first, shape ``[token]``; None: all alike.
        device: Where dense blocks are computed.

    Example:
        >>> from kexue_repetition import Transitions
        >>> Transitions.of([[0.5, 0.25], [1.0, 0.0]], tokens=["a", "b"])
        Transitions of 2 tokens, 3 of 4 entries
    """

    matrix: Any
    tokens: tuple[Hashable, ...] | None = None
    start: Floats | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, transitions: Matrix, tokens: Sequence[Hashable] | None = None) -> Transitions:
        """Return a matrix as transitions; what is one already comes back as it is.

        Args:
            transitions: Shape ``[token, token]``: a tensor (dense or sparse, any dtype and
                device), an array, nested lists, a matrix of scipy, or Transitions.
            tokens: Their names.

        Raises:
            ArgumentError: If it is not square, has entries that are negative or not finite, or a
                row whose sum is above 1 by more than 0.001 (or than the dtype's precision); less
                is taken for rounding, and the row is divided by its sum.
        """
        if isinstance(transitions, cls):
            return transitions
        matrix, precision, device = _as_csr(transitions)
        if tokens is not None and len(tokens) != matrix.shape[0]:
            raise ArgumentError(
                f"`tokens` must name each of the {matrix.shape[0]} tokens of `transitions`. "
                f"Found {len(tokens)} names.",
                argument="tokens",
            )
        checked = _checked(matrix, max(_ROUNDING, precision))
        return cls(checked, None if tokens is None else tuple(tokens), None, device)

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    def __repr__(self) -> str:
        return f"Transitions of {len(self)} tokens, {self.matrix.nnz} of {len(self) ** 2} entries"

    def dense(self) -> Tensor:
        """Return the matrix, ``[token, token]``, float64, on its device."""
        return torch.from_numpy(self.matrix.toarray()).to(self.device)

    def block(self, places: NDArray[np.intp], *, squared: bool = False) -> Tensor:
        """Return the rows and columns of some tokens, dense.

        Args:
            places: Which tokens.
            squared: Whether to return S = P ∘ P in place of P.
        """
        part = self.matrix if len(places) == len(self) else self.matrix[places][:, places]
        values = torch.from_numpy(part.toarray()).to(self.device)
        return values.square() if squared else values

    def squared(self) -> Any:
        """Return S = P ∘ P, sparse."""
        found = self.matrix.copy()
        found.data **= 2
        return found

    def name(self, token: int) -> str:
        """Return a token as text."""
        if self.tokens is None:
            return str(token)
        found = self.tokens[token]
        return "".join(found) if isinstance(found, tuple) else str(found)

    def replaced(self, matrix: Any) -> Transitions:
        """Return the same decoder with another matrix."""
        return Transitions(matrix, self.tokens, self.start, self.device)


def _as_csr(given: Any) -> tuple[Any, float, torch.device | None]:
    """Return a float64 matrix, what its dtype cannot resolve, and where it was."""
    if isinstance(given, Tensor):
        precision = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        device = with_float64(given.device)
        plain = given.detach().to("cpu")
        if plain.layout != torch.strided and plain.ndim == 2:
            plain = plain.to_sparse().coalesce()
            values = plain.values().double().numpy()
            found = sparse.coo_array((values, plain.indices().numpy()), shape=tuple(plain.shape))
            return found.tocsr(), precision, device
        return _from_array(plain.double().numpy()), precision, device
    if sparse.issparse(given):
        precision = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else 0.0
        return sparse.csr_array(given).astype(np.float64), precision, None
    try:
        array = np.asarray(given)
        precision = float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 0.0
        return _from_array(array.astype(np.float64)), precision, None
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"`transitions` must be a matrix of numbers [token, token]. "
            f"Found {type(given).__name__}.",
            argument="transitions",
        ) from error


def _from_array(array: Floats) -> Any:
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise _not_square(array.shape)
    return sparse.csr_array(array)


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU where it has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return torch.device("cpu")
    return device


def _not_square(shape: Sequence[int]) -> ArgumentError:
    return ArgumentError(
        f"`transitions` must be square, [token, token], without the end token. "
        f"Found shape {list(shape)}.",
        argument="transitions",
    )


def _checked(matrix: Any, rounding: float) -> Any:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise _not_square(matrix.shape)
    matrix = matrix.copy()
    matrix.sum_duplicates()
    wrong = ~(np.isfinite(matrix.data) & (matrix.data >= 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        row = int(np.searchsorted(matrix.indptr, first, "right")) - 1
        raise ArgumentError(
            f"`transitions` must be probabilities. Found {matrix.data[first]:g} at "
            f"[{row}, {matrix.indices[first]}].",
            argument="transitions",
        )
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    if len(sums) and sums.max() > 1 + rounding:
        row = int(sums.argmax())
        raise ArgumentError(
            f"`transitions` must have rows that sum to at most 1; what is missing is the end. "
            f"Row {row} sums to {sums[row]:.6g}. Divide counts by their sums.",
            argument="transitions",
        )
    matrix.data /= np.repeat(np.maximum(sums, 1.0), np.diff(matrix.indptr))
    matrix.eliminate_zeros()
    return matrix


def sample_walks(
    transitions: Matrix,
    num_walks: int,
    length: int,
    *,
    start: Int[Tensor, " walk"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "walk time"]:
    """Return texts that a Markov decoder writes.

    All walks take a step at once; the same seed gives the same walks.

    Args:
        transitions: The decoder; see :meth:`Transitions.of`.
        num_walks: How many.
        length: Tokens of a walk, the first included; shorter ones reached the end.
        start: The first tokens; drawn from ``Transitions.start`` by default.
        generator: Source of randomness; the global one by default.

    Returns:
        Shape ``[walk, time]``, int64, right-padded with :data:`~kexue.core.PAD`.

    Raises:
        ArgumentError: If ``num_walks`` or ``length`` is negative, there are no tokens, or
            ``start`` names one that there is not.

    Example:
        >>> import torch
        >>> from kexue_repetition import sample_walks
        >>> sample_walks([[0.0, 1.0], [0.0, 0.0]], 1, 4, start=torch.tensor([0]))
        tensor([[ 0,  1, -1, -1]])
    """
    decoder = Transitions.of(transitions)
    for name, value in (("num_walks", num_walks), ("length", length)):
        if value < 0:
            raise ArgumentError(f"`{name}` must be at least 0. Found {value}.", argument=name)
    walks = torch.full((num_walks, length), PAD, dtype=torch.int64)
    if not walks.numel():
        return walks
    matrix, n = decoder.matrix, len(decoder)
    if not n:
        raise ArgumentError("`transitions` must have a token to walk on.", argument="transitions")

    def uniform() -> Floats:
        drawn: Floats = torch.rand(num_walks, generator=generator, dtype=torch.float64).numpy()
        return drawn

    current = _first(decoder, start, num_walks, uniform)
    cumulative = np.concatenate([[0.0], np.cumsum(matrix.data)])
    begins, ends = cumulative[matrix.indptr[:-1]], cumulative[matrix.indptr[1:]]
    certain = ends - begins >= 1 - 1e-9  # sums to 1 but for rounding: has no end
    last = np.maximum(matrix.indptr[1:] - 1, 0)
    alive = np.arange(num_walks)
    steps = np.full((num_walks, length), PAD, dtype=np.int64)
    for step in range(length):
        steps[alive, step] = current
        drawn = uniform()[alive]
        # inverse of the cumulative sum; a row's entries lie behind each other in `matrix.data`
        place = np.searchsorted(cumulative[1:], begins[current] + drawn, "right")
        place = np.where(certain[current], np.minimum(place, last[current]), place)
        goes_on = place < matrix.indptr[current + 1]
        alive, current = alive[goes_on], matrix.indices[place[goes_on]].astype(np.int64)
        if not len(alive):
            break
    return torch.from_numpy(steps)


def _first(decoder: Transitions, start: Tensor | None, walks: int, uniform: Any) -> Any:
    n = len(decoder)
    if start is None:
        weights = np.full(n, 1 / n) if decoder.start is None else decoder.start
        cumulative = np.cumsum(weights)
        found = np.searchsorted(cumulative, uniform() * cumulative[-1], "right")
        return np.minimum(found, np.flatnonzero(weights)[-1])
    if start.shape != (walks,) or (walks and not 0 <= int(start.min()) <= int(start.max()) < n):
        raise ArgumentError(
            f"`start` must hold a token from 0 to {n - 1} for each of the {walks} walks. "
            f"Found shape {list(start.shape)}.",
            argument="start",
        )
    return start.cpu().numpy().astype(np.int64)
