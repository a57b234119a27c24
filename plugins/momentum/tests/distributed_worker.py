"""Measures in two processes how far the optimizers' steps are from those of one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import Shard

from kexue.core.conformance.distributed import Training, gathered, measure, placed
from kexue_momentum import HalfNesterov, Langevin, Momentum, Nesterov

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHOICES: dict[str, Any] = {
    "momentum": partial(Momentum, lr=0.1, half_step_start=True, rescale_velocity="lr"),
    "nesterov": partial(Nesterov, lr=0.1, weight_decay=0.1),
    "half-nesterov": partial(HalfNesterov, lr=0.1, keep_friction="rule"),
}
NOISY = {"langevin": partial(Langevin, lr=0.1, temperature=0.01, momentum=0.5)}


def with_generator(model: nn.Module, optimizer: Langevin, twin: nn.Module, other: Langevin) -> None:
    """Sharded state dicts know nothing of the generator."""
    gathered(model, optimizer, twin, other)
    other.generator.set_state(optimizer.generator.get_state())


def distances(mesh: DeviceMesh) -> dict[str, float]:
    training = Training()
    return {
        **training.compare(mesh, CHOICES),
        **training.compare(mesh, NOISY, carry=with_generator),
        "columns": placed(mesh, partial(Nesterov, lr=0.1), Shard(1)),
    }


if __name__ == "__main__":
    measure(distances)
