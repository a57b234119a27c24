"""Text files, a line at a time, and what every reader asks of a file first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kexue.core.errors import FileFormatError, nearest

__all__ = ["check_file", "detail", "read_conll", "read_lines"]


def check_file(path: Path, *, may_be_empty: bool = False) -> None:
    """Refuse what is not a file that can be read.

    Args:
        path: The file.
        may_be_empty: Whether a file of no bytes is one too.

    Raises:
        FileFormatError: If it is missing, a folder, not readable, or empty.
    """
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileFormatError(f"{path} does not exist.{_neighbour(path)}", path=path) from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {detail(error)}.", path=path) from error
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, not a file.", path=path)
    if not os.access(path, os.R_OK):
        raise FileFormatError(f"{path} cannot be read: Permission denied.", path=path)
    if size == 0 and not may_be_empty:
        raise FileFormatError(f"{path} is empty.", path=path)


def _neighbour(path: Path) -> str:
    """Say which file of the folder may have been meant, or that there is no such folder."""
    try:
        names = {found.stem: found.name for found in path.parent.iterdir()}
    except OSError:
        return f" There is no folder {path.parent}."
    found = nearest(path.stem, names)
    return f" Did you mean {names[found]!r}?" if found is not None else ""


def detail(error: BaseException) -> str:
    """Return what an error says, on one line, to stand within a sentence."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, or of standard input for ``-``, without line ends.

    Raises:
        FileFormatError: If the file does not exist or a line is not UTF-8, naming the line.
    """
    if str(path) == "-":
        yield from _decoded("standard input", sys.stdin.buffer)
        return
    path = Path(path)
    check_file(path, may_be_empty=True)
    with path.open("rb") as stream:
        yield from _decoded(path, stream)


def _decoded(path: str | Path, stream: BinaryIO) -> Iterator[str]:
    for number, raw in enumerate(_raw_lines(path, stream), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FileFormatError(
                f"{path}, line {number} is not UTF-8 text: byte {error.start} is "
                f"{raw[error.start]:#04x}. Save the file as UTF-8.",
                path=path,
            ) from error
        if "\0" in line:
            raise FileFormatError(
                f"{path}, line {number} is binary, not text. Save the file as UTF-8.", path=path
            )
        yield line


def _raw_lines(path: str | Path, stream: BinaryIO) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {detail(error)}.", path=path) from error


def read_conll(path: str | Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the sentences of a CoNLL file as (tokens, tags).

    One token a line, its tag in the last column, columns separated by tabs or spaces, a blank line
    after each sentence. ``-DOCSTART-`` lines are skipped, and before a sentence lines that begin
    with ``#`` and a space; ``#tag`` and a ``#`` before a tab are tokens.

    Raises:
        FileFormatError: If a line has a token without a tag, naming the line.
    """
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split()
        if not columns:
            if tokens:
                yield tokens, tags
            tokens, tags = [], []
            continue
        if columns[0] == "-DOCSTART-" or (not tokens and _is_comment(line)):
            continue
        if len(columns) < 2:
            raise FileFormatError(
                f"{path}, line {number} must be a token and its tag. Found {line!r}.", path=path
            )
        tokens.append(columns[0])
        tags.append(columns[-1])
    if tokens:
        yield tokens, tags


def _is_comment(line: str) -> bool:
    return line.startswith("# ") or (line.startswith("#") and len(line.split()) == 1)
