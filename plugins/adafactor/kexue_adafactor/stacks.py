"""Which parameters are computed together: lists of stacks of equal shape.

Each operation of a step is called once for a list, whatever the shapes in it, and the kernels of
small tensors of one shape are one kernel. How much goes together is bounded: by what stays in a
cache on a CPU, where the tensors of one list are passed over some ten times, and elsewhere by what
fills a device. So is the scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue.core import state_dtype
from kexue_adafactor.tensors import is_distributed, joined, moved
from kexue_adafactor.tiny import are_tiny

__all__ = ["Stack", "batches"]


class _Limits(NamedTuple):
    stacked: int  # numbers of a tensor that is stacked at all, at most
    together: int  # numbers in one list


# On a CPU a copy costs more than the calls that it saves, but for small tensors.
_LIMITS = {"cpu": _Limits(2**13, 2**19)}
_MANY = 4  # tensors that a list has room for; larger ones are alone, and stay in the cache
_LIMITS_ELSEWHERE = _Limits(2**24, 2**24)


@dataclass
class Stack:
    """Parameters of one shape: what is computed of them has a first axis if there are several.

    Args:
        parameters: Shapes ``[*any]``, with gradients.
        states: Theirs.
        kind: Which of the functions of :mod:`kexue_adafactor.moments` steps them: ``"whole"``,
            ``"factored"``, ``"tiny"`` or ``"clamped"``.
        dims: The axes of rows and columns, negative; None if it is kept whole.
    """

    parameters: list[Tensor]
    states: list[dict[str, Any]]
    kind: str
    dims: tuple[int, int] | None

    @property
    def lead(self) -> int:
        """Axes before those of the parameter: 1 for several parameters, 0 for one."""
        return int(len(self.parameters) > 1)

    def gradient(self) -> Tensor:
        """Return the gradients in the type of the state, ``[same?, *any, row, column]``."""
        grads = [moved(p.grad, self.dims) for p in self.parameters if p.grad is not None]
        gradient = joined(grads).to(state_dtype(self.parameters[0]))
        return gradient.contiguous() if self.kind == "tiny" else gradient

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return what belongs to each parameter."""
        return tensor.unbind(0) if self.lead else (tensor,)


def batches(
    group: dict[str, Any], parameters: Iterable[Tensor], states: Any
) -> Iterator[list[Stack]]:
    """Count the step, and yield lists of stacks of one device, type, step and kind.

    Args:
        group: One of ``param_groups``.
        parameters: Those of the group that move, shapes ``[*any]``.
        states: The state of each.
    """
    alike: dict[Any, dict[torch.Size, Stack]] = {}
    for p in parameters:
        state = states[p]
        state["step"] = step = int(state.get("step", 0)) + 1
        if group["foreach"] is False or is_distributed(p):
            yield [_stack(group, p, state)]
            continue
        shapes = alike.setdefault((p.device, p.dtype, step), {})
        if p.shape in shapes:
            shapes[p.shape].parameters.append(p)
            shapes[p.shape].states.append(state)
        else:
            shapes[p.shape] = _stack(group, p, state)
    for (device, *_), shapes in alike.items():
        limits = _LIMITS.get(device.type, _LIMITS_ELSEWHERE)
        for kind in {stack.kind: None for stack in shapes.values()}:
            yield from _packed([s for s in shapes.values() if s.kind == kind], limits)


def _packed(stacks: Iterable[Stack], limits: _Limits) -> Iterator[list[Stack]]:
    """Cut stacks that are too large, and put small ones together."""
    batch: list[Stack] = []
    numbers = 0
    for stack in stacks:
        each = stack.parameters[0].numel()
        most = max(1, limits.together // each) if each <= limits.stacked else 1
        for i in range(0, len(stack.parameters), most):
            parameters = stack.parameters[i : i + most]
            if each > limits.together // _MANY:  # its calls cost nothing beside its numbers
                yield [Stack(parameters, stack.states[i : i + most], stack.kind, stack.dims)]
                continue
            if batch and numbers + each * len(parameters) > limits.together:
                yield batch
                batch, numbers = [], 0
            batch.append(Stack(parameters, stack.states[i : i + most], stack.kind, stack.dims))
            numbers += each * len(parameters)
    if batch:
        yield batch


def _stack(group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> Stack:
    dims = _factored(parameter.shape, group["factor_dims"], group["min_dim_to_factor"])
    kind = "whole" if dims is None else "factored"
    if dims is not None and group["eps_mode"] == "clamp":
        kind = "clamped"
    elif dims == (-2, -1) and parameter.grad is not None and are_tiny(parameter.grad):
        kind = "tiny"
    return Stack([parameter], [state], kind, dims)


def _factored(shape: torch.Size, which: str, least: int) -> tuple[int, int] | None:
    """Return the axes of rows and columns, counted from the last; None if V̂ is kept whole."""
    ndim = len(shape)
    if ndim < 2:
        return None
    row, column = ndim - 2, ndim - 1
    if which == "largest":
        row, column = sorted(sorted(range(ndim), key=lambda i: (shape[i], i))[-2:])
    return (row - ndim, column - ndim) if min(shape[row], shape[column]) >= least else None
