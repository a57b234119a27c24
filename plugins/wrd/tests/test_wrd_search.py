"""Search finds what a full comparison finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kexue_wrd.index
import kexue_wrd.pairs
from kexue_wrd import wmd, wrd
from kexue_wrd.bags import Bags
from kexue_wrd.geometry import MOVER, ROTATOR, Geometry
from kexue_wrd.index import TransportIndex
from kexue_wrd.pairs import Sinkhorn, paired_distances

geometries = pytest.mark.parametrize("geometry", [MOVER, ROTATOR], ids=["wmd", "wrd"])
VOCABULARY = 30


def vectors(seed: int, features: int = 6) -> Tensor:
    """Vectors of which some are equal, and one is 0."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(VOCABULARY, features, generator=generator, dtype=torch.float64)
    found[3], found[7] = found[4], 0.0
    return found


def bags(geometry: Geometry, of: Tensor, count: int, seed: int, longest: int = 8) -> Bags:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, VOCABULARY, rng.integers(0, longest + 1)) for _ in range(count)]
    return Bags.count([t.tolist() for t in texts], geometry.place(of)[1].numpy())


@geometries
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    queries=st.integers(0, 4),
    documents=st.integers(1, 40),
    k=st.integers(1, 12),
    chunk=st.sampled_from([1, 4, 128]),
    entries=st.sampled_from([1, 300, 2**24]),
    seed=st.integers(0, 999),
)
def test_finds_the_neighbours_of_a_full_comparison(  # noqa: PLR0917
    geometry: Geometry, queries: int, documents: int, k: int, chunk: int, entries: int, seed: int
) -> None:
    k, of = min(k, documents), vectors(seed)
    index = TransportIndex(geometry, of, bags(geometry, of, documents, seed))
    asked = bags(geometry, of, queries, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kexue_wrd.index, "_CHUNK", chunk)
        patch.setattr(kexue_wrd.index, "_ENTRIES", entries)
        found = index.search(asked, k)
        table, errors = index.distances(asked)
    assert found.solved <= queries * documents
    assert not errors.any()
    ordered = table.sort(dim=1, stable=True)
    torch.testing.assert_close(found.distances, ordered.values[:, :k], rtol=0, atol=1e-10)
    torch.testing.assert_close(table.gather(1, found.indices), found.distances, rtol=0, atol=1e-10)
    for row in found.indices.tolist():
        assert len(set(row)) == k


@geometries
def test_equally_near_ones_come_by_their_place(geometry: Geometry) -> None:
    of = vectors(0)
    texts = [[0, 1], [2, 5], [1, 0], [0, 1], [9]]
    weights = geometry.place(of)[1].numpy()
    index = TransportIndex(geometry, of, Bags.count(texts, weights))
    found = index.search(Bags.count([[1, 0]], weights), 3)
    assert found.indices.tolist() == [[0, 2, 3]]
    assert found.distances.tolist() == [[0, 0, 0]]


@geometries
def test_solves_a_small_share(geometry: Geometry) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 1, 8, generator=generator, dtype=torch.float64) * 3
    of = (centres + torch.randn(20, 10, 8, generator=generator, dtype=torch.float64)).view(200, 8)
    rng = np.random.default_rng(0)
    texts = [10 * rng.integers(20) + rng.integers(0, 10, 7) for _ in range(600)]
    weights = geometry.place(of)[1].numpy()
    held, asked = (Bags.count([t.tolist() for t in part], weights) for part in (texts, texts[:20]))
    found = TransportIndex(geometry, of, held).search(asked, 5)
    assert found.solved < 0.1 * 20 * 600
    assert found.distances[:, 0].tolist() == [0.0] * 20


