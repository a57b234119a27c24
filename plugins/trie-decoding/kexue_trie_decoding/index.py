"""A database of token sequences as a prefix tree in flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue_trie_decoding import storage
from kexue_trie_decoding.building import Arrays, bits_of, flatten, grow
from kexue_trie_decoding.kernels import Array, Tree, expand, tensor, view
from kexue_trie_decoding.masking import check, masked, places
from kexue_trie_decoding.updating import merge, prune

__all__ = ["Edges", "TrieIndex"]

_AT_ONCE = 4096  # entries that are read in one go


class Edges(NamedTuple):
    """What may follow some nodes.

    Args:
        rows: Shape ``[edge]``: which node of the call an edge leaves, ascending.
        tokens: Shape ``[edge]``: its token, ascending within a row.
        nodes: Shape ``[edge]``: where it leads; -1 where nothing may follow any more.
    """

    rows: Tensor
    tokens: Tensor
    nodes: Tensor


class TrieIndex:
    """A prefix tree of token sequences, each ended by the end token; :meth:`build` makes one.

    Nodes are numbered level by level and siblings by token, node 0 is the root. Then edge e leads
    to node e + 1, and the whole tree is one sorted array, parent · 2**bits + token for each edge:
    8 bytes a node. What may follow a node is a range of it, and where a token leads is a search in
    it: a few kernels for a whole batch of nodes, on the index's device, and none per token.

    -1 stands for what is not in the tree. It, and a node that ends an entry, are left by the end
    token alone, so that a batch in which some rows are done needs no exception.

    Sequences that are prefixes of others are entries like any other; equal ones are one entry,
    which knows the rows they came from. A sequence may be empty; the database may not.

    Args:
        arrays: The tensors.
        levels: The first node of each level, and how many nodes there are.
        num_tokens: One more than the greatest id.
        end_id: The token that ends every entry.

    Example:
        >>> from kexue_trie_decoding import TrieIndex
        >>> index = TrieIndex.build([[5, 7], [5], [5, 8], [6]], end_id=0)
        >>> index.edges(index.walk([[5]])).tokens.tolist()
        [0, 7, 8]
        >>> len(index), [5, 8] in index, [8] in index
        (4, True, False)

    Reference: Su, Seq2Seq+前缀树, 2021, https://kexue.fm/archives/8802; De Cao et al.,
    Autoregressive Entity Retrieval, 2021, https://arxiv.org/abs/2010.00904.
    """

    def __init__(
        self, arrays: dict[str, Tensor], levels: Sequence[int], num_tokens: int, end_id: int
    ) -> None:
        self._arrays = arrays
        self._bits = bits_of(num_tokens)
        self._token = (1 << self._bits) - 1
        self.levels = tuple(levels)
        self.num_tokens = num_tokens
        self.end_id = end_id

    @classmethod
    def build(cls, sequences: Any, end_id: int) -> Self:
        """Build the tree of some sequences: seconds for a million of them.

        Args:
            sequences: Sequences of ids, 0 or more; or an array or tensor ``[sequence, time]``,
                right-padded with :data:`~kexue.core.component.PAD`. They may end with the end
                token or not.
            end_id: The token that ends every entry; the model's own end token.

        Raises:
            ArgumentError: If there is none, or an id is negative or no whole number, or the end
                token stands inside a sequence.
        """
        if not 0 <= end_id < 2**31:
            raise ArgumentError(
                f"`end_id` must be the id of a token, at least 0. Found {end_id}.",
                argument="end_id",
            )
        return cls._of(grow(flatten(sequences, end_id), end_id), end_id)

    @classmethod
    def _of(cls, grown: Arrays, end_id: int) -> Self:
        # the edge that -1 and ended entries are left by stands behind all others
        behind = (len(grown.keys) + 1 << bits_of(grown.num_tokens)) + end_id
        arrays = {
            "keys": torch.from_numpy(np.append(grown.keys, behind)),
            "leaves": torch.from_numpy(grown.leaves),
            "firsts": torch.from_numpy(grown.firsts),
            "rows": torch.from_numpy(grown.rows),
        }
        if max(len(grown.keys), len(grown.rows)) < 2**31 - 1:
            arrays |= {name: arrays[name].int() for name in ("leaves", "firsts", "rows")}
        return cls(arrays, grown.levels, grown.num_tokens, end_id)

    # -- updates -----------------------------------------------------------------------------------

    def add(self, sequences: Any) -> Self:
        """Return the index of more sequences: what :meth:`build` makes of the old and these.

        Rows are counted on: the first of these is row :attr:`num_rows`. A sequence that is an entry
        gives it one more row. This index, and a file that it is mapped from, stay as they are;
        :meth:`save` may write to the same file.

        Args:
            sequences: As for :meth:`build`; there may be none.

        Raises:
            ArgumentError: As for :meth:`build`.

        Example:
            >>> from kexue_trie_decoding import TrieIndex
            >>> index = TrieIndex.build([[5, 7], [5]], end_id=0)
            >>> more = index.add([[5, 8], [5]])
            >>> list(more), more.rows_of(int(more.find([[5]])[0]))
            ([[5], [5, 7], [5, 8]], [1, 3])
        """
        flat = flatten(sequences, self.end_id, may_be_none=True)
        if not len(flat.lengths):
            return self
        grown = merge(self._grown(), grow(flat, self.end_id))
        return self._of(grown, self.end_id).to(self.device)

    def remove(self, sequences: Any) -> Self:
        """Return the index without some entries: what :meth:`build` makes of the other sequences.

        An entry goes with all its rows, and the rows that are left move up, as in the list that it
        was built of. Sequences that begin with a removed one stay.

        Args:
            sequences: Entries, as for :meth:`build`; there may be none, and equal ones.

        Raises:
            ArgumentError: If one is no entry, or no entry would be left.

        Example:
            >>> from kexue_trie_decoding import TrieIndex
            >>> index = TrieIndex.build([[5, 7], [5], [6]], end_id=0)
            >>> list(index.remove([[5]]))
            [[6], [5, 7]]
        """
        flat = flatten(sequences, self.end_id, may_be_none=True)
        found = self.find(torch.from_numpy(flat.padded())).cpu().numpy()
        unknown = np.flatnonzero(found < 0)
        if len(unknown):
            raise ArgumentError(
                f"`sequences` must be entries of the index. Sequence {unknown[0]} is none. "
                f"`index.find` tells which are.",
                argument="sequences",
            )
        entries = np.unique(found)
        if len(entries) == len(self):
            raise ArgumentError(
                f"`sequences` must leave at least one of the {len(self)} entries: nothing can be "
                f"decoded from an empty database.",
                argument="sequences",
            )
        if not len(entries):
            return self
        return self._of(prune(self._grown(), entries, self.end_id), self.end_id).to(self.device)

    def _grown(self) -> Arrays:
        host = {name: array.cpu().numpy() for name, array in self._arrays.items()}
        keys = host.pop("keys")[:-1]
        wide = {name: array.astype(np.int64) for name, array in host.items()}
        return Arrays(keys, self.num_tokens, list(self.levels), **wide)

    # -- what it holds -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return how many different entries there are."""
        return len(self._arrays["leaves"])

    def __contains__(self, sequence: Sequence[int]) -> bool:
        """Whether a sequence, with or without the end token, is an entry."""
        return bool(self.find([sequence])[0] >= 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the entries by length, then by tokens, without the end token."""
        for begin in range(0, len(self), _AT_ONCE):
            entries = torch.arange(begin, min(begin + _AT_ONCE, len(self)), device=self.device)
            for row in self.sequences(entries).tolist():
                yield [i for i in row if i not in {PAD, self.end_id}]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} entries, {self.num_nodes} nodes, "
            f"{self.nbytes / 1e6:.3g} MB, device {str(self.device)!r})"
        )

    @cached_property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self._keys.device

    @property
    def num_nodes(self) -> int:
        """How many nodes there are, root and ends included."""
        return self.levels[-1]

    @property
    def num_rows(self) -> int:
        """How many sequences it was built of."""
        return len(self._arrays["rows"])

    @property
    def max_length(self) -> int:
        """How many tokens the longest entry has, the end token included."""
        return len(self.levels) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: 8 a node, and 8 to 12 a sequence to find the rows of an entry."""
        return sum(array.nbytes for array in self._arrays.values())

    def to(self, device: torch.device | str) -> Self:
        """Return the index on another device; itself if it is there."""
        if torch.device(device) == self.device:
            return self
        moved = {name: array.to(device) for name, array in self._arrays.items()}
        return type(self)(moved, self.levels, self.num_tokens, self.end_id)

    @property
    def _keys(self) -> Tensor:
        return self._arrays["keys"]

    @cached_property
    def tree(self) -> Tree:
        """The edges, for the arithmetic of ``kernels``."""
        return Tree(view(self._keys), self._bits)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived: a copy of a view would be no view."""
        return {name: value for name, value in self.__dict__.items() if name != "tree"}

    # -- a batch of nodes --------------------------------------------------------------------------

    def edges(self, nodes: Int[Tensor, " row"]) -> Edges:
        """Return all edges that leave some nodes: one gather of as many numbers as there are.

        Args:
            nodes: Nodes, or -1.
        """
        edge, rows = expand(*self.tree.span(view(nodes)))
        # the last edge, by which ended rows go on, leads nowhere
        after = (edge + 2) * (edge < len(self._keys) - 1) - 1
        return Edges(tensor(rows), tensor(self.tree.tokens(edge)), tensor(after))

    def advance(
        self, nodes: Int[Tensor, " row"], tokens: Int[Tensor, " row"]
    ) -> Int[Tensor, " row"]:
        """Return where a token leads; -1 if it may not follow.

        Args:
            nodes: Nodes, or -1.
            tokens: A token for each.
        """
        return tensor(self.tree.follow(view(nodes), view(tokens)))

    def allowed(self, nodes: Int[Tensor, " row"], num_tokens: int) -> Bool[Tensor, "row token"]:
        """Return which tokens may follow some nodes.

        Args:
            nodes: Nodes, or -1.
            num_tokens: Size of the vocabulary.
        """
        flat = places(self.tree, *self.tree.span(view(nodes)), num_tokens)
        table = torch.zeros(len(nodes), num_tokens, dtype=torch.bool, device=nodes.device)
        table.view(-1).index_fill_(0, tensor(flat), True)
        return table

    def mask(
        self, logits: Float[Tensor, "row token"], nodes: Int[Tensor, " row"]
    ) -> Float[Tensor, "row token"]:
        """Return logits with -inf at every token that may not follow.

        A row is never without a candidate: where the model gives none of the allowed tokens any
        probability, or NaN, all of them are 0.

        Args:
            logits: Scores of all tokens.
            nodes: Where each row is.

        Raises:
            ArgumentError: If the shapes do not fit, or the vocabulary is too small for the index.
        """
        return self.masked(logits, view(nodes))

    def masked(self, logits: Tensor, nodes: Array) -> Tensor:
        """Return what :meth:`mask` does, of nodes as :func:`~kernels.view` gives them."""
        self.check_logits(logits, len(nodes))
        return masked(logits, self.tree, nodes)

    def check_logits(self, logits: Tensor, rows: int) -> None:
        """Refuse logits that are not those of so many nodes.

        Raises:
            ArgumentError: If the shapes do not fit, or the vocabulary is too small for the index.
        """
        check(logits, rows, self.num_tokens)

    def walk(self, prefixes: Any) -> Int[Tensor, " row"]:
        """Return the node of each prefix; -1 if no entry begins with it.

        Args:
            prefixes: Sequences of ids; or a tensor ``[row, time]``, right-padded with
                :data:`~kexue.core.component.PAD`.
        """
        ids = prefixes if isinstance(prefixes, Tensor) else _padded(prefixes)
        ids = ids.to(self.device)
        nodes = torch.zeros(len(ids), dtype=torch.int64, device=self.device)
        for token in ids.unbind(1):
            nodes = torch.where(token == PAD, nodes, self.advance(nodes, token))
        return nodes

    # -- entries -----------------------------------------------------------------------------------

    def find(self, sequences: Any) -> Int[Tensor, " row"]:
        """Return the number of the entry that each sequence is; -1 if it is none.

        Entries are numbered by length, then by tokens.

        Args:
            sequences: As for :meth:`walk`, with or without the end token.
        """
        nodes = self.walk(sequences)
        ended = self.advance(nodes, torch.full_like(nodes, self.end_id))
        leaves = self._arrays["leaves"]
        node = torch.where(ended >= 0, ended, nodes).to(leaves.dtype)
        place = torch.searchsorted(leaves, node).clamp_(max=len(leaves) - 1)
        return torch.where(leaves[place] == node, place, -1)

    def rows_of(self, entry: int) -> list[int]:
        """Return which of the sequences it was built of an entry is: several if they are equal.

        Args:
            entry: The number of an entry, from :meth:`find`.
        """
        begin, end = self._arrays["firsts"][entry : entry + 2].tolist()
        found: list[int] = self._arrays["rows"][begin:end].tolist()
        return found

    def below(self, node: int) -> Int[Tensor, " entry"]:
        """Return the numbers of the entries that begin like a node.

        Args:
            node: A node; 0 for all entries.
        """
        leaves = self._arrays["leaves"]
        low, high, found = node, node + 1, [torch.zeros(0, dtype=torch.int64, device=self.device)]
        while 0 <= low < high:  # what is below a node is a range of each level
            span = torch.tensor([low, high], device=self.device)
            begin, end = torch.searchsorted(leaves, span.to(leaves.dtype)).tolist()
            found.append(torch.arange(begin, end, device=self.device))
            low, high = (torch.searchsorted(self._keys[:-1], span << self._bits) + 1).tolist()
        return torch.cat(found)

    def sequences(self, entries: Int[Tensor, " entry"]) -> Int[Tensor, "entry time"]:
        """Return entries as tokens, end token included, right-padded.

        Args:
            entries: Their numbers, from 0 to ``len(index) - 1``.
        """
        node = self._arrays["leaves"][entries].long()
        levels = torch.tensor(self.levels, device=self.device)
        depth = torch.searchsorted(levels, node, right=True) - 1
        longest = int(depth.max()) if len(depth) else 0
        found = torch.full((len(node), longest), PAD, device=self.device)
        for level in range(longest, 0, -1):
            inside = depth >= level
            edge = node[inside] - 1
            found[inside, level - 1] = self._keys[edge] & self._token
            node[inside] = self._keys[edge] >> self._bits
        return found

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the index to a safetensors file.

        Args:
            path: The file, which appears when it is whole.
        """
        numbers = {"end_id": self.end_id, "num_tokens": self.num_tokens, "levels": self.levels}
        storage.save(path, self._arrays, numbers)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Map a file that :meth:`save` wrote into memory: what is not used is not read.

        Args:
            path: The file.

        Raises:
            FileFormatError: If it is no such file.
        """
        arrays, numbers = storage.load(path)
        return cls(arrays, **numbers)


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    rows = [torch.as_tensor(list(row), dtype=torch.int64) for row in sequences]
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
