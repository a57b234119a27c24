"""Beam search over a language model that ends in a database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core import ArgumentError, Decoder, DecodeResult, Example
from kexue.core.language import beam_search, check_prompt
from kexue_trie_decoding.index import TrieIndex
from kexue_trie_decoding.lookahead import LookAhead
from kexue_trie_decoding.slots import Slots

__all__ = ["TrieBeam"]


class TrieBeam(Decoder):
    """Beam search whose result is always an entry of a database: retrieval by generation.

    A language model, fitted to pairs of a question and the entry that answers it, says the entry
    token by token; whatever does not continue an entry is left out, and the rest renormalised. No
    negative examples, no vectors to store. A score is the logarithm of a probability over all
    entries.

    Args:
        database: The entries: a :class:`TrieIndex`, or sequences of ids as its ``build`` takes
            them.
        end_id: The model's end token; of a TrieIndex its own.
        width: Prefixes kept per question; 1 is greedy search.
        num_return: Entries per question, at most ``width``; what does not exist has score -inf.
        length_penalty: Exponent of the length that scores are divided by when compared.
        lookahead: Whether each allowed token weighs by what it may still add to the longest common
            subsequence with the prompt; see :class:`LookAhead`.
        strength: How much, of the look-ahead.
        separator_id: The token between the fields of an entry, of the look-ahead.
        after: Look ahead only behind so many separators.
        limit: Look ahead only where no more nodes than this are below.

    Raises:
        ArgumentError: If the database is empty, or an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_trie_decoding import TrieBeam
        >>> def double(ids):  # the model: after 1 comes 2, after 2 comes 4
        ...     return torch.nn.functional.one_hot(2 * ids[:, -1] % 7, 7).float()
        >>> decoder = TrieBeam([[2, 4, 5], [2, 3], [6]], end_id=0, width=3, num_return=2)
        >>> decoder.decode(double, prompt=torch.tensor([[1]])).tolist()
        [[2, 4, 5, 0], [6, 0]]

    Reference: Su, Seq2Seq+前缀树, 2021, https://kexue.fm/archives/8802; De Cao et al.,
    Autoregressive Entity Retrieval, 2021, https://arxiv.org/abs/2010.00904.
    """

    needs_fitting: ClassVar[bool] = True
    compilable: ClassVar[bool] = False

    def __init__(
        self,
        database: TrieIndex | Sequence[Sequence[int]],
        *,
        end_id: int | None = None,
        width: int = 5,
        num_return: int = 1,
        length_penalty: float = 0.0,
        lookahead: bool = False,
        strength: float = 1.0,
        separator_id: int | None = None,
        after: int = 0,
        limit: int = 100_000,
    ) -> None:
        self.index = _index(database, end_id)
        if width < 1:
            raise ArgumentError(
                f"`width` of TrieBeam must be at least 1. Found {width}.", argument="width"
            )
        if not 1 <= num_return <= width:
            raise ArgumentError(
                f"`num_return` of TrieBeam must be from 1 to `width`, {width}. Found {num_return}.",
                argument="num_return",
            )
        self.width = width
        self.num_return = num_return
        self.length_penalty = length_penalty
        weigher = LookAhead(strength, separator_id=separator_id, after=after, limit=limit)
        self.lookahead = weigher if lookahead else None

    def decode(  # type: ignore[override]  # a model scores what follows a prompt
        self,
        scores: Any,
        *,
        prompt: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return the best entries for each prompt, end token included.

        ``index.find(result.sequences)`` gives their numbers, ``index.rows_of`` the rows of the
        database.

        Args:
            scores: The model: whatever :func:`~kexue.core.language.next_token_scorer` takes.
            prompt: Ids of the questions, for an encoder-decoder the sources.
            mask: True at real tokens; all are by default.

        Raises:
            ArgumentError: If prompts are not in order, the model has no room for the longest
                entry, or its vocabulary is too small for the database.
            WorkError: If the model's scores are NaN throughout.
        """
        scorer = Slots(scores, self.index, lookahead=self.lookahead)
        longest = int(check_prompt(prompt, mask).sum(1).max()) if prompt.numel() else 0
        room = scorer.room(longest)
        if room is not None and room < self.index.max_length:
            raise ArgumentError(
                f"`prompt` must leave the model, which reads {scorer.max_length} tokens, room for "
                f"the longest entry of the database, {self.index.max_length} tokens with its end. "
                f"Found a prompt of {longest} tokens, which leaves {max(room, 0)}.",
                argument="prompt",
            )
        found = beam_search(
            scorer,
            prompt,
            mask=mask,
            width=self.width,
            max_new_tokens=self.index.max_length,
            length_penalty=self.length_penalty,
            num_return=self.num_return,
        )
        return replace(found, sequences=scorer.said(found.sequences))

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three prompts of unequal length for a model of sums."""
        prompt = torch.randint(1, 9, (3, 5), generator=generator)
        mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
        database = [[3, 1, 4], [3, 1], [2, 7, 1], [2, 7, 8], [6]]
        return Example(
            {"database": database, "end_id": 0, "width": 3},
            {"scores": sums, "prompt": prompt, "mask": mask},
        )


def sums(ids: Int[Tensor, "row time"]) -> Tensor:
    """Score ten tokens by their distance from the sum of those before: the example's model.

    Args:
        ids: Token ids.
    """
    wanted = ids.sum(1, keepdim=True) % 10
    return -(torch.arange(10, device=ids.device) - wanted).abs().float()


def _index(database: TrieIndex | Sequence[Sequence[int]], end_id: int | None) -> TrieIndex:
    if isinstance(database, TrieIndex):
        if end_id not in {None, database.end_id}:
            raise ArgumentError(
                f"`end_id` must be that of the index, {database.end_id}, or be left out. "
                f"Found {end_id}.",
                argument="end_id",
            )
        return database
    if end_id is None:
        raise ArgumentError(
            "`end_id` must be given with a database of sequences: the model's end token.",
            argument="end_id",
        )
    return TrieIndex.build(database, end_id)
