"""Device, dtype and seed: the one place that names devices."""

from __future__ import annotations

import time

import torch

from kexue.core.errors import ArgumentError, did_you_mean

__all__ = [
    "DTYPES",
    "check_seed",
    "make_generator",
    "resolve_device",
    "resolve_dtype",
    "seed_everywhere",
    "synchronized_clock",
    "widest_float",
]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def resolve_device(name: str = "auto") -> torch.device:
    """Return a device.

    Args:
        name: ``"auto"`` for the accelerator if there is one and else the CPU, or any name that
            torch knows: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu"`` …

    Raises:
        ArgumentError: If it is unknown or not present.
    """
    accelerated = torch.accelerator.is_available()
    present = torch.accelerator.current_accelerator() if accelerated else None
    if name == "auto":
        return present or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        known = ["auto", "cpu", "cuda", "mps", "xpu"]
        raise ArgumentError(
            f"`device` must be a device of torch, such as {', '.join(known)}. Found {name!r}."
            f"{did_you_mean(name, known)}",
            argument="device",
        ) from error
    count = torch.accelerator.device_count() if present is not None else 0
    absent = (
        bool(device.index)
        if device.type == "cpu"
        else present is None or present.type != device.type or (device.index or 0) >= count
    )
    if absent:
        here = f"cpu and {count} × {present.type}" if present is not None else "cpu"
        raise ArgumentError(f"`device` {name!r} is not present. Found {here}.", argument="device")
    return device


def resolve_dtype(name: str | None) -> torch.dtype:
    """Return a floating-point dtype; float32 for None.

    Raises:
        ArgumentError: If it is unknown.
    """
    short = {
        "fp16": "float16",
        "half": "float16",
        "bf16": "bfloat16",
        "fp32": "float32",
        "fp64": "float64",
        "double": "float64",
    }
    wanted = "float32" if name is None else short.get(name, name)
    if wanted not in DTYPES:
        raise ArgumentError(
            f"`dtype` must be one of {', '.join(DTYPES)}. Found {name!r}."
            f"{did_you_mean(wanted, DTYPES)}",
            argument="dtype",
        )
    return DTYPES[wanted]


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a seeded source of randomness on a device.

    Raises:
        ArgumentError: If the seed is negative or beyond 63 bits.
    """
    check_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take everywhere.

    Raises:
        ArgumentError: If it is negative or beyond 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"`seed` must be from 0 to 2**63 - 1. Found {seed}.", argument="seed")


def seed_everywhere(seed: int, device: torch.device) -> None:
    """Seed what draws on a device, and on the CPU.

    ``torch.manual_seed`` also notes the seed, and the caller's stack, for each kind of accelerator
    that is absent: 0.3 ms, too much for every step of a small model.

    Args:
        seed: A whole number.
        device: Where numbers will be drawn.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def synchronized_clock(device: torch.device) -> float:
    """Return seconds for measuring, after waiting for what an accelerator still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where a device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
