"""Look-ahead: how much of the question each allowed token may still cover.

With Q the question, P the tokens since the last separator and c a way to go on to the next
separator or the end, the gain of a token is the greatest
Δ = LCS(P c, Q) − LCS(P, Q) among all c that begin with it (post 8802, section 前瞻策略), LCS being
the length of the longest common subsequence. The probability of the token becomes
p^(1 / (1 + strength · Δ)).

Longest common subsequences grow by one bit-parallel step per token (Hyyrö, 2004): with a bit for
each token of the question, set where the length does not grow, and M the places of the next token,
V ← (V + (V & M)) | (V & ~M), and a carry out of the last bit is one more. So the gains of all ways
below a node are sums of carries, a level at a time for all rows together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue_trie_decoding.index import Edges, TrieIndex

__all__ = ["Coverage", "LookAhead", "longest_common_subsequence"]

_WORD = 62
"""Bits of a word: a sum of two words and a carry fits into 63."""

_FULL = (1 << _WORD) - 1


class Coverage:
    """What is needed to grow longest common subsequences with a batch of questions.

    Args:
        questions: Token ids.
        mask: True at real tokens; padding matches nothing and changes nothing, wherever it is.
    """

    def __init__(
        self, questions: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> None:
        batch, time = questions.shape
        real = torch.ones_like(questions, dtype=torch.bool) if mask is None else mask.bool()
        self.words = max(1, -(-time // _WORD))
        self._tokens, slot = torch.unique(questions, return_inverse=True)
        place = torch.arange(time, device=questions.device)
        bit = (torch.ones_like(place) << place % _WORD) * real
        rows = torch.arange(batch, device=questions.device)[:, None]
        # one row of words per question and token; the last is for tokens that are in no question
        self._matches = questions.new_zeros(batch, len(self._tokens) + 1, self.words)
        self._matches.index_put_((rows, slot, place // _WORD), bit, accumulate=True)

    def start(self, rows: int) -> Int[Tensor, "row word"]:
        """Return the state of empty sequences."""
        return self._matches.new_full((rows, self.words), _FULL)

    def step(
        self,
        state: Int[Tensor, "row word"],
        questions: Int[Tensor, " row"],
        tokens: Int[Tensor, " row"],
    ) -> tuple[Int[Tensor, "row word"], Int[Tensor, " row"]]:
        """Append a token; return the new state and by how much the length grew, 0 or 1.

        Args:
            state: Of the sequences so far.
            questions: With which question each is compared.
            tokens: What is appended.
        """
        slot = torch.searchsorted(self._tokens, tokens.contiguous())
        known = self._tokens.new_full((1,), -1) if not len(self._tokens) else self._tokens
        hit = known[slot.clamp(max=len(known) - 1)] == tokens
        places = self._matches[questions, torch.where(hit, slot, len(self._tokens))]
        carry = torch.zeros_like(tokens)
        grown = []
        for word in range(self.words):
            v = state[:, word]
            u = v & places[:, word]
            total = v + u + carry
            carry = total >> _WORD
            grown.append((total & _FULL) | (v & ~u))
        return torch.stack(grown, 1), carry


def longest_common_subsequence(
    a: Int[Tensor, "batch time"], b: Int[Tensor, "batch other"]
) -> Int[Tensor, " batch"]:
    """Return the length of the longest common subsequence of each pair of rows.

    Args:
        a: Token ids.
        b: Token ids; negative ones match nothing.

    Example:
        >>> import torch
        >>> from kexue_trie_decoding import longest_common_subsequence
        >>> longest_common_subsequence(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 9, 4]]))
        tensor([2])

    Reference: Hyyrö, Bit-parallel LCS-length computation revisited, 2004.
    """
    coverage = Coverage(a)
    rows = torch.arange(len(a), device=a.device)
    state, length = coverage.start(len(a)), torch.zeros_like(rows)
    for token in b.unbind(1):
        after, grown = coverage.step(state, rows, token)
        state = torch.where((token >= 0)[:, None], after, state)
        length += grown * (token >= 0)
    return length


class State(NamedTuple):
    """Where the look-ahead of each row is; select its rows like those of any cache.

    Args:
        question: Shape ``[row]``: with which question the row is compared.
        covered: Shape ``[row, word]``: what it covers since the last separator.
        separators: Shape ``[row]``: how many separators it has passed.
    """

    question: Tensor
    covered: Tensor
    separators: Tensor


class LookAhead:
    """Weighs allowed tokens by what they can still cover of the question.

    Args:
        strength: Factor of the gain Δ; 0 changes nothing, the post takes 1.
        separator_id: The token between the fields of an entry. Ways end there, and coverage is
            counted from there. By default an entry is one field.
        after: Look ahead only behind so many separators: 1 in the post, where the subject is
            found by the model alone.
        limit: Rows below whose node there are more nodes than this are not looked ahead.

    Example:
        >>> from kexue_trie_decoding import LookAhead
        >>> LookAhead(separator_id=3, after=1)
        LookAhead(strength=1.0, separator_id=3, after=1, limit=100000)

    Reference: Su, Seq2Seq+前缀树, 2021, https://kexue.fm/archives/8802, section 前瞻策略.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        separator_id: int | None = None,
        after: int = 0,
        limit: int = 100_000,
    ) -> None:
        for name, value in (("strength", strength), ("after", after), ("limit", limit)):
            if not value >= 0 or value == float("inf"):
                raise ArgumentError(
                    f"`{name}` of LookAhead must be at least 0 and finite. Found {value!r}.",
                    argument=name,
                )
        if after and separator_id is None:
            raise ArgumentError(
                f"`after` of LookAhead counts separators: give `separator_id` too. Found "
                f"after={after} without one.",
                argument="after",
            )
        self.strength = strength
        self.separator_id = separator_id
        self.after = after
        self.limit = limit

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"LookAhead({said})"

    def begin(self, coverage: Coverage, rows: int) -> State:
        """Return the state of rows that are at the root, one for each question."""
        covered = coverage.start(rows)
        question = torch.arange(rows, device=covered.device)
        return State(question, covered, torch.zeros_like(question))

    def advance(self, coverage: Coverage, state: State, tokens: Int[Tensor, " row"]) -> State:
        """Append a token to each row."""
        covered, _ = coverage.step(state.covered, state.question, tokens)
        if self.separator_id is None:
            return state._replace(covered=covered)
        passed = tokens == self.separator_id
        covered = torch.where(passed[:, None], coverage.start(len(tokens)), covered)
        return State(state.question, covered, state.separators + passed)

    def weigh(
        self,
        log_p: Float[Tensor, " edge"],
        edges: Edges,
        index: TrieIndex,
        coverage: Coverage,
        state: State,
    ) -> Float[Tensor, " edge"]:
        """Return log p / (1 + strength · Δ) for each edge, not normalised.

        Args:
            log_p: Log-probabilities in the model's whole vocabulary.
            edges: The edges that leave the rows' nodes.
            index: The tree.
            coverage: Of the questions.
            state: Of the rows.
        """
        gain = self.gains(edges, index, coverage, state)
        return log_p / (1 + self.strength * gain)

    def gains(
        self, edges: Edges, index: TrieIndex, coverage: Coverage, state: State
    ) -> Int[Tensor, " edge"]:
        """Return Δ of each edge; 0 where there is no choice, or before ``after`` separators.

        Args:
            edges: The edges that leave the rows' nodes.
            index: The tree.
            coverage: Of the questions.
            state: Of the rows.
        """
        best = torch.zeros_like(edges.rows)
        num_rows = len(state.question)
        wanted = torch.bincount(edges.rows, minlength=num_rows) > 1
        wanted &= state.separators >= self.after
        edge = wanted[edges.rows].nonzero()[:, 0]  # the edge of the call that a way begins with
        rows, tokens, nodes = (part[edge] for part in edges)
        covered, gain = state.covered[rows], torch.zeros_like(rows)
        below = torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
        while len(edge):
            below += torch.bincount(rows, minlength=num_rows)
            small = below <= self.limit
            ended = tokens == index.end_id
            if self.separator_id is not None:
                ended |= tokens == self.separator_id
            done = ended & small[rows]
            best.scatter_reduce_(0, edge[done], gain[done], "amax")
            going = ~ended & small[rows]
            edge, rows, tokens, nodes = (x[going] for x in (edge, rows, tokens, nodes))
            covered, grown = coverage.step(covered[going], state.question[rows], tokens)
            gain = gain[going] + grown
            next_edges = index.edges(nodes)
            of = next_edges.rows
            edge, rows, covered, gain = edge[of], rows[of], covered[of], gain[of]
            tokens, nodes = next_edges.tokens, next_edges.nodes
        return best.masked_fill((below > self.limit)[edges.rows], 0)
