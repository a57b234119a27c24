"""What the derivations ask of their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_lookahead.derivation import distributed

__all__ = ["as_fused", "as_patterns", "check_patterns", "is_count", "require"]


def require(holds: object, name: str, value: Any, condition: str) -> None:
    """Refuse an option unless something holds.

    Args:
        holds: Whether it is as it must be.
        name: The option.
        value: What it is.
        condition: What it must be, after "must be".

    Raises:
        ArgumentError: If it does not hold.
    """
    if not holds:
        raise ArgumentError(f"`{name}` must be {condition}. Found {value!r}.", argument=name)


def is_count(value: Any, least: int) -> bool:
    """Return whether something is an integer, at least so large; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def as_patterns(name: str, given: Any) -> tuple[str, ...]:
    """Return parts of names as a tuple.

    Args:
        name: The option that they are from.
        given: A sequence of words.

    Raises:
        ArgumentError: If it is none; a single word is none, either.
    """
    holds = (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and all(isinstance(x, str) and x for x in given)
    )
    require(holds, name, given, "a list of parts of names, such as ['bias', 'norm']")
    return tuple(given)


def check_patterns(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that is no parts of names.

    Args:
        name: The option.
        options: Those of a group, by name.

    Raises:
        ArgumentError: As :func:`as_patterns`.
    """
    as_patterns(name, options[name])


def as_fused(params: Any, *, foreach: bool | None, fused: bool | None) -> tuple[Any, bool | None]:
    """Return the parameters, and whether torch's fused kernel is to step them.

    Args:
        params: Parameters or groups, which may be there only once.
        foreach: What was asked for.
        fused: What was asked for; None for the kernel where torch has one, and where ``foreach``
            does not ask for another.
    """
    if fused is not None or foreach is not None or isinstance(params, Tensor):
        return params, fused
    groups: list[Any] = []
    tensors: list[Any] = []
    for entry in params:
        group = entry
        if isinstance(entry, dict) and not isinstance(entry.get("params"), Tensor):
            group = {**entry, "params": list(entry.get("params", ()))}
        groups.append(group)
        held = group.get("params", ()) if isinstance(group, dict) else [group]
        held = [held] if isinstance(held, Tensor) else held
        tensors += [one[1] if isinstance(one, tuple) else one for one in held]
    fits = all(
        isinstance(t, Tensor)
        and t.dtype in {torch.float32, torch.float64}
        and t.device.type in {"cpu", "cuda"}
        and not distributed(t)  # torch's fused SGD has no sharded form
        for t in tensors
    )
    return groups, True if fits and tensors else None
