"""What schemes allow, and that what is forbidden has probability exactly 0."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_crf import CRF, Constraints, scheme_constraints

Enumerate = Callable[..., list[Any]]
WORDS = ["S", "B", "M", "E"]
ENTITIES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def allows(constraints: Constraints, path: tuple[int, ...]) -> bool:
    return bool(
        constraints.start[path[0]]
        and constraints.end[path[-1]]
        and all(constraints.transitions[a, b] for a, b in itertools.pairwise(path))
    )


def spans_of_bmes(names: list[str]) -> bool:
    """Whether a sequence of names is spans (begin, inside …, end of one type), singles, outside."""
    inside: str | None = None
    for name in names:
        letter, _, kind = name.upper().partition("-")
        if letter in {"B", "S", "W", "U", "O"}:
            if inside is not None:
                return False
            inside = kind if letter == "B" else None
        else:
            if inside != kind:
                return False
            inside = kind if letter in {"M", "I"} else None
    return inside is None


def spans_of_bio(names: list[str]) -> bool:
    previous = "O"
    for name in names:
        if name[0] == "I" and previous[1:] != name[1:]:
            return False
        previous = name
    return True


@pytest.mark.parametrize(
    ("scheme", "names", "valid"),
    [
        ("BMES", WORDS, spans_of_bmes),
        ("bmes", ["s", "b", "m", "e"], spans_of_bmes),
        ("BMEWO", ["B-X", "M-X", "E-X", "W-X", "O"], spans_of_bmes),
        ("BIES", ["B", "I", "E", "S"], spans_of_bmes),
        ("BIOES", ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y"], spans_of_bmes),
        ("BILOU", ["O", "B-X", "I-X", "L-X", "U-X"], spans_of_bmes),
        ("BIO", ENTITIES, spans_of_bio),
        ("IOB2", ["O", "B-X", "I-X"], spans_of_bio),
    ],
)
def test_scheme_allows_exactly_the_valid_sequences(
    scheme: str, names: list[str], valid: Callable[[list[str]], bool]
) -> None:
    constraints = scheme_constraints(names, scheme)
    for length in (1, 2, 3, 4):
        for path in itertools.product(range(len(names)), repeat=length):
            assert allows(constraints, path) == valid([names[tag] for tag in path]), path


@pytest.mark.parametrize(
    ("names", "scheme", "reach"),
    [
        (WORDS, "BMES", 2),
        (ENTITIES, "BIO", 2),
        (["O", "B-X", "I-X", "E-X", "S-X"], "BIOES", 2),
        (["O", "B-X", "E-X", "B-Y", "E-Y"], "BIOES", 3),
    ],
)
def test_reach_of_schemes(names: list[str], scheme: str, reach: int) -> None:
    assert scheme_constraints(names, scheme).reach == reach


def test_reach_of_other_graphs() -> None:
    everything = torch.ones(3, dtype=torch.bool)
    complete = Constraints(everything, torch.ones(3, 3, dtype=torch.bool), everything)
    assert complete.reach == 1
    apart = Constraints(everything, torch.eye(3, dtype=torch.bool), everything)
    assert apart.reach == torch.inf
    cycle = Constraints(everything, torch.eye(3, dtype=torch.bool).roll(1, 1), everything)
    assert cycle.reach == torch.inf


def constrained(tags: int, constraints: Constraints | None = None, **params: Any) -> CRF:
    generator = torch.Generator().manual_seed(3)
    crf = CRF(tags, constraints=constraints, reduction="none", **params).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return crf


def masked_scores(crf: CRF) -> tuple[Tensor, Tensor, Tensor]:
    """The scores with −inf where the constraints forbid, for the oracle."""
    assert crf.allowed_transitions is not None
    zero = torch.zeros(crf.num_tags, dtype=torch.float64)
    start = zero if crf.start_transitions is None else crf.start_transitions
    end = zero if crf.end_transitions is None else crf.end_transitions
    return (
        crf.transitions.masked_fill(~crf.allowed_transitions, -torch.inf),
        start.masked_fill(~crf.allowed_start, -torch.inf),  # type: ignore[operator]
        end.masked_fill(~crf.allowed_end, -torch.inf),  # type: ignore[operator]
    )


GRAPHS = {
    "BMES": scheme_constraints(WORDS, "BMES"),
    "BIO": scheme_constraints(ENTITIES[:3], "BIO"),
    "left to right": Constraints(
        torch.tensor([True, False, False]),
        torch.ones(3, 3, dtype=torch.bool).triu(),
        torch.tensor([True, True, True]),
    ),
    "cycle": Constraints(
        torch.tensor([True, True, True]),
        torch.eye(3, dtype=torch.bool).roll(1, 1),
        torch.tensor([True, True, False]),
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("boundaries", [True, False])
def test_constrained_chain_matches_enumeration(
    graph: str, boundaries: bool, enumerate_rows: Enumerate, generator: torch.Generator
) -> None:
    constraints = GRAPHS[graph]
    tags = len(constraints.start)
    crf = constrained(tags, constraints, boundaries=boundaries)
    emissions = 2 * torch.randn(4, 4, tags, dtype=torch.float64, generator=generator)
    emissions.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]]) > 0
    rows = enumerate_rows(emissions, *masked_scores(crf), mask)
    decoded = crf.decode(emissions, mask=mask)
    losses = []
    for b, row in enumerate(rows):
        path = decoded.sequences[b, row.positions]
        assert allows(constraints, tuple(path.tolist()))
        assert decoded.scores[b].item() == pytest.approx(row.scores.max().item(), abs=1e-12)
        losses.append(row.log_partition - row.scores[(row.paths == path).all(1)].sum())
    loss = crf(emissions, decoded.sequences, mask)
    torch.testing.assert_close(loss, torch.stack(losses), rtol=0, atol=1e-10)
    inputs = [emissions, *crf.parameters()]
    found = torch.autograd.grad(loss.sum(), inputs)
    possible = [row.scores[row.scores > -torch.inf].logsumexp(0) for row in rows]
    gold = [
        row.scores[(row.paths == decoded.sequences[b, row.positions]).all(1)].sum()
        for b, row in enumerate(rows)
    ]
    expected = torch.autograd.grad(sum(possible) - sum(gold), inputs)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


def test_forbidden_is_exactly_impossible() -> None:
    crf = CRF(4, scheme="BMES", tag_names=WORDS)
    emissions = torch.zeros(1, 3, 4)
    emissions[..., 2] = 1e4  # M everywhere, though it can neither begin nor end a word
    found = crf.decode(emissions)
    assert [WORDS[tag] for tag in found.sequences[0]] == ["B", "M", "E"]
    marginals = crf.marginals(emissions.requires_grad_())
    assert marginals[0, 0, [2, 3]].tolist() == [0.0, 0.0]
    assert marginals[0, 2, [1, 2]].tolist() == [0.0, 0.0]
    with torch.no_grad():
        assert crf.marginals(emissions)[0, 0, 2] == 0
    loss = CRF(4, scheme="BMES", tag_names=WORDS, reduction="sum")(
        emissions, torch.tensor([[1, 2, 3]])
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_of_forbidden_transitions_is_zero() -> None:
    crf = constrained(4, GRAPHS["BMES"])
    crf(
        torch.randn(2, 5, 4, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.long)
    ).sum().backward()
    assert crf.allowed_transitions is not None
    assert crf.transitions.grad is not None
    assert (crf.transitions.grad[~crf.allowed_transitions] == 0).all()
    assert (crf.transitions.grad[crf.allowed_transitions] != 0).all()


def test_scheme_and_constraints_are_both_kept() -> None:
    no_repeats = ~torch.eye(4, dtype=torch.bool)
    crf = CRF(4, scheme="BMES", tag_names=WORDS, constraints=no_repeats)
    expected = scheme_constraints(WORDS, "BMES").transitions & no_repeats
    assert crf.allowed_transitions is not None
    assert torch.equal(crf.allowed_transitions, expected)


def test_constraints_leave_the_state_dict_alone() -> None:
    crf = CRF(4, scheme="BMES", tag_names=WORDS)
    assert set(crf.state_dict()) == {"start_transitions", "end_transitions", "transitions"}
    assert {name for name, _ in crf.named_buffers()} == {
        "allowed_start",
        "allowed_transitions",
        "allowed_end",
    }


@pytest.mark.parametrize(
    ("position", "tags", "place"),
    [
        ("transition", [0, 1, 0, -100], "row 1 at position 2 tag 'S' after 'B'"),
        ("start", [2, 3, 0, -100], "row 1 at position 0 tag 'M' as the first"),
        ("end", [0, 0, 1, -100], "row 1 at position 2 tag 'B' as the last"),
    ],
)
def test_rejects_forbidden_tags(position: str, tags: list[int], place: str) -> None:
    crf = CRF(4, scheme="BMES", tag_names=WORDS)
    gold = torch.tensor([[0, 0, 0, 0], tags])
    with pytest.raises(ArgumentError, match=place) as caught:
        crf(torch.zeros(2, 4, 4), gold, gold >= 0)
    assert caught.value.argument == "tags"


def test_rejects_tags_with_an_emission_of_minus_infinity() -> None:
    emissions = torch.zeros(2, 3, 2)
    emissions[1, 2, 1] = -torch.inf
    with pytest.raises(ArgumentError, match="row 1 at position 2 tag 1 with an emission of -inf"):
        CRF(2)(emissions, torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("graph", ["BMES", "cycle"])
def test_forbidden_tags_can_cost_infinity(graph: str) -> None:
    """+inf from their row, and gradients of the other rows as if it were not there."""
    constraints = GRAPHS[graph]
    crf = constrained(len(constraints.start), constraints, forbidden="inf")
    emissions = torch.randn(2, 3, crf.num_tags, dtype=torch.float64, requires_grad=True)
    tags = crf.decode(emissions).sequences
    tags[0] = torch.tensor([1, 1, 1])
    loss = crf(emissions, tags)
    assert loss[0] == torch.inf
    assert crf.log_prob(emissions, tags)[0] == -torch.inf
    found = torch.autograd.grad(loss.sum(), [emissions, *crf.parameters()])
    expected = torch.autograd.grad(
        crf(emissions[1:], tags[1:]).sum(), [emissions, *crf.parameters()]
    )
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match=r"`scheme` must be one of .* Did you mean 'BMES'"):
        CRF(4, scheme="BMSE", tag_names=WORDS)
    with pytest.raises(ArgumentError, match="`tag_names` of CRF must be given with scheme='BMES'"):
        CRF(4, scheme="BMES")
    with pytest.raises(ArgumentError, match=r"`tag_names` of scheme BIO .* Found 'E'"):
        CRF(4, scheme="BIO", tag_names=["O", "B", "I", "E"])
    with pytest.raises(ArgumentError, match=r"must name num_tags = 4 tags. Found 3"):
        CRF(4, tag_names=["a", "b", "c"])
    with pytest.raises(
        ArgumentError, match=r"`transitions` of Constraints .* Found torch.bool \[3, 3\]"
    ):
        CRF(4, constraints=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="`transitions` of Constraints must be bool"):
        CRF(2, constraints=torch.ones(2, 2))
    with pytest.raises(ArgumentError, match="`constraints` of CRF must be for num_tags = 4"):
        CRF(4, constraints=GRAPHS["cycle"])
