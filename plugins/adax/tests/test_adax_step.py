"""The step: beside the formulas of the post and of the paper's code, at the edges, and refusals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kexue_adax.fused as fused_module
from kexue.core import ArgumentError
from kexue_adax import AdaX, AdaXW, from_official, stepping
from kexue_adax.decay import adafactor_share, adam_share, adax_share

SHAPES: list[tuple[int, ...]] = [(7, 5), (7, 5), (3,), (), (2, 3, 4), (40, 30)]
PATHS: dict[str, dict[str, Any]] = {
    "default": {}, "fused": {"fused": True}, "lists": {"fused": False},
    "foreach": {"foreach": True}, "one by one": {"foreach": False},
}  # fmt: skip


def parameters(
    shapes: list[Any] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex128 if dtype.is_complex else torch.float64
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=kind).to(dtype))
        for shape in shapes
    ]


def give_gradients(own: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in own:
        kind = torch.complex128 if p.is_complex() else torch.float64
        drawn = torch.randn(p.shape, generator=generator, dtype=kind) * scale
        p.grad = drawn.to(p.dtype)


class Reference:
    """The post's eq. (1) as it is written, with the growing v; ε where the codes have it, too."""

    def __init__(self, theta: Tensor, **chosen: Any) -> None:
        self.theta = theta.detach().clone()
        self.s: dict[str, Any] = {
            "lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.0, "maximize": False,
            "decoupled_weight_decay": False, "eps_mode": "inside",
        } | chosen  # fmt: skip
        self.m, self.v, self.t = torch.zeros_like(self.theta), torch.zeros_like(self.theta), 0

    def step(self, g: Tensor) -> None:
        s, (beta1, beta2) = self.s, self.s["betas"]
        self.t += 1
        if s["maximize"]:
            g = -g
        if s["decoupled_weight_decay"]:
            self.theta = self.theta * (1 - s["lr"] * s["weight_decay"])
        else:
            g = g + s["weight_decay"] * self.theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = (1 + beta2) * self.v + beta2 * g * g
        grown = (1 + beta2) ** self.t - 1
        if s["eps_mode"] == "inside":
            self.theta = self.theta - s["lr"] * self.m / (self.v / grown + s["eps"]).sqrt()
        elif s["eps_mode"] == "outside":
            self.theta = self.theta - s["lr"] * self.m / ((self.v / grown).sqrt() + s["eps"])
        else:
            rate = s["lr"] * math.sqrt(grown)
            self.theta = self.theta - rate * self.m / (self.v.sqrt() + s["eps"])


