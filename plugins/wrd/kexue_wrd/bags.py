"""Texts as bags: the different words of each, with their masses, one text after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Bags"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Bags:
    """Bags of words in compressed rows.

    Args:
        words: Shape ``[entry]``: the words of the first bag, in ascending order, then the next's.
        masses: Shape ``[entry]``: positive, 1 in sum over a bag.
        sizes: Shape ``[bag]``: how many words each has; 0 for an empty one.
        device: Where :meth:`least` and :meth:`mean` work.
    """

    def __init__(
        self, words: Ints, masses: Floats, sizes: Ints, device: torch.device | None = None
    ) -> None:
        self.words, self.masses, self.sizes = words, masses, sizes
        self.starts: Ints = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.device = device

    @classmethod
    def count(
        cls, texts: Sequence[Sequence[int]], weights: Floats, device: torch.device | None = None
    ) -> Bags:
        """Count the words of texts.

        Args:
            texts: The words of each.
            weights: Shape ``[word]``: what one occurrence weighs; words that weigh 0 are left out.
            device: Where to work.
        """
        bags = [np.unique(np.asarray(text, dtype=np.int64), return_counts=True) for text in texts]
        words = [ids[weights[ids] > 0] for ids, _ in bags]
        masses = [(weights[ids] * counts)[weights[ids] > 0] for ids, counts in bags]
        return cls(
            np.concatenate([*words, np.zeros(0, dtype=np.int64)]),
            np.concatenate([*(m / m.sum() if len(m) else m for m in masses), np.zeros(0)]),
            np.array([len(ids) for ids in words], dtype=np.int64),
            device,
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> tuple[Ints, Floats]:
        """Return the words and masses of one bag."""
        part = slice(self.starts[i], self.starts[i] + self.sizes[i])
        return self.words[part], self.masses[part]

    def part(self, begin: int, end: int) -> Bags:
        """Return the bags from ``begin`` to before ``end``."""
        sizes = self.sizes[begin:end]
        start = int(self.starts[begin]) if len(sizes) else 0
        entries = slice(start, start + int(sizes.sum()))
        return Bags(self.words[entries], self.masses[entries], sizes, self.device)

    def renumbered(self) -> tuple[Ints, Bags]:
        """Return the words that occur, ascending, and the bags with their places in it."""
        words, places = np.unique(self.words, return_inverse=True)
        return words, Bags(places.astype(np.int64), self.masses, self.sizes, self.device)

    def padded(self, bags: Ints) -> tuple[Tensor, Tensor]:
        """Return words and masses of some bags, ``[bag, words]``; padding is word 0 of mass 0."""
        at = np.arange(int(self.sizes[bags].max(initial=0)))
        inside = at < self.sizes[bags][:, None]
        entries = np.where(inside, self.starts[bags][:, None] + at, 0)
        words = np.where(inside, self.words[entries], 0)
        masses = np.where(inside, self.masses[entries], 0.0)
        return torch.from_numpy(words).to(self.device), torch.from_numpy(masses).to(self.device)

    def least(self, table: Tensor) -> Tensor:
        """Return the least entry over the words of each bag, ``[bag, column]``; inf if empty.

        Args:
            table: Shape ``[word, column]``.
        """
        found = table.new_full((len(self), table.shape[1]), torch.inf)
        for rows, words, _ in self._layers:
            torch.minimum(found[:rows], table[words], out=found[:rows])
        return found[self._back]

    def mean(self, table: Tensor) -> Tensor:
        """Return the mean by mass over the words of each bag, ``[bag, column]``; 0 if empty.

        Args:
            table: Shape ``[word, column]``.
        """
        found = table.new_zeros(len(self), table.shape[1])
        for rows, words, masses in self._layers:
            found[:rows].addcmul_(table[words], masses[:, None])
        return found[self._back]

    @property
    def _back(self) -> Tensor:
        return self._sorted[1]

    @cached_property
    def _sorted(self) -> tuple[Ints, Tensor]:
        """The bags from the longest to the shortest, and where each then is."""
        order = np.argsort(-self.sizes, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return order, torch.from_numpy(back).to(self.device)

    @property
    def _layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the first word of all bags, the second of all that have one, and so on."""
        starts, sizes = self.starts[self._sorted[0]], self.sizes[self._sorted[0]]
        words = torch.from_numpy(self.words).to(self.device)
        masses = torch.from_numpy(self.masses).to(self.device)
        for layer in range(int(sizes.max(initial=0))):
            rows = int(np.searchsorted(-sizes, -layer))  # those with more than `layer` words
            entries = torch.from_numpy(starts[:rows] + layer).to(self.device)
            yield rows, words[entries], masses[entries]
