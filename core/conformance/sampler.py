"""What samplers are asked."""

from __future__ import annotations

import torch

from kexue.core.conformance.kit import Check, Subject, require
from kexue.core.interfaces.sampler import Samples

__all__ = ["checks"]


def draws(subject: Subject) -> None:
    """Return as many finite draws as were asked for."""
    inputs = subject.inputs()
    found = subject.make().sample(**inputs, generator=torch.Generator().manual_seed(0))
    require(isinstance(found, Samples), f"must be Samples. Found {type(found).__name__}")
    require(
        len(found.values) == inputs["num_samples"],
        f"{inputs['num_samples']} draws were asked for. Found {len(found.values)}",
    )
    require(torch.isfinite(found.values.double()).all(), "a draw is not finite")


def frequencies(subject: Subject) -> None:
    """Draw classes as often as the softmax of the logits says, within five standard errors."""
    target = subject.inputs()["target"]
    num = 20_000
    values = subject.make().sample(target, num, generator=torch.Generator().manual_seed(0)).values
    wanted = target.double().softmax(-1)
    found = torch.nn.functional.one_hot(values, target.shape[-1]).double().mean(0)
    error = (wanted * (1 - wanted) / num).sqrt().clamp(min=1 / num)
    worst = float(((found - wanted).abs() / error).max())
    require(worst < 5, f"a frequency is {worst:.1f} standard errors from its probability")


def _of_classes(subject: Subject) -> bool:
    inputs = subject.inputs()
    return isinstance(inputs.get("target"), torch.Tensor)


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("draws", draws),
        Check("frequencies", frequencies, _of_classes),
    ]
