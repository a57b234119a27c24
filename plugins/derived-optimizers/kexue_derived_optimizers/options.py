"""What the derivations ask of their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kexue.core import ArgumentError

__all__ = ["as_patterns", "check_patterns", "is_count", "require"]


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
