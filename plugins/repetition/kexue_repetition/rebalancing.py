"""Rebalanced encoding: pairs that are almost certain become one token (Fu et al. 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kexue.core.errors import ArgumentError

__all__ = ["Piece", "RebalancedEncoding", "Round"]

Piece = tuple[Hashable, ...]
"""One or more tokens that are one now."""

Ids = NDArray[np.int64]


class Round(NamedTuple):
    """What one pass over the texts found.

    Args:
        vocabulary: How many different pieces the texts are made of.
        largest: The greatest smoothed probability of a piece after another.
        merged: How many pairs were merged because of it.
    """

    vocabulary: int
    largest: float
    merged: int


class RebalancedEncoding:
    """Merge pairs of tokens whose second almost certainly follows the first.

    Each round counts which piece follows which, A_ij = (c_ij + a) / Σⱼ (c_ij + a) over the pieces
    of the texts, merges every pair with A_ij > γ, and encodes the texts anew: at each place the
    longest known phrase, from left to right. It ends when no A_ij is above γ. As the rows of the
    transition matrix lose their peaks, so does S = P ∘ P its large eigenvalues.

    A piece is a tuple of tokens, so that no joining character can be mistaken for one; decoding
    gives back what was encoded, whatever the tokens are. Pairs across the end of a text are not
    merged (the authors' script joins all texts to one).

    Args:
        gamma: γ, the greatest probability that is left, in (0, 1).
        rounds: At most so many rounds.
        smoothing: a, added to each count; a pair must be seen oftener the more pieces there are.

    Raises:
        ArgumentError: If a setting is outside its range.

    Example:
        >>> from kexue_repetition import RebalancedEncoding
        >>> encoding = RebalancedEncoding(gamma=0.5).fit(["忐忑不安", "忐忑的心", "忐忑地说"] * 3)
        >>> encoding.phrases[0]
        ('忐', '忑')
        >>> pieces = encoding.encode("很忐忑")
        >>> pieces
        [('很',), ('忐', '忑')]
        >>> encoding.decode(pieces)
        ['很', '忐', '忑']

    References:
        - Fu et al. 2021, https://arxiv.org/abs/2012.14660
        - https://kexue.fm/archives/8128
    """

    def __init__(self, gamma: float = 0.1, rounds: int = 10, smoothing: float = 1.0) -> None:
        if not 0 < gamma < 1:
            raise ArgumentError(f"`gamma` must be in (0, 1). Found {gamma!r}.", argument="gamma")
        if rounds < 1:
            raise ArgumentError(
                f"`rounds` must be at least 1. Found {rounds!r}.", argument="rounds"
            )
        if not 0 <= smoothing < float("inf"):
            raise ArgumentError(
                f"`smoothing` must be at least 0. Found {smoothing!r}.", argument="smoothing"
            )
        self.gamma, self.rounds, self.smoothing = gamma, rounds, smoothing
        self.phrases: list[Piece] = []
        self.history: list[Round] = []
        self._places: dict[Hashable, int] = {}
        self._trie = _Trie([], 0)

    def fit(self, texts: Iterable[Sequence[Hashable]]) -> RebalancedEncoding:
        """Learn what to merge, and return itself.

        Args:
            texts: Lists of tokens, or strings, whose tokens are their characters.

        Raises:
            ArgumentError: If ``texts`` is a single string.
        """
        rows = self._rows(texts)
        self._places = {}
        for token in itertools.chain.from_iterable(rows):
            self._places.setdefault(token, len(self._places))
        flat, ends = self._flat(rows)
        n = len(self._places)
        phrases: dict[tuple[int, ...], None] = {}
        self.history, trie = [], _Trie([], n)
        for _ in range(self.rounds):
            pieces, places = trie.encode(flat, ends)
            joined, found = self._likely(pieces, ends[places] if len(places) else places)
            known = [(i,) for i in range(n)] + list(phrases)
            new = [known[i] + known[j] for i, j in joined]
            before = len(phrases)
            phrases.update(dict.fromkeys(new))
            self.history.append(found._replace(merged=len(phrases) - before))
            if len(phrases) == before:
                break
            trie = _Trie(list(phrases), n)
        tokens = list(self._places)
        self._trie = trie
        self.phrases = [tuple(tokens[i] for i in phrase) for phrase in phrases]
        return self

    def _likely(self, pieces: Ids, ends: Ids) -> tuple[list[tuple[int, int]], Round]:
        """Return the pairs above γ, the likeliest first."""
        vocabulary = len(np.unique(pieces))
        inside = ends[:-1] == ends[1:]  # of one text
        left, right = pieces[:-1][inside], pieces[1:][inside]
        if not len(left):
            return [], Round(vocabulary, 0.0, 0)
        width = int(pieces.max()) + 1
        pairs, counts = np.unique(left * width + right, return_counts=True)
        totals = np.bincount(left, minlength=width)
        one, other = pairs // width, pairs % width
        a = self.smoothing
        likely = (counts + a) / (totals[one] + a * vocabulary)
        above = np.flatnonzero(likely > self.gamma)
        above = above[np.argsort(-likely[above], kind="stable")]
        joined = [(int(one[i]), int(other[i])) for i in above]
        return joined, Round(vocabulary, float(likely.max()), 0)

    def encode(self, text: Sequence[Hashable]) -> list[Piece]:
        """Return a text as pieces.

        Args:
            text: A list of tokens, or a string; tokens that were not seen are pieces of their own.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[Sequence[Hashable]]) -> list[list[Piece]]:
        """Return texts as pieces; all are matched at once.

        Args:
            texts: As for :meth:`fit`.

        Raises:
            ArgumentError: If ``texts`` is a single string.
        """
        rows = self._rows(texts)
        flat, ends = self._flat(rows)
        codes, places = self._trie.encode(flat, ends)
        n = len(self._places)
        tokens = list(itertools.chain.from_iterable(rows))
        found = [
            self.phrases[code - n] if code >= n else (tokens[place],)
            for code, place in zip(codes.tolist(), places.tolist(), strict=True)
        ]
        cuts = np.searchsorted(places, np.cumsum([0, *map(len, rows)])).tolist()
        return [found[begin:end] for begin, end in itertools.pairwise(cuts)]

    @staticmethod
    def decode(pieces: Iterable[Piece]) -> list[Hashable]:
        """Return the tokens of a text that was encoded."""
        return list(itertools.chain.from_iterable(pieces))

    @staticmethod
    def _rows(texts: Iterable[Sequence[Hashable]]) -> list[Sequence[Hashable]]:
        if isinstance(texts, str):
            raise ArgumentError(
                "`texts` must be a list of texts. Found one text; put it in brackets.",
                argument="texts",
            )
        return list(texts)

    def _flat(self, rows: Sequence[Sequence[Hashable]]) -> tuple[Ids, Ids]:
        """Return all texts behind each other, -1 for what is unknown, and each text's end."""
        get = self._places.get
        flat = [get(token, -1) for token in itertools.chain.from_iterable(rows)]
        lengths = np.array([*map(len, rows)], dtype=np.int64)
        return np.array(flat, dtype=np.int64), np.repeat(np.cumsum(lengths), lengths)

    def __repr__(self) -> str:
        return (
            f"RebalancedEncoding(gamma={self.gamma}, rounds={self.rounds}, "
            f"smoothing={self.smoothing}): {len(self.phrases)} phrases"
        )


