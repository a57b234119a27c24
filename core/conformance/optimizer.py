"""What optimizers are asked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.conformance.kit import Check, Subject, require

__all__ = ["checks"]


def _start() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(4, 3, generator=generator)),
        nn.Parameter(torch.randn(3, generator=generator)),
    ]


def _loss(parameters: list[nn.Parameter]) -> Tensor:
    return sum((p.square().sum() for p in parameters), torch.zeros(()))


def _make(subject: Subject, parameters: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = subject.registry.create(
        subject.component, params=parameters, **subject.example().params
    )
    require(isinstance(made, torch.optim.Optimizer), "an optimizer is a torch.optim.Optimizer")
    return made


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(parameters).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def lowers_the_loss(subject: Subject) -> None:
    """Lower a convex loss within fifty steps, and return what a closure returns."""
    parameters = _start()
    optimizer = _make(subject, parameters)
    before = float(_loss(parameters).detach())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(parameters)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    first = optimizer.step(closure)  # type: ignore[arg-type]
    require(first is not None, "`step(closure)` must return the loss")
    _steps(optimizer, parameters, 49)
    after = float(_loss(parameters).detach())
    require(after < before, f"the loss was {before:.4g} and is {after:.4g} after fifty steps")


def resumes(subject: Subject) -> None:
    """Go on from a ``state_dict`` as if nothing had happened."""
    parameters = _start()
    optimizer = _make(subject, parameters)
    _steps(optimizer, parameters, 3)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = _make(subject, twins)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _steps(optimizer, parameters, 3)
    _steps(resumed, twins, 3)
    for a, b in zip(parameters, twins, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg="a resumed run differs")


def groups(subject: Subject) -> None:
    """Take parameter groups, and leave parameters without a gradient alone."""
    moved, still = _start()
    optimizer = _make(subject, [{"params": [moved]}, {"params": [still]}])
    require(len(optimizer.param_groups) == 2, "two groups became another number")
    before = still.detach().clone()
    moved.square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    require(torch.equal(before, still), "a parameter without a gradient was moved")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("lowers the loss", lowers_the_loss),
        Check("resumes", resumes),
        Check("groups", groups),
    ]