def greatest_difference(left: list[Any], right: list[Any]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int, **how: Any) -> None:
    for t in range(steps):
        give_gradients(own, t, **how)
        optimizer.step()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05, "betas": (0.5, 0.02)},
    {"lr": 0.05, "betas": (0.0, 1e-4), "eps": 0.3},
    {"lr": 0.05, "eps": 0.3, "eps_mode": "outside", "weight_decay": 0.1},
    {"lr": 0.05, "eps": 0.003, "eps_mode": "raw", "weight_decay": 0.1, "maximize": True},
    {"lr": 0.05, "eps": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"lr": 0.05, "weight_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_matches_the_post(chosen: dict[str, Any], path: str) -> None:
    own = parameters()
    references = [Reference(p, **chosen) for p in own]
    optimizer = AdaX(own, **chosen, **PATHS[path])
    for t in range(8):
        give_gradients(own, t)
        for p, reference in zip(own, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad)
        optimizer.step()
    assert greatest_difference(own, [r.theta for r in references]) < 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_float32_stays_near_the_paper_over_2000_steps(path: str) -> None:
    (p,) = own = parameters([(20, 3)], torch.float32)
    reference = Reference(p.double(), eps_mode="raw")
    optimizer = AdaX(own, eps_mode="raw", **PATHS[path])
    for t in range(2000):
        give_gradients(own, t)
        assert p.grad is not None
        reference.step(p.grad.double())
        optimizer.step()
    assert greatest_difference(own, [reference.theta]) < 5e-6


def test_adaxw_is_adax_with_the_recommended_rate_and_decay() -> None:
    ours, same = parameters(), parameters()
    run(AdaXW(ours), ours, 3)
    chosen: dict[str, Any] = {"lr": 5e-3, "weight_decay": 5e-2, "decoupled_weight_decay": True}
    run(AdaX(same, **chosen), same, 3)
    assert greatest_difference(ours, same) == 0
    assert greatest_difference(ours, parameters()) > 1e-3


def test_the_fused_kernel_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    true_step = fused_module.fused_step

    def counted(weights: list[Tensor], *others: Any, **settings: Any) -> None:
        calls.append(len(weights))
        true_step(weights, *others, **settings)

    monkeypatch.setattr(stepping, "fused_step", counted)
    for chosen, wanted in (
        ({}, [3, 3]),  # ε inside: not in the first of three steps
        ({"eps_mode": "outside"}, [3] * 3),
        ({"foreach": True}, []),
        ({"fused": False}, []),
    ):
        calls.clear()
        own = parameters([(4, 3), (3,), ()])
        run(AdaX(own, **chosen), own, 3)
        assert calls == wanted


@pytest.mark.parametrize("broken", ["missing", "changed", "other arguments"])
def test_goes_without_the_fused_kernel(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is private: torch may take it away, or let it compute something else."""
    with_it, without = parameters(), parameters()
    run(AdaX(with_it, lr=0.1), with_it, 3)
    if broken == "missing":
        monkeypatch.delattr(torch, "_fused_adamw_")
    else:
        called: Callable[..., None] = (
            (lambda *a, **k: None) if broken == "changed" else (lambda weights: None)
        )
        monkeypatch.setattr(torch, "_fused_adamw_", called)
    fused_module.has_fused.cache_clear()
    try:
        assert not fused_module.has_fused("cpu")
        run(AdaX(without, lr=0.1), without, 3)
    finally:
        fused_module.has_fused.cache_clear()
    assert greatest_difference(with_it, without) < 1e-14


def test_other_devices_are_stepped_by_lists() -> None:
    assert not fused_module.has_fused("meta")


@pytest.mark.parametrize("most", [1, 7, 2**18])
def test_lists_compute_the_same_in_pieces(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters(), parameters()
    run(AdaX(whole, lr=0.1, foreach=True), whole, 3)
    monkeypatch.setitem(stepping._TOGETHER, "cpu", most)
    run(AdaX(cut, lr=0.1, foreach=True), cut, 3)
    assert greatest_difference(whole, cut) == 0


# -- the decay -------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=200)
@given(step=st.integers(1, 10**8), beta2=st.floats(1e-6, 0.1))
def test_decays_go_from_0_to_1(step: int, beta2: float) -> None:
    now, then = adax_share(step, beta2), adax_share(step + 1, beta2)
    assert adax_share(1, beta2) == 1
    assert 0 <= then <= now <= 1
    assert now <= (1 + 1e-9) / step  # AdaX remembers at least as well as a plain mean


def test_shares_are_exact_for_small_and_large_steps() -> None:
    from fractions import Fraction

    beta = Fraction(1, 10000)
    for step in (1, 2, 3, 50, 3000):
        exact = beta / ((1 + beta) ** step - 1)
        assert adax_share(step) == pytest.approx(float(exact), rel=1e-13)
    assert adax_share(10**9) < 1e-300
    assert adam_share(1, 0.9) == pytest.approx(1)
    assert adam_share(3, 0.9) == pytest.approx(0.1 / (1 - 0.9**3))
    assert adafactor_share(16, 0.5) == 0.25


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [10**4, 10**6, 10**7, 10**9])
def test_bears_any_number_of_steps(step: int, dtype: torch.dtype, path: str) -> None:
    """Where v would be infinite; v̂ of constant gradients stays what it is."""
    (p,) = own = parameters([(30,)], dtype)
    before = p.detach().clone()
    for eps_mode in ("inside", "outside", "raw"):
        optimizer = AdaX(own, lr=0.5, eps_mode=eps_mode, **PATHS[path])
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
        optimizer.state[p]["step"] = step
        for _ in range(50):
            optimizer.step()
        found = optimizer.state[p]["exp_avg_sq_hat"]
        torch.testing.assert_close(found, torch.full_like(found, 9.0), rtol=1e-5, atol=0)
        assert p.isfinite().all()
        assert (p < before).all()


def test_weights_add_up_to_one_in_float32() -> None:
    """v̂ of a constant gradient does not drift over 20 000 steps, and steps stay α."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdaX([p], lr=1e-4, eps_mode="outside")
    p.grad = torch.tensor([0.1, 0.3, 1.7, 1000.0])
    for _ in range(20_000):
        optimizer.step()
    found = optimizer.state[p]["exp_avg_sq_hat"]
    torch.testing.assert_close(found, p.grad.square(), rtol=1e-4, atol=0)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps_mode", ["inside", "outside", "raw"])
def test_zero_gradients_move_nothing(eps_mode: str, dtype: torch.dtype, path: str) -> None:
    own = parameters(dtype=dtype)
    before = [p.detach().clone() for p in own]
    optimizer = AdaX(own, lr=0.1, eps=1e-30, eps_mode=eps_mode, **PATHS[path])
    for step in (0, 1, 2, 10**7):
        for p in own:
            p.grad = torch.zeros_like(p)
            if step:
                optimizer.state[p]["step"] = step
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_complex_numbers_are_pairs(path: str) -> None:
    own = parameters(dtype=torch.complex64)
    pairs = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in own]
    chosen = {"lr": 0.1, "weight_decay": 0.1, **PATHS[path]}
    left, right = AdaX(own, **chosen), AdaX(pairs, **chosen)
    for t in range(3):
        give_gradients(own, t)
        for p, q in zip(own, pairs, strict=True):
            assert p.grad is not None
            q.grad = torch.view_as_real(p.grad)
        left.step()
        right.step()
    assert greatest_difference([torch.view_as_real(p.detach()) for p in own], pairs) < 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_takes_parameters_in_any_order_of_memory(path: str) -> None:
    dense = parameters([(4, 3, 5, 6), (6, 5), (7, 3)])
    strided = [nn.Parameter(p.detach().clone()) for p in dense]
    strided[0] = nn.Parameter(strided[0].detach().clone(memory_format=torch.channels_last))
    strided[1] = nn.Parameter(strided[1].detach().t().contiguous().t())
    for own in (dense, strided):
        run(AdaX(own, lr=0.1, **PATHS[path]), own, 3)
    assert greatest_difference(dense, strided) < 1e-14
    turned = parameters([(7, 3)])
    optimizer = AdaX(turned, lr=0.1, **PATHS[path])
    for t in range(3):
        give_gradients(turned, t)
        grad = turned[0].grad
        assert grad is not None
        turned[0].grad = grad.t().contiguous().t()
        optimizer.step()
    straight = parameters([(7, 3)])
    run(AdaX(straight, lr=0.1), straight, 3)
    assert greatest_difference(straight, turned) < 1e-14


def test_scratch_memory_is_bounded_where_there_is_any() -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert stepping.at_once(single, fused=True) == math.inf  # which needs none
    assert stepping.at_once(half, fused=True) == stepping.at_once(single, fused=False) == 2**18


def test_nothing_of_empty_tensors() -> None:
    own = parameters([(0,), (0, 3), (2, 2)])
    run(AdaX(own, lr=0.1), own, 2)
    assert own[2].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_not_modified(path: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        own = parameters(dtype=dtype)
        optimizer = AdaX(own, lr=0.1, weight_decay=0.1, maximize=True, **PATHS[path])
        give_gradients(own, 0)
        before = [p.grad.clone() for p in own if p.grad is not None]
        for _ in range(2):
            optimizer.step()
        assert greatest_difference([p.grad for p in own], before) == 0


@settings(derandomize=True, deadline=None, max_examples=40)
@given(exponent=st.integers(-4, 9), seed=st.integers(0, 99))
def test_scale_of_the_loss_does_not_matter(exponent: int, seed: int) -> None:
    ours, scaled = (parameters(seed=seed) for _ in range(2))
    run(AdaX(ours, lr=0.01, eps=1e-30), ours, 4)
    run(AdaX(scaled, lr=0.01, eps=1e-30), scaled, 4, scale=10.0**exponent)
    assert greatest_difference(ours, scaled) < 1e-9


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6), permuted=st.permutations(range(6)))
def test_order_of_parameters_does_not_matter(seed: int, steps: int, permuted: list[int]) -> None:
    ours, mixed = (parameters(seed=seed) for _ in range(2))
    run(AdaX(ours, lr=0.1), ours, steps)
    optimizer = AdaX([mixed[i] for i in permuted], lr=0.1)
    run(optimizer, mixed, steps)
    assert greatest_difference(ours, mixed) == 0


