"""What may follow, and nothing else: the form of the constraint that beam search works on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.language import NextTokenScorer, check_prompt, log_probabilities, next_token_scorer
from kexue_trie_decoding.index import Edges, TrieIndex
from kexue_trie_decoding.kernels import Array, expand, tensor, view
from kexue_trie_decoding.lookahead import Coverage, LookAhead, State
from kexue_trie_decoding.masking import sound

__all__ = ["Ahead", "Candidates", "Slots"]


class Ahead(NamedTuple):
    """What the look-ahead of some rows is at.

    Args:
        coverage: Of the questions.
        state: Of the rows.
    """

    coverage: Coverage
    state: State

    @classmethod
    def begin(cls, weigher: LookAhead, prompt: Tensor, mask: Tensor) -> Ahead:
        """Return it where all rows are at the root."""
        coverage = Coverage(prompt, mask)
        return cls(coverage, weigher.begin(coverage, len(prompt)))

    def advance(self, weigher: LookAhead, tokens: Tensor) -> Ahead:
        """Return it one token later."""
        return self._replace(state=weigher.advance(self.coverage, self.state, tokens))

    def select(self, rows: Tensor) -> Ahead:
        """Return it for some rows."""
        return self._replace(state=State(*(part.index_select(0, rows) for part in self.state)))


class Candidates(NamedTuple):
    """What may follow some nodes, one row's behind the other's.

    Args:
        begin: Shape ``[row]``: the first edge of each row.
        degree: Shape ``[row]``: how many there are, at least 1.
        rows: Shape ``[edge]``: the row of each.
        tokens: Shape ``[edge]``.
        scores: Shape ``[edge]``: a row has one above -inf, and none is NaN.
    """

    begin: Array
    degree: Array
    rows: Array
    tokens: Array
    scores: Array

    @classmethod
    def of(
        cls,
        logits: Tensor,
        nodes: Array,
        index: TrieIndex,
        weigher: LookAhead | None = None,
        ahead: Ahead | None = None,
    ) -> Candidates:
        """Take what may follow from scores of all tokens; weigh it, if there is a look-ahead.

        Args:
            logits: Shape ``[row, token]``.
            nodes: Shape ``[row]``: where each row is.
            index: The tree.
            weigher: The look-ahead.
            ahead: What it is at.
        """
        index.check_logits(logits, len(nodes))
        begin, degree = index.tree.span(nodes)
        edge, rows = expand(begin, degree)
        tokens = index.tree.tokens(edge)
        if weigher is None or ahead is None:
            scores = _taken(logits, rows, tokens)
        else:
            # the probabilities whose roots are taken are those among all tokens, as in the post
            log_p = tensor(_taken(log_probabilities(logits), rows, tokens))
            after = (edge + 2) * (edge < len(index.tree.keys) - 1) - 1
            edges = Edges(tensor(rows), tensor(tokens), tensor(after))
            gains = weigher.gains(edges, index, *ahead).to(log_p.dtype)
            scores = view(log_p / (1 + weigher.strength * gains))
        return cls(begin, degree, rows, tokens, sound(scores, degree))

    def spread(self, logits: Tensor, columns: Array, size: int) -> Tensor:
        """Return the scores as a table, -inf where there is none.

        Args:
            logits: Whose device and dtype the table has, if the scores have them.
            columns: Shape ``[edge]``: where each score goes.
            size: How many columns there are.
        """
        scores = tensor(self.scores)
        out = logits.new_full((len(self.begin), size), -torch.inf, dtype=scores.dtype)
        out.view(-1).scatter_(0, tensor(self.rows * size + columns), scores)
        return out


def _taken(logits: Tensor, rows: Array, tokens: Array) -> Array:
    flat, given = rows * logits.shape[1] + tokens, view(logits)
    return given.reshape(-1)[flat if isinstance(given, np.ndarray) else tensor(flat)]


class _Cache(NamedTuple):
    inner: Any
    begin: Array  # [row]: the first edge of each, and how many there are
    degree: Array
    ahead: Ahead | None


class Slots(NextTokenScorer):
    """A scorer around a scorer, whose tokens are places among what may follow a row's node.

    So search looks at as many columns as the widest node has children, and not at the vocabulary:
    normalising and choosing take time by what is allowed. Slot 0 is the end token, slot i the i-th
    child; :meth:`said` gives the tokens back.

    Args:
        model: Whatever :func:`~kexue.core.language.next_token_scorer` takes.
        index: The entries.
        lookahead: Weighs what is allowed by what it can still cover of the prompt.
    """

    eos_id = 0

    def __init__(self, model: Any, index: TrieIndex, *, lookahead: LookAhead | None = None) -> None:
        self.scorer = next_token_scorer(model)
        self.index = index
        self.lookahead = lookahead
        self.max_length = self.scorer.max_length

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens may follow a prompt of so many; None for any number."""
        return self.scorer.room(prompt_length)

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row slot"], Any]:
        """Read prompts; an entry begins behind each."""
        mask = check_prompt(prompt, mask)
        logits, inner = self.scorer.begin(prompt, mask)
        device = logits.device
        self.index = self.index.to(device)
        ahead = None
        if self.lookahead is not None:
            ahead = Ahead.begin(self.lookahead, prompt.to(device), mask.to(device))
        nodes = torch.zeros(len(logits), dtype=torch.int64, device=device)
        return self._step(logits, inner, view(nodes), ahead)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row slot"], Any]:
        """Go on by a slot of each row."""
        nodes, said = self._gone(cache.begin, cache.degree, view(tokens))
        logits, inner = self.scorer.advance(cache.inner, tensor(said))
        ahead = cache.ahead
        if self.lookahead is not None and ahead is not None:
            ahead = ahead.advance(self.lookahead, tensor(said))
        return self._step(logits, inner, nodes, ahead)

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        """Return the cache of some rows."""
        inner, begin, degree, ahead = cache
        at = view(rows)
        ahead = None if ahead is None else ahead.select(rows)
        return _Cache(self.scorer.select(inner, rows), begin[at], degree[at], ahead)

    def said(self, slots: Int[Tensor, "row time"]) -> Int[Tensor, "row time"]:
        """Return sequences of slots as tokens.

        Args:
            slots: From the root, right-padded with :data:`~kexue.core.component.PAD`.
        """
        nodes = view(torch.zeros(len(slots), dtype=torch.int64, device=slots.device))
        tokens = torch.full_like(slots, PAD)
        for step, slot in enumerate(slots.unbind(1)):
            nodes, said = self._gone(*self.index.tree.span(nodes), view(slot))
            tokens[:, step] = tensor(said).where(slot != PAD, PAD)
        return tokens

    def _gone(self, begin: Array, degree: Array, slots: Array) -> tuple[Array, Array]:
        """Return where slots lead, and their tokens."""
        # a beam of no probability may have any slot, and then ends
        there = (slots > 0) & (slots <= degree)
        edge = begin + (slots - 1) * there
        end = self.index.end_id
        return (edge + 2) * there - 1, (self.index.tree.tokens(edge) - end) * there + end

    def _step(
        self, logits: Tensor, inner: Any, nodes: Array, ahead: Ahead | None
    ) -> tuple[Tensor, _Cache]:
        found = Candidates.of(logits, nodes, self.index, self.lookahead, ahead)
        place, _ = expand(found.begin * 0 + 1, found.degree)
        columns = place * (found.tokens != self.index.end_id)
        widest = int(found.degree.max()) if len(nodes) else 0
        return found.spread(logits, columns, widest + 1), _Cache(
            inner, found.begin, found.degree, ahead
        )
