"""What every torch optimizer does, what each derivation refuses, and the edges."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from kexue.core import ArgumentError
from kexue_derived_optimizers import (
    LAMB,
    LARS,
    AdamWLR,
    GradAccumulation,
    PiecewiseLinearLR,
    WeightDecay,
    piecewise_linear,
    with_grad_accumulation,
    with_layer_adaptation,
    with_lazy,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)

Adam: Any = torch.optim.Adam
SGD: Any = torch.optim.SGD


def everything(base: Any = Adam) -> Any:
    """All six, with settings that show."""
    base = with_layer_adaptation(with_lazy(with_weight_decay(base, weight_decay_rate=0.1)))
    base = with_piecewise_linear_lr(base, lr_schedule={2: 1.0, 6: 0.5}, lr_schedule_offset=1)
    return with_lookahead(with_grad_accumulation(base, grad_accum_steps=2), slow_steps=2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        for p in (self.inner.bias, self.norm.bias, self.outer.bias):
            nn.init.constant_(p, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.outer(self.norm(self.inner(x)))
        return found


def batch(t: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(t))


def train(model: nn.Module, optimizer: Any, calls: range) -> None:
    for t in calls:
        optimizer.zero_grad()
        model(batch(t)).square().mean().backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True)
    )


# -- an optimizer of torch -------------------------------------------------------------------------


def test_is_its_base_and_shows_both_signatures() -> None:
    import inspect

    made = everything()
    optimizer = made([nn.Parameter(torch.ones(2))], lr=0.1)
    kinds: list[type] = [Adam, WeightDecay, GradAccumulation, LAMB]
    assert all(isinstance(optimizer, kind) for kind in kinds)
    assert not isinstance(optimizer, LARS)
    names = list(inspect.signature(made).parameters)
    assert names[:3] == ["params", "lr", "betas"]
    assert {"weight_decay_rate", "lr_schedule", "grad_accum_steps", "slow_steps"} <= set(names)
    assert not isinstance(with_weight_decay(with_layer_adaptation(Adam))([torch.ones(1)]), LAMB)


def test_closures_are_called_once_and_returned() -> None:
    model, twin = Model(), Model()
    optimizer = everything()(model.parameters(), lr=0.05)
    calls: list[Any] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss: Tensor = model(batch(len(calls))).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        calls.append(loss)
        return loss

    assert all(optimizer.step(closure) is calls[-1] for _ in range(5))
    assert len(calls) == 5
    train(twin, everything()(twin.parameters(), lr=0.05), range(5))
    assert same(model, twin)


def test_schedulers_of_torch_and_ours_multiply() -> None:
    moved = []
    p = nn.Parameter(torch.zeros(()))
    p.grad = torch.ones(())
    optimizer = with_piecewise_linear_lr(SGD, lr_schedule={0: 1.0, 4: 0.0})([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    for _ in range(5):
        before = p.item()
        optimizer.step()
        moved.append(before - p.item())
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        scheduler.step()
    assert moved == pytest.approx([1.0, 0.75 / 2, 0.5 / 4, 0.25 / 8, 0.0])


def test_weight_decay_follows_the_rate_of_a_scheduler() -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = with_weight_decay(SGD, weight_decay_rate=0.5)([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    p.grad = torch.zeros(())
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert p.item() == pytest.approx(0.75 * 0.875)


@pytest.mark.parametrize("make", [LAMB, AdamWLR, everything(), everything(SGD)])
def test_rates_may_be_tensors(make: Any) -> None:
    model, twin = Model(), Model()
    kwargs = {"foreach": False} if make in (LAMB, AdamWLR) else {}
    optimizer = make(model.parameters(), lr=torch.tensor(0.25), **kwargs)
    train(model, optimizer, range(4))
    train(twin, make(twin.parameters(), lr=0.25, **kwargs), range(4))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
@pytest.mark.parametrize("make", [everything(), LAMB, LARS, AdamWLR, GradAccumulation])
@pytest.mark.parametrize("calls", [1, 3])
def test_copies_go_on_alike(make: Any, how: Callable[[Any], Any], calls: int) -> None:
    model = Model()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(calls))
    twin, copied = how((model, optimizer))
    train(model, optimizer, range(calls, 8))
    train(twin, copied, range(calls, 8))
    assert same(model, twin)
    assert type(copied) is type(optimizer)


def test_classes_pickle() -> None:
    made = everything()
    assert pickle.loads(pickle.dumps(made)) is made  # noqa: S301


def test_maximize_goes_uphill() -> None:
    for make, calls in ((LAMB, 1), (LARS, 1), (everything(), 2)):
        up, down = (nn.Parameter(torch.ones(3)) for _ in range(2))
        for p, uphill in ((up, True), (down, False)):
            optimizer = make([p], lr=0.1, maximize=uphill)
            for group in optimizer.param_groups:
                group["weight_decay_rate"] = 0.0
            for _ in range(calls):
                p.grad = torch.full((3,), 1 / 3)
                optimizer.step()
        torch.testing.assert_close(up.detach() - 1, 1 - down.detach())
        assert (up > 1).all()


def test_hooks_run_once_per_call() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = everything()([p], lr=0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
    assert seen == ["before", "after"] * 2


def test_grad_scaler_leaves_out_a_call_with_infinite_gradients() -> None:
    """Nothing advances: not the window, not the schedule, not the cycle."""
    model, twin = Model(), Model()
    optimizer, plain = (
        everything()(m.parameters(), lr=0.05, fused=fused)
        for m, fused in ((model, True), (twin, False))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for t in range(5):
        for spoil in (True, False) if t == 1 else (False,):
            optimizer.zero_grad()
            scaler.scale(model(batch(t)).square().mean()).backward()
            if spoil:
                dict(model.named_parameters())["inner.weight"].grad[0, 0] = math.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
    train(twin, plain, range(5))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    counted = [g[n] for g in optimizer.param_groups for n in g if n.endswith(("_step", "_count"))]
    assert sorted(counted) == [1, 2]


def test_accelerate_prepares_and_steps_it() -> None:
    from accelerate import Accelerator

    model, twin = Model(), Model()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, everything()(model.parameters(), lr=0.05))
    for t in range(5):
        optimizer.zero_grad()
        accelerator.backward(prepared(batch(t)).square().mean())
        optimizer.step()
    train(twin, everything()(twin.parameters(), lr=0.05), range(5))
    assert same(model, twin)
    assert not optimizer.step_was_skipped


@pytest.mark.filterwarnings("ignore")  # lightning's own
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_lightning_trains_with_it_and_resumes(options: dict[str, Any], tmp_path: Path) -> None:
    """Five batches an epoch: the checkpoint is in the middle of a window and of a cycle."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, rows: Tensor) -> Tensor:
            found: Tensor = self.model(rows).square().mean()
            return found

        def configure_optimizers(self) -> Any:
            return everything()(self.model.parameters(), lr=0.05)

    def fit(epochs: int, start: Path | None = None) -> tuple[nn.Module, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        rows: Any = torch.cat([batch(t) for t in range(5)])
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8), ckpt_path=start)
        return module.model, trainer

    whole, _ = fit(3)
    begun, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    resumed, _ = fit(3, tmp_path / "begun.ckpt")
    assert same(whole, resumed)
    assert not same(begun, whole)


