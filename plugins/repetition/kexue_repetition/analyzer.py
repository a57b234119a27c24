"""Analyzers, and the one of repetition."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core.component import Example
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.base import Contract
from kexue_repetition.bounds import repetition_bounds
from kexue_repetition.index import repetition_index
from kexue_repetition.pairs import worst_pairs
from kexue_repetition.transitions import Transitions
from kexue_repetition.truncation import check_truncation, truncate_transitions

__all__ = ["Analyzer", "Repetition", "RepetitionAnalyzer"]


class Analyzer(Contract):
    """An analyzer maps the transition matrix of a decoder to figures about how it writes.

    On files it is given texts, too, or a model, whose matrix is estimated.
    """

    @abstractmethod
    def analyze(self, transitions: Any) -> Any:
        """Return the figures: a named tuple of tensors, floats and tuples.

        Args:
            transitions: Shape ``[token, token]``, the probability of each token after each,
                without the end token; a tensor, or whatever ``Transitions.of`` takes.
        """


class Repetition(NamedTuple):
    """What a decoder's repetition consists of; all floating-point tensors are float64.

    Args:
        value: Shape ``[]``: R; see :func:`~kexue_repetition.repetition_index`.
        eigenvalue: Shape ``[]``: λ₁(S).
        lower_trace: Shape ``[]``: a lower bound of R, by all loops of a length.
        lower_diagonal: Shape ``[]``: a lower bound of R, by those that begin with a token.
        upper: Shape ``[]``: n λ₁ / (1 − λ₁).
        row_bounds: Shape ``[2]``: between which λ₁ lies.
        zeta_trace: Shape ``[]``: the post's estimate of R; no bound.
        zeta_diagonal: Shape ``[]``: the paper's, as corrected by the post; no bound.
        by_length: Shape ``[length]``: Tr Sᵏ, the part of R of loops of k tokens.
        per_token: Shape ``[token]``: the part of R of loops that begin with a token.
        pairs: Shape ``[pair, 2]``: the pairs of tokens that cause most, the worst first.
        pair_probability: Shape ``[pair]``: P_ij of these.
        pair_drop: Shape ``[pair]``: by how much R falls without each.
        pair_inflow: Shape ``[pair]``: Σᵢ P_ij, what leads to the second token.
        nonzero: ζ, the share of entries that are not 0.
        certain_loop: The tokens of a loop that is never left, which makes R infinite.
        transitions: What was analyzed: P after temperature and truncation.
    """

    value: Float[Tensor, ""]
    eigenvalue: Float[Tensor, ""]
    lower_trace: Float[Tensor, ""]
    lower_diagonal: Float[Tensor, ""]
    upper: Float[Tensor, ""]
    row_bounds: Float[Tensor, " 2"]
    zeta_trace: Float[Tensor, ""]
    zeta_diagonal: Float[Tensor, ""]
    by_length: Float[Tensor, " length"]
    per_token: Float[Tensor, " token"]
    pairs: Int[Tensor, "pair 2"]
    pair_probability: Float[Tensor, " pair"]
    pair_drop: Float[Tensor, " pair"]
    pair_inflow: Float[Tensor, " pair"]
    nonzero: float
    certain_loop: tuple[int, ...]
    transitions: Transitions


class RepetitionAnalyzer(Analyzer):
    """How likely a bigram decoder is to repeat itself, what bounds that, and what causes it.

    R = Tr[S (I − S)⁻¹] with S = P ∘ P sums the probabilities of all repeated loops; its lower
    bounds count loops, its upper bound is by the largest eigenvalue of S, and pairs are ranked by
    what R would be without them. Truncation sets entries of P to 0 and so raises R.

    R is about the last token only. Of a model that sees more, the matrix is an average of its
    steps, and R says how it would repeat itself if it forgot the rest.

    Args:
        temperature: Of the decoding that is analyzed; 1 leaves P as it is.
        top_k: Candidates that the decoding keeps; 0 for all, 1 for greedy.
        top_p: Mass of the nucleus that it keeps.
        lengths: Longest loop that the lower bounds count; by default as many as matter.
        num_pairs: How many pairs to return.

    Deviations from the paper: Σᵢ ((Pᵏ)ᵢᵢ)² where it has Tr P²ᵏ, a correction of the post's; R is
    not divided by n; the numbers of loops are counted where both estimate them.

    Raises:
        ArgumentError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from kexue_repetition import RepetitionAnalyzer
        >>> p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.2], [0.3, 0.3, 0.3]])
        >>> found = RepetitionAnalyzer().analyze(p)
        >>> bool(found.lower_trace <= found.lower_diagonal <= found.value <= found.upper)
        True
        >>> [round(RepetitionAnalyzer(top_k=k).analyze(p).value.item(), 3) for k in (3, 2, 1)]
        [0.538, 0.961, inf]

    References:
        - https://kexue.fm/archives/8128
        - Fu et al. 2021, https://arxiv.org/abs/2012.14660
    """

    compilable = False

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        lengths: int | None = None,
        num_pairs: int = 20,
    ) -> None:
        check_truncation(temperature, top_k, top_p)
        if lengths is not None and lengths < 1:
            raise ArgumentError(
                f"`lengths` must be at least 1. Found {lengths}.", argument="lengths"
            )
        if num_pairs < 0:
            raise ArgumentError(
                f"`num_pairs` must be at least 0. Found {num_pairs}.", argument="num_pairs"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.lengths, self.num_pairs = lengths, num_pairs

    def analyze(self, transitions: Float[Tensor, "token token"] | Any) -> Repetition:
        """Return the index, its bounds and its causes.

        Args:
            transitions: P: the probability of each token after each, rows that sum to at most 1,
                without the end token; a tensor, or whatever ``Transitions.of`` takes.

        Raises:
            ArgumentError: If they are no such probabilities.
        """
        decoder = truncate_transitions(
            transitions, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        index = repetition_index(decoder)
        bounds = repetition_bounds(decoder, lengths=self.lengths, index=index)
        worst = worst_pairs(decoder, self.num_pairs)

        def scalar(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64)

        return Repetition(
            scalar(index.value),
            scalar(index.eigenvalue),
            scalar(bounds.lower_trace),
            scalar(bounds.lower_diagonal),
            scalar(bounds.upper),
            torch.tensor(bounds.row_bounds, dtype=torch.float64),
            scalar(bounds.zeta_trace),
            scalar(bounds.zeta_diagonal),
            bounds.by_length,
            index.per_token,
            *worst,
            bounds.nonzero,
            index.certain_loop,
            decoder,
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return a decoder of four tokens."""
        scores = torch.randn(4, 5, generator=generator)
        return Example({}, {"transitions": scores.softmax(1)[:, :4]})
