"""Statistics of texts, matrices estimated from them, and rebalanced encoding."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.core.errors import ArgumentError
from kexue_repetition import (
    RebalancedEncoding,
    estimate_transitions,
    immediate_repeats,
    longest_repeat,
    model_transitions,
    numbered,
    repeated_ngrams,
    repeated_tokens,
    repetition_index,
)

Texts = list[list[int]]
texts = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4)


def ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def longest(row: Sequence[int], *, overlap: bool) -> tuple[int, int, int]:
    """Return length, first and next place of the longest repeat, the leftmost first."""
    for size in range(len(row), 0, -1):
        for i in range(len(row) - size + 1):
            for j in range(i + (1 if overlap else size), len(row) - size + 1):
                if row[i : i + size] == row[j : j + size]:
                    return size, i, j
    return 0, -1, -1


# -- statistics -----------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(texts=texts, n=st.integers(1, 5), padding=st.integers(0, 3))
def test_statistics_are_those_of_each_row_by_itself(texts: Texts, n: int, padding: int) -> None:
    ids, tokens = numbered(texts, tokens=range(4))
    ids = torch.nn.functional.pad(ids, (0, padding), value=-1)
    assert tokens == (0, 1, 2, 3)
    alone, pooled = repeated_ngrams(ids, n), repeated_ngrams(ids, n, pooled=True)
    near, loops = repeated_tokens(ids, n), immediate_repeats(ids, 4)
    for i, row in enumerate(texts):
        grams = ngrams(row, n)
        every = [gram for size in range(1, n + 1) for gram in ngrams(row, size)]
        for found, of in ((alone, grams), (pooled, every)):
            assert float(found[i]) == pytest.approx(1 - len(set(of)) / len(of) if of else 0)
        hits = sum(token in row[max(0, t - n) : t] for t, token in enumerate(row))
        assert float(near[i]) == pytest.approx(hits / max(1, len(row)))
        for k in range(1, 5):
            counted = sum(
                len(row) > t + 2 * k and row[t : t + k + 1] == row[t + k : t + 2 * k + 1]
                for t in range(len(row))
            )
            assert loops[i, k - 1] == counted


@settings(derandomize=True, max_examples=60, deadline=None)
@given(texts=texts, overlap=st.booleans(), padding=st.integers(0, 3))
def test_the_longest_repeat_is_the_longest(texts: Texts, overlap: bool, padding: int) -> None:
    ids = torch.nn.functional.pad(numbered(texts, range(4))[0], (0, padding), value=-1)
    found = longest_repeat(ids, overlap=overlap)
    for i, row in enumerate(texts):
        assert tuple(int(each[i]) for each in found) == longest(row, overlap=overlap)


def test_a_long_repeat_is_found_among_many() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (3, 5000), generator=generator)
    ids[1, 4000:4321] = ids[1, 17:338]
    ids[1, 4321] = 1001
    found = longest_repeat(ids)
    assert found.length[1] == 321
    assert (int(found.first[1]), int(found.second[1])) == (17, 4000)
    assert (found.length[[0, 2]] < 5).all()


def test_statistics_of_nothing() -> None:
    for ids in (torch.zeros(0, 3).long(), torch.zeros(2, 0).long(), torch.full((2, 3), -1)):
        assert repeated_ngrams(ids).tolist() == [0.0] * len(ids)
        assert repeated_tokens(ids).tolist() == [0.0] * len(ids)
        assert longest_repeat(ids).length.tolist() == [0] * len(ids)
        assert immediate_repeats(ids).sum() == 0
    one = torch.tensor([[7]])
    assert repeated_ngrams(one, 1).item() == 0
    assert longest_repeat(one, overlap=True).first.item() == -1


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3), torch.zeros(2, 2), torch.tensor([[-2, 1]]), torch.tensor([[1, -1, 1]]), "ab"],
)
def test_ids_that_are_none_are_refused(wrong: Any) -> None:
    for function in (repeated_ngrams, repeated_tokens, longest_repeat, immediate_repeats):
        with pytest.raises(ArgumentError, match="`ids` must be") as caught:
            function(wrong)
        assert caught.value.argument == "ids"


# -- estimation -----------------------------------------------------------------------------------


def test_the_estimate_counts_what_follows() -> None:
    rows = [[0, 1, 1, 2], [1, 2], [2], []]
    ids, _ = numbered(rows, range(4))
    found = estimate_transitions(ids, num_tokens=4)
    wanted = [[0, 1, 0, 0], [0, 1 / 3, 2 / 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(found.dense(), torch.tensor(wanted, dtype=torch.float64))
    assert found.start is not None
    assert found.start.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    cut = estimate_transitions(torch.tensor([[0, 0, 1]]), ended=False, unseen=1.0).dense()
    torch.testing.assert_close(cut, torch.tensor([[1 / 3, 1 / 3], [0, 0]], dtype=torch.float64))
    some = estimate_transitions(ids, num_tokens=4, ended=torch.tensor([False, True, False, True]))
    torch.testing.assert_close(some.dense(), found.dense())


def test_the_end_token_is_no_token_of_the_matrix() -> None:
    ids = torch.tensor([[0, 1, 3, 0, 0], [0, 1, 0, 1, 0]])
    found = estimate_transitions(ids, num_tokens=4, eos_id=3, ended=False).dense()
    assert found[3].sum() == found[:, 3].sum() == 0
    assert found[1].tolist() == pytest.approx([2 / 3, 0, 0, 0])
    assert found[0].tolist() == [0, 1, 0, 0]


def test_text_is_numbered() -> None:
    ids, tokens = numbered(["忐忑不安", "", "忐忑"])
    assert ids.tolist() == [[0, 1, 2, 3], [-1] * 4, [0, 1, -1, -1]]
    assert "".join(map(str, tokens)) == "忐忑不安"
    with pytest.raises(ArgumentError, match="put it in brackets"):
        numbered("忐忑")
    with pytest.raises(ArgumentError, match="'z' in text 1"):
        numbered(["a", "az"], tokens="a")


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({"unseen": -1}, "unseen"), ({"num_tokens": 1}, "num_tokens"), ({"tokens": "ab"}, "tokens")],
)
def test_estimation_rejects(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        estimate_transitions(torch.tensor([[0, 1, 2]]), **settings)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`ended`"):
        estimate_transitions(torch.tensor([[0, 1, 2]]), ended=torch.tensor([True, False]))


# -- models ---------------------------------------------------------------------------------------


def test_the_matrix_of_a_bigram_model_is_found_again() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(5, 5, generator=generator).softmax(1)  # the last token is the end

    def model(ids: torch.Tensor) -> torch.Tensor:
        return p[ids[:, -1]].log()

    prompt = torch.tensor([[0], [1], [2], [3]])
    found, ids = model_transitions(
        model, prompt, max_new_tokens=40, samples=300, eos_id=4, generator=generator
    )
    assert (found.dense()[:4, :4] - p[:4, :4]).abs().max() < 0.06
    assert found.dense()[4].sum() == 0
    assert len(ids) == 1200
    assert int(ids.max()) == 3
    wanted = repetition_index(p[:4, :4]).value
    assert repetition_index(found).value == pytest.approx(wanted, rel=0.2)
    greedy, text = model_transitions(
        model, prompt, max_new_tokens=6, top_k=1, eos_id=4, samples=2, rows_at_once=3
    )
    assert torch.equal(text[::2], text[1::2])
    assert set(greedy.matrix.data.tolist()) <= {1.0}


def test_models_of_transformers_are_taken() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    calls = [
        model_transitions(
            model,
            torch.tensor([[3, 4], [5, 6]]),
            max_new_tokens=10,
            samples=3,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(calls[0][1], calls[1][1])
    assert not torch.equal(calls[0][1], calls[2][1])
    assert len(calls[0][0]) == 12
    with pytest.raises(ArgumentError, match="`samples`"):
        model_transitions(model, torch.tensor([[3]]), max_new_tokens=3, samples=0)


# -- rebalanced encoding --------------------------------------------------------------------------


def greedy_pieces(tokens: Sequence[object], phrases: Sequence[tuple[object, ...]]) -> list[object]:
    found: list[object] = []
    place = 0
    while place < len(tokens):
        fits = [p for p in phrases if tuple(tokens[place : place + len(p)]) == p]
        piece = max(fits, key=len, default=(tokens[place],))
        found.append(piece)
        place += len(piece)
    return found


@settings(derandomize=True, max_examples=60, deadline=None)
@given(texts=texts, new=st.lists(st.integers(0, 5), max_size=12), gamma=st.sampled_from([0.2, 0.5]))
def test_encoding_is_the_longest_match_and_is_lossless(
    texts: Texts, new: list[int], gamma: float
) -> None:
    encoding = RebalancedEncoding(gamma, smoothing=0.1).fit(texts)
    for text in [*texts, new]:
        pieces = encoding.encode(text)
        assert pieces == greedy_pieces(text, encoding.phrases)
        assert encoding.decode(pieces) == text
    assert encoding.encode_all([*texts, new]) == [encoding.encode(t) for t in [*texts, new]]


def test_merging_follows_the_paper() -> None:
    rows = ["abc"] * 6 + ["ad"] * 2
    encoding = RebalancedEncoding(gamma=0.4, smoothing=1.0).fit(rows)
    # of a: b (6+1)/(8+4), d 3/12; of b: c 7/10; then nothing but d comes after a
    first = encoding.history[0]
    assert first.vocabulary == 4
    assert first.largest == pytest.approx(0.7)
    assert first.merged == 2
    assert set(encoding.phrases[:2]) == {("a", "b"), ("b", "c")}
    assert encoding.encode("abcad") == [("a", "b", "c"), ("a", "d")]
    assert encoding.history[-1].largest <= 0.4 or encoding.history[-1].merged == 0


def test_pairs_across_texts_are_not_merged() -> None:
    rows = list(itertools.chain.from_iterable([["xa", "by"], ["za", "bw"], ["va", "bu"]] * 20))
    encoding = RebalancedEncoding(0.5).fit(rows)
    assert ("a", "b") not in encoding.phrases
    assert encoding.encode("ab") == [("a",), ("b",)]


def test_merging_lowers_the_index_and_tokens_may_be_anything() -> None:
    rows = ["忐忑不安的心情", "忐忑的心忐忑的心忐忑的心", "他忐忑地说"] * 3

    def index(texts: Sequence[Sequence[object]]) -> float:
        return repetition_index(estimate_transitions(numbered(texts)[0])).value

    encoding = RebalancedEncoding(0.5).fit(rows)
    assert ("忐", "忑") in encoding.phrases
    assert index(encoding.encode_all(rows)) < index(rows)
    words = [["=", "a=b", "a", "b", ("t", 1)]] * 9
    other = pickle.loads(pickle.dumps(RebalancedEncoding(0.1).fit(words)))  # noqa: S301 -- our own
    assert other.decode(other.encode(words[0])) == words[0]
    assert len(other.encode(words[0])) < 5
    assert "phrases" in repr(other)


def test_encoding_of_nothing() -> None:
    encoding = RebalancedEncoding().fit([])
    assert encoding.encode("") == []
    assert encoding.encode("ab") == [("a",), ("b",)]
    assert encoding.encode_all([]) == []
    assert RebalancedEncoding().fit(["", "a"]).encode("a") == [("a",)]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"gamma": 0}, "gamma"),
        ({"gamma": 1}, "gamma"),
        ({"rounds": 0}, "rounds"),
        ({"smoothing": -1}, "smoothing"),
    ],
)
def test_encoding_rejects(settings: dict[str, float], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`") as caught:
        RebalancedEncoding(**settings)  # type: ignore[arg-type]
    assert caught.value.argument == argument
    with pytest.raises(ArgumentError, match="put it in brackets"):
        RebalancedEncoding().fit("text")
