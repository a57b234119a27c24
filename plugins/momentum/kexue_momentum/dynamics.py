"""Between the equation of motion and its discretisation: θ'' + λ θ' = −∇L, in steps of γ.

The leapfrog scheme of the post is v ← βv − α∇L(θ), θ ← θ + v, where v = γη is the way of a step and

::

    β = (1 − λγ/2) / (1 + λγ/2)        α = γ² / (1 + λγ/2)                      (15)
    γ² = 2α / (1 + β)                  λ = (2/γ) (1 − β) / (1 + β)              (inverse)

γ is a time and λ one over a time; the learning rate α is a time squared.

Reference: Su 2018, https://kexue.fm/archives/5655, eq. (10) to (20).
"""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

from kexue.core import ArgumentError

__all__ = [
    "Dynamics",
    "Rates",
    "beta_for_lr",
    "from_dynamics",
    "optimal_rates",
    "spectral_radius",
    "stability_limit",
    "to_dynamics",
]


class Rates(NamedTuple):
    """What an optimizer is given, as its first two arguments after the parameters.

    Args:
        lr: α, positive.
        momentum: β, in [0, 1).
    """

    lr: float
    momentum: float


class Dynamics(NamedTuple):
    """What the ball has.

    Args:
        gamma: γ, the time that a step takes.
        friction: λ of θ'' + λ θ' = −∇L.
    """

    gamma: float
    friction: float


def from_dynamics(gamma: float, friction: float) -> Rates:
    """Return learning rate and momentum of the leapfrog scheme, eq. (15).

    Args:
        gamma: γ, the time step; positive.
        friction: λ; positive, at most 2/γ, at which nothing of the velocity is left. Without
            friction the ball never stops.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import from_dynamics
        >>> lr, momentum = from_dynamics(0.1, friction=1.0)
        >>> round(lr, 6), round(momentum, 6)
        (0.009524, 0.904762)
    """
    _require("gamma", gamma, 0 < gamma < math.inf, "positive and finite")
    _require("friction", friction, 0 < friction * gamma <= 2, f"in (0, 2/γ] = (0, {2 / gamma:g}]")
    half = friction * gamma / 2
    return Rates(gamma**2 / (1 + half), (1 - half) / (1 + half))


def to_dynamics(lr: float, momentum: float) -> Dynamics:
    """Return time step and friction; the inverse of :func:`from_dynamics`.

    Args:
        lr: α, positive.
        momentum: β, in [0, 1).

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import to_dynamics
        >>> gamma, friction = to_dynamics(0.01, 0.9)
        >>> round(gamma, 6), round(friction, 6)
        (0.102598, 1.025978)
    """
    _check_rates(lr, momentum)
    gamma = time_step(lr, momentum)
    return Dynamics(gamma, 2 / gamma * (1 - momentum) / (1 + momentum))


def time_step(lr: float, momentum: float) -> float:
    """Return γ = √(2α / (1 + β)), unchecked."""
    return math.sqrt(2 * lr / (1 + momentum))


def beta_for_lr(momentum: float, ratio: float, *, exact: bool = False) -> float:
    """Return the momentum that keeps the friction when the learning rate becomes ``ratio`` times.

    The post's rule is 1 − (1 − β)√r, good near β = 1. The exact one solves (15) for the new α at
    the same λ. Either is 0 where friction would take more than all of the velocity, which only a
    larger learning rate can do.

    Args:
        momentum: β before, in [0, 1).
        ratio: r, the new learning rate over the old; not negative.
        exact: Whether to solve (15), in place of the rule.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import beta_for_lr
        >>> round(beta_for_lr(0.9, 0.1), 5), round(beta_for_lr(0.9, 0.1, exact=True), 5)
        (0.96838, 0.96782)
    """
    _require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    _require("ratio", ratio, 0 <= ratio < math.inf, "finite and not negative")
    if not exact:
        return max(0.0, 1 - (1 - momentum) * math.sqrt(ratio))
    # With s = λγ/2: λ²α/4 = s²/(1 + s) grows like α; the new s is the root of s² = q (1 + s).
    half = (1 - momentum) / (1 + momentum)
    q = ratio * half**2 / (1 + half)
    half = (q + math.sqrt(q**2 + 4 * q)) / 2
    return max(0.0, (1 - half) / (1 + half))


def optimal_rates(smallest: float, largest: float) -> Rates:
    """Return Polyak's rates for curvatures from ``smallest`` to ``largest``.

    With condition number κ, the slowest error shrinks by (√κ − 1)/(√κ + 1) = √β a step, where
    gradient descent at its best has (κ − 1)/(κ + 1).

    Args:
        smallest: The least eigenvalue of the Hessian; positive.
        largest: The greatest.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import optimal_rates
        >>> lr, momentum = optimal_rates(1.0, 100.0)
        >>> round(lr, 6), round(momentum, 6)
        (0.033058, 0.669421)
    """
    _require("smallest", smallest, 0 < smallest < math.inf, "positive and finite")
    _require("largest", largest, smallest <= largest < math.inf, "finite, at least `smallest`")
    low, high = math.sqrt(smallest), math.sqrt(largest)
    return Rates(4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2)


def stability_limit(momentum: float, look_ahead: float = 0.0) -> float:
    """Return what α times the curvature must stay below: 2(1 + β) / (1 + 2hβ).

    Args:
        momentum: β, in [0, 1).
        look_ahead: h, where the gradient is taken at θ + hβv: 0 for momentum, 1 for Nesterov's,
            ½ for the post's.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import stability_limit
        >>> [round(stability_limit(0.9, h), 3) for h in (0, 0.5, 1)]
        [3.8, 2.0, 1.357]
    """
    _require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    _require("look_ahead", look_ahead, 0 <= look_ahead <= 1, "in [0, 1]")
    return 2 * (1 + momentum) / (1 + 2 * look_ahead * momentum)


def spectral_radius(lr: float, momentum: float, curvature: float, look_ahead: float = 0.0) -> float:
    """Return by what factor a step shrinks, in the long run, the error along one eigenvector.

    It is the greater root in modulus of z² − (1 − a + b) z + b, a = α times the curvature,
    b = β(1 − ha).

    Args:
        lr: α, positive.
        momentum: β, in [0, 1).
        curvature: The eigenvalue of the Hessian.
        look_ahead: h, as of :func:`stability_limit`.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from kexue_momentum import spectral_radius
        >>> [round(spectral_radius(0.1, 0.9, 1.0, h), 3) for h in (0, 0.5, 1)]
        [0.949, 0.925, 0.9]
    """
    _check_rates(lr, momentum)
    _require("look_ahead", look_ahead, 0 <= look_ahead <= 1, "in [0, 1]")
    a = lr * curvature
    b = momentum * (1 - look_ahead * a)
    middle, root = 1 - a + b, cmath.sqrt((1 - a + b) ** 2 - 4 * b)
    return max(abs(middle + root), abs(middle - root)) / 2


def _check_rates(lr: float, momentum: float) -> None:
    _require("lr", lr, 0 < lr < math.inf, "positive and finite")
    _require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")


def _require(name: str, value: float, holds: bool, condition: str) -> None:
    if not holds:
        raise ArgumentError(f"`{name}` must be {condition}. Found {value!r}.", argument=name)
