"""Label sets and probabilities."""

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

from kexue.core.errors import ArgumentError
from kexue_zlpr import ZLPR, ThresholdDecoder


def best_subset(scores: list[float], least: int, most: int) -> tuple[float, list[int]]:
    """The subset of the highest sum among all of an allowed size."""
    subsets = (
        subset
        for size in range(min(least, len(scores)), min(most, len(scores)) + 1)
        for subset in itertools.combinations(range(len(scores)), size)
    )
    return max((math.fsum(scores[i] for i in subset), list(subset)) for subset in subsets)


def scores_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 7),
    least=st.integers(0, 4),
    spare=st.sampled_from([None, 0, 1, 3]),
    threshold=st.sampled_from([0.0, 1.5, -2.0]),
    seed=st.integers(0, 999),
)
def test_maximises_the_score_over_all_subsets(
    classes: int, least: int, spare: int | None, threshold: float, seed: int
) -> None:
    most = None if spare is None else max(least + spare, 1)
    logits = scores_of(3, classes, seed=seed)
    decoder = ThresholdDecoder(threshold, max_labels=most, min_labels=least)
    result = decoder.decode(logits)
    for row, found, score in zip(logits - threshold, result.tolist(), result.scores, strict=True):
        expected, subset = best_subset(row.tolist(), least, classes if most is None else most)
        assert found == subset
        assert score.item() == pytest.approx(expected, abs=1e-12)


def test_pads_ascending_label_sets() -> None:
    logits = torch.tensor([[1.0, -1, 2, 3], [-1, -1, -1, -1], [-1, 5, -1, -1]])
    result = ThresholdDecoder().decode(logits)
    assert result.sequences.tolist() == [[0, 2, 3], [-1, -1, -1], [1, -1, -1]]
    assert result.sequences.dtype == torch.int64
    assert result.scores.tolist() == [6, 0, 5]


def test_the_threshold_itself_is_no_label() -> None:
    assert ThresholdDecoder(1.0).decode(torch.tensor([[1.0, 1.5]])).tolist() == [[1]]


@pytest.mark.parametrize("by", ["mask", "-inf"])
def test_masked_classes_are_never_labels(by: str) -> None:
    logits = torch.tensor([[5.0, 1.0, -1.0], [5.0, -3.0, 4.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    if by == "-inf":
        logits, mask = logits.masked_fill(~mask, -math.inf), torch.ones_like(mask)
    decoder = ThresholdDecoder(min_labels=2, max_labels=2)
    result = decoder.decode(logits, mask=mask)
    assert result.tolist() == [[1, 2], [1]]
    assert result.scores.tolist() == [0, -3]


def test_nan_shows_in_the_score() -> None:
    logits = torch.tensor([[math.nan, 1.0], [2.0, 1.0]])
    result = ThresholdDecoder().decode(logits)
    assert result.scores.isnan().tolist() == [True, False]
    masked = ThresholdDecoder().decode(logits, mask=~logits.isnan())
    assert masked.tolist() == [[1], [0, 1]]
    assert masked.scores.tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    logits = torch.full((1, 5000), 100.0, dtype=dtype)
    result = ThresholdDecoder().decode(logits)
    assert result.scores.item() == 500_000
    assert result.sequences.shape == (1, 5000)


def test_handles_empty_batches_and_results() -> None:
    assert ThresholdDecoder(max_labels=2).decode(torch.zeros(0, 3)).sequences.shape == (0, 0)
    assert ThresholdDecoder().decode(torch.zeros(2, 3)).sequences.shape == (2, 0)
    assert ThresholdDecoder(min_labels=9).decode(torch.zeros(1, 3)).tolist() == [[0, 1, 2]]


def test_batch_equals_one_by_one_and_inputs_stay() -> None:
    logits = scores_of(5, 6).t().contiguous().t()
    before = logits.clone()
    decoder = ThresholdDecoder(0.5, max_labels=2)
    singles = [decoder.decode(row[None]).tolist()[0] for row in logits]
    assert decoder.decode(logits).tolist() == singles
    assert torch.equal(logits, before)


def test_result_has_no_gradient() -> None:
    assert not ThresholdDecoder().decode(scores_of(2, 3).requires_grad_()).scores.requires_grad


def test_probabilities_recover_the_soft_target() -> None:
    target = torch.tensor([[0.05, 0.4, 0.5, 0.99]], dtype=torch.float64)
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(500):
        (slope,) = torch.autograd.grad(ZLPR(0.3)(logits, target), logits)
        logits = (logits - slope).detach().requires_grad_()
    found = ThresholdDecoder(0.3).probabilities(logits.detach())
    torch.testing.assert_close(found, target, rtol=0, atol=1e-9)


def test_probabilities_of_masked_classes_are_zero() -> None:
    mask = torch.tensor([[True, False]])
    found = ThresholdDecoder().probabilities(torch.tensor([[0.0, math.nan]]), mask=mask)
    assert found.tolist() == [[0.5, 0.0]]


def test_copies() -> None:
    logits = scores_of(4, 5)
    decoder = ThresholdDecoder(0.5, max_labels=2, min_labels=1)
    thawed = pickle.loads(pickle.dumps(decoder))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(decoder), thawed):
        assert twin.decode(logits).tolist() == decoder.decode(logits).tolist()


@pytest.mark.parametrize(
    ("params", "argument", "message"),
    [
        ({"threshold": math.nan}, "threshold", "finite number. Found nan"),
        ({"min_labels": -1}, "min_labels", "integer of at least 0. Found -1"),
        ({"max_labels": 0}, "max_labels", "integer of at least 1. Found 0"),
        ({"max_labels": 2, "min_labels": 3}, "max_labels", "integer of at least 3. Found 2"),
        ({"max_labels": 1.5}, "max_labels", "Found 1.5"),
    ],
)
def test_rejects_arguments(params: dict[str, float], argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        ThresholdDecoder(**params)  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_rejects_inputs() -> None:
    decoder = ThresholdDecoder()
    with pytest.raises(ArgumentError, match=r"\[batch, class\]. Found \[3\]"):
        decoder.decode(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"floating point\. Found torch.int64"):
        decoder.decode(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"`mask` of ThresholdDecoder .*Found \[2\]"):
        decoder.decode(torch.zeros(2, 3), mask=torch.ones(2, dtype=torch.bool))
