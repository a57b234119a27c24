"""Deriving one optimizer from another: classes, instances, phases, options, copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kexue.core import ArgumentError
from kexue_lookahead import Batch, Derivation, DerivedOptimizer, Lookahead, derive, with_lookahead
from kexue_lookahead.bases import resolve_base
from kexue_lookahead.derivation import matching

Group = dict[str, Any]


@dataclass(frozen=True)
class Nothing(Derivation):
    """Looks at updates, and leaves them."""

    looks: int = 1
    name: ClassVar[str] = "nothing"

    def update(self, batch: Batch) -> None:
        assert len(batch.params) == len(batch.updates) == len(batch.grads)


@dataclass(frozen=True)
class Decay(Derivation):
    """Decoupled weight decay."""

    shrink: float = 0.1
    spare: tuple[str, ...] = ()
    name: ClassVar[str] = "decay"
    direct: ClassVar[bool] = True

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> list[bool]:
        del optimizer
        return [not spared for spared in matching(group, group["spare"], option="spare")]

    def directly(self, batch: Batch) -> None:
        torch._foreach_mul_(batch.params, 1 - batch.group["lr"] * batch.group["shrink"])

    def update(self, batch: Batch) -> None:
        alpha = -batch.group["lr"] * batch.group["shrink"]
        torch._foreach_add_(batch.updates, batch.params, alpha=alpha)


@dataclass(frozen=True)
class Scale(Derivation):
    """Multiplies updates."""

    scale: float = 2.0
    name: ClassVar[str] = "scale"

    def update(self, batch: Batch) -> None:
        torch._foreach_mul_(batch.updates, batch.group["scale"])


@dataclass(frozen=True)
class Ramp(Derivation):
    """A rate that grows with the steps."""

    ramp: int = 4
    name: ClassVar[str] = "ramp"
    counters: ClassVar[tuple[str, ...]] = ("ramp_step",)

    def rate(self, optimizer: DerivedOptimizer, group: Group) -> float:
        del optimizer
        return min(1.0, (int(group["ramp_step"]) + 1) / int(group["ramp"]))

    def end(self, optimizer: DerivedOptimizer) -> None:
        for group in optimizer.param_groups:
            group["ramp_step"] += 1


@dataclass(frozen=True)
class Second(Derivation):
    """Waits at every other call."""

    waits: bool = True
    name: ClassVar[str] = "second"

    def accumulate(self, optimizer: DerivedOptimizer) -> bool:
        vars(optimizer)["calls"] = vars(optimizer).get("calls", 0) + 1
        return bool(vars(optimizer)["calls"] % 2 == 0)

    def release(self, optimizer: DerivedOptimizer) -> None:
        vars(optimizer)["released"] = vars(optimizer).get("released", 0) + 1


def make(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3), (5,), (4, 3)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give(own: list[nn.Parameter], t: int) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for p in own:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(build: Callable[[Any], torch.optim.Optimizer], steps: int = 8) -> list[Tensor]:
    own = make()
    optimizer = build(own)
    for t in range(steps):
        give(own, t)
        optimizer.step()
    return [p.detach() for p in own]


def apart(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


# -- classes and instances -------------------------------------------------------------------------


def test_a_class_gives_one_subclass() -> None:
    made = with_lookahead(torch.optim.Adam)
    assert made is with_lookahead("adam") is with_lookahead(torch.optim.Adam, slow_steps=5)
    assert made is not with_lookahead(torch.optim.Adam, slow_steps=6)
    assert issubclass(made, torch.optim.Adam)
    assert issubclass(made, DerivedOptimizer)
    assert made.__name__ == "AdamWithLookahead"
    assert isinstance(made(make()), torch.optim.Adam)
    assert not isinstance(torch.optim.Adam(make()), DerivedOptimizer)


def test_the_signature_has_both() -> None:
    shown = inspect.signature(with_lookahead(torch.optim.SGD, slow_steps=3)).parameters
    assert list(shown)[:3] == ["params", "lr", "momentum"]
    assert shown["slow_steps"].default == 3
    assert shown["slow_steps"].kind is inspect.Parameter.KEYWORD_ONLY


def test_derivations_compose_in_order() -> None:
    made: Any = derive(derive(torch.optim.SGD, Scale()), Decay())
    assert made.derivations == (Scale(), Decay())
    assert made.derived_from is torch.optim.SGD
    assert made is derive(torch.optim.SGD, Scale(), Decay())


def test_an_instance_becomes_derived_with_its_state() -> None:
    def convert(own: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(own, lr=0.1, fused=True)
        for t in range(100, 103):
            give(own, t)
            optimizer.step()
        groups, state = optimizer.param_groups, optimizer.state
        made = derive(optimizer, Scale(scale=1.0), Ramp(ramp=1))
        assert made is optimizer
        assert isinstance(made, DerivedOptimizer)
        assert made.param_groups is groups
        assert made.state is state
        assert groups[0]["ramp_step"] == 0
        return derive(made, Nothing())

    def plain(own: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(own, lr=0.1, fused=True)
        for t in range(100, 103):
            give(own, t)
            optimizer.step()
        return optimizer

    assert apart(run(convert), run(plain)) < 1e-14


def test_refuses_an_instance_under_a_scheduler() -> None:
    optimizer = torch.optim.Adam(make())
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(ArgumentError, match=r"scheduler.*Derive first"):
        with_lookahead(optimizer)
    assert type(optimizer) is torch.optim.Adam


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_classes_and_optimizers_are_copied(how: Callable[[Any], Any]) -> None:
    made = derive(torch.optim.Adam, Ramp(), Decay(), Nothing())
    assert how(made) is made
    own = make()
    optimizer = with_lookahead(made, slow_steps=3)(own, lr=0.1)
    for t in range(4):
        give(own, t)
        optimizer.step()
    twins, twin = how((own, optimizer))
    assert type(twin) is type(optimizer)
    for t in range(4, 9):
        for params, stepped in ((own, optimizer), (twins, twin)):
            give(params, t)
            stepped.step()
    assert apart(own, twins) == 0
    twin.add_param_group({"params": make()})
    assert twin.param_groups[1]["slow_steps"] == 3


class OfMine(with_lookahead(torch.optim.SGD, slow_steps=2)):  # type: ignore[misc]
    """A subclass with an address."""


def test_subclasses_are_their_own() -> None:
    if OfMine.__module__ in __import__("sys").modules:  # pickle finds it there
        assert pickle.loads(pickle.dumps(OfMine)) is OfMine  # noqa: S301
    optimizer = OfMine(make(), lr=0.1)
    twin = copy.deepcopy(optimizer)
    assert type(twin) is OfMine
    assert twin.param_groups[0]["slow_steps"] == 2


# -- the step --------------------------------------------------------------------------------------

BASES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.1}),
    ("adam", {"lr": 0.1, "foreach": True}),
    ("adam", {"lr": 0.1, "fused": True, "amsgrad": True}),
    ("adamw", {"lr": 0.1}),
    ("rmsprop", {}),
    ("adagrad", {}),
    ("adadelta", {}),
    ("adamax", {}),
    ("nadam", {}),
    ("radam", {}),
    ("rprop", {}),
    ("asgd", {}),
    ("torch.optim.Adafactor", {}),
]


@pytest.mark.parametrize(("base", "settings"), BASES, ids=str)
def test_updates_are_those_of_the_base(base: str, settings: dict[str, Any]) -> None:
    """Also of bases that read their parameters."""
    plain = run(lambda own: resolve_base(base)(own, **settings))
    derived = run(lambda own: derive(base, Nothing())(own, **settings))
    assert apart(plain, derived) < 1e-14
    assert apart(plain, make()) > 1e-3


class Sloppy(torch.optim.Optimizer):
    """A base that reads its parameters, and says nothing of it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["first"] = p.clone()
                p.sub_(group["lr"] * (p - 0.5 * state["first"]) + 0 * p.grad)


