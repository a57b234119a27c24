"""Optimizers: gradients to parameters that lower the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import curves, paths
from kexue.core.problems import Problem, make_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Optimizer", "run", "state_bytes"]

_FEW = 16  # parameters whose path is kept


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


def run(job: Job, *, steps: int = 200) -> Result:
    """Minimise a problem: rosenbrock, quadratic, beale, or ``file.py:function``.

    Further optimizers may be named before the problem; all start at the same point. ``--set
    NAME.lr=…`` sets a parameter of one of them, ``--set lr=…`` of all that have it.

    Args:
        job: The call.
        steps: Steps to take.
    """
    if steps < 1:
        raise ArgumentError(f"`--steps` must be at least 1. Found {steps}.", argument="steps")
    named = job.one_file("a problem: rosenbrock, quadratic, beale or file.py:function")
    problem = make_problem(named, device=job.device, dtype=job.dtype)
    start = [p.detach().clone() for p in problem.parameters]
    runs = [_minimise(job, problem, steps)]
    for other in job.others:
        fresh = make_problem(named, device=job.device, dtype=job.dtype)
        with torch.no_grad():
            for parameter, value in zip(fresh.parameters, start, strict=True):
                parameter.copy_(value)
        runs.append(_minimise(other, fresh, steps))
    if len(runs) == 1:
        (only,) = runs
        numbers = sum(p.numel() for p in problem.parameters)
        about = {"problem": problem.name, "parameters": numbers, "steps": steps}
        summary: dict[str, Any] = {**about, **only.summary}
        arrays = {"loss": only.losses} | ({} if only.path is None else {"path": only.path})
    else:
        summary = {run.name: run.summary for run in runs}
        arrays = {run.name: run.losses for run in runs}
        arrays |= {f"{run.name}-path": run.path for run in runs if run.path is not None}
    return Result(summary, arrays, plot=lambda figure: _draw(figure, problem, runs))


@dataclass(frozen=True, slots=True)
class _Run:
    """What one optimizer made of the problem.

    Args:
        name: The optimizer's.
        losses: Before each step, and after the last.
        path: Where it was then, ``[step, parameter]``; None where there are many parameters.
        summary: Figures.
    """

    name: str
    losses: Tensor
    path: Tensor | None
    summary: dict[str, float]


def _minimise(job: Job, problem: Problem, steps: int) -> _Run:
    optimizer: Any = job.build(params=problem.parameters)
    losses: list[float] = []
    path: list[Tensor] = []
    numbers = sum(p.numel() for p in problem.parameters)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def look() -> None:
        if numbers <= _FEW:
            path.append(torch.cat([p.detach().flatten() for p in problem.parameters]))

    begin = time.perf_counter()
    with job.progress.task(f"minimising by {job.id}", steps) as task:
        for _ in range(steps):
            look()
            losses.append(float(optimizer.step(closure).detach()))
            task.advance(1, loss=losses[-1])
    seconds = time.perf_counter() - begin
    look()
    losses.append(float(problem.loss().detach()))
    summary = {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_loss": min(filter(math.isfinite, losses), default=math.nan),
        "steps_per_second": steps / seconds if seconds else 0.0,
        "state_bytes_per_parameter": state_bytes(optimizer) / max(numbers, 1),
    }
    where = torch.stack(path) if path else None
    values = torch.tensor(losses, dtype=torch.float64)
    return _Run(job.description.component.name, values, where, summary)


def _draw(figure: Figure, problem: Problem, runs: Sequence[_Run]) -> None:
    """Draw the losses, and beside them the way through the plane where there are two parameters."""
    losses = {run.name: run.losses.tolist() for run in runs}
    positive = all(x > 0 for line in losses.values() for x in line if math.isfinite(x))
    ways = {run.name: run.path for run in runs if run.path is not None and run.path.shape[1] == 2}
    parts = figure.subfigures(1, 2, squeeze=False)[0] if ways else [figure]
    curves(parts[0], losses, x="step", y="loss", log=positive)
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