# -- groups and names ------------------------------------------------------------------------------


def test_groups_have_their_own_options() -> None:
    decayed, free, adapted = (nn.Parameter(torch.ones(4)) for _ in range(3))
    make = with_layer_adaptation(with_weight_decay(SGD))
    groups = [
        {"params": [decayed], "weight_decay_rate": 0.5, "layer_adaptation": False},
        {"params": [free], "weight_decay_rate": 0.0, "layer_adaptation": False},
    ]
    optimizer = make(groups, lr=0.5)
    optimizer.add_param_group({"params": [adapted], "weight_decay_rate": 0.0, "lr": 0.25})
    for p in (decayed, free, adapted):
        p.grad = torch.full((4,), 0.1)
    optimizer.step()
    assert decayed[0].item() == pytest.approx(1 - 0.5 * (0.1 + 0.5))
    assert free[0].item() == pytest.approx(1 - 0.5 * 0.1)
    assert adapted[0].item() == pytest.approx(0.75)


@pytest.mark.parametrize("base", [Adam, SGD])
def test_names_are_excluded(base: Any) -> None:
    """What is excluded takes the plain step, beside others that do not."""
    model, twin = Model(), Model()
    options = {
        "weight_decay_rate": 0.5,
        "exclude_from_weight_decay": ("BIAS", "norm"),
        "exclude_from_layer_adaptation": ["bias"],
    }
    make = with_layer_adaptation(with_weight_decay(base))
    train(model, make(model.named_parameters(), lr=0.1, **options), range(1))
    train(twin, base(twin.parameters(), lr=0.1), range(1))
    plain = {
        n: torch.equal(p, dict(twin.named_parameters())[n]) for n, p in model.named_parameters()
    }
    assert plain == {n: n.endswith("bias") for n in plain}
    fresh = dict(Model().named_parameters())["norm.weight"]
    moved = (model.norm.weight - fresh).norm() / fresh.norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-5)


