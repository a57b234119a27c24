"""The loss: its value, its gradient, its limits and its errors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue_memm import MEMM

INF = float("inf")

MASKS = {
    "none": None,
    "full": [[1, 1, 1, 1, 1]] * 4,
    "right": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
    "left": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 0, 0, 1]],
    "empty rows": [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 4,
}


def row_log_prob(f: Tensor, g: Tensor, tags: list[int], direction: str, scale: float) -> Tensor:
    """The definition, one position after the other; ``f`` are the real positions of one row."""
    if direction == "both":
        ways = [row_log_prob(f, g, tags, way, scale) for way in ("forward", "backward")]
        return (ways[0] + ways[1]) / 2
    if direction == "backward":
        return row_log_prob(f.flip(0), g.T, tags[::-1], "forward", scale)
    total = f.new_zeros(())
    for k, tag in enumerate(tags):
        scores = f[k] if k == 0 else scale * (f[k] + g[tags[k - 1]])
        total = total + scores[tag] - scores.logsumexp(0)
    return total


def log_probs(  # noqa: PLR0917
    f: Tensor, g: Tensor, tags: Tensor, mask: Tensor | None, direction: str, scale: float = 1.0
) -> Tensor:
    mask = torch.ones_like(tags, dtype=torch.bool) if mask is None else mask
    rows = [
        row_log_prob(f[b][mask[b]], g, tags[b][mask[b]].tolist(), direction, scale)
        for b in range(len(tags))
    ]
    return torch.stack(rows)


def problem(
    *,
    batch: int = 4,
    time: int = 5,
    num_tags: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **params: Any,
) -> tuple[MEMM, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    memm = MEMM(num_tags, **params).to(dtype)
    with torch.no_grad():
        for parameter in memm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    emissions = 2 * torch.randn(batch, time, num_tags, generator=generator, dtype=dtype)
    return memm, emissions, torch.randint(num_tags, (batch, time), generator=generator)


def matrix_of(memm: MEMM) -> Tensor:
    return memm.transitions if memm.rank is None else memm.left @ memm.right.T


def mask_of(name: str) -> Tensor | None:
    rows = MASKS[name]
    return None if rows is None else torch.tensor(rows, dtype=torch.bool)


def gradients(value: Tensor, inputs: list[Tensor]) -> Iterator[Tensor]:
    return iter(torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("mask", [None, [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_probabilities_of_all_taggings_add_up_to_one(
    mask: list[int] | None, direction: Any, dtype: torch.dtype, tolerance: float
) -> None:
    memm, emissions, _ = problem(batch=1, dtype=dtype, direction=direction)
    real = torch.ones(5, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    taggings = torch.zeros(3 ** int(real.sum()), 5, dtype=torch.long)
    taggings[:, real] = torch.tensor(list(itertools.product(range(3), repeat=int(real.sum()))))
    log_prob = memm.log_prob(
        emissions.expand(len(taggings), -1, -1), taggings, real.expand(len(taggings), -1)
    )
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=tolerance)


def test_mean_of_both_directions_is_no_distribution() -> None:
    memm, emissions, _ = problem(batch=1)
    taggings = torch.tensor(list(itertools.product(range(3), repeat=5)))
    total = memm.log_prob(emissions.expand(len(taggings), -1, -1), taggings).exp().sum().item()
    assert total < 0.99


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("rank", [None, 2])
def test_matches_definition(mask: str, direction: Any, scale: float, rank: int | None) -> None:
    memm, emissions, tags = problem(
        direction=direction, scale=scale, rank=rank, reduction="none", seed=1
    )
    real = mask_of(mask)
    emissions.requires_grad_()
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    inputs = [emissions, *memm.parameters()]
    value = memm(emissions, tags, real)
    expected = -log_probs(emissions, matrix_of(memm), tags, real, direction, scale)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(
        (expected * weights).sum() + 0 * sum(x.sum() for x in inputs), inputs
    )
    for mine, other in zip(gradients((value * weights).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "token_mean"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("direction", ["both", "backward"])
def test_reductions(reduction: Any, mask: str, direction: Any) -> None:
    memm, emissions, tags = problem(direction=direction, reduction=reduction, seed=2)
    real = mask_of(mask)
    counted = torch.ones_like(tags, dtype=torch.bool) if real is None else real
    emissions.requires_grad_()
    inputs = [emissions, memm.transitions]
    total = -log_probs(emissions, memm.transitions, tags, real, direction).sum()
    count = {"sum": 1, "mean": counted.any(1).sum().item(), "token_mean": counted.sum().item()}
    expected = total / max(count[reduction], 1)
    value = memm(emissions, tags, real)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(expected + 0 * sum(x.sum() for x in inputs), inputs)
    for mine, other in zip(gradients(value, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tags", [20, 40], ids=["few tags", "many tags"])
@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_matches_definition_for_few_and_many_tags(
    num_tags: int, direction: Any, reduction: Any
) -> None:
    memm, emissions, tags = problem(
        batch=12, num_tags=num_tags, direction=direction, reduction=reduction, seed=3
    )
    real = torch.arange(5) < torch.arange(12).remainder(6).unsqueeze(1)
    emissions.requires_grad_()
    inputs = [emissions, memm.transitions]
    value = memm(emissions, tags, real)
    expected = -log_probs(emissions, memm.transitions, tags, real, direction)
    expected = expected if reduction == "none" else expected.sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view_as(value)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, other in zip(gradients((value * weights).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 4),
    time=st.integers(1, 5),
    num_tags=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    direction=st.sampled_from(["both", "forward", "backward"]),
    reduction=st.sampled_from(["none", "sum"]),
)
def test_matches_definition_in_float32(  # noqa: PLR0917
    data: st.DataObject,
    batch: int,
    time: int,
    num_tags: int,
    spread: float,
    direction: Any,
    reduction: Any,
) -> None:
    memm, emissions, tags = problem(
        batch=batch,
        time=time,
        num_tags=num_tags,
        dtype=torch.float32,
        direction=direction,
        reduction=reduction,
        seed=data.draw(st.integers(0, 1000)),
    )
    emissions = (emissions * spread).requires_grad_()
    bits = data.draw(st.lists(st.booleans(), min_size=batch * time, max_size=batch * time))
    mask = torch.tensor(bits).view(batch, time)
    value = memm(emissions, tags, mask)
    exact = emissions.detach().double().requires_grad_()
    expected = -log_probs(exact, memm.transitions.double(), tags, mask, direction)
    expected = expected.sum() if reduction == "sum" else expected
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    expected = expected.sum() + 0 * exact.sum()
    (mine,), (theirs,) = gradients(value.sum(), [emissions]), gradients(expected, [exact])
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [50.0, 64.0, 66.0, 90.0, 200.0])
@pytest.mark.parametrize("where", ["emissions", "transitions"])
def test_is_accurate_where_products_of_exponentials_underflow(gap: float, where: str) -> None:
    memm, emissions, tags = problem(dtype=torch.float32, seed=3)
    with torch.no_grad():
        if where == "emissions":
            emissions[1, 2, tags[1, 2]] -= gap
        else:
            memm.transitions[int(tags[0, 1]), int(tags[0, 2])] -= gap
    emissions.requires_grad_()
    value = memm(emissions, tags)
    exact = [emissions.detach().double(), memm.transitions.detach().double()]
    for x in exact:
        x.requires_grad_()
    expected = -log_probs(exact[0], exact[1], tags, None, "both").mean()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    inputs = [emissions, memm.transitions]
    for mine, other in zip(gradients(value, inputs), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-7)


def test_a_confident_models_loss_is_accurate_and_not_negative() -> None:
    memm, emissions, tags = problem(batch=64, time=80, num_tags=4, dtype=torch.float32, seed=6)
    for gap, rtol in ((10.0, 1e-3), (40.0, 1.0)):
        sure = emissions.scatter_add(2, tags.unsqueeze(2), torch.full((64, 80, 1), gap))
        value = memm(sure, tags)
        expected = -log_probs(sure.double(), memm.transitions.double(), tags, None, "both").mean()
        assert value >= 0
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=5e-5)


@pytest.mark.parametrize(("emission", "transition"), [(-97.0, 86.0), (86.0, -97.0)])
def test_is_accurate_where_one_factor_underflows_and_the_other_is_large(
    emission: float, transition: float
) -> None:
    memm, emissions, tags = problem(dtype=torch.float32, seed=7)
    emissions[:, 1:-1] += emission  # those with a neighbour on both sides
    with torch.no_grad():
        memm.transitions.add_(transition)
    exact = memm.transitions.detach().double()
    expected = -log_probs(emissions.double(), exact, tags, None, "both").mean()
    torch.testing.assert_close(memm(emissions, tags).double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_is_invariant_under_a_constant(offset: float) -> None:
    memm, emissions, tags = problem(seed=4)
    shifted = memm(emissions + offset, tags)
    torch.testing.assert_close(shifted, memm(emissions, tags), rtol=1e-10, atol=0)


def test_reversed_sequence_and_transposed_transitions_give_the_same_loss_of_both() -> None:
    memm, emissions, tags = problem(seed=5)
    mirrored, _, _ = problem(seed=5)
    with torch.no_grad():
        mirrored.transitions.copy_(memm.transitions.T)
    mask = mask_of("holes")
    assert mask is not None
    torch.testing.assert_close(
        mirrored(emissions.flip(1), tags.flip(1), mask.flip(1)), memm(emissions, tags, mask)
    )


@pytest.mark.parametrize("batch", [1, 6], ids=["more tags than tokens", "fewer"])
@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_low_rank_equals_the_full_product(batch: int, direction: Any) -> None:
    thin, emissions, tags = problem(batch=batch, num_tags=7, rank=2, direction=direction)
    full = MEMM(7, direction=direction).double()
    with torch.no_grad():
        full.transitions.copy_(thin.left @ thin.right.T)
    value, expected = thin(emissions, tags), full(emissions, tags)
    torch.testing.assert_close(value, expected)
    left, right = gradients(value, [thin.left, thin.right])
    (both,) = gradients(expected, [full.transitions])
    torch.testing.assert_close(left, both @ thin.right)
    torch.testing.assert_close(right, both.T @ thin.left)


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient(direction: Any, rank: int | None, scale: float, reduction: Any) -> None:
    memm, emissions, tags = problem(
        batch=2, time=4, direction=direction, rank=rank, scale=scale, reduction=reduction
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]).bool()
    names = [name for name, _ in memm.named_parameters()]

    def loss(emissions: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        result: Tensor = torch.func.functional_call(memm, named, (emissions, tags, mask))
        return result

    inputs = (emissions.requires_grad_(), *(p.detach().requires_grad_() for p in memm.parameters()))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", ["emissions", "transitions"])
def test_gradient_of_one_input_alone(frozen: str) -> None:
    memm, emissions, tags = problem(batch=2, time=3)
    emissions.requires_grad_(frozen != "emissions")
    memm.transitions.requires_grad_(frozen != "transitions")
    wanted = memm.transitions if frozen == "emissions" else emissions
    expected = -log_probs(emissions, memm.transitions, tags, None, "both").mean()
    (theirs,) = torch.autograd.grad(expected, [wanted])
    (mine,) = torch.autograd.grad(memm(emissions, tags), [wanted], create_graph=True)
    torch.testing.assert_close(mine, theirs)
    (again,) = gradients(memm(emissions, tags), [wanted])
    torch.testing.assert_close(again, theirs)


def test_gradient_can_be_taken_twice_from_one_graph() -> None:
    memm, emissions, tags = problem()
    loss = memm(emissions.requires_grad_(), tags)
    (first,) = torch.autograd.grad(loss, [emissions], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [emissions])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def keras_loss(f: Tensor, g: Tensor, tags: Tensor, lengths: list[int]) -> float:
    """Token mean of bert4keras: logits (f + g) / 2, at the first step (f + f) / 2."""
    total = 0.0
    for b, length in enumerate(lengths):
        for way in (1, -1):
            scores = f[b, :length].flip(0) if way < 0 else f[b, :length]
            labels = tags[b, :length].tolist()[::way]
            table = g.T if way < 0 else g
            history = torch.cat([scores[:1], table[torch.tensor(labels[:-1], dtype=torch.long)]])
            logits = (scores + history) / 2
            total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item() / 2
    return total / sum(lengths)


def test_scale_of_a_half_reproduces_bert4keras() -> None:
    memm, emissions, tags = problem(
        dtype=torch.float32, scale=0.5, reduction="token_mean", num_tags=4, seed=6
    )
    mask = mask_of("right")
    expected = keras_loss(emissions, memm.transitions.detach(), tags, [5, 3, 1, 4])
    assert memm(emissions, tags, mask).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_reduces_to_cross_entropy_when_time_is_one(direction: Any) -> None:
    memm, emissions, tags = problem(time=1, direction=direction, scale=0.5)
    torch.testing.assert_close(memm(emissions, tags), F.cross_entropy(emissions[:, 0], tags[:, 0]))


def test_reduces_to_cross_entropy_when_transitions_are_zero() -> None:
    memm, emissions, tags = problem(reduction="token_mean")
    torch.nn.init.zeros_(memm.transitions)
    torch.testing.assert_close(
        memm(emissions, tags), F.cross_entropy(emissions.flatten(0, 1), tags.flatten())
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_one_tag_costs_nothing(rank: int | None) -> None:
    with pytest.warns(match="rank") if rank else contextlib.nullcontext():
        memm, emissions, tags = problem(num_tags=1, rank=rank)
    assert memm(emissions, tags).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_forbidden_tags_and_transitions(direction: Any, scale: float) -> None:
    memm, emissions, tags = problem(direction=direction, scale=scale, seed=7)
    pairs = set(zip(tags[:, :-1].flatten().tolist(), tags[:, 1:].flatten().tolist(), strict=True))
    a, b = next(p for p in itertools.product(range(3), repeat=2) if p not in pairs)
    with torch.no_grad():
        memm.transitions[a, b] = -INF
        emissions[0, 0, (int(tags[0, 0]) + 1) % 3] = -INF
        emissions[1, 4, (int(tags[1, 4]) + 1) % 3] = -INF
    emissions.requires_grad_()
    loss = memm(emissions, tags)
    expected = -log_probs(emissions, memm.transitions, tags, None, direction, scale).mean()
    torch.testing.assert_close(loss, expected)
    for gradient in gradients(loss, [emissions, memm.transitions]):
        assert gradient.isfinite().all()
    assert memm.log_prob(emissions, tags).isfinite().all()
