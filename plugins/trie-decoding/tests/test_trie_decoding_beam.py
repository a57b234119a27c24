"""Constrained search beside the enumeration of the database, on models of every make."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError, create
from kexue.core.lab.language import CharacterModel, CharacterSeq2Seq
from kexue.core.language import beam_search, draw, generate, pad_ids
from kexue_trie_decoding import Constrained, LookAhead, TrieBeam, TrieIndex
from kexue_trie_decoding.trie_beam import sums

END = 0
TABLE = torch.randn(10, 10, 10, generator=torch.Generator().manual_seed(3))
databases = st.lists(st.lists(st.integers(1, 6), max_size=5), min_size=1, max_size=15)


def model(ids: Tensor) -> Tensor:
    """Score by the first and the last token."""
    return 2 * TABLE[ids[:, 0], ids[:, -1]]


def probability(sequences: list[list[int]], entry: list[int], prompt: list[int]) -> float:
    """Return the probability of an entry: the model's, renormalised over what may follow."""
    entries = [[*s, END] for s in sequences]
    entry, ids, log_p = [*entry, END], list(prompt), 0.0
    for step, token in enumerate(entry):
        allowed = sorted({e[step] for e in entries if e[:step] == entry[:step] and len(e) > step})
        scores = model(torch.tensor([ids]))[0]
        log_p += float((scores[token] - scores[allowed].logsumexp(0)).double())
        ids.append(token)
    return log_p


@settings(derandomize=True, max_examples=15, deadline=None)
@given(databases, st.integers(1, 9))
def test_a_wide_beam_finds_all_entries_in_their_order(
    sequences: list[list[int]], first: int
) -> None:
    different = [list(s) for s in {tuple(s) for s in sequences}]
    width = len(different) + 3
    found = TrieBeam(sequences, end_id=END, width=width, num_return=width).decode(
        model, prompt=torch.tensor([[first]])
    )
    ranked = sorted(different, key=lambda s: -probability(different, s, [first]))
    assert found.tolist()[: len(ranked)] == [[*s, END] for s in ranked]
    wanted = torch.tensor([probability(different, s, [first]) for s in ranked])
    torch.testing.assert_close(found.scores[: len(ranked)], wanted, atol=1e-4, rtol=1e-4)
    assert found.tolist()[len(ranked) :] == [[]] * 3
    assert found.scores[len(ranked) :].isneginf().all()
    assert float(found.scores.exp().sum()) == pytest.approx(1, abs=1e-4)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(databases, st.booleans(), st.integers(1, 4), st.floats(0, 2), st.integers(0, 99))
def test_every_result_is_in_the_database(
    sequences: list[list[int]], lookahead: bool, width: int, penalty: float, seed: int
) -> None:
    prompt = torch.randint(1, 10, (4, 3), generator=torch.Generator().manual_seed(seed))
    decoder = TrieBeam(
        sequences, end_id=END, width=width, length_penalty=penalty, lookahead=lookahead
    )
    found = decoder.decode(model, prompt=prompt)
    assert found.ended is not None
    assert found.ended.all()
    assert all(row[-1] == END and row[:-1] in sequences for row in found.tolist())
    for row, entry in zip(found.tolist(), decoder.index.find(found.sequences), strict=True):
        assert sequences[decoder.index.rows_of(int(entry))[0]] == row[:-1]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("kind", ["function", "recurrent", "transformer", "seq2seq"])
def test_a_batch_gives_what_its_rows_give_alone_and_padding_is_not_seen(
    kind: str, lookahead: bool
) -> None:
    torch.manual_seed(0)
    letters = "明月天年会更好下雨"
    models = {
        "function": model,
        "recurrent": CharacterModel(letters, width=16).eval(),
        "transformer": CharacterModel(letters, cell="transformer", width=16).eval(),
        "seq2seq": CharacterSeq2Seq(letters, width=16).eval(),
    }
    rows = [[5, 6, 7], [8], [9, 5, 5, 6, 7, 8, 9]]
    database = [list(s) for n in (1, 2, 3) for s in itertools.product([6, 7, 9], repeat=n)]
    decoder = TrieBeam(database, end_id=2, width=4, num_return=2, lookahead=lookahead)
    prompt, mask = pad_ids(rows)
    together = decoder.decode(models[kind], prompt=prompt, mask=mask)
    garbage = torch.cat([torch.full((3, 2), 8), prompt.masked_fill(~mask, 7)], 1)
    left = torch.cat([torch.zeros(3, 2, dtype=torch.bool), mask], 1)
    shifted = decoder.decode(models[kind], prompt=garbage, mask=left)
    assert shifted.tolist() == together.tolist()
    for i, row in enumerate(rows):
        alone = decoder.decode(models[kind], prompt=torch.tensor([row]))
        assert alone.tolist() == together.tolist()[2 * i : 2 * i + 2]
        torch.testing.assert_close(alone.scores, together.scores[2 * i : 2 * i + 2])