def test_exclusions_need_names() -> None:
    makes: list[tuple[Any, str]] = [
        (with_weight_decay(Adam, exclude_from_weight_decay=["bias"]), "exclude_from_weight_decay"),
        (LAMB, "exclude_from_layer_adaptation"),
    ]
    for make, option in makes:
        with pytest.raises(ArgumentError, match=rf"`{option}`.*named_parameters") as caught:
            make(Model().parameters(), **{option: ("bias",)})
        assert caught.value.argument == option


def test_components_are_bases_too() -> None:
    model, twin = Model(), Model()
    made = GradAccumulation(
        model.parameters(), lr=0.05, base="lamb", base_options={"eps": 1e-3}, grad_accum_steps=3
    )
    train(model, made, range(7))
    peer = with_grad_accumulation(with_layer_adaptation(with_weight_decay(Adam)))
    train(twin, peer(twin.parameters(), lr=0.05, eps=1e-3, grad_accum_steps=3), range(7))
    assert same(model, twin)
    warm: Any = with_piecewise_linear_lr(LAMB, lr_schedule={3: 1.0})
    optimizer = warm(Model().parameters(), lr=0.05)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    assert isinstance(optimizer, PiecewiseLinearLR)


# -- weight decay ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_over_adam_it_is_adamw_to_the_bit(how: dict[str, Any]) -> None:
    """By the base itself; with an excluded parameter, ours; and by the named composition."""
    models = [Model() for _ in range(4)]
    peer = torch.optim.AdamW(models[0].parameters(), lr=0.1, weight_decay=0.3, **how)
    decayed = with_weight_decay(Adam, weight_decay_rate=0.3)
    alone = decayed(models[1].parameters(), lr=0.1, **how)
    beside = decayed(
        [*models[2].named_parameters(), ("excluded", nn.Parameter(torch.ones(1)))],
        lr=0.1, exclude_from_weight_decay=["excluded"], **how,
    )  # fmt: skip
    named = AdamWLR(
        models[3].parameters(), lr=0.1, weight_decay_rate=0.3, lr_schedule={0: 1}, **how
    )
    for model, optimizer in zip(models, (peer, alone, beside, named), strict=True):
        train(model, optimizer, range(4))
    assert all(same(models[0], model) for model in models[1:])
    group = alone.param_groups[0]
    assert (group["weight_decay"], group["weight_decay_rate"]) == (0, 0.3)
    assert group["decoupled_weight_decay"] is False


