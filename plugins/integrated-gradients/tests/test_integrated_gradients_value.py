"""Integrated gradients: exact cases, axioms, batching."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue_integrated_gradients import Attributions, integrated_gradients
from kexue_integrated_gradients.quadrature import RULES, Rule, nodes

RULE = pytest.mark.parametrize("rule", RULES)


def network(seed: int = 0, features: int = 6, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs)
    ).double()


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_output(model: nn.Module, index: int, x: Tensor) -> Tensor:
    out: Tensor = model(x)[index]
    return out


def loop(
    score: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, alphas: Tensor, weights: Tensor
) -> Tensor:
    """The sum of the definition for one row, a step at a time."""
    total = torch.zeros_like(x)
    for alpha, weight in zip(alphas, weights, strict=True):
        point = (start + alpha * (x - start)).requires_grad_()
        total += weight * torch.autograd.grad(score(point), point)[0]
    return (x - start) * total


@RULE
@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 4),
    steps=st.integers(2, 9),
    max_rows=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_is_the_sum_of_the_definition(
    rule: Rule, batch: int, steps: int, max_rows: int, seed: int
) -> None:
    model, x, start = network(), rows(batch, 6, seed=seed), rows(batch, 6, seed=seed + 1)
    target = torch.randint(3, (batch,), generator=torch.Generator().manual_seed(seed))
    found = integrated_gradients(
        model, x, start, target=target, steps=steps, rule=rule, max_rows=max_rows, tolerance=9e9
    )
    alphas, weights = (torch.from_numpy(a) for a in nodes(rule, steps))
    for i in range(batch):
        score = partial(one_output, model, int(target[i]))
        expected = loop(score, x[i], start[i], alphas, weights)
        torch.testing.assert_close(found.values[i], expected, rtol=1e-10, atol=1e-12)
    outputs = [model(t)[torch.arange(batch), target].detach() for t in (x, start)]
    torch.testing.assert_close([found.outputs, found.baseline_outputs], outputs)
    difference = found.outputs - found.baseline_outputs
    torch.testing.assert_close(found.error, found.values.sum(1) - difference)


@RULE
def test_linear_models_are_exact_with_any_rule(rule: Rule) -> None:
    model = nn.Linear(6, 3).double()
    x, start = rows(5, 6), rows(5, 6, seed=1)
    found = integrated_gradients(model, x, start, target=1, rule=rule, steps=2)
    torch.testing.assert_close(found.values, (x - start) * model.weight[1].detach())
    assert found.error.abs().max() < 1e-13


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_gauss_legendre_is_exact_for_polynomials(steps: int) -> None:
    """n nodes integrate gradients of degree 2n - 1, of functions of degree 2n."""
    x = rows(4, 3)
    degree = 2 * steps
    for power in range(1, degree + 1):
        found = integrated_gradients(lambda p, n=power: p.pow(n).sum(1), x, steps=steps)
        torch.testing.assert_close(found.values, x**power, rtol=1e-12, atol=1e-12)
    beyond = integrated_gradients(
        lambda p: p.pow(degree + 1).sum(1), x, steps=steps, tolerance=math.inf
    )
    assert not torch.allclose(beyond.values, x ** (degree + 1), rtol=1e-6)


def test_interactions_are_shared_as_the_integral_says() -> None:
    """For x² y from 0: ∫ 2α²xy x dα = 2/3 x² y and ∫ α² x² y dα = 1/3 x² y."""
    x = rows(4, 2)
    found = integrated_gradients(lambda p: p[:, 0] ** 2 * p[:, 1], x, steps=2)
    whole = x[:, 0] ** 2 * x[:, 1]
    torch.testing.assert_close(found.values, torch.stack([2 * whole / 3, whole / 3], 1))


def test_is_complete() -> None:
    model, x, start = network(), rows(20, 6), rows(20, 6, seed=1)
    found = integrated_gradients(model, x, start, target=2, steps=64)
    assert found.error.abs().max() < 1e-9
    assert found.relative_error < 1e-9


@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("right", 1), ("midpoint", 2)])
def test_error_falls_in_the_order_of_the_rule(rule: Rule, order: int) -> None:
    model, x = network(), rows(20, 6)

    def error(steps: int) -> float:
        found = integrated_gradients(model, x, target=0, rule=rule, steps=steps, tolerance=9)
        return float(found.error.abs().mean())

    assert math.log2(error(50) / error(100)) == pytest.approx(order, abs=0.15)


def test_saturated_inputs_get_their_share() -> None:
    """1 - ReLU(1 - x) at 2: the gradient is 0, the share 1 (section 2.1 of the paper)."""
    x = torch.full((1, 1), 2.0, dtype=torch.float64)

    def model(p: Tensor) -> Tensor:
        return 1 - (1 - p[:, 0]).relu()

    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(model(leaf).sum(), leaf)[0] == 0
    assert integrated_gradients(model, x, steps=50).values.item() == pytest.approx(1, abs=0.02)


def test_ignored_inputs_get_nothing() -> None:
    found = integrated_gradients(lambda p: p[:, 1:].tanh().sum(1), rows(5, 3), steps=8)
    assert not found.values[:, 0].any()


def test_wiring_does_not_matter() -> None:
    """Two hidden units that share a weight are one with the weights added."""
    one = network()
    twice = nn.Sequential(nn.Linear(6, 32), one[1], nn.Linear(32, 16), *list(one)[3:]).double()
    state = one.state_dict()
    shared = torch.cat([0.3 * state["2.weight"], 0.7 * state["2.weight"]], 1)
    first = {"0.weight": state["0.weight"].repeat(2, 1), "0.bias": state["0.bias"].repeat(2)}
    twice.load_state_dict({**state, **first, "2.weight": shared})
    x = rows(5, 6)
    a, b = (integrated_gradients(m, x, target=0, tolerance=9).values for m in (one, twice))
    torch.testing.assert_close(a, b)


def test_is_linear_in_the_model() -> None:
    one, other, x = network(0), network(1), rows(5, 6)

    def both(p: Tensor) -> Tensor:
        mixed: Tensor = 2 * one(p) - 3 * other(p)
        return mixed

    a, b, c = (integrated_gradients(m, x, target=0).values for m in (one, other, both))
    torch.testing.assert_close(c, 2 * a - 3 * b)


def test_equal_inputs_of_a_symmetric_model_get_equal_shares() -> None:
    x = rows(5, 1).expand(5, 3).contiguous()
    values = integrated_gradients(lambda p: (p.prod(1) + p.exp().sum(1)).tanh(), x).values
    torch.testing.assert_close(values, values[:, :1].expand(5, 3))


def test_rows_are_explained_alone_as_together() -> None:
    model, x = network(), rows(5, 6)
    target = [0, 1, 2, 0, 1]
    together = integrated_gradients(model, x, target=target)
    for i in range(5):
        alone = integrated_gradients(model, x[i : i + 1], target=target[i])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i])


@pytest.mark.parametrize("max_rows", [1, 3, 7, 32, 1000])
def test_never_more_rows_than_allowed(max_rows: int) -> None:
    seen: list[int] = []
    inner, x = network(), rows(5, 6)

    def model(p: Tensor) -> Tensor:
        seen.append(len(p))
        out: Tensor = inner(p)
        return out

    found = integrated_gradients(model, x, target=0, steps=9, max_rows=max_rows)
    assert max(seen) <= max_rows
    assert sum(seen) == 5 * (9 + 2)
    torch.testing.assert_close(found.values, integrated_gradients(inner, x, target=0, steps=9)[0])


def test_halves_the_rows_when_memory_runs_out() -> None:
    inner, x = network(), rows(5, 6)

    def model(p: Tensor) -> Tensor:
        if len(p) > 6:
            raise torch.OutOfMemoryError("too many rows")
        out: Tensor = inner(p)
        return out

    found = integrated_gradients(model, x, target=0)
    torch.testing.assert_close(found.values, integrated_gradients(inner, x, target=0).values)

    def never(p: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no row at all")

    with pytest.raises(torch.OutOfMemoryError):
        integrated_gradients(never, x)


# -- baselines ------------------------------------------------------------------------------------


def test_the_input_as_baseline_gives_zeros() -> None:
    x = rows(3, 6)
    found = integrated_gradients(network(), x, x, target=0)
    assert not found.values.any()
    assert found.error.abs().max() < 1e-14  # F(x) and F(baseline) may differ in their last bits
    assert found.relative_error == 0


@pytest.mark.parametrize(("ulps", "error"), [(0, 0.0), (20, 0.0), (1000, 1.0)])
def test_a_difference_in_the_last_bits_is_none(ulps: int, error: float) -> None:
    outputs = torch.tensor([3.0, -5.0])
    others = outputs * (1 + ulps * torch.finfo(outputs.dtype).eps)
    found = Attributions(torch.zeros(2, 6), outputs - others, outputs, others)
    assert found.relative_error == pytest.approx(error)
    missed = found._replace(error=torch.ones(2))
    assert missed.relative_error > 100


@pytest.mark.parametrize(
    "baseline", [0.5, torch.tensor(0.5), torch.full((6,), 0.5), torch.full((1, 6), 0.5)]
)
def test_baselines_broadcast(baseline: Any) -> None:
    model, x = network(), rows(3, 6)
    wanted = integrated_gradients(model, x, torch.full_like(x, 0.5), target=0)
    found = integrated_gradients(model, x, baseline, target=0)
    torch.testing.assert_close(found.values, wanted.values)


def test_a_list_of_baselines_is_averaged() -> None:
    model, x = network(), rows(3, 6)
    starts: list[Any] = [0.0, rows(6, seed=1), rows(3, 6, seed=2)]
    found = integrated_gradients(model, x, starts, target=0)
    each = [integrated_gradients(model, x, start, target=0) for start in starts]
    for name in found._fields:
        mean = torch.stack([getattr(one, name) for one in each]).mean(0)
        torch.testing.assert_close(getattr(found, name), mean)


# -- shapes, types, places ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 0), (0, 4), (0,), (3, 2, 2, 2), (1, 1)])
def test_any_shape_of_rows(shape: tuple[int, ...]) -> None:
    x = rows(*shape)
    found = integrated_gradients(lambda p: p.square()[..., None].flatten(1).sum(1), x)
    torch.testing.assert_close(found.values, x.square())
    assert found.error.shape == shape[:1]


def test_several_inputs() -> None:
    x, y = rows(3, 4), rows(3, 2, 2, seed=1)

    def model(p: Tensor, q: Tensor) -> Tensor:
        return p.sum(1) * q.sum((1, 2)) + p[:, 0]

    found = integrated_gradients(model, (x, y), (0.0, y.mean(0)))
    assert [v.shape for v in found.values] == [x.shape, y.shape]
    together = found.values[0].sum(1) + found.values[1].sum((1, 2))
    torch.testing.assert_close(together, model(x, y) - model(0 * x, y.mean(0).expand_as(y)))
    single = integrated_gradients(lambda p: model(p, y[:1]), (x,))
    assert isinstance(single.values, tuple)


def test_an_input_that_is_not_used_gets_zeros() -> None:
    found = integrated_gradients(lambda p, q: p.sum(1), (rows(3, 2), rows(3, 5)))
    assert found.values[1].shape == (3, 5)
    assert not found.values[1].any()


def test_additional_arguments_go_row_by_row() -> None:
    x, mask, scale = rows(4, 5), torch.rand(4, 5) < 0.5, torch.tensor(2.0)

    def model(p: Tensor, mask: Tensor, scale: Tensor, name: str) -> Tensor:
        assert name == "as it is"
        return (p.square() * mask).sum(1) * scale

    found = integrated_gradients(model, x, additional=(mask, scale, "as it is"), max_rows=6)
    torch.testing.assert_close(found.values, 2 * x.square() * mask)


@pytest.mark.parametrize(
    ("target", "index"),
    [
        ((1, 2), [(1, 2)] * 3),
        ([(0, 1), (1, 2), (0, 0)], [(0, 1), (1, 2), (0, 0)]),
        (torch.tensor([[0, 1], [1, 2], [0, 0]]), [(0, 1), (1, 2), (0, 0)]),
    ],
)
def test_outputs_of_several_axes(target: Any, index: list[tuple[int, int]]) -> None:
    model, x = network(outputs=6), rows(3, 6)
    found = integrated_gradients(lambda p: model(p).view(-1, 2, 3), x, target=target)
    flat = [3 * i + j for i, j in index]
    torch.testing.assert_close(found.values, integrated_gradients(model, x, target=flat).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype) -> None:
    model, x = network(), rows(3, 6)
    wanted = integrated_gradients(model, x, target=0).values
    found = integrated_gradients(network().to(dtype), x.to(dtype), target=0)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), wanted, rtol=0, atol=0.05)


def test_autocast_leaves_the_sum_in_full_precision() -> None:
    x = rows(3, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = integrated_gradients(lambda p: (p**3).sum(1), x)
    torch.testing.assert_close(found.values, x**3, rtol=1e-5, atol=1e-6)


def test_a_compiled_model() -> None:
    model, x = network().float(), rows(3, 6).float()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    wanted = integrated_gradients(model, x, target=0).values
    torch.testing.assert_close(integrated_gradients(compiled, x, target=0).values, wanted)


def test_one_forward_pass_where_all_points_fit_into_it() -> None:
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x**3).sum(1)

    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    whole = integrated_gradients(model, x, baselines=0.5, steps=5)
    assert sizes == [2 * (5 + 2)]
    apart = integrated_gradients(model, x, baselines=0.5, steps=5, max_rows=13)
    assert max(sizes[1:]) <= 13
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_error_of_the_model_is_of_the_rows_as_given() -> None:
    def model(x: Tensor) -> Tensor:
        raise ValueError(f"{len(x)} rows")

    with pytest.raises(ValueError, match=r"^3 rows$"):
        integrated_gradients(model, torch.ones(3, 2))
