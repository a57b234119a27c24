"""Checks that several samplers share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_search_sampling.spaces import Problem, Reals

__all__ = ["check_num_samples", "check_settings", "check_start", "chosen_chains"]

_LEAST = {"num_chains": 1, "warmup": 0, "thin": 1, "num_steps": 1, "batch_size": 1, "max_tries": 1}
_DRAWS_PER_CHAIN = 100


def check_settings(owner: Any, **given: Any) -> None:
    """Refuse counts below their least, and sizes that are not positive numbers; None passes.

    Raises:
        ArgumentError: Naming the first that is wrong.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name in _LEAST:
            wrong = not isinstance(value, int) or isinstance(value, bool) or value < _LEAST[name]
            wanted = f"a whole number, at least {_LEAST[name]}"
        else:
            wrong = not 0 < value < math.inf
            wanted = "a positive number"
        if wrong:
            raise ArgumentError(
                f"`{name}` of {type(owner).__name__} must be {wanted}. Found {value!r}.",
                argument=name,
            )


def check_num_samples(num_samples: int, owner: str) -> None:
    """Refuse a negative number of draws.

    Raises:
        ArgumentError: If it is negative.
    """
    if num_samples < 0:
        raise ArgumentError(
            f"`num_samples` of {owner} must not be negative. Found {num_samples}.",
            argument="num_samples",
        )


def chosen_chains(num_chains: int | None, num_samples: int, init: Tensor | None) -> int:
    """Return the number of chains: as given, as ``init`` has, or one per hundred draws."""
    if num_chains is not None:
        return num_chains
    if init is not None:
        return max(1, len(init))  # one without rows is refused with its shape
    return min(4096, max(4, num_samples // _DRAWS_PER_CHAIN))


def check_start(
    init: Tensor | None,
    problem: Problem,
    num_chains: int,
    owner: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Return where the chains start.

    Raises:
        ArgumentError: If ``init`` has not a row per chain like the points of the target.
    """
    own = getattr(problem.target, "start", None)
    drawn = (own or problem.space.start)(num_chains, generator)
    if init is None:
        return drawn
    if init.shape != drawn.shape or init.is_floating_point() != isinstance(problem.space, Reals):
        raise ArgumentError(
            f"`init` of {owner} must have shape {list(drawn.shape)}, like {drawn.dtype} points of "
            f"the target. Found {init.dtype} of shape {list(init.shape)}.",
            argument="init",
        )
    return init.detach()
