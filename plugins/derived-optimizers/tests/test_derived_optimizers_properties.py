"""One suite for all 2⁶ combinations over every base: neutral settings, resuming, foreach."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kexue_derived_optimizers import (
    with_grad_accumulation,
    with_layer_adaptation,
    with_lazy,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)

SHAPES: list[tuple[int, ...]] = [(6, 4), (5, 3), (4,), ()]

DERIVATIONS: dict[str, Callable[..., Any]] = {
    "decay": with_weight_decay,
    "layers": with_layer_adaptation,
    "schedule": with_piecewise_linear_lr,
    "window": with_grad_accumulation,
    "slow": with_lookahead,
    "lazy": with_lazy,
}
CHOSEN: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay_rate": 0.3},
    "layers": {},
    "schedule": {"lr_schedule": {3: 1.0, 6: 0.25}},
    "window": {"grad_accum_steps": 2},
    "slow": {"slow_steps": 3, "slow_step_size": 0.6},
    "lazy": {},
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay_rate": 0.0},
    "layers": {"layer_adaptation": False},
    "schedule": {"lr_schedule": {0: 1.0}},
    "window": {"grad_accum_steps": 1},
    "slow": {"slow_steps": 1, "slow_step_size": 1.0},
    "lazy": {"lazy": False},
}
_FORMATS = (torch.contiguous_format, torch.channels_last)
SUBSETS = [names for size in range(7) for names in itertools.combinations(DERIVATIONS, size)]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("torch.optim:Adam", {"lr": 0.05}),
    "sgd": ("torch.optim:SGD", {"lr": 0.05, "momentum": 0.8}),
    "adafactor": ("kexue_adafactor:Adafactor", {"lr": 0.05, "beta1": 0.9}),
    "adax": ("kexue_adax:AdaX", {"lr": 0.05}),
}


def make(base: str, names: Sequence[str], own: Any, options: dict[str, Any], **more: Any) -> Any:
    """Derive in the order of the names, and give their options to the constructor."""
    module, _, attribute = BASES[base][0].partition(":")
    cls = getattr(pytest.importorskip(module), attribute)
    for name in names:
        cls = DERIVATIONS[name](cls)
    chosen = {k: v for name in names for k, v in options[name].items()}
    return cls(own, **BASES[base][1], **chosen, **more)


def fused(optimizer: Any) -> dict[str, Any]:
    """Return the argument by which a base takes the kernel that an optimizer has chosen."""
    return {"fused": True} if optimizer.defaults.get("fused") else {}


def start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], calls: range) -> None:
    """Step with gradients that miss some rows, and now and then a tensor."""
    for t in calls:
        generator = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(own):
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            if p.ndim > 1:
                gradient[torch.randperm(len(p), generator=generator)[:2]] = 0
            p.grad = None if (t + i) % 5 == 4 else gradient
        optimizer.step()


def same(left: list[nn.Parameter], right: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("base", BASES)
def test_neutral_settings_are_the_base(base: str, names: tuple[str, ...]) -> None:
    own, plain = start(), start()
    optimizer = make(base, names, own, NEUTRAL)
    run(optimizer, own, range(5))
    peer = make(base, (), plain, {}, **fused(optimizer))
    run(peer, plain, range(5))
    assert same(own, plain)
    assert isinstance(optimizer, type(peer))
    before = start()
    assert not any(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("calls", [1, 5])
def test_resumes_to_the_bit(base: str, names: tuple[str, ...], calls: int) -> None:
    """In the middle of the first window or the third, and of the first cycle of 3 or of 6 calls.

    After one call a parameter has had no gradient yet, and with a window the base has no state.
    """
    own = start(torch.bfloat16 if len(names) % 2 else torch.float32)
    optimizer = make(base, names, own, CHOSEN)
    begun, rest = range(1, 1 + calls), range(1 + calls, 12)
    run(optimizer, own, begun)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twins = copy.deepcopy(own)
    resumed = make(base, names, twins, NEUTRAL)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    again, copied = copy.deepcopy((own, optimizer))
    for each, stepped in ((own, optimizer), (twins, resumed), (again, copied)):
        run(stepped, each, rest)
    assert same(own, twins)
    assert same(own, again)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("base", BASES)
def test_foreach_is_the_loop(base: str, names: tuple[str, ...]) -> None:
    together, looped = start(torch.float64), start(torch.float64)
    run(make(base, names, together, CHOSEN, foreach=True), together, range(9))
    run(make(base, names, looped, CHOSEN, foreach=False), looped, range(9))
    for a, b in zip(together, looped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("names", SUBSETS[::7], ids="+".join)
@pytest.mark.parametrize("base", BASES)
def test_instances_become_what_classes_make(base: str, names: tuple[str, ...]) -> None:
    own, twins = start(), start()
    derived = make(base, names, twins, CHOSEN)
    optimizer: Any = make(base, (), own, {}, **fused(derived))
    for name in names:
        optimizer = DERIVATIONS[name](optimizer, **CHOSEN[name])
    run(optimizer, own, range(7))
    run(derived, twins, range(7))
    assert same(own, twins)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_layer_adaptation_takes_the_fused_kernel_where_that_is_left_open(base: Any) -> None:
    derived = with_layer_adaptation(base)
    assert derived(iter(start()), lr=0.1).defaults["fused"]
    assert derived(params=[{"params": iter(start())}], lr=0.1).param_groups[0]["fused"]
    for how in ({"foreach": True}, {"foreach": False}, {"fused": False}):
        assert not derived(start(), lr=0.1, **how).defaults["fused"]
    assert not derived(start(torch.bfloat16), lr=0.1).defaults["fused"]
    assert not derived([{"params": start(), "foreach": True}], lr=0.1).param_groups[0]["fused"]
    assert not base(start(), lr=0.1).defaults["fused"]
    kernel, loop = start(torch.float64), start(torch.float64)
    run(derived(kernel, lr=0.1), kernel, range(5))
    run(derived(loop, lr=0.1, foreach=False), loop, range(5))
    torch.testing.assert_close(kernel, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "base", ["kexue_adax:AdaX", "kexue_adax:AdaXW", "kexue_momentum:Momentum"], ids=str
)
def test_bases_that_step_apart_take_the_same_steps(base: str) -> None:
    """Of a subclass that does not say so all parameters are stepped at once."""
    module, _, attribute = base.partition(":")
    walked = getattr(pytest.importorskip(module), attribute)
    reads = staticmethod(walked.reads_parameters)
    whole = type(attribute, (walked,), {"steps_apart": False, "reads_parameters": reads})
    assert walked.steps_apart
    found = []
    for cls in (walked, whole):
        generator = torch.Generator().manual_seed(1)
        shapes = [(700, 1000), (1200, 1000), (3,), (1100, 1000), (50,)]
        own = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        optimizer = with_layer_adaptation(cls)(own, lr=0.01)
        run(optimizer, own, range(4))
        found.append([*own, *(x for p in own for x in optimizer.state[p].values())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by how many tensors SGD's fused kernel steps, whenever it does."""
    seen: list[int] = []
    kernel = torch._fused_sgd_

    def counted(params: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        seen.append(len(params))
        kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_sgd_", counted)
    return seen


_NESTEROV = {"momentum": 0.8, "nesterov": True}


@pytest.mark.parametrize(
    ("derive", "options"),
    [
        (with_weight_decay, {}),
        (with_weight_decay, _NESTEROV),
        (with_layer_adaptation, _NESTEROV),
        (with_layer_adaptation, {"maximize": True}),
        (partial(with_lookahead, slow_steps=100), {}),  # which mixes by that kernel, too
        (partial(with_lookahead, slow_steps=100), {"momentum": 0.8}),
    ],
)
def test_sgd_takes_its_kernel_for_a_step_where_that_is_left_open(
    derive: Callable[..., Any], options: dict[str, Any], kernels: list[int]
) -> None:
    derived = derive(torch.optim.SGD)
    kernel, loop = start(torch.float64), start(torch.float64)
    optimizer = derived(kernel, lr=0.05, **options)
    run(optimizer, kernel, range(9))
    assert kernels
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0
    kernels.clear()
    run(derived(loop, lr=0.05, **options, foreach=False), loop, range(9))
    for how in ({"foreach": True}, {"fused": False}):
        own = start()
        run(derived(own, lr=0.05, **options, **how), own, range(2))
    half = start(torch.bfloat16)
    run(derived(half, lr=0.05, **options), half, range(2))
    own = start()
    run(derive(torch.optim.SGD)([{"params": own, "foreach": True}], lr=0.05), own, range(2))
    assert not kernels
    torch.testing.assert_close(kernel, loop, rtol=1e-10, atol=1e-12)


_RATE = torch.tensor(0.05, dtype=torch.float64)


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"weight_decay": 0.1}, False),
        ({"maximize": True}, False),
        ({"momentum": 0.8}, True),
        ({"momentum": 0.8, "weight_decay": 0.1}, True),
        ({"momentum": 0.8, "lr": _RATE}, True),
        ({"momentum": 0.8, "dampening": 0.3}, False),
        ({"momentum": 0.8, "maximize": True}, False),
        (_NESTEROV, False),
    ],
    ids=str,
)
def test_layer_adaptation_takes_updates_where_sgd_keeps_them(
    options: dict[str, Any], kept: bool, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD itself is not asked to step then. All is as SGD's own steps, cut to their length."""
    large = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (30000, 20000)]
    own, plain = ([*start(torch.float64), *map(nn.Parameter, copy.deepcopy(large))] for _ in "ab")
    given = {"lr": 0.05, **options}
    optimizer = with_layer_adaptation(torch.optim.SGD)(own, **given, **how)
    peer = torch.optim.SGD(plain, **given)
    step: Any = torch.optim.SGD.step
    asked: list[bool] = []

    def told(self: torch.optim.Optimizer) -> None:
        asked.extend(p.grad is not None for group in self.param_groups for p in group["params"])
        step(self)

    for t in range(9):
        before = copy.deepcopy(plain)
        run(peer, plain, range(t, t + 1))
        for p, old in zip(plain, before, strict=True):
            update, length = p.data - old.data, old.data.norm()
            if update.norm() > 0:
                p.data = old.data + 0.05 * length * update / update.norm()
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", told)
            run(optimizer, own, range(t, t + 1))
    assert any(asked) is not kept
    torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-11)
    for p, q in zip(own, plain, strict=True):
        assert optimizer.state[p].keys() == peer.state[q].keys()
        for name, value in optimizer.state[p].items():
            torch.testing.assert_close(value, peer.state[q][name], rtol=1e-9, atol=1e-11)


