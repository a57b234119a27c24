"""Lazy updates: which rows move, against the dense formula, SparseAdam, and each other."""

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
from kexue_lookahead import Batch, Derivation, Lazy, derive, with_lazy, with_lookahead
from kexue_lookahead.lazy import LazyDerivation
from kexue_lookahead.rows import any_entry

ROWS, WIDTH = 12, 3


def table(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(rows, WIDTH, generator=generator).to(dtype))


def ids(t: int, rows: int = ROWS) -> Tensor:
    """The rows of a step, some of them twice; the last one never."""
    generator = torch.Generator().manual_seed(t)
    return torch.randint(rows - 1, (4,), generator=generator)


def gradient(p: Tensor, t: int, *, sparse: bool) -> Tensor:
    indices = ids(t, len(p))
    generator = torch.Generator().manual_seed(100 + t)
    values = torch.randn(len(indices), WIDTH, generator=generator).to(p.dtype)
    made = torch.sparse_coo_tensor(indices[None], values, p.shape, check_invariants=False)
    return made if sparse else made.to_dense()


def run(
    optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range, *, sparse: bool = False
) -> None:
    for t in steps:
        p.grad = gradient(p, t, sparse=sparse)
        optimizer.step()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def dense_adam(steps: int, *, freeze: bool = False, decay: float = 0.0) -> Tensor:
    """The formula, row masks and all, for γ = 0.1."""
    theta = table().detach()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t in range(steps):
        g = gradient(theta, t, sparse=False)
        seen = (g != 0).any(1, keepdim=True)
        new_m, new_v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        m, v = (torch.where(seen | (not freeze), n, o) for n, o in ((new_m, m), (new_v, v)))
        step = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        theta = torch.where(seen, theta * (1 - 0.1 * decay) - 0.1 * step, theta)
    return theta


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "derived": lambda p, state, **kw: with_lazy("adam", lazy_state=state)([p], lr=0.1, **kw),
    "derived, fused": lambda p, state: with_lazy("adam", lazy_state=state)([p], lr=0.1, fused=True),
    "deferred": lambda p, state: Lazy([p], lr=0.1, state=state),
}


# -- the method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["decay", "freeze"])
def test_matches_the_formula(kind: str, state: Any) -> None:
    p = table()
    run(KINDS[kind](p, state), p, range(30))
    assert apart(p, dense_adam(30, freeze=state == "freeze")) < 1e-14
    assert apart(dense_adam(30), dense_adam(30, freeze=True)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["decay", "freeze"])
def test_rows_out_of_the_batch_stay_to_the_last_bit(kind: str, state: Any) -> None:
    p, plain = table(torch.float32), table(torch.float32)
    optimizer, adam = KINDS[kind](p, state), torch.optim.Adam([plain], lr=0.1)
    run(optimizer, p, range(5))
    run(adam, plain, range(5))
    for t in range(5, 20):
        before, plain_before = p.detach().clone(), plain.detach().clone()
        run(optimizer, p, range(t, t + 1))
        run(adam, plain, range(t, t + 1))
        out = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, ids(t), value=False)
        assert torch.equal(p[out], before[out])
        assert (p[~out] != before[~out]).any(1).all()
        seen = adam.state[plain]["exp_avg"].ne(0).any(1) & out
        assert (plain[seen] != plain_before[seen]).any(1).all()


def test_frozen_state_is_that_of_sparse_adam() -> None:
    ours, theirs = table(), table()
    peer = torch.optim.SparseAdam([theirs], lr=0.1)
    optimizer = Lazy([ours], lr=0.1, state="freeze")
    run(optimizer, ours, range(40), sparse=True)
    run(peer, theirs, range(40), sparse=True)
    assert apart(ours, theirs) < 1e-6  # its ε is not divided by the bias correction
    for name in ("exp_avg", "exp_avg_sq"):
        assert apart(optimizer.state[ours][name], peer.state[theirs][name]) < 1e-15
    assert "last" not in optimizer.state[ours]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("state", ["decay", "freeze"])
