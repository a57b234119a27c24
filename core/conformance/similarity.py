"""What similarities are asked."""

from __future__ import annotations

import torch

from kexue.core.conformance.kit import Check, Subject, require

__all__ = ["checks"]


def agree(subject: Subject) -> None:
    """Give the same pair by pair, as a matrix, and in a search."""
    inputs, similarity = subject.inputs(), subject.make()
    a, b = inputs["a"], inputs["b"]
    matrix = similarity.matrix(a, b)
    require(matrix.shape == (len(a), len(b)), f"matrix has shape {list(matrix.shape)}")
    torch.testing.assert_close(
        similarity(a, b), matrix.diagonal(), msg="pairs differ from the matrix"
    )
    values, indices = similarity.search(a, b, 2)
    wanted = matrix.topk(2, dim=1)
    torch.testing.assert_close(values, wanted.values, msg="search does not find the most alike")
    torch.testing.assert_close(matrix.gather(1, indices), values, msg="indices do not fit")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [Check("pairs, matrix and search agree", agree)]
