"""Real data that needs no download: what CPython and scikit-learn carry.

The text is ``pydoc_data.topics``, the reference text behind ``help("topics")``; its size changes
with the Python version (465 000 characters in 3.11), so figures on it are to be compared within
one interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kexue.core.errors import FileFormatError, MissingDependencyError
from kexue.core.files import IMAGE_SUFFIXES, read_arrays, read_conll, read_images, read_lines

__all__ = [
    "Digits",
    "Sentence",
    "Split",
    "digits",
    "segmentation",
    "segmented",
    "sentences",
    "text",
]

T = TypeVar("T")

Sentence = tuple[list[str], list[str]]
"""Tokens and their tags."""


@dataclass(frozen=True)
class Split(Generic[T]):
    """Examples in three parts that share none.

    Args:
        train: To fit to.
        valid: To choose by.
        test: To report on.
    """

    train: list[T]
    valid: list[T]
    test: list[T]


def text(path: str | Path | None = None, *, min_words: int = 3) -> Split[str]:
    """Return lines of English text.

    The embedded text is split by topic, because its topics share lines: no line of the validation
    or test part occurs in the training part.

    Args:
        path: A text file of the user's instead; every tenth line is held out for validation and
            every tenth for testing.
        min_words: Shorter lines are dropped.
    """
    if path is not None:
        lines = [line.strip() for line in read_lines(path) if len(line.split()) >= min_words]
        return _every_tenth(lines)
    from pydoc_data.topics import topics

    parts: dict[str, dict[str, None]] = {"train": {}, "valid": {}, "test": {}}
    for number, name in enumerate(sorted(topics)):
        part = {1: "test", 5: "valid"}.get(number % 8, "train")
        for line in topics[name].splitlines():
            if len(line.split()) >= min_words:
                parts[part][line.strip()] = None
    train = list(parts["train"])
    valid = [line for line in parts["valid"] if line not in parts["train"]]
    test = [line for line in parts["test"] if line not in parts["train"]]
    return Split(train, valid, test)


def _every_tenth(rows: Sequence[T]) -> Split[T]:
    return Split(
        [row for i, row in enumerate(rows) if i % 10 not in {4, 9}],
        [row for i, row in enumerate(rows) if i % 10 == 4],
        [row for i, row in enumerate(rows) if i % 10 == 9],
    )


def segmented(line: str) -> Sentence:
    """Return the characters of a line without its spaces, tagged with their place in their word.

    Tags: B begins a word of several characters, M is inside it, E ends it, S is a word of one.

    Example:
        >>> segmented("to be a")
        (['t', 'o', 'b', 'e', 'a'], ['B', 'E', 'B', 'E', 'S'])
    """
    tokens: list[str] = []
    tags: list[str] = []
    for word in line.split():
        tokens += word
        tags += ["S"] if len(word) == 1 else ["B", *"M" * (len(word) - 2), "E"]
    return tokens, tags


def segmentation(path: str | Path | None = None) -> Split[Sentence]:
    """Return text as a labelled word-segmentation corpus: real text, real labels.

    Args:
        path: A text file of the user's, words separated by spaces, instead of the embedded text.
    """
    lines = text(path)
    return Split(
        *([segmented(line) for line in part] for part in (lines.train, lines.valid, lines.test))
    )


def sentences(path: str | Path, form: str = "auto") -> list[Sentence]:
    """Read labelled sentences.

    Args:
        path: CoNLL (a token and its tag a line) or segmented text (words separated by spaces).
        form: ``"conll"``, ``"segmented"``, or ``"auto"`` to decide by the suffix and the first
            sentence: columns whose last one looks like tags are CoNLL.

    Raises:
        FileFormatError: If the file is neither.
    """
    if form == "conll" or (form == "auto" and looks_like_conll(path)):
        rows = list(read_conll(path))
    else:
        rows = [segmented(line) for line in read_lines(path) if line.strip()]
    if not rows:
        raise FileFormatError(f"{path} holds no sentences.", path=path)
    return rows


def looks_like_conll(path: str | Path) -> bool:
    """Whether a file is in columns: by its suffix, or by its first lines."""
    if Path(path).suffix.lower() in {".conll", ".bio", ".iob", ".tsv"}:
        return True
    lines = (line for line in read_lines(path) if not line.startswith(("#", "-DOCSTART-")))
    head = [line.split() for line in islice(lines, 50)]
    columns = [row for row in head if row]
    blank = len(head) - len(columns)
    return (
        bool(columns)
        and (blank > 0 or len(head) < 50)
        and all(len(row) == len(columns[0]) > 1 and _is_tag(row[-1]) for row in columns)
    )


def _is_tag(word: str) -> bool:
    return word == "O" or (word[:1] in "BIMESLU" and (len(word) == 1 or word[1] == "-"))


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Args:
        images: Shape ``[image, height, width]`` or with a channel axis, float32 in [0, 1].
        labels: Shape ``[image]``, int64; empty if not known.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def digits(path: str | Path | None = None) -> Digits:
    """Return scikit-learn's hand-written digits, 1797 images of 8 × 8 pixels.

    Args:
        path: A folder of images, or an array file, of the user's instead; without labels.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    if path is not None:
        given = Path(path)
        if given.is_dir() or given.suffix.lower() in IMAGE_SUFFIXES:
            pixels = read_images(given).astype(np.float32) / np.float32(255)
        else:
            pixels = np.asarray(next(iter(read_arrays(given).values())), dtype=np.float32)
        return Digits(pixels, np.zeros(0, dtype=np.int64))
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "The dataset 'digits'", "scikit-learn", "pip install 'kexue[lab]'"
        ) from error
    bunch = load_digits()
    return Digits((bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64))
