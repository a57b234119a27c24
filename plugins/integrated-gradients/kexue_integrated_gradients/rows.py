"""Rows that a model is applied to, from files: tables, images, token ids, texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError, FileFormatError, WorkError
from kexue.core.files import IMAGE_SUFFIXES, read_arrays, read_images, read_lines
from kexue.core.inputs import read_floats, to_floats
from kexue.core.job import Job
from kexue.core.loading import load_target

__all__ = ["Rows", "Tokens", "read_rows", "reason"]

_LAYOUTS = ("channels-first", "channels-last", "flat")


@dataclass(frozen=True)
class Rows:
    """Rows of numbers.

    Args:
        values: Shape ``[row, ...]``.
        pixels: The images that they were made from, ``[row, height, width]`` or with channels.
    """

    values: Tensor
    pixels: NDArray[Any] | None = None

    def __len__(self) -> int:
        """Return how many."""
        return len(self.values)

    def blocks(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the numbers and values of some rows at a time."""
        for first in range(0, len(self), size):
            part = self.values[first : first + size]
            yield list(range(first, first + len(part))), part


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids.

    Args:
        ids: The ids of each row.
        texts: The tokens as they are shown.
        device: Where the ids go.
    """

    ids: Sequence[Sequence[int]]
    texts: Sequence[Sequence[str]]
    device: torch.device

    def __len__(self) -> int:
        """Return how many."""
        return len(self.ids)

    def blocks(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the numbers and ids of some rows at a time, all of one length: no padding."""
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(self.ids):
            by_length.setdefault(len(row), []).append(number)
        for numbers in by_length.values():
            for first in range(0, len(numbers), size):
                part = numbers[first : first + size]
                yield part, torch.tensor([self.ids[n] for n in part], device=self.device)


def read_rows(
    job: Job, path: str, *, tokenizer: str | None, layout: str, ids: bool
) -> Rows | Tokens:
    """Read a file of rows.

    Args:
        job: The call.
        path: An array, an image or a folder of images, or a text file.
        tokenizer: ``file.py:function`` from a text to its ids, or to ids and tokens.
        layout: How images are given to the model.
        ids: Whether whole numbers are ids.

    Raises:
        ArgumentError: If the layout is unknown or the tokenizer gives something else.
        FileFormatError: If the file is not what its suffix says, or holds no rows.
    """
    if layout not in _LAYOUTS:
        raise ArgumentError(
            f"`--layout` must be one of {', '.join(_LAYOUTS)}. Found {layout!r}.",
            argument="layout",
        )
    if tokenizer is not None:
        rows: Rows | Tokens = _texts(job, path, tokenizer)
    elif path != "-" and (Path(path).is_dir() or Path(path).suffix.lower() in IMAGE_SUFFIXES):
        rows = _images(job, path, layout)
    else:
        found = _ids(job, path) if ids else None
        rows = found if found is not None else Rows(read_floats(job, path, "inputs", rows=True))
    if not len(rows) or (isinstance(rows, Rows) and not rows.values.numel()):
        raise FileFormatError(f"{path} holds no rows.", path=path)
    return rows


def _images(job: Job, path: str, layout: str) -> Rows:
    pixels = read_images(path)
    values = to_floats(job, path, pixels / 255, "inputs")
    if layout == "flat":
        return Rows(values.flatten(1), pixels)
    coloured = values if values.ndim == 4 else values[..., None]
    return Rows(coloured.movedim(-1, 1) if layout == "channels-first" else coloured, pixels)


def _ids(job: Job, path: str) -> Tokens | None:
    """Read ids; None if the file holds other numbers."""
    arrays = read_arrays(path)
    array = next(iter(arrays.values()))
    if len(arrays) > 1 or array.dtype.kind not in "iu":
        return None
    if array.ndim != 2:
        raise FileFormatError(
            f"{path} must hold ids of the shape [row, time]. Found {list(array.shape)}.", path=path
        )
    ids = [_without_padding(path, row) for row in array.tolist()]
    return Tokens(ids, [[str(i) for i in row] for row in ids], job.device)


def _without_padding(path: str, row: list[int]) -> list[int]:
    while row and row[-1] == PAD:
        row.pop()
    if not row or min(row) < 0:
        raise FileFormatError(
            f"{path} must hold ids from 0 in every row, {PAD} behind the last. Found "
            f"{'an empty row' if not row else min(row)}.",
            path=path,
        )
    return row


def _texts(job: Job, path: str, tokenizer: str) -> Tokens:
    function: Callable[[str], Any] = load_target(tokenizer)
    if not callable(function):
        raise ArgumentError(
            f"{tokenizer} must be a function from a text to its ids. "
            f"Found {type(function).__name__}.",
            argument="tokenizer",
        )
    ids: list[list[int]] = []
    texts: list[list[str]] = []
    for line in read_lines(path):
        if line.strip():
            try:
                found = function(line)
            except Exception as error:  # a user's function fails in any way
                raise WorkError(f"{tokenizer} failed on {line[:40]!r}: {reason(error)}.") from error
            encoded, tokens = _encoded(tokenizer, line, found)
            ids.append(encoded)
            texts.append(tokens)
    return Tokens(ids, texts, job.device)


def reason(error: Exception) -> str:
    """Return the line of an error that says what is wrong; TorchScript's is the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = lines[-1] if "TorchScript" in lines[0] else lines[0]
    return f"{type(error).__name__}: {line[:300].rstrip('.')}"


def _encoded(tokenizer: str, line: str, found: Any) -> tuple[list[int], list[str]]:
    """Return the ids and tokens of a line."""
    tokens: Any = None
    if isinstance(found, tuple) and len(found) == 2 and not isinstance(found[0], int):
        found, tokens = found
    ids = np.asarray(found.tolist() if isinstance(found, Tensor) else found)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ArgumentError(
            f"{tokenizer} must return one or more ids, or ids and tokens. "
            f"Found {found!r} for {line[:40]!r}.",
            argument="tokenizer",
        )
    if tokens is None:
        words = line.split()
        tokens = words if len(words) == len(ids) else ids.tolist()
    if len(tokens) != len(ids):
        raise ArgumentError(
            f"{tokenizer} must return as many tokens as ids. Found {len(tokens)} and {len(ids)} "
            f"for {line[:40]!r}.",
            argument="tokenizer",
        )
    return ids.tolist(), [str(token) for token in tokens]
