"""The self-terminating layer and its loss: oracle, bound, masks, numerics, errors."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue_consistent_decoding import (
    SelfTerminatingLayer,
    SelfTerminatingLoss,
    log_end_floor,
    non_termination_ratio,
    self_terminating,
    steps_to_end,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def by_products(
    logits: Tensor, end: int, epsilon: float, context: int = 0, mask: Tensor | None = None
) -> Tensor:
    """The post's recursion, in plain probabilities, one number at a time."""
    found = torch.empty_like(logits)
    for b, row in enumerate(logits.tolist()):
        alpha, seen = 1.0, 0
        for t, scores in enumerate(row):
            if mask is None or bool(mask[b, t]):
                seen += 1
                if seen > context:
                    alpha *= (1 - epsilon) / (1 + math.exp(-scores[end]))
            others = [math.exp(s) if v != end else 0.0 for v, s in enumerate(scores)]
            for v, weight in enumerate(others):
                found[b, t, v] = 1 - alpha if v == end else alpha * weight / sum(others)
    return found


@pytest.mark.parametrize("end", [0, 2, 4])
@pytest.mark.parametrize("context", [0, 2])
def test_matches_the_posts_recursion(end: int, context: int) -> None:
    logits = 2 * randn(3, 6, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]).bool()
    layer = SelfTerminatingLayer(end, epsilon=0.1, context_len=context)
    for real in (None, mask):
        wanted = by_products(logits, end, 0.1, context, real)
        torch.testing.assert_close(layer(logits, real).exp(), wanted, rtol=1e-12, atol=1e-12)


def test_with_and_without_gradient_is_the_same() -> None:
    logits = randn(2, 4, 6)
    layer = SelfTerminatingLayer([1, 4], epsilon=0.05)
    torch.testing.assert_close(layer(logits.clone().requires_grad_()), layer(logits))


def test_step_by_step_is_all_at_once() -> None:
    logits = 3 * randn(4, 50, 7)
    at_once = SelfTerminatingLayer(3, epsilon=0.01)(logits)
    state = None
    for t in range(50):
        scores, state = self_terminating(logits[:, t], state, eos_id=3, epsilon=0.01)
        torch.testing.assert_close(scores, at_once[:, t], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    epsilon=st.floats(0.02, 0.9),
    ends=st.sets(st.integers(0, 4), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 5.0, 200.0]),
    seed=st.integers(0, 10_000),
)
def test_is_a_distribution_that_ends_within_the_bound(
    epsilon: float, ends: set[int], scale: float, seed: int
) -> None:
    bound = steps_to_end(epsilon, num_ends=len(ends))
    logits = scale * randn(2, bound, 5, seed=seed)
    index = sorted(ends)
    found = SelfTerminatingLayer(index, epsilon=epsilon)(logits).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, bound, dtype=torch.float64))
    p_end = found[..., index].sum(-1)
    assert bool((p_end.diff(dim=1) >= -1e-12).all())
    floor = 1 - (1 - epsilon) ** torch.arange(1, bound + 1, dtype=torch.float64)
    assert bool((p_end >= floor - 1e-12).all())
    assert set(found[:, -1].argmax(-1).tolist()) <= ends  # greedy search has ended by then


@pytest.mark.parametrize(("epsilon", "steps"), [(1e-2, 69), (1e-3, 693), (1e-4, 6932), (0.5, 2)])
def test_the_bound_is_tight(epsilon: float, steps: int) -> None:
    assert steps_to_end(epsilon) == steps
    for n in (steps - 1, steps):  # the worst case: a model that always goes on, to one token
        p_end = -math.expm1(n * math.log1p(-epsilon))
        assert (p_end > 0.5) == (n == steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[30.0, -30.0, 0.5]] * 2000]).to(dtype)
    found = SelfTerminatingLayer(0, epsilon=1e-4)(logits)
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    p_end = found[0, :, 0].double().exp()
    wanted = -torch.expm1(torch.arange(1, 2001, dtype=torch.float64) * math.log1p(-1e-4))
    torch.testing.assert_close(p_end, wanted, rtol=1e-5, atol=0)


