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

Scores = Float[Tensor, "side row own partner token"]


class BidirectionalScorer(ABC):
    """Scores the next token of prefixes from the left and from the right, given each other.

    Tensors of both sides have the side as their first axis, 0 from the left and 1 from the right:
    two decoders of one shape can so be computed by one operation. A cache holds the hypotheses of
    both sides, the same number in each row; it is spent once it was given to :meth:`read` or
    :meth:`select`. What depends on a side alone is computed once per hypothesis, in :meth:`read`;
    only :meth:`pairs` sees both.
    """

    start_id: int
    """What texts begin with: the first token from the left, the last from the right."""

    end_id: int
    """What texts end with: the last token from the left, the first from the right."""

    max_length: int | None = None
    """Tokens that can be read per side, the mark left out; None for any number."""

    @property
    def begins(self) -> tuple[int, int] | None:
        """What either side begins with and never writes; None if it may write any token."""
        return self.start_id, self.end_id

    @property
    def ends(self) -> tuple[int, int]:
        """What either side ends with."""
        return self.end_id, self.start_id

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens a side can write, its last mark included; None for any number.

        Args:
            prompt_length: Tokens of the longest source.
        """
        del prompt_length
        return None if self.max_length is None else self.max_length + 1  # the last is not read

    @abstractmethod
    def begin(
        self,
        prompt: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        lengths: Int[Tensor, " row"] | None = None,
    ) -> Any:
        """Read sources and the marks that texts begin with; return the cache, one hypothesis a row.

        Args:
            prompt: Ids; what stands at padding does not matter.
            mask: True at real tokens, wherever they are; all are by default.
            lengths: Tokens that each target is known to have; unknown by default.
        """

    @abstractmethod
    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "side row own"],
        stopped: Bool[Tensor, "side row own"] | None = None,
    ) -> Any:
        """Read one more token per hypothesis; return the cache.

        Args:
            cache: What the last call returned.
            tokens: Ids; anything where a hypothesis has ended.
            stopped: True where a hypothesis has ended and stays as it is; None if none has.
        """

    @abstractmethod
    def pairs(self, cache: Any) -> Scores:
        """Return the logits of each side's next token, given each hypothesis of the other.

        Args:
            cache: What the last call returned; it can still be used.
        """

    @abstractmethod
    def select(self, cache: Any, hypotheses: Int[Tensor, "side row own"]) -> Any:
        """Return the cache of some hypotheses, each named any number of times.

        Args:
            cache: What the last call returned.
            hypotheses: Places counted through both sides and all rows of the cache, (side · rows +
                row) · own + hypothesis; those of a row are of one row of the cache.
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
    ) -> Any:
        """Keep the sources; known lengths are of no use to a function."""
        del lengths
        ids, real = aligned(prompt, check_prompt(prompt, mask))
        marks = torch.tensor([self.start_id, self.end_id], dtype=torch.long, device=ids.device)
        prefixes = marks[:, None, None, None].expand(2, len(ids), 1, 1)
        return prefixes, torch.ones_like(prefixes[..., 0]), ids, real.sum(1)

    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "side row own"],
        stopped: Bool[Tensor, "side row own"] | None = None,
    ) -> Any:
        """Append the tokens."""
        ids, count, *sources = cache
        count = count + (1 if stopped is None else ~stopped)
        return (torch.cat([ids, tokens[..., None]], 3), count, *sources)

    def pairs(self, cache: Any) -> Scores:
        """Score all prefixes from the left with all from the right."""
        (left, right), (l_count, r_count), source, s_count = cache
        rows, beams = l_count.shape
        shape = (rows, beams, beams)
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
            row = where // beams**2
            own, partner = where // beams % beams, where % beams
            n_left, n_right, n_source = lengths.tolist()
            found = self.function(
                source[row, :n_source], left[row, own, :n_left], right[row, partner, :n_right]
            )
            for side, logits in zip(sides, found, strict=True):
                side.append(logits[:, -1] if logits.ndim == 3 else logits)
            places.append(where)
        order = torch.cat(places).argsort()
        l_scores, r_scores = (torch.cat(side)[order].view(*shape, -1) for side in sides)
        return torch.stack([l_scores, r_scores.transpose(1, 2)])

    def select(self, cache: Any, hypotheses: Int[Tensor, "side row own"]) -> Any:
        """Return prefixes."""
        ids, count, source, s_count = cache
        rows = hypotheses[0, :, 0] // count.shape[2]
        return (
            ids.flatten(0, 2)[hypotheses],
            count.flatten()[hypotheses],
            source[rows],
            s_count[rows],
        )


def pair_scorer(model: Any, *, start_id: int = 2, end_id: int = 3) -> BidirectionalScorer:
    """Return what the search needs of a model.

    Args:
        model: A :class:`BidirectionalScorer`, which is returned as it is; two language models, the
            first of which writes from the left, as :class:`TwoModels` takes them; or a function or
            module as :class:`FunctionPairScorer` takes it.
        start_id: What texts begin with, for a function.
        end_id: What texts end with, for a function.

    Raises:
        ArgumentError: If it is none of these.
    """
    from kexue_bidirectional_decoding.two_models import TwoModels

    if isinstance(model, BidirectionalScorer):
        return model
    if isinstance(model, tuple | list) and len(model) == 2:
        return TwoModels(*model)
    if not callable(model):
        raise ArgumentError(
            "`scores` must be a BidirectionalScorer, two language models, or a function from "
            "sources and the prefixes of both sides to the logits of both. Found "
            f"{type(model).__name__}.",
            argument="scores",
        )
    return FunctionPairScorer(model, start_id=start_id, end_id=end_id)
