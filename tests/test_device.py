"""Device, dtype and seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kexue.core.device import (
    DTYPES,
    check_seed,
    make_generator,
    resolve_device,
    resolve_dtype,
    seed_everywhere,
)
from kexue.core.errors import ArgumentError


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Make torch believe in a number of accelerators of a type."""

    def pretend(kind: str, count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))

    return pretend


Pretend = Callable[[str, int], None]


def test_auto_is_the_accelerator_or_else_the_cpu(accelerators: Pretend) -> None:
    for kind in ("cuda", "mps", "xpu"):
        accelerators(kind, 1)
        assert resolve_device() == torch.device(kind)
        assert resolve_device("auto") == torch.device(kind)
        assert resolve_device("cpu") == torch.device("cpu")
    accelerators("cuda", 0)
    assert resolve_device() == torch.device("cpu")


def test_what_is_here_can_be_used() -> None:
    device = resolve_device()
    assert torch.ones(2, device=device).sum().item() == 2.0


def test_takes_the_number_of_a_device(accelerators: Pretend) -> None:
    accelerators("cuda", 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu:0") == torch.device("cpu:0")


@pytest.mark.parametrize(
    ("name", "kind", "count", "words"),
    [
        ("cuda", "cuda", 0, "'cuda' is not present. Found cpu"),
        ("cuda:2", "cuda", 2, "'cuda:2' is not present. Found cpu and 2 × cuda"),
        ("mps", "cuda", 1, "'mps' is not present. Found cpu and 1 × cuda"),
        ("cpu:1", "cuda", 0, "'cpu:1' is not present"),
        ("meta", "cuda", 0, "'meta' is not present"),
        ("CUDA", "cuda", 1, "must be a device of torch, .*Found 'CUDA'. Did you mean 'cuda'"),
        ("gpu0", "cuda", 1, "must be a device of torch, .*Found 'gpu0'"),
        ("", "cuda", 1, "must be a device of torch, .*Found ''"),
        ("cuda:x", "cuda", 1, "must be a device of torch"),
    ],
)
def test_rejects_devices(
    accelerators: Pretend, name: str, kind: str, count: int, words: str
) -> None:
    accelerators(kind, count)
    with pytest.raises(ArgumentError, match=words) as caught:
        resolve_device(name)
    assert caught.value.argument == "device"
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (None, torch.float32),
        *DTYPES.items(),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("fp64", torch.float64),
        ("double", torch.float64),
    ],
)
def test_resolves_dtypes(name: str | None, dtype: torch.dtype) -> None:
    assert resolve_dtype(name) is dtype


@pytest.mark.parametrize("name", ["float", "int64", "Float32", "torch.float32", ""])
def test_rejects_dtypes(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"`dtype` must be one of .* Found '{name}'") as caught:
        resolve_dtype(name)
    assert caught.value.argument == "dtype"


def test_suggests_a_dtype() -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'float64'"):
        resolve_dtype("flaot64")


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second = (torch.rand(3, generator=make_generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(3, generator=make_generator(8)))


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_rejects_seeds(seed: int) -> None:
    for function in (check_seed, make_generator):
        with pytest.raises(ArgumentError, match=f"from 0 to 2.*Found {seed}") as caught:
            function(seed)
        assert caught.value.argument == "seed"


def test_takes_the_largest_seed() -> None:
    make_generator(2**63 - 1)


def test_seeds_what_draws_on_the_device() -> None:
    cpu = torch.device("cpu")
    drawn = []
    for seed in (7, 7, 8):
        seed_everywhere(seed, cpu)
        drawn.append(torch.rand(3))
    torch.manual_seed(7)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], torch.rand(3))
    assert not torch.equal(drawn[0], drawn[2])
