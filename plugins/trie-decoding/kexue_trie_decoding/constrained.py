"""A language model that can say nothing but the entries of a database."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.language import NextTokenScorer, check_prompt, next_token_scorer
from kexue_trie_decoding.index import TrieIndex
from kexue_trie_decoding.kernels import view
from kexue_trie_decoding.lookahead import LookAhead
from kexue_trie_decoding.slots import Ahead, Candidates

__all__ = ["Constrained"]


class _Cache(NamedTuple):
    inner: Any
    nodes: Tensor  # [row]
    ahead: Ahead | None


class Constrained(NextTokenScorer):
    """A scorer around a scorer: what follows a prompt is an entry of an index.

    Tokens that lead out of the tree have probability 0, so that greedy search, beams and sampling
    (``generate``, ``beam_search``) all end in the database. In the sum over all entries, what it
    gives to each is a probability: the model's own choices, renormalised at each step.

    Args:
        model: Whatever :func:`~kexue.core.language.next_token_scorer` takes.
        index: The entries.
        lookahead: Weighs what is allowed by what it can still cover of the prompt.

    Example:
        >>> import torch
        >>> from kexue.core.language import generate
        >>> from kexue_trie_decoding import Constrained, TrieIndex
        >>> def count_up(ids):
        ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 6, 6).float()
        >>> index = TrieIndex.build([[2, 3, 5], [2, 4]], end_id=0)
        >>> generate(Constrained(count_up, index), torch.tensor([[1]]), max_new_tokens=9).tolist()
        [[2, 3, 5, 0]]

    Reference: Su, Seq2Seq+前缀树, 2021, https://kexue.fm/archives/8802.
    """

    def __init__(self, model: Any, index: TrieIndex, *, lookahead: LookAhead | None = None) -> None:
        self.scorer = next_token_scorer(model)
        self.index = index
        self.lookahead = lookahead
        self.eos_id = index.end_id
        self.max_length = self.scorer.max_length

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens may follow a prompt of so many; None for any number."""
        return self.scorer.room(prompt_length)

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read prompts; an entry begins behind each."""
        mask = check_prompt(prompt, mask)
        logits, inner = self.scorer.begin(prompt, mask)
        self.index = self.index.to(logits.device)
        nodes = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        ahead = None
        if self.lookahead is not None:
            ahead = Ahead.begin(self.lookahead, prompt.to(nodes.device), mask.to(nodes.device))
        cache = _Cache(inner, nodes, ahead)
        return self._constrained(logits, cache), cache

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read one more token of each entry."""
        logits, inner = self.scorer.advance(cache.inner, tokens)
        ahead = cache.ahead
        if self.lookahead is not None and ahead is not None:
            ahead = ahead.advance(self.lookahead, tokens)
        after = _Cache(inner, self.index.advance(cache.nodes, tokens), ahead)
        return self._constrained(logits, after), after

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        """Return the cache of some rows."""
        inner, nodes, ahead = cache
        ahead = None if ahead is None else ahead.select(rows)
        return _Cache(self.scorer.select(inner, rows), nodes.index_select(0, rows), ahead)

    def _constrained(self, logits: Tensor, cache: _Cache) -> Tensor:
        if self.lookahead is None or cache.ahead is None:
            return self.index.mask(logits, cache.nodes)
        found = Candidates.of(logits, view(cache.nodes), self.index, self.lookahead, cache.ahead)
        return found.spread(logits, found.tokens, logits.shape[1])
