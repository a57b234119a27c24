"""What is not to be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eagerly"]

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside the graph when its caller is compiled.

    For what the compiler can do nothing good with: a loop over time, which it would unroll once per
    length, or a step of an optimizer that counts, which it would compile anew for every number.
    ``torch.compiler.disable`` as a decorator would do the same and import the compiler, a second,
    for those who never use it.

    Args:
        function: The function; what it calls runs eagerly, too.

    Example:
        >>> import torch
        >>> from kexue.core import eagerly
        >>> @eagerly
        ... def last(x):
        ...     state = x[0]
        ...     for each in x[1:]:
        ...         state = 0.5 * state + each
        ...     return state
        >>> last(torch.tensor([2.0, 4.0, 8.0])).item()
        10.5
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return run
