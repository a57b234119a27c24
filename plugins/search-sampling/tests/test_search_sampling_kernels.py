"""The exact transition matrix of each kernel: its rows, its detailed balance, what it tends to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.densities import Density
from kexue_search_sampling import (
    Bigrams,
    EditProposal,
    GaussianProposal,
    IndependentProposal,
    Proposal,
    TableProposal,
    Uniform,
)
from kexue_search_sampling.gibbs import conditional_of
from kexue_search_sampling.spaces import Sequences, Table, resolve
from kexue_search_sampling.walk import log_acceptance

CPU = torch.device("cpu")
Cell = tuple[float, Tensor]
"""A probability, and random numbers that stand for all that lead to the same move."""


def sequences(num_tokens: int, low: int, high: int) -> Tensor:
    """Return all sequences, padded."""
    rows = [
        [*tokens, *[PAD] * (high - n)]
        for n in range(low, high + 1)
        for tokens in product(range(num_tokens), repeat=n)
    ]
    return torch.tensor(rows)


def edit_cells(proposal: EditProposal, point: Tensor) -> Iterator[Cell]:
    """Yield the cells of the cube of random numbers within which an edit does the same."""
    length = int((point != PAD).sum())
    moves = proposal.log_moves[length].exp().tolist()
    q = proposal.log_q.exp().tolist()
    for move, share in enumerate(moves):
        places = length + (move == 0)
        for place in range(places if share else 0):
            for token, weight in enumerate(q):
                random = [
                    sum(moves[:move]) + share / 2,
                    (place + 0.5) / places,
                    sum(q[:token]) + weight / 2,
                ]
                yield share * weight / places, torch.tensor(random, dtype=torch.float64)


def table_cells(sizes: tuple[int, ...]) -> Iterator[Cell]:
    for variable, size in enumerate(sizes):
        for value in range(size):
            random = [(variable + 0.5) / len(sizes), (value + 0.5) / size]
            yield 1 / len(sizes) / size, torch.tensor(random, dtype=torch.float64)


def matrices(
    proposal: Proposal,
    states: Tensor,
    log_target: Tensor,
    cells: Callable[[Tensor], Iterator[Cell]],
) -> tuple[Tensor, Tensor]:
    """Return q(y | x) and the transition matrix, ``[x, y]``, by walking through all cells."""
    index = {tuple(row): i for i, row in enumerate(states.tolist())}
    proposed = torch.zeros(len(states), len(states), dtype=torch.float64)
    moved = torch.zeros_like(proposed)
    for x, point in enumerate(states):
        for probability, random in cells(point):
            new, correction = proposal.propose(point[None], random[None])
            y = index[tuple(new[0].tolist())]
            ratio = log_acceptance(log_target[y : y + 1], log_target[x : x + 1], correction)
            accept = min(1.0, math.exp(min(0.0, float(ratio))))
            proposed[x, y] += probability
            moved[x, y] += probability * accept
            moved[x, x] += probability * (1 - accept)
    return proposed, moved


def assert_balanced(moved: Tensor, log_target: Tensor) -> None:
    """Assert π(x) T(x, y) = π(y) T(y, x), that rows sum to 1, and that nothing else is kept."""
    law = log_target.softmax(0)
    flow = law[:, None] * moved
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(moved.sum(1), torch.ones_like(law), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.matrix_power(moved, 4096)[0], law, rtol=0, atol=1e-8)


def random_logits(num: int, seed: int = 0, *, dead: int = 0) -> Tensor:
    logits = torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[1 : 1 + dead] = -math.inf
    return logits


# -- edits ----------------------------------------------------------------------------------------

EDITS = {
    "uniform": EditProposal(2, 3),
    "biased": EditProposal(
        3, 2, weights=(3.0, 1.0, 0.5), token_logits=torch.tensor([0.0, 1.0, -2.0])
    ),
    "one length": EditProposal(3, 3, min_length=3, token_logits=torch.tensor([0.0, 0.3, 2.0])),
    "no replacing": EditProposal(2, 3, min_length=1, weights=(1.0, 2.0, 0.0)),
    "one token": EditProposal(1, 4),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_in_detailed_balance(name: str) -> None:
    proposal = EDITS[name]
    states = sequences(proposal.num_tokens, proposal.min_length, proposal.max_length)
    log_target = random_logits(len(states))
    proposed, moved = matrices(
        proposal, states, log_target, lambda point: edit_cells(proposal, point)
    )
    assert_balanced(moved, log_target)
    pairs = [states.repeat(len(states), 1), states.repeat_interleave(len(states), 0)]
    exact = proposal.log_prob(*pairs).exp().view(len(states), len(states))
    torch.testing.assert_close(proposed, exact, rtol=0, atol=1e-12)


def test_an_edit_without_the_correction_is_not_in_balance() -> None:
    proposal = EDITS["biased"]
    states = sequences(3, 0, 2)
    log_target = random_logits(len(states))

    class Uncorrected(EditProposal):
        def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().propose(points, random)[0], None

    wrong = Uncorrected(3, 2, weights=(3.0, 1.0, 0.5), token_logits=torch.tensor([0.0, 1.0, -2.0]))
    _, moved = matrices(wrong, states, log_target, lambda point: edit_cells(proposal, point))
    with pytest.raises(AssertionError):
        assert_balanced(moved, log_target)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 10**6),
    st.tuples(*[st.floats(0.1, 5.0)] * 3),
)  # fmt: skip
def test_the_correction_is_the_ratio_of_the_probabilities(
    num_tokens: int, low: int, more: int, seed: int, weights: tuple[float, float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    proposal = EditProposal(
        num_tokens, low + more, min_length=low, weights=weights,
        token_logits=torch.randn(num_tokens, generator=generator),
    )  # fmt: skip
    points = Sequences(num_tokens, low, low + more, CPU).start(20, generator)
    new, correction = proposal.propose(points, proposal.randomness(points, 1, generator)[0])
    wanted = proposal.log_prob(points, new) - proposal.log_prob(new, points)
    assert correction is not None
    torch.testing.assert_close(correction, wanted, rtol=0, atol=1e-10)
    lengths = (new != PAD).sum(1)
    assert ((lengths >= low) & (lengths <= low + more)).all()
    assert ((new != PAD) == (torch.arange(low + more) < lengths[:, None])).all()


def test_edits_are_as_frequent_as_they_say() -> None:
    proposal = EDITS["biased"]
    states = sequences(3, 0, 2)
    point = torch.tensor([[1, 0]]).expand(40_000, 2)
    random = proposal.randomness(point, 1, torch.Generator().manual_seed(3))[0]
    new, _ = proposal.propose(point, random)
    found = torch.tensor([int((new == state).all(1).sum()) for state in states])
    wanted = proposal.log_prob(states, torch.tensor([[1, 0]]).expand(len(states), 2)).exp()
    assert found[wanted == 0].sum() == 0
    assert chisquare(found[wanted > 0], wanted[wanted > 0] * 40_000).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_length": 2, "min_length": 3}, "max_length"),
        ({"max_length": 2, "weights": (0.0, 0.0, 1.0)}, "weights"),
        ({"max_length": 2, "weights": (1.0, -1.0, 1.0)}, "weights"),
        ({"max_length": 2, "token_logits": torch.zeros(2)}, "token_logits"),
        ({"max_length": 2, "token_logits": torch.tensor([0.0, 0.0, math.nan])}, "token_logits"),
    ],
)
def test_rejects_an_edit_proposal(arguments: dict[str, object], culprit: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{culprit}` of EditProposal") as caught:
        EditProposal(3, **arguments)  # type: ignore[arg-type]
    assert caught.value.argument == culprit


# -- tables, independent draws, random walks ------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("dead", [0, 1])
def test_moves_in_a_table_are_in_detailed_balance(sizes: tuple[int, ...], dead: int) -> None:
    states = torch.tensor(list(product(*map(range, sizes))))
    log_target = random_logits(len(states), dead=dead)
    proposal = TableProposal(sizes)
    proposed, moved = matrices(proposal, states, log_target, lambda _: table_cells(sizes))
    inside = log_target > -math.inf
    assert_balanced(moved[inside][:, inside], log_target[inside])
    pairs = [states.repeat(len(states), 1), states.repeat_interleave(len(states), 0)]
    exact = proposal.log_prob(*pairs).exp().view(len(states), len(states))
    torch.testing.assert_close(proposed, exact, rtol=0, atol=1e-12)


class _Given:
    """A distribution over the rows of a table, whose draws are told."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.log_softmax(0)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        law = self.logits.exp()
        return torch.multinomial(law, num, replacement=True, generator=generator)[:, None]

    def log_prob(self, points: Tensor) -> Tensor:
        return self.logits[points[:, 0]]


