"""What arguments must be, said once at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError

if TYPE_CHECKING:
    from kexue_crf.likelihood import Scores

__all__ = [
    "check_emissions",
    "check_mask",
    "check_shape",
    "check_tags",
    "forbidden_tags",
    "not_finite",
    "tags_out_of_range",
]


def check_shape(
    value: Tensor, name: str, owner: str, *, axes: str, shape: tuple[int, ...], of: str = ""
) -> None:
    """Raise unless ``value`` has ``shape``.

    Args:
        value: The argument.
        name: Its name.
        owner: Whose argument it is.
        axes: The axes by name, ``"[batch, time]"``.
        shape: The shape it must have.
        of: What the shape follows from, to end the sentence with.

    Raises:
        ArgumentError: If it has not.
    """
    if tuple(value.shape) != shape:
        raise ArgumentError(
            f"`{name}` of {owner} must have shape {axes} = {list(shape)}{of}. "
            f"Found {list(value.shape)}.",
            argument=name,
        )


def check_emissions(emissions: Tensor, owner: str, num_tags: int | None = None) -> None:
    """Raise unless ``emissions`` are floating-point scores ``[batch, time, tag]``.

    Raises:
        ArgumentError: If they are not, or have another number of tags than ``num_tags``.
    """
    if emissions.dim() != 3 or emissions.shape[2] == 0:
        raise ArgumentError(
            f"`emissions` of {owner} must have shape [batch, time, tag] with at least one tag. "
            f"Found {list(emissions.shape)}.",
            argument="emissions",
        )
    if not emissions.is_floating_point():
        raise ArgumentError(
            f"`emissions` of {owner} must be floating-point scores. Found {emissions.dtype}; "
            f"convert them with `emissions.float()`.",
            argument="emissions",
        )
    if num_tags is not None and emissions.shape[2] != num_tags:
        raise ArgumentError(
            f"`emissions` of {owner} must score num_tags = {num_tags} tags in its last axis. "
            f"Found {emissions.shape[2]}.",
            argument="emissions",
        )


def check_mask(mask: Tensor | None, emissions: Tensor, owner: str) -> None:
    """Raise unless ``mask`` is None or bool ``[batch, time]``.

    Raises:
        ArgumentError: If it is something else.
    """
    if mask is None:
        return
    batch, time, _ = emissions.shape
    of = ", the first two axes of `emissions`"
    check_shape(mask, "mask", owner, axes="[batch, time]", shape=(batch, time), of=of)
    if mask.dtype != torch.bool:
        raise ArgumentError(
            f"`mask` of {owner} must be bool, true at real positions. Found {mask.dtype}; "
            f"convert it with `mask.bool()`.",
            argument="mask",
        )


def check_tags(tags: Tensor, emissions: Tensor, owner: str) -> None:
    """Raise unless ``tags`` are integers ``[batch, time]``.

    Raises:
        ArgumentError: If they are something else.
    """
    batch, time, _ = emissions.shape
    of = ", the first two axes of `emissions`"
    check_shape(tags, "tags", owner, axes="[batch, time]", shape=(batch, time), of=of)
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise ArgumentError(
            f"`tags` of {owner} must be integers. Found {tags.dtype}; "
            f"convert them with `tags.long()`.",
            argument="tags",
        )


def _first(found: Tensor) -> tuple[int, ...]:
    """Return the first index at which ``found`` is true."""
    return tuple(int(i) for i in found.nonzero()[0].tolist())


def not_finite(
    emissions: Tensor, mask: Tensor | None, others: dict[str, Tensor | None], owner: str
) -> ArgumentError:
    """Return the error for scores of which one is NaN or +inf.

    Args:
        emissions: ``[batch, time, tag]``.
        mask: True at real positions; None where all are.
        others: The other scores, by name.
        owner: Whose arguments they are.
    """
    wrong = ~(emissions < torch.inf)
    if mask is not None:
        wrong &= mask.unsqueeze(2)
    if wrong.any():
        row, position, tag = _first(wrong)
        return ArgumentError(
            f"`emissions` of {owner} must be below +inf and not NaN at real positions. "
            f"Found {emissions[row, position, tag].item()} in row {row}, position {position}, "
            f"tag {tag}; look for an overflow in what computes them.",
            argument="emissions",
        )
    for name, scores in others.items():
        if scores is not None and bool((wrong := ~(scores < torch.inf)).any()):
            index = _first(wrong)
            return ArgumentError(
                f"`{name}` of {owner} must be below +inf and not NaN. "
                f"Found {scores[index].item()} at {list(index)}; lower the learning rate, or "
                f"load parameters that are finite.",
                argument=name,
            )
    return ArgumentError(
        f"`emissions` of {owner} must have path scores below +inf. Their sums overflow; "
        f"scale them down or use float64.",
        argument="emissions",
    )


def tags_out_of_range(
    tags: Tensor, mask: Tensor | None, num_tags: int, owner: str
) -> ArgumentError:
    """Return the error for tags of which one is out of range.

    Args:
        tags: ``[batch, time]``.
        mask: True at real positions; None where all are.
        num_tags: How many tags there are.
        owner: Whose arguments they are.
    """
    wrong = (tags < 0) | (tags >= num_tags)
    row, position = _first(wrong if mask is None else wrong & mask)
    return ArgumentError(
        f"`tags` of {owner} must be in 0 … {num_tags - 1} at real positions. "
        f"Found {tags[row, position].item()} in row {row}, position {position}; "
        f"pass a `mask` that is false at padding.",
        argument="tags",
    )


def forbidden_tags(
    scores: Scores, tags: Tensor, mask: Tensor | None, names: Sequence[str] | None, owner: str
) -> ArgumentError:
    """Return the error for tags of which one is forbidden.

    Args:
        scores: The scores, −inf where forbidden.
        tags: ``[batch, time]``.
        mask: True at real positions; None where all are.
        names: The names of the tags.
        owner: Whose arguments they are.
    """
    name = str if names is None else (lambda tag: repr(names[tag]))
    for row, of_row in enumerate(tags.tolist()):
        positions = range(len(of_row)) if mask is None else mask[row].nonzero().view(-1).tolist()
        what = _first_forbidden(scores, row, [(p, of_row[p]) for p in positions], name)
        if what:
            break
    return ArgumentError(
        f"`tags` of {owner} must be a path that is not forbidden. Found in row {row} {what}; "
        f"correct the tags, or pass forbidden='inf' for a loss of +inf.",
        argument="tags",
    )


def _first_forbidden(
    scores: Scores, row: int, path: list[tuple[int, int]], name: Callable[[int], str]
) -> str:
    """Say where a row's path is forbidden, "" if nowhere."""
    start, end = scores.start, scores.end
    for step, (position, tag) in enumerate(path):
        here = f"at position {position}"
        if scores.emissions[row, position, tag] == -torch.inf:
            return f"{here} tag {name(tag)} with an emission of -inf"
        if step and scores.transitions[path[step - 1][1], tag] == -torch.inf:
            return f"{here} tag {name(tag)} after {name(path[step - 1][1])}"
        if not step and start is not None and start[tag] == -torch.inf:
            return f"{here} tag {name(tag)} as the first"
        if step == len(path) - 1 and end is not None and end[tag] == -torch.inf:
            return f"{here} tag {name(tag)} as the last"
    return ""