def test_updates_that_sgd_keeps_are_not_written_to() -> None:
    """Where decay comes after layer adaptation, in the same group or in another one."""
    own, plain = start(torch.float64), start(torch.float64)
    derived: Any = with_weight_decay(with_layer_adaptation(torch.optim.SGD), weight_decay_rate=0.1)
    groups = [{"params": own[:2]}, {"params": own[2:], "weight_decay_rate": 0.0}]
    optimizer = derived(groups, lr=0.05, momentum=0.8)
    peer = torch.optim.SGD(plain, lr=0.05, momentum=0.8)
    for o, params in ((optimizer, own), (peer, plain)):
        run(o, params, range(9))
    for p, q in zip(own, plain, strict=True):
        found, wanted = (o.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (peer, q)))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("derive", "neutral"),
    [
        (with_weight_decay, {"weight_decay_rate": 0.0}),
        (with_layer_adaptation, {"layer_adaptation": False}),
        (with_lookahead, {"slow_step_size": 1.0}),
    ],
)
def test_sgd_keeps_its_loop_where_nothing_is_derived(
    derive: Callable[..., Any], neutral: dict[str, Any], kernels: list[int]
) -> None:
    own = start()
    optimizer = derive(torch.optim.SGD)([{"params": own, **neutral}])
    run(optimizer, own, range(2))
    assert not kernels


