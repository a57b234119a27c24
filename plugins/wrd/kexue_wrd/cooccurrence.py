"""Word vectors from a corpus of any size, without training: PPMI and its factorisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kexue.core.errors import ArgumentError
from kexue_wrd.vectors import WordVectors

__all__ = ["fit_vectors"]

_DENSE = 400
"""Vocabularies up to this size are factorised densely, which is faster and always possible."""


def fit_vectors(
    texts: Sequence[Sequence[str]],
    *,
    dimensions: int = 100,
    window: int = 5,
    norms: Literal["information", "factors"] = "information",
) -> WordVectors:
    """Return vectors of the words of a corpus, from which words occur near which.

    Positive pointwise mutual information max(0, log p(w, c) / (p(w) p(c))) of words at most
    ``window`` apart in a text, factorised by a truncated SVD; the directions are those of
    U sqrt(S) (Levy, Goldberg and Dagan 2015). Words are in lower case. A word without a neighbour,
    or outside what the dimensions hold, has no vector. The same corpus gives the same vectors.

    In word2vec and GloVe the norm says how much a word matters, and the word rotator's distance
    weighs words by it. The norms of U sqrt(S) do the contrary: frequent words have the longest. So
    the norm is set to the word's information, -log p(w) in nats.

    Args:
        texts: The tokens of each text.
        dimensions: The length of the vectors, at most the number of words.
        window: How far a neighbour is away at most.
        norms: ``"information"``, or ``"factors"`` for U sqrt(S) as it is.

    Returns:
        The vectors, float64.

    Raises:
        ArgumentError: If no two words occur near each other, ``dimensions`` or ``window`` is less
            than 1, or ``norms`` is unknown.

    Example:
        >>> from kexue_wrd import fit_vectors
        >>> texts = ["the cat sat".split(), "the dog sat".split(), "a bird flew".split()]
        >>> fit_vectors(texts, dimensions=4)
        WordVectors(7 words, 4 features)
    """
    for name, value in (("dimensions", dimensions), ("window", window)):
        if value < 1:
            raise ArgumentError(f"`{name}` must be at least 1. Found {value}.", argument=name)
    if norms not in {"information", "factors"}:
        raise ArgumentError(
            f"`norms` must be 'information' or 'factors'. Found {norms!r}.", argument="norms"
        )
    lowered = [[word.lower() for word in text] for text in texts]
    words = sorted({word for text in lowered for word in text})
    information = _ppmi(lowered, {word: i for i, word in enumerate(words)}, window)
    if not words or not information.nnz:
        raise ArgumentError(
            "`texts` must hold words that tell something of each other: no two words occur near "
            "each other more often than by chance. Give word vectors, or more text.",
            argument="texts",
        )
    vectors = _factorised(information, min(dimensions, len(words)))
    lengths = np.linalg.norm(vectors, axis=1)
    kept = np.flatnonzero(lengths > 1e-8 * lengths.max())
    vectors, words = vectors[kept], [words[i] for i in kept]
    if norms == "information":
        counts = Counter(word for text in lowered for word in text)
        share = np.array([counts[word] for word in words]) / counts.total()
        vectors = vectors * (-np.log(share) / lengths[kept])[:, None]
    return WordVectors(words, torch.from_numpy(vectors))


def _ppmi(texts: Sequence[Sequence[str]], places: dict[str, int], window: int) -> Any:
    """Return the positive mutual information of all pairs of words, a sparse array of scipy."""
    from scipy import sparse  # type: ignore[import-untyped]

    gap = [-1] * window  # keeps the windows of two texts apart
    ids = np.array([*gap, *(i for text in texts for i in (*map(places.get, text), *gap))])
    left: list[NDArray[np.int64]] = []
    right: list[NDArray[np.int64]] = []
    for distance in range(1, window + 1):
        a, b = ids[:-distance], ids[distance:]
        both = (a >= 0) & (b >= 0)
        left += [a[both], b[both]]
        right += [b[both], a[both]]
    pairs = (np.concatenate(left), np.concatenate(right))
    shape = (max(len(places), 1),) * 2
    counts = sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=shape).tocsr()
    counts.sum_duplicates()
    counts = counts.tocoo()
    margins = np.asarray(counts.sum(axis=0)).ravel()
    a, b = counts.coords
    values = np.log(counts.data * margins.sum() / (margins[a] * margins[b]))
    positive = values > 0
    return sparse.csr_array((values[positive], (a[positive], b[positive])), shape=counts.shape)


def _factorised(matrix: Any, dimensions: int) -> NDArray[np.float64]:
    """Return U sqrt(S) of a truncated singular value decomposition."""
    from scipy.sparse.linalg import svds  # type: ignore[import-untyped]

    if matrix.shape[0] <= max(_DENSE, dimensions + 1):
        left, values, _ = np.linalg.svd(matrix.toarray())
        left, values = left[:, :dimensions], values[:dimensions]
    else:
        start = np.random.default_rng(0).normal(size=matrix.shape[0])
        left, values, _ = svds(matrix, k=dimensions, v0=start)
        left, values = left[:, ::-1], values[::-1]
    scaled: NDArray[np.float64] = left * np.sqrt(np.maximum(values, 0))
    return np.ascontiguousarray(scaled)