def test_sgd_matches_its_derivation(state: Any, momentum: float) -> None:
    deferred, dense = table(), table()
    run(Lazy([deferred], lr=0.1, base="sgd", state=state, momentum=momentum), deferred, range(30))
    made = with_lazy("sgd", lazy_state=state)
    run(made([dense], lr=0.1, momentum=momentum), dense, range(30))
    assert apart(deferred, dense) < 1e-14


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.0, 0.9, 0.999]),
    choice=st.lists(st.booleans(), min_size=5, max_size=40),
    base=st.sampled_from(["adam", "sgd"]),
)
def test_kinds_of_gradients_may_change(
    beta1: float, beta2: float, choice: list[bool], base: Any
) -> None:
    """Dense or sparse, by turns, and with a look at the moments between: all the same."""
    mixed, dense = table(), table()
    choices: dict[str, Any] = {"betas": (beta1, beta2), "momentum": beta1, "base": base}
    one, other = (Lazy([p], lr=0.1, **choices) for p in (mixed, dense))
    for t, sparse in enumerate(choice):
        run(one, mixed, range(t, t + 1), sparse=sparse)
        run(other, dense, range(t, t + 1))
        if t % 4 == 3:
            one.materialize()
    assert apart(mixed, dense) < 1e-13


def test_materialized_moments_are_those_of_the_dense_form() -> None:
    p, q = table(), table()
    deferred, dense = Lazy([p], lr=0.1), with_lazy("adam")([q], lr=0.1)
    run(deferred, p, range(25), sparse=True)
    run(dense, q, range(25))
    assert apart(deferred.state[p]["exp_avg"], dense.state[q]["exp_avg"]) > 1e-3
    deferred.materialize()
    for name in ("exp_avg", "exp_avg_sq"):
        assert apart(deferred.state[p][name], dense.state[q][name]) < 1e-15
    adam = torch.optim.Adam([p], lr=0.1)
    adam.load_state_dict(deferred.state_dict())
    run(adam, p, range(25, 26))  # torch's own goes on from here


def test_rows_may_wait_for_very_long() -> None:
    """β^Δ goes to 0, and nothing else happens."""
    p = table()
    optimizer = Lazy([p], lr=0.1)
    run(optimizer, p, range(1))
    optimizer.state[p]["step"] += 10**6
    row = int(ids(0)[0])
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    p.grad[row] = 1.0
    optimizer.step()
    moved = (before - p)[row].detach()
    wanted = 0.1 * 0.1 / 0.001**0.5  # m̂ / √v̂ of the new gradient alone
    torch.testing.assert_close(moved, torch.full_like(moved, wanted), rtol=1e-4, atol=0)
    assert torch.isfinite(p).all()


def test_repeated_ids_are_summed() -> None:
    p, q = table(), table()
    index, value = torch.tensor([[3, 3, 5]]), torch.ones(3, WIDTH, dtype=torch.float64)
    p.grad = torch.sparse_coo_tensor(index, value, p.shape, check_invariants=False)
    q.grad = p.grad.to_dense()
    for x in (p, q):
        Lazy([x], lr=0.1, base="sgd").step()
    assert apart(p, q) == 0
    assert apart(p[3], table()[3]) == pytest.approx(2 * apart(p[5], table()[5]))


def test_rows_may_be_named() -> None:
    """One whose gradient is 0 is moved by its momentum, one that is not named is not."""
    for build in (lambda p: Lazy([p], lr=0.1), lambda p: with_lazy("adam")([p], lr=0.1)):
        p = table()
        optimizer: Any = build(p)
        p.grad = torch.ones_like(p)
        optimizer.step()
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        p.grad[2] = 0
        optimizer.touch(p, torch.tensor([[2, 4], [4, 2]]))
        optimizer.touch(p, torch.tensor([5], dtype=torch.int32))
        optimizer.step()
        moved = (p != before).any(1).nonzero().flatten().tolist()
        assert moved == [2, 4, 5]
        p.grad = torch.ones_like(p)
        optimizer.step()  # the names are forgotten
        assert (p != before).any(1).all()


def test_decay_is_of_the_touched_rows() -> None:
    p = table()
    run(Lazy([p], lr=0.1, weight_decay=0.5), p, range(10), sparse=True)
    assert apart(p, dense_adam(10, decay=0.5)) < 1e-14
    q = table()
    run(with_lazy("adamw")([q], lr=0.1, weight_decay=0.5), q, range(10))
    assert apart(p, q) < 1e-14


def test_gradients_may_go_uphill() -> None:
    p, q = table(), table()
    run(Lazy([p], lr=0.1, maximize=True), p, range(5))
    run(with_lazy("adam")([q], lr=0.1, maximize=True), q, range(5))
    assert apart(p, q) < 1e-15
    run(Lazy([q], lr=0.1), q, range(5))


# -- which parameters ------------------------------------------------------------------------------