class Honest(Sloppy):
    """One that says, wrongly, that it does not."""

    reads_parameters = False


def test_unknown_bases_are_taken_to_read_their_parameters() -> None:
    assert apart(run(Sloppy), run(derive(Sloppy, Nothing()))) < 1e-15
    assert apart(run(Honest), run(derive(Honest, Nothing()))) > 0.1


def test_bases_find_an_empty_state_at_first() -> None:
    """Lookahead keeps something before the base has begun."""
    own = make()
    optimizer = with_lookahead(Sloppy)(own)
    before = [p.detach().clone() for p in own]
    give(own, 0)
    optimizer.step()
    for p, old in zip(own, before, strict=True):
        assert torch.equal(optimizer.state[p]["first"], old)
        assert torch.equal(optimizer.state[p]["lookahead.slow"], old)


@pytest.mark.parametrize("kind", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}])
def test_direct_derivations_cost_no_precision(kind: dict[str, Any]) -> None:
    """Decay before Adam's step is AdamW to the last bit; through the updates, to rounding."""
    wanted = run(lambda own: torch.optim.AdamW(own, lr=0.1, weight_decay=0.1, **kind))
    direct = run(lambda own: derive(torch.optim.Adam, Decay())(own, lr=0.1, **kind))
    through = run(lambda own: derive(torch.optim.Adam, Nothing(), Decay())(own, lr=0.1, **kind))
    assert apart(direct, wanted) == 0 or kind == {"fused": True}
    assert apart(direct, wanted) < 1e-14
    assert apart(through, wanted) < 1e-14


