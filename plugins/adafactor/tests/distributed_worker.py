"""Measures in two processes how far Adafactor's steps are from those of one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from kexue.core.conformance.distributed import Training, measure, placed
from kexue_adafactor import Adafactor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHOICES = {
    "plain": partial(Adafactor, lr=0.1),
    "everything": partial(
        Adafactor, lr=0.1, beta1=0.9, weight_decay=0.1, clip=0.5, factor_dims="largest"
    ),
    "clamped, bfloat16 moment": partial(
        Adafactor, lr=0.1, eps_mode="clamp", beta1=0.5, state_dtype=torch.bfloat16
    ),
    "relative, whole": partial(Adafactor, lr=None, min_dim_to_factor=100),
}


def rounding(params: Any) -> Adafactor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return Adafactor(params, lr=0.01, stochastic_rounding=True, generator=generator)


def distances(mesh: DeviceMesh) -> dict[str, float]:
    training = Training()
    return {
        **training.compare(mesh, CHOICES),
        "columns": placed(mesh, CHOICES["plain"], Shard(1)),
        "rounded": training.half(mesh, rounding, partial(Adafactor, lr=0.01)),
    }


if __name__ == "__main__":
    measure(distances)
