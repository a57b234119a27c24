"""Files to what is analyzed: a transition matrix, or texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from kexue.core.errors import ArgumentError, FileFormatError, did_you_mean
from kexue.core.files import read_arrays, read_lines
from kexue.core.job import Job
from kexue.core.lines import check_file, detail
from kexue.core.loading import load_target
from kexue_repetition.transitions import Transitions

__all__ = ["MATRIX_SUFFIXES", "Given", "read_files", "read_matrix", "read_texts", "tokenizer"]

MATRIX_SUFFIXES = (".npy", ".npz", ".safetensors", ".csv", ".tsv")

Tokenizer = Callable[[str], Sequence[Hashable]]
_TOKENIZERS: dict[str, Tokenizer] = {"characters": list, "words": str.split}
_SPARSE = {"indices", "indptr", "format", "shape", "data"}


class Given(NamedTuple):
    """What the command line was given.

    Args:
        texts: Tokens of each text; None where a matrix was given.
        transitions: The matrix; None where texts were given.
    """

    texts: list[Sequence[Hashable]] | None
    transitions: Transitions | None


def read_files(job: Job, tokenize: str) -> Given:
    """Read the files of a call: one matrix, its tokens perhaps, or texts.

    Raises:
        ArgumentError: If both are given, or neither is.
        FileFormatError: If a file is not what its suffix says.
    """
    named = dict(f.split("=", 1) for f in job.files if f.startswith(("tokens=", "transitions=")))
    plain = [f for f in job.files if not f.startswith(("tokens=", "transitions="))]
    matrices = [f for f in plain if Path(f).suffix.lower() in MATRIX_SUFFIXES]
    if "transitions" in named:
        matrices.append(named["transitions"])
        plain.append(named["transitions"])
    if not plain or (matrices and len(plain) > 1):
        raise ArgumentError(
            f"{job.id} takes one transition matrix ({' '.join(MATRIX_SUFFIXES)}), or files of "
            f"texts, a text a line. Found {' '.join(job.files) or 'none'}.",
            argument="files",
        )
    if matrices:
        tokens = list(read_lines(named["tokens"])) if "tokens" in named else None
        return Given(None, read_matrix(matrices[0], tokens))
    if "tokens" in named:
        raise ArgumentError(
            "`tokens=` names the rows of a matrix; texts are split by `--tokenizer`.",
            argument="tokens",
        )
    split = tokenizer(tokenize)
    return Given([text for path in plain for text in read_texts(path, split)], None)


def tokenizer(name: str) -> Tokenizer:
    """Return what splits texts.

    Args:
        name: ``words`` (at spaces), ``characters``, or ``file.py:function``.

    Raises:
        ArgumentError: If there is no such way.
    """
    if name in _TOKENIZERS:
        return _TOKENIZERS[name]
    if ":" not in name:
        raise ArgumentError(
            f"`--tokenizer` must be one of {', '.join(_TOKENIZERS)}, or file.py:function. "
            f"Found {name!r}.{did_you_mean(name, _TOKENIZERS)}",
            argument="tokenizer",
        )
    found: Tokenizer = load_target(name)
    if not callable(found):
        raise ArgumentError(f"`--tokenizer` must name a function. {name} is none.")
    return found


def read_texts(path: str, split: Tokenizer) -> list[Sequence[Hashable]]:
    """Read texts, a line each: strings to be split, or in .jsonl lists of tokens, too.

    Raises:
        FileFormatError: If the file holds no text, or a line is neither.
    """
    texts: list[Sequence[Hashable]] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        if Path(path).suffix.lower() == ".jsonl":
            texts.append(_parsed(path, number, line, split))
        else:
            texts.append(split(line))
    if not any(texts):
        raise FileFormatError(f"{path} holds no texts.", path=path)
    return texts


def _parsed(path: str, number: int, line: str, split: Tokenizer) -> Sequence[Hashable]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FileFormatError(
            f"{path}, line {number} is not JSON: {detail(error)}.", path=path
        ) from error
    if isinstance(found, dict):
        found = found.get("text")
    if isinstance(found, str):
        return split(found)
    if isinstance(found, list) and all(isinstance(token, str | int) for token in found):
        return found
    raise FileFormatError(
        f'{path}, line {number} must be a text, {{"text": …}}, or a list of tokens.', path=path
    )


def read_matrix(path: str, tokens: Sequence[Hashable] | None = None) -> Transitions:
    """Read a transition matrix: an array of two axes, or what ``scipy.sparse.save_npz`` writes.

    Args:
        path: The file.
        tokens: Names of its rows.

    Raises:
        ArgumentError: If it holds no probabilities.
        FileFormatError: If it holds no such array.
    """
    matrix = _sparse(path) if Path(path).suffix.lower() == ".npz" else None
    if matrix is None:
        arrays = read_arrays(path)
        if len(arrays) != 1:
            raise FileFormatError(
                f"{path} must hold one array. Found {len(arrays)}: {', '.join(arrays)}.", path=path
            )
        matrix = next(iter(arrays.values()))
    try:
        return Transitions.of(matrix, tokens)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}", argument=error.argument) from error


def _sparse(path: str) -> Any:
    """Return the matrix of an archive of scipy's; None if it is another."""
    check_file(Path(path))
    try:
        with Path(path).open("rb") as stream:
            with np.load(stream, allow_pickle=False) as archive:
                if not set(archive.files) >= _SPARSE:
                    return None
            stream.seek(0)
            return sparse.load_npz(stream)  # without pickles by itself
    except Exception as error:  # a broken archive fails in any way
        raise FileFormatError(
            f"{path} is not a whole .npz file: {detail(error)}.", path=path
        ) from error
