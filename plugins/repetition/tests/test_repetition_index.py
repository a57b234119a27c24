"""The index, its bounds and the pairs behind it, beside enumeration and eigenvalues."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_repetition import (
    Transitions,
    repetition_bounds,
    repetition_index,
    sample_walks,
    truncate_transitions,
    worst_pairs,
)


def matrix(n: int, seed: int, *, zeros: float = 0.0, end: float = 0.1) -> Tensor:
    """Return a random decoder, some of its entries 0."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, n, generator=generator, dtype=torch.float64)
    p = p * (torch.rand(n, n, generator=generator) >= zeros)
    return (1 - end) * p / p.sum(1, keepdim=True).clamp(min=1e-9)


def by_enumeration(p: Tensor, lengths: int) -> float:
    total = 0.0
    for k in range(1, lengths + 1):
        for loop in itertools.product(range(len(p)), repeat=k):
            way = [*loop, *loop, loop[0]]
            total += math.prod(float(p[i, j]) for i, j in itertools.pairwise(way))
    return total


def by_eigenvalues(p: Tensor) -> float:
    found = np.linalg.eigvals((p * p).numpy())
    return float((found / (1 - found)).sum().real)


# -- the index ------------------------------------------------------------------------------------


def test_matches_the_enumeration_of_loops() -> None:
    p = 0.5 * matrix(3, 0)  # loops of more than 6 tokens have a probability of 1e-5 at most
    assert repetition_index(p).value == pytest.approx(by_enumeration(p, 7), rel=1e-5)
    found = repetition_bounds(p, lengths=4).by_length
    assert float(found.sum()) == pytest.approx(by_enumeration(p, 4), rel=1e-12)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(n=st.integers(1, 12), zeros=st.sampled_from([0.0, 0.5, 0.9]), seed=st.integers(0, 999))
def test_matches_eigenvalues_and_lies_within_its_bounds(n: int, zeros: float, seed: int) -> None:
    p = matrix(n, seed, zeros=zeros)
    index, bounds = repetition_index(p), repetition_bounds(p)
    assert index.value == pytest.approx(by_eigenvalues(p), rel=1e-9, abs=1e-9)
    root = float(np.abs(np.linalg.eigvals((p * p).numpy())).max())
    assert index.eigenvalue == pytest.approx(root, rel=1e-6, abs=1e-4 if zeros else 1e-9)
    low, high = index.eigenvalue_bounds
    assert low - 1e-12 <= index.eigenvalue <= high + 1e-12
    slack = 1 + 1e-9
    assert bounds.lower_trace <= slack * bounds.lower_diagonal
    assert bounds.lower_diagonal <= slack * index.value
    assert index.value <= slack * bounds.upper
    assert bounds.row_bounds[0] <= slack * index.eigenvalue
    assert index.eigenvalue <= slack * bounds.row_bounds[1]
    assert float(index.per_token.sum()) == pytest.approx(index.value)
    assert float(bounds.by_length.sum()) == pytest.approx(index.value, rel=1e-8, abs=1e-12)


def test_the_zeta_estimates_are_no_bounds() -> None:
    identity = 0.9 * torch.eye(10, dtype=torch.float64)
    bounds = repetition_bounds(identity)
    assert repetition_index(identity).value == pytest.approx(10 * 0.81 / 0.19)
    assert bounds.zeta_diagonal == pytest.approx(100 * 0.81 / 0.19)  # ten times R
    assert bounds.lower_trace == pytest.approx(10 * 0.81 / 0.19)
    assert bounds.nonzero == 0.1


@pytest.mark.parametrize("seed", range(4))
def test_the_counted_bound_is_the_index_of_greedy_decoding(seed: int) -> None:
    greedy = truncate_transitions(matrix(20, seed, end=0.0), top_k=1)
    greedy = greedy.replaced(0.9 * greedy.matrix)
    index, bounds = repetition_index(greedy), repetition_bounds(greedy)
    assert bounds.lower_diagonal == pytest.approx(index.value, rel=1e-9)
    assert max(bounds.zeta_diagonal, bounds.zeta_trace) > 2 * index.value


