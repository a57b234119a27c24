"""AdaX by torch's fused kernel for Adam: one pass over parameter, gradient and both moments.

Adam's step is AdaX's if its β₂ is β̂_t and its bias corrections 1 − β^t are 1, for which the kernel
is told a step number at which β^t is 0. The kernel is not part of torch's public interface: it is
tried on one number for each kind of device, and left out where it fails or computes anything else.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["fused_step", "has_fused"]

_DEVICES = ("cpu", "cuda")
_ENDLESS = 1e30  # a step number: even the decay next to 1 in float64 to this power is 0
_NEXT_TO_ONE = math.nextafter(1.0, 0.0)


@functools.cache
def has_fused(device: str) -> bool:
    """Whether torch has the kernel on a kind of device, and it does what is expected of it.

    Args:
        device: Such as ``"cpu"``.
    """
    if device not in _DEVICES:
        return False
    weight, gradient, moment, second = (
        torch.full((1,), value, device=device) for value in (1.0, -2.0, 0.5, 3.0)
    )
    try:
        fused_step(
            [weight], [gradient], [moment], [second],
            rate=0.5, beta1=0.75, kept=0.25, eps=0.5, decay=0.5, decoupled=True, maximize=True,
        )  # fmt: skip
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    m, v = 0.75 * 0.5 + 0.25 * 2.0, 0.25 * 3.0 + 0.75 * 4.0
    wanted = (1 - 0.25) - 0.5 * m / (math.sqrt(v) + 0.5)
    pairs = zip((weight, moment, second), (wanted, m, v), strict=True)
    return all(abs(float(found) - value) < 1e-5 for found, value in pairs)


def fused_step(
    weights: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    seconds: list[Tensor],
    *,
    rate: float,
    beta1: float,
    kept: float,
    eps: float,
    decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """Step parameters in place: θ ← θ − α m / (√v̂ + ε).

    Args:
        weights: Parameters, contiguous, of one device and type, float32 or float64.
        grads: Their gradients, of the same shapes and type.
        moments: m, likewise; updated.
        seconds: v̂, likewise; updated.
        rate: α.
        beta1: β₁.
        kept: β̂_t.
        eps: ε, beside the root.
        decay: λ.
        decoupled: Whether the decay is apart from the gradient.
        maximize: Whether to go uphill.
    """
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    endless = torch.tensor(_ENDLESS, dtype=torch.float32, device=weights[0].device)
    kernel(
        weights, grads, moments, seconds, [], [endless] * len(weights),
        lr=rate, beta1=beta1, beta2=min(kept, _NEXT_TO_ONE), weight_decay=decay, eps=eps,
        amsgrad=False, maximize=maximize,
    )  # fmt: skip