def test_independent_proposals_are_in_detailed_balance() -> None:
    states, q = torch.arange(6)[:, None], _Given(random_logits(6, seed=5))
    proposal = IndependentProposal(q)
    log_target = random_logits(6)
    _, moved = matrices(
        proposal,
        states,
        log_target,
        lambda _: ((math.exp(q.logits[i]), torch.tensor([i])) for i in range(6)),
    )
    assert_balanced(moved, log_target)
    one = proposal.randomness(states[:2], 3, torch.Generator().manual_seed(0))
    assert one.shape == (3, 2, 1)


def test_a_random_walk_is_symmetric_and_normalised() -> None:
    factor = torch.tensor([[0.7, 0.0], [0.4, 1.3]], dtype=torch.float64)
    proposal = GaussianProposal(factor)
    x, y = torch.randn(2, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(proposal.log_prob(y, x), proposal.log_prob(x, y))
    gaussian: Any = torch.distributions.MultivariateNormal(x, scale_tril=factor)
    wanted = gaussian.log_prob(y)
    torch.testing.assert_close(proposal.log_prob(y, x), wanted)
    steps = proposal.randomness(torch.zeros(20_000, 2, dtype=torch.float64), 2)
    torch.testing.assert_close(steps.flatten(0, 1).T.cov(), factor @ factor.T, rtol=0.05, atol=0.03)
    assert proposal.propose(x, steps[0, :5])[1] is None
    one = GaussianProposal(0.5)
    gaussian = torch.distributions.Normal(x, 0.5)
    torch.testing.assert_close(one.log_prob(y, x), gaussian.log_prob(y).sum(1))
    for wrong in (0.0, -1.0, torch.ones(2, 3)):
        with pytest.raises(ArgumentError, match="`scale` of GaussianProposal"):
            GaussianProposal(wrong)


# -- Gibbs ----------------------------------------------------------------------------------------


def gibbs_matrix(states: Tensor, place: int, logits: Tensor) -> Tensor:
    """Return the transition matrix of the draw of one place."""
    index = {tuple(row): i for i, row in enumerate(states.tolist())}
    shares = logits.softmax(1)
    moved = torch.zeros(len(states), len(states), dtype=torch.float64)
    for x, row in enumerate(states.tolist()):
        for value in range(shares.shape[1]):
            y = index[(*row[:place], value, *row[place + 1 :])]
            moved[x, y] += shares[x, value]
    return moved


def assert_sites_balanced(log_target: Tensor, states: Tensor, conditional: object) -> None:
    assert callable(conditional)
    law = log_target.softmax(0)
    sweep = torch.eye(len(states), dtype=torch.float64)
    for place in range(states.shape[1]):
        moved = gibbs_matrix(states, place, conditional(states, place).double())
        flow = law[:, None] * moved
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)
        sweep = sweep @ moved
    torch.testing.assert_close(law @ sweep, law, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.matrix_power(sweep, 2000)[0], law, rtol=0, atol=1e-9)


