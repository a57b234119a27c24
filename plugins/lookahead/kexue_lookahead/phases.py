"""What happens in a step of a derived optimizer; see :mod:`kexue_lookahead.derivation`."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from kexue_lookahead.bases import reads_parameters
from kexue_lookahead.captured import Planned, base_step, step_through
from kexue_lookahead.derivation import Derivation, batches

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["take_step"]

# Functions, not methods: a base may have methods of any name.


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
        base_step(optimizer)
        return
    step_through(optimizer, *_planned(optimizer))


def _planned(optimizer: DerivedOptimizer) -> tuple[list[Planned], list[Planned]]:
    """Return the batches that are changed before the base's step, and those to be captured."""
    changing = [d for d in optimizer.derivations if d.changes_updates()]
    plans: tuple[list[Planned], list[Planned]] = ([], [])
    for group in optimizer.param_groups:
        chosen = [d.selects(optimizer, group) for d in changing]
        chains: dict[tuple[bool, ...], list[Tensor]] = defaultdict(list)
        for p, chain in zip(group["params"], zip(*chosen, strict=True), strict=True):
            if p.grad is not None and any(chain) and p.numel():
                chains[chain].append(p)
        reads = reads_parameters(optimizer.derived_from, group)
        for selected, params in chains.items():
            along = list(itertools.compress(changing, selected))
            plan = plans[reads or not all(d.direct for d in along)]
            plan += [(batch, along) for batch in batches(optimizer, group, params)]
    return plans
