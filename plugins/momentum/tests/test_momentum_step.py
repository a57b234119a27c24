"""The steps: beside the post's formulas and torch's SGD, at the edges, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.core import ArgumentError
from kexue_momentum import HalfNesterov, Langevin, Momentum, Nesterov, beta_for_lr, to_dynamics
from kexue_momentum import motion as module

SHAPES: list[tuple[int, ...]] = [(7, 5), (3,), (), (2, 3, 4), (40, 30), (0,)]
ALL = [Momentum, Nesterov, HalfNesterov, Langevin]
LOOK_AHEAD = {Momentum: 0.0, Nesterov: 1.0, HalfNesterov: 0.5}


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def give(own: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in own:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int, **how: Any) -> None:
    for t in range(steps):
        if t == steps // 2:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * how.get("drop", 1.0)
        give(own, t)
        optimizer.step()


def apart(left: list[Any], right: list[Any]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs if a.numel())


# -- beside formulas and torch -----------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.1, "maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("cls", [Momentum, Nesterov])
def test_is_torch_sgd_at_a_constant_rate(
    cls: Any, chosen: dict[str, Any], dtype: torch.dtype, foreach: bool
) -> None:
    ours, theirs = make(dtype), make(dtype)
    run(cls(ours, 0.02, 0.9, foreach=foreach, **chosen), ours, 40)
    nesterov = cls is Nesterov
    run(torch.optim.SGD(theirs, 0.02, 0.9, nesterov=nesterov, **chosen), theirs, 40)
    assert apart(ours, theirs) < 1e-12
    assert apart(ours, make(dtype)) > 0.01


@pytest.mark.parametrize("cls", [Momentum, Nesterov])
def test_is_torch_sgd_after_a_drop_only_if_velocities_go_with_the_rate(cls: Any) -> None:
    own = [make() for _ in range(3)]
    run(cls(own[0], 0.02, 0.9, rescale_velocity="lr"), own[0], 40, drop=0.1)
    run(torch.optim.SGD(own[1], 0.02, 0.9, nesterov=cls is Nesterov), own[1], 40, drop=0.1)
    run(cls(own[2], 0.02, 0.9), own[2], 40, drop=0.1)
    assert apart(own[0], own[1]) < 1e-12
    assert apart(own[2], own[1]) > 1e-3


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rates=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8),
    beta=st.floats(0.0, 0.999),
    cls=st.sampled_from([Momentum, Nesterov, HalfNesterov]),
    unit=st.sampled_from(["none", "lr", "dynamics"]),
)
def test_matches_the_formulas_whatever_the_rates(
    rates: list[float], beta: float, cls: Any, unit: str
) -> None:
    """v ← βv − αg(Θ), θ ← θ + v, Θ = θ + hβv; v is scaled when the rate changes."""
    p = nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
    optimizer = cls([p], rates[0], beta, rescale_velocity=unit)
    h = LOOK_AHEAD[cls]
    theta, v = p.detach().clone(), torch.zeros(2, dtype=torch.float64)
    before = rates[0]
    for rate in rates:
        held = theta + h * beta * v  # Θ, of which the gradient is
        factor = {"none": 1.0, "lr": rate / before, "dynamics": math.sqrt(rate / before)}[unit]
        gradient = held + held**3
        scaled = factor * v
        v = beta * scaled - rate * gradient
        theta = held - h * beta * scaled + v  # Θ stays where it is when v is scaled
        before = rate
        optimizer.param_groups[0]["lr"] = rate
        p.grad = p.detach() + p.detach() ** 3
        optimizer.step()
        wanted = theta + h * beta * v
        scale = float(wanted.abs().max()) + 1
        torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-10 * scale)
        if scale > 10:  # it diverges, cubically
            return
        torch.testing.assert_close(optimizer.velocity(p), v if beta else 0 * v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["rule", "exact"])
def test_keeps_the_friction_under_a_scheduler(way: str) -> None:
    """As if momentum had been set and v scaled by the time step by hand at each change."""
    ours, theirs = make(), make()
    optimizer = Momentum(ours, 0.1, 0.9, keep_friction=way)
    by_hand = Momentum(theirs, 0.1, 0.9, rescale_velocity="dynamics")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(6):
        rate = 0.1 * 0.5**t
        group = by_hand.param_groups[0]
        group["lr"], group["momentum"] = rate, beta_for_lr(0.9, 0.5**t, exact=way == "exact")
        for own, o in ((ours, optimizer), (theirs, by_hand)):
            give(own, t)
            o.step()
        scheduler.step()
    assert apart(ours, theirs) < 1e-14
    assert optimizer.param_groups[0]["momentum"] == 0.9
    plain = make()
    run(Momentum(plain, 0.1, 0.9), plain, 6)
    assert apart(ours, plain) > 1e-3


def test_starts_from_rest_with_half_a_step() -> None:
    p = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = Momentum([p], 0.1, 0.6, half_step_start=True)
    p.grad = torch.tensor(3.0, dtype=torch.float64)
    optimizer.step()
    gamma = to_dynamics(0.1, 0.6).gamma
    assert float(p.detach()) == pytest.approx(2 - gamma**2 / 2 * 3)
    optimizer.step()
    v = 0.6 * -(gamma**2) / 2 * 3 - 0.1 * 3
    assert float(optimizer.velocity(p)) == pytest.approx(v)


@pytest.mark.parametrize("cls", [Momentum, Nesterov, HalfNesterov])
def test_is_gradient_descent_without_momentum(cls: Any) -> None:
    own = make()
    before = [p.detach().clone() for p in own]
    optimizer = cls(own, 0.1, 0.0)
    give(own, 0)
    optimizer.step()
    for p, old in zip(own, before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad, rtol=1e-14, atol=1e-15)
    assert not any(optimizer.state.values())


def test_velocities_end_as_velocities_begin() -> None:
    own = make()
    optimizer = Momentum(own, 0.1, 0.9)
    assert not optimizer.velocity(own[0]).any()
    before = own[0].detach().clone()
    run(optimizer, own, 1)
    torch.testing.assert_close(optimizer.velocity(own[0]), own[0].detach() - before)
    with pytest.raises(ArgumentError, match=r"`parameter` must be one that Momentum optimises"):
        optimizer.velocity(torch.ones(2))


# -- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_noise_has_the_exact_variance(momentum: float) -> None:
    """Of L = kθ²/2: (T/k) / (1 − αk/(2(1 + β))), which is far from T/k at such a rate."""
    p = nn.Parameter(torch.zeros(40_000))
    rate, temperature, curvature = 0.8, 0.3, 1.5
    generator = torch.Generator().manual_seed(0)
    optimizer = Langevin([p], rate, temperature, momentum=momentum, generator=generator)
    for _ in range(60):
        p.grad = curvature * p.detach()
        optimizer.step()
    wanted = temperature / curvature / (1 - rate * curvature / (2 * (1 + momentum)))
    assert float(p.detach().var()) == pytest.approx(wanted, rel=0.03)
    assert abs(float(p.detach().mean())) < 0.02


def test_complex_noise_is_in_both_parts() -> None:
    p = nn.Parameter(torch.zeros(20_000, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    generator = torch.Generator().manual_seed(0)
    Langevin([p], 0.5, 1.0, generator=generator).step()
    parts = torch.view_as_real(p.detach())
    assert parts.square().mean(0).tolist() == pytest.approx([1.0, 1.0], rel=0.05)


def test_at_temperature_zero_it_is_momentum() -> None:
    cold, plain = make(), make()
    run(Langevin(cold, 0.05, 0.0, momentum=0.7, weight_decay=0.1), cold, 5)
    run(Momentum(plain, 0.05, 0.7, weight_decay=0.1), plain, 5)
    assert apart(cold, plain) == 0


def test_noise_is_that_of_the_generator() -> None:
    def end(seed: int, **given: Any) -> list[nn.Parameter]:
        own = make()
        torch.manual_seed(seed)
        run(Langevin(own, 0.05, 0.1, **given), own, 3)
        return own

    assert apart(end(1), end(1)) == 0
    assert apart(end(1, foreach=False), end(1)) == 0
    assert apart(end(1), end(2)) > 0.01
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert apart(end(1, generator=generators[0]), end(2, generator=generators[1])) == 0


# -- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_foreach_is_the_loop(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone, split = make(), make(), make()
    torch.manual_seed(0)
    run(cls(together, 0.05, momentum=0.9, weight_decay=0.1), together, 4)
    torch.manual_seed(0)
    run(cls(alone, 0.05, momentum=0.9, weight_decay=0.1, foreach=False), alone, 4)
    monkeypatch.setitem(module._TOGETHER, "cpu", 30)
    torch.manual_seed(0)
    run(cls(split, 0.05, momentum=0.9, weight_decay=0.1), split, 4)
    assert apart(together, alone) == apart(together, split) == 0


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(cls: Any, dtype: torch.dtype) -> None:
    half = make(dtype)
    single = [nn.Parameter(p.detach().float()) for p in half]
    finish = []
    for own in (half, single):
        torch.manual_seed(0)
        optimizer = cls(own, 0.1, momentum=0.9, weight_decay=0.1)
        for p, q in zip(own, half, strict=True):
            generator = torch.Generator().manual_seed(q.numel())
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)
        optimizer.step()
        finish.append(optimizer)
    for p, q in zip(half, single, strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=0, atol=0)
        if p.numel():
            assert finish[0].state[p]["mean"].dtype == torch.float32


@pytest.mark.parametrize("cls", ALL)
def test_gradients_are_not_modified(cls: Any) -> None:
    own = make()
    optimizer = cls(own, 0.1, momentum=0.9, weight_decay=0.1, maximize=True)
    give(own, 0)
    before = [p.grad.clone() for p in own if p.grad is not None]
    optimizer.step()
    optimizer.step()
    assert apart([p.grad for p in own], before) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [Momentum, Nesterov, HalfNesterov])
def test_gradients_that_are_not_finite_go_through(cls: Any, bad: float) -> None:
    own = make(torch.float32)
    optimizer = cls(own, 0.1, 0.9)
    give(own, 0)
    assert own[0].grad is not None
    own[0].grad[0, 0] = bad
    optimizer.step()
    assert not own[0].detach()[0, 0].isfinite()
    assert own[0].detach()[1:].isfinite().all()
    assert own[1].detach().isfinite().all()


@pytest.mark.parametrize("cls", ALL)
def test_a_rate_of_zero_from_a_scheduler_is_no_error(cls: Any) -> None:
    for chosen in ({}, {"rescale_velocity": "lr"}, {"keep_friction": "exact"}):
        own = make()
        before = [p.detach().clone() for p in own]
        optimizer = cls(own, 0.1, momentum=0.9, **chosen)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        run(optimizer, own, 2)
        assert apart(own, before) == 0
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        run(optimizer, own, 2)
        assert all(p.isfinite().all() for p in own)
        assert apart(own, before) > 0.01


def test_takes_parameters_in_any_order_of_memory() -> None:
    dense = [nn.Parameter(torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)))]
    strided = [nn.Parameter(dense[0].detach().clone(memory_format=torch.channels_last))]
    for own in (dense, strided):
        for _ in range(3):
            own[0].grad = own[0].detach().clone() * 2
            Momentum(own, 0.1, 0.9).step()
    assert apart(dense, strided) == 0


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", -0.1), ("lr", math.inf), ("lr", math.nan), ("lr", torch.ones(2)),
        ("momentum", -0.1), ("momentum", 1.0), ("momentum", math.nan), ("weight_decay", -1.0),
        ("weight_decay", math.inf), ("rescale_velocity", "yes"), ("keep_friction", "sometimes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", ALL)
def test_rejects_settings_out_of_range(cls: Any, name: str, value: Any) -> None:
    rejects(cls, name, value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_rejects_temperatures_out_of_range(value: float) -> None:
    rejects(Langevin, "temperature", value)


def rejects(cls: Any, name: str, value: Any) -> None:
    words = f"`{name}` of {cls.__name__} must be .* Found"
    with pytest.raises(ArgumentError, match=words) as caught:
        cls(make(), **{name: value})
    assert caught.value.argument == name
    optimizer = cls(make(), lr=0.1)
    with pytest.raises(ArgumentError, match=words):
        optimizer.add_param_group({"params": make(), name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", ALL)
def test_rejects_lists_of_parameters_that_are_none(cls: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`params` of .* at least one parameter. Found none"):
        cls([])
    with pytest.raises(ArgumentError, match="at least one parameter"):
        cls(iter(()))
    p: Any = nn.Parameter(torch.ones(3))
    with pytest.raises(ArgumentError, match=r"different .* shape \[3\] twice\. Leave") as caught:
        cls([p, p])
    assert caught.value.argument == "params"
    with pytest.raises(ArgumentError, match=r"twice, in two groups"):
        cls([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ArgumentError, match=r"twice"):
        cls([("a", p), ("b", p)])


@pytest.mark.parametrize("cls", ALL)
def test_rejects_sparse_gradients_before_anything_moves(cls: Any) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = cls([{"params": [dense]}, {"params": table.parameters()}], momentum=0.9)
    with pytest.raises(ArgumentError, match=r"dense.*sparse_coo.*\[5, 3\].*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state
