"""What analyzers are asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.core.conformance import Check, Subject, require
from kexue.core.conformance.common import assert_close
from kexue.core.errors import KexueError

__all__ = ["checks"]


def _figures(subject: Subject, transitions: Any) -> dict[str, Tensor]:
    """Return the figures that are single numbers."""
    found = subject.make().analyze(transitions)
    values = {name: getattr(found, name) for name in found._fields}
    return {n: v for n, v in values.items() if isinstance(v, Tensor) and v.ndim == 0}


def _example(subject: Subject) -> Tensor:
    given: Tensor = subject.inputs(dtype=torch.float64)["transitions"]
    return given


def names_its_figures(subject: Subject) -> None:
    """Return a named tuple that holds a single number at least."""
    found = subject.make().analyze(_example(subject))
    require(hasattr(found, "_fields"), f"the result is {type(found).__name__}, no named tuple")
    require(_figures(subject, _example(subject)), "the result holds no single number")


def order(subject: Subject) -> None:
    """Find the same whatever the tokens are called."""
    p = _example(subject)
    turned = torch.arange(len(p) - 1, -1, -1)
    assert_close(_figures(subject, p[turned][:, turned]), _figures(subject, p), "reordered", 1e-9)


def sparse(subject: Subject) -> None:
    """Find the same in a sparse matrix."""
    p = _example(subject) * (_example(subject) > 0.2)
    assert_close(_figures(subject, p.to_sparse()), _figures(subject, p), "sparse", 1e-9)


def small(subject: Subject) -> None:
    """Take a decoder of no token and of one."""
    for size in (0, 1):
        _figures(subject, torch.full((size, size), 0.5, dtype=torch.float64))


def refuses(subject: Subject) -> None:
    """Refuse what are no probabilities, naming `transitions`."""
    p = _example(subject)
    for wrong in (-p, 2 * p, p[:2], torch.full_like(p, float("nan"))):
        try:
            subject.make().analyze(wrong)
        except KexueError as error:
            require("`transitions`" in str(error), f"the error names no argument: {error}")
        else:
            raise AssertionError("a matrix that holds no probabilities is accepted")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("names its figures", names_its_figures),
        Check("the order of tokens does not matter", order),
        Check("sparse is the same", sparse),
        Check("no token and one", small),
        Check("refuses what are no probabilities", refuses),
    ]
