"""Layers: a sequence of features to a sequence of features."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import histogram

__all__ = ["Layer", "run"]


class Layer(nn.Module, Contract):
    """A layer maps ``[batch, time, feature]`` to a tensor of the same shape."""

    differentiable: ClassVar[bool] = True

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the new features.

        The first argument are the features ``[batch, time, feature]``; ``mask`` ``[batch, time]``,
        where a layer takes one, is true at real positions.
        """


def run(job: Job) -> Result:
    """Apply a layer to a file of features."""
    tensors = job.tensors()
    layer = job.build(**job.sizes(tensors))
    if isinstance(layer, nn.Module):
        layer.eval()
    with torch.no_grad():
        out: Tensor = layer(**tensors)
    exact = out.double()
    summary = {
        "shape": list(out.shape),
        "mean": float(exact.mean()),
        "std": float((exact - exact.mean()).square().mean().sqrt()),
    }
    return Result(summary, {"features": out}, plot=lambda f: histogram(f, out, "feature"))
