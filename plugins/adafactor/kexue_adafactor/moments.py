"""Second moments, and the steps that they give, of lists of tensors.

All take stacks of one kind, their gradients, ``[same?, *any]`` each, the share 1 − β̂_t of this step
in the moments, the steps that the moments are to be divided into, ``[parameters]``, and
the settings; and return, for each stack, two tensors whose product is the change of its parameters.
The second factor is one per column or per parameter: it is left to the last pass, which adds.

The symbols are those of :mod:`kexue_adafactor.adafactor`.
"""

# ruff: noqa: SLF001  # torch has functions of lists under such names only

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue_adafactor.settings import first_eps
from kexue_adafactor.stacks import Stack
from kexue_adafactor.tensors import Tensors, is_distributed, joined, numbers, settled, total
from kexue_adafactor.tiny import means, scaled, spread_means

__all__ = ["changes", "kept"]

Products = tuple[Tensors, Tensors]


def changes(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    grads: list[Tensor],
    share: float,
    steps: Tensor,
) -> Products:
    """Mix the gradients into the second moments, and return the changes of the parameters."""
    kinds = {"whole": _whole, "tiny": _tiny, "factored": _factored, "clamped": _clamped}
    return kinds[stacks[0].kind](group, stacks, grads, share, steps)


def kept(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """Return a tensor of the state, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    tensor: Tensor = state[name]
    return tensor


def _decayed(
    stacks: Sequence[Stack], name: str, now: Sequence[Tensor], share: float
) -> list[Tensor]:
    """Mix this step's statistics into the states, and return these, stacked."""
    news = [n for stack, tensor in zip(stacks, now, strict=True) for n in stack.split(tensor)]
    states = [state for stack in stacks for state in stack.states]
    olds = [kept(s, name, n) for s, n in zip(states, news, strict=True)]
    torch._foreach_lerp_(olds, news, share)
    if len(olds) == len(stacks):
        return olds
    rest = iter(olds)
    return [joined([next(rest) for _ in stack.parameters]) for stack in stacks]


def _along(stacks: Sequence[Stack], steps: Tensor, like: Tensors) -> Tensors:
    """Return one number per parameter, from ``[parameters]``, to be multiplied with its stack."""
    if len(steps) == len(stacks):
        return steps.unbind(0)
    parts = torch.split(steps, [len(stack.parameters) for stack in stacks])
    return [
        part.view(-1, *[1] * (tensor.ndim - 1)) if stack.lead else part[0]
        for stack, part, tensor in zip(stacks, parts, like, strict=True)
    ]


def _clipped(
    group: dict[str, Any], stacks: Sequence[Stack], steps: Tensor, squares: Sequence[Tensor]
) -> Tensor:
    """Divide steps by max(1, RMS(u) / d), given Σ u² of each parameter, ``[]`` or ``[same]``."""
    sums = (
        squares[0].reshape(-1) if len(stacks) == 1 else torch.cat([s.reshape(-1) for s in squares])
    )
    sums.div_(numbers([p for stack in stacks for p in stack.parameters], sums))
    return sums.mul_(group["clip"] ** -2).clamp_min_(1.0).rsqrt_().mul_(steps)


def _whole(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    grads: list[Tensor],
    share: float,
    steps: Tensor,
) -> Products:
    """The second moment kept whole: u, and the steps."""
    eps1 = first_eps(group, grads[0].dtype)
    if group["eps_mode"] == "clamp":
        squares = torch._foreach_mul(grads, grads)
        seconds = _decayed(stacks, "variance", squares, share)
        updates: Tensors = torch._foreach_clamp_min(seconds, eps1**2)
        torch._foreach_rsqrt_(updates)
    else:
        plus = _scalar(eps1, grads[0].dtype, grads[0].device)
        seconds = _decayed(stacks, "variance", [torch.addcmul(plus, g, g) for g in grads], share)
        updates = torch._foreach_rsqrt(seconds)
    torch._foreach_mul_(updates, grads)  # u
    if group["clip"] is not None:
        steps = _clipped(group, stacks, steps, _square_sums(stacks, updates))
    return updates, _along(stacks, steps, updates)


def _square_sums(stacks: Sequence[Stack], updates: Tensors) -> list[Tensor]:
    squares = torch._foreach_mul(updates, updates)
    return [settled(total(s, stack.lead)) for stack, s in zip(stacks, squares, strict=True)]


def _factored(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    grads: list[Tensor],
    share: float,
    steps: Tensor,
) -> Products:
    """Gradient times rows, ``[same?, *any, row, column]``, and columns, ``[…, 1, column]``.

    1/√V̂ is applied as √mean(R)/√R and 1/√C: the product R C of two ε₁ is 0 in float32.
    """
    eps1 = first_eps(group, grads[0].dtype)
    squares = torch._foreach_mul(grads, grads)
    rows = _decayed(stacks, "row", [_mean(s, -1, eps1) for s in squares], share)  # R
    columns = _decayed(stacks, "column", [_mean(s, -2, eps1) for s in squares], share)  # C
    by_row = torch._foreach_rsqrt(rows)
    torch._foreach_mul_(by_row, [_root_of_mean(r) for r in rows])
    by_column = torch._foreach_rsqrt(columns)
    if group["clip"] is not None:
        # mean(u²) = Σ_i by_row_i² Σ_j g²_ij / C_j: one pass; twice by_row, whose square may be inf
        weights = torch._foreach_mul(by_column, by_column)
        inner = [_inner(s, w) for s, w in zip(squares, weights, strict=True)]
        torch._foreach_mul_(inner, by_row)
        torch._foreach_mul_(inner, by_row)
        sums = [settled(total(i, stack.lead)) for stack, i in zip(stacks, inner, strict=True)]
        steps = _clipped(group, stacks, steps, sums)
    torch._foreach_mul_(by_row, _along(stacks, steps, by_row))
    for gradient, row, square in zip(grads, by_row, squares, strict=True):
        torch.mul(gradient, row.unsqueeze(-1), out=square)
    return squares, [column.unsqueeze(-2) for column in by_column]


def _clamped(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    grads: list[Tensor],
    share: float,
    steps: Tensor,
) -> Products:
    """As in torch: ε₁ below mean(R) and √V̂, in place of ε₁ in the means. V̂ and u are formed."""
    eps1 = first_eps(group, grads[0].dtype)
    squares = torch._foreach_mul(grads, grads)
    rows = _decayed(stacks, "row", [_mean(s, -1, 0.0) for s in squares], share)
    columns = _decayed(stacks, "column", [_mean(s, -2, 0.0) for s in squares], share)
    del squares
    updates = []
    for gradient, row, column in zip(grads, rows, columns, strict=True):
        mean = settled(row.mean(-1, keepdim=True)).clamp_min(eps1)
        estimate = (row.unsqueeze(-1) * column.unsqueeze(-2)).div_(mean.unsqueeze(-1))
        updates.append(estimate.clamp_min_(eps1**2).rsqrt_().mul_(gradient))
    if group["clip"] is not None:
        steps = _clipped(group, stacks, steps, _square_sums(stacks, updates))
    return updates, _along(stacks, steps, updates)


def _mean(square: Tensor, axis: int, eps1: float) -> Tensor:
    """Return the mean of g² + ε₁ over the last axis, -1, or the one before, -2."""
    if not _is_plain(square):
        return settled(square.mean(axis)).add_(eps1)
    plus = _scalar(eps1, square.dtype, square.device)
    matrix = square if axis == -1 else square.t()
    return torch.addmv(plus, matrix, _shares(square.shape[axis], square.dtype, square.device))


def _root_of_mean(rows: Tensor) -> Tensor:
    """Return √mean(R) over the last axis, which is kept unless it is the only one."""
    if rows.ndim == 1 and not is_distributed(rows):
        return torch.dot(rows, _shares(len(rows), rows.dtype, rows.device)).sqrt_()
    return settled(rows.mean(-1, keepdim=True)).sqrt()


def _inner(square: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j square_ij weights_j; ``square`` may be spent on it."""
    if _is_plain(square):
        return torch.mv(square, weights)
    return settled(square.mul_(weights.unsqueeze(-2)).sum(-1))


def _is_plain(square: Tensor) -> bool:
    """Whether it is one matrix, whose product with a vector is one call and one pass.

    Other products might be computed in TF32, or in 16 bits.
    """
    return (
        square.ndim == 2
        and not is_distributed(square)
        and not torch.is_autocast_enabled(square.device.type)
    )


@functools.lru_cache(maxsize=256)
def _shares(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 1 / count as often as that, not to be modified."""
    return torch.full((count,), 1 / count, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor, not to be modified: numbers in lists cost as much as tensors."""
    return torch.tensor(value, dtype=dtype, device=device)


def _tiny(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    grads: list[Tensor],
    share: float,
    steps: Tensor,
) -> Products:
    """The same of matrices so small that u is formed: see :mod:`kexue_adafactor.tiny`."""
    eps1 = first_eps(group, grads[0].dtype)
    now = [means(square, eps1) for square in torch._foreach_mul(grads, grads)]
    rows = _decayed(stacks, "row", [pair[0] for pair in now], share)
    columns = _decayed(stacks, "column", [pair[1] for pair in now], share)
    by_row = torch._foreach_rsqrt(rows)
    torch._foreach_mul_(by_row, torch._foreach_sqrt([spread_means(r) for r in rows]))
    by_column = torch._foreach_rsqrt(columns)
    updates = [scaled(*three) for three in zip(grads, by_row, by_column, strict=True)]
    if group["clip"] is not None:
        steps = _clipped(group, stacks, steps, _square_sums(stacks, updates))
    return updates, _along(stacks, steps, updates)
