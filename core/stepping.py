"""What optimizers refuse and restore, beyond what ``torch.optim.Optimizer`` does for them.

In an optimizer of one's own::

    class Mine(Optimizer):
        def __init__(self, params, lr=1e-3):
            super().__init__(some_parameters("Mine", params), {"lr": lr})

        def add_param_group(self, param_group):
            settings = {**self.defaults, **param_group}
            conditions = {"lr": (0 <= settings["lr"] < math.inf, "finite and not negative")}
            check_settings("Mine", settings, conditions)
            super().add_param_group(different_parameters("Mine", self, param_group))

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            restore_state(self, state_dict)

and, in ``step``, ``with_gradient(group["params"])`` for all groups before anything moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError

__all__ = [
    "check_settings",
    "different_parameters",
    "restore_state",
    "saved_state",
    "some_parameters",
    "state_dtype",
    "with_gradient",
]

_HALF = (torch.float16, torch.bfloat16)


# -- what is refused -------------------------------------------------------------------------------


def check_settings(
    owner: str, settings: Mapping[str, Any], conditions: Mapping[str, tuple[object, str]]
) -> None:
    """Refuse the first setting that is not as it must be.

    Args:
        owner: Whose settings they are, as its user calls it.
        settings: By name.
        conditions: For each name, whether it holds, and what must hold, after "must be".

    Raises:
        ArgumentError: With the name, the condition and what was found.

    Example:
        >>> from kexue.core import check_settings
        >>> check_settings("SGD", {"lr": -1.0}, {"lr": (-1.0 >= 0, "not negative")})
        Traceback (most recent call last):
            ...
        kexue.core.errors.ArgumentError: `lr` of SGD must be not negative. Found -1.0.
    """
    for name, (holds, condition) in conditions.items():
        if not holds:
            raise ArgumentError(
                f"`{name}` of {owner} must be {condition}. Found {settings[name]!r}.",
                argument=name,
            )


def some_parameters(owner: str, params: Any) -> list[Any]:
    """Return what an optimizer is built on as a list, which is not empty.

    Args:
        owner: The optimizer, as its user calls it.
        params: Parameters, names with parameters, or groups; a single parameter is one of them.

    Raises:
        ArgumentError: If there is none.
    """
    given = [params] if isinstance(params, Tensor) else list(params)
    if not given:
        raise ArgumentError(
            f"`params` of {owner} must hold at least one parameter. Found none. "
            "Give model.parameters() of a model that has some; a generator can be used once.",
            argument="params",
        )
    return given


def different_parameters(
    owner: str, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a new group as torch wants it, in which no parameter comes for the second time.

    Args:
        owner: The optimizer, as its user calls it.
        optimizer: What the group is to be added to.
        group: ``params``, and settings.

    Returns:
        A copy whose ``params`` are a list, of parameters or of names with parameters.

    Raises:
        ArgumentError: If a parameter is there twice, or in another group already.
    """
    given = group["params"]
    entries = [given] if isinstance(given, Tensor) else list(given)
    known = {id(p) for other in optimizer.param_groups for p in other["params"]}
    seen: set[int] = set()
    for entry in entries:
        parameter = entry[1] if isinstance(entry, tuple) else entry
        twice = id(parameter) in seen
        if (twice or id(parameter) in known) and isinstance(parameter, Tensor):
            where = "" if twice else ", in two groups"
            raise ArgumentError(
                f"`params` of {owner} must be different from each other. Found one of shape "
                f"{list(parameter.shape)} twice{where}. Leave it out once.",
                argument="params",
            )
        seen.add(id(parameter))
    return {**group, "params": entries}


def with_gradient(
    parameters: Iterable[Tensor], *, instead: str = "torch.optim.SparseAdam"
) -> list[Tensor]:
    """Return the parameters that a step moves: those with a gradient, and with any numbers.

    Args:
        parameters: Those of a group, shapes ``[*any]``.
        instead: What to recommend for sparse gradients.

    Raises:
        ArgumentError: If a gradient is sparse.
    """
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or parameter.numel() == 0:
            continue
        if gradient.layout is not torch.strided:
            raise ArgumentError(
                f"The gradients of `params` must be dense. Found layout {gradient.layout} for a "
                f"parameter of shape {list(parameter.shape)}. "
                f"Build its module with sparse=False, or optimise it by {instead}.",
                argument="params",
            )
        found.append(parameter)
    return found


# -- the state -------------------------------------------------------------------------------------


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type of the state, and of arithmetic: the parameter's, but float32 for 16 bits.

    Args:
        parameter: The parameter.
    """
    return torch.float32 if parameter.dtype in _HALF else parameter.dtype


def saved_state(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Tensor, str, Any]]:
    """Yield what a state dict has of each parameter: the parameter, the name, the value.

    Args:
        optimizer: An optimizer of as many parameters, in the same order.
        state_dict: What ``state_dict`` returned.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    here = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in zip(saved, here, strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            yield parameter, name, value


def restore_state(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give the state of an optimizer its own types, and memory of its own.

    To be called after torch's ``load_state_dict``, which rounds the state to the type of its
    parameter and shares the tensors that need no change. Numbers become :func:`state_dtype`;
    tensors of another kind than the parameter, such as counts, keep the type that was saved.

    Args:
        optimizer: The optimizer that has loaded it.
        state_dict: What it has loaded. Not modified, and not shared afterwards.
    """
    for parameter, name, value in saved_state(optimizer, state_dict):
        if isinstance(value, Tensor):
            alike = _kind(value) == _kind(parameter)
            dtype = state_dtype(parameter) if alike else value.dtype
            optimizer.state[parameter][name] = value.to(parameter.device, dtype, copy=True)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