def test_names_choose_parameters() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "out": nn.Linear(2, 4)})
    made = with_lazy(torch.optim.SGD, lazy_include=("EMBED",))
    optimizer = made(model.named_parameters(), lr=0.1, momentum=0.9)
    everything = list(model.parameters())
    for first in (1.0, 0.0):
        for p in everything:
            p.grad = torch.full_like(p, first)
        before = [p.detach().clone() for p in everything]
        optimizer.step()
    still = [torch.equal(p, b) for p, b in zip(everything, before, strict=True)]
    assert still == [True, False, False]
    with pytest.raises(ArgumentError, match=r"`lazy_include` must come with named parameters"):
        made(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"`lazy_include`.*\('embed',\)"):
        with_lazy("sgd", lazy_include="embed")  # type: ignore[call-overload]


def test_groups_may_switch_it_off_and_vectors_are_left_out() -> None:
    on, off, vector = table(), table(), nn.Parameter(torch.ones(3))
    groups = [{"params": [on, vector]}, {"params": [off], "lazy": False}]
    optimizer = with_lazy("sgd")(groups, lr=0.1, momentum=0.9)
    for size in (1.0, 0.0):
        before = [p.detach().clone() for p in (on, off, vector)]
        for p in (on, off, vector):
            p.grad = torch.full_like(p, size)
        optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip((on, off, vector), before, strict=True)]
    assert moved == [False, True, True]


def test_lazy_composes_with_lookahead() -> None:
    p, q = table(), table()
    run(with_lookahead(with_lazy("adam"), slow_steps=3)([p], lr=0.1), p, range(10))
    inner = with_lazy("adam")([q], lr=0.1)
    slow = q.detach().clone()
    for t in range(10):
        run(inner, q, range(t, t + 1))
        if t % 3 == 2:
            slow = (slow + q.detach()) / 2
            with torch.no_grad():
                q.copy_(slow)
    assert apart(p, q) < 1e-14


def test_named_rows_wait_for_the_step() -> None:
    """While gradients accumulate, the rows of all calls count."""

    class EverySecond(Derivation):
        name = "second"

        def options(self) -> dict[str, Any]:
            return {}

        def accumulate(self, optimizer: Any) -> bool:
            vars(optimizer)["calls"] = vars(optimizer).get("calls", 0) + 1
            return bool(vars(optimizer)["calls"] % 2 == 0)

        def update(self, batch: Batch) -> None:
            del batch

    p = table()
    before = p.detach().clone()
    optimizer: Any = derive("sgd", LazyDerivation(), EverySecond())([p], lr=0.1)
    p.grad = torch.ones_like(p)
    for row in (1, 7):
        optimizer.touch(p, torch.tensor([row]))
        optimizer.step()
    assert (p != before).any(1).nonzero().flatten().tolist() == [1, 7]


# -- states and types ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["decay", "freeze"])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_goes_on_from_a_state_dict(base: Any, state: Any, dtype: torch.dtype) -> None:
    p = table(dtype)
    optimizer = Lazy([p], lr=0.05, base=base, state=state)
    run(optimizer, p, range(9), sparse=True)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    twin = nn.Parameter(p.detach().clone())
    resumed = Lazy([twin], lr=0.7)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for name, value in optimizer.state[p].items():
        if isinstance(value, Tensor):
            assert resumed.state[twin][name].dtype == value.dtype
    copied, again = pickle.loads(pickle.dumps((twin, resumed)))  # noqa: S301
    for own, stepped in ((p, optimizer), (twin, resumed), (copied, again)):
        run(stepped, own, range(9, 20), sparse=True)
    assert apart(p.double(), twin.double()) == apart(p.double(), copied.double()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_at_the_end(dtype: torch.dtype) -> None:
    half, single = table(dtype), table()
    single.data.copy_(half.data)
    for p in (half, single):
        p.grad = gradient(half, 0, sparse=False).to(p.dtype)
    for p in (half, single):
        Lazy([p], lr=0.1).step()
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), single, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float32_stays_near_float64() -> None:
    single, double = table(torch.float32), table()
    double.data.copy_(single.data)
    for p in (single, double):
        optimizer = Lazy([p], lr=1e-2)
        for t in range(400):
            p.grad = gradient(single, t, sparse=False).to(p.dtype)
            optimizer.step()
    assert apart(single.double(), double) < 5e-6


def test_a_group_may_change_to_frozen_and_back() -> None:
    p, q = table(), table()
    ours, peer = Lazy([p], lr=0.1), Lazy([q], lr=0.1)
    run(ours, p, range(6))
    run(peer, q, range(6))
    ours.param_groups[0]["state"] = "freeze"
    peer.materialize()
    peer.param_groups[0]["state"] = "freeze"
    run(ours, p, range(6, 12))
    run(peer, q, range(6, 12))
    ours.param_groups[0]["state"] = "decay"
    run(ours, p, range(12, 18))
    assert int(ours.state[p]["last"].min()) == 12
    assert torch.isfinite(p).all()
    peer.param_groups[0]["state"] = "decay"
    run(peer, q, range(12, 18))
    assert apart(p, q) < 1e-15


