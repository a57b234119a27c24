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
from torch.distributed.tensor import DTensor

from kexue_lookahead import Lazy, with_lazy, with_lookahead

Make = Callable[[Any], torch.optim.Optimizer]

CHOICES: dict[str, Make] = {
    "lookahead": lambda p: with_lookahead("sgd", slow_steps=2)(p, lr=0.1, momentum=0.9),
    "lookahead, average": lambda p: with_lookahead("adam", slow_steps=2, pullback="average")(
        p, lr=0.05
    ),
    "lazy": lambda p: with_lazy("adam")(p, lr=0.05),
    "lazy, frozen": lambda p: with_lazy("adam", lazy_state="freeze")(p, lr=0.05),
    "both": lambda p: with_lookahead(with_lazy("sgd"), slow_steps=2)(p, lr=0.1, momentum=0.9),
    "deferred": lambda p: Lazy(p, lr=0.05),
}


class Model(nn.Module):
    """An embedding with an odd number of rows, and a linear layer."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 5)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.embed(ids)).tanh()
        return found


def batch(step: int) -> Tensor:
    """Ids of the step, a few rows only."""
    return torch.randint(9, (4,), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, split: bool) -> None:
    for step in steps:
        ids = batch(step)
        if split:
            ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(model: nn.Module, reference: Iterable[Tensor]) -> float:
    pairs = zip(model.parameters(), reference, strict=True)
    return max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = Model()
    fully_shard(model.out, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def parameters(model: nn.Module, name: str) -> list[Tensor]:
    """Lazy is for the embedding alone."""
    return [p for n, p in model.named_parameters() if name != "deferred" or "embed" in n]


def checkpoint(mesh: DeviceMesh, name: str) -> nn.Module:
    """Three steps, a full state dict, and three more steps in another model."""
    model, twin = sharded(mesh), sharded(mesh)
    optimizer, other = (CHOICES[name](parameters(m, name)) for m in (model, twin))
    train(model, optimizer, range(3), split=True)
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    train(twin, other, range(3, 6), split=True)
    return twin


def sparse_replicas() -> float:
    """DDP with sparse gradients."""
    single, model = Model(sparse=True), nn.parallel.DistributedDataParallel(Model(sparse=True))
    for made, split in ((single, False), (model, True)):
        train(made, Lazy(parameters(made, "deferred"), lr=0.05), range(5), split=split)
    return distance(model, single.parameters())


def main() -> None:
    """Measure, and print."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, float] = {}
    for name, make in CHOICES.items():
        single = Model()
        optimizer = make(parameters(single, name))
        start = [p.detach().clone() for p in single.parameters()]
        train(single, optimizer, range(3), split=False)
        found[f"moved, {name}"] = distance(single, start)
        wanted = [p.detach().clone() for p in single.parameters()]
        train(single, optimizer, range(3, 6), split=False)
        ways: dict[str, Callable[[], nn.Module]] = {
            "ddp": lambda: nn.parallel.DistributedDataParallel(Model()),
            "fsdp2": lambda: sharded(mesh),
        }
        for way, build in ways.items():
            model = build()
            train(model, make(parameters(model, name)), range(3), split=True)
            found[f"{way}, {name}"] = distance(model, wanted)
        resumed = checkpoint(mesh, name)
        found[f"checkpoint, {name}"] = distance(resumed, single.parameters())
    found["sparse"] = sparse_replicas()
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