@geometries
def test_bounds_are_below_and_the_sharper_ones_between(geometry: Geometry) -> None:
    of = vectors(1)
    corpus, asked = (bags(geometry, of, n, s) for n, s in ((50, 2), (10, 3)))
    index = TransportIndex(geometry, of, corpus)
    exact, _ = index.distances(asked)
    centroid, relaxed = index.bounds(asked)
    filled = torch.from_numpy(asked.sizes > 0)
    assert (centroid <= exact + 1e-9)[filled].all()
    assert (relaxed <= exact + 1e-9)[filled].all()
    docs = np.flatnonzero(corpus.sizes)
    gained = []
    for block in index._blocks(asked):
        for i in np.flatnonzero(asked.sizes).tolist():
            sharper = index._sharpened(kexue_wrd.index._query(block, i), docs)
            assert (sharper <= exact[i, docs].numpy() + 1e-9).all()
            assert (sharper >= relaxed[i, docs].numpy() - 1e-9).all()
            gained += (sharper - relaxed[i, docs].numpy()).tolist()
    assert max(gained) > 0.05


@pytest.mark.parametrize(("geometry", "distance"), [(MOVER, wmd), (ROTATOR, wrd)])
def test_pairs_and_tables_are_the_distances_of_vectors(
    geometry: Geometry, distance: object
) -> None:
    of = vectors(4)
    a, b = bags(geometry, of, 12, 5), bags(geometry, of, 12, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kexue_wrd.pairs, "_ENTRIES", 100)
        pairs, errors = paired_distances(geometry, of, a, b)
    table, _ = TransportIndex(geometry, of, b).distances(a)
    torch.testing.assert_close(pairs, table.diagonal())
    assert not errors.any()
    weights = geometry.place(of)[1]
    for i in range(12):
        (x, p), (y, q) = a[i], b[i]
        if not len(x) or not len(y):
            assert pairs[i] == torch.inf
            continue
        counts = [torch.from_numpy(m) / weights[w] for w, m in ((x, p), (y, q))]
        expected = distance(of[x], of[y], x_counts=counts[0], y_counts=counts[1])  # type: ignore[operator]
        torch.testing.assert_close(pairs[i], expected)


@geometries
def test_sinkhorn_is_as_near_as_it_says(geometry: Geometry) -> None:
    of = vectors(5)
    a, b = bags(geometry, of, 9, 5), bags(geometry, of, 9, 6)
    index = TransportIndex(geometry, of, b)
    exact, _ = index.distances(a)
    near, errors = index.distances(a, Sinkhorn())
    pairs, _ = paired_distances(geometry, of, a, b, Sinkhorn())
    finite = exact.isfinite()
    assert torch.equal(finite, near.isfinite())
    assert (near >= exact - 1e-9)[finite].all()
    assert (near - errors <= exact + 1e-9)[finite].all()
    assert float(errors.max()) < 0.2
    torch.testing.assert_close(pairs, near.diagonal(), rtol=0.05, atol=0.01)


def test_an_empty_corpus_and_no_queries() -> None:
    of = vectors(0)
    weights = np.ones(VOCABULARY)
    none, some = Bags.count([], weights), Bags.count([[1, 2], []], weights)
    assert TransportIndex(MOVER, of, none).search(some, 0).indices.shape == (2, 0)
    assert TransportIndex(MOVER, of, some).search(none, 2).indices.shape == (0, 2)
    assert TransportIndex(MOVER, of, some).distances(none)[0].shape == (0, 2)
    assert TransportIndex(MOVER, of, some).bounds(none)[0].shape == (0, 2)


def test_bags_reduce_each_bag() -> None:
    weights = np.array([1.0, 2.0, 0.0, 1.0])
    held = Bags.count([[1, 0, 0], [], [2, 2], [3, 3, 1, 2]], weights)
    assert held.sizes.tolist() == [2, 0, 0, 2]
    assert held.masses.tolist() == [0.5, 0.5, 0.5, 0.5]
    table = torch.tensor([[1.0, 10.0], [3.0, 5.0], [-9.0, -9.0], [0.0, 7.0]], dtype=torch.float64)
    inf = torch.inf
    assert held.least(table).tolist() == [[1, 5], [inf, inf], [inf, inf], [0, 5]]
    assert held.mean(table).tolist() == [[2, 7.5], [0, 0], [0, 0], [1.5, 6]]
    assert held.part(2, 4).mean(table).tolist() == [[0, 0], [1.5, 6]]
    words, masses = held.padded(np.array([3, 1]))
    assert words.tolist() == [[1, 3], [0, 0]]
    assert masses.tolist() == [[0.5, 0.5], [0, 0]]