def test_decay_is_added_to_the_l2_term_of_the_base() -> None:
    p, q = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    p.grad = q.grad = torch.ones(3)
    with_weight_decay(SGD, weight_decay_rate=0.5)([p], lr=0.5, weight_decay=0.25).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 2 - 0.5 * (1 + 0.5) - 0.5 * 0.5 * 2))
    with_weight_decay(torch.optim.AdamW)([q], lr=0.5, weight_decay=0.0).step()
    assert q.isfinite().all()


# -- layer adaptation ------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    exponent=st.integers(-6, 6), seed=st.integers(0, 99), rate=st.floats(1e-4, 1.0),
    shape=st.sampled_from([(3,), (4, 5), (), (2, 3, 4)]),
)  # fmt: skip
def test_tensors_move_by_their_norm(
    exponent: int, seed: int, rate: float, shape: tuple[int, ...]
) -> None:
    """Whatever the gradient's scale is."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    before = p.detach().clone()
    p.grad = 10.0**exponent * torch.randn(shape, generator=generator, dtype=torch.float64)
    LARS([p], lr=rate).step()
    assert (p.detach() - before).norm() == pytest.approx(rate * float(before.norm()), rel=1e-9)


@pytest.mark.parametrize("shape", [(512, 512), (511, 513), (2, 300, 300)])
def test_large_tensors_move_by_their_norm(shape: tuple[int, ...]) -> None:
    """Norms that threads share, those of sizes that they cannot, and of memory in another order."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).mT)
    before = p.detach().clone()
    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    LAMB([p], lr=0.1).step()
    moved = (p.detach() - before).square().sum().sqrt()
    assert moved.item() == pytest.approx(0.1 * before.square().sum().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_complex_tensors_move_by_their_norm(base: str) -> None:
    p = nn.Parameter(torch.tensor([3j, 4 + 12j], dtype=torch.complex128))
    before = p.detach().clone()
    p.grad = torch.tensor([7 - 1j, 2 + 5j], dtype=torch.complex128)
    derived: Any = with_layer_adaptation(base)
    derived([p], lr=0.1).step()
    assert (p.detach() - before).abs().square().sum().sqrt() == pytest.approx(1.3, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_norms_take_the_plain_step(dtype: torch.dtype) -> None:
    at_zero, still, empty = (nn.Parameter(x.to(dtype)) for x in (
        torch.zeros(3), torch.ones(3), torch.zeros(0)
    ))  # fmt: skip
    at_zero.grad, still.grad, empty.grad = (
        x.to(dtype) for x in (torch.ones(3), torch.zeros(3), torch.zeros(0))
    )
    with_layer_adaptation(SGD)([at_zero, still, empty], lr=0.5).step()
    assert torch.equal(at_zero, torch.full((3,), -0.5, dtype=dtype))
    assert torch.equal(still, torch.ones(3, dtype=dtype))


def test_norms_are_clipped_where_told() -> None:
    for clamp, moved in ((None, 50.0), ((0, 10), 1.0), ((1000, 2000), 100.0)):
        p = nn.Parameter(torch.tensor([300.0, 400.0]))
        p.grad = torch.tensor([0.0, 7.0])
        LARS([p], lr=0.1, layer_adaptation_clamp=clamp).step()
        assert 400 - p[1].item() == pytest.approx(moved, rel=1e-4)
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.0, 2.0])
    with_layer_adaptation(SGD, layer_adaptation_eps=3.0)([p], lr=0.1).step()
    assert 4 - p[1].item() == pytest.approx(0.1 * 2 * 5 / (2 + 3), rel=1e-4)


