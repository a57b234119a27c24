"""What every torch optimizer does: closures, groups, schedulers, states, GradScaler."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.core.interfaces.optimizer import state_bytes
from kexue_momentum import HalfNesterov, Langevin, Momentum, Nesterov

SHAPES: list[tuple[int, ...]] = [(6, 4), (6, 4), (5,), (), (2, 3, 4)]
ALL = [Momentum, Nesterov, HalfNesterov, Langevin]


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


@pytest.mark.parametrize("cls", ALL)
def test_closures_are_called_once_with_gradients(cls: Any) -> None:
    own = make()
    optimizer = cls(own, lr=0.01, momentum=0.5)
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
    optimizer = Momentum([{"params": together[:2], "lr": 0.5, "weight_decay": 0.1}], lr=0.01)
    optimizer.add_param_group({"params": together[2:], "momentum": 0.5, "rescale_velocity": "lr"})
    run(optimizer, together, range(3))
    run(Momentum(left, lr=0.5, weight_decay=0.1), left, range(3))
    run(Momentum(right, lr=0.01, momentum=0.5), right, range(3))
    assert equal(together[:2], left[:2])
    assert equal(together[2:], right[2:])


def test_single_tensors_generators_and_names_are_parameters() -> None:
    for given_as in (
        lambda own: (p for p in own),
        lambda own: [(str(i), p) for i, p in enumerate(own)],
    ):
        own = make()
        before = [p.detach().clone() for p in own]
        run(Momentum(given_as(own), lr=0.1), own, range(1))
        assert all(not torch.equal(a, b) for a, b in zip(own, before, strict=True))
    optimizer = Momentum(make(), lr=0.1)
    alone = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": alone})
    assert optimizer.param_groups[1]["params"][0] is alone
    named = Momentum(nn.Linear(2, 2).named_parameters(), lr=0.1)
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_each_parameter_has_its_own_history() -> None:
    """One that joins late beside others, and one that has no gradient for a while."""
    own, alone = make(), make()
    optimizer = Momentum(own, lr=0.1)
    run(optimizer, own[:1], range(3))
    assert own[1] not in optimizer.state
    run(optimizer, own[:2], range(3, 5))
    run(Momentum(alone, lr=0.1), alone[:2], range(3, 5))
    assert torch.equal(own[1], alone[1])
    torch.testing.assert_close(own[0], reference(range(5)))


def reference(steps: range) -> nn.Parameter:
    own = make()
    run(torch.optim.SGD(own[:1], 0.1, momentum=0.9), own[:1], steps)
    return own[0]


def test_schedulers_set_the_rate_and_the_momentum() -> None:
    own, fixed = make(), make()
    optimizer = Nesterov(own, lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    peer = Nesterov(fixed, lr=0.4)
    for t in range(3):
        peer.param_groups[0]["lr"] = 0.4 * 0.5**t
        run(optimizer, own, range(t, t + 1))
        run(peer, fixed, range(t, t + 1))
        scheduler.step()
    assert equal(own, fixed)
    cycled = Momentum(make(), lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(cycled, 0.1, 10)  # finds `momentum`, and cycles it
    assert cycled.param_groups[0]["momentum"] == pytest.approx(0.95)


def test_warm_ups_begin_at_zero() -> None:
    own = make()
    optimizer = Momentum(own, lr=0.4, keep_friction="rule")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 4)
    before = [p.detach().clone() for p in own]
    run(optimizer, own, range(1))
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    for _ in range(4):
        scheduler.step()
        run(optimizer, own, range(1))
    assert all(p.isfinite().all() for p in own)
    assert not torch.equal(own[0], before[0])


def test_rates_may_be_tensors() -> None:
    own, fixed = make(), make()
    run(Momentum(own, lr=torch.tensor(0.25)), own, range(2))
    run(Momentum(fixed, lr=0.25), fixed, range(2))
    assert equal(own, fixed)


def test_grad_scaler_skips_steps_that_are_not_finite() -> None:
    own, plain = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = Momentum(own, lr=0.1)
    for bad in (False, True, False):
        for p in own:
            p.grad = 2 * torch.ones_like(p)
        if bad:
            assert own[0].grad is not None
            own[0].grad[0, 0] = torch.inf
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(2.0)
    for p in plain:
        p.grad = torch.ones_like(p)
    peer = Momentum(plain, lr=0.1)
    peer.step()
    peer.step()
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b)


# -- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", ALL)
def test_goes_on_from_a_state_dict(cls: Any, dtype: torch.dtype) -> None:
    own = make(dtype)
    optimizer = cls(own, lr=0.1, momentum=0.9, keep_friction="exact")
    optimizer.param_groups[0]["lr"] = 0.05
    run(optimizer, own, range(3))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = cls(twins, lr=0.7, momentum=0.1)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for p, twin in zip(own, twins, strict=True):
        mean = resumed.state[twin]["mean"]
        assert mean.dtype == torch.float32
        assert torch.equal(mean, optimizer.state[p]["mean"])
        assert mean is not optimizer.state[p]["mean"]
    run(optimizer, own, range(3, 6))
    run(resumed, twins, range(3, 6))
    assert equal(own, twins)


def test_loaded_states_are_not_shared() -> None:
    own, twins = make(), make()
    optimizer, other = Momentum(own, lr=0.1), Momentum(twins, lr=0.1)
    run(optimizer, own, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    run(other, twins, range(2, 4))
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["mean"], kept[index]["mean"])


def test_loads_states_without_a_generator() -> None:
    optimizer = Langevin(make(), lr=0.1)
    before = optimizer.generator.get_state()
    state = Langevin(make(), lr=0.1).state_dict()
    del state["generator"]
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.generator.get_state(), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
@pytest.mark.parametrize("cls", ALL)
def test_copies_go_on_alike(cls: Any, how: Callable[[Any], Any]) -> None:
    own = make(torch.bfloat16)
    optimizer = cls(own, lr=0.1, momentum=0.9)
    run(optimizer, own, range(2))
    twins, twin = how((own, optimizer))
    run(optimizer, own, range(2, 4))
    run(twin, twins, range(2, 4))
    assert equal(own, twins)
    assert not equal(own, make(torch.bfloat16))


def test_bytes_of_state() -> None:
    for dtype, momentum, wanted in (
        (torch.float32, 0.9, 4), (torch.bfloat16, 0.9, 4), (torch.float64, 0.9, 8),
        (torch.float32, 0.0, 0),
    ):  # fmt: skip
        own = make(dtype)
        optimizer = Momentum(own, 0.1, momentum)
        run(optimizer, own, range(2))
        assert state_bytes(optimizer) == wanted * sum(p.numel() for p in own)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", ALL)
def test_derivations_are_told_whether_steps_read_the_parameters(
    monkeypatch: pytest.MonkeyPatch, cls: Any, decay: float
) -> None:
    """If they do not, updates are computed at 0, which saves copies, and are the same."""
    lookahead = pytest.importorskip("kexue_lookahead")

    class Silent(cls):  # type: ignore[misc]
        """Says nothing of itself, and is taken to read."""

    at_zero: list[bool] = []
    plain = cls._move

    def move(self: Any, group: Any, plan: Any, parameters: list[Tensor]) -> None:
        at_zero.extend(not p.any() for p in parameters)
        plain(self, group, plan, parameters)

    monkeypatch.setattr(cls, "_move", move)
    both = []
    for base in (cls, Silent):
        at_zero.clear()
        own = make(torch.float64)
        torch.manual_seed(0)
        derived = lookahead.with_lazy(base)(own, lr=0.1, momentum=0.5, weight_decay=decay)
        run(derived, own, range(4))
        assert any(at_zero) == (base is cls and not decay)
        both.append(own)
    reference = make(torch.float64)
    torch.manual_seed(0)
    run(cls(reference, lr=0.1, momentum=0.5, weight_decay=decay), reference, range(4))
    for left, right, own in zip(*both, reference, strict=True):
        torch.testing.assert_close(left, own, rtol=0, atol=1e-13)
        torch.testing.assert_close(right, own, rtol=0, atol=1e-13)