@pytest.mark.parametrize("end", [0, 4, 9])
@pytest.mark.parametrize("lookahead", [None, LookAhead(0.7)])
def test_it_finds_what_a_search_over_the_whole_vocabulary_finds(
    end: int, lookahead: LookAhead | None
) -> None:
    tokens = [i for i in range(10) if i != end]
    database = [list(s) for n in (1, 2, 3) for s in itertools.product(tokens[2:6], repeat=n)]
    index = TrieIndex.build([*database, [tokens[0]]], end)
    prompt = torch.randint(10, (5, 3), generator=torch.Generator().manual_seed(1))
    settings_: dict[str, Any] = {"width": 6, "num_return": 6}
    wanted = beam_search(
        Constrained(model, index, lookahead=lookahead), prompt, max_new_tokens=4, **settings_
    )
    found = TrieBeam(index, lookahead=lookahead is not None, strength=0.7, **settings_).decode(
        model, prompt=prompt
    )
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.scores, wanted.scores)


def test_sampling_draws_entries_with_their_probabilities() -> None:
    sequences = [[1, 2], [1], [3, 4], [3, 5, 1]]
    index = TrieIndex.build(sequences, END)
    prompt = torch.full((4000, 1), 7)
    found = generate(
        Constrained(model, index),
        prompt,
        max_new_tokens=4,
        choose=draw,
        generator=torch.Generator().manual_seed(0),
    )
    entries = index.find(found.sequences)
    for sequence in sequences:
        share = float((entries == index.find([sequence])).double().mean())
        wanted = float(torch.tensor(probability(sequences, sequence, [7])).exp())
        assert share == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_finite(dtype: torch.dtype) -> None:
    index = TrieIndex.build([[1, 2], [3]], END)
    for look in (None, LookAhead()):
        scorer = Constrained(lambda ids: model(ids).to(dtype), index, lookahead=look)
        logits, _ = scorer.begin(torch.tensor([[1, 2]]))
        assert logits.isfinite()[0].nonzero()[:, 0].tolist() == [1, 3]
        found = TrieBeam(index, lookahead=look is not None).decode(
            lambda ids: model(ids).to(dtype), prompt=torch.tensor([[1, 2]])
        )
        assert found.scores.isfinite().all()


def test_a_model_that_excludes_all_entries_still_answers() -> None:
    def refuses(ids: Tensor) -> Tensor:
        return torch.full((len(ids), 10), -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    for lookahead in (False, True):
        found = TrieBeam([[1, 2], [3]], end_id=END, lookahead=lookahead).decode(
            refuses, prompt=torch.tensor([[1]])
        )
        assert found.tolist()[0][:-1] in [[1, 2], [3]]
        assert found.scores.isfinite().all()


def test_it_is_made_by_name_and_copied() -> None:
    example = TrieBeam.example()
    decoder = create("decoder/trie-beam", **example.params, lookahead=True)
    wanted = decoder.decode(sums, prompt=torch.tensor([[1, 2]]))
    pickled = pickle.loads(pickle.dumps(decoder))  # noqa: S301 -- our own bytes
    for twin in (copy.deepcopy(decoder), pickled):
        assert twin.decode(sums, prompt=torch.tensor([[1, 2]])).tolist() == wanted.tolist()


def test_no_prompts_give_no_results() -> None:
    decoder = TrieBeam([[1]], end_id=END)
    assert decoder.decode(model, prompt=torch.zeros(0, 2, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("given_", "argument", "message"),
    [
        ({"database": []}, "sequences", "empty database"),
        ({"end_id": None}, "end_id", "must be given"),
        ({"width": 0}, "width", "Found 0"),
        ({"num_return": 6}, "num_return", "from 1 to `width`, 5. Found 6"),
        ({"after": 1}, "after", "separator_id"),
        ({"database": TrieIndex.build([[1]], 3)}, "end_id", "that of the index, 3"),
    ],
)
def test_what_cannot_be_built_is_refused(
    given_: dict[str, Any], argument: str, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        TrieBeam(**{"database": [[1]], "end_id": END, **given_})
    assert caught.value.argument == argument


def test_prompts_that_do_not_fit_are_refused() -> None:
    decoder = TrieBeam([[6, 7, 8]], end_id=2)
    short = CharacterModel("abcd", cell="transformer", width=16, max_length=6).eval()
    assert decoder.decode(short, prompt=torch.tensor([[6, 7]])).tolist() == [[6, 7, 8, 2]]
    with pytest.raises(ArgumentError, match="longest entry of the database, 4 tokens"):
        decoder.decode(short, prompt=torch.tensor([[6, 7, 8]]))
    with pytest.raises(ArgumentError, match="must hold a character in every row"):
        decoder.decode(CharacterSeq2Seq("abcd", width=16), prompt=torch.zeros(1, 0).long())
    with pytest.raises(ArgumentError, match=r"greatest id is 8\. Found a vocabulary of 7"):
        decoder.decode(CharacterSeq2Seq("ab", width=16), prompt=torch.tensor([[5]]))