# -- checkpoints of the paper's code ---------------------------------------------------------------


def theirs(own: list[nn.Parameter], states: list[Reference], **group: Any) -> dict[str, Any]:
    found = {
        i: {"step": s.t, "exp_avg": s.m.clone(), "exp_avg_sq": s.v.clone()}
        for i, s in enumerate(states)
    }
    ids = list(range(len(own)))
    return {"state": found, "param_groups": [{**group, "params": ids}]}


@pytest.mark.parametrize("decoupled", [False, True])
def test_goes_on_from_the_papers_code(decoupled: bool) -> None:
    group = {"lr": 0.01, "betas": (0.9, 1e-3), "eps": 1e-3, "weight_decay": 0.1}
    own = parameters()
    states = [Reference(p, **group, eps_mode="raw", decoupled_weight_decay=decoupled) for p in own]
    for t in range(10):
        give_gradients(own, t)
        for p, state in zip(own, states, strict=True):
            assert p.grad is not None
            state.step(p.grad)
        if t == 4:
            twins = [nn.Parameter(s.theta.clone()) for s in states]
            optimizer = AdaX(twins)
            stored = theirs(own, states, **group)
            kept = stored["state"][0]["exp_avg_sq"].clone()
            optimizer.load_state_dict(from_official(stored, decoupled_weight_decay=decoupled))
            assert torch.equal(stored["state"][0]["exp_avg_sq"], kept)
        elif t > 4:
            give_gradients(twins, t)
            optimizer.step()
    assert greatest_difference(twins, [s.theta for s in states]) < 1e-13