def test_norms_of_half_precision_do_not_overflow() -> None:
    p = nn.Parameter(torch.full((300, 300), 200.0, dtype=torch.float16))
    p.grad = torch.full((300, 300), 100.0, dtype=torch.float16)
    LARS([p], lr=0.25).step()
    torch.testing.assert_close(p, torch.full_like(p, 150.0), rtol=2e-3, atol=0)


def test_matches_the_lamb_of_pytorch_optimizer_where_both_mean_the_same() -> None:
    """Its Lamb divides the rate by 1 − β₁ᵗ in place of m; the first direction is the same."""
    peers = pytest.importorskip("pytorch_optimizer")
    model, twin = Model(), Model()
    train(model, LAMB(model.parameters(), lr=0.1, eps=1e-12, weight_decay_rate=0.0), range(1))
    train(twin, peers.Lamb(twin.parameters(), lr=0.01, eps=1e-12, weight_decay=0.0), range(1))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# -- schedules -------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    knots=st.dictionaries(st.integers(0, 50), st.floats(0, 4), min_size=1, max_size=5),
    t=st.integers(0, 60),
)
def test_ratios_are_straight_between_knots(knots: dict[int, float], t: int) -> None:
    full = knots if 0 in knots else {0: 0.0, **knots}
    xs = sorted(full)
    wanted = float(torch.tensor(0))
    if t >= xs[-1]:
        wanted = full[xs[-1]]
    else:
        right = next(x for x in xs if x > t)
        left = max(x for x in xs if x <= t)
        wanted = full[left] + (full[right] - full[left]) * (t - left) / (right - left)
    assert piecewise_linear(knots, t) == pytest.approx(wanted, abs=1e-12)
    assert piecewise_linear({str(k): v for k, v in knots.items()}, t) == piecewise_linear(knots, t)
    assert piecewise_linear(sorted(knots.items(), reverse=True), t) == piecewise_linear(knots, t)


@pytest.mark.parametrize(
    "schedule",
    [{}, {-1: 1.0}, {1.5: 1.0}, {"x": 1.0}, {3: -1.0}, {3: math.nan}, {3: math.inf}, 7, None,
     {True: 1.0}, [(1, 1.0), (1, 2.0)], {1: "a"}, "ab"],
)  # fmt: skip
def test_rejects_what_is_no_schedule(schedule: Any) -> None:
    for call in (
        lambda: with_piecewise_linear_lr(Adam, lr_schedule=schedule),
        lambda: with_piecewise_linear_lr(Adam)([torch.ones(1)], lr_schedule=schedule),
        lambda: AdamWLR([torch.ones(1)], lr_schedule=schedule),
    ):
        with pytest.raises(ArgumentError, match=r"`lr_schedule` must be like .* Found") as caught:
            call()
        assert caught.value.argument == "lr_schedule"


def test_a_warm_up_from_zero_begins_with_nothing_or_with_its_first_part() -> None:
    for offset, wanted in ((0, [0.0, 0.5, 1.0]), (1, [0.5, 1.0, 1.0])):
        p = nn.Parameter(torch.zeros(()))
        p.grad = torch.ones(())
        make = with_piecewise_linear_lr(SGD, lr_schedule={2: 1.0}, lr_schedule_offset=offset)
        optimizer, moved = make([p], lr=1.0), []
        for _ in range(3):
            before = p.item()
            optimizer.step()
            moved.append(before - p.item())
        assert moved == wanted


# -- accumulation ----------------------------------------------------------------------------------


def test_gradients_come_back_after_the_step() -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = with_grad_accumulation(SGD)([p], lr=1.0)
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    for g in gradients:
        p.grad = g
        optimizer.step()
        assert p.grad is g
    assert gradients[1].tolist() == [3.0, 6.0]
    assert p.tolist() == [-2.0, -4.0]


