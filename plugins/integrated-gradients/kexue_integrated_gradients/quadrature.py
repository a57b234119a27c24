"""Quadrature on [0, 1]: where an integrand is taken, and with which weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kexue.core.errors import ArgumentError, did_you_mean

__all__ = ["RULES", "Rule", "nodes"]

Rule = Literal["gauss-legendre", "midpoint", "trapezoid", "left", "right"]
RULES: tuple[Rule, ...] = ("gauss-legendre", "midpoint", "trapezoid", "left", "right")

_Array = NDArray[np.float64]


@lru_cache(maxsize=64, typed=True)  # True is not 1 here
def nodes(rule: Rule, steps: int) -> tuple[_Array, _Array]:
    """Return the points and their weights, which add up to 1.

    Args:
        rule: ``"gauss-legendre"`` is exact for polynomials of degree ``2 steps - 1``,
            ``"midpoint"`` and ``"trapezoid"`` for degree 1, ``"left"`` and ``"right"`` for 0.
        steps: How many points; the trapezoid rule needs two.

    Raises:
        ArgumentError: If the rule is unknown or there are too few steps.
    """
    if rule not in RULES:
        raise ArgumentError(
            f"`rule` must be one of {', '.join(RULES)}. Found {rule!r}.{did_you_mean(rule, RULES)}",
            argument="rule",
        )
    least = 2 if rule == "trapezoid" else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ArgumentError(
            f"`steps` must be a whole number, at least {least} for {rule!r}. Found {steps!r}.",
            argument="steps",
        )
    weights = np.full(steps, 1 / steps)
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (1 + points) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps), weights
    offset = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (np.arange(steps) + offset) / steps, weights
