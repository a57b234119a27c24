"""Word mover's and word rotator's distance beside gensim and POT.

Peers: gensim's ``WmdSimilarity`` (``pip install --no-deps gensim smart_open``; WMD only, on unit
vectors) and a loop over POT's ``ot.emd2`` with the costs that the plugin computes. Both solve every
pair of a search, so that their time is that of a pair times the number of pairs: they are timed on
a few hundred documents for a query of each block of ours, and scaled to all. Ours is timed whole.
Distances are compared with the peer's before the clock starts.

Floor: a search must read the costs of a query's words to those of the corpus's words once per
document's word, some million numbers, and solve k problems of some ten microseconds each: about
2 ms a query on 10 000 documents. Ours takes more than ten times that: half in the bounds, which
are three passes through memory, half in sharpening some hundred of them per query and in the three
problems per neighbour that they cannot exclude.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ot  # type: ignore[import-untyped]
import torch
from harness import Row, compare

from kexue_wrd import WordMoverSimilarity, WordRotatorSimilarity, WordVectors, fit_vectors
from kexue_wrd.similarity import TransportSimilarity
from kexue_wrd.tokens import tokenizer
from kexue_wrd.transport import optimal_cost

__all__ = ["rows"]

NEIGHBOURS = 10
Texts = list[list[str]]
Peer = Callable[[Sequence[str], Texts], list[float]]
"""A query and documents to its distances."""


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: A smaller corpus, and fewer pairs.
    """
    queries, documents, blocks = (50, 1000, 5) if quick else (1000, 10_000, 10)
    corpus, asked, vectors = _data(documents, queries)
    for similarity, name, peer in _peers(vectors):
        yield _search(similarity, name, peer, corpus, asked, blocks)
    for words in (8, 16, 32):
        yield _one_problem(words, pairs=5 if quick else 15)


def _data(documents: int, queries: int) -> tuple[Texts, Texts, WordVectors]:
    """Return pieces of 5 to 29 words of CPython's reference text, and vectors of its words."""
    from pydoc_data.topics import topics

    texts = [[w.lower() for w in tokenizer("words")(topics[name])] for name in sorted(topics)]
    words = [word for text in texts for word in text]
    rng = np.random.default_rng(0)
    begins = rng.integers(0, len(words) - 30, documents + queries)
    pieces = [words[b : b + int(rng.integers(5, 30))] for b in begins]
    found = fit_vectors(texts)
    return (
        pieces[:documents],
        pieces[documents:],
        WordVectors(found.words, found.vectors.float()),
    )


# -- search ----------------------------------------------------------------------------------------


def _peers(vectors: WordVectors) -> Iterator[tuple[TransportSimilarity, str, Peer]]:
    unit = WordMoverSimilarity(vectors, normalize=True)
    gensim = _gensim(vectors)
    if gensim is not None:
        yield unit, "gensim WmdSimilarity, scaled", gensim
    yield unit, "POT loop, scaled", partial(_pot_wmd, vectors)
    yield WordRotatorSimilarity(vectors), "POT loop, scaled", partial(_pot_wrd, vectors)


def _gensim(vectors: WordVectors) -> Peer | None:
    try:
        from gensim.models import KeyedVectors  # type: ignore[import-untyped]
        from gensim.similarities import WmdSimilarity  # type: ignore[import-untyped]
    except ImportError:
        print(
            "wrd: gensim is not installed, its row is left out. "
            "Run `pip install --no-deps gensim smart_open`.",
            file=sys.stderr,
        )
        return None
    keyed = KeyedVectors(vectors.vectors.shape[1])
    keyed.add_vectors(vectors.words, vectors.vectors.numpy())
    keyed.fill_norms()

    def distances(query: Sequence[str], documents: Texts) -> list[float]:
        similarities = WmdSimilarity(documents, keyed)[list(query)]
        return [1 / s - 1 for s in similarities]

    return distances


def _rows_of(vectors: WordVectors, words: Sequence[str]) -> tuple[Any, Any]:
    """Return the vectors of the different words of a text, and how often each occurs."""
    places = [p for word in words if (p := vectors.place(word)) is not None]
    unique, counts = np.unique(places, return_counts=True)
    return vectors.vectors.numpy()[unique].astype(np.float64), counts


def _pot_wmd(vectors: WordVectors, query: Sequence[str], documents: Texts) -> list[float]:
    x, p = _rows_of(vectors, query)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = []
    for document in documents:
        y, q = _rows_of(vectors, document)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        found.append(float(ot.emd2(p / p.sum(), q / q.sum(), ot.dist(x, y, "euclidean"))))
    return found


def _pot_wrd(vectors: WordVectors, query: Sequence[str], documents: Texts) -> list[float]:
    x, p = _rows_of(vectors, query)
    norms = np.linalg.norm(x, axis=1)
    x, p = x / norms[:, None], p * norms
    found = []
    for document in documents:
        y, q = _rows_of(vectors, document)
        norms = np.linalg.norm(y, axis=1)
        y, q = y / norms[:, None], q * norms
        found.append(float(ot.emd2(p / p.sum(), q / q.sum(), 1 - x @ y.T)))
    return found


def _search(  # noqa: PLR0917
    similarity: TransportSimilarity, name: str, peer: Peer, corpus: Texts, asked: Texts, blocks: int
) -> Row:
    """Time all of ours in blocks, and after each the peer on a part of one query's work."""
    part = min(200, len(corpus))
    mine = similarity.distances(asked[:1], corpus[:part])[0]
    np.testing.assert_allclose(mine, peer(asked[0], corpus[:part]), rtol=0, atol=1e-5)
    size = len(asked) // blocks
    scale = size * len(corpus) / part
    ours, theirs, solved = [], [], 0
    for begin in range(0, size * blocks, size):
        start = time.perf_counter()
        similarity.search(asked[begin : begin + size], corpus, NEIGHBOURS)
        between = time.perf_counter()
        peer(asked[begin], corpus[-part:])
        ours.append(between - start)
        theirs.append(scale * (time.perf_counter() - between))
        solved += similarity.statistics["transport_problems"]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    distance = "WMD" if isinstance(similarity, WordMoverSimilarity) else "WRD"
    share = solved / (len(asked) * len(corpus))
    return Row(
        f"{distance}, {NEIGHBOURS} nearest",
        f"{len(asked)} queries x {len(corpus)} texts, {share:.2%} solved",
        name,
        1e3 * sum(ours),
        1e3 * sum(theirs),
        middle,
        low,
        high,
    )


# -- one problem -----------------------------------------------------------------------------------


def _one_problem(words: int, pairs: int) -> Row:
    generator = torch.Generator().manual_seed(words)
    p, q = (torch.rand(n, generator=generator).double().numpy() for n in (words, words + 2))
    p, q = p / p.sum(), q / q.sum()
    x, y = (torch.randn(n, 50, generator=generator).double() for n in (words, words + 2))
    cost = torch.cdist(x, y).numpy()
    np.testing.assert_allclose(optimal_cost(p, q, cost), ot.emd2(p, q, cost), rtol=1e-9)
    return compare(
        "one transport problem",
        f"{words} x {words + 2} words",
        partial(optimal_cost, p, q, cost),
        partial(ot.emd2, p, q, cost),
        peer_name="ot.emd2",
        pairs=pairs,
    )
