"""Optimizers to derive from: by name, and what is known of them."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, overload

import torch

from kexue.core import ArgumentError, registry
from kexue.core.errors import ComponentNotFoundError

__all__ = ["check_base", "reads_parameters", "resolve_base", "steps_apart"]

T = TypeVar("T", bound=torch.optim.Optimizer)

_PREFIX = "torch.optim."
_OURS = "adafactor"  # also a name in torch.optim; the registered component is meant

_READS_WITH_DECAY = {
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
}


@functools.cache
def _torch_names() -> dict[str, type[torch.optim.Optimizer]]:
    found = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    del found["optimizer"]
    return found


@overload
def resolve_base(base: type[T]) -> type[T]: ...
@overload
def resolve_base(base: str) -> Any: ...


def resolve_base(base: Any) -> Any:
    """Return the optimizer class of a name; a class is returned as it is.

    Args:
        base: A class; a name of ``torch.optim`` in any case, such as ``"adam"`` or ``"AdamW"``,
            also with ``torch.optim.`` before it; or a registered component, ``"adafactor"`` or
            ``"optimizer/adax"``. A short name that both have is torch's, except ``"adafactor"``.

    Raises:
        ArgumentError: If it names no optimizer.

    Example:
        >>> from kexue_lookahead.bases import resolve_base
        >>> resolve_base("adamw")
        <class 'torch.optim.adamw.AdamW'>
    """
    if isinstance(base, type):
        return base
    if not isinstance(base, str):
        raise ArgumentError(
            "`base` must be a class of optimizers, or the name of one, such as 'adam'. "
            f"Found {type(base).__name__}.",
            argument="base",
        )
    known = _torch_names()
    short = base.removeprefix(_PREFIX).lower()
    if short in known and (short != _OURS or base.startswith(_PREFIX)):
        return known[short]
    try:
        component = registry.get(base)
    except ComponentNotFoundError as error:
        raise ArgumentError(
            f"`base` must be one of {', '.join(sorted(known))}, or a registered optimizer. "
            f"Found {base!r}. {error}",
            argument="base",
        ) from error
    loaded: Any = registry.load(component)
    if not (isinstance(loaded, type) and issubclass(loaded, torch.optim.Optimizer)):
        raise ArgumentError(
            f"`base` must name an optimizer. Found {component.id}.", argument="base"
        )
    return loaded


def check_base(base: Any) -> None:
    """Refuse what nothing can be derived from.

    Args:
        base: What should be a class of optimizers.

    Raises:
        ArgumentError: If it is none, or its ``step`` needs a closure, like that of LBFGS.
    """
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)):
        raise ArgumentError(
            "`base` must be a torch.optim.Optimizer, its class, or the name of one, such as "
            f"'adam'. Found {base!r}.",
            argument="base",
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ArgumentError(
            f"`base` must take steps without a closure. Found {base.__name__}, which evaluates "
            "it several times a step. Use torch.optim.Adam, SGD or another first-order method.",
            argument="base",
        )


def reads_parameters(base: type[torch.optim.Optimizer], group: dict[str, Any]) -> bool:
    """Return whether the update of a group depends on its parameters otherwise than by gradients.

    Then it must be computed at the parameters themselves, and is their difference, with its
    cancellation; else it can be computed at 0. Any class may say so of itself in an attribute
    ``reads_parameters``, a function of the group or a constant. Those of ``torch.optim`` are known
    (weight decay reads, the rest does not, ASGD and Adafactor do); all others, subclasses included,
    are taken to read.

    Args:
        base: The class, exactly.
        group: The parameter group.
    """
    said = vars(base).get("reads_parameters")
    if isinstance(said, staticmethod):
        said = said.__func__
    if said is not None:
        return bool(said(group)) if callable(said) else bool(said)
    if base in _READS_WITH_DECAY:
        return bool(group.get("weight_decay", 0))
    return True


def steps_apart(base: type[torch.optim.Optimizer]) -> bool:
    """Return whether a step of some parameters and a step of the others are the step of all.

    That is so where whatever is remembered is remembered of a parameter, without sharing its
    memory, and nothing of a group or of the optimizer. Any class may say so of itself in an
    attribute ``steps_apart``. The optimizers of ``torch.optim`` do, but ASGD, Adafactor, LBFGS and
    Muon; all others, subclasses included, are taken not to.

    Args:
        base: The class, exactly.
    """
    return bool(vars(base).get("steps_apart", base in _READS_WITH_DECAY))