class _Trie:
    """Phrases in flat arrays, matched at all places of a text at once.

    Args:
        phrases: Ids of tokens; phrase p has the code ``num_tokens`` + p.
        num_tokens: How many tokens there are.
    """

    def __init__(self, phrases: Sequence[tuple[int, ...]], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.depth = max(map(len, phrases), default=0)
        edges: dict[int, int] = {}
        codes = [-1]
        for number, phrase in enumerate(phrases):
            state = 0
            for token in phrase:
                state = edges.setdefault(state * num_tokens + token, len(codes))
                if state == len(codes):
                    codes.append(-1)
            codes[state] = num_tokens + number
        self._keys = np.array(sorted(edges), dtype=np.int64)
        self._states = np.array([edges[key] for key in self._keys.tolist()], dtype=np.int64)
        self._codes = np.array(codes, dtype=np.int64)

    def encode(self, flat: Ids, ends: Ids) -> tuple[Ids, Ids]:
        """Return the codes of the pieces, longest first from left to right, and where they begin.

        Args:
            flat: Ids of all texts; -1 matches nothing.
            ends: Where the text of each place ends.
        """
        codes, lengths = self._longest(flat, ends)
        begins = _reached(np.arange(len(flat)) + lengths, ends)
        return codes[begins], begins

    def _longest(self, flat: Ids, ends: Ids) -> tuple[Ids, Ids]:
        """Return, for each place, the code and length of the longest phrase that begins there."""
        codes, lengths = flat.copy(), np.ones_like(flat)
        alive, state = np.arange(len(flat)), np.zeros_like(flat)
        for depth in range(self.depth):
            place = alive + depth
            inside = place < ends[alive]
            alive, state, place = alive[inside], state[inside], place[inside]
            token = flat[place]
            wanted = state * self.num_tokens + token
            at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            goes_on = (self._keys[at] == wanted) & (token >= 0)
            alive, state = alive[goes_on], self._states[at[goes_on]]
            whole = self._codes[state] >= 0
            codes[alive[whole]] = self._codes[state[whole]]
            lengths[alive[whole]] = depth + 1
        return codes, lengths


def _reached(following: Any, ends: Ids) -> Ids:
    """Return the places that are reached from the beginnings of texts, by doubling jumps."""
    size = len(following)
    if not size:
        return np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate([[True], ends[1:] != ends[:-1]]))
    reached = np.zeros(size + 1, dtype=bool)
    reached[begins] = True
    jump = np.append(following, size)
    longest = int(np.diff(np.append(begins, size)).max())
    for _ in range(max(1, longest.bit_length())):
        reached[jump[reached]] = True
        jump = jump[jump]
    found: Ids = np.flatnonzero(reached[:size])
    return found
