"""Viterbi, n-best and sampling against enumeration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import PAD
from kexue_crf import CRF, max_plus, viterbi, viterbi_nbest

Enumerate = Callable[..., list[Any]]


def best_of(row: Any, time: int) -> tuple[list[int], float]:
    """The best path at its positions, of equal ones the one first in reversed order."""
    if row.scores.max() == -torch.inf:
        return [PAD] * time, -torch.inf
    path = row.paths[int(row.scores.argmax())].tolist()
    found = [PAD] * time
    for position, tag in zip(row.positions, path, strict=True):
        found[position] = tag
    return found, row.scores.max().item()


def integer_case(seed: int, time: int, tags: int, *, per_position: bool) -> dict[str, Any]:
    """Small integers, so that sums are exact and ties are many; some scores are −inf."""
    generator = torch.Generator().manual_seed(seed)

    def scores(*shape: int) -> Tensor:
        values = torch.randint(-2, 3, shape, generator=generator).double()
        return values.masked_fill(torch.rand(shape, generator=generator) < 0.1, -torch.inf)

    return {
        "emissions": scores(3, time, tags),
        "transitions": scores(3, time - 1, tags, tags) if per_position else scores(tags, tags),
        "start": scores(tags),
        "end": scores(tags),
        "mask": torch.rand(3, time, generator=generator) < 0.7 if seed % 3 else None,
    }


@pytest.mark.parametrize("limit", [0, max_plus.CHUNK_LIMIT], ids=["stepwise", "in chunks"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    time=st.integers(1, 6),
    tags=st.integers(1, 3),
    per_position=st.booleans(),
)
def test_viterbi_matches_enumeration(
    enumerate_rows: Enumerate, *, limit: int, seed: int, time: int, tags: int, per_position: bool
) -> None:
    case = integer_case(seed, time, tags, per_position=per_position)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(max_plus, "CHUNK_LIMIT", limit)
        found = viterbi(**case)
    for b, row in enumerate(enumerate_rows(**case)):
        path, score = best_of(row, time)
        assert found.sequences[b].tolist() == path
        assert found.scores[b].item() == score


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    time=st.integers(1, 5),
    tags=st.integers(1, 3),
    n=st.integers(1, 12),
    per_position=st.booleans(),
)
def test_nbest_matches_enumeration(
    enumerate_rows: Enumerate, *, seed: int, time: int, tags: int, n: int, per_position: bool
) -> None:
    case = integer_case(seed, time, tags, per_position=per_position)
    found = viterbi_nbest(case.pop("emissions"), case.pop("transitions"), n, **case)
    case = integer_case(seed, time, tags, per_position=per_position)
    for b, row in enumerate(enumerate_rows(**case)):
        ordered = row.scores.sort(descending=True, stable=True)
        for rank in range(n):
            score = ordered.values[rank].item() if rank < len(row.paths) else -torch.inf
            expected = [PAD] * time
            if score > -torch.inf:
                path = row.paths[int(ordered.indices[rank])].tolist()
                for position, tag in zip(row.positions, path, strict=True):
                    expected[position] = tag
            assert found.scores[b, rank].item() == score
            assert found.sequences[b, rank].tolist() == expected


def test_order_of_many_equal_paths() -> None:
    found = viterbi_nbest(torch.zeros(1, 3, 50), torch.zeros(50, 50), 4)
    assert found.sequences[0].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]


@pytest.mark.parametrize("tags", [4, 30], ids=["in chunks", "stepwise"])
@pytest.mark.parametrize("per_position", [False, True])
def test_long_chains_attain_the_score_they_claim(tags: int, per_position: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    emissions = torch.randn(7, 83, tags, dtype=torch.float64, generator=generator)
    shape = (7, 82, tags, tags) if per_position else (tags, tags)
    transitions = torch.randn(shape, dtype=torch.float64, generator=generator)
    mask = torch.arange(83) < torch.tensor([[83], [82], [41], [40], [2], [1], [0]])
    found = viterbi(emissions, transitions, mask=mask)
    for b, length in enumerate(mask.sum(1).tolist()):
        path = found.sequences[b, :length]
        steps = transitions[b, : length - 1] if per_position else transitions.expand(82, -1, -1)
        score = emissions[b].gather(1, path.clamp(min=0).unsqueeze(1)).sum() if length else 0.0
        for t in range(length - 1):
            score = score + steps[t, path[t], path[t + 1]]
        assert found.scores[b].item() == pytest.approx(float(score), abs=1e-9)
        assert (found.sequences[b, length:] == PAD).all()


def test_both_ways_agree_where_blocks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    emissions = torch.randn(5, 40, 6, generator=generator)
    transitions = torch.randn(6, 6, generator=generator)
    whole = viterbi(emissions, transitions)
    monkeypatch.setattr(max_plus, "CHUNK_LIMIT", 0)
    stepwise = viterbi(emissions, transitions)
    monkeypatch.setattr(max_plus, "_BLOCK", 4 * 5 * 6)  # from: 4 and 2
    in_blocks = viterbi(emissions, transitions)
    for other in (stepwise, in_blocks):
        assert torch.equal(other.sequences, whole.sequences)
        torch.testing.assert_close(other.scores, whole.scores)


def test_ties_take_the_lowest_index_from_the_end() -> None:
    for time, tags in ((6, 3), (6, 40)):
        found = viterbi(torch.zeros(2, time, tags), torch.zeros(tags, tags))
        assert (found.sequences == 0).all()
    # (0, 1) and (1, 0) are equally good: the last tag decides.
    emissions = torch.zeros(1, 2, 2)
    assert viterbi(emissions, torch.tensor([[-1.0, 0.0], [0.0, -1.0]])).tolist() == [[1, 0]]


@pytest.mark.parametrize("tags", [3, 40], ids=["in chunks", "stepwise"])
def test_decoding_never_looks_at_masked_positions(tags: int) -> None:
    generator = torch.Generator().manual_seed(2)
    emissions = torch.randn(4, 9, tags, generator=generator)
    transitions = torch.randn(tags, tags, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    mask[0, 0] = False
    clean = viterbi(emissions, transitions, mask=mask)
    for junk in (torch.nan, torch.inf, -torch.inf, 1e30):
        dirty = emissions.masked_fill(~mask.unsqueeze(2), junk)
        found = viterbi(dirty, transitions, mask=mask)
        assert torch.equal(found.sequences, clean.sequences)
        assert torch.equal(found.scores, clean.scores)
        some = viterbi_nbest(dirty, transitions, 3, mask=mask)
        assert torch.equal(some.sequences[:, 0], clean.sequences)


@pytest.mark.parametrize("tags", [3, 40], ids=["in chunks", "stepwise"])
@pytest.mark.parametrize("masked", [False, True])
def test_strided_scores(tags: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    emissions = torch.randn(tags, 7, 4, generator=generator).transpose(0, 2)
    mask = torch.rand(7, 4, generator=generator).T < 0.7 if masked else None
    per_position = torch.randn(tags, tags, 6, 4, generator=generator).permute(3, 2, 0, 1)
    for transitions in (torch.randn(tags, tags, generator=generator).T, per_position):
        found = viterbi(emissions, transitions, mask=mask)
        expected = viterbi(emissions.contiguous(), transitions.contiguous(), mask=mask)
        assert torch.equal(found.sequences, expected.sequences)
        best = viterbi_nbest(emissions, transitions, 2, mask=mask)
        assert torch.equal(best.sequences[:, 0], expected.sequences)


def test_score_of_decoded_sequence_is_the_score_of_its_tags() -> None:
    crf = CRF(5)
    emissions = torch.randn(4, 7, 5)
    mask = torch.arange(7) < torch.tensor([[7], [5], [1], [0]])
    found = crf.decode(emissions, mask=mask)
    torch.testing.assert_close(found.scores, crf.score(emissions, found.sequences, mask))
    some = crf.decode_nbest(emissions, 4, mask=mask)
    for rank in range(4):
        torch.testing.assert_close(
            some.scores[:3, rank], crf.score(emissions, some.sequences[:, rank], mask)[:3]
        )
    assert some.scores[3].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf]


@pytest.mark.parametrize(("time", "tags"), [(5, 3), (50, 3), (50, 40)])
def test_decoding_synchronises_once(time: int, tags: int, transfers: Any) -> None:
    crf = CRF(tags)
    emissions = torch.randn(3, time, tags)
    mask = torch.arange(time) < torch.tensor([[time], [4], [1]])
    with transfers:
        crf.decode(emissions, mask=mask)
    assert transfers.count == 1


def test_samples_follow_the_distribution(
    enumerate_rows: Enumerate, generator: torch.Generator
) -> None:
    crf = CRF(2).double()
    torch.nn.init.normal_(crf.transitions, generator=generator)
    emissions = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True, True, True, True], [False, True, False, True]])
    drawn = crf.sample(emissions, 20_000, mask=mask, generator=generator)
    assert drawn.shape == (2, 20_000, 4)
    assert (drawn[1][:, ~mask[1]] == PAD).all()
    scores = (crf.transitions, crf.start_transitions, crf.end_transitions, mask)
    for b, row in enumerate(enumerate_rows(emissions, *scores)):
        codes = (drawn[b][:, mask[b]] * 2 ** torch.arange(int(mask[b].sum()))).sum(1)
        frequency = torch.bincount(codes, minlength=len(row.paths)) / 20_000
        spread = (row.probabilities * (1 - row.probabilities) / 20_000).sqrt()
        assert ((frequency - row.probabilities).abs() < 4 * spread + 1e-4).all()


def test_same_seed_same_samples() -> None:
    crf, emissions = CRF(4), torch.randn(3, 6, 4)

    def draw(seed: int) -> Tensor:
        return crf.sample(emissions, 5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_samples_are_never_forbidden(generator: torch.Generator) -> None:
    crf = CRF(4, scheme="BMES", tag_names=["S", "B", "M", "E"])
    emissions = 5 * torch.randn(8, 9, 4, generator=generator)
    drawn = crf.sample(emissions, 50, generator=generator).flatten(0, 1)
    assert (crf.score(emissions.repeat_interleave(50, 0), drawn) > -torch.inf).all()


def test_row_without_a_path() -> None:
    """Score −inf and PAD, beside rows that have one."""
    emissions = torch.zeros(2, 3, 2)
    emissions[0, 1] = -torch.inf
    for tags in (2, 30):
        wide = torch.zeros(2, 3, tags)
        wide[:, :, :2] = emissions
        wide[0, 1] = -torch.inf
        found = viterbi(wide, torch.zeros(tags, tags))
        assert found.sequences.tolist() == [[PAD] * 3, [0] * 3]
        assert found.scores.tolist() == [-torch.inf, 0.0]
    assert CRF(2).sample(emissions, 2)[0].tolist() == [[PAD] * 3] * 2


def test_rejects_what_does_not_fit() -> None:
    emissions, transitions = torch.zeros(2, 3, 4), torch.zeros(4, 4)
    with pytest.raises(
        ArgumentError, match=r"`transitions` of viterbi .* \[4, 4\]. Found \[4, 5\]"
    ):
        viterbi(emissions, torch.zeros(4, 5))
    with pytest.raises(ArgumentError, match=r"\[batch, time - 1, tag, tag\] = \[2, 2, 4, 4\]"):
        viterbi(emissions, torch.zeros(2, 3, 4, 4))
    with pytest.raises(ArgumentError, match=r"`start` of viterbi must have shape \[tag\]"):
        viterbi(emissions, transitions, start=torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"`end` of viterbi_nbest must have shape \[tag\]"):
        viterbi_nbest(emissions, transitions, 2, end=torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"`n` of viterbi_nbest must be at least 1. Found 0"):
        viterbi_nbest(emissions, transitions, 0)
    with pytest.raises(ArgumentError, match="`num_samples` of CRF must be at least 1"):
        CRF(4).sample(emissions, 0)


@pytest.mark.parametrize("tags", [4, 40], ids=["in chunks", "stepwise"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rejects_scores_that_are_not_finite(tags: int, wrong: float) -> None:
    emissions = torch.zeros(3, 5, tags)
    emissions[1, 2, 3] = wrong
    with pytest.raises(ArgumentError, match="row 1, position 2, tag 3") as caught:
        viterbi(emissions, torch.zeros(tags, tags))
    assert caught.value.argument == "emissions"
    transitions = torch.zeros(tags, tags)
    transitions[0, 2] = wrong
    with pytest.raises(ArgumentError, match=r"`transitions` of viterbi .* at \[0, 2\]"):
        viterbi(torch.zeros(3, 5, tags), transitions)
    with pytest.raises(ArgumentError, match=r"`start` of viterbi_nbest"):
        viterbi_nbest(torch.zeros(3, 5, tags), torch.zeros(tags, tags), 2, start=transitions[0])
