"""Updates that a base keeps: that of SGD is −γ times its buffer of momentum, or its gradient.

Symbols: g gradient, m buffer, μ momentum, λ the L2 term of SGD, γ learning rate, u update.

::

    m ← g + λθ            the first time
    m ← μm + g + λθ       u = −γm          with momentum
                          u = −γg          without, where λ = 0

A derivation that only scales u, or that changes θ itself, needs no stand-ins then, and no memory.
What is left are SGD's own passes, one for m and one for θ, on a CPU of one large parameter after
the other, while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kexue_lookahead.derivation import Batch

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["keeps_updates", "lend_updates"]

_BUFFER = "momentum_buffer"
_SMALL = 2**14  # numbers that take no longer than what there is to do for each batch


def keeps_updates(optimizer: DerivedOptimizer, batch: Batch) -> bool:
    """Return whether updates are what the base keeps; nobody may write to them then.

    Args:
        optimizer: The optimizer.
        batch: Parameters on a CPU, whose gradients are there.
    """
    group = batch.group
    return (
        optimizer.derived_from is torch.optim.SGD
        and not (group["dampening"] or group["nesterov"] or group["maximize"])
        and (group["momentum"] != 0 or group["weight_decay"] == 0)
        and all(grad.layout is torch.strided for grad in batch.grads)
    )


def lend_updates(batch: Batch) -> Iterator[Batch]:
    """Take the base's step up to where it moves the parameters, part by part.

    Args:
        batch: Parameters of a base that :func:`keeps_updates`.

    Yields:
        Parts that have borrowed their updates; each is to be moved before the next one is asked
        for.
    """
    small = [p for p in batch.params if p.numel() <= _SMALL]
    large = [[p] for p in batch.params if p.numel() > _SMALL]
    for params in [small, *large] if small else large:
        part = Batch(batch.optimizer, batch.group, params)
        momentum = batch.group["momentum"]
        part.borrow(_buffers(part) if momentum else part.grads, -float(batch.group["lr"]))
        yield part


def _buffers(batch: Batch) -> Iterator[torch.Tensor]:
    """Yield the buffers of a batch, gone on by a step."""
    momentum, decay = batch.group["momentum"], batch.group["weight_decay"]
    for p, grad in zip(batch.params, batch.grads, strict=True):
        state = batch.optimizer.state[p]
        buffer = state.get(_BUFFER)
        if buffer is None:
            buffer = state[_BUFFER] = grad.clone()
        else:
            torch.add(grad, buffer, alpha=momentum, out=buffer)
        if decay:
            buffer.add_(p, alpha=decay)
        yield buffer
