"""Lookahead: against the formula and pytorch_optimizer; cycles, groups, 16 bits, slow weights."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.interfaces.optimizer import state_bytes
from kexue_lookahead import Lookahead, with_lookahead

SLOW = "lookahead.slow"
SHAPES: list[tuple[int, ...]] = [(6, 4), (5,), ()]


def make(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: range) -> None:
    """Take steps with gradients that depend on the step, and on the parameters."""
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for p in own:
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = p.detach() + noise
        optimizer.step()


def apart(left: list[Any], right: list[Any]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


# -- the method ------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    k=st.integers(1, 6),
    share=st.floats(0.05, 1.0),
    steps=st.integers(1, 20),
    momentum=st.sampled_from([0.0, 0.9]),
    pullback=st.sampled_from(["none", "reset", "average"]),
)
def test_matches_the_formula(
    k: int, share: float, steps: int, momentum: float, pullback: Any
) -> None:
    own = make()
    optimizer = with_lookahead("sgd", slow_steps=k, slow_step_size=share, pullback=pullback)
    run(optimizer(own, lr=0.1, momentum=momentum), own, range(steps))
    fast = [p.detach() for p in make()]
    slow, speed = [p.clone() for p in fast], [torch.zeros_like(p) for p in fast]
    slow_speed = [torch.zeros_like(p) for p in fast]
    for t in range(steps):
        generator = torch.Generator().manual_seed(1000 + t)
        for i, p in enumerate(fast):
            g = p + torch.randn(p.shape, generator=generator).to(p.dtype)
            speed[i] = momentum * speed[i] + g
            fast[i] = p - 0.1 * speed[i]
        if (t + 1) % k == 0:
            slow = [s + share * (f - s) for f, s in zip(fast, slow, strict=True)]
            fast = [s.clone() for s in slow]
            if pullback == "reset":
                speed = [torch.zeros_like(b) for b in speed]
            if pullback == "average":
                slow_speed = [s + share * (b - s) for b, s in zip(speed, slow_speed, strict=True)]
                speed = [s.clone() for s in slow_speed]
    assert apart(own, fast) < 1e-13


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_matches_pytorch_optimizer(base: str, foreach: bool) -> None:
    peer = pytest.importorskip("pytorch_optimizer").Lookahead
    of_torch = getattr(torch.optim, base)
    pairs: list[tuple[Any, str]] = [("none", "none"), ("reset", "reset"), ("average", "pullback")]
    for ours, theirs in pairs:
        if base == "Adam" and ours != "none":
            continue  # theirs adds a momentum that Adam does not look at
        choice = {"lr": 0.01, "momentum": 0.9} if base != "Adam" else {"lr": 0.01}
        own, others = make(), make()
        mine = with_lookahead(of_torch, pullback=ours)(own, foreach=foreach, **choice)
        other = peer(of_torch(others, **choice), k=5, alpha=0.5, pullback_momentum=theirs)
        run(mine, own, range(23))
        run(other, others, range(23))
        assert apart(own, others) < 1e-15


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw", "rmsprop", "torch.optim.Adafactor"])
@pytest.mark.parametrize("chosen", [{"slow_step_size": 1.0}, {"slow_steps": 100}], ids=str)
def test_reduces_to_the_base(base: str, chosen: dict[str, Any]) -> None:
    """With α = 1, or before the first cycle ends: to the last bit."""
    own, plain = make(), make()
    made = with_lookahead(base, **chosen)
    run(made(own, lr=0.01), own, range(12))
    run(made.derived_from(plain, lr=0.01), plain, range(12))
    assert apart(own, plain) == 0


def test_one_step_of_the_base_a_cycle_is_a_smaller_step() -> None:
    own, plain = make(), make()
    run(with_lookahead("sgd", slow_steps=1, slow_step_size=0.25)(own, lr=0.4), own, range(9))
    run(torch.optim.SGD(plain, lr=0.1), plain, range(9))
    assert apart(own, plain) < 1e-14


def test_starts_at_the_parameters() -> None:
    """The first mix is of θ₀ and θ_k; the reference in Keras halves θ₀ at once."""
    own = make()
    start = [p.detach().clone() for p in own]
    optimizer = with_lookahead("sgd", slow_steps=2)(own, lr=0.1)
    with torch.no_grad():  # what is loaded after the optimizer was built counts
        for p in own:
            p.add_(1)
    start = [s + 1 for s in start]
    run(optimizer, own, range(1))
    assert apart([optimizer.state[p][SLOW] for p in own], start) == 0
    before = [p.detach().clone() for p in own]
    for p in own:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert apart(own, [(a + b) / 2 for a, b in zip(start, before, strict=True)]) < 1e-15


def test_momentum_is_treated_as_chosen() -> None:
    found = {}
    choices: list[Any] = ["none", "reset", "average"]
    for pullback in choices:
        own = make()
        optimizer = Lookahead(own, 0.1, slow_steps=3, pullback=pullback)
        run(optimizer, own, range(3))
        found[pullback] = optimizer.state[own[0]]
    assert found["none"]["exp_avg"].abs().max() > 0
    assert not found["reset"]["exp_avg"].any()
    half = found["none"]["exp_avg"] / 2
    torch.testing.assert_close(found["average"]["exp_avg"], half)
    torch.testing.assert_close(found["average"]["lookahead.exp_avg"], half)
    for state in found.values():
        assert torch.equal(state["exp_avg_sq"], found["none"]["exp_avg_sq"])
        assert int(state["step"]) == 3


# -- groups ----------------------------------------------------------------------------------------


def test_groups_have_their_own_cycles() -> None:
    own, whole = make(), make()
    optimizer = with_lookahead("sgd")([{"params": own[:1], "slow_steps": 2}], lr=0.1)
    run(optimizer, own[:1], range(3))
    optimizer.add_param_group({"params": own[1:], "slow_step_size": 0.25, "slow_steps": 3})
    run(optimizer, own, range(3, 8))
    first = with_lookahead("sgd", slow_steps=2)(whole[:1], lr=0.1)
    run(first, whole[:1], range(3))
    second = with_lookahead("sgd", slow_steps=3, slow_step_size=0.25)(whole[1:], lr=0.1)
    first.register_step_post_hook(lambda *_: second.step())
    run(first, whole, range(3, 8))
    assert apart(own, whole) == 0
    assert [g["lookahead_position"] for g in optimizer.param_groups] == [8 % 2, 5 % 3]


def test_frozen_parameters_stay_and_those_without_gradient_are_mixed() -> None:
    frozen, rare = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = with_lookahead("sgd", slow_steps=2)([frozen, rare], lr=0.5)
    rare.grad = torch.ones(2)
    optimizer.step()
    rare.grad = None
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2))
    assert SLOW not in optimizer.state[frozen]
    assert rare.tolist() == [0.75, 0.75]


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pullback", ["none", "average"])
def test_goes_on_in_the_middle_of_a_cycle(pullback: Any, dtype: torch.dtype) -> None:
    own = make(dtype)
    optimizer = with_lookahead("adam", pullback=pullback)(own, lr=0.01)
    run(optimizer, own, range(7))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = with_lookahead("adam")(twins, lr=0.7)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert resumed.param_groups[0]["lookahead_position"] == 2
    for p, twin in zip(own, twins, strict=True):
        assert resumed.state[twin][SLOW].dtype == optimizer.state[p][SLOW].dtype
        assert resumed.state[twin][SLOW].data_ptr() != optimizer.state[p][SLOW].data_ptr()
    run(optimizer, own, range(7, 14))
    run(resumed, twins, range(7, 14))
    assert apart(own, twins) == 0


@pytest.mark.parametrize("how", ["loaded", "pickled", "copied"])
@pytest.mark.parametrize("base", ["adam", "sgd", "nadam", "rmsprop", "torch.optim.adafactor"])
def test_a_parameter_that_had_no_gradient_yet_goes_on(base: str, how: str) -> None:
    own = make(torch.float32)
    optimizer = with_lookahead(base)(own, lr=0.1, slow_steps=2, pullback="average")
    run(optimizer, own[:-1], range(3))
    with optimizer.slow_weights():
        assert own[-1] not in optimizer.state  # checkpoints of shards take an empty one for begun
    if how == "pickled":
        twins, resumed = pickle.loads(pickle.dumps((own, optimizer)))  # noqa: S301
    elif how == "copied":
        twins, resumed = copy.deepcopy((own, optimizer))
    else:
        twins = [nn.Parameter(p.detach().clone()) for p in own]
        resumed = with_lookahead(base)(twins, lr=0.7)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, own, range(3, 8))
    run(resumed, twins, range(3, 8))
    assert apart(own, twins) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_weights_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    """Steps below the resolution of the parameters add up in the slow weights."""
    tiny = torch.finfo(dtype).eps
    own = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = with_lookahead("sgd", slow_steps=1, slow_step_size=0.125)([own], lr=1.0)
    for _ in range(4):  # each time 1 → 1 − 2 eps → an eighth of it
        own.grad = torch.full_like(own, 2 * tiny)
        optimizer.step()
    slow = optimizer.state[own][SLOW]
    assert slow.dtype == torch.float32
    assert own.dtype == dtype
    torch.testing.assert_close(slow, torch.full((3,), 1 - 4 * 2 * tiny / 8), rtol=0, atol=tiny / 4)


def test_what_was_loaded_is_not_shared() -> None:
    own, twins = make(), make()
    optimizer, twin = (with_lookahead("sgd", slow_steps=2)(p, lr=0.1) for p in (own, twins))
    run(optimizer, own, range(1))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twin.load_state_dict(saved)
    run(twin, twins, range(1, 4))
    for index, state in kept["state"].items():
        assert torch.equal(saved["state"][index]["lookahead.slow"], state["lookahead.slow"])
    for p, q in zip(own, twins, strict=True):
        assert not torch.equal(
            optimizer.state[p]["lookahead.slow"], twin.state[q]["lookahead.slow"]
        )


def test_costs_one_number_per_parameter() -> None:
    own = make(torch.float32)
    plain, slow = torch.optim.SGD(own, lr=0.1), with_lookahead("sgd")(own, lr=0.1)
    for optimizer in (plain, slow):
        run(optimizer, own, range(6))
    numbers = sum(p.numel() for p in own)
    assert (state_bytes(plain), state_bytes(slow)) == (0, 4 * numbers)


# -- looking at the slow weights -------------------------------------------------------------------


def test_slow_weights_can_be_evaluated() -> None:
    own = make()
    optimizer = Lookahead(own, 0.1, base="sgd")
    with optimizer.slow_weights():
        pass  # nothing has begun
    run(optimizer, own, range(7))
    fast = [p.detach().clone() for p in own]
    slow = [optimizer.state[p][SLOW].clone() for p in own]
    with optimizer.slow_weights():
        assert apart(own, slow) == 0
        kept = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ArgumentError, match="`slow_weights` must be left"):
            optimizer.step()
        with (
            pytest.raises(ArgumentError, match="`slow_weights` must be left"),
            optimizer.slow_weights(),
        ):
            pass
        assert apart(own, slow) == 0
    assert apart(own, fast) == 0
    assert kept["param_groups"][0]["lookahead_position"] == 2
    with pytest.raises(RuntimeError, match="evaluation"), optimizer.slow_weights():
        raise RuntimeError("evaluation failed")
    assert apart(own, fast) == 0
    run(optimizer, own, range(7, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_steps": 0}, r"`slow_steps` of lookahead must be an int of at least 1\. Found 0"),
        ({"slow_steps": 2.5}, "`slow_steps`"),
        ({"slow_step_size": 0.0}, r"`slow_step_size` of lookahead must be in \(0, 1\]"),
        ({"slow_step_size": 1.5}, "`slow_step_size`"),
        ({"slow_step_size": float("nan")}, "`slow_step_size`"),
        ({"pullback": "pull"}, "`pullback` of lookahead must be 'none', 'reset' or 'average'"),
    ],
    ids=str,
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        with_lookahead("sgd", **options)
    assert caught.value.argument in options
    with pytest.raises(ArgumentError, match=message):
        with_lookahead("sgd")(make(), lr=0.1, **options)
    with pytest.raises(ArgumentError, match=message):
        Lookahead(make(), 0.1, **options)


def test_steadies_a_noisy_quadratic() -> None:
    """The variance falls by the factor of the paper, proposition 2."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    rate, k, share = 0.5, 5, 0.5
    for made in (torch.optim.SGD, with_lookahead("sgd", slow_steps=k, slow_step_size=share)):
        chains = nn.Parameter(torch.zeros(20000, dtype=torch.float64))
        optimizer = made([chains], lr=rate)
        for _ in range(100):
            noise = torch.randn(chains.shape, generator=generator, dtype=chains.dtype)
            chains.grad = chains.detach() + noise
            optimizer.step()
        found.append(chains.detach().var())
    one, two = (1 - (1 - rate) ** n for n in (k, 2 * k))
    ratio = share**2 * two / (share**2 * two + 2 * share * (1 - share) * one)
    assert float(found[1] / found[0]) == pytest.approx(ratio, rel=0.04)
