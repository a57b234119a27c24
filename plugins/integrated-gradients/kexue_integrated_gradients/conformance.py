"""What attributions are asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.conformance import Check, Subject, require
from kexue.core.conformance.common import assert_close
from kexue.core.errors import KexueError
from kexue_integrated_gradients.attribution import Attributions

__all__ = ["checks"]


def _attribute(subject: Subject, model: Any, x: Tensor, **options: Any) -> Attributions:
    found: Attributions = subject.make().attribute(model, x, **options)
    return found


def _network(features: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def same_shape(subject: Subject) -> None:
    """Return a value for each input and the outputs of each row."""
    x = subject.inputs()["inputs"]
    found = subject.make().attribute(**subject.inputs())
    require(
        found.values.shape == x.shape,
        f"inputs {list(x.shape)} became {list(found.values.shape)}",
    )
    for name in ("error", "outputs", "baseline_outputs"):
        shape = getattr(found, name).shape
        require(shape == x.shape[:1], f"`{name}` has shape {list(shape)}, not one for each row")


def completeness(subject: Subject) -> None:
    """Add up to the difference of the outputs, and say how far off they are."""
    x = subject.inputs(dtype=torch.float64)["inputs"]
    found = _attribute(subject, _network(x[0].numel()).double(), x.flatten(1), target=1)
    together = {"value": found.values.sum(1)}
    difference = found.outputs - found.baseline_outputs
    assert_close(together, {"value": difference + found.error}, "their sum", 1e-9)
    require(found.relative_error < 1e-2, f"the completeness error is {found.relative_error:.2%}")


def outputs_are_the_models(subject: Subject) -> None:
    """Return the outputs that the model has in evaluation."""
    x = subject.inputs()["inputs"].flatten(1)
    model = _network(x.shape[1]).eval()
    found = _attribute(subject, model, x, target=0)
    with torch.no_grad():
        assert_close({"value": found.outputs}, {"value": model(x)[:, 0]}, "outputs", 1e-5)


def ignored_features(subject: Subject) -> None:
    """Give nothing to a feature that the model does not look at."""
    x = subject.inputs()["inputs"].flatten(1)
    found = _attribute(subject, lambda x: x[:, 1:].tanh().sum(1), x)
    require(not found.values[:, 0].any(), "a feature that the model ignores gets a value")


def implementation(subject: Subject) -> None:
    """Give the same to two models that compute the same function."""
    x = subject.inputs(dtype=torch.float64)["inputs"].flatten(1)
    one = _attribute(subject, lambda x: (x * x).sum(1), x)
    other = _attribute(subject, lambda x: ((x + 1) ** 2 - 2 * x - 1).sum(1), x)
    assert_close({"value": other.values}, {"value": one.values}, "another wiring", 1e-9)


def model_unchanged(subject: Subject) -> None:
    """Leave the model in the mode, with the gradients and parameters that it had."""
    x = subject.inputs()["inputs"].flatten(1)
    model = _network(x.shape[1]).train()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _attribute(subject, model, x, target=0)
    require(all(m.training for m in model.modules()), "the model is no longer in training mode")
    require(all(p.grad is None for p in model.parameters()), "the model has gradients")
    free = [p.requires_grad for p in model.parameters()]
    require(free == [False, True, True, True], "other parameters are frozen than before")
    require(not any(m._forward_hooks for m in model.modules()), "a hook was left behind")  # noqa: SLF001
    assert_close(dict(model.state_dict()), before, "the parameters", 0.0)


def without_gradients(subject: Subject) -> None:
    """Work where gradients are switched off."""
    inputs = subject.inputs()
    wanted = subject.make().attribute(**inputs).values
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = subject.make().attribute(**inputs).values.clone()
        assert_close({"value": found}, {"value": wanted}, type(context).__name__, 0.0)


def needs_a_target(subject: Subject) -> None:
    """Refuse several outputs without a target."""
    x = subject.inputs()["inputs"].flatten(1)
    try:
        _attribute(subject, _network(x.shape[1]), x)
    except KexueError as error:
        require("`target`" in str(error), f"the error does not name `target`: {error}")
    else:
        raise AssertionError("two outputs without a target are accepted")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("same shape", same_shape),
        Check("complete", completeness, lambda s: bool(s.capability("complete"))),
        Check("says the outputs", outputs_are_the_models),
        Check("ignored features get nothing", ignored_features),
        Check(
            "the wiring does not matter",
            implementation,
            lambda s: bool(s.capability("implementation_invariant")),
        ),
        Check("the model is not changed", model_unchanged),
        Check("gradients may be off", without_gradients),
        Check("needs a target", needs_a_target),
    ]