@pytest.mark.parametrize("how", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("derive", [with_weight_decay, with_layer_adaptation])
def test_a_parameter_may_have_its_first_gradient_later(
    derive: Callable[..., Any], how: dict[str, Any]
) -> None:
    """Where a layer is unfrozen, torch's fused SGD by itself fails."""
    own, looped = start(torch.float64), start(torch.float64)
    for params, options in ((own, how), (looped, {"foreach": False})):
        optimizer = derive(torch.optim.SGD)(params, lr=0.05, momentum=0.8, **options)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 + i) if t >= i else None
            optimizer.step()
    torch.testing.assert_close(own, looped, rtol=1e-10, atol=1e-12)


def test_decay_is_what_it_says_over_sgd_without_momentum() -> None:
    own, wanted = start(torch.float64), start(torch.float64)
    derived: Any = with_weight_decay(torch.optim.SGD, weight_decay_rate=0.3)
    optimizer = derived(own, lr=0.05)
    for t in range(4):
        for p, plain in zip(own, wanted, strict=True):
            p.grad = torch.full_like(p, 0.5 - t)
            plain.data = plain.data * (1 - 0.05 * 0.3) - 0.05 * p.grad
        optimizer.step()
    torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("base", ["adam", "adamw", "sgd", "plain sgd"])
