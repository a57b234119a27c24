"""Samplers: a distribution to draws from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.inputs import read_floats
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.loading import load_target
from kexue.core.plots import histogram

__all__ = ["Sampler", "Samples", "run"]

Target = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """What a sampler drew.

    Args:
        values: Shape ``[sample, ...]``.
        diagnostics: Figures by name, for example ``acceptance`` and ``effective_sample_size``.
    """

    values: Tensor
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class Sampler(Contract):
    """A sampler maps an unnormalised distribution to draws from it."""

    stochastic: ClassVar[bool] = True

    @abstractmethod
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[..., class]``, or a function from points ``[chain, feature]`` to
                log-densities ``[chain]`` in nats.
            num_samples: How many draws.
            generator: Source of randomness; the global one by default.
        """


def run(job: Job, *, num_samples: int = 1000) -> Result:
    """Draw from a target: a file of logits, or ``file.py:log_density``.

    Args:
        job: The call.
        num_samples: How many draws.
    """
    if num_samples < 1:
        raise ArgumentError(
            f"`--num-samples` must be at least 1. Found {num_samples}.", argument="num_samples"
        )
    target = _target(job, job.one_file("logits, or file.py:log_density"))
    drawn: Samples = job.build().sample(target, num_samples, generator=job.generator())
    summary = {"samples": len(drawn.values), **{k: float(v) for k, v in drawn.diagnostics.items()}}
    return Result(
        summary, {"values": drawn.values}, plot=lambda f: histogram(f, drawn.values, "value")
    )


def _target(job: Job, given: str) -> Target:
    if ".py:" not in given:
        return read_floats(job, given, "target")
    density: Any = load_target(given)
    if not callable(density):
        raise ArgumentError(
            f"{given} must be a function from points to log-densities. "
            f"Found {type(density).__name__}.",
            argument="target",
        )
    found: Target = density
    return found
