"""Samplers: a distribution to draws from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kexue.core.densities import DENSITIES, Density, make_density, read_density
from kexue.core.errors import ArgumentError
from kexue.core.files import TABLE_SUFFIXES
from kexue.core.inputs import read_floats
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.loading import load_target
from kexue.core.plots import chains, histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sampler", "Samples", "run"]

Target = Tensor | Callable[[Tensor], Tensor]
_FORMS = "logits, a density in YAML, file.py:log_density, or a density's name"


@dataclass(frozen=True, slots=True)
class Samples:
    """What a sampler drew.

    Args:
        values: Shape ``[sample, ...]``.
        diagnostics: Figures by name, for example ``acceptance`` and ``effective_sample_size``.
        weights: Shape ``[sample]``, not negative and summing to 1, where the draws count
            unequally; None where they count alike.
        chains: Shape ``[chain, draw, ...]``, where draws depend on those before them; ``values``
            are then the first draws of all chains, the second of all chains, and so on. None where
            draws are independent.
    """

    values: Tensor
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    weights: Tensor | None = None
    chains: Tensor | None = None


class Sampler(Contract):
    """A sampler maps an unnormalised distribution to draws from it."""

    stochastic: ClassVar[bool] = True

    @abstractmethod
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits ``[class]``, or ``[class, ..., class]`` with an axis per variable; or a
                function from points ``[chain, feature]`` to log-densities ``[chain]`` in nats, such
                as a :class:`~kexue.core.densities.Density`.
            num_samples: How many draws.
            generator: Source of randomness; the global one by default.
        """


def run(job: Job, *, num_samples: int = 1000) -> Result:
    """Draw from a target: logits, a density in YAML, ``file.py:log_density``, or a density's name.

    Args:
        job: The call.
        num_samples: How many draws.
    """
    if num_samples < 1:
        raise ArgumentError(
            f"`--num-samples` must be at least 1. Found {num_samples}.", argument="num_samples"
        )
    target = _target(job, job.one_file(_FORMS))
    drawn: Samples = job.build().sample(target, num_samples, generator=job.generator())
    summary = {"samples": len(drawn.values), **{k: float(v) for k, v in drawn.diagnostics.items()}}
    arrays = {"values": drawn.values, "weights": drawn.weights, "chains": drawn.chains}
    to_text = target.to_text if isinstance(target, Density) else None
    as_text = to_text is not None and (job.out is None or job.out.suffix.lower() == ".txt")
    return Result(
        summary,
        {name: array for name, array in arrays.items() if array is not None},
        lines=to_text(drawn.values) if to_text is not None and as_text else None,
        plot=lambda figure: _plot(figure, drawn),
    )


def _plot(figure: Figure, drawn: Samples) -> None:
    if drawn.chains is not None and drawn.chains.ndim < 4:
        chains(figure, drawn.chains, "value")
    else:
        histogram(figure, drawn.values, "value", weights=drawn.weights)


def _target(job: Job, given: str) -> Target:
    where: Any = {"device": job.device, "dtype": job.dtype}
    if ".py:" in given:
        return _from_python(job, given)
    if given in DENSITIES:
        return make_density(given, **where)
    if Path(given).suffix.lower() in {".yaml", ".yml"}:
        return read_density(given, **where)
    logits = read_floats(job, given, "target")
    one_row = given == "-" or Path(given).suffix.lower() in TABLE_SUFFIXES
    return logits[0] if one_row and logits.ndim == 2 and len(logits) == 1 else logits


def _from_python(job: Job, given: str) -> Target:
    density: Any = load_target(given)
    if isinstance(density, Tensor | Density):
        return density
    if not callable(density):
        raise ArgumentError(
            f"{given} must be a function from points to log-densities. "
            f"Found {type(density).__name__}.",
            argument="target",
        )
    return Density(density, getattr(density, "num_features", None), dtype=job.dtype)
