"""Look-ahead beside the enumeration of all entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.language import beam_search
from kexue_trie_decoding import (
    Constrained,
    Coverage,
    LookAhead,
    TrieIndex,
    longest_common_subsequence,
)

END, BAR = 0, 1


def lcs(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common subsequence by the table of all prefixes."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            here = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = here
    return table[-1][-1]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_common_subsequences_are_as_long_as_the_table_says(pairs: list[Any]) -> None:
    a, b = (padded([pair[k] for pair in pairs], fill) for k, fill in ((0, -2), (1, -1)))
    found = longest_common_subsequence(a, b)
    assert found.tolist() == [lcs(x, y) for x, y in pairs]


@pytest.mark.parametrize("length", [1, 61, 62, 63, 124, 130])
def test_questions_of_several_words_carry(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    a = torch.randint(3, (4, length), generator=generator)
    b = torch.randint(3, (4, 90), generator=generator)
    assert longest_common_subsequence(a, b).tolist() == [
        lcs(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)


def wanted_gain(
    entries: list[list[int]], prefix: list[int], token: int, question: list[int], look: LookAhead
) -> int:
    """Return the gain of a token as the post defines it."""
    continued = [e for e in entries if e[: len(prefix)] == prefix]
    choices = {e[len(prefix)] for e in continued}
    bars = prefix.count(BAR) if look.separator_id is not None else 0
    if len(choices) == 1 or bars < look.after:
        return 0
    ends = {END} if look.separator_id is None else {END, BAR}
    begin = max((i + 1 for i, t in enumerate(prefix) if t == BAR and BAR in ends), default=0)
    field, best = prefix[begin:], 0
    for entry in continued:
        if entry[len(prefix)] == token:
            rest = entry[len(prefix) :]
            rest = rest[: next(i for i, t in enumerate(rest) if t in ends)]
            best = max(best, lcs(field + rest, question) - lcs(field, question))
    return best


@pytest.mark.parametrize(
    "look",
    [LookAhead(), LookAhead(separator_id=BAR), LookAhead(separator_id=BAR, after=1)],
    ids=["whole", "fields", "behind the first"],
)
def test_gains_are_those_of_all_entries_below(look: LookAhead) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(2, 6, (length,), generator=generator).tolist()

    sequences = [[*draw(2), BAR, *draw(4)] for _ in range(120)]
    entries = [[*s, END] for s in sequences]
    index = TrieIndex.build(sequences, END)
    questions = torch.randint(2, 6, (5, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 9, 1, 0])[:, None]
    coverage = Coverage(questions.masked_fill(~mask, 77), mask)
    state = look.begin(coverage, 5)
    nodes = torch.zeros(5, dtype=torch.int64)
    prefixes: list[list[int]] = [[] for _ in range(5)]
    seen = 0
    for _ in range(6):
        edges = index.edges(nodes)
        gains = look.gains(edges, index, coverage, state).tolist()
        for row, token, gain in zip(edges.rows.tolist(), edges.tokens.tolist(), gains, strict=True):
            if prefixes[row][-1:] != [END]:
                asked = questions[row][mask[row]].tolist()
                assert gain == wanted_gain(entries, prefixes[row], token, asked, look)
                seen += gain > 0
        ends = torch.bincount(edges.rows).cumsum(0)
        chosen = edges.tokens[ends - 1]  # never the end, where there is a choice
        nodes, state = index.advance(nodes, chosen), look.advance(coverage, state, chosen)
        for row, token in enumerate(chosen.tolist()):
            prefixes[row].append(token)
    assert seen > 5


def test_a_probability_becomes_its_root() -> None:
    index = TrieIndex.build([[2, 3], [4, 5]], END)
    logits = torch.tensor([[0.3, 0.0, -1.0, 0.5, 2.0, 0.1]])
    look = LookAhead(strength=0.5)
    scorer = Constrained(lambda ids: logits.expand(len(ids), -1), index, lookahead=look)
    found, _ = scorer.begin(torch.tensor([[2, 9, 3]]))
    p = logits[0].softmax(0)
    wanted = torch.stack([p[2] ** (1 / (1 + 0.5 * 2)), p[4]])  # 2 3 covers two tokens, 4 5 none
    torch.testing.assert_close(found[0, [2, 4]].softmax(0), wanted / wanted.sum())
    assert found[0, [0, 1, 3, 5]].isneginf().all()


def test_strength_zero_and_an_empty_question_change_nothing() -> None:
    index = TrieIndex.build([[2, 3], [4, 5], [4]], END)
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    plain = Constrained(lambda ids: table[ids[:, -1]], index)
    prompt = torch.tensor([[2, 3], [5, 4]])
    wanted = beam_search(plain, prompt, width=3, max_new_tokens=4)
    for look, mask in (
        (LookAhead(0.0), None),
        (LookAhead(limit=0), None),
        (LookAhead(), torch.tensor([[False, True]] * 2)),
    ):
        scorer = Constrained(lambda ids: table[ids[:, -1]], index, lookahead=look)
        asked = prompt if mask is None else torch.tensor([[7, 8], [7, 8]])
        base = (
            wanted
            if mask is None
            else beam_search(plain, asked, width=3, max_new_tokens=4, mask=mask)
        )
        found = beam_search(scorer, asked, width=3, max_new_tokens=4, mask=mask)
        assert torch.equal(found.sequences, base.sequences)
        torch.testing.assert_close(found.scores, base.scores)


def test_rows_that_are_too_large_are_not_looked_ahead() -> None:
    index = TrieIndex.build([[2, i, j] for i in range(3, 9) for j in range(3, 9)] + [[1, 3]], END)
    coverage = Coverage(torch.tensor([[3, 4], [3, 4]]))
    nodes = index.walk([[], [2, 3]])
    edges = index.edges(nodes)
    for limit, big, small in ((20, False, True), (10_000, True, True), (5, False, False)):
        look = LookAhead(limit=limit)
        gains = look.gains(edges, index, coverage, look.begin(coverage, 2))
        assert bool(gains[edges.rows == 0].any()) is big
        assert bool(gains[edges.rows == 1].any()) is small


@pytest.mark.parametrize(
    ("settings_", "argument"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"after": -1, "separator_id": 1}, "after"),
        ({"after": 1}, "after"),
        ({"limit": -1}, "limit"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`") as caught:
        LookAhead(**settings_)
    assert caught.value.argument == argument