def test_a_missing_gradient_counts_as_zero() -> None:
    p, absent = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = with_grad_accumulation(SGD)([p, absent], lr=1.0)
    p.grad = torch.tensor(4.0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert p.item() == -2.0
    assert absent.item() == 0.0
    assert p.grad is None


def test_a_late_first_gradient_meets_nothing_of_the_window_before() -> None:
    p, late = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = with_grad_accumulation(SGD)([p, late], lr=1.0, grad_accum_steps=3)
    for t in range(6):
        p.grad = torch.tensor(3.0)
        late.grad = None if t == 3 else torch.tensor(6.0)
        optimizer.step()
        assert optimizer.state[p]["grad-accumulation.added"] == (t + 1) % 3
    assert (p.item(), late.item()) == (-6.0, -6.0 - 4.0)


def test_flush_takes_the_mean_of_what_there_is() -> None:
    p = nn.Parameter(torch.zeros(()))
    optimizer = everything(SGD)([p], lr=1.0, grad_accum_steps=3, layer_adaptation=False)
    p.grad = torch.tensor(2.0)
    optimizer.step()
    p.grad = torch.tensor(4.0)
    optimizer.step()
    p.grad = torch.tensor(100.0)
    assert optimizer.flush() is True
    assert p.item() == pytest.approx(-0.5 * 3.0)  # ρ_1 = 1/2
    assert p.grad.item() == 100.0
    assert optimizer.flush() is False
    p.grad = torch.tensor(6.0)
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["lr_schedule_step"] == 2


def test_sums_of_half_precision_are_wide() -> None:
    """A thousand gradients that a sum in bfloat16 would lose."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = with_grad_accumulation(SGD)([p], lr=1.0, grad_accum_steps=1001)
    p.grad = torch.full((3,), 1000.0, dtype=torch.bfloat16)
    optimizer.step()
    for _ in range(1000):
        p.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(p.float(), torch.full((3,), -2000 / 1001), rtol=4e-3, atol=0)


def test_groups_share_the_window() -> None:
    with pytest.raises(ArgumentError, match=r"`grad_accum_steps` must be the same") as caught:
        with_grad_accumulation(SGD)(
            [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "grad_accum_steps": 3}], lr=1
        )
    assert caught.value.argument == "grad_accum_steps"
    early, late = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = with_grad_accumulation(SGD)([early], lr=1.0)
    early.grad = torch.tensor(2.0)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    early.grad = late.grad = torch.tensor(4.0)
    optimizer.step()
    assert (early.item(), late.item()) == (-3.0, -2.0)


def torch_checkpoint(
    model: nn.Module, optimizer: Any, twin: nn.Module, other: Any, *, way: str, folder: Path
) -> None:
    """Carry model and optimizer by one of torch's ways that are made for shards."""
    options = StateDictOptions(full_state_dict=way == "full")
    parts: Any = get_state_dict(model, optimizer, options=options)
    if way == "files":
        save(dict(zip("ab", parts, strict=True)), checkpoint_id=folder, no_dist=True)
        into: dict[str, Any] = dict(zip("ab", get_state_dict(twin, other), strict=True))
        load(into, checkpoint_id=folder, no_dist=True)
        parts = into["a"], into["b"]
    found, state = copy.deepcopy(parts)
    set_state_dict(twin, other, model_state_dict=found, optim_state_dict=state, options=options)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("way", ["full", "parts", "files"])
@pytest.mark.parametrize("make", [everything(), everything(SGD), GradAccumulation])
@pytest.mark.parametrize("calls", [2, 3, 4])
def test_the_checkpoints_of_torch_have_the_window(
    make: Any, way: str, calls: int, tmp_path: Path
) -> None:
    model, twin = Model(), Model()
    optimizer = make(model.parameters(), lr=0.05)
    train(model, optimizer, range(calls))
    other = make(twin.parameters(), lr=0.7)
    torch_checkpoint(model, optimizer, twin, other, way=way, folder=tmp_path)
    assert same(model, twin)
    train(model, optimizer, range(calls, 9))
    train(twin, other, range(calls, 9))
    assert same(model, twin)


def test_a_first_call_of_zeros_counts_where_it_has_a_rate() -> None:
    p, q = (nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = with_grad_accumulation(SGD)([p, q], lr=1.0)
    p.grad, q.grad = torch.zeros(()), torch.zeros(())
    optimizer.step()
    p.grad, q.grad = torch.tensor(2.0), None
    optimizer.step()
    assert p.item() == -1.0
    optimizer = with_grad_accumulation(SGD)([p, q], lr=0.0)
    p.grad, q.grad = torch.zeros(()), torch.tensor(4.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert (p.item(), q.item()) == (-1.0, -4.0)
    p.grad, q.grad = torch.zeros(()), torch.zeros(())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert [optimizer.state[x]["grad-accumulation.added"] for x in (p, q)] == [1, 1]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (with_weight_decay, "weight_decay_rate", -0.1),
        (with_weight_decay, "weight_decay_rate", math.inf),
        (with_weight_decay, "weight_decay_rate", math.nan),
        (with_weight_decay, "exclude_from_weight_decay", "bias"),
        (with_weight_decay, "exclude_from_weight_decay", [1]),
        (with_layer_adaptation, "layer_adaptation_clamp", (3, 1)),
        (with_layer_adaptation, "layer_adaptation_clamp", (0, 0)),
        (with_layer_adaptation, "layer_adaptation_clamp", 10),
        (with_layer_adaptation, "layer_adaptation_eps", -1.0),
        (with_piecewise_linear_lr, "lr_schedule_offset", -1),
        (with_piecewise_linear_lr, "lr_schedule_offset", 0.5),
        (with_grad_accumulation, "grad_accum_steps", 0),
        (with_grad_accumulation, "grad_accum_steps", 1.5),
        (with_grad_accumulation, "grad_accum_steps", True),
    ],
)
def test_rejects_options_out_of_range(make: Callable[..., Any], name: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = make(Adam)([p])
    calls: list[Callable[[], Any]] = [
        lambda: make(Adam, **{name: value}),
        lambda: make(Adam)([p], **{name: value}),
        lambda: make(Adam([p]), **{name: value}),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(p.data)], name: value}),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=rf"`{name}` must be .*Found") as caught:
            call()
        assert caught.value.argument == name
    assert len(optimizer.param_groups) == 1


