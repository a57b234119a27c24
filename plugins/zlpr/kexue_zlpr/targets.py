"""What the losses and the decoder accept: checked once, at the boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError

__all__ = [
    "accumulated",
    "check_count",
    "check_logits",
    "check_mask",
    "check_number",
    "check_target",
    "grade_target",
    "label_slots",
    "make_threshold",
    "not_hard",
    "reject_faults",
    "threshold_repr",
]


def check_number(owner: str, name: str, value: float, *, positive: bool = False) -> float:
    """Return a finite (positive) number as float.

    Raises:
        ArgumentError: If it is not one.
    """
    wanted = "a positive finite number" if positive else "a finite number"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (positive and value <= 0):
        raise ArgumentError(
            f"`{name}` of {owner} must be {wanted}. Found {value!r}.", argument=name
        )
    return float(value)


def check_count(owner: str, name: str, value: int, least: int | None = None) -> int:
    """Return an integer that is at least ``least``, or any.

    Raises:
        ArgumentError: If it is not one.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ArgumentError(
            f"`{name}` of {owner} must be an integer{bound}. Found {value!r}.", argument=name
        )
    return value


def make_threshold(owner: str, value: float, *, learnable: bool) -> float | nn.Parameter:
    """Return the threshold, as a parameter if it is to be learned."""
    value = check_number(owner, "threshold", value)
    return nn.Parameter(torch.tensor(value)) if learnable else value


def threshold_repr(threshold: float | Tensor, reduction: str) -> str:
    """Return these constructor arguments as they were written."""
    learned = isinstance(threshold, Tensor)
    value = threshold.item() if isinstance(threshold, Tensor) else threshold
    return f"threshold={value:g}, learnable={learned}, reduction={reduction!r}"


