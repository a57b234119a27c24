"""Fused bases: torch's kernels that step all parameters of a group in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kexue_lookahead.derivation import Derivation, Group, distributed

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["as_fused", "fuse", "fused_step", "lay_state", "may_fuse"]

_FOR_GOOD = {torch.optim.Adam, torch.optim.AdamW}
"""Bases whose kernel takes all that they take; SGD's takes no sparse gradients."""


def fuse(
    base: type[torch.optim.Optimizer],
    derivations: Iterable[Derivation],
    params: Any,
    settings: dict[str, Any],
) -> Any:
    """Ask a base for its kernel where it has one that takes all that the base takes.

    Args:
        base: The class, exactly.
        derivations: What is applied to it, and may be reason to ask.
        params: Parameters or groups, which may be there only once.
        settings: Further arguments of the base, which are added to.

    Returns:
        The parameters.
    """
    if base in _FOR_GOOD and any(base in derivation.fuses for derivation in derivations):
        asked = {name: settings.get(name) for name in ("foreach", "fused")}
        params, settings["fused"] = as_fused(params, **asked)
    return params


def as_fused(params: Any, *, foreach: bool | None, fused: bool | None) -> tuple[Any, bool | None]:
    """Return the parameters, and whether torch's fused kernel is to step them.

    Args:
        params: Parameters or groups, which may be there only once.
        foreach: What was asked for.
        fused: What was asked for; None for the kernel where torch has one, and where ``foreach``
            does not ask for another.
    """
    if fused is not None or foreach is not None or isinstance(params, Tensor):
        return params, fused
    groups: list[Any] = []
    tensors: list[Any] = []
    for entry in params:
        group = entry
        if isinstance(entry, dict) and not isinstance(entry.get("params"), Tensor):
            group = {**entry, "params": list(entry.get("params", ()))}
        groups.append(group)
        held = group.get("params", ()) if isinstance(group, dict) else [group]
        held = [held] if isinstance(held, Tensor) else held
        tensors += [one[1] if isinstance(one, tuple) else one for one in held]
    chosen = any(isinstance(g, dict) and g.get("foreach") is not None for g in groups)
    fits = _fit(tensors) and not chosen  # a group that asks for another kernel gets it
    return groups, True if fits and tensors else None


def _fit(tensors: Iterable[Any]) -> bool:
    """Whether the kernels take such parameters, and are the faster ones."""
    return all(
        isinstance(t, Tensor)
        and t.dtype in {torch.float32, torch.float64}
        and t.device.type in {"cpu", "cuda"}
        and not distributed(t)  # torch's fused SGD has no sharded form
        for t in tensors
    )


@contextmanager
def fused_step(optimizer: DerivedOptimizer) -> Iterator[None]:
    """Let the base take its kernel for a step where it can, and put the choice of its groups back.

    Args:
        optimizer: The optimizer, whose gradients are there.
    """
    if optimizer.derived_from not in {torch.optim.SGD, *_FOR_GOOD}:
        yield
        return
    kept = [group["fused"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["fused"] = _kernel(optimizer, group)
        yield
    finally:
        for group, fused in zip(optimizer.param_groups, kept, strict=True):
            group["fused"] = fused


def may_fuse(group: Group) -> bool:
    """Whether SGD's kernel can step a group, and was asked for or is the choice that is left.

    Args:
        group: The group, whose gradients are there.
    """
    if group["fused"] is not None or group["foreach"] is not None:
        return bool(group["fused"])
    moved = [p for p in group["params"] if p.grad is not None]
    return _fit(moved) and all(p.grad.layout is torch.strided for p in moved)


def _kernel(optimizer: DerivedOptimizer, group: Group) -> bool | None:
    """Return whether the kernel is taken: where it was asked for, or is open and wanted."""
    asked: bool | None = group["fused"]
    sgd = torch.optim.SGD
    if asked is None and optimizer.derived_from is sgd:
        reasons = [d for d in optimizer.derivations if sgd in d.fuses]
        wanted = any(any(d.selects(optimizer, group)) for d in reasons)
        asked = (wanted and may_fuse(group)) or None
    if not asked:
        return asked
    moved = [p for p in group["params"] if p.grad is not None]
    buffers: list[Any] = []
    if optimizer.derived_from is sgd and group["momentum"]:
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in moved]
        begun = [buffer is not None for buffer in buffers]
        if any(begun) and not all(begun):
            return None  # the kernel fails where some have their first gradient
        buffers *= all(begun)
    grads = [p.grad for p in moved]
    return True if _alike(moved, grads) and (not buffers or _alike(moved, buffers)) else None


def _alike(params: list[Tensor], beside: list[Any]) -> bool:
    """Whether parameters lie in memory as some tensors do, without gaps.

    On a CPU the kernels take for granted that they do, and are silently wrong elsewhere.
    """
    return all(
        (p.is_contiguous() and x.is_contiguous())
        or not p.is_cpu
        or (x.stride() == p.stride() and _gapless(p))
        for p, x in zip(params, beside, strict=True)
    )


def _gapless(p: Tensor) -> bool:
    steps = zip(p.shape, p.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) == p.numel()


def lay_state(optimizer: DerivedOptimizer) -> None:
    """Lay the state of Adam and AdamW in memory as its parameters lie, where they begin it so.

    Args:
        optimizer: The optimizer, whose state comes from another one.
    """
    if optimizer.derived_from not in _FOR_GOOD:
        return
    for p, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == p.shape and not _alike([p], [x]):
                state[name] = torch.empty_like(p, dtype=x.dtype, device=x.device).copy_(x)