@pytest.mark.parametrize("derive", [with_weight_decay, with_layer_adaptation, with_lookahead])
@pytest.mark.parametrize("gaps", [False, True])
def test_gradients_may_lie_in_memory_otherwise_than_their_parameters(
    derive: Callable[..., Any], base: str, how: dict[str, Any], gaps: bool
) -> None:
    """Torch's fused kernels by themselves are silently wrong there, on a CPU."""
    options = {} if "adam" in base else {"momentum": 0.8 * (base == "sgd")}
    found = []
    for chosen in (how, {"foreach": False}):
        table = torch.arange(24.0, dtype=torch.float64).view(4, 6)
        before = table.clone()
        turned = nn.Parameter(table[:, ::2] if gaps else table.t())
        image = nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
        optimizer = derive(base.removeprefix("plain "))(
            [turned, image], lr=0.05, **options, **chosen
        )
        for t in range(5):
            for p in (turned, image):
                count = torch.arange(float(p.numel()), dtype=p.dtype).view(p.shape)
                # now as autograd leaves them, now as assigned
                p.grad = torch.empty_like(p).copy_(count.sin()) if t % 2 else count.cos()
            optimizer.step()
        assert not gaps or torch.equal(table[:, 1::2], before[:, 1::2])
        found.append([turned.detach().clone(), image.detach().clone()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("back", [False, True])
def test_states_may_come_from_parameters_that_lie_otherwise(base: str, back: bool) -> None:
    options = {"momentum": 0.8} if base == "sgd" else {}
    found = []
    for how in ({"fused": True}, {"foreach": False}):
        count = torch.arange(96.0).view(2, 3, 4, 4)
        images = [nn.Parameter(count.sin().contiguous(memory_format=f)) for f in _FORMATS]
        derived = with_lookahead(base)
        old, new = (derived([p], lr=0.05, **options, **how) for p in images[:: -1 if back else 1])
        for optimizer in (old, new):
            (own,) = optimizer.param_groups[0]["params"]
            if optimizer is new:
                new.load_state_dict(old.state_dict())
            for _ in range(3):
                own.grad = torch.empty_like(own).copy_(count.cos())
                optimizer.step()
        found.append([p.detach().clone() for p in images])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
