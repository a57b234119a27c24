"""Similarities: two objects to how alike they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

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
    similarity: Any = job.build()
    if (search or matrix) and not hasattr(similarity, "matrix"):
        raise ArgumentError(
            f"{job.id} is a plain function and compares row by row only.",
            argument="search" if search else "matrix",
        )
    a, b = (_rows(job, similarity, path) for path in job.files)
    if search:
        values, indices = similarity.search(a, b, search)
        return Result(
            {"queries": len(values), "corpus": len(b)}, {"indices": indices, "similarities": values}
        )
    if not matrix and len(a) != len(b):
        raise ArgumentError(
            f"{job.id} compares row by row: both files need as many rows. Found {len(a)} and "
            f"{len(b)}; `--matrix` compares every pair, `--search K` finds the most alike.",
            argument="files",
        )
    values = similarity.matrix(a, b) if matrix else similarity(a, b)
    summary = {"pairs": values.numel(), "mean": float(values.double().mean())}
    return Result(
        summary, {"similarities": values}, plot=lambda f: histogram(f, values, "similarity")
    )


def _rows(job: Job, similarity: Any, path: str) -> Tensor | Sequence[str]:
    if getattr(similarity, "reads", "vectors") == "text":
        lines = list(read_lines(path))
        if not lines:
            raise FileFormatError(f"{path} is empty.", path=path)
        return lines
    return read_floats(job, path, "vectors", rows=True)
