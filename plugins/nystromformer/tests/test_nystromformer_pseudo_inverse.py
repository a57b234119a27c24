"""The iteration of the paper, against the formula as it is written and against the SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue_nystromformer import pseudo_inverse


def stochastic(*shape: int, seed: int = 0) -> Tensor:
    """Return matrices whose rows sum to one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


def as_written(matrix: Tensor, iterations: int) -> Tensor:
    """The post's formula for one matrix, the factored form of the two that it gives."""
    inverse = matrix.T / (matrix.abs().sum(0).max() * matrix.abs().sum(1).max())
    eye = torch.eye(len(inverse), dtype=matrix.dtype)
    for _ in range(iterations):
        rest = eye - inverse @ matrix
        inverse = (eye + rest @ torch.linalg.matrix_power(3 * eye - inverse @ matrix, 2) / 4) @ (
            inverse
        )
    return inverse


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4), (1, 1)])
@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_is_the_formula(shape: tuple[int, int], iterations: int) -> None:
    matrices = torch.stack([stochastic(*shape, seed=s) for s in range(3)]) - 0.1
    wanted = torch.stack([as_written(a, iterations) for a in matrices])
    torch.testing.assert_close(pseudo_inverse(matrices, iterations), wanted)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_converges_to_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    matrix = stochastic(2, 3, *shape)
    wanted = torch.linalg.pinv(matrix)
    errors = [float((pseudo_inverse(matrix, n) - wanted).abs().max()) for n in (4, 8, 25)]
    after = [max(error, 1e-10) for error in errors]  # below, it is rounding that decides
    assert after[0] > after[2]
    assert after == sorted(after, reverse=True)
    torch.testing.assert_close(pseudo_inverse(matrix, 25), wanted)


def test_singular_matrices_have_a_pseudo_inverse() -> None:
    for matrix in (torch.full((4, 4), 0.25), torch.zeros(3, 3), torch.eye(5)):
        torch.testing.assert_close(pseudo_inverse(matrix, 12), torch.linalg.pinv(matrix))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_the_start_is_within_reach(size: int, seed: int) -> None:
    """‖I − A V₀‖₂ < 1, up to rounding, which is what the post asks of a start."""
    matrix = stochastic(size, size, seed=seed)
    residual = torch.eye(size, dtype=torch.float64) - matrix @ pseudo_inverse(matrix, 0)
    assert float(torch.linalg.matrix_norm(residual, 2)) < 1


def test_each_matrix_is_scaled_by_itself() -> None:
    large, small = 100 * stochastic(5, 5), stochastic(5, 5, seed=1)
    both = pseudo_inverse(torch.stack([large, small]))
    assert torch.equal(both[1], pseudo_inverse(small))
    torch.testing.assert_close(both[0], pseudo_inverse(large / 100) / 100)


def test_gradient() -> None:
    matrix = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix.requires_grad_()  # no two sums are equal, so that the norms have a gradient
    assert torch.autograd.gradcheck(pseudo_inverse, (matrix,))


def test_no_matrices() -> None:
    assert pseudo_inverse(torch.zeros(0, 3, 2)).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("matrix", "iterations", "message"),
    [
        (torch.ones(3), 6, r"`matrix` of pseudo_inverse must be floating-point .*\[3\]"),
        (torch.ones(3, 3, dtype=torch.int64), 6, "Found torch.int64"),
        (torch.ones(3, 3), -1, "`iterations` of pseudo_inverse must be .* at least 0. Found -1"),
    ],
)
def test_rejects(matrix: Tensor, iterations: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pseudo_inverse(matrix, iterations)
