"""Word vectors: held in memory, or read from files; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core.errors import ArgumentError, FileFormatError

__all__ = ["WordVectors"]


class WordVectors:
    """Words and their vectors.

    A word that is not known as it is written is looked up in lower case. Of a word that occurs
    twice the first vector counts.

    Args:
        words: The words.
        vectors: Shape ``[word, feature]``, finite.
        pieces: What splits a text into these words, where they are not words: the word pieces of
            a language model.

    Raises:
        ArgumentError: If there are no words, their number does not fit, or a vector is not finite.

    Example:
        >>> import torch
        >>> from kexue_wrd import WordVectors
        >>> vectors = WordVectors(["cat", "dog"], torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
        >>> vectors.place("Cat"), vectors.place("fish")
        (0, None)
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: Float[Tensor, "word feature"],
        *,
        pieces: Callable[[str], list[str]] | None = None,
    ) -> None:
        if vectors.ndim != 2 or len(vectors) != len(words) or 0 in vectors.shape:
            raise ArgumentError(
                f"`vectors` must have shape [word, feature] with one row for each of "
                f"{len(words)} words, and at least one. Found {list(vectors.shape)}.",
                argument="vectors",
            )
        broken = ~torch.isfinite(vectors).all(1)
        if broken.any():
            word = words[int(broken.nonzero()[0])]
            raise ArgumentError(
                f"`vectors` must be finite. That of {word!r} is not.", argument="vectors"
            )
        self.words = list(words)
        self.vectors = vectors.detach()
        self.pieces = pieces
        self._places: dict[str, int] = {}
        for i, word in enumerate(self.words):
            self._places.setdefault(word, i)

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"WordVectors({len(self)} words, {self.vectors.shape[1]} features)"

    def place(self, word: str) -> int | None:
        """Return the row of a word; None if it is unknown."""
        found = self._places.get(word)
        return self._places.get(word.lower()) if found is None else found

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        vocabulary: str | Path | None = None,
        only: Iterable[str] | None = None,
    ) -> WordVectors:
        """Read vectors from disk; no network is used and no code is run.

        =====================  =============================================================
        what                   read as
        =====================  =============================================================
        ``.txt`` ``.vec`` …    text: a word and its numbers a line, with or without the first
                               line of word2vec (how many, how long): GloVe, fastText, word2vec
        ``.bin``               word2vec's binary format
        ``.npy``               an array ``[word, feature]``, with ``vocabulary``
        a folder               a transformers model: the embedding matrix from its safetensors,
                               split by its ``tokenizer.json`` (needs the package tokenizers)
        =====================  =============================================================

        Files that gensim's ``save`` or torch's ``save`` wrote are pickles and refused; gensim's
        ``KeyedVectors.save_word2vec_format(path, binary=True)`` writes what is read here.

        Args:
            path: A file or folder.
            vocabulary: For ``.npy``: a text file with the word of each row; by default the file
                of the same name that ends in ``.txt`` or ``.vocab``.
            only: Read only these words, as they are and in lower case, of text and binary files.

        Raises:
            FileFormatError: If a file is not what it should be, naming the line.
            MissingDependencyError: If a model's tokens need tokenizers and it is not installed.
        """
        from kexue_wrd.readers import read_vectors

        wanted = None if only is None else {form for word in only for form in (word, word.lower())}
        words, vectors, pieces = read_vectors(Path(path), vocabulary, wanted)
        try:
            return cls(words, vectors, pieces=pieces)
        except ArgumentError as error:
            raise FileFormatError(f"{path}: {error}", path=path) from error
