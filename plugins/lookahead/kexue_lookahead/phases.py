"""What happens in a step of a derived optimizer; see :mod:`kexue_lookahead.derivation`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kexue_lookahead.bases import reads_parameters
from kexue_lookahead.derivation import Batch, Derivation, batches, distributed, local

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["take_step"]

# Functions, not methods: a base may have methods of any name.

_CACHED = 2**18  # numbers that a CPU works on at once, where it passes over them several times
_Planned = tuple[Batch, list[Derivation]]


def take_step(optimizer: DerivedOptimizer) -> None:
    """Run the phases once, without autograd.

    Args:
        optimizer: The optimizer; its gradients are there.
    """
    derivations = optimizer.derivations
    for derivation in derivations:
        derivation.look(optimizer)
    try:
        ready = [d.accumulate(optimizer) for d in derivations]
        if not all(ready):
            return
        for derivation in derivations:
            derivation.begin(optimizer)
        with _scheduled(optimizer):
            _update(optimizer)
        for derivation in derivations:
            derivation.end(optimizer)
    finally:
        for derivation in derivations:
            derivation.release(optimizer)


@contextmanager
def _scheduled(optimizer: DerivedOptimizer) -> Iterator[None]:
    """Multiply the rates of the groups, and put them back."""
    scheduled = [d for d in optimizer.derivations if type(d).rate is not Derivation.rate]
    if not scheduled:
        yield
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            for derivation in scheduled:
                group["lr"] = group["lr"] * derivation.rate(optimizer, group)
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _update(optimizer: DerivedOptimizer) -> None:
    """Take the base's step, its updates passed through the derivations that change them."""
    if not any(d.changes_updates() for d in optimizer.derivations):
        _base_step(optimizer)
        return
    direct, through = _planned(optimizer)
    for batch, chain in direct:
        for derivation in chain:
            derivation.directly(batch)
    if not through:
        _base_step(optimizer)
        return
    with _captured(optimizer, [batch for batch, _ in through]):
        _base_step(optimizer)
    for batch, chain in through:
        for part in _parts(batch):
            for derivation in chain:
                derivation.update(part)
            torch._foreach_add_(part.params, part.updates)


def _parts(batch: Batch) -> Iterator[Batch]:
    """Split a batch into parts that stay in the cache of a CPU from one pass to the next."""
    if batch.params[0].device.type != "cpu":
        yield batch
        return
    begin, numbers = 0, 0
    for end, p in enumerate(batch.params, 1):
        numbers += p.numel()
        if numbers >= _CACHED or end == len(batch.params):
            yield replace(batch, params=batch.params[begin:end], updates=batch.updates[begin:end])
            begin, numbers = end, 0


def _planned(optimizer: DerivedOptimizer) -> tuple[list[_Planned], list[_Planned]]:
    """Return the batches that are changed before the base's step, and those to be captured."""
    changing = [d for d in optimizer.derivations if d.changes_updates()]
    plans: tuple[list[_Planned], list[_Planned]] = ([], [])
    for group in optimizer.param_groups:
        chosen = [d.selects(optimizer, group) for d in changing]
        chains: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for i, p in enumerate(group["params"]):
            chain = tuple(n for n, selected in enumerate(chosen) if selected[i])
            if chain and p.grad is not None and p.numel():
                chains[chain].append(p)
        reads = reads_parameters(optimizer.derived_from, group)
        for chain, params in chains.items():
            along = [changing[n] for n in chain]
            plan = plans[reads or not all(d.direct for d in along)]
            plan += [(batch, along) for batch in batches(optimizer, group, params)]
    return plans


@contextmanager
def _captured(optimizer: DerivedOptimizer, planned: list[Batch]) -> Iterator[None]:
    """Let the base step, and leave its updates in the batches and the parameters as they were.

    A base that does not read its parameters steps from 0, so that the update is exact; any other
    one from the parameters, and the update is the difference. DTensors are stepped like the latter.
    """
    at_zero: list[tuple[Batch, list[Tensor]]] = []
    apart: list[tuple[Batch, list[Tensor]]] = []
    try:
        for batch in planned:
            params = batch.params
            if reads_parameters(optimizer.derived_from, batch.group) or distributed(params[0]):
                apart.append((batch, [p.clone() for p in params]))
                continue
            at_zero.append((batch, [p.data for p in params]))
            for p, scratch in zip(params, _scratch(optimizer, params), strict=True):
                p.data = scratch
        yield
    finally:
        for batch, kept in at_zero:
            for p, data in zip(batch.params, kept, strict=True):
                batch.updates.append(p.data)
                p.data = data
        for batch, kept in apart:
            batch.updates.extend(torch._foreach_sub(batch.params, kept))  # noqa: SLF001
            # torch has no _foreach_copy_ of DTensors
            torch._foreach_copy_([local(p) for p in batch.params], [local(k) for k in kept])


def _scratch(optimizer: DerivedOptimizer, params: list[Tensor]) -> list[Tensor]:
    """Return zeros like the parameters; on a CPU, where new memory is dear, the same again."""
    kept: dict[Tensor, Tensor] = vars(optimizer).setdefault("_derived_scratch", {})
    found = []
    old = []
    for p in params:
        scratch = kept.get(p)
        if scratch is None or scratch.shape != p.shape or scratch.dtype != p.dtype:
            scratch = torch.zeros_like(p.data)
            if p.device.type == "cpu":
                kept[p] = scratch
        else:
            old.append(scratch)
        found.append(scratch)
    if old:
        torch._foreach_zero_(old)
    return found


def _base_step(optimizer: DerivedOptimizer) -> None:
    """Take the base's own step, without its hooks, which run around ours.

    A base takes an empty state for the sign that it has not seen a parameter yet: until then, what
    derivations keep there is put aside.
    """
    prefixes = tuple(f"{d.name}." for d in optimizer.derivations)
    aside: dict[Tensor, dict[str, Any]] = {}
    for p, state in optimizer.state.items():
        if state and all(isinstance(key, str) and key.startswith(prefixes) for key in state):
            aside[p] = dict(state)
            state.clear()
    try:
        _unhooked(optimizer.derived_from)(optimizer)
    finally:
        for p, mine in aside.items():
            optimizer.state[p].update(mine)


def _unhooked(base: type[torch.optim.Optimizer]) -> Callable[[Any], Any]:
    """Return the base's step without what torch has put around it, if it has."""
    step: Any = base.step
    return cast(
        "Callable[[Any], Any]", step.__wrapped__ if getattr(step, "hooked", False) else step
    )
