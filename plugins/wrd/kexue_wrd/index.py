"""Exact distances and nearest neighbours in a corpus, with as few transport problems as it takes.

For a block of queries the costs of their words to the corpus's words are one matrix product, and
the bounds of all pairs are minima and means over it. Candidates are taken by bound (prefetch and
prune, Kusner et al. 2015, section 4); the bound of the next few is sharpened by a pair of feasible
potentials, and only what may still be among the nearest is solved.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue_wrd.bags import Bags
from kexue_wrd.geometry import Geometry
from kexue_wrd.pairs import Sinkhorn, chunks
from kexue_wrd.transport import optimal_cost

__all__ = ["Found", "TransportIndex"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ENTRIES = 2**24
"""How many numbers the table and the bounds of a block of queries hold: 128 MB each."""

_CHUNK = 128
"""How many candidates have their bound sharpened at once."""

_SLACK = 1e-9
"""What rounding may do to a bound, as a share of the largest cost."""


class Found(NamedTuple):
    """Neighbours, the nearest first; equally near ones by their place in the corpus.

    Args:
        distances: Shape ``[query, k]``, float64.
        indices: Shape ``[query, k]``, int64.
        solved: How many transport problems were solved.
    """

    distances: Tensor
    indices: Tensor
    solved: int


class _Block(NamedTuple):
    """Some queries beside the corpus.

    Args:
        begin: The place of the first.
        bags: The queries, in words of the block.
        points: Shape ``[word of the block, feature]``.
        table: Shape ``[word of the block, word of the corpus]``: the costs.
        host: The same, where the solvers work.
    """

    begin: int
    bags: Bags
    points: Tensor
    table: Tensor
    host: Floats


class _Query(NamedTuple):
    """A query beside the corpus.

    Args:
        masses: Shape ``[n]``.
        table: Shape ``[n, word of the corpus]``: the costs.
        host: The same, where the solvers work.
    """

    masses: Floats
    table: Tensor
    host: Floats


class TransportIndex:
    """A corpus of bags of words, prepared for distances to it.

    Args:
        geometry: Which distance.
        vectors: Shape ``[word, feature]``, float64, on the device to work on.
        corpus: The bags.
    """

    def __init__(self, geometry: Geometry, vectors: Tensor, corpus: Bags) -> None:
        self.geometry = geometry
        self.points, weights = geometry.place(vectors)
        self.weights: Floats = weights.cpu().numpy()
        used, self.corpus = corpus.renumbered()
        self.places = self.points[torch.from_numpy(used).to(vectors.device)]
        self.centroids = self.corpus.mean(self.places)

    # -- all pairs ---------------------------------------------------------------------------------

    def distances(
        self, queries: Bags, approximation: Sinkhorn | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the distances ``[query, corpus]`` and how wrong each can be, float64.

        A pair with an empty bag has the distance infinity.

        Args:
            queries: What to compare, in the numbering of ``vectors``.
            approximation: Sinkhorn instead of the exact solvers, whose errors are 0.
        """
        found = torch.full((len(queries), len(self.corpus)), torch.inf, dtype=torch.float64)
        errors = torch.zeros_like(found)
        filled: Ints = np.flatnonzero(self.corpus.sizes)
        for block in self._blocks(queries):
            for i in np.flatnonzero(block.bags.sizes).tolist():
                query, row = _query(block, i), block.begin + i
                if approximation is None:
                    exact = [self._solve(query, j) for j in filled.tolist()]
                    found[row, filled] = torch.tensor(exact, dtype=torch.float64)
                else:
                    found[row, filled], errors[row, filled] = self._approximate(
                        query, filled, approximation
                    )
        return found, errors

    def _approximate(self, query: _Query, docs: Ints, how: Sinkhorn) -> tuple[Tensor, Tensor]:
        """Return Sinkhorn's cost of a query with some documents, and its error."""
        cost = torch.full((len(docs),), torch.inf, dtype=torch.float64)
        error = torch.zeros_like(cost)
        at = np.argsort(self.corpus.sizes[docs], kind="stable")
        by_size = docs[at]
        for part in chunks(np.full(len(docs), len(query.masses)), self.corpus.sizes[by_size]):
            words, q = self.corpus.padded(by_size[part])
            p = torch.from_numpy(query.masses).to(q).expand(len(q), -1)
            cost[at[part]], error[at[part]] = how(p, q, query.table[:, words].transpose(0, 1))
        return cost, error

    # -- nearest neighbours ------------------------------------------------------------------------

    def search(self, queries: Bags, k: int) -> Found:
        """Return the ``k`` nearest bags of the corpus for each query: those of a full comparison.

        Args:
            queries: What to look for, in the numbering of ``vectors``.
            k: How many; at most the size of the corpus.
        """
        distances = np.full((len(queries), k), np.inf)
        indices = np.zeros((len(queries), k), dtype=np.int64)
        solved = 0
        for block in self._blocks(queries):
            bounds = torch.maximum(*self._bounds(block)).cpu().numpy()
            for i, size in enumerate(block.bags.sizes):
                near: list[tuple[float, int]] = []
                if size:
                    near, count = self._nearest(_query(block, i), bounds[i], k)
                    solved += count
                taken = {doc for _, doc in near}
                rest = (doc for doc in range(len(self.corpus)) if doc not in taken)
                near += [(np.inf, next(rest)) for _ in range(k - len(near))]
                distances[block.begin + i] = [distance for distance, _ in near]
                indices[block.begin + i] = [doc for _, doc in near]
        return Found(torch.from_numpy(distances), torch.from_numpy(indices), solved)

    def _nearest(self, query: _Query, bound: Floats, k: int) -> tuple[list[tuple[float, int]], int]:
        """Return up to ``k`` pairs of distance and document, and how many were solved."""
        order = np.argsort(bound, kind="stable")
        order = order[: np.searchsorted(bound[order], np.inf)]
        slack = _SLACK * float(query.host.max(initial=0))
        heap: list[tuple[float, int]] = []  # negative, so that the worst is the first
        solved = 0
        for begin in range(0, len(order), _CHUNK):
            chunk = order[begin : begin + _CHUNK]
            reach = -heap[0][0] + slack if len(heap) == k else np.inf
            chunk = chunk[bound[chunk] <= reach]
            if not len(chunk):
                break
            sharper = np.maximum(self._sharpened(query, chunk), bound[chunk])
            for at in np.argsort(sharper, kind="stable"):
                if len(heap) == k and sharper[at] > -heap[0][0] + slack:
                    break
                doc = int(chunk[at])
                solved += 1
                candidate = (-self._solve(query, doc), -doc)
                if len(heap) < k:
                    heapq.heappush(heap, candidate)
                else:
                    heapq.heappushpop(heap, candidate)
        return [(-d, -doc) for d, doc in sorted(heap, reverse=True)], solved

    def bounds(self, queries: Bags) -> tuple[Tensor, Tensor]:
        """Return the bounds by centroids and the relaxed ones, both ``[query, corpus]``, float64.

        Args:
            queries: In the numbering of ``vectors``.
        """
        found = [self._bounds(block) for block in self._blocks(queries)]
        empty = torch.zeros(0, len(self.corpus), dtype=torch.float64)
        centroid, relaxed = ([pair[n].cpu() for pair in found] for n in (0, 1))
        return torch.cat([empty, *centroid]), torch.cat([empty, *relaxed])

    def _bounds(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Return both bounds of all pairs of a block, infinite for an empty document."""
        centroids = block.bags.mean(block.points)
        centroid = self.geometry.cost(centroids, self.centroids)
        empty = torch.from_numpy(self.corpus.sizes == 0).to(centroid.device)
        nearest_here = self.corpus.least(block.table.T)  # [document, word of the block]
        nearest_there = block.bags.least(block.table)  # [query, word of the corpus]
        relaxed = torch.maximum(
            block.bags.mean(nearest_here.T), self.corpus.mean(nearest_there.T).T
        )
        return centroid.masked_fill(empty, torch.inf), relaxed.masked_fill(empty, torch.inf)

    def _sharpened(self, query: _Query, docs: Ints) -> Floats:
        """Return bounds of some documents by feasible potentials, at least the relaxed ones.

        Potentials f_i = min_j cost_ij, g_j = min_i (cost_ij - f_i) >= 0 are feasible, so that
        sum p f + sum q g is a bound; the same with the sides exchanged.
        """
        words, q = self.corpus.padded(docs)
        p = torch.from_numpy(query.masses).to(q)
        cost = query.table[:, words].masked_fill(q == 0, torch.inf)  # [n, document, m]
        f = cost.amin(2)
        g = (cost - f[:, :, None]).amin(0).masked_fill(q == 0, 0)
        from_query = p @ f + (q * g).sum(1)
        g = cost.amin(0).masked_fill(q == 0, 0)
        f = (cost - g).amin(2)
        bound: Floats = torch.maximum(from_query, p @ f + (q * g).sum(1)).cpu().numpy()
        return bound

    def _solve(self, query: _Query, doc: int) -> float:
        words, masses = self.corpus[doc]
        return optimal_cost(query.masses, masses, query.host.take(words, axis=1))

    def _blocks(self, queries: Bags) -> Iterator[_Block]:
        """Yield the queries in blocks whose tables fit, one query at least."""
        width = max(len(self.places), len(self.corpus), 1)
        begin = 0
        while begin < len(queries):
            end, words = begin, 0
            while end < len(queries):
                words += int(queries.sizes[end])  # at most; many occur in several queries
                if end > begin and (max(words, end + 1 - begin) * width > _ENTRIES):
                    break
                end += 1
            used, bags = queries.part(begin, end).renumbered()
            points = self.points[torch.from_numpy(used).to(self.points.device)]
            table = self.geometry.cost(points, self.places)
            yield _Block(begin, bags, points, table, table.cpu().numpy())
            begin = end


def _query(block: _Block, i: int) -> _Query:
    words, masses = block.bags[i]
    return _Query(masses, block.table[torch.from_numpy(words)], block.host[words])
