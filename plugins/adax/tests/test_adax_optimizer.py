"""What every torch optimizer does: closures, groups, schedulers, states; and 16-bit parameters."""

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
from kexue_adax import AdaX, AdaXW

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
    optimizer = AdaX(own, lr=0.05)
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
    optimizer = AdaX([{"params": together[:2], "lr": 0.5, "eps": 0.1}], lr=0.01, weight_decay=0.1)
    optimizer.add_param_group({"params": together[2:], "betas": (0.5, 0.01), "maximize": True})
    run(optimizer, together, range(3))
    run(AdaX(left, lr=0.5, eps=0.1, weight_decay=0.1), left, range(3))
    other = AdaX(right, lr=0.01, betas=(0.5, 0.01), maximize=True, weight_decay=0.1)
    run(other, right, range(3))
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
        run(AdaX(given_as(own), lr=0.1), own, range(1))
        assert all(not torch.equal(a, b) for a, b in zip(own, before, strict=True))
    optimizer = AdaX(make(), lr=0.1)
    alone = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": alone})
    assert optimizer.param_groups[1]["params"][0] is alone


def test_each_parameter_counts_its_own_steps() -> None:
    """One that joins late starts at β̂ = 0, beside others."""
    early, late = make(), make()
    optimizer = AdaX([early[0], late[1]], lr=0.1)
    run(optimizer, [early[0]], range(3))
    late[1].grad = None
    run(optimizer, [early[0], late[1]], range(3, 5))
    alone = make()
    run(AdaX(alone, lr=0.1), [alone[0], alone[1]], range(3, 5))
    assert [optimizer.state[p]["step"] for p in (early[0], late[1])] == [5, 2]
    torch.testing.assert_close(late[1], alone[1])


def test_parameters_without_gradient_stay_and_keep_no_state() -> None:
    own = make()
    optimizer = AdaX(own, lr=0.1)
    before = own[0].detach().clone()
    run(optimizer, own[1:], range(2))
    assert torch.equal(own[0], before)
    assert own[0] not in optimizer.state


