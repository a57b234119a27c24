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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kexue_derived_optimizers import (
    LAMB,
    LARS,
    with_grad_accumulation,
    with_layer_adaptation,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)


def everything(params: Any) -> Any:
    """All but lazy updates, which look at rows; the window and the cycle end in the middle."""
    make: Any = with_layer_adaptation(with_weight_decay(torch.optim.Adam, weight_decay_rate=0.1))
    make = with_piecewise_linear_lr(make, lr_schedule={2: 1.0, 4: 0.5}, lr_schedule_offset=1)
    make = with_lookahead(with_grad_accumulation(make), slow_steps=2)
    return make(params, lr=0.05)


CHOICES: dict[str, Callable[[Any], Any]] = {
    "lamb": lambda params: LAMB(params, lr=0.1, weight_decay_rate=0.1),
    "lars": lambda params: LARS(params, lr=0.1, weight_decay=0.1),
    "clamped": lambda params: LAMB(params, lr=0.1, layer_adaptation_clamp=(0.5, 1.0)),
    "decay": lambda params: with_weight_decay(torch.optim.SGD)(params, lr=0.1, momentum=0.9),
    "everything": everything,
}


class Model(nn.Module):
    """Matrices with an odd number of rows, and vectors shorter than the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        found: Tensor = self.last(hidden)
        return found


def batch() -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model: nn.Module, x: Tensor, optimizer: Any, calls: int = 5) -> None:
    for _ in range(calls):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
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


def checkpoint(mesh: DeviceMesh, mine: Tensor, make: Callable[[Any], Any]) -> nn.Module:
    """Five calls, a state dict, and five more in another model.

    Torch gathers the state of an optimizer that has one after its first call of ``step``; that of
    an open window is saved by each process for itself.
    """
    model, twin = sharded(mesh), sharded(mesh)
    optimizer, other = (make(m.parameters()) for m in (model, twin))
    train(model, mine, optimizer)
    twin.load_state_dict(model.state_dict())
    if make is everything:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        options = StateDictOptions(full_state_dict=True)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(twin, other, state, options=options)
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
        optimizer = LAMB([p], lr=0.1)
        for _ in range(3):
            p.grad = g
            optimizer.step()
    return float((whole(parameter) - reference).detach().abs().max())


def main() -> None:
    """Measure, and print."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = batch().chunk(dist.get_world_size())[dist.get_rank()]
    found: dict[str, float] = {"columns": columns(mesh)}
    for name, make in CHOICES.items():
        single = Model()
        optimizer = make(single.parameters())
        start = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        found[f"moved, {name}"] = distance(single, start)
        wanted = [p.detach().clone() for p in single.parameters()]
        train(single, batch(), optimizer)
        ways: dict[str, Callable[[], nn.Module]] = {
            "ddp": lambda: nn.parallel.DistributedDataParallel(Model()),
            "fsdp2": lambda: sharded(mesh),
        }
        for way, build in ways.items():
            model = build()
            train(model, mine, make(model.parameters()))
            found[f"{way}, {name}"] = distance(model, wanted)
        found[f"checkpoint, {name}"] = distance(checkpoint(mesh, mine, make), single.parameters())
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
