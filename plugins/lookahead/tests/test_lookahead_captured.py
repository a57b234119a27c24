"""How updates are had: large models in buckets, small ones and unknown bases at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from kexue_lookahead import Batch, Derivation, derive

Shapes = list[tuple[int, ...]]
LARGE: Shapes = [(1200, 1000), (7,), (1100, 1001), (), (300, 500, 2, 2), (2, 1100, 1000)]
"""More than two buckets of 2²¹ numbers, the last by itself larger than one."""


@dataclass(frozen=True)
class Twice(Derivation):
    """Multiplies updates by 2, whenever they are looked at."""

    name: ClassVar[str] = "twice"
    scales: ClassVar[bool] = True

    def update(self, batch: Batch) -> None:
        batch.scale(torch.full((len(batch.params),), 2.0))


@dataclass(frozen=True)
class Thrice(Derivation):
    """Multiplies updates by 3."""

    name: ClassVar[str] = "thrice"
    scales: ClassVar[bool] = True

    def update(self, batch: Batch) -> None:
        batch.scale(torch.full((len(batch.params),), 3.0, dtype=torch.float64))


@dataclass(frozen=True)
class More(Derivation):
    """Adds 1 to updates."""

    name: ClassVar[str] = "more"

    def update(self, batch: Batch) -> None:
        torch._foreach_add_(batch.updates, 1.0)


class Whole(torch.optim.Adam):
    """Adam, of which nothing is known but that it does not read its parameters."""

    reads_parameters = False


class Told(torch.optim.Adam):
    """Adam that tells what it is asked to step, and fails on its way if it is told to."""

    reads_parameters = staticmethod(lambda group: bool(group["weight_decay"]))
    steps_apart = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        told = vars(self).setdefault("told", [])
        told.append([p.numel() for group in self.param_groups for p in group["params"]])
        super().step(closure)
        if len(told) == vars(self).get("fails_at"):
            raise RuntimeError("on its way")


def make(shapes: Shapes, seed: int = 0) -> list[nn.Parameter]:
    """Return parameters, those of four axes with channels last."""
    generator = torch.Generator().manual_seed(seed)
    own = [nn.Parameter(0.1 * torch.randn(s, generator=generator)) for s in shapes]
    for p in own:
        p.grad = torch.randn(p.shape, generator=generator)
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    return own


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}], ids=str)
def test_buckets_are_the_whole(kind: dict[str, Any]) -> None:
    """To the last bit, state and all, in two groups, one of whose parameters has no gradient."""
    found: list[Any] = []
    bases: Any = (torch.optim.Adam, Whole)
    for base in bases:
        own = make(LARGE)
        own[1].grad = None
        groups = [{"params": own[:3]}, {"params": own[3:], "lr": 0.02, "amsgrad": True}]
        optimizer = derive(base, Twice(), More())(groups, lr=0.1, **kind)
        for _ in range(2):
            optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]
        assert own[4].is_contiguous(memory_format=torch.channels_last)
        states = [optimizer.state[p] for p in own]
        found.append([own, *([s[k] for s in states if s] for k in ("step", "exp_avg_sq"))])
    for walked, whole in zip(*found, strict=True):
        assert len(walked) == len(whole)
        assert all(torch.equal(a, b) for a, b in zip(walked, whole, strict=True))
    assert not torch.equal(found[0][0][0], make(LARGE)[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_parameter_is_stepped_once(decay: float) -> None:
    """In buckets of at most 2²¹ numbers, or one tensor; what no derivation is about, at the end."""
    own, plain = make(LARGE), make(LARGE)
    optimizer: Any = derive(Told, Twice())(own, lr=0.1, weight_decay=decay)
    optimizer.step()
    sizes = [p.numel() for p in own]
    assert [size for bucket in optimizer.told for size in bucket] == sizes
    assert [len(bucket) for bucket in optimizer.told] == [2, 3, 1]
    assert all(len(bucket) == 1 or sum(bucket) <= 2**21 for bucket in optimizer.told)
    torch.optim.Adam(plain, lr=0.2, weight_decay=decay).step()
    for p, q in zip(own, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_base_that_fails_leaves_the_rest() -> None:
    own, before = make(LARGE), make(LARGE)
    optimizer: Any = derive(Told, Twice())(own, lr=0.1)
    optimizer.fails_at = 2
    groups, memory = optimizer.param_groups, [p.data_ptr() for p in own]
    with pytest.raises(RuntimeError, match="on its way"):
        optimizer.step()
    assert optimizer.param_groups is groups
    assert len(groups[0]["params"]) == len(own)
    assert [p.data_ptr() for p in own] == memory
    assert [torch.equal(p, q) for p, q in zip(own, before, strict=True)] == [False] * 2 + [True] * 4


@dataclass(frozen=True)
class Double(Derivation):
    """Multiplies updates by 2, by the numbers of their directions."""

    name: ClassVar[str] = "double"
    scales: ClassVar[bool] = True

    def update(self, batch: Batch) -> None:
        directions, factor = batch.directions
        norms = [float(abs(factor) * d.norm() / d.numel() ** 0.5) for d in directions]
        batch.scale([8 * norm for norm in norms])


@dataclass(frozen=True)
class Careless(Derivation):
    """Says that it only scales, and writes to updates."""

    name: ClassVar[str] = "careless"
    scales: ClassVar[bool] = True

    def update(self, batch: Batch) -> None:
        torch._foreach_add_(batch.updates, 1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("how", [{}, {"foreach": False}], ids=str)
def test_what_the_base_keeps_stays_its_own(momentum: float, how: dict[str, Any]) -> None:
    """Of u = −1/4; Double multiplies by 8 |u|, which is 2 where nothing has been before it."""
    for chain, wanted in (
        ((Double(),), -0.5),
        ((Double(), Thrice()), -1.5),
        ((Thrice(), Double()), -8 * 0.75 * 0.75),
        ((Double(), Careless()), 0.5),
        ((Careless(), Double()), 8 * 0.75 * 0.75),
        ((Careless(),), 0.75),
    ):
        own = [nn.Parameter(torch.ones(n)) for n in (3, 2**14 + 1, 5)]
        for p in own:
            p.grad = torch.ones_like(p)
        optimizer = derive("sgd", *chain)(own, lr=0.25, momentum=momentum, **how)
        optimizer.step()
        for p in own:
            torch.testing.assert_close(p.detach(), torch.full_like(p, 1 + wanted))
            assert p.grad is not None
            assert torch.equal(p.grad, torch.ones_like(p))
            buffer = optimizer.state[p].get("momentum_buffer")
            assert momentum == 0 or torch.equal(buffer, torch.ones_like(p))


class Signs(torch.optim.SGD):
    """Another optimizer, which only has the options of SGD."""

    reads_parameters = False
    steps_apart = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def test_updates_of_other_optimizers_are_not_taken_for_those_of_sgd() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 7.0)
    derive(Signs, Twice())([p], lr=0.25, momentum=0.5).step()
    assert torch.equal(p, torch.full((3,), 0.5))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sparse_gradients_pass_derivations_that_scale(momentum: float) -> None:
    found = []
    for sparse in (False, True):
        table = nn.Parameter(torch.ones(5, 2))
        optimizer = derive("sgd", Twice())([table], lr=0.25, momentum=momentum)
        for row in (1, 3, 1):
            gradient = torch.zeros(5, 2)
            gradient[row] = 0.5
            table.grad = gradient.to_sparse(1) if sparse else gradient
            optimizer.step()
        found.append(table.detach())
    torch.testing.assert_close(*found)


def test_sparse_gradients_with_an_l2_term_are_refused_before_anything_is_kept() -> None:
    table = nn.Parameter(torch.ones(5, 2))
    table.grad = torch.ones(5, 2).to_sparse(1)
    optimizer = derive("sgd", Twice())([table], lr=0.25, momentum=0.5, weight_decay=0.1)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(table, torch.ones(5, 2))
    assert not optimizer.state[table].get("momentum_buffer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_act_in_their_place(dtype: torch.dtype) -> None:
    """2 · 3 u, 2 u + 1, and 2 (u + 1), of u = −1/4."""
    for chain, wanted in (
        ((Twice(), Thrice()), -1.5),
        ((Twice(), More()), 0.5),
        ((More(), Twice()), 1.5),
    ):
        own = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 5)]
        for p in own:
            p.grad = torch.ones_like(p)
        derive("sgd", *chain)(own, lr=0.25).step()
        assert all(torch.equal(p, torch.full_like(p, 1 + wanted)) for p in own)
