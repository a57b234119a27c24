"""What optimizers are asked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.conformance.common import without_graph_break_reports
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


def _same(found: list[nn.Parameter], wanted: list[nn.Parameter], what: str) -> None:
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=f"a {what} run differs")


def resumes(subject: Subject) -> None:
    """Go on from a ``state_dict`` or a copy as if nothing had happened, after any step.

    One parameter has its first gradient after that: many have no state of it yet.
    """
    for begun in (1, 3):
        parameters = _start()
        optimizer = _make(subject, parameters)
        _steps(optimizer, parameters[1:], begun)
        twins = [nn.Parameter(p.detach().clone()) for p in parameters]
        resumed = _make(subject, twins)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copies, copied = pickle.loads(pickle.dumps((parameters, optimizer)))  # noqa: S301
        for run, own in ((optimizer, parameters), (resumed, twins), (copied, copies)):
            _steps(run, own, 3)
        _same(twins, parameters, "resumed")
        _same(copies, parameters, "pickled")


def steps_compile(subject: Subject) -> None:
    """Take the same steps under ``torch.compile``."""
    parameters = _start()
    optimizer = _make(subject, parameters)
    twins, other = pickle.loads(pickle.dumps((parameters, optimizer)))  # noqa: S301
    torch.compiler.reset()
    compiled: Any = torch.compile(other.step, backend="aot_eager")
    _steps(optimizer, parameters, 6)
    with without_graph_break_reports():
        for _ in range(6):
            other.zero_grad()
            _loss(twins).backward()  # type: ignore[no-untyped-call]
            compiled()
    for a, b in zip(parameters, twins, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg="a compiled step differs")


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
        Check("steps compile", steps_compile, lambda s: bool(s.capability("compilable"))),
        Check("groups", groups),
    ]