def test_bounds_of_uniform_rows_meet() -> None:
    n = 16
    even = torch.full((n, n), 1 / n)
    index, bounds = repetition_index(even), repetition_bounds(even)
    assert index.eigenvalue == pytest.approx(1 / n)
    assert bounds.row_bounds == pytest.approx((1 / n, 1 / n))
    assert index.value == pytest.approx(1 / (n - 1))
    assert bounds.lower_trace == pytest.approx(index.value)  # all loops are equally likely
    assert bounds.zeta_trace == pytest.approx(index.value)


def test_a_loop_that_is_never_left_is_infinite_and_named() -> None:
    p = torch.zeros(5, 5)
    p[0, 1], p[1, 3], p[3, 1], p[2, 0], p[4, 4] = 0.5, 1.0, 1.0, 1.0, 0.5
    index = repetition_index(p)
    assert index.value == math.inf
    assert index.eigenvalue == 1.0
    assert set(index.certain_loop) == {1, 3}
    assert index.per_token.tolist() == [0, math.inf, 0, math.inf, pytest.approx(1 / 3)]
    assert repetition_bounds(p).upper == math.inf
    worst = worst_pairs(p)
    assert worst.drop[:2].tolist() == [math.inf, math.inf]
    assert repetition_index(torch.ones(1, 1)).certain_loop == (0,)


def test_periodic_and_nearly_certain_loops_are_finite() -> None:
    p = torch.zeros(3, 3, dtype=torch.float64)
    p[0, 1], p[1, 2], p[2, 0] = 1.0, 1.0, 1 - 1e-6
    loop = float(p[2, 0]) ** 2
    assert repetition_index(p).value == pytest.approx(3 * loop / (1 - loop), rel=1e-6)
    assert repetition_index(p).eigenvalue == pytest.approx(loop ** (1 / 3), rel=1e-9)


def test_what_never_comes_back_does_not_repeat() -> None:
    p = torch.triu(matrix(6, 1), 1)
    index, bounds = repetition_index(p), repetition_bounds(p)
    assert (index.value, index.eigenvalue, bounds.upper) == (0.0, 0.0, 0.0)
    assert bounds.lower_diagonal == bounds.zeta_trace == 0.0
    assert worst_pairs(p).pairs.shape == (0, 2)


@pytest.mark.parametrize("size", [0, 1])
def test_no_token_and_one(size: int) -> None:
    p = torch.full((size, size), 0.5)
    assert repetition_index(p).value == pytest.approx(size / 3)
    assert repetition_bounds(p).lower_diagonal == pytest.approx(size / 3)
    assert len(worst_pairs(p).pairs) == size


def test_large_components_are_factorised_to_the_same() -> None:
    p = matrix(60, 2, zeros=0.9)
    dense, large = repetition_index(p), repetition_index(p, dense_limit=5)
    assert large.value == pytest.approx(dense.value, rel=1e-10)
    assert large.eigenvalue == pytest.approx(dense.eigenvalue, rel=1e-8)
    assert (large.per_token <= dense.per_token * (1 + 1e-12)).all()
    assert float(large.per_token.sum()) > 0.9 * dense.value
    exact, short = worst_pairs(p, 10), worst_pairs(p, 10, dense_limit=5)
    assert set(map(tuple, exact.pairs.tolist()[:3])) == set(map(tuple, short.pairs.tolist()[:3]))


def test_every_form_of_a_matrix_is_the_same() -> None:
    p = matrix(9, 3, zeros=0.5)
    turned = p.T.contiguous().T
    forms = [p.float(), turned, p.to_sparse(), p.numpy(), p.tolist()]
    forms += [sparse.csr_array(p.numpy()), sparse.coo_matrix(p.numpy()), Transitions.of(p)]
    wanted = repetition_index(p).value
    for form in forms:
        assert repetition_index(form).value == pytest.approx(wanted, rel=1e-6)
    rounded = p.numpy().round(4)
    assert repetition_index(rounded).value == pytest.approx(wanted, rel=1e-2)


# -- pairs ------------------------------------------------------------------------------------


