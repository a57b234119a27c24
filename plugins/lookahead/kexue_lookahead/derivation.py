"""Derivations: what turns one optimizer into another, whatever the optimizer.

A derivation is a small frozen object. :func:`kexue_lookahead.derived.derive` puts an ordered tuple
of them on the class of an optimizer, and :class:`kexue_lookahead.derived.DerivedOptimizer` calls
them in fixed phases of each step; a hook that a derivation does not override costs nothing.

::

    look         check the gradients of this call; nothing has changed yet
    accumulate   may say that the step waits for more gradients
    rate         factors on the group's ``lr``, for the length of the step
    begin        before any parameter moves
    base         the base's step, its update u passed through ``update`` in the order of derivation
    end          after the parameters have moved
    release      gives back what ``accumulate`` borrowed

The order of two derivations therefore matters only between those that override ``update``: the one
that was applied first acts first.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kexue.core import ArgumentError

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["Batch", "Derivation", "batches", "distributed", "local", "matching", "prefixes"]

_WHOLE = {Tensor, torch.nn.Parameter}  # asking these for what they lack takes time

Group = dict[str, Any]
"""One of ``optimizer.param_groups``."""


@dataclass(eq=False)
class Batch:
    """Parameters of one group that are worked on together: one device, type and set of derivations.

    With ``foreach=False`` in their group, and for a single parameter, the lists have one entry, so
    that ``torch._foreach_*`` of them is the loop.

    Args:
        optimizer: Theirs.
        group: Theirs; ``group["lr"]`` holds the scheduled rate during ``update``.
        params: The parameters, before the step, of shape ``[*any]``.
    """

    optimizer: DerivedOptimizer
    group: Group
    params: list[Tensor]
    _updates: list[Tensor] = dataclasses.field(default_factory=list, init=False)
    _common: float | None = dataclasses.field(default=None, init=False)  # of borrowed updates
    _factors: Tensor | Sequence[float] | None = dataclasses.field(default=None, init=False)

    def receive(self, updates: Iterable[Tensor]) -> None:
        """Take the base's updates.

        Args:
            updates: They, in the order of the parameters; theirs from now on.
        """
        self._updates = list(updates)

    def borrow(self, directions: Iterable[Tensor], factor: float) -> None:
        """Take the base's updates where it keeps them itself, up to a factor.

        Args:
            directions: Tensors d of the base, in the order of the parameters.
            factor: The number c of u = c d.
        """
        self._updates, self._common = list(directions), factor

    @property
    def updates(self) -> list[Tensor]:
        """What the base would add to each parameter, u = −γh, same shapes; changed in place.

        Empty in ``directly``.
        """
        if self._common is not None:
            found = torch._foreach_mul(self._updates, self._common)  # noqa: SLF001
            self._updates, self._common = list(found), None
        if self._factors is not None:
            factors, self._factors = self._factors, None
            each: Any = factors.unbind() if isinstance(factors, Tensor) else factors
            torch._foreach_mul_([local(u) for u in self._updates], list(each))
        return self._updates

    @property
    def directions(self) -> tuple[list[Tensor], float]:
        """Tensors d and a number c, so that u = c d; not to be changed."""
        if self._factors is None and self._common is not None:
            return self._updates, self._common
        return self.updates, 1.0

    @property
    def immediate(self) -> bool:
        """Whether numbers are had of its tensors without waiting: on a CPU, and not of DTensors."""
        return self.params[0].is_cpu and not distributed(self.params[0])

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the parameters, in their order."""
        return [p.grad for p in self.params if p.grad is not None]

    def scale(self, factors: Tensor | Sequence[float]) -> None:
        """Multiply each update by a factor of its own: at once, if anybody looks at it again.

        Args:
            factors: They, one for each parameter; numbers, or a tensor of shape ``[params]``.
        """
        if self._factors is not None:
            self.updates  # noqa: B018  # applies them
        self._factors = factors

    def move(self) -> None:
        """Add the updates to the parameters."""
        if not self.immediate or (self._factors is None and self._common is None):
            torch._foreach_add_(self.params, self.updates)
            return
        # one pass scales and adds
        common = 1.0 if self._common is None else self._common
        factors = [1.0] * len(self.params) if self._factors is None else self._factors
        factors = factors.tolist() if isinstance(factors, Tensor) else factors
        for p, update, factor in zip(self.params, self._updates, factors, strict=True):
            p.add_(update, alpha=common * factor)


