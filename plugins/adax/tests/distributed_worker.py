"""Trains in two processes in several ways; rank 0 prints how far each is from one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from kexue_adax import AdaX

CHOICES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "everything": {
        "lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps_mode": "raw",
        "maximize": True,
    },
    "lists": {"lr": 0.1, "weight_decay": 0.1, "foreach": True},
}  # fmt: skip


class Model(nn.Module):
    """Matrices with an odd number of rows, a vector, and a tensor of three dimensions."""

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


def train(model: nn.Module, x: Tensor, optimizer: AdaX, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(model: nn.Module, reference: Iterable[Tensor]) -> float:
    pairs = zip(model.parameters(), reference, strict=True)
    return max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)


def sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = Model().to(dtype)
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def checkpoint(mesh: DeviceMesh, mine: Tensor, choice: dict[str, Any]) -> nn.Module:
    """Three steps, a full state dict, and three more steps in another model."""
    model, twin = sharded(mesh), sharded(mesh)
    optimizer, other = (AdaX(m.parameters(), **choice) for m in (model, twin))
    train(model, mine, optimizer)
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    train(twin, mine, other)
    return twin


def placed(mesh: DeviceMesh, placement: Placement, *, beside: bool = False) -> float:
    """A matrix with its gradient, the latter in parts that are yet to be added or cut."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (
        torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    reference = nn.Parameter(weight.clone())
    where = Replicate() if isinstance(placement, Partial) else placement
    parameter = nn.Parameter(distribute_tensor(weight, mesh, [where]))
    if isinstance(placement, Partial):
        share = gradient * (0.25 if dist.get_rank() else 0.75)
        given = DTensor.from_local(share, mesh, [placement])
    else:
        given = distribute_tensor(gradient, mesh, [placement])
    for p, g in ((reference, gradient), (parameter, given)):
        others = [nn.Parameter(torch.ones(3, dtype=torch.float64))] if beside else []
        optimizer = AdaX([p, *others], lr=0.1)
        for _ in range(3):
            p.grad = g
            for other in others:
                other.grad = torch.ones_like(other)
            optimizer.step()
    return float((whole(parameter) - reference).detach().abs().max())


def half(mesh: DeviceMesh, mine: Tensor) -> float:
    """Sharded bfloat16 parameters near those of one process, with a float32 state."""
    model = sharded(mesh, torch.bfloat16)
    optimizer = AdaX(model.parameters(), lr=0.01)
    train(model, mine.bfloat16(), optimizer, 1)
    kinds = {v.dtype for s in optimizer.state.values() for v in s.values() if type(v) is not int}
    if kinds != {torch.float32}:
        raise AssertionError(f"the state is {kinds}")
    single = Model()
    train(single, batch(), AdaX(single.parameters(), lr=0.01), 1)
    return distance(model, single.parameters())


def main() -> None:
    """Measure, and print."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = batch().chunk(dist.get_world_size())[dist.get_rank()]
    found: dict[str, float] = {}
    for name, choice in CHOICES.items():
        single = Model()
        optimizer = AdaX(single.parameters(), **choice)
        start = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        found[f"moved, {name}"] = distance(single, start)
        wanted = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        ways: dict[str, Callable[[], nn.Module]] = {
            "ddp": lambda: nn.parallel.DistributedDataParallel(Model()),
            "fsdp2": lambda: sharded(mesh),
        }
        for way, make in ways.items():
            model = make()
            train(model, mine, AdaX(model.parameters(), **choice))
            found[f"{way}, {name}"] = distance(model, wanted)
        resumed = checkpoint(mesh, mine, choice)
        found[f"checkpoint, {name}"] = distance(resumed, single.parameters())
    found["columns"] = placed(mesh, Shard(1))
    found["partial gradients"] = placed(mesh, Partial())
    found["mixed with plain tensors"] = placed(mesh, Shard(0), beside=True)
    found["bfloat16"] = half(mesh, mine)
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
