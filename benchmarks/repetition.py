"""The index of repetition and statistics of texts beside numpy and plain Python.

Peers: for R, the eigenvalues of a dense S by ``numpy.linalg.eigvals``, as its formula reads; for
seq-rep-n, sets of tuples row by row; for the longest repeated block, the table of common
suffixes, row by row of the table with numpy (O(N²)); for encoding, a loop that tries the longest
phrase at each token. All results are compared before the clock starts.

Floor: R needs one factorisation and one inverse, 2n³ operations, where eigenvalues need some 10n³
that do not parallelise. Statistics need one sort of the tokens per length of n-gram.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Row, compare
from numpy.typing import NDArray

from kexue_repetition import (
    RebalancedEncoding,
    longest_repeat,
    repeated_ngrams,
    repetition_index,
)

__all__ = ["rows"]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Fewer and smaller sizes.
    """
    pairs = 5 if quick else 15
    for n in (100, 400) if quick else (100, 400, 1000):
        yield _index(n, pairs)
    yield _ngrams(64 if quick else 256, pairs)
    for length in (1000,) if quick else (1000, 5000):
        yield _longest(length, pairs)
    yield _encoding(500 if quick else 5000, pairs)


def _index(n: int, pairs: int) -> Row:
    torch.manual_seed(n)
    p = torch.randn(n, n + 1, dtype=torch.float64).mul(2).softmax(1)[:, :n]
    s = p.square().numpy()
    np.testing.assert_allclose(repetition_index(p).value, _by_eigenvalues(s), rtol=1e-9)
    return compare(
        "R",
        f"{n} tokens, dense",
        lambda: repetition_index(p),
        lambda: _by_eigenvalues(s),
        peer_name="numpy.linalg.eigvals",
        pairs=pairs,
    )


def _by_eigenvalues(s: NDArray[np.float64]) -> float:
    found = np.linalg.eigvals(s)
    return float((found / (1 - found)).sum().real)


def _ngrams(texts: int, pairs: int) -> Row:
    ids = torch.randint(200, (texts, 500), generator=torch.Generator().manual_seed(0))
    plain = ids.tolist()
    np.testing.assert_allclose(repeated_ngrams(ids, 4, pooled=True), _sets(plain))
    return compare(
        "seq-rep-1 to 4",
        f"{texts} texts of 500 tokens",
        lambda: repeated_ngrams(ids, 4, pooled=True),
        lambda: _sets(plain),
        peer_name="sets of tuples",
        pairs=pairs,
    )


def _sets(plain: list[list[int]]) -> list[float]:
    found = []
    for row in plain:
        grams = [tuple(row[i : i + n]) for n in range(1, 5) for i in range(len(row) - n + 1)]
        found.append(1 - len(set(grams)) / len(grams))
    return found


def _longest(length: int, pairs: int) -> Row:
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(1))
    ids[0, -40:] = ids[0, :40]
    row = ids[0].numpy()
    np.testing.assert_equal(int(longest_repeat(ids, overlap=True).length[0]), _table(row))
    return compare(
        "longest repeated block",
        f"{length} tokens",
        lambda: longest_repeat(ids, overlap=True),
        lambda: _table(row),
        peer_name="table of common suffixes, numpy",
        pairs=pairs,
    )


def _table(row: NDArray[np.int64]) -> int:
    best, before = 0, np.zeros(len(row) + 1, dtype=np.int64)
    for i in range(1, len(row)):
        now = np.zeros_like(before)
        now[i + 1 :] = np.where(row[i:] == row[i - 1], before[i:-1] + 1, 0)
        best, before = max(best, int(now.max())), now
    return best


def _encoding(lines: int, pairs: int) -> Row:
    from pydoc_data.topics import topics

    texts = [line for name in sorted(topics) for line in topics[name].splitlines() if line][:lines]
    encoding = RebalancedEncoding(0.3).fit(texts)
    phrases = set(encoding.phrases)
    depth = max(map(len, phrases))
    peer = partial(_loop, texts, phrases, depth)
    if peer() != encoding.encode_all(texts):
        raise AssertionError("the loop encodes differently")
    return compare(
        "encode characters",
        f"{lines} lines, {len(phrases)} phrases",
        lambda: encoding.encode_all(texts),
        peer,
        peer_name="longest match in a loop",
        pairs=pairs,
    )


def _loop(
    texts: Sequence[str], phrases: set[tuple[Hashable, ...]], depth: int
) -> list[list[tuple[Any, ...]]]:
    found = []
    for text in texts:
        pieces, place = [], 0
        while place < len(text):
            sizes = itertools.chain(range(min(depth, len(text) - place), 1, -1), [1])
            size = next(n for n in sizes if n == 1 or tuple(text[place : place + n]) in phrases)
            pieces.append(tuple(text[place : place + size]))
            place += size
        found.append(pieces)
    return found


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(row)
