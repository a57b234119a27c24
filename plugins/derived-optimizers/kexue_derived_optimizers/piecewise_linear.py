"""A learning rate that is piecewise linear in the number of steps, around any optimizer.

θ ← θ − γ ρ_t h. ρ is given by its knots, ``{step: ratio}``: constant after the last, straight
between two, and straight from (0, 0) to the first unless there is one at step 0. ``{1000: 1}`` is a
warm-up of a thousand steps; ``{1000: 1, 2000: 0.1}`` decays afterwards; ``{0: 1, 500: 1, 501:
0.1}`` is a drop.

t counts updates, not the calls within an accumulation window. The first update has t = 0, as in
bert4keras and in the schedules of transformers: after a warm-up from 0 it moves nothing, and only
the moments of the base begin. With ``lr_schedule_offset=1`` it has t = 1.

``param_groups[i]["lr"]`` stays γ, so that this and the schedulers of torch multiply, and what
depends on the rate, such as weight decay, sees γ ρ_t.

Deviations: none.

Su 2019, section “分段线性学习率”, https://kexue.fm/archives/7094.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example
from kexue_derived_optimizers.options import is_count, require
from kexue_derived_optimizers.recipe import Recipe
from kexue_lookahead.derivation import Derivation, Group
from kexue_lookahead.derived import DerivedOptimizer, become, derive

__all__ = [
    "PiecewiseLinearLR",
    "PiecewiseLinearLRDerivation",
    "piecewise_linear",
    "with_piecewise_linear_lr",
]

T = TypeVar("T", bound=torch.optim.Optimizer)
Schedule = Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]]
Knots = tuple[tuple[int, float], ...]

_STEP = "lr_schedule_step"


def as_knots(schedule: Any) -> Knots:
    """Return a schedule as pairs of step and ratio, in ascending order of the steps.

    Args:
        schedule: A mapping of steps to ratios, or pairs of them, in any order; a step is an integer
            from 0 on, or one in decimal digits, as keys of JSON are.

    Raises:
        ArgumentError: If there is no knot, a step is there twice, or a number is out of range.
    """
    try:
        given = schedule.items() if isinstance(schedule, Mapping) else schedule
        pairs = [(_as_step(step), float(ratio)) for step, ratio in given]
    except (TypeError, ValueError):
        pairs = []
    steps = {step for step, _ in pairs}
    holds = 0 < len(steps) == len(pairs) and min(steps) >= 0
    if not holds or not all(0 <= ratio < math.inf for _, ratio in pairs):
        raise ArgumentError(
            "`lr_schedule` must be like {1000: 1.0, 2000: 0.1}: different steps, integers from 0 "
            f"on, and ratios, finite and not negative. Found {schedule!r}.",
            argument="lr_schedule",
        )
    return tuple(sorted(pairs))


def _as_step(step: Any) -> int:
    whole = int(step)
    if isinstance(step, bool) or (not isinstance(step, str) and whole != step):
        raise ValueError(step)
    return whole


def piecewise_linear(schedule: Schedule, t: int) -> float:
    """Return the ratio ρ_t of a schedule.

    Args:
        schedule: Ratios by step, ``{step: ratio}``, or pairs.
        t: The step, from 0.

    Raises:
        ArgumentError: If it is no schedule.

    Example:
        >>> from kexue_derived_optimizers import piecewise_linear
        >>> [piecewise_linear({1000: 1.0, 2000: 0.5}, t) for t in (0, 500, 1000, 1500, 9999)]
        [0.0, 0.5, 1.0, 0.75, 0.5]
    """
    knots = as_knots(schedule)
    if knots[0][0] > 0:
        knots = ((0, 0.0), *knots)
    after = bisect_right(knots, t, key=lambda knot: knot[0])
    if after == len(knots):
        return knots[-1][1]
    (left, low), (right, high) = knots[after - 1 : after + 1]
    share = (t - left) / (right - left)
    return (1 - share) * low + share * high


@dataclass(frozen=True)
class PiecewiseLinearLRDerivation(Derivation):
    """The derivation; see :func:`with_piecewise_linear_lr` for its options."""

    lr_schedule: Knots = ((0, 1.0),)
    lr_schedule_offset: int = 0

    name: ClassVar[str] = "piecewise-linear-lr"
    remembers: ClassVar[bool] = False
    counters: ClassVar[tuple[str, ...]] = (_STEP,)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse what is no schedule, and an offset that is no step.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: At the first one.
        """
        as_knots(options["lr_schedule"])
        offset = options["lr_schedule_offset"]
        require(is_count(offset, 0), "lr_schedule_offset", offset, "an int of at least 0")

    def rate(self, optimizer: DerivedOptimizer, group: Group) -> float:
        """Return ρ_t.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        return piecewise_linear(group["lr_schedule"], group[_STEP] + group["lr_schedule_offset"])

    def end(self, optimizer: DerivedOptimizer) -> None:
        """Count: t ← t + 1.

        Args:
            optimizer: The optimizer.
        """
        for group in optimizer.param_groups:
            group[_STEP] += 1


@overload
def with_piecewise_linear_lr(
    base: type[T], *, lr_schedule: Schedule = ..., lr_schedule_offset: int = 0
) -> type[T]: ...
@overload
def with_piecewise_linear_lr(
    base: T, *, lr_schedule: Schedule = ..., lr_schedule_offset: int = 0
) -> T: ...
@overload
def with_piecewise_linear_lr(
    base: str, *, lr_schedule: Schedule = ..., lr_schedule_offset: int = 0
) -> type[torch.optim.Optimizer]: ...


def with_piecewise_linear_lr(
    base: Any, *, lr_schedule: Schedule = ((0, 1.0),), lr_schedule_offset: int = 0
) -> Any:
    """Multiply the learning rate of an optimizer by ρ_t, piecewise linear in the updates t.

    The options are entries of the parameter groups, too: a group may have its own schedule, and
    counts from when it joined, under ``"lr_schedule_step"``.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        lr_schedule: ρ by its knots, ``{step: ratio}``: steps are integers from 0 on, also as text,
            in any order, ratios finite and not negative. Straight between knots and from (0, 0) to
            the first, constant after the last. The default, ``{0: 1}``, is the base.
        lr_schedule_offset: t of the first update, 0 or more.

    Returns:
        A class that takes the base's arguments and these options, or the optimizer.

    Raises:
        ArgumentError: If an option is out of range, or as
            :func:`~kexue_lookahead.derived.derive`.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import with_piecewise_linear_lr
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> WarmSGD = with_piecewise_linear_lr(torch.optim.SGD, lr_schedule={2: 1.0, 4: 0.0})
        >>> optimizer = WarmSGD([weight], lr=1.0)
        >>> weight.backward()
        >>> for _ in range(5):
        ...     before = weight.item()
        ...     optimizer.step()
        ...     print(before - weight.item())
        0.0
        0.5
        1.0
        0.5
        0.0
    """
    return derive(base, PiecewiseLinearLRDerivation(as_knots(lr_schedule), lr_schedule_offset))


class PiecewiseLinearLR(Recipe):
    r"""A learning rate γ ρ_t, piecewise linear in the updates t, around any optimizer.

    The object is an instance of the base as well: its state, its options in the groups, and what it
    takes of gradients are the base's. See :func:`with_piecewise_linear_lr` for the rest.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ of the base; None for its default.
        base: The optimizer: a class; a name of ``torch.optim``, such as ``"adam"`` or ``"sgd"``; or
            a registered component, such as ``"adafactor"``.
        base_options: Its further arguments by name, for example ``{"momentum": 0.9}``.
        lr_schedule: ρ by its knots, ``{step: ratio}``; straight between them and from (0, 0) to the
            first, constant after the last. By default ``{1000: 1}``, a warm-up of a thousand steps.
        lr_schedule_offset: t of the first update, 0 or more.

    Raises:
        ArgumentError: If an option is out of range, or ``base`` is no optimizer, or one that needs
            closures.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import PiecewiseLinearLR
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = PiecewiseLinearLR([weight], lr=1.0, base="sgd", lr_schedule={2: 1.0})
        >>> weight.backward()
        >>> for _ in range(3):
        ...     optimizer.step()
        >>> weight.item()
        -1.5
    """

    made_of = (PiecewiseLinearLRDerivation,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        base: str | type[torch.optim.Optimizer] = "adam",
        base_options: Mapping[str, Any] | None = None,
        lr_schedule: Mapping[int, float] | Sequence[tuple[int, float]] = ((1000, 1.0),),
        lr_schedule_offset: int = 0,
    ) -> None:
        derivation = PiecewiseLinearLRDerivation(as_knots(lr_schedule), lr_schedule_offset)
        become(self, base, [derivation], params, lr=lr, base_options=base_options)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2, "lr_schedule": {10: 1.0}}, {"problem": "rosenbrock"})
