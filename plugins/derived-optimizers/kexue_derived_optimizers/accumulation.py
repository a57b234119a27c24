"""Gradient accumulation around any optimizer: k calls of ``step`` with small batches are one step.

Choose it where the batch that you want does not fit into memory. The gradients of k calls are
averaged and the last call takes the step, so that whatever counts steps counts those of the large
batch: moments, bias corrections, schedules, Lookahead. With small batches of equal size, and losses
that are means, the trajectory is that of the large batch.

Symbols: k calls in a window, g_1 … g_k gradients of a parameter, ḡ = Σ g_i / k what its base sees.

Call ``zero_grad`` before every ``backward``, as without it. A parameter without a gradient in a
call counts as zero there, and is not moved if it has none in the whole window. Memory: one number
per parameter, in float32 for float16 and bfloat16. An unfinished window goes with the
``state_dict``; at the end of an epoch, ``flush()`` takes the step with the mean of what there is. A
call that GradScaler leaves out is none, and its small batch is lost. Nor is the very first call one
where rates and gradients are 0: by it torch's checkpoints have an optimizer make its state.

Deviations: bert4keras takes the step in the first call of the next window, an empty one in the very
first call, and lets bias corrections and schedules count calls; that is another trajectory.

Su 2019, section “梯度累积”, https://kexue.fm/archives/7094; Su,
用时间换取效果：Keras梯度累积优化器, 2019, https://kexue.fm/archives/6794.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError, state_dtype
from kexue_derived_optimizers.options import is_count, require
from kexue_derived_optimizers.recipe import Recipe
from kexue_lookahead.derivation import Derivation, Group, batches, distributed, local
from kexue_lookahead.derived import DerivedOptimizer, become, derive
from kexue_lookahead.phases import take_step

__all__ = ["GradAccumulation", "GradAccumulationDerivation", "Window", "with_grad_accumulation"]

T = TypeVar("T", bound=torch.optim.Optimizer)

_SUM = "grad-accumulation.sum"
_ADDED = "grad-accumulation.added"
"""How many gradients of a parameter are in its sum; with 0, what is there is old."""

_COUNT = "grad_accum_count"
_LENT = "_grad_accum_lent"
_FLUSHING = "_grad_accum_flushing"


class Window:
    """What accumulation adds to an optimizer: its window can be closed before it is full."""

    def flush(self: Any) -> bool:
        """Take the step of an unfinished window, with the mean of the gradients that it has.

        The parameters' ``grad`` is not looked at. Hooks of ``step`` do not run.

        Returns:
            Whether there was anything to do.

        Example:
            >>> import torch
            >>> from kexue_derived_optimizers import with_grad_accumulation
            >>> weight = torch.nn.Parameter(torch.ones(()))
            >>> optimizer = with_grad_accumulation(torch.optim.SGD)([weight], lr=0.5)
            >>> weight.backward()
            >>> optimizer.step()
            >>> optimizer.flush(), weight.item(), optimizer.flush()
            (True, 0.5, False)
        """
        if not self.param_groups[0][_COUNT]:
            return False
        vars(self)[_FLUSHING] = True
        try:
            with torch.no_grad():
                take_step(self)
        finally:
            del vars(self)[_FLUSHING]
        return True


@dataclass(frozen=True)
class GradAccumulationDerivation(Derivation):
    """The derivation; see :func:`with_grad_accumulation` for its options."""

    grad_accum_steps: int = 2

    name: ClassVar[str] = "grad-accumulation"
    counters: ClassVar[tuple[str, ...]] = (_COUNT,)
    mixin: ClassVar[type | None] = Window

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse k < 1.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: If it is.
        """
        steps = options["grad_accum_steps"]
        require(is_count(steps, 1), "grad_accum_steps", steps, "an int of at least 1")

    def check_group(self, optimizer: DerivedOptimizer, group: Group) -> None:
        """Refuse a k of its own, and let the group join the window where it is.

        Args:
            optimizer: The optimizer.
            group: The group.

        Raises:
            ArgumentError: If k is another one.
        """
        first = optimizer.param_groups[0]
        common = first.get("grad_accum_steps", group["grad_accum_steps"])
        if group["grad_accum_steps"] != common:
            raise ArgumentError(
                "`grad_accum_steps` must be the same for all groups, which step together. Found "
                f"{group['grad_accum_steps']} after {common}.",
                argument="grad_accum_steps",
            )
        group[_COUNT] = first.get(_COUNT, 0)

    def look(self, optimizer: DerivedOptimizer) -> None:
        """Refuse sparse gradients.

        Args:
            optimizer: The optimizer.

        Raises:
            ArgumentError: If there are any.
        """
        for group in optimizer.param_groups:
            for p in group["params"]:
                sparse = p.grad is not None and p.grad.layout is not torch.strided
                if sparse and group["grad_accum_steps"] > 1:
                    raise ArgumentError(
                        "The gradients of `params` must be dense for accumulation. Found layout "
                        f"{p.grad.layout} for a parameter of shape {list(p.shape)}. Build its "
                        "module with sparse=False, or give its parameters an optimizer without "
                        "accumulation.",
                        argument="params",
                    )

    def accumulate(self, optimizer: DerivedOptimizer) -> bool:
        """Add the gradients to the window; if it is full, put their means in their place.

        Args:
            optimizer: The optimizer.
        """
        groups = optimizer.param_groups
        steps, count = groups[0]["grad_accum_steps"], groups[0][_COUNT]
        if steps == 1 and count == 0:
            return True  # there is nothing to wait for
        if not vars(optimizer).get(_FLUSHING):
            if _is_asked_for_state(optimizer):
                _begin(optimizer)
                return True
            count += 1
            for group in groups:
                _add(optimizer, group)
                group[_COUNT] = count
            if count < steps:
                return False
        _lend(optimizer, count)
        return True

    def release(self, optimizer: DerivedOptimizer) -> None:
        """Give the parameters the gradients of the last call back.

        Args:
            optimizer: The optimizer.
        """
        lent: dict[Tensor, Tensor | None] = vars(optimizer).pop(_LENT, {})
        for p, gradient in lent.items():
            p.grad = gradient


