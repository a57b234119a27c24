"""Segment means, against a loop over lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue_nystromformer import segment_means


def by_hand(vectors: list[Tensor], num_segments: int, width: int) -> Tensor:
    """Cut a list into segments of ⌊n/m⌋, then of one more, and average each."""
    short, longer = divmod(len(vectors), num_segments)
    means, start = [], 0
    for i in range(num_segments):
        size = short + (i >= num_segments - longer)
        part = vectors[start : start + size]
        means.append(torch.stack(part).mean(0) if part else torch.zeros(width).double())
        start += size
    return torch.stack(means)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.data())
def test_segments_hold_the_real_positions_in_order(time: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=1))
    num_landmarks = data.draw(st.integers(1, time + 2))
    mask = torch.tensor(rows)
    features = torch.randn(
        len(rows), 2, time, 3, generator=torch.Generator().manual_seed(time), dtype=torch.float64
    )
    found = segment_means(features, num_landmarks, mask)
    for b, row in enumerate(rows):
        for h in range(2):
            real = [features[b, h, t] for t in range(time) if row[t]]
            torch.testing.assert_close(found[b, h], by_hand(real, num_landmarks, 3))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.data())
def test_all_real_is_the_same_with_and_without_a_mask(time: int, data: st.DataObject) -> None:
    num_landmarks = data.draw(st.integers(1, time))
    features = torch.arange(2.0 * time, dtype=torch.float64).view(1, 2, time, 1)
    torch.testing.assert_close(
        segment_means(features, num_landmarks),
        segment_means(features, num_landmarks, torch.ones(1, time, dtype=torch.bool)),
    )


def test_half_precision_means_are_of_all_members() -> None:
    features = torch.ones(1, 1, 5000, 1, dtype=torch.bfloat16)
    mask = torch.ones(1, 5000, dtype=torch.bool)
    assert segment_means(features, 2, mask).tolist() == [[[[1.0], [1.0]]]]
    assert segment_means(features, 3).tolist() == [[[[1.0], [1.0], [1.0]]]]


@pytest.mark.parametrize("number", [0, 4])
def test_rejects_a_number_of_landmarks(number: int) -> None:
    with pytest.raises(ArgumentError, match=rf"must be from 1 to the length, 3. Found {number}"):
        segment_means(torch.ones(1, 1, 3, 1), number)