def test_each_gibbs_draw_in_a_table_is_in_detailed_balance() -> None:
    logits = random_logits(12).view(2, 3, 2)
    problem = resolve(logits, "Gibbs")
    states = torch.tensor(list(product(range(2), range(3), range(2))))
    assert isinstance(problem.space, Table)
    assert_sites_balanced(logits.flatten(), states, conditional_of(problem, "Gibbs"))


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_each_gibbs_draw_in_a_sequence_is_in_detailed_balance(batch_size: int) -> None:
    states = sequences(3, 3, 3)
    log_target = random_logits(len(states))
    powers = torch.tensor([9, 3, 1])
    target = Density(
        lambda x: log_target[(x * powers).sum(1)], num_tokens=3, min_length=3, max_length=3
    )
    conditional = conditional_of(resolve(target, "Gibbs"), "Gibbs", batch_size)
    assert_sites_balanced(log_target, states, conditional)


def test_the_bigrams_know_their_conditionals() -> None:
    model = Bigrams(["abba", "cab"], alphabet="abc", max_length=3)
    states = sequences(3, 3, 3)
    log_target = model.log_prob(states)
    assert float(log_target.logsumexp(0)) == pytest.approx(0.0, abs=1e-12)
    assert_sites_balanced(log_target, states, model.conditional_logits)


def test_uniform_distributions_are_normalised() -> None:
    every = sequences(2, 1, 3)
    uniform = Uniform(Sequences(2, 1, 3, CPU))
    assert float(uniform.log_prob(every).exp().sum()) == pytest.approx(1.0)
    drawn = uniform.sample(30_000, torch.Generator().manual_seed(0))
    found = torch.tensor([int((drawn == state).all(1).sum()) for state in every])
    assert chisquare(found, uniform.log_prob(every).exp() * 30_000).pvalue > 1e-3
    table = Uniform(Table((2, 3), CPU))
    assert table.log_prob(torch.zeros(1, 2).long()).exp().tolist() == pytest.approx([1 / 6])
