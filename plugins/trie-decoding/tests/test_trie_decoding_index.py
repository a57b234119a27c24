"""The prefix tree beside nested dicts: what may follow, where it leads, what it holds."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.core import ArgumentError, FileFormatError
from kexue_trie_decoding import TrieIndex
from kexue_trie_decoding.kernels import Tree, expand, match

END = 0
Sequences = list[list[int]]
databases = st.lists(st.lists(st.integers(1, 5), max_size=5), min_size=1, max_size=12)


def nested(sequences: Sequences) -> dict[int, Any]:
    """Return the tree as the post writes it."""
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in [*sequence, END]:
            node = node.setdefault(token, {})
    return root


def below(root: dict[int, Any], prefix: list[int]) -> list[int] | None:
    """Return what may follow a prefix; None if nothing begins with it."""
    node = root
    for token in prefix:
        if token not in node:
            return None
        node = node[token]
    return sorted(node)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(databases, st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=8))
def test_every_mask_is_that_of_nested_dicts(sequences: Sequences, prefixes: Sequences) -> None:
    index, root = TrieIndex.build(sequences, END), nested(sequences)
    nodes = index.walk(prefixes)
    logits = torch.randn(len(prefixes), 8)
    masked = index.mask(logits, nodes)
    for row, prefix in enumerate(prefixes):
        children = below(root, prefix)
        assert (children is None) == (int(nodes[row]) == -1)
        wanted = children or [END]  # an ended or lost row may only end
        assert masked[row].isfinite().nonzero()[:, 0].tolist() == wanted
        assert torch.equal(masked[row, wanted], logits[row, wanted])
        for token in range(8):
            after = index.advance(nodes[row : row + 1], torch.tensor([token]))
            assert torch.equal(after, index.walk([[*prefix, token]]))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(databases)
def test_it_holds_what_it_was_built_of_and_nothing_else(sequences: Sequences) -> None:
    index = TrieIndex.build(sequences, END)
    different = sorted({tuple(s) for s in sequences}, key=lambda s: (len(s), s))
    assert [tuple(s) for s in index] == different
    assert len(index) == len(different)
    assert index.num_rows == len(sequences)
    entries = index.find(sequences)
    assert torch.equal(entries, index.find([[*s, END] for s in sequences]))
    for row, entry in enumerate(entries.tolist()):
        assert index.rows_of(entry) == [i for i, s in enumerate(sequences) if s == sequences[row]]
    assert all(s in index for s in sequences)
    absent = [s[:-1] for s in different if s and s[:-1] not in different]
    assert index.find([list(s) for s in absent]).tolist() == [-1] * len(absent)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(databases, st.lists(st.integers(1, 5), max_size=3))
def test_entries_below_a_prefix_are_those_that_begin_with_it(
    sequences: Sequences, prefix: list[int]
) -> None:
    index = TrieIndex.build(sequences, END)
    entries = index.below(int(index.walk([prefix])[0]))
    found = [[i for i in row if i > 0] for row in index.sequences(entries).tolist()]
    wanted = {tuple(s) for s in sequences if s[: len(prefix)] == prefix}
    assert {tuple(s) for s in found} == wanted
    assert len(found) == len(wanted)


def test_a_prefix_of_an_entry_and_the_empty_sequence_are_entries() -> None:
    index = TrieIndex.build([[1, 2, 3], [1], []], END)
    assert list(index) == [[], [1], [1, 2, 3]]
    assert index.edges(index.walk([[1]])).tokens.tolist() == [END, 2]
    assert TrieIndex.build([[]], END).edges(torch.tensor([0])).tokens.tolist() == [END]


def test_sequences_of_any_form_give_the_same_tree() -> None:
    lists = [[3, 1], [2], [], [3, 1, 2]]
    matrix = np.array([[3, 1, -1], [2, -1, -1], [-1, -1, -1], [3, 1, 2]])
    ended = [[*row, END] for row in lists]
    wanted = list(TrieIndex.build(lists, END))
    wide = np.stack([matrix, matrix])[:, :, ::1].transpose(1, 0, 2)[:, 0]
    for given_as in (matrix, torch.from_numpy(matrix), matrix.astype(np.int16), ended, wide):
        assert list(TrieIndex.build(given_as, END)) == wanted
    assert list(TrieIndex.build((np.array(row, dtype=int) for row in lists), END)) == wanted


def test_long_sequences_need_no_recursion() -> None:
    long = list(range(1, 5001))
    index = TrieIndex.build([long, [*long[:-1], 9]], END)
    assert index.max_length == 5001
    assert long in index
    assert index.num_nodes == 5000 + 4
    assert list(index) == [[*long[:-1], 9], long]


def test_chinese_text_is_found_by_its_prefix() -> None:
    lines = [
        "明月几时有",
        "明天会更好",
        "明天下雨",
        "明天下午开会",
        "明天下午放假",
        "明年见",
        "今夕是何年",
        "今天去哪里玩",
    ]
    vocabulary = sorted(set("".join(lines)))
    ids = [[1 + vocabulary.index(c) for c in line] for line in lines]
    index = TrieIndex.build(ids, END)
    edges = index.edges(index.walk([ids[0][:1], ids[1][:2], []]))
    follow = [
        {vocabulary[t - 1] for t in edges.tokens[edges.rows == row].tolist()} for row in range(3)
    ]
    assert follow == [{"月", "天", "年"}, {"会", "下"}, {"明", "今"}]


def test_a_tree_takes_eight_bytes_a_node() -> None:
    matrix = np.random.default_rng(0).integers(1, 50_000, (20_000, 6))
    index = TrieIndex.build(matrix, END)
    per_row = index.nbytes - 8 * index.num_nodes
    assert per_row <= 12 * index.num_rows + 8
    assert "20000 entries" in repr(index)


def test_ids_beyond_the_vocabulary_lead_nowhere() -> None:
    index = TrieIndex.build([[1, 1], [2, 1], [3]], END)
    for token in (-1, 4, 5, 6, 9, 2**40):  # 5 is to the root what 1 is to the next node
        assert index.advance(torch.tensor([0, 1, 2]), torch.full((3,), token)).tolist() == [-1] * 3


# -- masks -----------------------------------------------------------------------------------------


def test_rows_at_the_same_crowded_node_are_masked_like_others() -> None:
    index = TrieIndex.build(np.random.default_rng(0).integers(1, 40, (400, 3)), END)
    logits = torch.randn(30, 40)
    nodes = torch.where(torch.arange(30) % 3 == 0, 0, index.walk([[i % 39 + 1] for i in range(30)]))
    together = index.mask(logits, nodes)
    alone = [index.mask(logits[i : i + 1], nodes[i : i + 1])[0] for i in range(30)]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together.isfinite(), index.allowed(nodes, 40))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_keep_the_dtype_and_take_views(dtype: torch.dtype) -> None:
    index = TrieIndex.build([[1, 2], [1, 3], [2]], END)
    logits = torch.randn(5, 2, dtype=torch.float64).to(dtype)
    masked = index.mask(logits.T, torch.tensor([0, 1]))
    assert masked.dtype == dtype
    assert torch.equal(masked, index.mask(logits.T.contiguous(), torch.tensor([0, 1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crowd", [1, 50])
def test_gradients_reach_what_may_follow_alone(crowd: int, dtype: torch.dtype) -> None:
    index = TrieIndex.build([[i + 1, 2] for i in range(crowd)], END)
    logits = torch.randn(2, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    nodes = torch.zeros(2, dtype=torch.int64)
    (grad,) = torch.autograd.grad(
        index.mask(logits.requires_grad_(), nodes)[index.allowed(nodes, 60)].sum(), logits
    )
    assert torch.equal(grad, index.allowed(nodes, 60).to(dtype))


@pytest.mark.parametrize("crowd", [1, 50])
def test_a_row_is_never_without_a_candidate(crowd: int) -> None:
    index = TrieIndex.build([[i + 1, 2] for i in range(crowd)], END)
    logits = torch.zeros(4, 60)
    logits[0, 1 : crowd + 1] = -torch.inf
    logits[1] = torch.nan
    logits[2, 1] = torch.nan
    masked = index.mask(logits, torch.zeros(4, dtype=torch.int64))
    allowed = torch.zeros(60, dtype=torch.bool)
    allowed[1 : crowd + 1] = True
    for row in (0, 1, 3):
        assert torch.equal(masked[row] == 0, allowed)
        assert torch.equal(masked[row].isneginf(), ~allowed)
    kept = allowed.clone()
    kept[1] = crowd == 1  # NaN is out, unless there is nothing else
    assert torch.equal(masked[2] == 0, kept)
    assert not masked.isnan().any()


def test_no_rows_give_no_rows() -> None:
    index = TrieIndex.build([[1]], END)
    none = torch.zeros(0, dtype=torch.int64)
    assert index.mask(torch.zeros(0, 3), none).shape == (0, 3)
    assert index.advance(none, none).shape == (0,)
    assert len(index.edges(none).rows) == 0
    assert index.walk([]).shape == (0,)
    assert index.sequences(none).shape == (0, 0)


def test_masking_modifies_nothing() -> None:
    index = TrieIndex.build([[1, 2], [2]], END)
    logits, nodes = torch.randn(2, 3), torch.tensor([0, 1])
    before = logits.clone()
    index.mask(logits, nodes)
    assert torch.equal(logits, before)
    assert nodes.tolist() == [0, 1]


# -- the same arithmetic on tensors ----------------------------------------------------------------


def test_kernels_give_the_same_on_tensors_and_arrays() -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 500, 200))
    keys = np.append(keys, 63 << 3)
    nodes = np.array([-1, 0, 3, 7, 7, 62])
    for array, of_tensor in zip(
        expand(*Tree(keys, 3).span(nodes)),
        expand(*Tree(torch.from_numpy(keys), 3).span(torch.from_numpy(nodes))),
        strict=True,
    ):
        assert array.tolist() == of_tensor.tolist()
    tokens = np.array([1, 4, 2, 9, 3, -1])
    array, of_tensor = (
        Tree(make(keys), 3).follow(make(nodes), make(tokens))
        for make in (np.array, torch.from_numpy)
    )
    assert array.tolist() == of_tensor.tolist()


def test_rows_are_matched_with_equal_rows() -> None:
    before = np.random.default_rng(0).integers(0, 9, (20, 6))
    chosen = np.random.default_rng(1).integers(0, 20, 30)
    for rows in (
        match(before, before[chosen]),
        match(torch.from_numpy(before), torch.from_numpy(before[chosen])),
    ):
        assert np.array_equal(before[np.asarray(rows)], before[chosen])
    assert match(before, np.append(before[:3], [[9] * 6], axis=0)) is None


# -- files and copies ------------------------------------------------------------------------------


def test_a_saved_index_is_the_same(tmp_path: Path) -> None:
    index = TrieIndex.build([[4, 2], [4], [4, 2], []], 7)
    path = tmp_path / "names.safetensors"
    index.save(path)
    loaded = TrieIndex.load(path)
    pickled = pickle.loads(pickle.dumps(index))  # noqa: S301 -- our own bytes
    for twin in (loaded, pickled, copy.deepcopy(index)):
        assert list(twin) == list(index)
        assert repr(twin) == repr(index)
        assert twin.rows_of(2) == [0, 2]
        nodes = torch.tensor([0, 1, -1])
        assert torch.equal(
            twin.mask(torch.zeros(3, 8), nodes), index.mask(torch.zeros(3, 8), nodes)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["names.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, weights)
    with pytest.raises(FileFormatError, match="no index of sequences"):
        TrieIndex.load(weights)
    (tmp_path / "text.safetensors").write_text("明天会更好")
    with pytest.raises(FileFormatError, match="no whole safetensors file"):
        TrieIndex.load(tmp_path / "text.safetensors")
    with pytest.raises(FileFormatError, match="does not exist"):
        TrieIndex.load(tmp_path / "missing.safetensors")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "at least one sequence"),
        (np.zeros((0, 3), dtype=int), "at least one sequence"),
        ([[1], [2, -3]], "Found -3 in sequence 1"),
        ([[1], [], [2**31]], "Found 2147483648 in sequence 2"),
        ([[1, 0, 2]], "inside sequence 0"),
        ([[1], [0, 0]], "inside sequence 1"),
        ([["明"]], "whole numbers"),
        ([[1.5]], "whole numbers"),
        ([1, 2], "whole numbers"),
        (np.zeros((2, 2)), "float64 of shape"),
        (np.array([[1, -1, 2]]), "Row 0 has -1 before an id"),
    ],
)
def test_what_is_no_database_is_refused(sequences: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        TrieIndex.build(sequences, END)
    assert caught.value.argument == "sequences"


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    index = TrieIndex.build([[1, 9]], END)
    with pytest.raises(ArgumentError, match=r"greatest id is 9\. Found a vocabulary of 9"):
        index.mask(torch.zeros(1, 9), torch.tensor([0]))
    with pytest.raises(ArgumentError, match="one row for each of the 2 nodes"):
        index.mask(torch.zeros(1, 10), torch.tensor([0, 0]))
    with pytest.raises(ArgumentError, match="`end_id` must be the id of a token"):
        TrieIndex.build([[1]], -1)
