"""Measures in two processes how far the optimizers' steps are from those of one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from kexue.core.conformance.distributed import Training, measure, placed, whole
from kexue_derived_optimizers import (
    LAMB,
    LARS,
    with_grad_accumulation,
    with_layer_adaptation,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    "everything": everything,
    "decay": lambda params: with_weight_decay(torch.optim.SGD)(params, lr=0.1, momentum=0.9),
}


class Model(nn.Module):
    """Matrices with an odd number of rows, and vectors shorter than the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        found: Tensor = self.last(hidden)
        return found


def through_files(model: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    """Carry the state by files, of which each process writes and reads its part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    with tempfile.TemporaryDirectory() as own:
        folder: list[Any] = [own]
        dist.broadcast_object_list(folder)
        save(
            dict(zip("ab", get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder[0]
        )
        into: dict[str, Any] = dict(zip("ab", get_state_dict(twin, other), strict=True))
        load(into, checkpoint_id=folder[0])
        dist.barrier()
    set_state_dict(twin, other, model_state_dict=into["a"], optim_state_dict=into["b"])


def warm_up(mesh: DeviceMesh) -> float:
    """Return how far it gets from what it should, where a first gradient is 0 in one shard only.

    With a rate of 0 and no gradient at all it would be one of the calls that checkpoints make.
    """
    gradients = torch.tensor([[0.0, 0.0, 0.0, 4.0], [2.0, 2.0, 2.0, 4.0]])
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    optimizer = with_grad_accumulation(torch.optim.SGD)([p], lr=0.0)
    for rate, gradient in zip((0.0, 1.0), gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
    return float((whole(p) + gradients.mean(0)).abs().max())


def distances(mesh: DeviceMesh) -> dict[str, float]:
    training = Training(Model, loss=lambda output: (output - 1).square().mean(), steps=5)
    return {
        **training.compare(mesh, CHOICES),
        **training.compare(mesh, {"files": everything}, carry=through_files),
        "warm-up": warm_up(mesh),
        "columns": placed(mesh, lambda params: LAMB(params, lr=0.1), Shard(1)),
    }


if __name__ == "__main__":
    measure(distances)
