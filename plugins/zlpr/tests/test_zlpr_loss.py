"""ZLPR on dense targets: value, gradient, limits, edges, errors."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kexue.core.errors import ArgumentError
from kexue_zlpr import ZLPR

INF = math.inf


def naive(logits: Tensor, target: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    """The formula of posts 7359 and 9064 as it stands, in float64."""
    s, t = logits.double(), target.double()
    zero = torch.as_tensor(threshold).double()
    negatives = ((1 - t) * s.exp()).sum(-1)
    positives = (t * (-s).exp()).sum(-1)
    return (zero.exp() + negatives).log() + ((-zero).exp() + positives).log()


def batch(
    *shape: int, seed: int = 0, density: float = 0.4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    return logits.to(dtype), torch.rand(*shape, generator=generator) < density


def gradient(loss: Callable[..., Tensor], logits: Tensor, *rest: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest).sum(), leaf)[0]


@pytest.mark.parametrize("threshold", [0.0, 1.5, -3.0])
@pytest.mark.parametrize("soft", [False, True])
@settings(derandomize=True, max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), classes=st.integers(1, 7), seed=st.integers(0, 999))
def test_matches_the_naive_formula(
    rows: int, classes: int, seed: int, soft: bool, threshold: float
) -> None:
    logits, target = batch(rows, classes, seed=seed)
    if soft:
        target = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    leaf = logits.clone().requires_grad_()
    expected = naive(leaf, target, threshold)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    loss = ZLPR(threshold, reduction="none")
    torch.testing.assert_close(loss(logits, target), expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(loss, logits, target), slope, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("soft", [False, True])
def test_gradient(soft: bool) -> None:
    logits, target = batch(3, 5)
    weights = target * 0.8 + 0.1 if soft else target
    mask = batch(3, 5, seed=1, density=0.8)[1]
    loss = ZLPR(0.5, reduction="none")
    logits.requires_grad_()
    assert gradcheck(lambda s: loss(s, weights), logits)
    assert gradcheck(lambda s: loss(s, weights, mask), logits)
    assert gradgradcheck(lambda s: loss(s, weights), logits)
    assert gradgradcheck(lambda s: loss(s, weights, mask), logits)


def test_second_derivative_of_rows_without_one_of_the_sides() -> None:
    logits = batch(2, 4)[0].requires_grad_()
    target = torch.tensor([[True] * 4, [False] * 4])
    assert gradgradcheck(lambda s: ZLPR()(s, target), logits)


def test_gradient_of_the_threshold() -> None:
    logits, target = batch(4, 6)
    loss = ZLPR(0.7, learnable=True, reduction="sum").double()
    loss(logits, target).backward()
    zero = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(naive(logits, target, zero).sum(), zero)
    (found,) = (parameter.grad for parameter in loss.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_learnable_threshold_serves_scores_of_any_precision() -> None:
    logits, target = batch(4, 6)
    loss = ZLPR(0.5, learnable=True)
    assert loss(logits, target).dtype == torch.float64
    assert loss(logits.half(), target).dtype == torch.float32
    torch.testing.assert_close(loss(logits, target), ZLPR(0.5)(logits, target))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64]
)
def test_target_may_have_any_dtype(dtype: torch.dtype) -> None:
    logits, target = batch(5, 7, dtype=torch.float32)
    expected = ZLPR()(logits, target)
    torch.testing.assert_close(ZLPR()(logits, target.to(dtype)), expected, rtol=0, atol=0)


def test_soft_targets_reduce_to_hard_ones_at_zero_and_one() -> None:
    logits, target = batch(5, 7)
    hard = target.double()
    nearly = (hard * (1 - 2e-12) + 1e-12).clone()
    torch.testing.assert_close(ZLPR()(logits, nearly), ZLPR()(logits, hard), rtol=1e-9, atol=0)


def test_soft_minimum_is_at_half_the_logit() -> None:
    target = torch.tensor([[0.1, 0.5, 0.9, 0.001], [0.3, 0.7, 0.999, 0.5]], dtype=torch.float64)
    at_minimum = 0.4 + target.logit() / 2
    loss = ZLPR(0.4)
    assert gradient(loss, at_minimum, target).abs().max() < 1e-15
    noise = torch.randn(20, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lowest = loss(at_minimum, target)
    assert all(loss(at_minimum + 0.1 * step, target) > lowest for step in noise)


def test_one_positive_is_its_binary_loss_plus_softmax_against_the_threshold_class() -> None:
    logits, label = batch(6, 5)[0], torch.arange(6) % 5
    target = torch.nn.functional.one_hot(label, 5)
    binary = torch.nn.functional.softplus(-logits[torch.arange(6), label])
    others = logits.masked_fill(target.bool(), -INF)
    with_zero = torch.cat([torch.zeros(6, 1, dtype=torch.float64), others], dim=1)
    against = torch.nn.functional.cross_entropy(
        with_zero, torch.zeros(6, dtype=torch.long), reduction="none"
    )
    torch.testing.assert_close(ZLPR(reduction="none")(logits, target), binary + against)


def test_reduces_to_binary_cross_entropy_with_one_class() -> None:
    logits, target = batch(9, 1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.double())
    torch.testing.assert_close(ZLPR()(logits, target), expected)


def test_is_the_binary_cross_entropies_without_the_higher_products() -> None:
    logits, target = batch(3, 4)  # post 9064, Eq. (2)
    binary = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target.double(), reduction="none"
    ).sum(-1)
    assert (ZLPR(reduction="none")(logits, target) < binary).all()


def test_shifting_scores_and_threshold_changes_nothing() -> None:
    logits, target = batch(3, 4)
    torch.testing.assert_close(ZLPR(2.5)(logits + 2.5, target), ZLPR()(logits, target))


def test_keeps_relative_precision_at_convergence() -> None:
    logits = torch.tensor([[20.0, -20.0, -20.0, -20.0]])
    target = torch.tensor([[1, 0, 0, 0]])
    expected = 4 * math.exp(-20)  # 8.2e-9
    assert ZLPR()(logits, target).item() == pytest.approx(expected, rel=1e-5)
    slope = gradient(ZLPR(), logits, target)
    torch.testing.assert_close(
        slope, math.exp(-20) * torch.tensor([[-1.0, 1, 1, 1]]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_are_finite_and_right(dtype: torch.dtype) -> None:
    scale = 1e4
    logits = torch.tensor([[scale, -scale, 2.0], [-scale, scale, -scale]], dtype=dtype)
    target = torch.tensor([[0, 1, 0], [0, 1, 0]])
    exact = logits.double()
    expected = torch.stack([exact[0, 0] - exact[0, 1], exact.new_zeros(())])
    found = ZLPR(reduction="none")(logits, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    slope = gradient(ZLPR(), logits, target) * 2
    expected = torch.tensor([[1.0, -1, 0], [0, 0, 0]], dtype=dtype)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    logits, target = batch(4, 5000, density=0.01, dtype=dtype)
    found = ZLPR(reduction="none")(logits, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(logits, target), rtol=1e-5, atol=0)
    assert gradient(ZLPR(), logits, target).dtype == dtype


def test_autocast_changes_nothing() -> None:
    logits, target = batch(4, 300, density=0.05, dtype=torch.float32)
    logits.requires_grad_()
    expected = ZLPR()(logits, target)
    (slope,) = torch.autograd.grad(expected, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ZLPR()(logits, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], slope, rtol=0, atol=0)


def test_handles_rows_without_positives_and_without_negatives() -> None:
    logits = batch(2, 4)[0]
    target = torch.tensor([[0] * 4, [1] * 4])
    expected = torch.stack([logits[0].exp().sum().log1p(), (-logits[1]).exp().sum().log1p()])
    torch.testing.assert_close(ZLPR(reduction="none")(logits, target), expected)
    slope = gradient(ZLPR(reduction="sum"), logits, target)
    assert (slope[0] > 0).all()
    assert (slope[1] < 0).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("by", ["mask", "-inf"])
def test_masked_classes_are_in_neither_sum(by: str, soft: bool) -> None:
    logits, hard = batch(6, 8)
    target = hard.double() * 0.9 + 0.05 if soft else hard.double()
    keep = torch.tensor([True, False, True, True, False, True, True, False])
    expected = ZLPR(reduction="none")(logits[:, keep], target[:, keep])
    slope = gradient(ZLPR(), logits[:, keep], target[:, keep])
    if by == "mask":
        logits[:, ~keep] = torch.tensor([math.nan, INF, -INF], dtype=torch.float64)
        target[:, ~keep] = torch.tensor([-1.0, math.nan, 7.0], dtype=torch.float64)
        rest: tuple[Tensor, ...] = (target, keep.expand(6, 8))
    else:
        logits[:, ~keep] = -INF
        rest = (target,)
    torch.testing.assert_close(ZLPR(reduction="none")(logits, *rest), expected)
    found = gradient(ZLPR(), logits, *rest)
    torch.testing.assert_close(found[:, keep], slope)
    assert (found[:, ~keep] == 0).all()


def test_a_row_with_every_class_masked_is_zero() -> None:
    logits, target = batch(2, 3)
    mask = torch.tensor([[False] * 3, [True] * 3])
    found = ZLPR(reduction="none")(logits, target, mask)
    assert found[0] == 0
    assert (gradient(ZLPR(), logits, target, mask)[0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_nan_logits_propagate_to_their_row_only(value: float, soft: bool) -> None:
    logits, hard = batch(3, 4)
    target = hard.double()
    target[1, 2] = value
    if soft:
        target[0, 0] = 0.25
    logits[1, 2] = math.nan
    found = ZLPR(reduction="none")(logits, target)
    assert found.isnan().tolist() == [False, True, False]
    assert gradient(ZLPR(), logits, target)[[0, 2]].isfinite().all()


def test_reductions() -> None:
    logits, target = batch(2, 3, 5)
    rows = ZLPR(reduction="none")(logits, target)
    assert rows.shape == (2, 3)
    torch.testing.assert_close(ZLPR(reduction="sum")(logits, target), rows.sum())
    torch.testing.assert_close(ZLPR()(logits, target), rows.mean())


def test_handles_any_leading_axes() -> None:
    logits, target = batch(2, 3, 5)
    rows = ZLPR(reduction="none")(logits, target)
    flat = ZLPR(reduction="none")(logits.flatten(0, 1), target.flatten(0, 1))
    torch.testing.assert_close(rows.flatten(), flat)
    torch.testing.assert_close(ZLPR()(logits[1, 2], target[1, 2]), rows[1, 2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_handles_an_empty_batch(dtype: torch.dtype) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    target = torch.zeros(0, 4, dtype=dtype)
    assert ZLPR(reduction="none")(logits, target).shape == (0,)
    value = ZLPR()(logits, target)
    value.backward()
    assert value == 0


def test_handles_non_contiguous_and_expanded_inputs() -> None:
    logits, target = batch(5, 6)
    mask = batch(5, 6, seed=3, density=0.7)[1]
    expected = ZLPR(reduction="none")(logits, target, mask)
    turned = [t.t().contiguous().t() for t in (logits, target, mask)]
    torch.testing.assert_close(ZLPR(reduction="none")(*turned), expected)
    for row in (target[:1], target[:1].double(), target[:1] * 0.5):
        single = ZLPR(reduction="none")(logits[:1], row)
        wide = ZLPR(reduction="none")(logits[:1].expand(3, 6), row.expand(3, 6))
        torch.testing.assert_close(wide, single.expand(3), rtol=0, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_does_not_modify_inputs(soft: bool) -> None:
    logits, target = batch(4, 6)
    target = target * 0.5 if soft else target.double()
    mask = batch(4, 6, seed=3, density=0.7)[1]
    inputs = (logits, target, mask)
    before = [t.clone() for t in inputs]
    gradient(ZLPR(), *inputs)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_backward_can_be_repeated() -> None:
    logits, target = batch(4, 6)
    logits.requires_grad_()
    value = ZLPR()(logits, target)
    first = torch.autograd.grad(value, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, logits)[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiled_equals_eager() -> None:
    logits, target = batch(4, 6, dtype=torch.float32)
    loss = ZLPR(0.5)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))
    torch.testing.assert_close(gradient(compiled, logits, target), gradient(loss, logits, target))


def test_copies_and_saves() -> None:
    logits, target = batch(4, 6, dtype=torch.float32)
    loss = ZLPR(0.5, learnable=True, reduction="sum")
    expected = loss(logits, target)
    other = ZLPR(learnable=True, reduction="sum")
    other.load_state_dict(loss.state_dict())
    thawed = pickle.loads(pickle.dumps(loss))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(loss), thawed, other):
        torch.testing.assert_close(twin(logits, target), expected, rtol=0, atol=0)
    assert not ZLPR(0.5).state_dict()
    assert repr(loss) == "ZLPR(threshold=0.5, learnable=True, reduction='sum')"


def test_warns_once_of_probabilities() -> None:
    logits, target = batch(4, 6)
    loss = ZLPR()
    with pytest.warns(UserWarning, match="lie between 0 and 1") as caught:
        loss(logits.sigmoid(), target)
    assert caught[0].filename == __file__
    loss(logits.sigmoid(), target)  # warnings are errors here


def test_does_not_warn_of_scores() -> None:
    logits, target = batch(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZLPR()(logits, target)
        ZLPR()(torch.zeros_like(logits), target)
        ZLPR()(logits[:1, :2].sigmoid(), target[:1, :2])


def test_pinned_value() -> None:
    logits = torch.tensor([[2.0, -1.0, -3.0], [-2.0, 0.0, 1.0]])  # a regression check only
    found = ZLPR()(logits, torch.tensor([[1, 0, 0], [0, 1, 1]]))
    assert found.item() == pytest.approx(0.7324315, rel=1e-5)


LOGITS = torch.zeros(2, 3)
TARGET = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("inputs", "argument", "message"),
    [
        ((LOGITS.long(), TARGET), "logits", "floating point. Found torch.int64"),
        ((torch.zeros(2, 0), torch.zeros(2, 0)), "logits", r"at least one class. Found \[2, 0\]"),
        ((torch.tensor(1.0), torch.tensor(1)), "logits", r"Found \[\]"),
        ((LOGITS, TARGET[:, :2]), "target", r"\[2, 3\]. Found \[2, 2\]"),
        ((LOGITS, torch.tensor([0, 1])), "target", r"\[2, 3\]. Found \[2\]"),
        ((LOGITS, LOGITS.to(torch.complex64)), "target", "Found torch.complex64"),
        ((LOGITS, LOGITS.clone().requires_grad_()), "target", "target.detach"),
        ((LOGITS, TARGET.to("meta")), "target", "device of `logits`, cpu. Found meta"),
        ((LOGITS, TARGET, TARGET.int()), "mask", "boolean.*Found torch.int32"),
        ((LOGITS, TARGET, TARGET[:1]), "mask", r"\[2, 3\]. Found \[1, 3\]"),
    ],
)
def test_rejects_what_does_not_fit(inputs: tuple[Tensor, ...], argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        ZLPR()(*inputs)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1.5, torch.float32, r"in \[0, 1\]. Found 1.5 at position \[1, 2\]"),
        (-0.25, torch.float32, r"in \[0, 1\]. Found -0.25 at position \[1, 2\]"),
        (math.nan, torch.float64, r"Found nan at position \[1, 2\]"),
        (INF, torch.float32, r"Found inf at position \[1, 2\]"),
        (2, torch.int64, r"0 or 1. Found 2 at position \[1, 2\]"),
        (-100, torch.int32, r"0 or 1. Found -100 at position \[1, 2\]"),
    ],
)
def test_rejects_target_values(value: float, dtype: torch.dtype, message: str) -> None:
    target = torch.zeros(2, 3, dtype=dtype)
    target[1, 2] = value
    with pytest.raises(ArgumentError, match=message):
        ZLPR()(LOGITS, target)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_rejects_logits_and_target_in_the_wrong_order(dtype: torch.dtype) -> None:
    logits, target = batch(3, 4)
    with pytest.raises(ArgumentError, match=r"floating point. Found|in \[0, 1\]. Found"):
        ZLPR()(target.to(dtype), logits)


@pytest.mark.parametrize("threshold", [INF, math.nan, "0", None, True])
def test_rejects_thresholds(threshold: float) -> None:
    with pytest.raises(ArgumentError, match="`threshold` of ZLPR must be a finite number"):
        ZLPR(threshold)


def test_rejects_reductions() -> None:
    with pytest.raises(ArgumentError, match="`reduction` of ZLPR"):
        ZLPR(reduction="average")