def test_schedulers_set_the_rate() -> None:
    own, fixed = make(), make()
    optimizer = AdaX(own, lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    peer = AdaX(fixed, lr=0.4)
    for t in range(3):
        peer.param_groups[0]["lr"] = 0.4 * 0.5**t
        run(optimizer, own, range(t, t + 1))
        run(peer, fixed, range(t, t + 1))
        scheduler.step()
    assert equal(own, fixed)


def test_rates_may_be_tensors() -> None:
    own, fixed = make(), make()
    run(AdaX(own, lr=torch.tensor(0.25)), own, range(2))
    run(AdaX(fixed, lr=0.25), fixed, range(2))
    assert equal(own, fixed)


# -- states ----------------------------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "eps_mode": "raw", "betas": (0.5, 1e-3), "foreach": True},
    {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "fused": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_goes_on_from_a_state_dict(chosen: dict[str, Any], dtype: torch.dtype) -> None:
    own = make(dtype)
    optimizer = AdaX(own, **chosen)
    run(optimizer, own, range(3))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    resumed = AdaX(twins, lr=0.7)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for p, twin in zip(own, twins, strict=True):
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                assert resumed.state[twin][name].dtype == value.dtype == torch.float32
                assert torch.equal(resumed.state[twin][name], value)
    run(optimizer, own, range(3, 6))
    run(resumed, twins, range(3, 6))
    assert equal(own, twins)


def test_loaded_states_are_not_shared() -> None:
    own, twins = make(), make()
    optimizer, other = AdaX(own, lr=0.1), AdaX(twins, lr=0.1)
    run(optimizer, own, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    run(other, twins, range(2, 4))
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[index][name]))


@pytest.mark.parametrize(
    ("first", "then"), [(True, False), (False, True), (None, False), (False, None)]
)
def test_goes_on_after_foreach_changed(first: bool | None, then: bool | None) -> None:
    own = make(torch.float64)
    optimizer = AdaX(own, lr=0.1, foreach=first)
    run(optimizer, own, range(3))
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["foreach"] = then
    changed = AdaX(twins, lr=0.1)
    changed.load_state_dict(state)
    assert changed.param_groups[0]["foreach"] is then
    run(optimizer, own, range(3, 6))
    run(changed, twins, range(3, 6))
    for a, b in zip(own, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies_go_on_alike(how: Callable[[Any], Any]) -> None:
    own = make(torch.bfloat16)
    optimizer = AdaXW(own, lr=0.1)
    run(optimizer, own, range(2))
    twins, twin = how((own, optimizer))
    run(optimizer, own, range(2, 4))
    run(twin, twins, range(2, 4))
    assert type(twin) is AdaXW
    assert equal(own, twins)


def test_state_is_two_numbers_per_parameter() -> None:
    own = [nn.Parameter(torch.randn(s)) for s in [(30, 20), (70,), ()]]
    optimizer = AdaX(own)
    for p in own:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 4 * (30 * 20 + 70 + 1)


# -- gradients that are not finite, and scaled ones ------------------------------------------------


def test_grad_scaler_skips_what_is_not_finite() -> None:
    """And unscales the rest; nothing moves, and nothing enters the state."""
    own, plain = make(), make()
    optimizer, peer = AdaX(own, lr=0.1), AdaX(plain, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for value in (1.0, float("inf"), float("nan"), 2.0):
        for p, q in zip(own, plain, strict=True):
            p.grad = torch.full_like(p, value) * scaler.scale(torch.ones(()))
            q.grad = torch.full_like(q, value)
        scaler.step(optimizer)
        scaler.update()
        if value in (1.0, 2.0):
            peer.step()
    assert {s["step"] for s in optimizer.state.values()} == {2}
    assert equal(own, plain)


# -- 16 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_at_the_end(
    dtype: torch.dtype, chosen: dict[str, Any]
) -> None:
    """One step is that of float32 parameters of the same values, rounded."""
    half = make(dtype)
    single = [nn.Parameter(p.detach().float()) for p in half]
    choice = {"lr": 0.1, "weight_decay": 0.1, **chosen}
    for make_one in (AdaX, AdaXW):
        ours, exact = make_one(half, **choice), make_one(single, **choice)
        for _ in range(3):
            for p, q in zip(half, single, strict=True):
                q.detach().copy_(p.detach())
                p.grad = torch.randn(p.shape).to(dtype) * 100
                q.grad = p.grad.float()
            ours.step()
            exact.step()
            for p, q in zip(half, single, strict=True):
                assert p.dtype == dtype
                assert torch.equal(p, q.to(dtype))
                for name, value in ours.state[p].items():
                    if name != "step":
                        assert value.dtype == torch.float32
                        assert torch.equal(value, exact.state[q][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bears_gradients_whose_square_does_not_fit(dtype: torch.dtype) -> None:
    for size in (1e-7, 6e4):
        p = nn.Parameter(torch.ones(4, 3, dtype=dtype))
        p.grad = torch.full((4, 3), size, dtype=dtype)
        AdaX([p], lr=2.5, eps=1e-30).step()
        assert torch.equal(p, torch.full((4, 3), 0.75, dtype=dtype))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [AdaX, AdaXW])
def test_derivations_are_told_whether_steps_read_the_parameters(cls: Any, decay: float) -> None:
    """If they do not, updates are computed at 0, which saves copies, and are the same."""
    bases = pytest.importorskip("kexue_lookahead.bases")
    lookahead = pytest.importorskip("kexue_lookahead")
    own, reference = make(torch.float64), make(torch.float64)
    derived = lookahead.with_lazy(cls)(own, lr=0.1, weight_decay=decay)
    assert bases.reads_parameters(cls, derived.param_groups[0]) == bool(decay)
    run(derived, own, range(4))
    run(cls(reference, lr=0.1, weight_decay=decay), reference, range(4))
    for left, right in zip(own, reference, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)
