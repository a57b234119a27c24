"""ZLPR on lists of labels: the same as on the dense target, without it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kexue.core.errors import ArgumentError
from kexue_zlpr import ZLPR


def naive(logits: Tensor, target: Tensor) -> Tensor:
    """The formula of post 7359 over Python sets, in float64."""
    rows = []
    for scores, labels in zip(logits.double(), target.tolist(), strict=True):
        chosen = sorted({label for label in labels if label >= 0})
        others = [i for i in range(len(scores)) if i not in chosen]
        sums = scores[others].exp().sum(), (-scores[chosen]).exp().sum()
        rows.append((1 + sums[0]).log() + (1 + sums[1]).log())
    return torch.stack(rows)


def batch(rows: int, classes: int, slots: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels with duplicates and padding anywhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(-1, classes, (rows, slots), generator=generator)


def dense(target: Tensor, classes: int) -> Tensor:
    hot = torch.nn.functional.one_hot(target + 1, classes + 1)[..., 1:]
    return hot.sum(dim=-2) > 0


def gradient(loss: Callable[..., Tensor], logits: Tensor, *rest: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest).sum(), leaf)[0]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    classes=st.integers(1, 8),
    slots=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_matches_the_naive_formula_and_the_dense_loss(
    rows: int, classes: int, slots: int, seed: int
) -> None:
    logits, target = batch(rows, classes, slots, seed=seed)
    loss = ZLPR(sparse=True, reduction="none")
    found, slope = loss(logits, target), gradient(loss, logits, target)
    torch.testing.assert_close(found, naive(logits, target), rtol=1e-12, atol=1e-13)
    twin, wide = ZLPR(reduction="none"), dense(target, classes)
    torch.testing.assert_close(found, twin(logits, wide), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(slope, gradient(twin, logits, wide), rtol=1e-11, atol=1e-14)


def test_gradient() -> None:
    logits, target = batch(4, 5, 3)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    loss = ZLPR(0.5, sparse=True, reduction="none")
    logits.requires_grad_()
    assert gradcheck(lambda s: loss(s, target), logits)
    assert gradcheck(lambda s: loss(s, target, mask), logits)
    assert gradgradcheck(lambda s: loss(s, target), logits)
    assert gradgradcheck(lambda s: loss(s, target, mask), logits)


def test_gradient_of_the_threshold() -> None:
    logits, target = batch(4, 6, 3)
    slopes = []
    for loss, labels in (
        (ZLPR(0.7, sparse=True, learnable=True), target),
        (ZLPR(0.7, learnable=True), dense(target, 6)),
    ):
        loss(logits, labels).backward()
        slopes.append(next(loss.parameters()).grad)
    torch.testing.assert_close(*slopes)


def test_does_not_cancel_at_convergence() -> None:
    logits = torch.tensor([[20.0, -20.0, -20.0, -20.0]])
    target = torch.tensor([[0]])
    value = ZLPR(sparse=True)(logits, target)  # the difference of sums gives 3.88, without gradient
    assert value.item() == pytest.approx(4 * math.exp(-20), rel=1e-5)
    expected = math.exp(-20) * torch.tensor([[-1.0, 1, 1, 1]])
    found = gradient(ZLPR(sparse=True), logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_is_never_nan_where_the_labels_take_the_whole_sum() -> None:
    logits = torch.tensor([[90.0, 88.0, -90.0], [1e4, 1e4, 1e4]])
    target = torch.tensor([[0, 1, -1], [0, 1, 2]])
    found = ZLPR(sparse=True, reduction="none")(logits, target)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-30)
    assert gradient(ZLPR(sparse=True), logits, target).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 2.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    target = torch.tensor([[1], [1]])
    found = ZLPR(sparse=True, reduction="none")(logits, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), 2 * logits[0, 0].double())
    slope = gradient(ZLPR(sparse=True, reduction="sum"), logits, target)
    assert slope.tolist() == [[1, -1, 0], [0, 0, 0]]


def test_many_classes_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 100_000, generator=generator)
    target = torch.randint(0, 100_000, (2, 10), generator=generator)
    found = ZLPR(sparse=True, reduction="none")(logits, target)
    torch.testing.assert_close(found.double(), naive(logits, target), rtol=1e-6, atol=0)


def test_duplicates_count_once_and_order_does_not_matter() -> None:
    logits = batch(1, 5, 1)[0].expand(3, 5)
    target = torch.tensor([[3, 1, -1, -1], [1, 3, 3, 1], [-1, 1, -1, 3]])
    values = ZLPR(sparse=True, reduction="none")(logits, target)
    assert (values == values[0]).all()
    slopes = gradient(ZLPR(sparse=True), logits, target)
    assert (slopes == slopes[0]).all()


def test_padding_may_be_any_number() -> None:
    logits, target = batch(4, 5, 3)
    expected = ZLPR(sparse=True)(logits, target)
    other = torch.where(target < 0, -100, target).int()
    torch.testing.assert_close(ZLPR(sparse=True, padding_index=-100)(logits, other), expected)
    loss = ZLPR(sparse=True, padding_index=0, reduction="none")
    class_zero = loss(logits, torch.tensor([[0, 2]] * 4))
    torch.testing.assert_close(class_zero, naive(logits, torch.tensor([[2]] * 4)))


def test_handles_rows_without_labels_and_without_slots() -> None:
    logits = batch(2, 4, 1)[0]
    expected = logits.exp().sum(-1).log1p()
    for target in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.long)):
        torch.testing.assert_close(ZLPR(sparse=True, reduction="none")(logits, target), expected)


@pytest.mark.parametrize("by", ["mask", "-inf"])
def test_masked_classes_are_in_neither_sum(by: str) -> None:
    logits, target = batch(6, 8, 4)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = ZLPR(reduction="none")(logits, dense(target, 8), mask)
    slope = gradient(ZLPR(), logits, dense(target, 8), mask)
    if by == "mask":
        logits[~mask] = math.nan
        rest: tuple[Tensor, ...] = (target, mask)
    else:
        logits[~mask] = -math.inf
        rest = (target,)
    torch.testing.assert_close(ZLPR(sparse=True, reduction="none")(logits, *rest), expected)
    torch.testing.assert_close(gradient(ZLPR(sparse=True), logits, *rest), slope)


def test_nan_logits_propagate_to_their_row_only() -> None:
    logits, target = batch(3, 4, 2)
    for label in range(4):
        broken = logits.clone()
        broken[1, label] = math.nan
        found = ZLPR(sparse=True, reduction="none")(broken, target)
        assert found.isnan().tolist() == [False, True, False]


def test_handles_leading_axes_and_an_empty_batch() -> None:
    logits, target = batch(6, 5, 3)
    rows = ZLPR(sparse=True, reduction="none")(logits, target)
    cube = ZLPR(sparse=True, reduction="none")(logits.view(2, 3, 5), target.view(2, 3, 3))
    torch.testing.assert_close(cube.flatten(), rows)
    torch.testing.assert_close(ZLPR(sparse=True)(logits[0], target[0]), rows[0])
    assert ZLPR(sparse=True)(logits[:0], target[:0]) == 0


def test_does_not_modify_inputs() -> None:
    logits, target = batch(4, 6, 3)
    mask = torch.ones(4, 6, dtype=torch.bool).tril()
    before = [t.clone() for t in (logits, target, mask)]
    gradient(ZLPR(sparse=True), logits.t().contiguous().t(), target, mask)
    gradient(ZLPR(sparse=True), logits, target, mask)
    for now, then in zip((logits, target, mask), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiled_equals_eager() -> None:
    logits, target = batch(4, 6, 3)
    compiled = torch.compile(ZLPR(sparse=True), backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), ZLPR(sparse=True)(logits, target))
    torch.testing.assert_close(
        gradient(compiled, logits, target), gradient(ZLPR(sparse=True), logits, target)
    )


def test_copies_and_saves() -> None:
    logits, target = batch(4, 6, 3)
    loss = ZLPR(0.25, sparse=True, learnable=True)
    expected = loss(logits, target)
    thawed = pickle.loads(pickle.dumps(loss))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(loss), thawed):
        torch.testing.assert_close(twin(logits, target), expected, rtol=0, atol=0)
    assert repr(loss) == (
        "ZLPR(sparse=True, padding_index=-1, threshold=0.25, learnable=True, reduction='mean')"
    )


def test_warns_of_probabilities() -> None:
    logits, target = batch(4, 6, 3)
    with pytest.warns(UserWarning, match="`logits` of ZLPR lie between 0 and 1"):
        ZLPR(sparse=True)(logits.sigmoid(), target)


LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([[0, 1], [2, 3]]), r"labels in \[0, 3\), .* Found 3 at position \[1, 1\]"),
        (torch.tensor([[0, -2], [2, 1]]), r"or -1 as padding. Found -2 at position \[0, 1\]"),
        (torch.zeros(2, 3), "integer labels. Found torch.float32. .* leave `sparse` out"),
        (torch.zeros(2, 3, dtype=torch.bool), "integer labels. Found torch.bool"),
        (torch.zeros(3, 1, dtype=torch.long), r"leading axes \[2\] of `logits`. Found \[3, 1\]"),
        (torch.zeros(2, dtype=torch.long), r"Found \[2\]"),
    ],
)
def test_rejects_targets(target: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        ZLPR(sparse=True)(LOGITS, target)
    assert caught.value.argument == "target"


def test_rejects_masks_of_another_shape() -> None:
    with pytest.raises(ArgumentError, match=r"`mask` of ZLPR .*\[2, 3\]. Found \[3\]"):
        ZLPR(sparse=True)(LOGITS, torch.tensor([[0], [1]]), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("padding_index", [0.5, "0", None])
def test_rejects_padding(padding_index: int) -> None:
    with pytest.raises(ArgumentError, match="`padding_index` of ZLPR must be an integer"):
        ZLPR(sparse=True, padding_index=padding_index)