def test_small_and_certain_ends_are_exact() -> None:
    tiny = SelfTerminatingLayer(0, epsilon=1e-12)(torch.tensor([[[60.0, 0.0]]]))[0, 0, 0]
    assert float(tiny) == pytest.approx(math.log(1e-12), rel=1e-6)
    late = SelfTerminatingLayer(0, epsilon=0.5)(torch.full((1, 500, 2), -3.0))[0, -1]
    assert float(late[0]) == 0.0
    assert float(late[1]) < -1500  # not -inf: the logarithm is exact


def test_a_forbidden_end_postpones() -> None:
    logits = randn(1, 5, 4)
    banned = logits.clone()
    banned[0, 2, 1] = -torch.inf
    found = SelfTerminatingLayer(1, epsilon=0.1)(banned)
    assert float(found[0, 2, 1]) == -torch.inf
    assert float(found[0, 2].exp().sum()) == pytest.approx(1)
    without = torch.cat([logits[:, :2], logits[:, 3:]], 1)
    rest = SelfTerminatingLayer(1, epsilon=0.1)(without)
    torch.testing.assert_close(found[:, 3:], rest[:, 2:])


def test_padding_on_either_side_changes_nothing() -> None:
    logits = randn(1, 4, 5)
    layer = SelfTerminatingLayer(2, epsilon=0.1, context_len=1)
    alone = layer(logits)
    rubbish = torch.full((1, 2, 5), torch.nan, dtype=torch.float64)
    real, none = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    left = layer(torch.cat([rubbish, logits], 1), torch.cat([none, real], 1))
    right = layer(torch.cat([logits, rubbish], 1), torch.cat([real, none], 1))
    torch.testing.assert_close(left[:, 2:], alone)
    torch.testing.assert_close(right[:, :4], alone)


@pytest.mark.parametrize("time", [0, 1])
def test_empty_and_length_one(time: int) -> None:
    found = SelfTerminatingLayer(0)(torch.zeros(2, time, 3))
    assert found.shape == (2, time, 3)
    loss = SelfTerminatingLoss(0, reduction="none")
    assert loss(torch.zeros(2, time, 3), torch.zeros(2, time, dtype=torch.long)).shape == (2,)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[1], [4], [0, 3]])
def test_the_loss_is_the_layers_log_likelihood(ends: list[int]) -> None:
    logits = randn(4, 6, 5)
    target = torch.randint(0, 5, (4, 6), generator=seeded(3))
    target[:, :2] = 2  # no end in the context
    target[1, 4:], target[2, 3:] = -1, -100
    target[3, 5] = ends[-1]
    mask = torch.arange(6) < torch.tensor([6, 6, 6, 4])[:, None]
    real = mask & (target >= 0)
    log_p = SelfTerminatingLayer(ends, epsilon=0.1, context_len=2)(logits, real)
    picked = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    wanted = -torch.where(real, picked, 0.0).sum(1)
    given: dict[str, object] = {"epsilon": 0.1, "context_len": 2}
    found = SelfTerminatingLoss(ends, **given, reduction="none")(logits, target, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted)
    mean = SelfTerminatingLoss(ends, **given, reduction="token_mean")(logits, target, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(mean, wanted.sum() / real.sum())


def test_the_loss_has_its_gradient() -> None:
    logits = randn(2, 4, 4).requires_grad_()
    target = torch.tensor([[1, 3, 2, 0], [0, 3, -1, -1]])
    loss = SelfTerminatingLoss([0, 2], epsilon=0.2)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))
    layer = SelfTerminatingLayer(0, epsilon=0.2, context_len=1)
    assert torch.autograd.gradcheck(lambda x: layer(x)[:, 1:], (logits,))


