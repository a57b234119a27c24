"""Subjects, checks, findings."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue.core.component import Component, Example
from kexue.core.describe import Description
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.interfaces.sampler import Samples
from kexue.core.registry import Registry

__all__ = [
    "Check",
    "Finding",
    "GlobalState",
    "Subject",
    "is_class",
    "require",
    "tensors_of",
]


def require(holds: object, otherwise: str) -> None:
    """Raise AssertionError unless something holds; an ``assert`` would not under ``python -O``.

    Raises:
        AssertionError: With the reason.
    """
    if not holds:
        raise AssertionError(otherwise)


class Check(NamedTuple):
    """One question.

    Args:
        name: What must be true, in a few words.
        run: Raises AssertionError, with the reason, if it is not; whatever else it raises counts
            as failing too.
        applies: Whether the question makes sense for a subject.
    """

    name: str
    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool] = lambda _: True


class Finding(NamedTuple):
    """The answer.

    Args:
        subject: Id of the component, or the plugin.
        name: Name of the check.
        state: ``"passed"``, ``"failed"`` or ``"skipped"``.
        reason: Why it failed, or is known to.
    """

    subject: str
    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Subject:
    """A component under question.

    Args:
        registry: Where it comes from.
        component: Which.
    """

    registry: Registry
    component: Component

    @cached_property
    def description(self) -> Description:
        """What its source says."""
        return self.registry.describe(self.component)

    @cached_property
    def target(self) -> Any:
        """The class or function."""
        return self.registry.load(self.component)

    @cached_property
    def method(self) -> str:
        """The method that its kind runs."""
        return self.description.method

    def capability(self, name: str) -> Any:
        """Return a capability of the class; None if it says nothing."""
        return getattr(self.target, name, None)

    def example(self, seed: int = 0) -> Example:
        """Return fresh example arguments."""
        if not hasattr(self.target, "example"):
            raise AssertionError(
                f"{self.component.id} gives no example: add a class method "
                f"`example(cls, *, generator=None)` that returns an Example."
            )
        example: Example = self.target.example(generator=torch.Generator().manual_seed(seed))
        return example

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the example's arguments for the method, floating-point ones in ``dtype``."""
        known = [row.name for row in self.description.inputs]
        given = self.example(seed).inputs
        return {
            n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in given.items()
            if n in known
        }

    def inputs_of_example(self, seed: int = 0) -> dict[str, Any]:
        """Return all inputs of the example, those that the method does not take included."""
        return dict(self.example(seed).inputs)

    def make(self, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changed: Any) -> Any:
        """Build the component from its example, the same weights for the same seed.

        Losses keep one value per row, so that rows can be compared.
        """
        torch.manual_seed(seed)
        params = dict(self.example().params)
        if any(p.name == "reduction" for p in self.description.parameters):
            params["reduction"] = "none"
        built = self.registry.create(self.component, **{**params, **changed})
        return built.to(dtype).eval() if isinstance(built, torch.nn.Module) else built

    def call(self, built: Any, inputs: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
        """Call the method and return its tensors by name."""
        extra: dict[str, Any] = {}
        if any(row.name == "generator" for row in self.description.inputs):
            extra["generator"] = torch.Generator(_device_of(inputs)).manual_seed(seed)
        function = built if self.method in {"forward", "__call__"} else getattr(built, self.method)
        return tensors_of(function(**{**inputs, **extra}))

    def axes(self, axis: str) -> dict[str, int]:
        """Return the inputs that have an axis, with its place; ``*batch`` stands for ``batch``."""
        found: dict[str, int] = {}
        for row in self.description.inputs:
            words = [word.lstrip("*") for word in row.axes]
            if axis in words:
                found[row.name] = words.index(axis)
        return found


def _device_of(inputs: Mapping[str, Any]) -> torch.device:
    tensors = (value for value in inputs.values() if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.get_default_device())


def tensors_of(result: Any) -> dict[str, Tensor]:
    """Return what a method returned as tensors by name."""
    if isinstance(result, Tensor):
        return {"value": result}
    if isinstance(result, DecodeResult):
        return {"sequences": result.sequences, "scores": result.scores}
    if isinstance(result, Samples):
        return {"values": result.values}
    if isinstance(result, Mapping):
        return {str(k): v for k, v in result.items() if isinstance(v, Tensor)}
    if isinstance(result, tuple | list):
        return {str(i): v for i, v in enumerate(result) if isinstance(v, Tensor)}
    raise AssertionError(f"the method must return tensors. Found {type(result).__name__}.")


class GlobalState(NamedTuple):
    """What torch keeps for the whole process, random numbers aside."""

    default_dtype: torch.dtype
    grad_enabled: bool
    num_threads: int
    deterministic: bool

    @classmethod
    def now(cls) -> GlobalState:
        """Return the state."""
        return cls(
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )

    @classmethod
    @contextlib.contextmanager
    def kept(cls) -> Iterator[None]:
        """Bring the state, that of the random numbers too, back to what it was."""
        before = cls.now()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.set_default_dtype(before.default_dtype)
            torch.set_grad_enabled(before.grad_enabled)
            torch.set_num_threads(before.num_threads)
            torch.use_deterministic_algorithms(before.deterministic)


def is_class(subject: Subject) -> bool:
    """Whether the component is a class, not a function."""
    return inspect.isclass(subject.target)
