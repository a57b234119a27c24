"""The end of a cycle: slow weights move by their share, and fast weights go there.

Both are read and written once where torch's fused kernel for SGD is taken for it. That steps a
parameter θ with a buffer b and a gradient g′ = g + λθ by b ← μb + (1 − d) g′, then, with Nesterov's
momentum, θ ← θ − γ (g′ + μb). For θ the fast and b the slow weights φ, g = θ, and

::

    μ = 1 − α    λ = −1 − μ    d = 1/μ    γ = −1/μ        so that g′ = −μθ

the first is φ ← φ + α (θ − φ), and in the second θ cancels and φ is left, but for its last bits.
The kernel is not part of torch's public interface: it is tried on one number, and left out where it
fails or computes anything else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kexue_lookahead.derivation import local

__all__ = ["mix"]

_MOST = 0.9  # the α up to which the kernel is taken: g′ = θ − (1 + μ) θ loses as much as 1/μ says
_TYPES = {torch.float32, torch.float64}


def mix(fast: list[Tensor], slow: list[Tensor], share: float) -> None:
    """Move the slow ones by their share towards the fast ones, which become the same.

    Args:
        fast: Tensors of one device and type.
        slow: Of the same shapes, in at least float32.
        share: α.
    """
    fast, slow = [local(f) for f in fast], [local(s) for s in slow]
    if fast[0].dtype != slow[0].dtype:
        wide = [f.to(s.dtype) for f, s in zip(fast, slow, strict=True)]
        torch._foreach_lerp_(slow, wide, share)
        torch._foreach_copy_(fast, slow)
    elif 0 < share <= _MOST and _fits(fast, slow) and _has_fused():
        _fused(fast, slow, share)
    else:
        # from the fast side, so that α = 1 leaves them as they are to the last bit
        torch._foreach_lerp_(fast, slow, 1 - share)
        torch._foreach_copy_(slow, fast)


def _fits(fast: list[Tensor], slow: list[Tensor]) -> bool:
    """Whether these are tensors that the kernel may take as memory."""
    return (
        fast[0].device.type == "cpu"
        and fast[0].dtype in _TYPES
        and all(type(x.data) is Tensor and x.is_contiguous() for x in (*fast, *slow))
    )


def _fused(fast: list[Tensor], slow: list[Tensor], share: float) -> None:
    left = 1 - share  # μ
    torch._fused_sgd_(
        fast, fast, slow, weight_decay=-1 - left, momentum=left, lr=-1 / left, dampening=1 / left,
        nesterov=True, maximize=False, is_first_step=False,
    )  # fmt: skip


@functools.cache
def _has_fused() -> bool:
    fast, slow = torch.tensor([3.0]), torch.tensor([1.0])
    try:
        _fused([fast], [slow], 0.25)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return abs(float(fast) - 1.5) < 1e-5 and abs(float(slow) - 1.5) < 1e-5
