"""The loss, log Z, marginals and entropy against enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue_crf import CRF, scaled

Enumerate = Callable[..., list[Any]]
EXACT = 1e-10
"""Rounding of float64 over a few hundred additions of numbers around 1."""


class Case:
    """A CRF in float64 with random parameters, emissions, tags and a mask of a kind."""

    def __init__(self, kind: str, *, boundaries: bool = True, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.crf = CRF(3, boundaries=boundaries, reduction="none").double()
        for parameter in self.crf.parameters():
            nn.init.normal_(parameter, generator=self.generator)
        self.emissions = torch.randn(
            6, 5, 3, dtype=torch.float64, generator=self.generator, requires_grad=True
        )
        self.tags = torch.randint(3, (6, 5), generator=self.generator)
        self.mask = {
            "none": None,
            "right": torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [0]]),
            "left": torch.arange(5) >= torch.tensor([[0], [1], [2], [3], [4], [5]]),
            "holes": torch.tensor([[1, 0, 1, 1, 0]] * 2 + [[0, 1, 0, 0, 1]] * 2 + [[0] * 5] * 2)
            > 0,
        }[kind]
        if self.mask is not None:
            self.tags = torch.where(self.mask, self.tags, -100)

    @property
    def scores(self) -> tuple[Any, ...]:
        crf = self.crf
        return (
            self.emissions,
            crf.transitions,
            crf.start_transitions,
            crf.end_transitions,
            self.mask,
        )

    @property
    def inputs(self) -> list[Tensor]:
        return [self.emissions, *self.crf.parameters()]


MASKS = ["none", "right", "left", "holes"]


def gold_scores(rows: list[Any], tags: Tensor) -> Tensor:
    found = []
    for row, of_row in zip(rows, tags, strict=True):
        path = of_row[row.positions]
        found.append(row.scores[(row.paths == path).all(1)].sum())
    return torch.stack(found)


def assert_same_gradients(
    ours: Tensor, oracle: Tensor, inputs: list[Tensor], weight: Tensor
) -> None:
    """Both have the same derivative along ``weight`` by every input."""
    expected = torch.autograd.grad(oracle, inputs, weight, retain_graph=True)
    found = torch.autograd.grad(ours, inputs, weight, retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_loss_matches_enumeration(kind: str, boundaries: bool, enumerate_rows: Enumerate) -> None:
    case = Case(kind, boundaries=boundaries)
    rows = enumerate_rows(*case.scores)
    expected = torch.stack([row.log_partition for row in rows]) - gold_scores(rows, case.tags)
    loss = case.crf(case.emissions, case.tags, case.mask)
    torch.testing.assert_close(loss, expected, rtol=0, atol=EXACT)
    weight = torch.randn(6, dtype=torch.float64, generator=case.generator)
    assert_same_gradients(loss, expected, case.inputs, weight)


@pytest.mark.parametrize("kind", MASKS)
def test_log_partition_matches_enumeration(kind: str, enumerate_rows: Enumerate) -> None:
    case = Case(kind)
    expected = torch.stack([row.log_partition for row in enumerate_rows(*case.scores)])
    found = case.crf.log_partition(case.emissions, case.mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    assert_same_gradients(found, expected, case.inputs, torch.arange(6.0, dtype=torch.float64))
    with torch.no_grad():
        forward_only = case.crf.log_partition(case.emissions, case.mask)
    torch.testing.assert_close(forward_only, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", MASKS)
def test_score_and_log_prob_match_enumeration(kind: str, enumerate_rows: Enumerate) -> None:
    case = Case(kind)
    rows = enumerate_rows(*case.scores)
    expected = gold_scores(rows, case.tags)
    found = case.crf.score(case.emissions, case.tags, case.mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    ones = torch.ones(6, dtype=torch.float64)
    assert_same_gradients(found, expected, case.inputs, ones)
    log_prob = case.crf.log_prob(case.emissions, case.tags, case.mask)
    expected = expected - torch.stack([row.log_partition for row in rows])
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=EXACT)
    assert_same_gradients(log_prob, expected, case.inputs, ones)


def enumerated_marginals(rows: list[Any], like: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    for b, row in enumerate(rows):
        for step, position in enumerate(row.positions):
            for tag in range(like.shape[2]):
                found[b, position, tag] = row.probabilities[row.paths[:, step] == tag].sum()
    return found


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("taped", [True, False])
def test_marginals_match_enumeration(kind: str, taped: bool, enumerate_rows: Enumerate) -> None:
    case = Case(kind)
    with torch.set_grad_enabled(taped):
        found = case.crf.marginals(case.emissions, case.mask)
    expected = enumerated_marginals(enumerate_rows(*case.scores), case.emissions)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    assert found.requires_grad == taped
    if taped:
        weight = torch.randn(6, 5, 3, dtype=torch.float64, generator=case.generator)
        assert_same_gradients(found, expected, case.inputs, weight)


@pytest.mark.parametrize("kind", MASKS)
def test_entropy_matches_enumeration(kind: str, enumerate_rows: Enumerate) -> None:
    case = Case(kind)
    rows = enumerate_rows(*case.scores)
    expected = torch.stack([torch.special.entr(row.probabilities).sum() for row in rows])
    found = case.crf.entropy(case.emissions, case.mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    assert_same_gradients(found, expected, case.inputs, torch.arange(6.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_of_gradients(kind: str) -> None:
    case = Case(kind)

    def loss(*_: Tensor) -> Tensor:
        found: Tensor = case.crf(case.emissions, case.tags, case.mask)
        return found

    assert torch.autograd.gradcheck(loss, case.inputs)
    assert torch.autograd.gradgradcheck(loss, case.inputs)


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    crf = CRF(3, reduction="none").double()
    emissions = torch.randn(1, 4, 3, dtype=torch.float64).expand(81, 4, 3)
    tags = torch.tensor(list(itertools.product(range(3), repeat=4)))
    total = crf.log_prob(emissions, tags).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", MASKS)
def test_log_space_agrees_with_probability_space(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback gives the same values and gradients as what it stands in for."""
    case = Case(kind)
    loss = case.crf(case.emissions, case.tags, case.mask)
    marginals = case.crf.marginals(case.emissions.detach(), case.mask)
    monkeypatch.setattr(scaled, "plan", lambda *_, **__: None)
    fallback = case.crf(case.emissions, case.tags, case.mask)
    assert "LogPartition" in type(loss.grad_fn).__name__
    assert "LogPartition" not in type(fallback.grad_fn).__name__
    torch.testing.assert_close(fallback, loss, rtol=0, atol=EXACT)
    assert_same_gradients(fallback, loss, case.inputs, torch.arange(6.0, dtype=torch.float64))
    with torch.no_grad():
        again = case.crf.marginals(case.emissions, case.mask)
    torch.testing.assert_close(again, marginals.detach(), rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", lambda losses, mask: losses.sum()),
        ("mean", lambda losses, mask: losses.sum() / mask.any(1).sum()),
        ("token_mean", lambda losses, mask: losses.sum() / mask.sum()),
    ],
)
def test_reductions(reduction: str, expected: Callable[[Tensor, Tensor], Tensor]) -> None:
    case = Case("right")
    assert case.mask is not None
    losses = case.crf(case.emissions, case.tags, case.mask)
    assert losses[5] == 0  # the row without a real position
    case.crf.reduction = reduction
    found = case.crf(case.emissions, case.tags, case.mask)
    torch.testing.assert_close(found, expected(losses, case.mask))
    unmasked = case.crf(case.emissions, case.tags.clamp(min=0))
    everything = torch.ones_like(case.mask)
    torch.testing.assert_close(
        unmasked, case.crf(case.emissions, case.tags.clamp(min=0), everything)
    )


