"""The decays β̂_t of the second moment, v̂_t = β̂_t v̂_{t−1} + (1 − β̂_t) g_t², that the post compares.

Reference: Su 2020, https://kexue.fm/archives/7387, sections “等价形式变换” and “衰减策略比较”.
"""

from __future__ import annotations

import math

__all__ = ["adafactor_share", "adam_share", "adax_share", "growth"]

_LARGEST = 700.0  # its exponential is still a number


def growth(beta2: float, step: int) -> float:
    """Return (1 + β₂)^t − 1, exact for small t, and capped at 1e304.

    Args:
        beta2: Growth rate β₂, positive.
        step: t, from 1.
    """
    return math.expm1(min(step * math.log1p(beta2), _LARGEST))


def adax_share(step: int, beta2: float = 1e-4) -> float:
    """Return AdaX's 1 − β̂_t = β₂ / ((1 + β₂)^t − 1): 1 at first, then 1/t, and at last e^(−β₂ t).

    Args:
        step: t, from 1.
        beta2: Growth rate β₂, in (0, 1).

    Example:
        >>> from kexue_adax.decay import adax_share
        >>> [round(adax_share(t), 4) for t in (1, 2, 100)]
        [1.0, 0.5, 0.01]
    """
    return 1.0 if step == 1 else beta2 / growth(beta2, step)


def adam_share(step: int, beta2: float = 0.999) -> float:
    """Return Adam's 1 − β̂_t = (1 − β₂) / (1 − β₂^t), its bias correction included.

    Args:
        step: t, from 1.
        beta2: Decay β₂, in (0, 1).
    """
    return (1 - beta2) / -math.expm1(step * math.log(beta2))


def adafactor_share(step: int, exponent: float = 0.8) -> float:
    """Return Adafactor's 1 − β̂_t = t^−c.

    Args:
        step: t, from 1.
        exponent: c, positive.
    """
    return float(step**-exponent)
