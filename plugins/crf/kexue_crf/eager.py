"""Loops over time and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eagerly"]

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside the graph when its caller is compiled.

    Its loop over time would be unrolled into the graph, once per length. ``torch.compiler.disable``
    as a decorator would do the same and import the compiler, a second, for those who never use it.

    Args:
        function: What to run eagerly.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return run