def test_trains_an_embedding_with_padding_closures_and_schedulers() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(50, 4, sparse=True, padding_idx=0)
    optimizer = Lazy(layer.parameters(), lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = layer.weight.detach().clone()
    batch = torch.tensor([[1, 2, 0], [2, 3, 0]])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (layer(batch) - 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    losses = []
    for _ in range(10):
        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert losses[-1] < 0.7 * losses[0]
    assert (layer.weight != before).any(1).nonzero().flatten().tolist() == [1, 2, 3]


def test_scalers_unscale_sparse_gradients() -> None:
    p, q = table(torch.float32), table(torch.float32)
    optimizer, plain = Lazy([p], lr=0.1, base="sgd"), Lazy([q], lr=0.1, base="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    p.grad = gradient(p, 0, sparse=True).coalesce() * 8.0
    q.grad = gradient(q, 0, sparse=True)
    scaler.step(optimizer)
    plain.step()
    assert apart(p, q) < 1e-7


@settings(derandomize=True, deadline=None, max_examples=50)
@given(rows=st.integers(1, 70000), column=st.integers(0, 2), share=st.floats(0, 1))
def test_finds_the_rows_that_are_not_zero(rows: int, column: int, share: float) -> None:
    tensor = torch.zeros(rows, 3)
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.rand(rows, generator=generator) < share
    tensor[chosen, column] = torch.tensor([1e-45, -1e-30, torch.nan, torch.inf])[rows % 4]
    assert torch.equal(any_entry(tensor), chosen)
    assert torch.equal(any_entry(tensor[:, column].contiguous()), chosen)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("base", "rmsprop"),
        ("state", "melt"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
    ],
)
def test_rejects_settings(name: str, value: Any) -> None:
    choice: dict[str, Any] = {name: value}
    with pytest.raises(ArgumentError, match=f"`{name}` of Lazy must be .*Found") as caught:
        Lazy([table()], **choice)
    assert caught.value.argument == name
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        Lazy([table()]).add_param_group({"params": table(), name: value})


def test_rejects_parameters_without_rows() -> None:
    for p in (nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))):
        with pytest.raises(ArgumentError, match="`params` of Lazy must be real and have rows"):
            Lazy([p])


def test_rejects_lists_of_parameters_that_are_none() -> None:
    with pytest.raises(ArgumentError, match=r"of Lazy .* Found none"):
        Lazy([])
    p = table()
    with pytest.raises(ArgumentError, match=r"different.*\[12, 3\] twice"):
        Lazy([p, p])


def test_rejects_gradients_before_anything_moves() -> None:
    good, bad = table(), table()
    good.grad = torch.ones_like(good)
    bad.grad = torch.ones_like(bad).to_sparse()  # of single numbers, not of rows
    before = good.detach().clone()
    with pytest.raises(ArgumentError, match="must be COO of whole rows"):
        Lazy([good, bad]).step()
    bad.grad = gradient(bad, 0, sparse=True)
    with pytest.raises(ArgumentError, match=r"must be dense here.*kexue_lookahead\.Lazy"):
        with_lazy("sgd")([good, bad], lr=0.1).step()
    optimizer = Lazy([good, bad])
    optimizer.touch(bad, torch.tensor([1]))
    with pytest.raises(ArgumentError, match="`touch` must have a dense gradient"):
        optimizer.step()
    assert torch.equal(good, before)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0.5]), "`indices` must be integers"),
        (torch.tensor([True]), "`indices` must be integers"),
        (torch.tensor([ROWS]), rf"`indices` must be in \[0, {ROWS}\).*Found {ROWS}"),
        (torch.tensor([-1]), "`indices`.*Found -1"),
    ],
    ids=str,
)
def test_rejects_rows_that_are_none(indices: Tensor, message: str) -> None:
    p = table()
    with pytest.raises(ArgumentError, match=message):
        Lazy([p]).touch(p, indices)
    with pytest.raises(ArgumentError, match="`parameter` must be one that this optimizer"):
        Lazy([p]).touch(table(), torch.tensor([0]))


def test_does_not_change_gradients() -> None:
    for sparse in (True, False):
        p = table()
        p.grad = gradient(p, 0, sparse=sparse)
        kept = copy.deepcopy(p.grad)
        Lazy([p], weight_decay=0.1).step()
        assert torch.equal(p.grad.to_dense(), kept.to_dense())
