"""What a language model is to a decoder: scores of the next token, or of masked ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.errors import ArgumentError

__all__ = [
    "FunctionMaskedScorer",
    "FunctionScorer",
    "MaskedScorer",
    "NextTokenScorer",
    "aligned",
    "check_prompt",
    "select_rows",
]


class NextTokenScorer(ABC):
    """Scores the token after each of a batch of prefixes, and remembers what it has computed.

    Search knows no more of a model than this. Another output layer, or a constraint, is a scorer
    around a scorer, which keeps a state of its own beside the inner cache.

    A cache belongs to the scorer that made it, and is spent once it was given to :meth:`advance` or
    :meth:`select`: only what they return may be used.
    """

    eos_id: int | tuple[int, ...] | None = None
    """The model's own end token, or several, if it has any."""

    max_length: int | None = None
    """Tokens that it can read, prompt included; None for any number."""

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens may follow a prompt of so many; None for any number."""
        return None if self.max_length is None else self.max_length - prompt_length

    @abstractmethod
    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read prompts; of an encoder-decoder they are the sources.

        Args:
            prompt: Ids; what stands at padding does not matter.
            mask: True at real tokens, wherever they are; all are by default.

        Returns:
            The logits of the token that follows each prompt, and the cache.
        """

    @abstractmethod
    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read one more token per row.

        Args:
            cache: What the last call returned.
            tokens: Ids.

        Returns:
            The logits of the token that follows, and the cache.
        """

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        """Return the cache of some rows, each named any number of times.

        Args:
            cache: What the last call returned; nested tuples, lists and dicts of tensors whose
                first dimension is the row, unless the scorer has its own ``select``.
            rows: Indices of rows.
        """
        return select_rows(cache, rows)


def select_rows(cache: Any, rows: Int[Tensor, " new"]) -> Any:
    """Return nested tuples, lists and dicts with each tensor's rows selected; None stays.

    Args:
        cache: The tensors, rows first.
        rows: Indices of rows.

    Raises:
        TypeError: If there is something else among them.
    """
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows)
    if isinstance(cache, tuple | list):
        parts = [select_rows(part, rows) for part in cache]
        return type(cache)(*parts) if hasattr(cache, "_fields") else type(cache)(parts)
    if isinstance(cache, dict):
        return {key: select_rows(part, rows) for key, part in cache.items()}
    if cache is None:
        return None
    raise TypeError(
        f"A cache that holds {type(cache).__name__} needs a scorer with its own `select`."
    )


class MaskedScorer(ABC):
    """Scores tokens given those on both sides of them."""

    mask_id: int
    """The token that stands for an unknown one."""

    max_length: int | None = None
    """Tokens that it can read; None for any number."""

    @abstractmethod
    def __call__(
        self,
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None,
        positions: Int[Tensor, "row position"],
    ) -> Float[Tensor, "row position token"]:
        """Return the logits at some positions of each row.

        Args:
            ids: Tokens, :attr:`mask_id` where they are unknown.
            mask: True at real tokens; all are by default.
            positions: Where to score; the vocabulary is scored there only, where that is possible.
        """


# -- prompts -------------------------------------------------------------------------------------


def check_prompt(
    prompt: Tensor, mask: Tensor | None = None, *, may_be_empty: bool = True
) -> Bool[Tensor, "row time"]:
    """Return the mask of prompts that are in order.

    Args:
        prompt: Ids, shape ``[row, time]``.
        mask: Shape ``[row, time]``, true at real tokens; all are by default.
        may_be_empty: Whether a row may have no real token.

    Raises:
        ArgumentError: If a shape or type is another, or a prompt is empty that must not be.
    """
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.dtype.is_floating_point:
        found = (
            f"{prompt.dtype} of shape {list(prompt.shape)}"
            if isinstance(prompt, Tensor)
            else type(prompt).__name__
        )
        raise ArgumentError(
            f"`prompt` must be token ids of shape [row, time]. Found {found}.", argument="prompt"
        )
    if mask is None:
        mask = torch.ones_like(prompt, dtype=torch.bool)
    if mask.shape != prompt.shape or mask.dtype is not torch.bool:
        raise ArgumentError(
            f"`mask` must be bool of the shape of `prompt`, {list(prompt.shape)}. "
            f"Found {mask.dtype} of shape {list(mask.shape)}.",
            argument="mask",
        )
    if not may_be_empty and len(prompt) and not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ArgumentError(
            f"`prompt` must hold a token in every row. Found none in row {row}. "
            "Give one, or `start_id`, the token that every sequence begins with.",
            argument="prompt",
        )
    return mask


def aligned(
    prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"], *, right: bool = False
) -> tuple[Int[Tensor, "row kept"], Bool[Tensor, "row kept"]]:
    """Move the real tokens to the left, or to the right, and cut off what no row needs.

    Args:
        prompt: Ids.
        mask: True at real tokens.
        right: Whether the padding comes first.

    Returns:
        The ids, and the mask.
    """
    order = (mask if right else ~mask).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(mask.sum(1).max()) if mask.numel() else 0
    start = prompt.shape[1] - longest if right else 0
    kept = order[:, start : start + longest]
    return prompt.gather(1, kept), mask.gather(1, kept)


# -- plain functions -----------------------------------------------------------------------------


class FunctionScorer(NextTokenScorer):
    """A function from whole prefixes to scores, without a cache.

    Rows of equal length are scored together, so that the function never sees padding.

    Args:
        function: From ids ``[row, time]`` to logits of the next token, ``[row, token]``, or of the
            next one at every position, ``[row, time, token]``; or to something with ``logits``.
        start_id: Token that is put before every prompt.
        eos_id: The model's own end token.
        max_length: Tokens that the function takes.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        start_id: int | None = None,
        eos_id: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.function = function
        self.start_id = start_id
        self.eos_id = eos_id
        self.max_length = max_length

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens may follow a prompt of so many; None for any number."""
        return super().room(prompt_length + (self.start_id is not None))

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Score what follows the prompts."""
        mask = check_prompt(prompt, mask, may_be_empty=self.start_id is not None)
        ids, real = aligned(prompt, mask)
        lengths = real.sum(1)
        if self.start_id is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), self.start_id), ids], 1)
            lengths = lengths + 1
        return self._score(ids, lengths), (ids, lengths)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Score what follows one more token."""
        ids, lengths = cache
        if len(ids) and int(lengths.max()) == ids.shape[1]:
            ids = torch.cat([ids, ids.new_zeros(len(ids), max(8, ids.shape[1] // 2))], 1)
        ids = ids.scatter(1, lengths[:, None], tokens[:, None].to(ids.dtype))
        return self._score(ids, lengths + 1), (ids, lengths + 1)

    def _score(self, ids: Tensor, lengths: Tensor) -> Tensor:
        if not len(ids):
            raise ArgumentError("`prompt` must have a row. Found none.", argument="prompt")
        scores: list[Tensor] = []
        places: list[Tensor] = []
        for length in torch.unique(lengths).tolist():
            rows = (lengths == length).nonzero()[:, 0]
            found = self.function(ids[rows, :length])
            found = getattr(found, "logits", found)
            scores.append(found[:, -1] if found.ndim == 3 else found)
            places.append(rows)
        if len(scores) == 1:
            return scores[0]
        return torch.cat(scores)[torch.cat(places).argsort()]


class FunctionMaskedScorer(MaskedScorer):
    """A function from ids to scores at all positions, of which those that are wanted are taken.

    Args:
        function: From ids ``[row, time]`` to logits ``[row, time, token]``, or to something with
            ``logits``. It never sees padding: rows of equal length are scored together.
        mask_id: The token that stands for an unknown one.
        max_length: Tokens that the function takes.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], *, mask_id: int, max_length: int | None = None
    ) -> None:
        self.function = function
        self.mask_id = mask_id
        self.max_length = max_length

    def __call__(
        self,
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None,
        positions: Int[Tensor, "row position"],
    ) -> Float[Tensor, "row position token"]:
        """Return the logits at the positions; real tokens must come before padding."""
        if mask is None:
            return _taken(self.function(ids), positions)
        scores: list[Tensor] = []
        places: list[Tensor] = []
        lengths = mask.sum(1)
        for length in torch.unique(lengths).tolist():
            rows = (lengths == length).nonzero()[:, 0]
            inside = positions[rows].clamp(max=max(length - 1, 0))
            scores.append(_taken(self.function(ids[rows, :length]), inside))
            places.append(rows)
        return torch.cat(scores)[torch.cat(places).argsort()]


def _taken(found: Any, positions: Tensor) -> Tensor:
    logits: Tensor = getattr(found, "logits", found)
    return logits.gather(1, positions[..., None].expand(*positions.shape, logits.shape[-1]))
