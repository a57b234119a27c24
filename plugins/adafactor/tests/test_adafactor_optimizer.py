"""What every torch optimizer does: closures, groups, schedulers, states; and 16-bit parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.interfaces.optimizer import state_bytes
from kexue_adafactor import Adafactor
from kexue_adafactor.rounding import stochastic_round

SHAPES: list[tuple[int, ...]] = [(6, 4), (6, 4), (5,), (), (2, 3, 4)]


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def equal(left: list[nn.Parameter], right: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- steps -----------------------------------------------------------------------------------------


def test_closures_are_called_once_with_gradients() -> None:
    own = make()
    optimizer = Adafactor(own, lr=0.01)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in own]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        calls.append(float(loss.detach()))
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert float(first.detach()) == calls[0]
    assert float(last.detach()) == calls[-1] < 0.75 * calls[0]
    assert len(calls) == 21
    optimizer.zero_grad()
    assert optimizer.step() is None


def test_groups_have_their_own_settings() -> None:
    together, left, right = make(), make(), make()
    optimizer = Adafactor([{"params": together[:2], "lr": 0.5, "beta1": 0.9}], lr=0.01, clip=0.5)
    optimizer.add_param_group({"params": together[2:], "lr": None, "factor_dims": "largest"})
    run(optimizer, together, range(3))
    run(Adafactor(left, lr=0.5, beta1=0.9, clip=0.5), left, range(3))
    run(Adafactor(right, lr=None, factor_dims="largest", clip=0.5), right, range(3))
    assert equal(together[:2], left[:2])
    assert equal(together[2:], right[2:])
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.01]


def test_single_tensors_generators_and_names_are_parameters() -> None:
    for given_as in (
        lambda own: (p for p in own),
        lambda own: [(str(i), p) for i, p in enumerate(own)],
    ):
        own = make()
        before = [p.detach().clone() for p in own]
        run(Adafactor(given_as(own), lr=0.1), own, range(1))
        assert all(not torch.equal(a, b) for a, b in zip(own, before, strict=True))
    optimizer = Adafactor(make(), lr=0.1)
    alone = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": alone})
    assert optimizer.param_groups[1]["params"][0] is alone


def test_each_parameter_counts_its_own_steps() -> None:
    """One that joins late starts at β̂ = 0, beside others of the same shape."""
    early, late = make(), make()
    optimizer = Adafactor([early[0], late[1]], lr=0.1)
    run(optimizer, [early[0]], range(3))
    late[1].grad = None
    run(optimizer, [early[0], late[1]], range(3, 5))
    alone = make()
    run(Adafactor(alone, lr=0.1), [alone[0], alone[1]], range(3, 5))
    assert [optimizer.state[p]["step"] for p in (early[0], late[1])] == [5, 2]
    torch.testing.assert_close(late[1], alone[1])


def test_parameters_without_gradient_stay_and_keep_no_state() -> None:
    own = make()
    optimizer = Adafactor(own, lr=0.1)
    before = own[0].detach().clone()
    run(optimizer, own[1:], range(2))
    assert torch.equal(own[0], before)
    assert own[0] not in optimizer.state


def test_schedulers_set_the_rate() -> None:
    own, fixed = make(), make()
    optimizer = Adafactor(own, lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    peer = Adafactor(fixed, lr=0.4)
    for t in range(3):
        peer.param_groups[0]["lr"] = 0.4 * 0.5**t
        run(optimizer, own, range(t, t + 1))
        run(peer, fixed, range(t, t + 1))
        scheduler.step()
    assert equal(own, fixed)


def test_rates_may_be_tensors() -> None:
    own, fixed = make(), make()
    run(Adafactor(own, lr=torch.tensor(0.25)), own, range(2))
    run(Adafactor(fixed, lr=0.25), fixed, range(2))
    assert equal(own, fixed)


@pytest.mark.parametrize(
    "attach",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    ],
)
def test_rejects_schedulers_without_a_rate(attach: Callable[[Any], Any]) -> None:
    own = make()
    optimizer = Adafactor(own, lr=None)
    attach(optimizer)
    with pytest.raises(ArgumentError, match=r"`lr` .* scheduler.*1e-3") as caught:
        run(optimizer, own, range(1))
    assert caught.value.argument == "lr"


# -- states ----------------------------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "beta1": 0.9},
    {"lr": None, "relative_step": True, "factor_dims": "largest"},
    {"lr": 0.1, "beta1": 0.9, "eps_mode": "clamp", "state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_goes_on_from_a_state_dict(chosen: dict[str, Any], dtype: torch.dtype) -> None:
    own = make(dtype)
    optimizer = Adafactor(own, **chosen)
    run(optimizer, own, range(3))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = Adafactor(twins, lr=0.7)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for p, twin in zip(own, twins, strict=True):
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                wanted = chosen.get("state_dtype") if name == "momentum" else None
                assert value.dtype == (wanted or torch.float32)
                assert torch.equal(resumed.state[twin][name].to(value.dtype), value)
    run(optimizer, own, range(3, 6))
    run(resumed, twins, range(3, 6))
    assert equal(own, twins)


def test_goes_on_from_a_checkpoint_without_the_newer_settings() -> None:
    own = make()
    optimizer = Adafactor(own, lr=0.1, beta1=0.9, eps1=1e-30)
    run(optimizer, own, range(2))
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["eps_mode"], group["state_dtype"]
    resumed = Adafactor(twins, lr=0.7, eps_mode="clamp")
    resumed.load_state_dict(saved)
    run(optimizer, own, range(2, 4))
    run(resumed, twins, range(2, 4))
    assert equal(own, twins)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_first_moments_have_the_type_that_is_given(dtype: torch.dtype, named: bool) -> None:
    """Only they; the steps are near those of full moments, of which they take half the bytes."""
    low: Any = "bfloat16" if named else torch.bfloat16
    own, full = make(dtype), make(dtype)
    optimizer = Adafactor(own, lr=0.1, beta1=0.9, state_dtype=low)
    peer = Adafactor(full, lr=0.1, beta1=0.9)
    run(optimizer, own, range(5))
    run(peer, full, range(5))
    least = torch.promote_types(dtype, torch.float32)
    for p, q in zip(own, full, strict=True):
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                assert value.dtype == (torch.bfloat16 if name == "momentum" else least)
        assert peer.state[q]["momentum"].dtype == least
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)
    assert not equal(own, full)


def test_first_moments_change_their_type_on_the_way() -> None:
    own = make()
    optimizer = Adafactor(own, lr=0.1, beta1=0.9)
    run(optimizer, own, range(2))
    before = {p: optimizer.state[p]["momentum"].clone() for p in own}
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    optimizer.param_groups[0]["beta1"] = 1 - 1e-6
    run(optimizer, own, range(2, 3))
    for p in own:
        moment = optimizer.state[p]["momentum"]
        assert moment.dtype == torch.bfloat16
        torch.testing.assert_close(moment.float(), before[p], rtol=2**-7, atol=1e-6)


def test_loaded_states_are_not_shared() -> None:
    own, twins = make(), make()
    optimizer, other = Adafactor(own, lr=0.1), Adafactor(twins, lr=0.1)
    run(optimizer, own, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    run(other, twins, range(2, 4))
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[index][name]))


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_goes_on_after_foreach_changed(first: bool, then: bool) -> None:
    own = make(torch.float64)
    optimizer = Adafactor(own, lr=0.1, beta1=0.9, foreach=first)
    run(optimizer, own, range(3))
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["foreach"] = then
    changed = Adafactor(twins, lr=0.1)
    changed.load_state_dict(state)
    assert changed.param_groups[0]["foreach"] is then
    run(optimizer, own, range(3, 6))
    run(changed, twins, range(3, 6))
    for a, b in zip(own, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies_go_on_alike(how: Callable[[Any], Any]) -> None:
    own = make(torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    optimizer = Adafactor(own, lr=1e-3, stochastic_rounding=True, generator=generator)
    run(optimizer, own, range(2))
    twins, twin = how((own, optimizer))
    run(optimizer, own, range(2, 4))
    run(twin, twins, range(2, 4))
    assert twin.generator is not optimizer.generator
    assert equal(own, twins)


def test_bytes_of_state_are_rows_plus_columns() -> None:
    own = [nn.Parameter(torch.randn(s)) for s in [(300, 200), (50, 20, 30), (70,), ()]]
    optimizer = Adafactor(own)
    for p in own:
        p.grad = torch.randn_like(p)
    optimizer.step()
    numbers = (300 + 200) + 50 * (20 + 30) + 70 + 1
    assert state_bytes(optimizer) == 4 * numbers


# -- 16 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_at_the_end(dtype: torch.dtype, foreach: bool) -> None:
    """One step is that of float32 parameters of the same values, rounded."""
    half = make(dtype)
    single = [nn.Parameter(p.detach().float()) for p in half]
    choice: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "foreach": foreach}
    ours, exact = Adafactor(half, **choice), Adafactor(single, **choice)
    for p, q in zip(half, single, strict=True):
        p.grad = torch.randn(p.shape).to(dtype) * 100
        q.grad = p.grad.float()
    ours.step()
    exact.step()
    for p, q in zip(half, single, strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.float(), q, rtol=torch.finfo(dtype).eps, atol=1e-6)
        for name, value in ours.state[p].items():
            if name != "step":
                assert value.dtype == torch.float32
                torch.testing.assert_close(value, exact.state[q][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bears_gradients_whose_square_does_not_fit(dtype: torch.dtype) -> None:
    for size in (1e-7, 6e4):
        p = nn.Parameter(torch.ones(4, 3, dtype=dtype))
        p.grad = torch.full((4, 3), size, dtype=dtype)
        Adafactor([p], lr=0.25).step()
        assert torch.equal(p, torch.full((4, 3), 0.75, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_moves_where_rounding_stands_still(dtype: torch.dtype) -> None:
    """Steps of a tenth of the resolution: none survives rounding, and on average all do."""
    step = torch.finfo(dtype).eps / 20  # below 1, numbers are eps / 2 apart
    stuck, drawn = (nn.Parameter(torch.ones(200, 200, dtype=dtype)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    nearest = Adafactor([stuck], lr=step)
    random = Adafactor([drawn], lr=step, stochastic_rounding=True, generator=generator)
    for p, optimizer in ((stuck, nearest), (drawn, random)):
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.equal(stuck, torch.ones_like(stuck))
    assert float((1 - drawn.detach().double()).mean()) == pytest.approx(10 * step, rel=0.02)


def test_the_same_seed_rounds_alike() -> None:
    results = []
    for seed in (1, 1, 2):
        own = make(torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        run(Adafactor(own, stochastic_rounding=True, generator=generator), own, range(2))
        results.append(own)
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_rounds_to_a_neighbour_and_right_on_average(value: float, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()].sort().values
    clamped = min(max(value, float(every[0])), float(every[-1]))
    low, high = float(every[every <= clamped].max()), float(every[every >= clamped].min())
    draws = stochastic_round(
        torch.full((4000,), value), dtype, generator=torch.Generator().manual_seed(0)
    ).double()
    assert set(draws.tolist()) <= {low, high}
    deviation = 0.5 * (high - low) / len(draws) ** 0.5  # of the mean, at most
    assert abs(float(draws.mean()) - clamped) <= 5 * deviation + 1e-12 * abs(clamped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_what_is_exact(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = stochastic_round(every.float(), dtype)
    torch.testing.assert_close(rounded, every, rtol=0, atol=0, equal_nan=True)
