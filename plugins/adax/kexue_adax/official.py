"""Checkpoints of the paper's code, whose v grows, as those of AdaX, whose v̂ does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_adax.decay import growth

__all__ = ["from_official"]


def from_official(
    state_dict: dict[str, Any], *, decoupled_weight_decay: bool = False
) -> dict[str, Any]:
    """Return a ``state_dict`` of the paper's code as one that AdaX and AdaXW load.

    The optimizer that loads it takes the steps that theirs would have taken. Theirs is
    <https://github.com/switchablenorms/adax>, or any code that keeps v ← (1 + β₂) v + β₂ g² as
    ``exp_avg_sq`` and puts ε beside √v.

    Args:
        state_dict: Theirs: per parameter ``step``, ``exp_avg`` and ``exp_avg_sq`` of shape
            ``[*any]``; per group ``lr``, ``betas``, ``eps`` and ``weight_decay``. Not modified.
        decoupled_weight_decay: Whether it is a state of their AdaXW.

    Raises:
        ArgumentError: If a state lacks a part, or its v has outgrown its type.

    Example:
        >>> import torch
        >>> from kexue_adax import AdaX, from_official
        >>> state = {"step": 2, "exp_avg": torch.ones(1), "exp_avg_sq": torch.full((1,), 3e-4)}
        >>> group = {"lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.0}
        >>> theirs = {"state": {0: state}, "param_groups": [{**group, "params": [0]}]}
        >>> optimizer = AdaX([torch.nn.Parameter(torch.ones(1))])
        >>> optimizer.load_state_dict(from_official(theirs))
        >>> round(float(next(iter(optimizer.state.values()))["exp_avg_sq_hat"]), 3)
        1.5
    """
    added = {
        "decoupled_weight_decay": decoupled_weight_decay,
        "eps_mode": "raw",
        "maximize": False,
        "foreach": None,
        "fused": None,
    }
    groups = [{**added, **group} for group in state_dict["param_groups"]]
    states = {
        index: _averaged(index, state_dict["state"][index], group["betas"][1])
        for group in groups
        for index in group["params"]
        if index in state_dict["state"]
    }
    return {"state": states, "param_groups": groups}


def _averaged(index: Any, state: dict[str, Any], beta2: float) -> dict[str, Any]:
    missing = {"step", "exp_avg", "exp_avg_sq"} - set(state)
    if missing:
        raise ArgumentError(
            f"`state_dict` must hold step, exp_avg and exp_avg_sq of each parameter. Found "
            f"{sorted(map(str, state))} for parameter {index}. Give a state of the paper's code.",
            argument="state_dict",
        )
    raw: Tensor = state["exp_avg_sq"]
    if not raw.isfinite().all():
        raise ArgumentError(
            f"`state_dict` must hold finite exp_avg_sq. Found others for parameter {index} at step "
            f"{int(state['step'])}: v has outgrown {raw.dtype}. Start from an earlier checkpoint.",
            argument="state_dict",
        )
    step = int(state["step"])
    second = (raw.to(torch.float64) / growth(beta2, step)).to(raw.dtype)
    kept = torch.float32 if raw.dtype in (torch.float16, torch.bfloat16) else raw.dtype
    return {"step": step, "exp_avg": state["exp_avg"].to(kept), "exp_avg_sq_hat": second.to(kept)}