def _is_asked_for_state(optimizer: DerivedOptimizer) -> bool:
    """Whether this call of ``step`` is one that torch's checkpoints make of their own.

    They have an optimizer without a state make one, into which they load, by a step with rates and
    gradients of 0.
    """
    if any(optimizer.state.values()) or any(g.get("lr", 0) != 0 for g in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and not any(_whole(g.any()) for g in grads)


def _whole(found: Any) -> bool:
    """Return what is found in all shards, the same in each process."""
    return bool(found.full_tensor() if distributed(found) else found)


def _begin(optimizer: DerivedOptimizer) -> None:
    """Make the sums, empty."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                optimizer.state[p].update(_empty(p))


def _add(optimizer: DerivedOptimizer, group: Group) -> None:
    """Add the gradients of a group to their sums; the first of a window is copied."""
    new: list[Tensor] = []
    old: list[Tensor] = []
    for p in group["params"]:
        if p.grad is None:
            continue
        state = optimizer.state[p]
        if _SUM not in state:
            state.update(_empty(p))
        (old if state[_ADDED] else new).append(p)
        state[_ADDED] += 1
    for params, apply in ((new, torch._foreach_copy_), (old, torch._foreach_add_)):
        for batch in batches(optimizer, group, params):
            sums = [local(optimizer.state[p][_SUM]) for p in batch.params]
            apply(sums, [local(g) for g in batch.grads])


def _empty(p: Tensor) -> dict[str, Any]:
    """Return the state of a parameter before its first gradient."""
    return {_SUM: torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False), _ADDED: 0}


def _lend(optimizer: DerivedOptimizer, count: int) -> None:
    """Close the window: for the length of the step, the gradients are the means.

    The sums stay in the state, so that a checkpoint of it always has the same entries, which those
    of shards are read by.
    """
    lent: dict[Tensor, Tensor | None] = {}
    vars(optimizer)[_LENT] = lent
    for group in optimizer.param_groups:
        group[_COUNT] = 0
        lent.update((p, p.grad) for p in group["params"])
        summed = [p for p in group["params"] if optimizer.state.get(p, {}).get(_ADDED)]
        for p in group["params"]:
            p.grad = None
        for batch in batches(optimizer, group, summed):
            means = [optimizer.state[p][_SUM] for p in batch.params]
            torch._foreach_div_([local(mean) for mean in means], count)
            for p, mean in zip(batch.params, means, strict=True):
                optimizer.state[p][_ADDED] = 0
                p.grad = mean.to(p.dtype)


@overload
def with_grad_accumulation(base: type[T], *, grad_accum_steps: int = 2) -> type[T]: ...
@overload
def with_grad_accumulation(base: T, *, grad_accum_steps: int = 2) -> T: ...
@overload
def with_grad_accumulation(
    base: str, *, grad_accum_steps: int = 2
) -> type[torch.optim.Optimizer]: ...


def with_grad_accumulation(base: Any, *, grad_accum_steps: int = 2) -> Any:
    """Let an optimizer step once in k calls of ``step``, with the mean of their gradients.

    The option is an entry of the parameter groups, too, the same in all; a change counts from the
    next call on. In ``optimizer.state[p]``, ``"grad-accumulation.sum"`` is the sum of as many
    gradients as ``"grad-accumulation.added"`` says, and old where that is 0. The optimizer has a
    method :meth:`~Window.flush`, which closes the window. Gradients must be dense. Under DDP, every
    call is to see reduced gradients: leave ``no_sync`` out.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        grad_accum_steps: k, the calls of ``step`` in a window; at least 1, which is the base.

    Returns:
        A class that takes the base's arguments and this option, or the optimizer.

    Raises:
        ArgumentError: If the option is out of range or differs between groups, or as
            :func:`~kexue_lookahead.derived.derive`; in ``step``, if a gradient is sparse.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import with_grad_accumulation
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> SGD = with_grad_accumulation(torch.optim.SGD)
        >>> optimizer = SGD([weight], lr=1.0, grad_accum_steps=3)
        >>> for gradient in (1.0, 2.0, 6.0):
        ...     weight.grad = torch.tensor(gradient)
        ...     optimizer.step()
        ...     weight.item()
        0.0
        0.0
        -3.0
    """
    return derive(base, GradAccumulationDerivation(grad_accum_steps))


class GradAccumulation(Window, Recipe):
    r"""Gradient accumulation around any optimizer: k calls of ``step`` are one, on their mean.

    The object is an instance of the base as well: its state, its options in the groups, and what it
    takes of gradients are the base's. See :func:`with_grad_accumulation` for the rest.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate of the base; None for its default.
        base: The optimizer: a class; a name of ``torch.optim``, such as ``"adam"`` or ``"sgd"``; or
            a registered component, such as ``"adafactor"``.
        base_options: Its further arguments by name, for example ``{"momentum": 0.9}``.
        grad_accum_steps: k, the calls of ``step`` in a window; at least 1.

    Raises:
        ArgumentError: If the option is out of range, or ``base`` is no optimizer, or one that needs
            closures; in ``step``, if a gradient is sparse.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import GradAccumulation
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = GradAccumulation([weight], lr=1.0, base="sgd", grad_accum_steps=2)
        >>> weight.backward()
        >>> optimizer.step()
        >>> optimizer.flush(), weight.item()
        (True, -1.0)
    """

    made_of = (GradAccumulationDerivation,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        base: str | type[torch.optim.Optimizer] = "adam",
        base_options: Mapping[str, Any] | None = None,
        grad_accum_steps: int = 2,
    ) -> None:
        derivation = GradAccumulationDerivation(grad_accum_steps)
        become(self, base, [derivation], params, lr=lr, base_options=base_options)
