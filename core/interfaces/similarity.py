"""Similarities: two objects to how alike they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.files import read_lines
from kexue.core.inputs import read_floats
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import histogram

__all__ = ["Similarity", "run"]


class Similarity(Contract):
    """A similarity maps two objects to a number that is larger the more alike they are."""

    reads: ClassVar[str] = "vectors"
    """``"vectors"``: rows of an array; ``"text"``: lines."""

    statistics: Mapping[str, Any] = MappingProxyType({})
    """Figures about the last call that a user wants to see, such as how much work it was."""

    @abstractmethod
    def __call__(self, a: Any, b: Any) -> Tensor:
        """Return the similarity of each row of ``a`` with the same row of ``b``, ``[row]``."""

    @abstractmethod
    def matrix(self, a: Any, b: Any) -> Tensor:
        """Return the similarity of every row of ``a`` with every row of ``b``, ``[a, b]``."""

    def search(self, queries: Any, corpus: Any, k: int) -> tuple[Tensor, Tensor]:
        """Return the ``k`` most alike rows of ``corpus`` for each query.

        Args:
            queries: What to look for.
            corpus: Where to look.
            k: How many; at most the size of the corpus.

        Returns:
            Similarities and indices, both ``[query, k]``, the most alike first.
        """
        values, indices = self.matrix(queries, corpus).topk(min(k, len(corpus)), dim=1)
        return values, indices


def run(job: Job, *, search: int = 0, matrix: bool = False) -> Result:
    """Compare two files, row by row.

    Args:
        job: The call.
        search: Find this many most alike rows of the second file for each row of the first.
        matrix: Compare every row of the first with every row of the second.
    """
    if len(job.files) != 2:
        raise ArgumentError(
            f"{job.id} compares two files. Found {len(job.files)}.", argument="files"
        )
    if search < 0 or (search and matrix):
        found = f"{search} and --matrix" if matrix else f"{search}"
        raise ArgumentError(
            f"`--search` must be how many rows to find, without `--matrix`. Found {found}.",
            argument="search",
        )
    similarity: Any = job.build(device=str(job.device))
    if (search or matrix) and not hasattr(similarity, "matrix"):
        raise ArgumentError(
            f"{job.id} is a plain function and compares row by row only.",
            argument="search" if search else "matrix",
        )
    a, b = (_rows(job, similarity, path) for path in job.files)
    if search:
        values, indices = similarity.search(a, b, search)
        summary: dict[str, Any] = {"queries": len(values), "corpus": len(b)}
        arrays = {"indices": indices, "similarities": values}
    elif not matrix and len(a) != len(b):
        raise ArgumentError(
            f"{job.id} compares row by row: both files need as many rows. Found {len(a)} and "
            f"{len(b)}; `--matrix` compares every pair, `--search K` finds the most alike.",
            argument="files",
        )
    else:
        values = similarity.matrix(a, b) if matrix else similarity(a, b)
        summary = {"pairs": values.numel(), "mean": float(values.double().mean())}
        arrays = {"similarities": values}
    return Result(
        {**summary, **getattr(similarity, "statistics", {})},
        arrays,
        lines=_told(a, b, **arrays) if isinstance(a, list) and isinstance(b, list) else None,
        plot=lambda figure: histogram(figure, values, "similarity"),
    )


def _told(
    a: Sequence[str], b: Sequence[str], similarities: Tensor, indices: Tensor | None = None
) -> Iterator[str]:
    """Yield each text and, indented, those that it was compared with, the most alike first.

    Args:
        a: The first file's lines.
        b: The second file's.
        similarities: Shape ``[a]`` beside each other, ``[a, b]``, or of what was found.
        indices: Where in ``b`` the found ones are.
    """
    if similarities.ndim == 1:
        similarities, indices = similarities[:, None], torch.arange(len(b))[:, None]
    elif indices is None:
        similarities, indices = similarities.sort(dim=1, descending=True, stable=True)
    for line, values, places in zip(a, similarities.tolist(), indices.tolist(), strict=True):
        yield line
        for value, place in zip(values, places, strict=True):
            yield f"{value:>12.4g}  {place:>6}  {b[place]}"


def _rows(job: Job, similarity: Any, path: str) -> Tensor | Sequence[str]:
    if getattr(similarity, "reads", "vectors") == "text":
        lines = list(read_lines(path))
        if not lines:
            raise FileFormatError(f"{path} is empty.", path=path)
        return lines
    return read_floats(job, path, "vectors", rows=True)
