"""One step of AdaX for tensors that are stepped together, by the fused kernel or by lists.

The arithmetic is that of :mod:`kexue_adax.adax`, where the symbols are.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kexue.core import state_dtype
from kexue_adax.decay import adax_share, growth
from kexue_adax.fused import fused_step, has_fused

__all__ = ["Bucket", "at_once", "may_fuse", "step_bucket"]

_LEAST_RAW = 1e-37  # what ε / √((1 + β₂)^t − 1) may become: a normal number in float32
_TOGETHER = {"cpu": 2**18}  # numbers stepped at once by lists: what stays in a cache,
_TOGETHER_ELSEWHERE = 2**24  # or fills a device


@dataclass
class Bucket:
    """Tensors that are stepped together: four lists in one order.

    Args:
        step: t, of all of them.
        fused: Whether the fused kernel does it.
        weights: The parameters, or parts of them, of one device and type, shapes ``[*any]``.
        grads: Their gradients.
        moments: m.
        seconds: v̂, or v̂ + ε.
        numbers: How many numbers the weights have.
    """

    step: int
    fused: bool
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    seconds: list[Tensor] = field(default_factory=list)
    numbers: int = 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add a weight, its gradient, and its two moments."""
        weight, gradient, moment, second = tensors
        self.weights.append(weight)
        self.grads.append(gradient)
        self.moments.append(moment)
        self.seconds.append(second)
        self.numbers += weight.numel()


def at_once(weight: Tensor, *, fused: bool) -> float:
    """Return how many numbers are stepped at once: what bounds the scratch memory, if any is used.

    Args:
        weight: One of the parameters.
        fused: Whether the fused kernel steps them.
    """
    if fused and weight.dtype == state_dtype(weight):
        return math.inf
    return _TOGETHER.get(weight.device.type, _TOGETHER_ELSEWHERE)


def may_fuse(group: dict[str, Any], step: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel can step them: it takes them for one stretch of memory each."""
    if group["fused"] is False or (group["fused"] is None and group["foreach"] is not None):
        return False
    if step == 1 and group["eps_mode"] == "inside":
        return False  # v̂ + ε comes about by an addition before β̂_t, which is 0 in the first step
    return has_fused(tensors[0].device.type) and all([t.is_contiguous() for t in tensors])  # noqa: C419


def _decays(beta2: float, step: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return β̂_t and 1 − β̂_t, which add up to 1 in the type of the state, too."""
    share = adax_share(step, beta2)
    kept = 1 - share
    if dtype is not torch.float32:
        return kept, share
    kept = ctypes.c_float(kept).value
    return kept, 1 - kept


def step_bucket(group: dict[str, Any], bucket: Bucket) -> None:
    """Step a bucket; 16-bit parameters as float32, and then rounded."""
    weights, dtype = bucket.weights, bucket.moments[0].dtype
    grads = [g if g.dtype == dtype else g.to(dtype) for g in bucket.grads]
    if weights[0].dtype != dtype:
        weights = [w.to(dtype) for w in weights]
    kept, share = _decays(group["betas"][1], bucket.step, dtype)
    inside = group["eps_mode"] == "inside"
    eps = 0.0 if inside else group["eps"]
    if group["eps_mode"] == "raw":
        eps = max(eps / math.sqrt(growth(group["betas"][1], bucket.step)), _LEAST_RAW)
    if bucket.fused:
        if inside:
            torch._foreach_add_(bucket.seconds, share / kept * group["eps"])
        fused_step(
            weights, grads, bucket.moments, bucket.seconds,
            rate=float(group["lr"]), beta1=group["betas"][0], kept=kept, eps=eps,
            decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )  # fmt: skip
    else:
        grads = _decayed(group, weights, grads)
        torch._foreach_lerp_(bucket.moments, grads, 1 - group["betas"][0])
        torch._foreach_mul_(bucket.seconds, kept)
        if inside:
            torch._foreach_add_(bucket.seconds, share * group["eps"])
        torch._foreach_addcmul_(bucket.seconds, grads, grads, share)
        roots = torch._foreach_sqrt(bucket.seconds)  # noqa: SLF001
        if not inside:
            torch._foreach_add_(roots, eps)
        torch._foreach_addcdiv_(weights, bucket.moments, roots, -float(group["lr"]))
    if weights is not bucket.weights:
        torch._foreach_copy_(bucket.weights, weights)


def _decayed(group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return the gradients to descend by, and decay the weights if that is apart from them."""
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))  # noqa: SLF001
    if not group["weight_decay"]:
        return grads
    if group["decoupled_weight_decay"]:
        torch._foreach_mul_(weights, 1 - float(group["lr"]) * group["weight_decay"])
        return grads
    return list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))  # noqa: SLF001
