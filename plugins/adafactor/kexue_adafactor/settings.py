"""Adafactor's settings: what is refused, and the rate that they give."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, check_settings

__all__ = ["RELATIVE_LR", "TYPES", "check", "check_schedule", "first_eps", "rate"]

RELATIVE_LR = 1e-2  # the cap of the relative step when no `lr` is given
_WARMUP = 1e-6  # per step, with `warmup_init`
_UNSCALED = 0.05  # what the relative step is multiplied by without the scale of the parameters
# Of "add" and "clamp": what is no normal number in float32 below, in V̂ that is its square
_LEAST_EPS1 = {"add": 1e-37, "clamp": 1e-18}
_EPS1 = 1e-30  # of "add", unless another is given
TYPES = {str(t).rpartition(".")[2]: t for t in (torch.bfloat16, torch.float32, torch.float64)}


def check(settings: dict[str, Any]) -> None:
    """Raise ArgumentError at the first setting that is out of range."""
    lr, beta1, clip = settings["lr"], settings["beta1"], settings["clip"]
    one = not isinstance(lr, Tensor) or lr.numel() == 1
    least = settings["min_dim_to_factor"]
    eps1, mode, dtype = settings["eps1"], settings["eps_mode"], settings["state_dtype"]
    least_eps1 = _LEAST_EPS1.get(mode, 0.0)
    conditions = {
        "lr": (one and (lr is None or 0 <= lr < math.inf), "None, or finite and not negative"),
        "beta1": (beta1 is None or 0 < beta1 < 1, "None, or in (0, 1)"),
        "decay": (0 < settings["decay"] < 1, "in (0, 1)"),
        "eps_mode": (mode in _LEAST_EPS1, "'add' or 'clamp'"),
        "eps1": (
            eps1 is None or least_eps1 <= eps1 < math.inf,
            f"None, or finite and at least {least_eps1:g} with eps_mode={mode!r}",
        ),
        "eps2": (0 <= settings["eps2"] < math.inf, "finite and not negative"),
        "clip": (clip is None or clip > 0, "None, or positive"),
        "weight_decay": (0 <= settings["weight_decay"] < math.inf, "finite and not negative"),
        "factor_dims": (settings["factor_dims"] in {"last", "largest"}, "'last' or 'largest'"),
        "state_dtype": (
            dtype is None or dtype in TYPES or dtype in TYPES.values(),
            "None, torch.bfloat16, torch.float32 or torch.float64",
        ),
        "min_dim_to_factor": (isinstance(least, int) and least >= 1, "an int of at least 1"),
    }
    check_settings("Adafactor", settings, conditions)
    if settings["relative_step"] is False and lr is None:
        raise ArgumentError(
            "`lr` of Adafactor must be given with relative_step=False. Found None. "
            "Set it, for example to 1e-3.",
            argument="lr",
        )
    if settings["warmup_init"] and not (settings["relative_step"] or lr is None):
        raise ArgumentError(
            "`warmup_init` of Adafactor is about relative steps. Found it with "
            f"relative_step={settings['relative_step']} and lr={lr!r}. Set relative_step=True.",
            argument="warmup_init",
        )


def first_eps(group: dict[str, Any], dtype: torch.dtype) -> float:
    """Return ε₁ of a group, for arithmetic in a type."""
    if group["eps1"] is not None:
        return float(group["eps1"])
    return _EPS1 if group["eps_mode"] == "add" else torch.finfo(dtype).eps


def check_schedule(group: dict[str, Any]) -> None:
    """Refuse a scheduler that has nothing to work on."""
    if group.get("default_lr") and "initial_lr" in group:
        raise ArgumentError(
            "`lr` of Adafactor must be a number under a learning-rate scheduler. Found None, whose "
            "steps follow 1/√t. Give lr, for example 1e-3, or remove the scheduler.",
            argument="lr",
        )


def rate(group: dict[str, Any], step: int) -> float:
    """Return α_t, without the scale of the parameter."""
    value = float(group["lr"])
    if group["relative_step"]:
        value = min(value, 1 / math.sqrt(step))
        if group["warmup_init"]:
            value = min(value, _WARMUP * step)
        if group["default_lr"] and not group["scale_parameter"]:
            value *= _UNSCALED
    return value
