"""Measures in two processes how far AdaX's steps are from those of one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.distributed.tensor import Partial, Shard

from kexue.core.conformance.distributed import Training, measure, placed
from kexue_adax import AdaX

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHOICES = {
    "plain": partial(AdaX, lr=0.1),
    "everything": partial(
        AdaX,
        lr=0.1,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        eps_mode="raw",
        maximize=True,
    ),
    "lists": partial(AdaX, lr=0.1, weight_decay=0.1, foreach=True),
}


def distances(mesh: DeviceMesh) -> dict[str, float]:
    training, plain = Training(), CHOICES["plain"]
    return {
        **training.compare(mesh, CHOICES),
        "columns": placed(mesh, plain, Shard(1)),
        "partial gradients": placed(mesh, plain, Partial()),
        "mixed with plain tensors": placed(mesh, plain, Shard(0), beside=True),
        "bfloat16": training.half(mesh, partial(AdaX, lr=0.01)),
    }


if __name__ == "__main__":
    measure(distances)