def test_the_drop_of_a_pair_is_what_its_removal_makes() -> None:
    p = matrix(8, 4, zeros=0.4)
    p[7] = 0  # alone
    p[7, 7] = 0.6
    found, whole = worst_pairs(p, 100), repetition_index(p).value
    for (i, j), drop, probability in zip(
        found.pairs.tolist(), found.drop.tolist(), found.probability.tolist(), strict=True
    ):
        without = p.clone()
        without[i, j] = 0
        assert drop == pytest.approx(whole - repetition_index(without).value, rel=1e-9, abs=1e-13)
        assert probability == p[i, j]
    assert found.drop.tolist() == sorted(found.drop.tolist(), reverse=True)
    torch.testing.assert_close(found.inflow, p.sum(0)[found.pairs[:, 1]])


# -- truncation -----------------------------------------------------------------------------------


def test_truncation_keeps_what_it_says() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.2], [0.0, 0.3, 0.3, 0.0], [0, 0, 0, 0], [0, 0, 1.0, 0]])
    end = 1 - p.sum(1)
    assert end.tolist() == pytest.approx([0.1, 0.4, 1.0, 0.0])
    two = truncate_transitions(p, top_k=2).dense()
    wanted = torch.tensor([[0, 4 / 6, 2 / 6, 0], [0, 3 / 7, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(two.float(), wanted)
    nucleus = truncate_transitions(p, top_p=0.75).dense()
    wanted = torch.tensor([[0, 0.5, 0.25, 0.25], [0, 0.3, 0.3, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(nucleus.float(), wanted)
    assert truncate_transitions(p, top_k=1).matrix.nnz == 2  # the second row ends
    hot = truncate_transitions(p, temperature=0.5).dense()[0].float()
    squares = torch.tensor([0.1, 0.4, 0.2, 0.2]) ** 2
    torch.testing.assert_close(hot, squares / (squares.sum() + 0.01))
    torch.testing.assert_close(truncate_transitions(p).dense().float(), p)
    cold = truncate_transitions(p, temperature=1e-3).dense()
    assert torch.isfinite(cold).all()


def test_truncation_raises_the_index() -> None:
    p = matrix(30, 5, end=0.0)
    found = [repetition_index(truncate_transitions(p, top_k=k)).value for k in (0, 10, 3, 1)]
    assert found == sorted(found)
    assert found[-1] == math.inf


# -- walks ----------------------------------------------------------------------------------------


def test_walks_are_drawn_from_the_matrix() -> None:
    p = matrix(5, 6, zeros=0.3)
    walks = sample_walks(p, 4000, 12, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(5, 6)
    left, right = walks[:, :-1].flatten(), walks[:, 1:].flatten()
    kept = left >= 0
    counts.index_put_((left[kept], right[kept]), torch.ones(int(kept.sum())), accumulate=True)
    found = counts / counts.sum(1, keepdim=True)
    wanted = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1).float()
    assert (found - wanted).abs().max() < 0.03
    again = sample_walks(p, 4000, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(walks, again)
    assert sample_walks(p, 2, 0).shape == (2, 0)
    begun = sample_walks(p, 3, 4, start=torch.tensor([4, 0, 2]))
    assert begun[:, 0].tolist() == [4, 0, 2]


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, 3), r"square.*Found shape \[2, 3\]"),
        (torch.ones(2), "square"),
        (torch.tensor([[0.5, -0.1], [0, 0]]), r"probabilities. Found -0.1 at \[0, 1\]"),
        (torch.tensor([[0.5, 0.1], [math.nan, 0]]), r"Found nan at \[1, 0\]"),
        (torch.tensor([[0.5, 0.1], [0.9, 0.3]]), "at most 1.*Row 1 sums to 1.2"),
        ("text", "matrix of numbers"),
    ],
)
def test_rejects(wrong: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        repetition_index(wrong)
    assert caught.value.argument == "transitions"


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda p: truncate_transitions(p, temperature=0), "temperature"),
        (lambda p: truncate_transitions(p, top_k=-1), "top_k"),
        (lambda p: truncate_transitions(p, top_p=0), "top_p"),
        (lambda p: repetition_bounds(p, lengths=0), "lengths"),
        (lambda p: worst_pairs(p, -1), "num_pairs"),
        (lambda p: sample_walks(p, -1, 3), "num_walks"),
        (lambda p: sample_walks(p, 1, 3, start=torch.tensor([9])), "start"),
        (lambda p: Transitions.of(p, ["a"]), "tokens"),
    ],
)
def test_rejects_settings(call: object, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`") as caught:
        call(matrix(3, 0))  # type: ignore[operator]
    assert caught.value.argument == argument