def test_learns_where_texts_end() -> None:
    """Texts of five tokens: the loss falls, and p(end) is low before the fifth, high at it."""
    z = torch.zeros(1, 6, 2, requires_grad=True)
    target = torch.tensor([[1, 1, 1, 1, 1, 0]])
    optimizer = torch.optim.Adam([z], lr=0.3)
    loss = SelfTerminatingLoss(0, epsilon=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(z, target)
        value.backward()
        optimizer.step()
    p_end = SelfTerminatingLayer(0, epsilon=1e-3)(z.detach())[0, :, 0].exp()
    assert value.item() < 0.1
    assert float(p_end[4]) < 0.05
    assert float(p_end[5]) > 0.95


def test_warns_once_where_no_text_ends() -> None:
    loss = SelfTerminatingLoss(0)
    logits, target = torch.zeros(1, 2, 3), torch.tensor([[1, 2]])
    with pytest.warns(UserWarning, match="never learns to end"):
        loss(logits, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits, target)


# -- bounded states --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["max", "euclidean"])
def test_the_floor_is_below_every_bounded_state(norm: str) -> None:
    weight, bias = randn(6, 4), randn(6, seed=1)
    floor = log_end_floor(weight, bias, 2, bound=1.5, norm=norm)  # type: ignore[arg-type]
    states = randn(2000, 4, seed=2)
    length = states.abs().amax(1) if norm == "max" else states.norm(dim=1)
    states = 1.5 * states / length[:, None]
    least = float((states @ weight.T + bias).log_softmax(-1)[:, 2].min())
    assert floor <= least < floor + 3  # a bound, and not an idle one


def test_the_floor_of_two_tokens_is_reached() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    wanted = float(torch.tensor([[-3.0, 0.0]]).log_softmax(-1)[0, 0])
    assert log_end_floor(weight, None, 0) == pytest.approx(wanted)


def test_non_termination_ratio() -> None:
    assert non_termination_ratio(torch.tensor([False, True, True, True])) == 0.25
    with pytest.raises(ArgumentError, match="`found` must be"):
        non_termination_ratio(torch.tensor([1.0]))


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SelfTerminatingLayer, SelfTerminatingLoss])
def test_rejects_bad_arguments(make: type[SelfTerminatingLayer | SelfTerminatingLoss]) -> None:
    for epsilon in (1.0, -0.1, math.nan):
        with pytest.raises(ArgumentError, match=r"`epsilon` .* must be in \[0, 1\)"):
            make(0, epsilon=epsilon)
    for ends in ([], -1, [0, -2], True):
        with pytest.raises(ArgumentError, match="`eos_id`"):
            make(ends)
    with pytest.raises(ArgumentError, match="`context_len`"):
        make(0, context_len=-1)
    with pytest.warns(UserWarning, match="nothing guarantees"):
        make(0, epsilon=0.0)


def test_rejects_ends_that_the_model_lacks() -> None:
    with pytest.raises(ArgumentError, match="among the model's 3 tokens"):
        SelfTerminatingLayer(3)(torch.zeros(1, 1, 3))
    with pytest.raises(ArgumentError, match="not all of them"):
        self_terminating(torch.zeros(1, 2), eos_id=[0, 1])
    with pytest.raises(ArgumentError, match=r"`target` .* below 3"):
        SelfTerminatingLoss(0)(torch.zeros(1, 1, 3), torch.tensor([[3]]))
    with pytest.raises(ArgumentError, match=r"`target` .* shape"):
        SelfTerminatingLoss(0)(torch.zeros(1, 2, 3), torch.tensor([[1]]))


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0])
def test_there_is_no_bound_without_epsilon(bad: float) -> None:
    with pytest.raises(ArgumentError, match="`epsilon`"):
        steps_to_end(bad)
    with pytest.raises(ArgumentError, match="`width`"):
        steps_to_end(0.1, width=0)
