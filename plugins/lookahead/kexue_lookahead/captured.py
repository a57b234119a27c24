"""How the updates of a base are had: it steps stand-ins; see :mod:`kexue_lookahead.phases`.

A base that does not read its parameters steps from 0, so that what is there afterwards is the
update u, exactly; any other one from θ, and u is the difference. SGD keeps u itself, see
:mod:`kexue_lookahead.kept`.

On a CPU, a base that can step some of its parameters alone walks them in buckets. The stand-ins of
a bucket are in the memory of those before, so that it is a bucket that it takes, not a model, and
most of u is still in the cache when it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kexue_lookahead.bases import reads_parameters, steps_apart
from kexue_lookahead.derivation import Batch, Derivation, Group, distributed, local, prefixes
from kexue_lookahead.fusing import fused_step
from kexue_lookahead.kept import keeps_updates, lend_updates

if TYPE_CHECKING:
    from kexue_lookahead.derived import DerivedOptimizer

__all__ = ["Planned", "base_step", "step_through"]

Planned = tuple[Batch, list[Derivation]]
"""Parameters, and the derivations that change their updates."""

_CACHED = 2**21  # numbers that a CPU works on at once, where it passes over them several times
_ALIGNED = 64  # bytes
_TYPES = {Tensor, torch.nn.Parameter}


def step_through(
    optimizer: DerivedOptimizer, direct: list[Planned], through: list[Planned]
) -> None:
    """Let the base step, and pass its updates through derivations.

    Args:
        optimizer: The optimizer.
        direct: What derivations change before the base's step.
        through: What is to pass; all other parameters take the step of the base.
    """
    apart = steps_apart(optimizer.derived_from)
    together: list[Planned] = []
    walked: list[Planned] = []
    kept: list[Planned] = []
    for batch, chain in direct:
        if _plain(batch.params) and keeps_updates(optimizer, batch):
            kept.append((batch, chain))
            for part in lend_updates(batch):
                _change(part, chain)
                part.move()
        else:
            _change(batch, chain)
    for batch, chain in through:
        if not (apart and _plain(batch.params)):
            together += [(part, chain) for part in _parts(batch)]
        elif all(d.scales for d in chain) and keeps_updates(optimizer, batch):
            kept.append((batch, chain))
            for part in lend_updates(batch):
                _finish(part, chain)
        else:
            walked += [(part, chain) for part in _parts(batch)]
    groups = optimizer.param_groups
    try:
        for bucket in _buckets(walked):
            params = [p for batch, _ in bucket for p in batch.params]
            optimizer.param_groups = [{**bucket[0][0].group, "params": params}]
            _pass(optimizer, bucket)
        optimizer.param_groups = _without(groups, kept + walked)
        if optimizer.param_groups:
            _pass(optimizer, together)
    finally:
        optimizer.param_groups = groups


def _pass(optimizer: DerivedOptimizer, planned: list[Planned]) -> None:
    """Let the base step the groups that there are, and pass its updates."""
    with _captured(optimizer, [batch for batch, _ in planned]):
        base_step(optimizer)
    for batch, chain in planned:
        _finish(batch, chain)


def _change(batch: Batch, chain: list[Derivation]) -> None:
    """Change the parameters of a batch directly."""
    for derivation in chain:
        derivation.directly(batch)


def _finish(batch: Batch, chain: list[Derivation]) -> None:
    """Pass the updates of a batch, and move its parameters."""
    for derivation in chain:
        derivation.update(batch)
    batch.move()


def _without(groups: list[Group], stepped: list[Planned]) -> list[Group]:
    """Return what is left of the groups."""
    if not stepped:
        return groups
    gone = {id(p) for batch, _ in stepped for p in batch.params}  # a Tensor's hash takes longer
    left = [{**g, "params": [p for p in g["params"] if id(p) not in gone]} for g in groups]
    return [group for group in left if group["params"]]


def _plain(params: list[Tensor]) -> bool:
    """Whether tensors are on a CPU, and of no class of their own, so that memory can be theirs."""
    return all(p.is_cpu and (type(p) in _TYPES or type(p.data) is Tensor) for p in params)


def _parts(batch: Batch) -> Iterator[Batch]:
    """Split a batch into parts that stay in the cache of a CPU from one pass to the next."""
    if batch.params[0].device.type != "cpu":
        yield batch
        return
    begin, numbers = 0, 0
    for end, p in enumerate(batch.params):
        if begin < end and numbers + p.numel() > _CACHED:
            yield Batch(batch.optimizer, batch.group, batch.params[begin:end])
            begin, numbers = end, 0
        numbers += p.numel()
    yield Batch(batch.optimizer, batch.group, batch.params[begin:])


def _buckets(parts: list[Planned]) -> Iterator[list[Planned]]:
    """Join parts of one group that follow each other, as many as stay in the cache together."""
    bucket: list[Planned] = []
    numbers = 0
    for part in parts:
        more = sum(p.numel() for p in part[0].params)
        if bucket and (numbers + more > _CACHED or part[0].group is not bucket[0][0].group):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(part)
        numbers += more
    if bucket:
        yield bucket


@contextmanager
def _captured(optimizer: DerivedOptimizer, planned: list[Batch]) -> Iterator[None]:
    """Leave the updates of the base's step in the batches, and the parameters as they were.

    DTensors, and parameters that an unknown base reads and may know by another way, are stepped
    themselves and put back.
    """
    stood_for: list[Batch] = []
    themselves: list[tuple[Batch, list[Tensor]]] = []
    reading = False  # of the stand-ins, either none is read or all, which are of one group
    apart = steps_apart(optimizer.derived_from)
    for batch in planned:
        reads = reads_parameters(optimizer.derived_from, batch.group)
        if distributed(batch.params[0]) or (reads and not (apart and _plain(batch.params))):
            themselves.append((batch, [p.clone() for p in batch.params]))
        else:
            stood_for.append(batch)
            reading = reads
    params = [p for batch in stood_for for p in batch.params]
    data = [p.data for p in params]
    stand_ins = _stand_ins(optimizer, data)
    if reading:
        torch._foreach_copy_(stand_ins, data)
    try:
        for p, stand_in in zip(params, stand_ins, strict=True):
            p.data = stand_in
        yield
    finally:
        for p, own in zip(params, data, strict=True):
            p.data = own
        if reading:
            torch._foreach_sub_(stand_ins, data)
        found = iter(stand_ins)
        for batch in stood_for:
            batch.receive(itertools.islice(found, len(batch.params)))
        for batch, old in themselves:
            batch.receive(torch._foreach_sub(batch.params, old))  # noqa: SLF001
            # torch has no _foreach_copy_ of DTensors
            torch._foreach_copy_([local(p) for p in batch.params], [local(k) for k in old])


def _stand_ins(optimizer: DerivedOptimizer, params: list[Tensor]) -> list[Tensor]:
    """Return zeros like the parameters; on a CPU, where new memory is dear, the same again."""
    if not params or not _plain(params):
        return [torch.zeros_like(p) for p in params]
    scratch: _Scratch = vars(optimizer).setdefault("_derived_scratch", _Scratch())
    return scratch.zeros(params)


class _Scratch:
    """Memory of a CPU, and views of it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.views: dict[Any, Tensor] = {}

    def zeros(self, params: list[Tensor]) -> list[Tensor]:
        """Return zeros like the parameters, side by side, until the next call."""
        starts = [0]
        for p in params:
            starts.append(starts[-1] + -(-p.nbytes // _ALIGNED) * _ALIGNED)
        if starts[-1] > len(self.bytes):
            self.bytes = torch.empty(starts[-1], dtype=torch.uint8)
            self.views.clear()
        self.bytes[: starts[-1]].zero_()
        return [self._view(p, start) for p, start in zip(params, starts, strict=False)]

    def _view(self, p: Tensor, start: int) -> Tensor:
        key = start, p.dtype, p.shape, p.stride()
        view = self.views.get(key)
        if view is None:
            view = self.bytes[start : start + p.nbytes].view(p.dtype)
            view = view.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
            self.views[key] = view
        return view


def base_step(optimizer: DerivedOptimizer) -> None:
    """Take the base's own step, without its hooks, which run around ours.

    A base takes an empty state for the sign that it has not seen a parameter yet: until then, what
    derivations keep there is put aside.

    Args:
        optimizer: The optimizer; its groups are stepped.
    """
    theirs = prefixes(optimizer)
    aside: dict[Tensor, dict[str, Any]] = {}
    for p in (p for group in optimizer.param_groups for p in group["params"] if theirs):
        state = optimizer.state.get(p)
        if state and all(str(key).startswith(theirs) for key in reversed(state)):
            aside[p] = dict(state)
            state.clear()
    try:
        with fused_step(optimizer):
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
