"""What generators are asked."""

from __future__ import annotations

import tempfile

import torch

from kexue.core.conformance.kit import Check, Subject, require
from kexue.core.training import Trainable

__all__ = ["checks"]


def fits_and_generates(subject: Subject) -> None:
    """Learn from rows, and give the same rows for the same seed once saved and loaded."""
    data: torch.Tensor = subject.inputs_of_example()["data"]
    model = subject.make().train()
    require(isinstance(model, Trainable), "a generator is a Trainable")
    before = model.evaluate(data)["loss"]
    model.fit(data, epochs=5, batch_size=8, lr=1e-2)
    after = model.evaluate(data)["loss"]
    require(after < before, f"the loss was {before:.4g} and is {after:.4g} after five epochs")

    def rows(of: Trainable, seed: int) -> torch.Tensor:
        drawn: torch.Tensor = of.eval().generate(3, generator=torch.Generator().manual_seed(seed))  # type: ignore[operator]
        return drawn

    require(
        rows(model, 1).shape == (3, *data.shape[1:]),
        f"three rows have shape {list(rows(model, 1).shape)}",
    )
    require(not torch.equal(rows(model, 1), rows(model, 2)), "`generator` is not used")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        require(
            torch.equal(rows(type(model).load(folder), 1), rows(model, 1)),
            "another result once loaded",
        )


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [Check("fits and generates", fits_and_generates)]
