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
    if found.weights is not None:
        require(
            found.weights.shape == found.values.shape[:1],
            f"`weights` must have one number per draw. Found shape {list(found.weights.shape)}",
        )
        total = float(found.weights.double().sum())
        require((found.weights >= 0).all(), "a weight is negative")
        require(abs(total - 1) < 1e-4, f"the weights must sum to 1. Found {total:.6g}")
    if found.chains is not None:
        by_draw = found.chains.transpose(0, 1).flatten(0, 1)[: len(found.values)]
        require(torch.equal(by_draw, found.values), "`values` must be those of `chains`, by draw")


def frequencies(subject: Subject) -> None:
    """Draw classes as often as the softmax of the logits says, within five standard errors.

    Draws that have weights count by them.
    """
    target = subject.inputs()["target"]
    num = 20_000
    drawn = subject.make().sample(target, num, generator=torch.Generator().manual_seed(0))
    wanted = target.double().softmax(-1)
    hits = torch.nn.functional.one_hot(drawn.values, target.shape[-1]).double()
    weights = torch.full((num,), 1 / num) if drawn.weights is None else drawn.weights
    found = weights.double() @ hits
    count = 1 / float(weights.double().square().sum())
    error = (wanted * (1 - wanted) / count).sqrt().clamp(min=1 / count)
    worst = float(((found - wanted).abs() / error).max())
    require(worst < 5, f"a frequency is {worst:.1f} standard errors from its probability")


def _of_classes(subject: Subject) -> bool:
    """Whether the target are logits; integers are something else, such as tokens."""
    target = subject.inputs().get("target")
    return isinstance(target, torch.Tensor) and target.is_floating_point()


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("draws", draws),
        Check("frequencies", frequencies, _of_classes),
    ]
