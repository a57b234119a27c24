"""The combinatorial softmax against enumeration, and its limits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kexue.core.errors import ArgumentError
from kexue_zlpr import SubsetSoftmax


def sums(scores: Tensor, count: int) -> Tensor:
    """The total score of every subset of so many classes."""
    chosen = list(itertools.combinations(range(len(scores)), count))
    return scores[torch.tensor(chosen, dtype=torch.long).view(len(chosen), count)].sum(-1)


def log_partition(scores: Tensor, size: int, *, at_most: bool, threshold: float) -> Tensor:
    """Z_k by enumeration; Z-bar_K as the post defines it, with a class that may be repeated."""
    if not at_most:
        return sums(scores, size).logsumexp(0)
    filled = [sums(scores, j) + (size - j) * threshold for j in range(min(size, len(scores)) + 1)]
    return torch.cat(filled).logsumexp(0)


def naive(
    logits: Tensor, target: Tensor, size: int, *, at_most: bool = False, threshold: float = 0.0
) -> Tensor:
    rows = []
    for scores, labels in zip(logits.double(), target, strict=True):
        partition = log_partition(scores, size, at_most=at_most, threshold=threshold)
        rest = (size - int(labels.sum())) * threshold
        rows.append(partition - scores[labels].sum() - rest)
    return torch.stack(rows)


def labels_of(rows: int, classes: int, count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, classes, generator=generator).argsort(-1)
    return order < count


def scores_of(rows: int, classes: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale


def build(size: int, *, at_most: bool, threshold: float = 0.0) -> SubsetSoftmax:
    if at_most:
        return SubsetSoftmax(max_labels=size, threshold=threshold, reduction="none")
    return SubsetSoftmax(size, reduction="none")


def log_space_recursion(scores: Tensor, count: int) -> Tensor:
    """E_k <- E_k + e^s E_{k-1}, class by class: stable, and slow."""
    table = torch.full((count + 1,), -math.inf, dtype=scores.dtype)
    table[0] = 0.0
    for s in scores:
        table[1:] = torch.logaddexp(table[1:], table[:-1] + s)
    return table[count]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 9),
    size=st.integers(1, 9),
    at_most=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 20.0, 500.0]),
    seed=st.integers(0, 999),
)
def test_matches_enumeration(
    classes: int, size: int, at_most: bool, scale: float, seed: int
) -> None:
    size = size if at_most else min(size, classes)
    logits = scores_of(2, classes, seed=seed, scale=scale).requires_grad_()
    target = labels_of(2, classes, min(size, classes) - (seed % 2 if at_most else 0), seed=seed)
    threshold = 0.7 if at_most else 0.0
    found = build(size, at_most=at_most, threshold=threshold)(logits, target)
    expected = naive(logits, target, size, at_most=at_most, threshold=threshold)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slope, wanted = (torch.autograd.grad(v.sum(), logits)[0] for v in (found, expected))
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-11)


def test_matches_enumeration_to_1e_10_for_three_of_ten() -> None:
    logits, target = scores_of(5, 10), labels_of(5, 10, 3)
    found = SubsetSoftmax(3, reduction="none")(logits, target)
    torch.testing.assert_close(found, naive(logits, target, 3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("at_most", [False, True])
def test_gradient(at_most: bool) -> None:
    loss = build(2, at_most=at_most, threshold=0.3 if at_most else 0.0)
    logits, target = scores_of(3, 5).requires_grad_(), labels_of(3, 5, 2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, (~target[0]).nonzero()[0]] = False
    for rest in ((target,), (target, mask)):
        assert gradcheck(lambda s, rest=rest: loss(s, *rest), logits)
        assert gradgradcheck(lambda s, rest=rest: loss(s, *rest), logits)


def test_gradient_of_the_threshold() -> None:
    logits, target = scores_of(3, 6), labels_of(3, 6, 2)
    loss = SubsetSoftmax(max_labels=3, threshold=0.5, learnable=True, reduction="sum")
    loss(logits, target).backward()
    step = 1e-5
    high, low = (
        naive(logits, target, 3, at_most=True, threshold=0.5 + d).sum() for d in (step, -step)
    )
    (parameter,) = loss.parameters()
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(((high - low) / (2 * step)).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reduces_to_cross_entropy_with_one_label(dtype: torch.dtype) -> None:
    logits, label = scores_of(8, 7).to(dtype), torch.arange(8) % 7
    target = torch.nn.functional.one_hot(label, 7)
    expected = torch.nn.functional.cross_entropy(logits, label)
    torch.testing.assert_close(SubsetSoftmax(1)(logits, target), expected)


@pytest.mark.parametrize("size", [6, 9])
def test_reduces_to_binary_cross_entropies_without_a_bound(size: int) -> None:
    logits, target = scores_of(4, 6), labels_of(4, 6, 3)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target.double(), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(build(size, at_most=True)(logits, target), expected)


def test_all_labels_are_certain() -> None:
    logits = scores_of(3, 5).requires_grad_()
    value = SubsetSoftmax(5)(logits, torch.ones(3, 5))
    value.backward()
    assert value.abs() < 1e-14
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-14


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("classes", "count"), [(1000, 5), (10_000, 50), (100, 99), (37, 18)])
def test_marginals_are_probabilities_that_sum_to_the_number_of_labels(
    classes: int, count: int, scale: float
) -> None:
    logits = scores_of(3, classes, scale=scale).float()
    found = SubsetSoftmax(count).marginals(logits)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(
        found.double().sum(-1), torch.full((3,), float(count)).double(), rtol=2e-5, atol=0
    )


def test_marginals_match_enumeration() -> None:
    scores = scores_of(1, 6)[0]
    weights = sums(scores, 3).softmax(0)
    expected = torch.zeros(6, dtype=torch.float64)
    for weight, chosen in zip(weights, itertools.combinations(range(6), 3), strict=True):
        expected[list(chosen)] += weight
    torch.testing.assert_close(SubsetSoftmax(3).marginals(scores[None])[0], expected)


@pytest.mark.parametrize(("classes", "count"), [(50, 10), (1000, 20), (301, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_stable_where_newtons_identities_break(
    classes: int, count: int, dtype: torch.dtype
) -> None:
    logits, target = scores_of(1, classes, scale=5.0), labels_of(1, classes, count)
    power = [(i * logits[0]).exp().sum() for i in range(count + 1)]
    newton = [logits.new_ones(())]  # k Z_k = sum_i (-1)^(i-1) Z_{k-i} S_i
    for k in range(1, count + 1):
        terms = [(-1) ** (i - 1) * newton[k - i] * power[i] for i in range(1, k + 1)]
        newton.append(torch.stack(terms).sum() / k)
    exact = log_space_recursion(logits[0], count)
    assert not (newton[-1].log() - exact).abs() < 0.01  # wrong, negative, or NaN, in float64
    found = SubsetSoftmax(count)(logits.to(dtype), target)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = (exact - logits[target].sum()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_are_finite(dtype: torch.dtype, at_most: bool) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4] * 4, [1e4] * 4], dtype=dtype)
    logits.requires_grad_()
    target = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    found = build(2, at_most=at_most)(logits, target)
    found.sum().backward()
    expected = naive(logits.detach(), target.bool(), 2, at_most=at_most)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gradient_is_precise_at_convergence() -> None:
    logits = torch.tensor([[20.0, 20.0, -20.0, -20.0]], requires_grad=True)
    SubsetSoftmax(2)(logits, torch.tensor([[1, 1, 0, 0]])).backward()
    rare = 2 * math.exp(-40)  # either label gives way to either other
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad, torch.tensor([[-rare, -rare, rare, rare]]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("by", ["mask", "-inf"])
def test_masked_classes_are_in_no_subset(by: str, at_most: bool) -> None:
    keep = torch.tensor([True, False, True, True, False, True, True])
    loss = build(2, at_most=at_most)
    logits, target = scores_of(4, 7), torch.zeros(4, 7, dtype=torch.bool)
    target[:, keep] = labels_of(4, 5, 2)
    expected = loss(logits[:, keep], target[:, keep])
    marginals = loss.marginals(logits[:, keep])
    if by == "mask":
        logits[:, ~keep] = math.nan
        target[:, ~keep] = True
        mask = keep.expand(4, 7)
        found, odds = loss(logits, target, mask), loss.marginals(logits, mask=mask)
    else:
        logits[:, ~keep] = -math.inf
        found, odds = loss(logits, target), loss.marginals(logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(odds[:, keep], marginals)
    assert (odds[:, ~keep] == 0).all()


def test_as_many_classes_as_labels_behind_a_mask() -> None:
    logits = scores_of(2, 5).requires_grad_()
    target = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    value = SubsetSoftmax(2)(logits, target, target.bool())
    value.backward()
    assert value.abs() < 1e-14
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-14


def test_nan_logits_propagate_to_their_row_only() -> None:
    logits, target = scores_of(3, 6).requires_grad_(), labels_of(3, 6, 2)
    broken = logits.index_fill(1, torch.tensor([2]), math.nan)
    mixed = torch.where(torch.tensor([[False], [True], [False]]), broken, logits)
    found = SubsetSoftmax(2, reduction="none")(mixed, target)
    assert found.isnan().tolist() == [False, True, False]


def test_handles_leading_axes_and_an_empty_batch() -> None:
    logits, target = scores_of(6, 5), labels_of(6, 5, 2)
    rows = SubsetSoftmax(2, reduction="none")(logits, target)
    cube = SubsetSoftmax(2, reduction="none")(logits.view(2, 3, 5), target.view(2, 3, 5))
    torch.testing.assert_close(cube.flatten(), rows)
    torch.testing.assert_close(SubsetSoftmax(2)(logits[0], target[0]), rows[0])
    torch.testing.assert_close(SubsetSoftmax(2)(logits, target), rows.mean())
    leaf = logits[:0].clone().requires_grad_()
    SubsetSoftmax(2)(leaf, target[:0]).backward()
    assert SubsetSoftmax(2).marginals(leaf).shape == (0, 5)


def test_handles_non_contiguous_inputs_and_leaves_them_alone() -> None:
    logits, target = scores_of(4, 6), labels_of(4, 6, 2)
    before = logits.clone(), target.clone()
    expected = SubsetSoftmax(2)(logits, target)
    turned = SubsetSoftmax(2)(logits.t().contiguous().t(), target.t().contiguous().t())
    torch.testing.assert_close(turned, expected)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


def test_autocast_changes_nothing() -> None:
    logits, target = scores_of(2, 100).float(), labels_of(2, 100, 4)
    expected = SubsetSoftmax(4)(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(SubsetSoftmax(4)(logits, target), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiled_equals_eager() -> None:
    logits, target = scores_of(3, 5).requires_grad_(), labels_of(3, 5, 2)
    compiled = torch.compile(SubsetSoftmax(2), backend="aot_eager")
    found, expected = compiled(logits, target), SubsetSoftmax(2)(logits, target)
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    torch.testing.assert_close(*slopes)


def test_copies_and_saves() -> None:
    logits, target = scores_of(3, 5), labels_of(3, 5, 2)
    loss = SubsetSoftmax(max_labels=3, threshold=0.5, learnable=True)
    other = SubsetSoftmax(max_labels=3, learnable=True)
    other.load_state_dict(loss.state_dict())
    thawed = pickle.loads(pickle.dumps(loss))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(loss), thawed, other):
        assert torch.equal(twin(logits, target), loss(logits, target))
    assert "max_labels=3, threshold=0.5, learnable=True" in repr(loss)
    assert repr(SubsetSoftmax(2)) == "SubsetSoftmax(num_labels=2, reduction='mean')"


@pytest.mark.parametrize(
    ("params", "argument", "message"),
    [
        ({}, "num_labels", "must be given, not both. Found None and None"),
        ({"num_labels": 1, "max_labels": 2}, "num_labels", "not both. Found 1 and 2"),
        ({"num_labels": 0}, "num_labels", "integer of at least 1. Found 0"),
        ({"max_labels": 2.5}, "max_labels", "integer of at least 1. Found 2.5"),
        ({"num_labels": 2, "threshold": 1.0}, "threshold", "Found 1.0. Use `max_labels`"),
        ({"num_labels": 2, "learnable": True}, "threshold", "not learnable with `num_labels`"),
    ],
)
def test_rejects_arguments(params: dict[str, float], argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        SubsetSoftmax(**params)  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_rejects_more_labels_than_classes() -> None:
    with pytest.raises(ArgumentError, match=r"at most the number of classes, 3\. Found 4"):
        SubsetSoftmax(4)(torch.zeros(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (SubsetSoftmax(2), [[1, 1, 0], [1, 0, 0]], r"exactly .* = 2 .* Found 1 in row \[1\]"),
        (SubsetSoftmax(max_labels=1), [[1, 1, 0], [0, 0, 0]], r"at most .* Found 2 in row \[0\]"),
        (SubsetSoftmax(1), [[1, 0, 0], [0, 0.5, 0]], r"0 or 1. Found 0.5 at position \[1, 1\]"),
        (SubsetSoftmax(1), [[1, 0], [0, 1]], r"\[2, 3\]. Found \[2, 2\]"),
    ],
)
def test_rejects_targets(loss: SubsetSoftmax, target: list[list[float]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        loss(torch.zeros(2, 3), torch.tensor(target))
    assert caught.value.argument == "target"


def test_rejects_masked_labels() -> None:
    target = torch.tensor([[True, True, False]])
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ArgumentError, match="Found 1 in row"):
        SubsetSoftmax(2)(torch.zeros(1, 3), target, mask)
