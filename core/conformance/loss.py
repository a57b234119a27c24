"""What losses are asked."""

from __future__ import annotations

import torch

from kexue.core.conformance.common import assert_close
from kexue.core.conformance.kit import Check, Subject, require

__all__ = ["checks"]


def reductions(subject: Subject) -> None:
    """Reduce what ``reduction="none"`` gives."""
    inputs = subject.inputs()
    rows = subject.call(subject.make(reduction="none"), inputs)["value"]
    for reduction, wanted in (("sum", rows.sum()), ("mean", rows.mean())):
        found = subject.call(subject.make(reduction=reduction), inputs)
        assert_close(found, {"value": wanted}, reduction, 1e-5)


def unknown_reduction(subject: Subject) -> None:
    """Refuse a reduction that it does not know."""
    try:
        subject.make(reduction="avg")
    except ValueError as error:
        require("reduction" in str(error), f"the error does not name `reduction`: {error}")
    else:
        raise AssertionError("reduction='avg' is accepted")


def autocast(subject: Subject) -> None:
    """Stay finite and close under bfloat16 autocast."""
    built, inputs = subject.make(), subject.inputs()
    wanted = subject.call(built, inputs)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        found = subject.call(built, inputs)
    assert_close({n: t.float() for n, t in found.items()}, wanted, "under autocast", 5e-2)


def _reduces(subject: Subject) -> bool:
    return any(p.name == "reduction" for p in subject.description.parameters)


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("reductions", reductions, _reduces),
        Check("unknown reduction", unknown_reduction, _reduces),
        Check("autocast", autocast),
    ]
