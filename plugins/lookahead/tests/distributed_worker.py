"""Measures in two processes how far the optimizers' steps are from those of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kexue.core.conformance.distributed import Training, distance, measure
from kexue_lookahead import Lazy, with_lazy, with_lookahead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def deferred(params: Any) -> Lazy:
    """Lazy is for the embedding alone, which comes first."""
    return Lazy(list(params)[:1], lr=0.05)


CHOICES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lookahead": lambda p: with_lookahead("sgd", slow_steps=2)(p, lr=0.1, momentum=0.9),
    "lookahead, average": lambda p: with_lookahead("adam", slow_steps=2, pullback="average")(
        p, lr=0.05
    ),
    "lazy": lambda p: with_lazy("adam")(p, lr=0.05),
    "lazy, frozen": lambda p: with_lazy("adam", lazy_state="freeze")(p, lr=0.05),
    "both": lambda p: with_lookahead(with_lazy("sgd"), slow_steps=2)(p, lr=0.1, momentum=0.9),
    "deferred": deferred,
}


class Model(nn.Module):
    """An embedding with an odd number of rows, and a linear layer."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.embed(ids)).tanh()
        return found


def batch(step: int) -> Tensor:
    """Ids of the step, a few rows only."""
    return torch.randint(9, (4,), generator=torch.Generator().manual_seed(step))


def averaged(p: Tensor) -> None:
    """Give a parameter the mean of the gradients that the processes have."""
    assert p.grad is not None
    dist.all_reduce(p.grad)
    p.grad = p.grad / dist.get_world_size()


def sparse_replicas() -> float:
    """Replicas with sparse gradients.

    Not by DDP: with those over gloo, torch 2.13's corrupts its memory once in some thousand steps,
    whatever the optimizer.
    """
    training = Training(partial(Model, sparse=True), batch)
    single, model = training.build(), training.build()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(averaged)  # type: ignore[no-untyped-call]
    for made, split in ((single, False), (model, True)):
        training.train(made, training.optimizer(deferred, made), range(5), split=split)
    return distance(model, single.parameters())


def distances(mesh: DeviceMesh) -> dict[str, float]:
    return {**Training(Model, batch).compare(mesh, CHOICES), "sparse": sparse_replicas()}


if __name__ == "__main__":
    measure(distances)
