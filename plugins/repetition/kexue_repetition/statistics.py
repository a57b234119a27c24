"""How much texts repeat themselves: n-grams, windows, longest block, and the post's own loops.

All work on ids ``[row, time]`` that are right-padded with PAD, for all rows at once and on their
device, by numbering n-grams with sorts; no Python runs per token or per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError
from kexue_repetition.estimation import checked_ids

__all__ = [
    "LongestRepeat",
    "immediate_repeats",
    "longest_repeat",
    "repeated_ngrams",
    "repeated_tokens",
]


def repeated_ngrams(
    ids: Int[Tensor, "row time"], n: int = 4, *, pooled: bool = False
) -> Float[Tensor, " row"]:
    """Return seq-rep-n, the share of n-grams that occurred before: 1 - different / all.

    Args:
        ids: Texts, right-padded with :data:`~kexue.core.PAD`.
        n: Length of the n-grams.
        pooled: Whether n-grams of all lengths up to ``n`` count together, as in the script of Fu
            et al. (their figures are lower).

    Returns:
        Shape ``[row]``, float64; 0 for rows that hold no n-gram.

    Raises:
        ArgumentError: If ``n`` is below 1, or ``ids`` are not rows of ids.

    Example:
        >>> import torch
        >>> from kexue_repetition import repeated_ngrams
        >>> repeated_ngrams(torch.tensor([[5, 6, 5, 6, 5], [1, 2, -1, -1, -1]]), 2)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    _at_least_one("n", n)
    ids = checked_ids(ids)
    rows, time = ids.shape
    total = torch.zeros(rows, dtype=torch.float64, device=ids.device)
    different = total.clone()
    if not ids.numel():
        return total
    lengths = (ids != PAD).sum(1)
    single, codes = _coded(ids), _coded(ids)
    for size in range(1, min(n, time) + 1):
        if size > 1:
            codes = _joined(codes[:, :-1], single[:, size - 1 :])
        if pooled or size == n:
            inside = torch.arange(time - size + 1, device=ids.device) + size <= lengths[:, None]
            found = torch.unique(codes[inside])  # codes hold the row, too
            where = torch.zeros(int(codes.max()) + 1, dtype=torch.int64, device=ids.device)
            number = torch.arange(rows, device=ids.device)[:, None].expand_as(codes)
            where[codes[inside]] = number[inside]
            different += torch.bincount(where[found], minlength=rows)
            total += inside.sum(1)
    return torch.where(total > 0, 1 - different / total.clamp(min=1), 0.0)


def repeated_tokens(ids: Int[Tensor, "row time"], window: int = 16) -> Float[Tensor, " row"]:
    """Return rep-w, the share of tokens that are among the ``window`` tokens before them.

    Args:
        ids: Texts, right-padded with :data:`~kexue.core.PAD`.
        window: How far back to look.

    Returns:
        Shape ``[row]``, float64; 0 for empty rows.

    Raises:
        ArgumentError: If ``window`` is below 1, or ``ids`` are not rows of ids.

    Example:
        >>> import torch
        >>> from kexue_repetition import repeated_tokens
        >>> repeated_tokens(torch.tensor([[5, 6, 5, 7]]), window=2)
        tensor([0.2500], dtype=torch.float64)
    """
    _at_least_one("window", window)
    ids = checked_ids(ids)
    lengths = (ids != PAD).sum(1)
    if not ids.numel():
        return torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    codes = _coded(ids).flatten()
    order = codes.argsort(stable=True)  # equal tokens of a row behind each other, in their order
    near = torch.zeros_like(codes, dtype=torch.bool)
    same = codes[order][1:] == codes[order][:-1]
    near[order[1:]] = same & (order[1:] - order[:-1] <= window)
    inside = ids != PAD
    return (near.view_as(ids) & inside).sum(1).double() / lengths.clamp(min=1)


class LongestRepeat(NamedTuple):
    """The longest block of each row that occurs twice.

    Args:
        length: Shape ``[row]``, tokens of the block; 0 if no token occurs twice.
        first: Shape ``[row]``, where it begins first; -1 if there is none.
        second: Shape ``[row]``, where it begins next.
    """

    length: Int[Tensor, " row"]
    first: Int[Tensor, " row"]
    second: Int[Tensor, " row"]


def longest_repeat(ids: Int[Tensor, "row time"], *, overlap: bool = False) -> LongestRepeat:
    """Return the longest block that occurs at least twice in a row.

    Blocks of 1, 2, 4, … tokens are numbered by sorting pairs of numbers (Karp, Miller and
    Rosenberg), any length is two of them, and the longest is found by bisection, for all rows at
    once: O(N log² N) for N tokens.

    Args:
        ids: Texts, right-padded with :data:`~kexue.core.PAD`.
        overlap: Whether the two occurrences may overlap: in ``aaaa``, ``aaa`` occurs twice then.

    Raises:
        ArgumentError: If ``ids`` are not rows of ids.

    Example:
        >>> import torch
        >>> from kexue_repetition import longest_repeat
        >>> longest_repeat(torch.tensor([[1, 2, 3, 9, 1, 2, 3]]))
        LongestRepeat(length=tensor([3]), first=tensor([0]), second=tensor([4]))
    """
    ids = checked_ids(ids)
    rows, time = ids.shape
    low = torch.zeros(rows, dtype=torch.int64, device=ids.device)
    if not ids.numel():
        return LongestRepeat(low, low - 1, low - 1)
    lengths = (ids != PAD).sum(1)
    numbers = [_coded(ids)]
    width = 1
    while 2 * width <= time:
        last = numbers[-1]
        beyond = torch.roll(last, -width, 1)  # what wraps is behind the end, and masked
        numbers.append(_joined(last, beyond))
        width *= 2
    blocks = torch.stack(numbers)
    high = (lengths - 1).clamp(min=0) if overlap else lengths // 2
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        found, _, _ = _occurs_twice(blocks, lengths, middle.clamp(min=1), overlap=overlap)
        open_, below = low < high, middle - 1
        low = torch.where(open_ & found, middle, low)
        high = torch.where(open_ & ~found, below, high)
    _, first, second = _occurs_twice(blocks, lengths, low.clamp(min=1), overlap=overlap)
    none = low == 0
    return LongestRepeat(low, first.masked_fill(none, -1), second.masked_fill(none, -1))