def test_rejects_checkpoints_that_it_cannot_go_on_from() -> None:
    group = {"lr": 0.01, "betas": (0.9, 1e-3), "eps": 1e-3, "weight_decay": 0.1}
    own = parameters([(2,)])
    state = Reference(own[0])
    state.step(torch.ones(2, dtype=torch.float64))
    stored = theirs(own, [state], **group)
    with pytest.raises(ArgumentError, match=r"exp_avg_sq_hat.*from_official") as caught:
        AdaX(own).load_state_dict(stored)
    assert caught.value.argument == "state_dict"
    state.v[0] = math.inf
    with pytest.raises(ArgumentError, match=r"outgrown torch\.float64"):
        from_official(theirs(own, [state], **group))
    del stored["state"][0]["exp_avg"]
    with pytest.raises(ArgumentError, match=r"exp_avg .*Found \['exp_avg_sq', 'step'\]"):
        from_official(stored)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [AdaX, AdaXW])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1), ("lr", math.inf), ("lr", math.nan), ("lr", torch.ones(2)), ("eps", 0.0),
        ("eps", -1.0), ("eps", math.inf), ("betas", (1.0, 1e-4)), ("betas", (0.9, 0.0)),
        ("betas", (0.9, 1.0)), ("betas", (0.9, -1e-4)), ("betas", 0.9), ("betas", (0.9,)),
        ("betas", ("0.9", "1e-4")), ("weight_decay", -0.1), ("eps_mode", "beside"),
    ],
)  # fmt: skip
def test_rejects_settings_out_of_range(make: Any, name: str, value: Any) -> None:
    message = f"`{name}` of {make.__name__} must be .* Found"
    with pytest.raises(ArgumentError, match=message) as caught:
        make(parameters(), **{name: value})
    assert caught.value.argument == name
    optimizer = make(parameters())
    with pytest.raises(ArgumentError, match=message):
        optimizer.add_param_group({"params": parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_rejects_contradictions() -> None:
    with pytest.raises(ArgumentError, match=r"`fused` .* foreach=True") as caught:
        AdaX(parameters(), foreach=True, fused=True)
    assert caught.value.argument == "fused"


@pytest.mark.parametrize("make", [AdaX, AdaXW])
def test_warns_of_a_decay_in_place_of_a_growth_rate(make: Any) -> None:
    with pytest.warns(UserWarning, match=r"growth rate, typically 1e-4. Found 0.999") as caught:
        make(parameters(), betas=(0.9, 0.999))
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(parameters(), betas=(0.9, 0.05))
    with pytest.warns(UserWarning, match="0.99,") as caught:
        optimizer.add_param_group({"params": parameters(), "betas": (0.9, 0.99)})
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("given_as", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_rejects_no_parameters(given_as: Any) -> None:
    with pytest.raises(ArgumentError, match="Found none") as caught:
        AdaX(given_as)
    assert caught.value.argument == "params"


def test_rejects_a_parameter_that_comes_twice() -> None:
    (p,) = parameters([(3,)])
    for given_as in ([p, p], [{"params": [p]}, {"params": p}], [("a", p), ("b", p)]):
        with pytest.raises(ArgumentError, match=r"different.*\[3\] twice") as caught:
            AdaX(given_as)
        assert caught.value.argument == "params"


def test_rejects_sparse_gradients_before_anything_moves() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = AdaX([{"params": [dense]}, {"params": table.parameters()}])
    with pytest.raises(ArgumentError, match=r"dense.*sparse_coo.*\[5, 3\].*sparse=False") as caught:
        optimizer.step()
    assert caught.value.argument == "params"
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state