def test_the_first_applied_acts_first() -> None:
    """Twice the update and then decay, or both twice."""
    own = make()
    before = [p.detach().clone() for p in own]
    give(own, 0)
    grads = [p.grad for p in own if p.grad is not None]
    orders: list[tuple[tuple[Derivation, ...], float]] = [
        ((Scale(), Decay()), 0.1),
        ((Decay(), Scale()), 0.2),
    ]
    for order, shrink in orders:
        moved = run(lambda own, order=order: derive("sgd", *order)(own, lr=0.1), steps=1)  # type: ignore[misc]
        wanted = [b - 0.2 * g - 0.1 * shrink * b for b, g in zip(before, grads, strict=True)]
        assert apart(moved, wanted) < 1e-15


def test_names_choose_parameters() -> None:
    own = make()
    names = ["first.weight", "first.BIAS", "second.weight"]
    made = derive(torch.optim.SGD, Decay(spare=("bias",)), Nothing())
    optimizer = made(list(zip(names, own, strict=True)), lr=0.1)
    for p in own:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in own]
    optimizer.step()
    factors = [0.99, 1.0, 0.99]
    assert apart(own, [f * b for f, b in zip(factors, before, strict=True)]) < 1e-15
    with pytest.raises(ArgumentError, match=r"named_parameters\(\)") as caught:
        made(make(), lr=0.1).step()
    assert caught.value.argument == "spare"


