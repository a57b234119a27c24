"""Optimizers: gradients to parameters that lower the loss."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import curves
from kexue.core.problems import make_problem

__all__ = ["Optimizer", "run", "state_bytes"]


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

    Args:
        job: The call.
        steps: Steps to take.
    """
    if steps < 1:
        raise ArgumentError(f"`--steps` must be at least 1. Found {steps}.", argument="steps")
    named = job.one_file("a problem: rosenbrock, quadratic, beale or file.py:function")
    problem = make_problem(named, device=job.device, dtype=job.dtype)
    optimizer: Any = job.build(params=problem.parameters)
    losses: list[float] = []
    path: list[Tensor] = []
    numbers = sum(p.numel() for p in problem.parameters)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    start = time.perf_counter()
    with job.progress.task("minimising", steps) as task:
        for _ in range(steps):
            if numbers <= 16:
                path.append(torch.cat([p.detach().flatten() for p in problem.parameters]).clone())
            losses.append(float(optimizer.step(closure).detach()))
            task.advance(1, loss=losses[-1])
    seconds = time.perf_counter() - start
    losses.append(float(problem.loss().detach()))
    finite = [loss for loss in losses if math.isfinite(loss)]
    summary = {
        "problem": problem.name,
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_loss": min(finite, default=math.nan),
        "steps_per_second": steps / seconds if seconds else 0.0,
        "parameters": numbers,
        "state_bytes_per_parameter": state_bytes(optimizer) / max(numbers, 1),
    }
    arrays = {"loss": torch.tensor(losses, dtype=torch.float64)}
    if path:
        arrays["path"] = torch.stack(path)
    positive = all(loss > 0 for loss in finite)
    return Result(
        summary,
        arrays,
        plot=lambda f: curves(f, {job.id: losses}, x="step", y="loss", log=positive),
    )