def _occurs_twice(
    blocks: Tensor, lengths: Tensor, size: Tensor, *, overlap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Say which rows hold a block of ``size[row]`` tokens twice, and where the first such one is.

    Args:
        blocks: Shape ``[power, row, time]``: numbers of the blocks of 2^power tokens.
        lengths: Shape ``[row]``.
        size: Shape ``[row]``, at least 1.
        overlap: Whether occurrences may overlap.
    """
    _, rows, time = blocks.shape
    place = torch.arange(time, device=blocks.device).expand(rows, time)
    # the power of two below each size, without the rounding of logarithms
    power = (size[:, None] >> torch.arange(1, 63, device=size.device) > 0).sum(1)
    row = torch.arange(rows, device=blocks.device)[:, None].expand(rows, time)
    heads = blocks[power[:, None].clamp(max=len(blocks) - 1), row, place]
    shift = (size - 2**power)[:, None]
    tails = blocks[
        power[:, None].clamp(max=len(blocks) - 1), row, (place + shift).clamp(max=time - 1)
    ]
    inside = place + size[:, None] <= lengths[:, None]
    # rows of other powers are numbered in other tables
    codes = _joined(row, _joined(heads, tails))[inside]
    apart = torch.ones_like(size) if overlap else size
    where, at, gap = place[inside], row[inside], apart[row[inside]]
    classes = int(codes.max()) + 1 if len(codes) else 0
    earliest = torch.full((classes,), time, device=size.device)
    earliest.scatter_reduce_(0, codes, where, "amin")
    again = where >= earliest[codes] + gap
    next_one = torch.full((classes,), time, device=size.device)
    next_one.scatter_reduce_(0, codes[again], where[again], "amin")
    first = torch.full((rows,), time, device=size.device)
    first.scatter_reduce_(0, at[again], earliest[codes[again]], "amin")
    begins = again & (earliest[codes] == first[at])
    second = torch.full((rows,), time, device=size.device)
    second.scatter_reduce_(0, at[begins], next_one[codes[begins]], "amin")
    return first < time, first, second


def immediate_repeats(
    ids: Int[Tensor, "row time"], max_length: int | None = None
) -> Int[Tensor, "row length"]:
    """Count the repeated loops of the post: [w₁ … wₖ] followed by [w₁ … wₖ w₁].

    Their expected number at a place of a bigram decoder's text is the sum of
    ``RepetitionIndex.per_token``, each token weighed with its share of the text.

    Args:
        ids: Texts, right-padded with :data:`~kexue.core.PAD`.
        max_length: The greatest k; by default half of the time, at most 64.

    Returns:
        Shape ``[row, length]``, int64: the number for k = 1, 2, ….

    Raises:
        ArgumentError: If ``max_length`` is below 1, or ``ids`` are not rows of ids.

    Example:
        >>> import torch
        >>> from kexue_repetition import immediate_repeats
        >>> immediate_repeats(torch.tensor([[7, 8, 7, 8, 7], [4, 4, 4, 4, -1]]))
        tensor([[0, 1],
                [2, 0]])
    """
    ids = checked_ids(ids)
    rows, time = ids.shape
    if max_length is None:
        max_length = min(time // 2, 64)
    else:
        _at_least_one("max_length", max_length)
    counts = torch.zeros(rows, max_length, dtype=torch.int64, device=ids.device)
    for k in range(1, min(max_length, (time - 1) // 2) + 1):
        same = (ids[:, :-k] == ids[:, k:]) & (ids[:, k:] != PAD)
        run = torch.nn.functional.pad(same.long().cumsum(1), (1, 0))
        counts[:, k - 1] = (run[:, k + 1 :] - run[:, : -(k + 1)] == k + 1).sum(1)
    return counts


def _coded(ids: Tensor) -> Tensor:
    """Return numbers from 0 that are equal where row and token are."""
    row = torch.arange(len(ids), device=ids.device)[:, None]
    _, codes = torch.unique(ids, return_inverse=True)
    return _joined(row.expand_as(ids), codes)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Return numbers from 0 that are equal where both numbers are."""
    if not a.numel():
        return a
    found: tuple[Tensor, Tensor] = torch.unique(a * (int(b.max()) + 1) + b, return_inverse=True)
    return found[1]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ArgumentError(f"`{name}` must be at least 1. Found {value}.", argument=name)