def check_logits(owner: str, logits: Tensor) -> None:
    """Refuse logits that are not floating point or have no classes.

    Raises:
        ArgumentError: With the dtype or shape found.
    """
    if not logits.is_floating_point():
        raise ArgumentError(
            f"`logits` of {owner} must be floating point. Found {logits.dtype}.", argument="logits"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ArgumentError(
            f"`logits` of {owner} must have shape [..., class] with at least one class. "
            f"Found {list(logits.shape)}.",
            argument="logits",
        )


def accumulated(logits: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, the rest as it is."""
    return logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits


def _check_companion(owner: str, name: str, found: Tensor, logits: Tensor, hint: str = "") -> None:
    if found.shape != logits.shape:
        raise ArgumentError(
            f"`{name}` of {owner} must have the shape of `logits`, [..., class] = "
            f"{list(logits.shape)}. Found {list(found.shape)}.{hint}",
            argument=name,
        )
    _check_device(owner, name, found, logits)


def _check_device(owner: str, name: str, found: Tensor, logits: Tensor) -> None:
    if found.device != logits.device:
        raise ArgumentError(
            f"`{name}` of {owner} must be on the device of `logits`, {logits.device}. "
            f"Found {found.device}. Call `{name}.to(logits.device)`.",
            argument=name,
        )


def check_mask(owner: str, mask: Tensor | None, logits: Tensor) -> None:
    """Refuse a mask that is not boolean or not of the shape of the logits.

    Raises:
        ArgumentError: With the dtype, shape or device found.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ArgumentError(
            f"`mask` of {owner} must be boolean, true where a class takes part. "
            f"Found {mask.dtype}. Call `mask.bool()`.",
            argument="mask",
        )
    _check_companion(owner, "mask", mask, logits)


def check_target(owner: str, target: Tensor, logits: Tensor, hint: str = "") -> None:
    """Refuse a dense target of another shape, one that is complex, and one that wants a gradient.

    Args:
        owner: The component.
        target: The target.
        logits: Shape ``[..., class]``.
        hint: What to do if the shape is wrong.

    Raises:
        ArgumentError: With what was found.
    """
    _check_companion(owner, "target", target, logits, hint)
    if target.is_complex():
        raise ArgumentError(
            f"`target` of {owner} must be boolean, integer or floating point. "
            f"Found {target.dtype}.",
            argument="target",
        )
    if target.requires_grad:
        raise ArgumentError(
            f"`target` of {owner} is a constant and gets no gradient. Found a target that requires "
            f"one. Call `target.detach()`.",
            argument="target",
        )


def reject_faults(owner: str, target: Tensor, faults: Tensor, condition: str) -> None:
    """Raise for the first entry that is at fault.

    Args:
        owner: The component.
        target: The target.
        faults: True at the entries that are wrong; shape of ``target``.
        condition: What an entry must be.

    Raises:
        ArgumentError: With the position and the value.
    """
    where = faults.nonzero()[0].tolist()
    found = target[tuple(where)].item()
    raise ArgumentError(
        f"`target` of {owner} must be {condition}. Found {found} at position {where}.",
        argument="target",
    )


def grade_target(owner: str, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return the dense target, boolean or in the given dtype, and whether any entry is soft.

    One synchronisation, none for boolean targets.

    Args:
        owner: The component.
        target: Shape ``[..., class]``: boolean, integer 0/1, or floating point in [0, 1].
        dtype: float32 or float64.

    Raises:
        ArgumentError: If a value is outside [0, 1], or an integer is neither 0 nor 1.
    """
    if target.dtype == torch.bool:
        return target, False
    weights = target.to(dtype)
    if not target.numel():
        return weights, False
    # t - t^2 is 0 at 0 and 1, positive between and negative outside: one pass tells all three.
    low, high = torch.stack(torch.addcmul(weights, weights, weights, value=-1).aminmax()).tolist()
    if not low >= 0:
        condition = "in [0, 1]" if target.is_floating_point() else "0 or 1"
        reject_faults(owner, target, ~((weights >= 0) & (weights <= 1)), condition)
    return weights, high > 0


def not_hard(target: Tensor) -> Tensor:
    """Return where the dense target is neither 0 nor 1."""
    return target != target.bool()


def label_slots(
    owner: str, target: Tensor, logits: Tensor, padding_index: int
) -> tuple[Tensor, Tensor]:
    """Return the labels sorted, with at least one slot, and which slots count.

    Padding does not count, nor does a label that is listed again. One synchronisation.

    Args:
        owner: The component.
        target: Shape ``[..., label]``, integers.
        logits: Shape ``[..., class]``.
        padding_index: The filler.

    Returns:
        ``labels`` in ``[0, class)`` (0 in slots that do not count) and ``counts``, both
        ``[..., label + 1]``.

    Raises:
        ArgumentError: If dtype or shape are wrong or a label is out of range.
    """
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise ArgumentError(
            f"`target` of {owner} must hold integer labels. Found {target.dtype}. "
            f"For a 0/1 target of shape [..., class] leave `sparse` out.",
            argument="target",
        )
    if target.dim() != logits.dim() or target.shape[:-1] != logits.shape[:-1]:
        raise ArgumentError(
            f"`target` of {owner} must have shape [..., label] with the leading axes "
            f"{list(logits.shape[:-1])} of `logits`. Found {list(target.shape)}.",
            argument="target",
        )
    _check_device(owner, "target", target, logits)
    classes = logits.shape[-1]
    faults = ((target < 0) | (target >= classes)) & (target != padding_index)
    if faults.any():
        condition = f"labels in [0, {classes}), or {padding_index} as padding"
        reject_faults(owner, target, faults, condition)
    filled = nn.functional.pad(target.long(), (0, 1), value=padding_index)
    labels = filled.sort(dim=-1).values
    again = nn.functional.pad(labels[..., 1:] == labels[..., :-1], (1, 0), value=False)
    counts = (labels != padding_index) & ~again
    return labels.where(counts, 0), counts
