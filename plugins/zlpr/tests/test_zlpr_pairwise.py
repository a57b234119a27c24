"""The unified pairwise form."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kexue.core.errors import ArgumentError
from kexue_zlpr import PairwiseSoftmax


def naive(logits: Tensor, target: Tensor, gamma: float = 1.0, margin: float = 0.0) -> Tensor:
    """Circle loss Eq. (1) as a sum over all pairs, in float64."""
    s = logits.double()
    pairs = (gamma * (s[..., :, None] - s[..., None, :] + margin)).exp()
    count = (~target)[..., :, None] & target[..., None, :]
    return (1 + (pairs * count).sum((-2, -1))).log()


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    return logits, torch.rand(*shape, generator=generator) < 0.4


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4),
    classes=st.integers(1, 7),
    gamma=st.sampled_from([1.0, 0.25, 4.0]),
    margin=st.sampled_from([0.0, 0.5, -1.0]),
    seed=st.integers(0, 999),
)
def test_matches_the_sum_over_pairs(
    rows: int, classes: int, gamma: float, margin: float, seed: int
) -> None:
    logits, target = batch(rows, classes, seed=seed)
    leaf = logits.clone().requires_grad_()
    found = PairwiseSoftmax(gamma, margin, reduction="none")(leaf, target)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    expected = naive(leaf, target, gamma, margin)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)


def test_gradient() -> None:
    logits, target = batch(3, 5)
    mask = batch(3, 5, seed=3)[1] | target
    loss = PairwiseSoftmax(2.0, 0.25, reduction="none")
    logits.requires_grad_()
    assert gradcheck(lambda s: loss(s, target, mask), logits)
    assert gradgradcheck(lambda s: loss(s, target, mask), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_reduces_to_cross_entropy_with_one_positive(dtype: torch.dtype, scale: float) -> None:
    logits = batch(8, 6)[0].to(dtype) * scale
    label = torch.arange(8) % 6
    leaf = logits.clone().requires_grad_()
    found = PairwiseSoftmax()(leaf, torch.nn.functional.one_hot(label, 6))
    expected = torch.nn.functional.cross_entropy(logits, label)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, leaf)
    softmax = (logits.softmax(-1) - torch.nn.functional.one_hot(label, 6)) / 8
    torch.testing.assert_close(slope, softmax, rtol=1e-5, atol=1e-7)


def test_is_invariant_under_a_shift_of_all_scores() -> None:
    logits, target = batch(4, 6)
    torch.testing.assert_close(
        PairwiseSoftmax()(logits + 7, target), PairwiseSoftmax()(logits, target)
    )


def test_is_zero_where_there_is_no_pair() -> None:
    logits = batch(2, 4)[0].requires_grad_()
    target = torch.tensor([[1] * 4, [0] * 4])
    value = PairwiseSoftmax()(logits, target)
    (slope,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert (slope == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    value = PairwiseSoftmax()(logits, torch.tensor([[0, 1, 0]]))
    value.backward()
    assert value.item() == 2 * logits[0, 0].item()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1, 0]]


def test_masked_classes_are_in_no_pair() -> None:
    logits, target = batch(4, 6)
    keep = torch.tensor([True, True, False, True, False, True])
    expected = PairwiseSoftmax(2.0)(logits[:, keep], target[:, keep])
    logits[:, ~keep] = math.nan
    found = PairwiseSoftmax(2.0)(logits, target, keep.expand(4, 6))
    torch.testing.assert_close(found, expected)


def test_nan_logits_propagate_and_an_empty_batch_is_zero() -> None:
    logits, target = batch(3, 4)
    logits[1, 0] = math.nan
    found = PairwiseSoftmax(reduction="none")(logits, target)
    assert found.isnan().tolist() == [False, True, False]
    assert PairwiseSoftmax()(logits[:0], target[:0]) == 0


def test_copies() -> None:
    logits, target = batch(3, 4)
    loss = PairwiseSoftmax(2.0, 0.5)
    thawed = pickle.loads(pickle.dumps(loss))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(loss), thawed):
        assert torch.equal(twin(logits, target), loss(logits, target))
    assert repr(loss) == "PairwiseSoftmax(gamma=2, margin=0.5, reduction='mean')"


def test_rejects_soft_targets() -> None:
    target = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    with pytest.raises(ArgumentError, match=r"0 or 1. Found 0.5 at position \[1, 0\]"):
        PairwiseSoftmax()(torch.zeros(2, 2), target)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_rejects_gamma(gamma: float) -> None:
    with pytest.raises(ArgumentError, match="`gamma` of PairwiseSoftmax must be a positive"):
        PairwiseSoftmax(gamma)


def test_rejects_margins_and_shapes() -> None:
    with pytest.raises(ArgumentError, match="`margin` of PairwiseSoftmax must be a finite number"):
        PairwiseSoftmax(1.0, math.inf)
    with pytest.raises(ArgumentError, match=r"`target` of PairwiseSoftmax .*Found \[3\]"):
        PairwiseSoftmax()(torch.zeros(2, 3), torch.zeros(3))