def test_rejects_a_derivation_that_is_there_already() -> None:
    for make in (with_weight_decay, with_layer_adaptation, with_grad_accumulation):
        with pytest.raises(ArgumentError, match="already"):
            make(make(Adam))


@pytest.mark.parametrize("make", [with_layer_adaptation, with_grad_accumulation])
def test_rejects_sparse_gradients_before_anything_moves(make: Callable[..., Any]) -> None:
    table, dense = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = make(SGD)([{"params": [dense]}, {"params": table.parameters()}], lr=0.1)
    with pytest.raises(ArgumentError, match=r"dense.*sparse_coo.*\[5, 3\]") as caught:
        optimizer.step()
    assert caught.value.argument == "params"
    assert torch.equal(dense, torch.ones(2))


@pytest.mark.parametrize("base", [torch.optim.SparseAdam, torch.optim.SGD])
def test_decays_beside_sparse_gradients(base: type[torch.optim.Optimizer]) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    made: Any = with_weight_decay(base, weight_decay_rate=0.5)
    made(table.parameters(), lr=0.1).step()
    torch.testing.assert_close(table.weight[2:].detach(), 0.95 * before[2:])
    assert not torch.equal(table.weight[1], 0.95 * before[1])


def test_non_finite_gradients_go_where_the_base_takes_them() -> None:
    for bad in (math.nan, math.inf):
        spoiled, sound = (nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = LAMB([spoiled, sound], lr=0.1)
        spoiled.grad, sound.grad = torch.tensor([bad, 1.0]), torch.ones(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert not spoiled.isfinite().all()
        assert sound.isfinite().all()
