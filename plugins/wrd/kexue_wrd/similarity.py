"""Text in, similarity out: the components."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.component import Example
from kexue.core.errors import ArgumentError
from kexue.core.files import read_lines
from kexue.core.interfaces.similarity import Similarity
from kexue_wrd.bags import Bags
from kexue_wrd.cooccurrence import fit_vectors
from kexue_wrd.geometry import MOVER, ROTATOR, Geometry
from kexue_wrd.index import TransportIndex
from kexue_wrd.pairs import Sinkhorn, paired_distances
from kexue_wrd.tokens import Tokenizer, stop_word_set, tokenizer
from kexue_wrd.vectors import WordVectors

__all__ = ["TransportSimilarity", "WordMoverSimilarity", "WordRotatorSimilarity"]

Text = str | Sequence[str]
"""A text, or its tokens."""

Floats = NDArray[np.float64]


class _Prepared(NamedTuple):
    """Texts as bags over vectors.

    Args:
        vectors: Shape ``[word, feature]``, float64.
        bags: Those of both groups of texts.
        tokens: The tokens of both.
        unknown: How many tokens have no vector.
    """

    vectors: Tensor
    bags: tuple[Bags, Bags]
    tokens: tuple[list[list[str]], list[list[str]]]
    unknown: int


class TransportSimilarity(Similarity):
    """What both components share: texts to bags of words, and distances of these.

    Args:
        vectors: Word vectors: a file or folder that ``WordVectors.load`` reads, or a
            ``WordVectors``. None: they are made from the texts of each call and ``corpus``, by
            PPMI and SVD. A file is read again at each call, only the words that occur.
        vocabulary: The words of the rows of an .npy file, one a line.
        tokens: How texts are split: ``words`` (each Chinese character or kana alone), ``spaces``,
            ``characters``, ``file.py:function``, or a function. A language model brings its own.
        stop_words: Words to leave out: ``english``, a file of one word a line, or a collection.
        normalize: Divide the vectors by their norms first, as gensim does.
        corpus: A text file whose lines help to make vectors where none are given.
        dimensions: Length of the vectors that are made.
        window: How far apart words are neighbours when vectors are made.
        solver: ``exact``, or ``sinkhorn``, which is approximate and made for accelerators; the
            statistics say how wrong it can be. A search with it compares all pairs.
        regularization: Sinkhorn's last temperature, as a share of the mean cost.
        iterations: Sinkhorn's iterations.
        device: Where vectors, bounds and Sinkhorn are computed, in float64; the exact solvers
            work on the CPU. Devices without float64 leave all to the CPU.
    """

    reads: ClassVar[str] = "text"
    geometry: ClassVar[Geometry]

    def __init__(
        self,
        vectors: str | WordVectors | None = None,
        *,
        vocabulary: str | None = None,
        tokens: str | Tokenizer = "words",
        stop_words: str | Collection[str] | None = None,
        normalize: bool = False,
        corpus: str | None = None,
        dimensions: int = 100,
        window: int = 5,
        solver: Literal["exact", "sinkhorn"] = "exact",
        regularization: float = 0.02,
        iterations: int = 100,
        device: str = "cpu",
    ) -> None:
        if solver not in {"exact", "sinkhorn"}:
            raise ArgumentError(
                f"`solver` must be 'exact' or 'sinkhorn'. Found {solver!r}.", argument="solver"
            )
        self.vectors, self.vocabulary = vectors, vocabulary
        self.tokens = tokens
        self.stop_words = stop_word_set(stop_words)
        self.normalize = normalize
        self.corpus, self.dimensions, self.window = corpus, dimensions, window
        self.approximation = Sinkhorn(regularization, iterations) if solver == "sinkhorn" else None
        self.device = _with_float64(torch.device(device))
        tokenizer(tokens)  # a wrong name shows at once
        self.statistics: dict[str, Any] = {}

    # -- distances ---------------------------------------------------------------------------------

    def distance(self, a: Sequence[Text], b: Sequence[Text]) -> Tensor:
        """Return the distance of each text of ``a`` to the same of ``b``, ``[text]``, float64.

        A text without a known word is infinitely far from every other; two texts with the same
        tokens have the distance 0, known or not.

        Args:
            a: Texts, or their tokens.
            b: As many.

        Raises:
            ArgumentError: If the numbers of texts differ, or no vectors can be made.
        """
        if len(a) != len(b):
            raise ArgumentError(
                f"`b` must hold as many texts as `a`, {len(a)}. Found {len(b)}.", argument="b"
            )
        prepared = self._prepare(a, b)
        found, errors = paired_distances(
            self.geometry, prepared.vectors, *prepared.bags, self.approximation
        )
        for i, (x, y) in enumerate(zip(*prepared.tokens, strict=True)):
            if sorted(x) == sorted(y):
                found[i] = 0.0
        (a_bags, b_bags), pairs = prepared.bags, len(found)
        self._report(prepared, pairs, int(((a_bags.sizes > 0) & (b_bags.sizes > 0)).sum()), errors)
        return found

    def distances(self, a: Sequence[Text], b: Sequence[Text]) -> Tensor:
        """Return the distance of every text of ``a`` to every one of ``b``, ``[a, b]``, float64.

        Args:
            a: Texts, or their tokens.
            b: Texts, or their tokens.
        """
        prepared = self._prepare(a, b)
        queries, corpus = prepared.bags
        index = TransportIndex(self.geometry, prepared.vectors, corpus)
        found, errors = index.distances(queries, self.approximation)
        for i, same in self._equal_but_unknown(prepared).items():
            found[i, same] = 0.0
        solved = int(np.count_nonzero(queries.sizes) * np.count_nonzero(corpus.sizes))
        self._report(prepared, found.numel(), solved, errors)
        return found

    def nearest(
        self, queries: Sequence[Text], corpus: Sequence[Text], k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the ``k`` nearest texts of ``corpus`` for each query.

        Exact: the same as from :meth:`distances`, equally near ones by their place. Most pairs are
        excluded by bounds; ``statistics["transport_problems"]`` says how many were solved.

        Args:
            queries: Texts, or their tokens.
            corpus: Where to look.
            k: How many; at most the size of the corpus.

        Returns:
            Distances, float64, and indices, both ``[query, k]``, the nearest first.

        Raises:
            ArgumentError: If ``k`` is not at least 1, or no vectors can be made.
        """
        if k < 1:
            raise ArgumentError(f"`k` must be at least 1. Found {k}.", argument="k")
        k = min(k, len(corpus))
        if self.approximation is not None:
            ordered = self.distances(queries, corpus).sort(dim=1, stable=True)
            return ordered.values[:, :k], ordered.indices[:, :k]
        prepared = self._prepare(queries, corpus)
        index = TransportIndex(self.geometry, prepared.vectors, prepared.bags[1])
        found = index.search(prepared.bags[0], k)
        for i, same in self._equal_but_unknown(prepared).items():
            rest = sorted(set(range(len(corpus))) - set(same))
            found.indices[i] = torch.tensor([*same, *rest][:k])
            found.distances[i, : len(same)] = 0.0
        self._report(prepared, len(queries) * len(corpus), found.solved)
        return found.distances, found.indices

    # -- the contract ------------------------------------------------------------------------------

    def __call__(self, a: Sequence[Text], b: Sequence[Text]) -> Tensor:
        """Return the similarity of each text of ``a`` with the same of ``b``, ``[text]``.

        Args:
            a: Texts, or their tokens.
            b: As many.
        """
        return self._alike(self.distance(a, b))

    def matrix(self, a: Sequence[Text], b: Sequence[Text]) -> Tensor:
        """Return the similarity of every text of ``a`` with every one of ``b``, ``[a, b]``."""
        return self._alike(self.distances(a, b))

    def search(
        self, queries: Sequence[Text], corpus: Sequence[Text], k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the ``k`` most alike texts of ``corpus`` for each query; see :meth:`nearest`."""
        distances, indices = self.nearest(queries, corpus, k)
        return self._alike(distances), indices

    @staticmethod
    def _alike(distances: Tensor) -> Tensor:
        return 0 - distances  # not -0.0

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three pairs of sentences, whose vectors are made from themselves."""
        del generator
        a = ["the cat sat on the mat", "a dog barked at the cat", "stocks fell sharply in May"]
        b = ["a cat lay on the mat", "the dog barked all night", "shares fell in late May"]
        return Example({"dimensions": 8}, {"a": a, "b": b})

    # -- from texts to bags ------------------------------------------------------------------------

    def _prepare(self, a: Sequence[Text], b: Sequence[Text]) -> _Prepared:
        for name, texts in (("a", a), ("b", b)):
            if isinstance(texts, str):
                raise ArgumentError(
                    f"`{name}` must be a list of texts. Found one text; put it in brackets.",
                    argument=name,
                )
        vectors, split = self.vectors, tokenizer(self.tokens)
        if isinstance(vectors, WordVectors) and vectors.pieces is not None:
            split = vectors.pieces
        tokens = self._split(a, split), self._split(b, split)
        if vectors is None:
            vectors = self._made([*tokens[0], *tokens[1]], split)
        elif not isinstance(vectors, WordVectors):
            words = {word for text in chain(*tokens) for word in text}
            vectors = WordVectors.load(vectors, vocabulary=self.vocabulary, only=words)
            if vectors.pieces is not None:
                tokens = self._split(a, vectors.pieces), self._split(b, vectors.pieces)
        return self._counted(vectors, tokens)

    def _split(self, texts: Iterable[Text], split: Tokenizer) -> list[list[str]]:
        tokens = (split(text) if isinstance(text, str) else text for text in texts)
        return [[word for word in text if word.lower() not in self.stop_words] for text in tokens]

    def _made(self, texts: list[list[str]], split: Tokenizer) -> WordVectors:
        if self.corpus is not None:
            texts = texts + self._split(read_lines(self.corpus), split)
        return fit_vectors(texts, dimensions=self.dimensions, window=self.window)

    def _counted(
        self, vectors: WordVectors, tokens: tuple[list[list[str]], list[list[str]]]
    ) -> _Prepared:
        """Count the words that are known; only their vectors are taken."""
        words = [word for text in chain(*tokens) for word in text]
        places = {word: vectors.place(word) for word in dict.fromkeys(words)}
        used = sorted({place for place in places.values() if place is not None})
        taken = vectors.vectors[used].to(self.device, torch.float64)
        if self.normalize:
            taken, _ = ROTATOR.place(taken)
        weights: Floats = self.geometry.place(taken)[1].cpu().numpy()
        rows = {place: row for row, place in enumerate(used)}

        def count(texts: list[list[str]]) -> Bags:
            known = [[rows[p] for w in text if (p := places[w]) is not None] for text in texts]
            return Bags.count(known, weights, self.device)

        unknown = sum(places[word] is None for word in words)
        return _Prepared(taken, (count(tokens[0]), count(tokens[1])), tokens, unknown)

    def _equal_but_unknown(self, prepared: _Prepared) -> dict[int, list[int]]:
        """Return, for each query without a known word, the texts with the very same tokens."""
        (queries, corpus), (asked, held) = prepared.bags, prepared.tokens
        places: dict[tuple[str, ...], list[int]] = {}
        for j in np.flatnonzero(corpus.sizes == 0):
            places.setdefault(tuple(sorted(held[j])), []).append(int(j))
        found = {int(i): tuple(sorted(asked[i])) for i in np.flatnonzero(queries.sizes == 0)}
        return {i: places.get(key, []) for i, key in found.items()}

    def _report(
        self, prepared: _Prepared, pairs: int, solved: int, errors: Tensor | None = None
    ) -> None:
        self.statistics = {"pairs": pairs, "transport_problems": solved}
        if self.approximation is not None and errors is not None:
            self.statistics["largest_error"] = float(errors.max()) if errors.numel() else 0.0
        self.statistics["unknown_words"] = prepared.unknown


def _with_float64(device: torch.device) -> torch.device:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return torch.device("cpu")
    return device


class WordMoverSimilarity(TransportSimilarity):
    """Minus the word mover's distance of texts: at most 0, the larger the more alike.

    The distance is the least cost of moving the words of one text to those of the other, where
    all words of a text weigh the same and a move costs the Euclidean distance of the vectors; see
    :func:`~kexue_wrd.wmd`. It has the scale of the vectors. Choose it where the vectors' lengths
    mean nothing, or with ``normalize=True``; leave stop words out.

    Deviations from the post: none; its code divides the squared distances by the dimension (a
    mean), its formula does not.

    Example:
        >>> from kexue_wrd import WordMoverSimilarity, WordVectors
        >>> import torch
        >>> vectors = WordVectors(["cat", "dog", "car"], torch.tensor([[0.0], [1.0], [9.0]]))
        >>> wmd = WordMoverSimilarity(vectors)
        >>> wmd(["a cat", "cat dog"], ["the dog", "dog cat"]).tolist()
        [-1.0, 0.0]
        >>> wmd.distance(["cat cat dog"], ["car dog"]).tolist()
        [4.666666666666666]

    References:
        - Kusner et al. 2015, http://proceedings.mlr.press/v37/kusnerb15.html
        - https://kexue.fm/archives/7388
    """

    geometry: ClassVar[Geometry] = MOVER


class WordRotatorSimilarity(TransportSimilarity):
    """One minus the word rotator's distance of texts: in [-1, 1], the larger the more alike.

    The distance is the least cost of turning the words of one text into those of the other, where
    a word weighs the norm of its vector and a turn costs 1 - cos; see :func:`~kexue_wrd.wrd`.
    Choose it where the words that matter have long vectors, as in word2vec and GloVe: stop words
    then weigh little by themselves. A zero vector is an unknown word.

    Deviations from the post: none.

    Example:
        >>> from kexue_wrd import WordRotatorSimilarity, WordVectors
        >>> import torch
        >>> vectors = WordVectors(["cat", "dog"], torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> wrd = WordRotatorSimilarity(vectors)
        >>> wrd(["a cat", "cat dog"], ["the cat", "cat"]).tolist()
        [1.0, 0.75]

    References:
        - Yokoi et al. 2020, https://arxiv.org/abs/2004.15003
        - https://kexue.fm/archives/7388
    """

    geometry: ClassVar[Geometry] = ROTATOR

    @staticmethod
    def _alike(distances: Tensor) -> Tensor:
        return 1 - distances