class Derivation:
    """Base of derivations: frozen dataclasses whose fields are options with their defaults.

    Each option becomes a keyword of the derived class, an entry of ``defaults`` and of every
    parameter group, and thus of the ``state_dict``; a group may bring its own value. Values must be
    hashable, because classes are cached by them.

    What a derivation remembers of a parameter is in ``optimizer.state[p]`` under keys that start
    with ``name`` and a full stop; tensors keep their type through ``load_state_dict``. What it
    counts is in the groups, under the names in ``counters``.
    """

    name: ClassVar[str]
    """Its word in errors, state keys and class names, like ``"layer-adaptation"``."""

    counters: ClassVar[tuple[str, ...]] = ()
    """Entries of every parameter group that start at 0 and go with the ``state_dict``."""

    remembers: ClassVar[bool] = True
    """Whether it remembers anything of a parameter."""

    mixin: ClassVar[type | None] = None
    """A class whose methods the derived optimizer gets."""

    direct: ClassVar[bool] = False
    """Whether ``directly``, before the base's step, is the same as ``update`` where nothing but
    such derivations works on the parameter and the base does not read it."""

    scales: ClassVar[bool] = False
    """Whether ``update`` reads ``directions`` of a batch and changes them by ``scale`` alone, so
    that they may be memory of the base."""

    fuses: ClassVar[frozenset[type]] = frozenset()
    """The bases that take their fused kernel for it where that is left open: what passes over
    memory several times should not wait for a slow base as well. Adam and AdamW take it for good
    when they are built for it, SGD in steps in which all gradients are dense."""

    def __post_init__(self) -> None:
        """Make lists hashable."""
        for name, value in self.options().items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def options(self) -> dict[str, Any]:
        """Return the options and their defaults, by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        return {field.name: getattr(self, field.name) for field in fields}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that are out of range.

        Args:
            options: Those of a group, by name, among others.

        Raises:
            ArgumentError: At the first one.
        """

    def check_group(self, optimizer: DerivedOptimizer, group: Group) -> None:
        """Refuse a group for other reasons than its options, such as names that it lacks.

        Args:
            optimizer: The optimizer that it joins.
            group: It, complete; ``params`` is a list of tensors.

        Raises:
            ArgumentError: If it cannot be taken.
        """

    def look(self, optimizer: DerivedOptimizer) -> None:
        """Refuse gradients that cannot be worked on; nothing has changed yet.

        Args:
            optimizer: The optimizer.

        Raises:
            ArgumentError: If there are any.
        """

    def accumulate(self, optimizer: DerivedOptimizer) -> bool:
        """Return whether the step is to be taken; it may replace gradients for it.

        Args:
            optimizer: The optimizer.
        """
        del optimizer
        return True

    def release(self, optimizer: DerivedOptimizer) -> None:
        """Undo what ``accumulate`` did for a step, also if that failed.

        Args:
            optimizer: The optimizer.
        """

    def rate(self, optimizer: DerivedOptimizer, group: Group) -> float:
        """Return a factor on the learning rate of a group, for this step.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer, group
        return 1.0

    def begin(self, optimizer: DerivedOptimizer) -> None:
        """Act before any parameter moves.

        Args:
            optimizer: The optimizer.
        """

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> Sequence[bool]:
        """Return for each parameter of a group whether it is changed by the derivation.

        Those are given to ``update``, and for those ``fuses`` asks for a kernel.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        return [True] * len(group["params"])

    def update(self, batch: Batch) -> None:
        """Change the updates of a batch in place.

        Args:
            batch: Selected parameters with gradients, and their updates.
        """

    def directly(self, batch: Batch) -> None:
        """Change the parameters before the base's step; see ``direct``.

        Args:
            batch: Selected parameters with gradients, without updates.
        """

    def end(self, optimizer: DerivedOptimizer) -> None:
        """Act after the parameters have moved. Counters advance here.

        Args:
            optimizer: The optimizer.
        """

    def changes_updates(self) -> bool:
        """Whether it overrides ``update``."""
        return type(self).update is not Derivation.update


@functools.lru_cache(maxsize=1024)
def _matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> tuple[bool, ...]:
    found = [re.compile(re.escape(p), re.IGNORECASE) for p in patterns]
    return tuple(any(f.search(name) for f in found) for name in names)


def matching(group: Group, patterns: Sequence[str], *, option: str) -> tuple[bool, ...]:
    """Return for each parameter of a group whether its name contains one of the patterns.

    Upper and lower case are the same: ``"norm"`` is in ``"encoder.LayerNorm.weight"``.

    Args:
        group: A parameter group.
        patterns: Parts of names; none match if it is empty.
        option: The option that they are from, for the error.

    Raises:
        ArgumentError: If there are patterns and the group has no names.

    Example:
        >>> import torch
        >>> from kexue_lookahead.derivation import matching
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
        >>> matching(optimizer.param_groups[0], ("bias", "norm"), option="exclude")
        (False, True)
    """
    if not patterns:
        return (False,) * len(group["params"])
    if "param_names" not in group:
        raise ArgumentError(
            f"`{option}` must come with named parameters, which it chooses from. Found none. "
            "Build the optimizer on model.named_parameters().",
            argument=option,
        )
    return _matches(tuple(group["param_names"]), tuple(patterns))


def batches(optimizer: DerivedOptimizer, group: Group, params: Iterable[Tensor]) -> list[Batch]:
    """Split parameters of a group into batches of one device and type.

    Args:
        optimizer: Theirs.
        group: Theirs.
        params: Some of them.

    Returns:
        Batches without updates; one for each parameter with ``foreach=False`` in the group.
    """
    if group.get("foreach") is False:
        return [Batch(optimizer, group, [p]) for p in params]
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        alike[p.device, p.dtype, distributed(p)].append(p)
    return [Batch(optimizer, group, same) for same in alike.values()]


def prefixes(optimizer: DerivedOptimizer) -> tuple[str, ...]:
    """Return what keys in the state of a parameter begin with that are not the base's.

    Args:
        optimizer: The optimizer.
    """
    return tuple(f"{d.name}." for d in optimizer.derivations if d.remembers)


def distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, also where torch is built without them.

    Args:
        tensor: The tensor.
    """
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this process has; any other tensor itself.

    Args:
        tensor: The tensor. What is written to the result is written to it.
    """
    if not distributed(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part
