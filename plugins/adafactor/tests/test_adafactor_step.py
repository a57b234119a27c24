"""The step: beside the paper's formulas and torch's Adafactor, at the edges, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue_adafactor import Adafactor, stacks

SHAPES = [(7, 5), (7, 5), (3,), (), (2, 3, 4, 5), (3,), (1, 6), (6, 1), (), (40, 30), (4, 1, 9)]


def parameters(
    shapes: list[Any] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def give_gradients(parameters: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = gradient.to(p.dtype)


class Reference:
    """The paper's algorithms 4 to 6 for one parameter, V̂ and u formed as they are written."""

    def __init__(self, parameter: Tensor, **settings: Any) -> None:
        self.theta = parameter.detach().clone()
        self.settings = {
            "lr": 1e-3, "beta1": None, "decay": 0.8, "eps1": 1e-30, "eps2": 1e-3, "clip": 1.0,
            "scale_parameter": True, "relative_step": False, "warmup_init": False,
            "weight_decay": 0.0, "maximize": False, "dims": (-2, -1),
        } | settings  # fmt: skip
        self.t = 0
        self.v: list[Tensor] = []
        self.m = torch.zeros_like(self.theta)

    def rate(self) -> float:
        lr, t = self.settings["lr"], self.t
        if not self.settings["relative_step"]:
            return float(lr)
        cap = 1e-2 if lr is None else lr
        if self.settings["warmup_init"]:
            cap = min(cap, 1e-6 * t)
        rate = min(float(cap), 1 / math.sqrt(t))
        return rate if lr is not None or self.settings["scale_parameter"] else 0.05 * rate

    def step(self, gradient: Tensor) -> None:
        s = self.settings
        self.t += 1
        if s["maximize"]:
            gradient = -gradient
        beta2 = 1 - self.t ** -s["decay"]
        squared = gradient**2 + s["eps1"]
        if self.theta.ndim < 2 or s["dims"] is None:
            now = [squared]
        else:
            row, column = s["dims"]
            now = [squared.sum(column, keepdim=True), squared.sum(row, keepdim=True)]
        self.v = [beta2 * a + (1 - beta2) * b for a, b in zip(self.v or now, now, strict=True)]
        if len(self.v) == 1:
            estimate = self.v[0]
        else:
            estimate = self.v[0] * self.v[1] / self.v[0].sum(s["dims"][0], keepdim=True)
        u = gradient / estimate.sqrt()
        if s["clip"] is not None:
            u = u / max(1.0, float(u.square().mean().sqrt()) / s["clip"])
        rms = float(self.theta.square().mean().sqrt())
        change = self.rate() * (max(s["eps2"], rms) if s["scale_parameter"] else 1.0) * u
        if s["beta1"] is not None:
            self.m = change = s["beta1"] * self.m + (1 - s["beta1"]) * change
        self.theta = (1 - self.rate() * s["weight_decay"]) * self.theta - change


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int, **how: Any) -> None:
    for t in range(steps):
        give_gradients(own, t, **how)
        optimizer.step()


def greatest_difference(left: list[Any], right: list[Any]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": None, "relative_step": True},
    {"lr": None, "relative_step": True, "warmup_init": True},
    {"lr": None, "relative_step": True, "scale_parameter": False},
    {"lr": 0.3, "relative_step": True},
    {"lr": 0.05, "beta1": 0.9},
    {"lr": 0.05, "clip": None, "decay": 0.5},
    {"lr": 0.05, "clip": 0.3, "eps2": 2.0},
    {"lr": 0.05, "eps1": 0.1, "scale_parameter": False},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "maximize": True, "beta1": 0.5, "weight_decay": 0.1},
]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_matches_the_paper(chosen: dict[str, Any], foreach: bool | None) -> None:
    own = parameters()
    references = [Reference(p, **chosen) for p in own]
    optimizer = Adafactor(own, foreach=foreach, **chosen)
    for t in range(6):
        give_gradients(own, t)
        for p, reference in zip(own, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad)
        optimizer.step()
    assert greatest_difference(own, [r.theta for r in references]) < 1e-14


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((5, 6, 2, 2), (0, 1)), ((2, 6, 5), (1, 2)), ((6, 2, 5), (0, 2)), ((4, 4, 4), (1, 2)),
        ((3, 9), (0, 1)), ((2, 9), None), ((2, 2, 9), None),
    ],
)  # fmt: skip
def test_factors_the_largest_dimensions(
    shape: tuple[int, ...], dims: tuple[int, int] | None, foreach: bool
) -> None:
    own = parameters([shape, shape])
    references = [Reference(p, lr=0.1, dims=dims, beta1=0.5) for p in own]
    optimizer = Adafactor(
        own, lr=0.1, beta1=0.5, factor_dims="largest", min_dim_to_factor=3, foreach=foreach
    )
    for t in range(4):
        give_gradients(own, t)
        for p, reference in zip(own, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad)
        optimizer.step()
    assert greatest_difference(own, [r.theta for r in references]) < 1e-14
    factored = {name for name in optimizer.state[own[0]] if name in {"row", "column"}}
    assert bool(factored) is (dims is not None)


