"""What layers are asked."""

from __future__ import annotations

from kexue.core.conformance.kit import Check, Subject, require

__all__ = ["checks"]


def same_shape(subject: Subject) -> None:
    """Return features of the shape that it was given."""
    inputs = subject.inputs()
    given = next(iter(inputs.values()))
    found = subject.call(subject.make(), inputs)["value"]
    require(found.shape == given.shape, f"shape {list(given.shape)} became {list(found.shape)}")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [Check("same shape", same_shape)]
