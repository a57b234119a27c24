"""What two decoders of one text are to a search: states of each side, scores of pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.language import aligned, check_prompt
from kexue_bidirectional_decoding.targets import check_marks

__all__ = ["BidirectionalScorer", "FunctionPairScorer"]

Scores = Float[Tensor, "row own partner token"]


class BidirectionalScorer(ABC):
    """Scores the next token of prefixes from the left and from the right, given each other.

    A cache holds the hypotheses of one side, row by row, the same number in each; it is spent once
    it was given to :meth:`read` or :meth:`select`. What depends on a side alone is computed once
    per hypothesis, in :meth:`read`; only :meth:`pairs` sees both.
    """

    start_id: int
    """What texts begin with: the first token from the left, the last from the right."""

    end_id: int
    """What texts end with: the last token from the left, the first from the right."""

    max_length: int | None = None
    """Tokens that can be read per side, the mark left out; None for any number."""

    @abstractmethod
    def begin(
        self,
        prompt: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        lengths: Int[Tensor, " row"] | None = None,
    ) -> tuple[Any, Any]:
        """Read sources; return the caches of both sides, which have read no mark yet.

        Args:
            prompt: Ids; what stands at padding does not matter.
            mask: True at real tokens, wherever they are; all are by default.
            lengths: Tokens that each target is known to have; unknown by default.
        """

    @abstractmethod
    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "row own"],
        going: Bool[Tensor, "row own"],
        *,
        right: bool,
    ) -> Any:
        """Read one more token per hypothesis, first the mark; return the cache.

        Args:
            cache: A side's.
            tokens: Ids; anything where a hypothesis has ended.
            going: False where a hypothesis has ended and stays as it is.
            right: Whether it is the side that writes from the right.
        """

    @abstractmethod
    def pairs(self, left: Any, right: Any) -> tuple[Scores, Scores]:
        """Return the logits of each side's next token, given each hypothesis of the other.

        Args:
            left: The cache of the side from the left.
            right: That of the side from the right.
        """

    @abstractmethod
    def select(self, cache: Any, hypotheses: Int[Tensor, "row own"]) -> Any:
        """Return the cache of some hypotheses, each named any number of times.

        Args:
            cache: A side's.
            hypotheses: Places counted through all rows; those of a row are of one old row.
        """


class FunctionPairScorer(BidirectionalScorer):
    """A function from whole prefixes of both sides to scores, without a cache.

    Pairs of equal lengths are scored together, so that the function never sees padding.

    Args:
        function: From sources ``[pair, time]``, prefixes from the left ``[pair, l]`` and from the
            right ``[pair, r]``, each with its mark first, to the logits ``[pair, token]`` of the
            next token on either side, or ``[pair, l, token]`` and ``[pair, r, token]``.
        start_id: What texts begin with.
        end_id: What texts end with.
        max_length: Tokens that the function takes per side, the mark left out.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        start_id: int = 2,
        end_id: int = 3,
        max_length: int | None = None,
    ) -> None:
        check_marks(start_id, end_id)
        self.function = function
        self.start_id = start_id
        self.end_id = end_id
        self.max_length = max_length

    def begin(
        self,
        prompt: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        lengths: Int[Tensor, " row"] | None = None,
    ) -> tuple[Any, Any]:
        """Keep the sources; known lengths are of no use to a function."""
        del lengths
        ids, real = aligned(prompt, check_prompt(prompt, mask))
        nothing = ids.new_zeros(len(ids), 1, 0)
        count = ids.new_zeros(len(ids), 1)
        cache = (nothing, count, ids, real.sum(1))  # prefixes, their lengths, sources, theirs
        return cache, cache

    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "row own"],
        going: Bool[Tensor, "row own"],
        *,
        right: bool,
    ) -> Any:
        """Append the tokens."""
        del right
        ids, count, *sources = cache
        return (torch.cat([ids, tokens[..., None]], 2), count + going, *sources)

    def pairs(self, left: Any, right: Any) -> tuple[Scores, Scores]:
        """Score all prefixes from the left with all from the right."""
        l_ids, l_count, source, s_count = left
        r_ids, r_count, *_ = right
        rows, l_beams = l_count.shape
        r_beams = r_count.shape[1]
        shape = (rows, l_beams, r_beams)
        each = torch.stack(
            [
                l_count[:, :, None].expand(shape).flatten(),
                r_count[:, None].expand(shape).flatten(),
                s_count[:, None, None].expand(shape).flatten(),
            ],
            1,
        )
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        places: list[Tensor] = []
        for lengths in torch.unique(each, dim=0):
            where = (each == lengths).all(1).nonzero()[:, 0]
            row = where // (l_beams * r_beams)
            own, partner = where // r_beams % l_beams, where % r_beams
            n_left, n_right, n_source = lengths.tolist()
            found = self.function(
                source[row, :n_source], l_ids[row, own, :n_left], r_ids[row, partner, :n_right]
            )
            for side, logits in zip(sides, found, strict=True):
                side.append(logits[:, -1] if logits.ndim == 3 else logits)
            places.append(where)
        order = torch.cat(places).argsort()
        l_scores, r_scores = (torch.cat(side)[order].view(*shape, -1) for side in sides)
        return l_scores, r_scores.transpose(1, 2)

    def select(self, cache: Any, hypotheses: Int[Tensor, "row own"]) -> Any:
        """Return prefixes."""
        ids, count, source, s_count = cache
        rows = hypotheses[:, 0] // count.shape[1]
        flat = hypotheses.flatten()
        return (
            ids.flatten(0, 1)[flat].view(*hypotheses.shape, ids.shape[2]),
            count.flatten()[flat].view_as(hypotheses),
            source[rows],
            s_count[rows],
        )


def pair_scorer(model: Any, *, start_id: int = 2, end_id: int = 3) -> BidirectionalScorer:
    """Return what the search needs of a model.

    Args:
        model: A :class:`BidirectionalScorer`, which is returned as it is, or a function or module
            as :class:`FunctionPairScorer` takes it.
        start_id: What texts begin with, for a function.
        end_id: What texts end with, for a function.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(model, BidirectionalScorer):
        return model
    if not callable(model):
        raise ArgumentError(
            "`scores` must be a BidirectionalScorer, or a function from sources and the prefixes "
            f"of both sides to the logits of both. Found {type(model).__name__}.",
            argument="scores",
        )
    return FunctionPairScorer(model, start_id=start_id, end_id=end_id)