def test_reduces_to_cross_entropy_without_transitions() -> None:
    crf = CRF(5, boundaries=False, reduction="token_mean")
    nn.init.zeros_(crf.transitions)
    emissions, tags = torch.randn(3, 7, 5), torch.randint(5, (3, 7))
    mask = torch.rand(3, 7) < 0.7
    expected = nn.functional.cross_entropy(emissions[mask], tags[mask])
    torch.testing.assert_close(crf(emissions, tags, mask), expected)


@pytest.mark.parametrize(("time", "tags"), [(1, 3), (4, 1), (1, 1)])
def test_smallest_chains(time: int, tags: int, enumerate_rows: Enumerate) -> None:
    crf = CRF(tags, reduction="none").double()
    emissions = torch.randn(2, time, tags, dtype=torch.float64, requires_grad=True)
    gold = torch.zeros(2, time, dtype=torch.long)
    rows = enumerate_rows(emissions, crf.transitions, crf.start_transitions, crf.end_transitions)
    expected = torch.stack([row.log_partition - row.scores[0] for row in rows])
    loss = crf(emissions, gold)
    torch.testing.assert_close(loss, expected, rtol=0, atol=EXACT)
    loss.sum().backward()
    if tags == 1:
        assert (loss == 0).all()
        assert emissions.grad is not None
        assert (emissions.grad == 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), time=st.integers(1, 9), tags=st.integers(1, 6))
def test_masked_positions_do_not_matter(seed: int, time: int, tags: int) -> None:
    """A row with a mask is the row of its real positions."""
    generator = torch.Generator().manual_seed(seed)
    crf = CRF(tags, reduction="none").double()
    emissions = torch.randn(4, time, tags, dtype=torch.float64, generator=generator)
    gold = torch.randint(tags, (4, time), generator=generator)
    mask = torch.rand(4, time, generator=generator) < 0.6
    junk = torch.where(mask.unsqueeze(2), emissions, torch.nan).requires_grad_()
    loss = crf(junk, gold.masked_fill(~mask, -100), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), junk)
    for b in range(4):
        alone = emissions[b : b + 1, mask[b]].clone().requires_grad_()
        expected = crf(alone, gold[b : b + 1, mask[b]])
        torch.testing.assert_close(loss[b : b + 1], expected, rtol=0, atol=EXACT)
        (row,) = torch.autograd.grad(expected.sum(), alone)
        torch.testing.assert_close(gradient[b, mask[b]], row[0], rtol=0, atol=EXACT)
        assert (gradient[b, ~mask[b]] == 0).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3))
def test_shifting_the_emissions_of_a_position_changes_nothing(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    crf = CRF(4, reduction="none").double()
    emissions = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    tags = torch.randint(4, (2, 6), generator=generator)
    shifted = emissions.clone()
    shifted[:, 2] += shift
    torch.testing.assert_close(crf(shifted, tags), crf(emissions, tags), rtol=0, atol=1e-9)
