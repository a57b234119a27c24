"""Trains in two processes in several ways; rank 0 prints how far each is from one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kexue_momentum import HalfNesterov, Langevin, Momentum, Nesterov

CHOICES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": partial(Momentum, lr=0.1, half_step_start=True, rescale_velocity="lr"),
    "nesterov": partial(Nesterov, lr=0.1, weight_decay=0.1),
    "half-nesterov": partial(HalfNesterov, lr=0.1, keep_friction="rule"),
    "langevin": partial(Langevin, lr=0.1, temperature=0.01, momentum=0.5),
}


class Model(nn.Module):
    """Matrices with an odd number of rows, vectors, and a tensor of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 12)
        self.third = nn.Conv1d(3, 5, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        found: Tensor = self.third(hidden.unflatten(1, (3, 4))).flatten(1).clone()
        return found


def batch() -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(model: nn.Module, reference: Iterable[Tensor]) -> float:
    pairs = zip(model.parameters(), reference, strict=True)
    return max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = Model()
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def build(make: Callable[..., Any], model: nn.Module) -> Any:
    torch.manual_seed(3)  # of the generator that Langevin makes
    return make(model.parameters())


def checkpoint(mesh: DeviceMesh, mine: Tensor, make: Callable[..., Any]) -> nn.Module:
    """Three steps, a full state dict, and three more steps in another model."""
    model, twin = sharded(mesh), sharded(mesh)
    optimizer, other = build(make, model), build(make, twin)
    train(model, mine, optimizer)
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    if isinstance(optimizer, Langevin):  # which sharded state dicts know nothing of
        other.generator.set_state(optimizer.generator.get_state())
    train(twin, mine, other)
    return twin


def columns(mesh: DeviceMesh) -> float:
    """A matrix that is sharded by columns, as tensor parallelism does."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (
        torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    reference = nn.Parameter(weight.clone())
    parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
    for p, g in (
        (reference, gradient),
        (parameter, distribute_tensor(gradient, mesh, [Shard(1)])),
    ):
        optimizer = Nesterov([p], lr=0.1)
        for _ in range(3):
            p.grad = g
            optimizer.step()
    return float((whole(parameter) - reference).detach().abs().max())


def main() -> None:
    """Measure, and print."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = batch().chunk(dist.get_world_size())[dist.get_rank()]
    found: dict[str, float] = {}
    for name, make in CHOICES.items():
        single = Model()
        optimizer = build(make, single)
        start = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        found[f"moved, {name}"] = distance(single, start)
        wanted = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        ways: dict[str, Callable[[], nn.Module]] = {
            "ddp": lambda: nn.parallel.DistributedDataParallel(Model()),
            "fsdp2": lambda: sharded(mesh),
        }
        for way, model_of in ways.items():
            model = model_of()
            train(model, mine, build(make, model))
            found[f"{way}, {name}"] = distance(model, wanted)
        found[f"checkpoint, {name}"] = distance(checkpoint(mesh, mine, make), single.parameters())
    found["columns"] = columns(mesh)
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
