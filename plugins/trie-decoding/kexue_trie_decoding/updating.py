"""Trees to larger and smaller ones, without building them again.

Nodes keep their order when others come or go, and so do edges. So what is new is searched for, a
level at a time, and the rest is moved: a node by the number of those that came before it, which is
constant between the places where something came. Both take the time of a few passes over the tree.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kexue_trie_decoding.building import Arrays, Ints, bits_of

__all__ = ["merge", "prune"]


def merge(old: Arrays, new: Arrays) -> Arrays:
    """Return the tree of the sequences of two, the rows of the second behind those of the first.

    Args:
        old: The larger one, for speed.
        new: The other, of the same end token.
    """
    num_tokens = max(old.num_tokens, new.num_tokens)
    bits = bits_of(num_tokens)
    keys, others = _recoded(old, bits), _recoded(new, bits)
    at, there = _found(keys, others, new.levels, bits)
    fresh = ~there[1:]
    came = at[1:][fresh] - 1  # before which old edge each new one comes, ascending
    # the nodes of both trees in the merged one
    number = at + np.searchsorted(came, at - 1, side="right")
    number[1:][fresh] = came + np.arange(1, len(came) + 1)
    parents, tokens = others[fresh] >> bits, others[fresh] & (1 << bits) - 1
    moved = keys + (_steps(keys, came + 1, bits) << bits)
    depth = max(len(old.levels), len(new.levels))
    before = np.concatenate([[0], np.cumsum(~there)])
    levels = np.array(_filled(old.levels, depth)) + before[_filled(new.levels, depth)]
    leaves = old.leaves + np.searchsorted(came, old.leaves - 1, side="right")
    leaves, firsts, rows = _rows_merged(old, new, leaves, number[new.leaves])
    return Arrays(
        np.insert(moved, came, (number[parents] << bits) + tokens),
        num_tokens,
        levels.tolist(),
        leaves,
        firsts,
        rows,
    )


def _found(keys: Ints, others: Ints, levels: list[int], bits: int) -> tuple[Ints, Ints]:
    """Return where the nodes of another tree are, and whether they are there.

    Of one that is not there, it is the node before which it would come.
    """
    at = np.zeros(levels[-1], dtype=np.int64)
    there = np.ones(levels[-1], dtype=bool)
    ends = np.append(keys, -1)  # for what would come behind all
    for low, high in pairwise(levels[1:]):
        wanted = others[low - 1 : high - 1]
        parent, token = wanted >> bits, wanted & (1 << bits) - 1
        known = there[parent]
        # children of a new node come before those of the node that it comes before
        wanted = (at[parent] << bits) + token * known
        place = np.searchsorted(keys, wanted)
        at[low:high] = place + 1
        there[low:high] = known & (ends[place] == wanted)
    return at, there


def _rows_merged(old: Arrays, new: Arrays, leaves: Ints, others: Ints) -> tuple[Ints, Ints, Ints]:
    """Return leaves, firsts and rows of two trees whose leaves have merged numbers."""
    place = np.searchsorted(leaves, others)
    fresh = np.append(leaves, -1)[place] != others
    behind = old.firsts[place + ~fresh]  # behind the old rows of the same entry
    counts, more = np.diff(old.firsts), np.diff(new.firsts)
    merged = np.insert(leaves, place[fresh], others[fresh])
    counts = np.insert(counts, place[fresh], 0)
    counts[np.searchsorted(merged, others)] += more
    rows = np.insert(old.rows, behind.repeat(more), new.rows + len(old.rows))
    return merged, np.concatenate([[0], np.cumsum(counts)]), rows


def prune(old: Arrays, entries: Ints, end_id: int) -> Arrays:
    """Return the tree without some entries; the rows that are left keep their order.

    Args:
        old: The tree.
        entries: Their numbers, ascending, each once, and not all.
        end_id: The end token.
    """
    bits = bits_of(old.num_tokens)
    gone = _dead(old, old.leaves[entries], bits)
    keys = old.keys - (_steps(old.keys, gone + 1, bits) << bits)
    keys = np.delete(keys, gone - 1)
    num_tokens = max(int((keys & (1 << bits) - 1).max()), end_id) + 1
    levels = [level - int(np.searchsorted(gone, level)) for level in old.levels]
    while levels[-2] == levels[-1]:  # nothing is left so deep
        levels.pop()
    leaves = np.delete(old.leaves, entries)
    counts = np.diff(old.firsts)
    kept = np.ones(len(counts), dtype=bool)
    kept[entries] = False
    rows = old.rows[kept.repeat(counts)]
    left = np.zeros(len(old.rows), dtype=bool)
    left[rows] = True
    smaller = Arrays(
        keys,
        old.num_tokens,
        levels,
        leaves - np.searchsorted(gone, leaves),
        np.concatenate([[0], np.cumsum(counts[kept])]),
        (np.cumsum(left) - 1)[rows],
    )
    return smaller._replace(keys=_recoded(smaller, bits_of(num_tokens)), num_tokens=num_tokens)


def _dead(old: Arrays, leaves: Ints, bits: int) -> Ints:
    """Return the nodes below which nothing is left without some leaves, ascending."""
    found: list[Ints] = []
    above = leaves[:0]
    for low, high in zip(old.levels[-2:0:-1], old.levels[:1:-1], strict=True):
        here = leaves[(leaves >= low) & (leaves < high)]
        dead = np.sort(np.concatenate([here, above]))
        found.append(dead)
        parents, lost = np.unique(old.keys[dead - 1] >> bits, return_counts=True)
        begin, end = np.searchsorted(old.keys, [parents << bits, parents + 1 << bits])
        above = parents[lost == end - begin]
    return np.concatenate(found[::-1])


def _steps(keys: Ints, nodes: Ints, bits: int) -> Ints:
    """Return for each edge how many of some ascending nodes its parent is not before."""
    begins = np.searchsorted(keys, nodes << bits)
    runs = np.diff(begins, prepend=0, append=len(keys))
    return np.arange(len(nodes) + 1).repeat(runs)


def _recoded(tree: Arrays, bits: int) -> Ints:
    had = bits_of(tree.num_tokens)
    if had == bits:
        return tree.keys
    return (tree.keys >> had << bits) + (tree.keys & (1 << had) - 1)


def _filled(levels: list[int], depth: int) -> list[int]:
    """Return the levels as they are in a deeper tree: empty where there were none."""
    return levels + levels[-1:] * (depth - len(levels))