@pytest.mark.parametrize("foreach", [True, False])
def test_matches_torch_where_they_agree(foreach: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Adafactor(ours, lr=1e-2, relative_step=True, weight_decay=0.1)
    peer = torch.optim.Adafactor(theirs, lr=1e-2, weight_decay=0.1, foreach=foreach)
    run(optimizer, ours, 20)
    run(peer, theirs, 20)
    assert greatest_difference(ours, theirs) < 1e-14
    state, other = optimizer.state[ours[0]], peer.state[theirs[0]]
    torch.testing.assert_close(state["row"], other["row_var"].squeeze(-1))
    torch.testing.assert_close(state["column"], other["col_var"].squeeze(-2))


def test_float32_matches_torch() -> None:
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    run(Adafactor(ours, lr=1e-2, relative_step=True), ours, 10)
    run(torch.optim.Adafactor(theirs, lr=1e-2), theirs, 10)
    assert greatest_difference(ours, theirs) < 2e-6


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize(
    "shared",
    [
        {"lr": 1e-2, "scale_parameter": False, "relative_step": False},
        {"lr": 1e-2, "scale_parameter": True, "relative_step": False},
        {"lr": None, "scale_parameter": True, "relative_step": True},
        {"lr": None, "scale_parameter": True, "relative_step": True, "warmup_init": True},
    ],
)
def test_matches_transformers_where_they_agree(shared: dict[str, Any], beta1: float | None) -> None:
    peer = pytest.importorskip("transformers.optimization").Adafactor
    ours, theirs = parameters(), parameters()
    run(Adafactor(ours, beta1=beta1, **shared), ours, 20)
    run(peer(theirs, beta1=beta1, **shared), theirs, 20)
    assert greatest_difference(ours, theirs) < 1e-12


def test_differs_from_torch_for_tiny_gradients() -> None:
    """Theirs keeps √V̂ above 1.2e-7 in float32: such gradients hardly move."""
    moved = []
    for make in (Adafactor, torch.optim.Adafactor):
        p = nn.Parameter(torch.ones(4, 4))
        p.grad = torch.full((4, 4), 1e-12)
        make([p], lr=0.1).step()
        moved.append(float((1 - p).abs().max().detach()))
    assert moved[0] == pytest.approx(0.1, rel=1e-6)
    assert moved[1] < 1e-3


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamps_like_torch(dtype: torch.dtype, foreach: bool) -> None:
    """With its ε₁ where it has it, also for gradients far below, and matrices of kernels' size."""
    shapes = [*SHAPES, (4, 5, 3, 3)]
    ours, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    chosen: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = Adafactor(ours, relative_step=True, eps_mode="clamp", foreach=foreach, **chosen)
    peer: torch.optim.Optimizer = torch.optim.Adafactor(theirs, foreach=False, **chosen)
    for t, scale in enumerate([1e-12, 1e-7, 1.0, 1e-9, 1e-16]):
        for own in (ours, theirs):
            give_gradients(own, t, scale)
        optimizer.step()
        peer.step()
    assert greatest_difference(ours, theirs) < 40 * torch.finfo(dtype).eps


def test_clamping_reduces_to_adding_for_large_gradients() -> None:
    results = []
    for mode in ("add", "clamp"):
        own = parameters()
        run(Adafactor(own, lr=0.05, beta1=0.9, eps_mode=mode), own, 5)
        results.append(own)
    assert greatest_difference(*results) < 1e-14


def test_clamps_at_the_eps_that_is_given() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full((4, 4), 1e-3)
    Adafactor([p], lr=0.1, eps_mode="clamp", eps1=1e-2).step()
    torch.testing.assert_close(1 - p.detach(), torch.full((4, 4), 0.01), rtol=1e-4, atol=0)


def test_foreach_moves_whatever_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks that are cut by the limit on their size compute the same."""
    results = []
    for limit in (1, 80, 2**20):
        monkeypatch.setitem(stacks._LIMITS, "cpu", stacks._Limits(limit, limit))
        own = parameters([(7, 5)] * 5 + [(3,)] * 3)
        run(Adafactor(own, lr=0.1, beta1=0.9), own, 3)
        results.append(own)
    assert greatest_difference(results[0], results[2]) < 1e-15
    assert greatest_difference(results[1], results[2]) < 1e-15


# -- properties ------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    clip=st.floats(0.1, 2.0),
    exponent=st.integers(-15, 15),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_steps_are_clipped(
    shape: tuple[int, ...], clip: float, exponent: int, steps: int, seed: int
) -> None:
    """RMS(θ_t − θ_{t−1}) is at most α d max(ε₂, RMS(θ))."""
    (p,) = own = parameters([shape], torch.float32, seed)
    optimizer = Adafactor(own, lr=0.5, clip=clip, eps2=0.0)
    for t in range(steps):
        give_gradients(own, seed + t, 10.0**exponent)
        before = p.detach().double()
        optimizer.step()
        size = (p.detach().double() - before).square().mean().sqrt()
        assert size <= 0.5 * clip * before.square().mean().sqrt() * (1 + 1e-5)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(exponent=st.integers(-9, 9), seed=st.integers(0, 99))
def test_scale_of_the_loss_does_not_matter(exponent: int, seed: int) -> None:
    ours, scaled = (parameters(dtype=torch.float32, seed=seed) for _ in range(2))
    run(Adafactor(ours, lr=0.01), ours, 4)
    run(Adafactor(scaled, lr=0.01), scaled, 4, scale=10.0**exponent)
    assert greatest_difference(ours, scaled) < 1e-5


@settings(derandomize=True, deadline=None, max_examples=40)
@given(exponent=st.integers(-3, 3), seed=st.integers(0, 99))
def test_steps_are_relative_to_the_parameter(exponent: int, seed: int) -> None:
    """θ → s θ gives s times the trajectory."""
    scale = 10.0**exponent
    ours, scaled = (parameters(seed=seed) for _ in range(2))
    with torch.no_grad():
        for p in scaled:
            p.mul_(scale)
    run(Adafactor(ours, lr=0.1, eps2=0.0), ours, 4)
    run(Adafactor(scaled, lr=0.1, eps2=0.0), scaled, 4)
    assert greatest_difference([scale * p for p in ours], scaled) < 1e-12 * max(1.0, scale)


def test_is_exact_for_gradients_of_rank_one() -> None:
    """V̂ is g² itself then, so that the first step is the sign of the gradient."""
    p = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 4))
    p.grad = torch.outer(a, b)
    Adafactor([p], lr=0.1).step()
    torch.testing.assert_close(1 - p.detach(), 0.1 * p.grad.sign(), rtol=1e-12, atol=0)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [True, False])
def test_zero_gradients_move_nothing(dtype: torch.dtype, foreach: bool) -> None:
    own = parameters(dtype=dtype)
    before = [p.detach().clone() for p in own]
    optimizer = Adafactor(own, lr=0.1, foreach=foreach)
    for _ in range(3):
        for p in own:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e6, 1e15])
def test_rows_without_gradient_stay_finite(scale: float) -> None:
    """As of words that a batch does not hold, whatever the other rows are."""
    own = parameters([(9, 4), (9, 4), (300, 300)], torch.float32)
    optimizer = Adafactor(own, lr=0.1)
    before = [p.detach().clone() for p in own]
    for t in range(3):
        give_gradients(own, t, scale)
        for p in own:
            assert p.grad is not None
            p.grad[2:] = 0
        optimizer.step()
    for p, old in zip(own, before, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p[2:], old[2:])
        assert (p[:2] != old[:2]).all()


@pytest.mark.parametrize("foreach", [True, False])
def test_nothing_of_empty_tensors(foreach: bool) -> None:
    own = parameters([(0,), (0, 3), (2, 0, 3), (2, 2)])
    run(Adafactor(own, lr=0.1, foreach=foreach), own, 2)
    assert [p.numel() for p in own] == [0, 0, 0, 4]
    assert own[3].isfinite().all()


def test_parameters_at_zero_move() -> None:
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.ones(3, 2)
    Adafactor([p], lr=0.1, eps2=1e-3).step()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), -1e-4))


def test_nothing_moves_at_rate_zero() -> None:
    own = parameters()
    before = [p.detach().clone() for p in own]
    run(Adafactor(own, lr=0.0, weight_decay=0.1), own, 2)
    assert greatest_difference(own, before) == 0


@pytest.mark.parametrize("factor_dims", ["last", "largest"])
def test_takes_parameters_in_any_order_of_memory(factor_dims: str) -> None:
    dense = parameters([(4, 3, 5, 6), (6, 5)])
    order = (torch.channels_last, torch.contiguous_format)
    strided = [
        nn.Parameter(p.detach().clone(memory_format=o)) for p, o in zip(dense, order, strict=True)
    ]
    strided[1] = nn.Parameter(strided[1].detach().t().contiguous().t())
    for own in (dense, strided):
        run(Adafactor(own, lr=0.1, beta1=0.5, factor_dims=factor_dims), own, 3)
    assert greatest_difference(dense, strided) < 1e-14


def test_gradients_are_not_modified() -> None:
    own = parameters([(30, 40), (5, 4), (5, 4), (7,), ()])
    optimizer = Adafactor(own, lr=0.1, beta1=0.9, weight_decay=0.1, maximize=True)
    give_gradients(own, 0)
    before = [p.grad.clone() for p in own if p.grad is not None]
    optimizer.step()
    assert greatest_difference([p.grad for p in own], before) == 0


def test_autocast_does_not_reach_the_step() -> None:
    plain, within = (parameters([(300, 200), (5, 4), (5, 4)], torch.float32) for _ in range(2))
    run(Adafactor(plain, lr=0.1), plain, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(Adafactor(within, lr=0.1), within, 2)
    assert greatest_difference(plain, within) < 1e-6


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1), ("lr", math.inf), ("lr", math.nan), ("lr", torch.ones(2)), ("beta1", 1.0),
        ("beta1", 0.0), ("decay", 0.0), ("decay", 1.0), ("eps1", 0.0), ("eps1", 1e-40),
        ("eps2", -1.0), ("clip", 0.0), ("weight_decay", -0.1), ("factor_dims", "first"),
        ("eps_mode", "max"), ("state_dtype", torch.float16), ("state_dtype", "int8"),
        ("min_dim_to_factor", 0), ("min_dim_to_factor", 1.5),
    ],
)  # fmt: skip
def test_rejects_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`{name}` of Adafactor must be .* Found") as caught:
        Adafactor(parameters(), **{name: value})
    assert caught.value.argument == name
    optimizer = Adafactor(parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        optimizer.add_param_group({"params": parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_rejects_a_clamp_whose_square_is_no_number() -> None:
    with pytest.raises(ArgumentError, match=r"`eps1` .* 1e-18 with eps_mode='clamp'") as caught:
        Adafactor(parameters(), eps_mode="clamp", eps1=1e-30)
    assert caught.value.argument == "eps1"


def test_rejects_contradictions() -> None:
    with pytest.raises(ArgumentError, match=r"`lr` .* with relative_step=False") as caught:
        Adafactor(parameters(), lr=None, relative_step=False)
    assert caught.value.argument == "lr"
    with pytest.raises(ArgumentError, match=r"`warmup_init` .* relative_step=True") as caught:
        Adafactor(parameters(), lr=1e-3, warmup_init=True)
    assert caught.value.argument == "warmup_init"


def test_rejects_complex_parameters() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ArgumentError, match=r"real.*complex64.*view_as_real") as caught:
        Adafactor([p])
    assert caught.value.argument == "params"
    with pytest.raises(ArgumentError, match="view_as_real"):
        Adafactor([("p", p)])


@pytest.mark.parametrize("given_as", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_rejects_no_parameters(given_as: Any) -> None:
    with pytest.raises(ArgumentError, match=r"of Adafactor .* Found none") as caught:
        Adafactor(given_as)
    assert caught.value.argument == "params"


def test_rejects_a_parameter_that_comes_twice() -> None:
    p = nn.Parameter(torch.ones(3))
    for given_as in ([p, p], [{"params": [p]}, {"params": p}], [("a", p), ("b", p)]):
        with pytest.raises(ArgumentError, match=r"different.*\[3\] twice") as caught:
            Adafactor(given_as)
        assert caught.value.argument == "params"


def test_rejects_sparse_gradients_before_anything_moves() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = Adafactor([{"params": [dense]}, {"params": table.parameters()}])
    with pytest.raises(ArgumentError, match=r"dense.*sparse_coo.*\[5, 3\].*sparse=False") as caught:
        optimizer.step()
    assert caught.value.argument == "params"
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state