def test_rates_are_multiplied_for_the_step_only() -> None:
    rates: list[float] = []

    def build(own: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = derive("sgd", Ramp(), Decay())(own, lr=0.4)
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    wanted = make()
    for t in range(8):
        give(wanted, t)
        rate = 0.4 * min(1, (t + 1) / 4)
        with torch.no_grad():
            for p in wanted:
                assert p.grad is not None
                p.mul_(1 - rate * 0.1).sub_(p.grad, alpha=rate)
    assert apart(run(build), [p.detach() for p in wanted]) < 1e-15
    assert rates == [0.4] * 8


def test_rates_may_be_tensors() -> None:
    number = run(lambda own: derive("adam", Ramp(), Nothing())(own, lr=0.25))
    tensor = run(lambda own: derive("adam", Ramp(), Nothing())(own, lr=torch.tensor(0.25)))
    assert apart(number, tensor) < 1e-6  # torch's own arithmetic is then in float32


def test_nothing_advances_while_a_step_waits() -> None:
    own = make()
    optimizer: Any = derive("adam", Second(), Ramp(), Nothing())(own, lr=0.1)
    before = [p.detach().clone() for p in own]
    give(own, 0)
    optimizer.step()
    assert apart(own, before) == 0
    assert (optimizer.param_groups[0]["ramp_step"], optimizer.released) == (0, 1)
    assert not optimizer.state
    optimizer.step()
    assert apart(own, before) > 0.01
    assert (optimizer.param_groups[0]["ramp_step"], optimizer.released) == (1, 2)


class Failing(torch.optim.Adam):
    """Fails in the second step, after it has moved something."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        super().step(closure)
        vars(self)["count"] = vars(self).get("count", 0) + 1
        if vars(self)["count"] == 2:
            raise RuntimeError("on its way")


def test_a_failing_base_leaves_the_parameters() -> None:
    own = make()
    optimizer = derive(Failing, Nothing(), Ramp())(own, lr=0.1)
    give(own, 0)
    optimizer.step()
    before = [p.detach().clone() for p in own]
    with pytest.raises(RuntimeError, match="on its way"):
        optimizer.step()
    assert apart(own, before) == 0
    group = optimizer.param_groups[0]
    assert (group["lr"], group["ramp_step"]) == (0.1, 1)


@pytest.mark.parametrize("earlier", [False, True])
def test_hooks_run_once_a_call(earlier: bool) -> None:
    """Also where an instance of the base has been there before, which torch hooks its step on."""
    base: Any = type("Fresh", (torch.optim.SGD,), {})
    if earlier:
        base(make(), lr=0.1)
    own = make()
    optimizer = with_lookahead(base)(own, lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    every = register_optimizer_step_pre_hook(lambda *_: calls.append("any"))
    try:
        give(own, 0)
        optimizer.step()
    finally:
        every.remove()
    assert calls == ["any", "before", "after"]


def test_closures_are_called_once_with_gradients() -> None:
    own = make()
    optimizer = derive("adam", Nothing())(own, lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in own]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        calls.append(float(loss.detach()))
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses == calls
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused", [False, True])
def test_scalers_leave_steps_out(fused: bool) -> None:
    """Nothing advances where a gradient is not finite, in fused bases neither."""
    own = make(torch.float32)
    optimizer = with_lookahead("adam")(own, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in own]
    for t, size in enumerate((1.0, torch.inf, 1.0)):
        give(own, t)
        assert own[0].grad is not None
        own[0].grad[0, 0] = size
        for p in own:
            assert p.grad is not None
            p.grad *= scaler.get_scale()
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.param_groups[0]["lookahead_position"] == 2
    assert all(int(optimizer.state[p]["step"]) == 2 for p in own)
    assert 0.05 < apart(own, before) < 0.3


def test_schedulers_set_the_rate() -> None:
    own, fixed = make(), make()
    optimizer, peer = (with_lookahead("sgd", slow_steps=3)(x, lr=0.4) for x in (own, fixed))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    for t in range(8):
        peer.param_groups[0]["lr"] = 0.4 * 0.5**t
        for params, stepped in ((own, optimizer), (fixed, peer)):
            give(params, t)
            stepped.step()
        scheduler.step()
    assert apart(own, fixed) == 0


# -- states ----------------------------------------------------------------------------------------


def test_goes_on_from_a_checkpoint_of_the_base() -> None:
    own, twins = make(), make()
    plain = torch.optim.Adam(own, lr=0.1)
    for t in range(3):
        give(own, t)
        plain.step()
    for p, twin in zip(own, twins, strict=True):
        twin.data.copy_(p.data)
    derived = derive("adam", Ramp(ramp=1), Nothing())(twins, lr=0.7)
    derived.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert (derived.param_groups[0]["lr"], derived.param_groups[0]["ramp_step"]) == (0.1, 0)
    for t in range(3, 6):
        for params, optimizer in ((own, plain), (twins, derived)):
            give(params, t)
            optimizer.step()
    assert apart(own, twins) < 1e-14


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("adan", "`base` must be one of adadelta.*or a registered optimizer"),
        (torch.optim.LBFGS, "closure.*Found LBFGS"),
        (nn.Linear, "`base` must be a torch.optim.Optimizer"),
        (3, "`base` must be a class"),
        (with_lookahead(torch.optim.SGD), "Apply each derivation once"),
    ],
    ids=str,
)
def test_rejects_bases(base: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        with_lookahead(base)
    assert caught.value.argument == "base"


def test_rejects_options_with_the_name_of_an_argument() -> None:
    @dataclass(frozen=True)
    class Momentum(Derivation):
        momentum: float = 0.9
        name: ClassVar[str] = "momentum"

    with pytest.raises(ArgumentError, match="`momentum` must not be an option of the base"):
        derive(torch.optim.SGD, Momentum())
    with pytest.raises(ArgumentError, match="`momentum` must not be an option of the base"):
        derive(torch.optim.SGD(make(), lr=0.1), Momentum())


def test_rejects_differentiable_steps() -> None:
    with pytest.raises(ArgumentError, match="`differentiable`"):
        with_lookahead("sgd")(make(), lr=0.1, differentiable=True)
    with pytest.raises(ArgumentError, match="`differentiable`"):
        with_lookahead(torch.optim.SGD(make(), lr=0.1, differentiable=True))


def test_rejects_options_before_it_takes_a_group() -> None:
    optimizer = with_lookahead("sgd")(make(), lr=0.1)
    with pytest.raises(ArgumentError, match="`slow_steps`"):
        optimizer.add_param_group({"params": make(), "slow_steps": 0})
    assert len(optimizer.param_groups) == 1


# -- components ------------------------------------------------------------------------------------


def test_components_take_a_base_by_name() -> None:
    optimizer = Lookahead(
        make(), 0.1, base="sgd", base_options={"momentum": 0.9}, slow_step_size=0.25
    )
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    wanted = (0.1, 0.9, 0.25)
    assert (group["lr"], group["momentum"], group["slow_step_size"]) == wanted
    assert isinstance(with_lookahead("adam")(make()), Lookahead)
    assert not isinstance(torch.optim.Adam(make()), Lookahead)
    assert not issubclass(derive("adam", Nothing()), Lookahead)
    assert Lookahead(make()).param_groups[0]["lr"] == 1e-3


def test_components_of_other_plugins_are_bases() -> None:
    adafactor = pytest.importorskip("kexue_adafactor").Adafactor
    assert resolve_base("adafactor") is resolve_base("optimizer/adafactor") is adafactor
    assert resolve_base("torch.optim.Adafactor") is torch.optim.Adafactor
    for settings in ({}, {"scale_parameter": False}):
        plain = run(lambda own, s=settings: adafactor(own, lr=0.1, **s))  # type: ignore[misc]
        derived = run(lambda own, s=settings: derive(adafactor, Nothing())(own, lr=0.1, **s))  # type: ignore[misc]
        assert apart(plain, derived) < 1e-14


@pytest.mark.parametrize("options", [{"momemtum": 0.9}, {"lr": 0.1}, {"params": []}])
def test_rejects_what_the_base_does_not_take(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="`base_options`") as caught:
        Lookahead(make(), 0.1, base="sgd", base_options=options)
    assert caught.value.argument == "base_options"
