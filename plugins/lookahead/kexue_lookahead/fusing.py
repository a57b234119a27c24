"""Fused bases: torch's kernels that step all parameters of a group in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue_lookahead.derivation import distributed

__all__ = ["as_fused", "fuse"]

_FUSED = {torch.optim.Adam, torch.optim.AdamW}
"""Bases whose kernel takes all that they take; SGD's does not take sparse gradients."""


def fuse(base: type[torch.optim.Optimizer], params: Any, settings: dict[str, Any]) -> Any:
    """Ask a base for its kernel where it has one that takes all that the base takes.

    Args:
        base: The class, exactly.
        params: Parameters or groups, which may be there only once.
        settings: Further arguments of the base, which are added to.

    Returns:
        The parameters.
    """
    if base in _FUSED:
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
    fits = all(
        isinstance(t, Tensor)
        and t.dtype in {torch.float32, torch.float64}
        and t.device.type in {"cpu", "cuda"}
        and not distributed(t)  # torch's fused SGD has no sharded form
        for t in tensors
    )
    chosen = any(isinstance(g, dict) and g.get("foreach") is not None for g in groups)
    fits = fits and not chosen  # a group that asks for another kernel gets it
    return groups, True if fits and tensors else None
