"""Entries that come and go beside the tree that is built of what there is then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kexue.core import ArgumentError
from kexue_trie_decoding import TrieIndex

END = 4  # neither the least nor the greatest id
Sequences = list[list[int]]
sequences = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), max_size=5)
databases = st.lists(sequences, min_size=1, max_size=12)


def assert_same(index: TrieIndex, wanted: TrieIndex, tmp_path: Path) -> None:
    """Two indices are the same to the last number of their files."""
    assert repr(index) == repr(wanted)
    index.save(tmp_path / "index.safetensors")
    wanted.save(tmp_path / "wanted.safetensors")
    with (
        safe_open(tmp_path / "index.safetensors", "pt") as one,
        safe_open(tmp_path / "wanted.safetensors", "pt") as other,
    ):
        assert one.metadata() == other.metadata()
        for name in other.keys():  # noqa: SIM118 -- a file, no dict
            array, as_built = one.get_tensor(name), other.get_tensor(name)
            assert array.dtype == as_built.dtype
            assert torch.equal(array, as_built)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(databases, st.lists(sequences, max_size=8))
def test_adding_is_building_of_both(
    tmp_path_factory: pytest.TempPathFactory, old: Sequences, new: Sequences
) -> None:
    index = TrieIndex.build(old, END)
    wanted = TrieIndex.build(old + new, END)
    assert_same(index.add(new), wanted, tmp_path_factory.mktemp("add"))
    assert list(index) == list(TrieIndex.build(old, END))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(databases, st.integers(0, 2**12 - 1))
def test_removing_is_building_of_the_rest(
    tmp_path_factory: pytest.TempPathFactory, old: Sequences, which: int
) -> None:
    gone = [row for i, row in enumerate(old) if which >> i & 1]
    left = [row for row in old if row not in gone]
    index = TrieIndex.build(old, END)
    if left:
        wanted = TrieIndex.build(left, END)
        assert_same(index.remove(gone), wanted, tmp_path_factory.mktemp("remove"))
    else:
        with pytest.raises(ArgumentError, match="must leave at least one of the"):
            index.remove(gone)


def test_what_was_added_and_removed_again_leaves_no_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = rng.integers(5, 60, (300, 4)), rng.integers(5, 9_000, (40, 6))
    index = TrieIndex.build(old, END)
    assert_same(index.add(new).remove(new), index, tmp_path)


def test_equal_entries_gain_rows_and_lose_them_together() -> None:
    index = TrieIndex.build([[1, 2], [1]], END).add([[1], [3], [1, 2, END]])
    assert {tuple(e): index.rows_of(i) for i, e in enumerate(index)} == {
        (1,): [1, 2],
        (3,): [3],
        (1, 2): [0, 4],
    }
    left = index.remove([[1], [1]])  # what begins with it stays
    assert {tuple(e): left.rows_of(i) for i, e in enumerate(left)} == {(3,): [1], (1, 2): [0, 2]}


def test_nothing_to_do_gives_the_index_itself() -> None:
    index = TrieIndex.build([[1]], END)
    assert index.add([]) is index
    assert index.remove([]) is index


def test_sequences_of_any_form_come_and_go() -> None:
    index = TrieIndex.build([[1, 2]], END)
    matrix = np.array([[3, -1], [3, 5]])
    for form in (matrix, torch.from_numpy(matrix), [[3], [3, 5, END]], ([3], (3, 5))):
        more = index.add(form)
        assert list(more) == [[3], [1, 2], [3, 5]]
        assert list(more.remove(form)) == [[1, 2]]


def test_a_file_stays_until_it_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    TrieIndex.build([[1, 2], [3]], END).save(path)
    before = path.read_bytes()
    index = TrieIndex.load(path)
    changed = index.add([[9, 9]]).remove([[3]])
    assert path.read_bytes() == before
    changed.save(path)  # while it is mapped
    assert list(index) == [[3], [1, 2]]
    assert list(TrieIndex.load(path)) == list(changed) == [[1, 2], [9, 9]]


def test_what_cannot_be_removed_or_added_is_refused() -> None:
    index = TrieIndex.build([[1, 2], [3]], END)
    for unknown in ([1], [1, 2, 3], [7], []):
        with pytest.raises(ArgumentError, match="Sequence 1 is none") as caught:
            index.remove([[3], unknown])
        assert caught.value.argument == "sequences"
    with pytest.raises(ArgumentError, match="inside sequence 0"):
        index.add([[END, 1]])
    with pytest.raises(ArgumentError, match="Found -3 in sequence 0"):
        index.add([[-3]])
