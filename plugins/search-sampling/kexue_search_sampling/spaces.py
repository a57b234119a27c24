"""What is sampled: real vectors, tables of classes, or sequences of tokens; and the log-density.

A batch of points is ``[chain, feature]`` floating-point, ``[chain, variable]`` class indices, or
``[chain, time]`` tokens with -1 (``PAD``) behind the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD

__all__ = [
    "Problem",
    "Reals",
    "Sequences",
    "Space",
    "Table",
    "batches",
    "check_log_density",
    "resolve",
]

LogProb = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reals:
    """Vectors of real numbers.

    Args:
        num_features: Their length.
        dtype: Their type.
        device: Where they are.
    """

    num_features: int
    dtype: torch.dtype
    device: torch.device

    def start(self, num: int, generator: torch.Generator | None) -> Tensor:
        """Return standard normal points, to start chains from."""
        shape = (num, self.num_features)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Table:
    """Variables with a few classes each.

    Args:
        sizes: The number of classes of each variable.
        device: Where the points are.
    """

    sizes: tuple[int, ...]
    device: torch.device

    @property
    def log_size(self) -> float:
        """Logarithm of the number of points."""
        return math.fsum(math.log(size) for size in self.sizes)

    def start(self, num: int, generator: torch.Generator | None) -> Tensor:
        """Return uniform points."""
        sizes = torch.tensor(self.sizes, device=self.device)
        return _below(sizes.expand(num, -1), generator)


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens, padded to one length.

    Args:
        num_tokens: Tokens to choose from.
        min_length: Tokens of the shortest.
        max_length: Tokens of the longest.
        device: Where they are.
    """

    num_tokens: int
    min_length: int
    max_length: int
    device: torch.device

    def start(self, num: int, generator: torch.Generator | None) -> Tensor:
        """Return sequences of uniform length and tokens."""
        spread = torch.full((num, 1), self.max_length - self.min_length + 1, device=self.device)
        lengths = self.min_length + _below(spread, generator)
        shape = (num, self.max_length)
        tokens = _below(torch.full(shape, self.num_tokens, device=self.device), generator)
        places = torch.arange(self.max_length, device=self.device)
        return torch.where(places < lengths, tokens, PAD)


Space = Reals | Table | Sequences


def _below(sizes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return whole numbers from 0 to ``sizes`` - 1, uniformly."""
    uniform = torch.rand(sizes.shape, generator=generator, dtype=torch.float64, device=sizes.device)
    return (uniform * sizes).long()


@dataclass(frozen=True)
class Problem:
    """A log-density and where it is defined.

    Args:
        log_prob: From points to log-densities ``[chain]``, in float32 or float64.
        space: What the points are.
        logits: The table, in float64, where the target is one.
        target: What the user gave.
    """

    log_prob: LogProb
    space: Space
    target: Any
    logits: Tensor | None = None

    def values(self, points: Tensor) -> Tensor:
        """Return points ``[..., variable]`` as users see them: one variable has no axis."""
        return points[..., 0] if isinstance(self.space, Table) and points.shape[-1] == 1 else points


def resolve(
    target: Any,
    owner: str,
    *,
    num_features: int | None = None,
    init: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Problem:
    """Return what a target is.

    Args:
        target: Logits with an axis per variable, or a function from points to log-densities, which
            may say by attributes where it is defined, as a :class:`~kexue.core.densities.Density`.
        owner: Who asks, as errors name it.
        num_features: Features of a point, where the target does not say.
        init: Where chains start, if the user said; it says what points look like.
        generator: Source of randomness; points are where it is.

    Raises:
        ArgumentError: If it is neither, or does not say where it is defined.
    """
    if isinstance(target, Tensor):
        return _of_table(target, owner)
    if not callable(target):
        raise ArgumentError(
            f"`target` of {owner} must be logits or a function from points to log-densities. "
            f"Found {type(target).__name__}.",
            argument="target",
        )
    device = generator.device if generator is not None else torch.get_default_device()
    device = init.device if init is not None else device
    return Problem(_exact(target), _space(target, owner, num_features, init, device), target)


def _of_table(logits: Tensor, owner: str) -> Problem:
    if not logits.ndim or not logits.is_floating_point() or not logits.numel():
        raise ArgumentError(
            f"`target` of {owner} must be floating-point logits of shape [class] or [class, …, "
            f"class]. Found {logits.dtype} of shape {list(logits.shape)}.",
            argument="target",
        )
    exact = logits.detach().double()
    check_log_density(exact.flatten(), owner)
    if not (exact > -math.inf).any():
        raise ArgumentError(
            f"`target` of {owner} must have a logit above -inf. Found none.", argument="target"
        )
    strides = [math.prod(logits.shape[i + 1 :]) for i in range(logits.ndim)]
    flat, steps = exact.flatten(), torch.tensor(strides, device=logits.device)

    def log_prob(points: Tensor) -> Tensor:
        index = points[:, 0] if points.shape[1] == 1 else (points * steps).sum(1)
        return flat[index]

    return Problem(log_prob, Table(tuple(logits.shape), logits.device), logits, exact)


def _space(
    target: Any, owner: str, num_features: int | None, init: Tensor | None, device: torch.device
) -> Space:
    num_tokens = getattr(target, "num_tokens", None)
    if num_tokens is not None:
        low, high = getattr(target, "min_length", 0), getattr(target, "max_length", 0)
        if not (num_tokens >= 1 and 0 <= low <= high):
            raise ArgumentError(
                f"`target` of {owner} must have num_tokens ≥ 1 and 0 ≤ min_length ≤ max_length. "
                f"Found {num_tokens}, {low} and {high}.",
                argument="target",
            )
        return Sequences(num_tokens, low, high, device)
    size = num_features or getattr(target, "num_features", None)
    size = init.shape[-1] if size is None and init is not None else size
    if size is None:
        raise ArgumentError(
            f"`num_features` of {owner} must be given: the target does not say how many features "
            f"its points have. Set `num_features`, or an attribute of that name on the function.",
            argument="num_features",
        )
    if size < 1:
        raise ArgumentError(
            f"`num_features` of {owner} must be at least 1. Found {size}.", argument="num_features"
        )
    dtype = init.dtype if init is not None else getattr(target, "dtype", None)
    return Reals(size, dtype or torch.get_default_dtype(), device)


def _exact(target: Callable[[Tensor], Tensor]) -> LogProb:
    """Return a log-density in float32 at least, since ratios are taken of it."""

    def log_prob(points: Tensor) -> Tensor:
        found = target(points)
        return found if found.dtype in {torch.float32, torch.float64} else found.float()

    return log_prob


def batches(points: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the rows of points, ``size`` at a time."""
    return (points[i : i + size] for i in range(0, len(points), size))


def check_log_density(values: Tensor, owner: str, num: int | None = None) -> None:
    """Refuse log-densities that are not one number below +inf per point.

    Raises:
        ArgumentError: With the first wrong value.
    """
    if num is not None and values.shape != (num,):
        raise ArgumentError(
            f"`target` of {owner} must return one log-density per point, shape [{num}]. "
            f"Found {list(values.shape)}.",
            argument="target",
        )
    right = values < math.inf
    if not right.all():
        wrong = values[~right]
        raise ArgumentError(
            f"`target` of {owner} must be -inf or a number, everywhere. Found {float(wrong[0])} at "
            f"{len(wrong)} of {values.numel()} points.",
            argument="target",
        )
