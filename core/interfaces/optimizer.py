"""Optimizers: gradients to parameters that lower the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError, KexueError, WorkError
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import curves, paths
from kexue.core.problems import PROBLEMS, Problem, loss_of, make_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Optimizer", "run", "state_bytes"]

_FEW = 16  # parameters whose path is kept
_WAY = 0.01  # of the height of the start above the minimum: where the target is by default
_NEVER = "not reached"


class Optimizer(torch.optim.Optimizer, Contract):
    """An optimizer maps gradients, step by step, to parameters that lower a loss.

    It is a full ``torch.optim.Optimizer``: closures, parameter groups, ``state_dict``, schedulers.
    """

    half_precision: ClassVar[bool] = True


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def run(
    job: Job, *, problem: str | None = None, steps: int = 200, target: float | None = None
) -> Result:
    """Minimise a problem: rosenbrock, quadratic, ravine, beale, or ``file.py:function``.

    It is named by ``--problem``, or in place of a file. Further optimizers may be named before it;
    all start at the same point. ``--set NAME.lr=…`` sets a parameter of one of them, ``--set lr=…``
    of all that have it. For each, the figures say after how many steps and seconds the loss was at
    the target for the first time, or that it was not reached. A loss that is NaN or infinite ends
    no run; it is no best loss, and reaches no target.

    Args:
        job: The call.
        problem: What to minimise.
        steps: Steps to take.
        target: The loss to reach. By default a hundredth of the way from the minimum up to the
            start is left; where the minimum is not known, from the best loss of all.
    """
    if steps < 1:
        raise ArgumentError(f"`--steps` must be at least 1. Found {steps}.", argument="steps")
    if target is not None and not math.isfinite(target):
        raise ArgumentError(f"`--target` must be finite. Found {target}.", argument="target")
    named = _named(job, problem)
    made = make_problem(named, device=job.device, dtype=job.dtype)
    start = [p.detach().clone() for p in made.parameters]
    runs = [_minimise(job, made, steps)]
    for other in job.others:
        fresh = make_problem(named, device=job.device, dtype=job.dtype)
        with torch.no_grad():
            for parameter, value in zip(fresh.parameters, start, strict=True):
                parameter.copy_(value)
        runs.append(_minimise(other, fresh, steps))
    target = _target(made, runs) if target is None else target
    if len(runs) == 1:
        (only,) = runs
        numbers = sum(p.numel() for p in made.parameters)
        about = {"problem": made.name, "parameters": numbers, "steps": steps}
        summary: dict[str, Any] = {**about, **only.summary, **only.reaching(target)}
        arrays = {"loss": only.losses} | ({} if only.path is None else {"path": only.path})
    else:
        summary = {run.name: {**run.summary, **run.reaching(target)} for run in runs}
        arrays = {run.name: run.losses for run in runs}
        arrays |= {f"{run.name}-path": run.path for run in runs if run.path is not None}
    return Result(summary, arrays, plot=lambda figure: _draw(figure, made, runs, target))


def _named(job: Job, problem: str | None) -> str:
    """Return the problem that was named, in either way."""
    known = f"a problem: {', '.join(PROBLEMS)} or file.py:function"
    if problem is None:
        return job.one_file(known)
    if job.files:
        raise ArgumentError(
            f"{job.id} takes one problem. Found `--problem {problem}` and {', '.join(job.files)}.",
            argument="problem",
        )
    return problem


@dataclass(frozen=True, slots=True)
class _Run:
    """What one optimizer made of the problem.

    Args:
        name: The optimizer's.
        losses: Before each step, and after the last.
        path: Where it was then, ``[step, parameter]``; None where there are many parameters.
        seconds: How long it had worked then.
        summary: Figures.
    """

    name: str
    losses: Tensor
    path: Tensor | None
    seconds: list[float]
    summary: dict[str, Any]

    def reaching(self, target: float) -> dict[str, Any]:
        """Return when the loss was at the target first."""
        there = self.losses.isfinite() & (self.losses <= target)
        step = int(there.double().argmax()) if there.any() else None
        return {
            "target": target,
            "steps_to_target": _NEVER if step is None else step,
            "seconds_to_target": _NEVER if step is None else self.seconds[step],
        }


def _target(problem: Problem, runs: Sequence[_Run]) -> float:
    """Return the default target; NaN where there is no finite loss."""
    start = float(runs[0].losses[0])
    best = min(filter(math.isfinite, (run.summary["best_loss"] for run in runs)), default=math.nan)
    least = best if problem.minimum is None else problem.minimum
    return least + _WAY * (start - least)


def _built(job: Job, problem: Problem) -> Any:
    """Return the optimizer, once its learning rates are found to be some."""
    try:
        optimizer: Any = job.build(params=problem.parameters)
    except KexueError:
        raise
    except (TypeError, ValueError) as error:  # what torch says of settings out of range
        given = ", ".join(f"{name}={value!r}" for name, value in job.params.items())
        raise ArgumentError(
            f"{job.id} takes no such settings ({given or 'the defaults'}): "
            f"{str(error).rstrip('.')}.",
            argument="set",
        ) from error
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate is not None and not 0 < float(rate) < math.inf:
            raise ArgumentError(
                f"`lr` of {job.id} must be positive and finite. Found {float(rate):g}.",
                argument="lr",
            )
    return optimizer


def _minimise(job: Job, problem: Problem, steps: int) -> _Run:
    optimizer = _built(job, problem)
    losses: list[float] = []
    path: list[Tensor] = []
    numbers = sum(p.numel() for p in problem.parameters)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(problem)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    begin = time.perf_counter()
    seconds: list[float] = []

    def look() -> None:
        seconds.append(time.perf_counter() - begin)
        if numbers <= _FEW:
            path.append(torch.cat([p.detach().flatten() for p in problem.parameters]))

    with job.progress.task(f"minimising by {job.id}", steps) as task:
        for _ in range(steps):
            look()
            loss = optimizer.step(closure)
            if loss is None:
                raise WorkError(f"`step(closure)` of {job.id} must return the loss. Found None.")
            losses.append(float(loss.detach()))
            task.advance(1, loss=losses[-1])
    look()
    losses.append(float(loss_of(problem).detach()))
    summary = {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_loss": min(filter(math.isfinite, losses), default=math.nan),
        "steps_per_second": steps / seconds[-1] if seconds[-1] else 0.0,
        "state_bytes_per_parameter": state_bytes(optimizer) / max(numbers, 1),
    }
    where = torch.stack(path) if path else None
    values = torch.tensor(losses, dtype=torch.float64)
    return _Run(job.description.component.name, values, where, seconds, summary)


def _draw(figure: Figure, problem: Problem, runs: Sequence[_Run], target: float) -> None:
    """Draw the losses, and beside them the way through the plane where there are two parameters."""
    losses = {run.name: run.losses.tolist() for run in runs}
    positive = all(x > 0 for line in losses.values() for x in line if math.isfinite(x))
    ways = {run.name: run.path for run in runs if run.path is not None and run.path.shape[1] == 2}
    parts = figure.subfigures(1, 2, squeeze=False)[0] if ways else [figure]
    curves(parts[0], losses, x="step", y="loss", log=positive)
    if math.isfinite(target) and (target > 0 or not positive):
        parts[0].axes[0].axhline(target, color="grey", linestyle=":", linewidth=1)
    if ways:
        paths(parts[1], _at(problem), ways)


def _at(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of points ``[point, parameter]``."""

    @torch.no_grad()
    def losses(points: Tensor) -> Tensor:
        return torch.stack([_loss_at(problem, point) for point in points])

    return losses


def _loss_at(problem: Problem, point: Tensor) -> Tensor:
    parts = torch.split(point, [p.numel() for p in problem.parameters])
    for parameter, part in zip(problem.parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))
    return problem.loss()
