"""Scores that are far apart, low precision, and the rule for when probability space is safe."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_crf import CRF, likelihood, scaled

WORDS = ["S", "B", "M", "E"]


def in_log_space(crf: CRF, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a float64 copy, without probability space."""
    double = copy.deepcopy(crf).double()
    emissions = inputs[0].detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "plan", lambda *_, **__: None)
        loss = double(emissions, *inputs[1:])
    found = torch.autograd.grad(loss[loss.isfinite()].sum(), [emissions, *double.parameters()])
    return loss.detach(), list(found)


def used_plans(patch: pytest.MonkeyPatch) -> list[scaled.Plan | None]:
    """Return the list into which the plans of the following calls are written."""
    plans: list[scaled.Plan | None] = []
    original = scaled.plan

    def spy(*args: Any, **kwargs: Any) -> scaled.Plan | None:
        plans.append(original(*args, **kwargs))
        return plans[-1]

    patch.setattr(scaled, "plan", spy)
    return plans


def assert_as_exact_as_float32(crf: CRF, emissions: Tensor, tags: Tensor, mask: Any = None) -> None:
    """Loss and gradients equal those of float64 log space to the rounding of float32."""
    emissions = emissions.detach().requires_grad_()
    loss = crf(emissions, tags, mask)
    expected, gradients = in_log_space(crf, emissions, tags, mask)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
    found = torch.autograd.grad(loss[loss.isfinite()].sum(), [emissions, *crf.parameters()])
    # Start and end scores are added to emissions in float32. A gradient by transitions is a
    # difference of counts, up to one per position.
    largest = emissions.abs().masked_fill(emissions == -torch.inf, 0).max().item()
    tolerances = [2e-6 + 1.2e-7 * largest, *[1e-6 * emissions.shape[0] * emissions.shape[1]] * 3]
    for a, e, tolerance in zip(found, gradients, tolerances, strict=False):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=tolerance)


SCALES = {
    "float32": (0.5, torch.float32),
    "float32, often": (5.0, torch.float32),
    "float64": (25.0, torch.float64),
    "log space": (1e4, None),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spikes", [False, True])
def test_transitions_of_any_scale(
    scale: str, spikes: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Whatever the plan, loss and gradients are those of log space."""
    size, dtype = SCALES[scale]
    crf = CRF(4, reduction="none")
    with torch.no_grad():
        crf.transitions.copy_(size * (torch.rand(4, 4, generator=generator) < 0.4))
    emissions = torch.randn(3, 120, 4, generator=generator)
    if spikes:
        emissions = emissions * torch.randint(1, 200, (3, 120, 1), generator=generator)
    tags = torch.randint(4, (3, 120), generator=generator)
    tags[0] = crf.decode(emissions).sequences[0]
    mask = torch.arange(120) < torch.tensor([[120], [77], [1]])
    plans = used_plans(monkeypatch)
    assert_as_exact_as_float32(crf, emissions, tags, mask)
    assert (plans[0] and plans[0].dtype) == dtype


@pytest.mark.parametrize("size", [0.3, 3.0, 20.0, 100.0, 5e3])
@pytest.mark.parametrize("scheme", ["BMES", "BIOES"])
def test_constrained_chains_of_any_scale(
    size: float, scheme: str, generator: torch.Generator
) -> None:
    names = WORDS if scheme == "BMES" else ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y"]
    crf = CRF(len(names), scheme=scheme, tag_names=names, reduction="none", forbidden="inf")
    emissions = size * torch.randn(4, 60, len(names), generator=generator)
    tags = crf.decode(emissions).sequences
    tags[3] = torch.randint(len(names), (60,), generator=generator)
    assert_as_exact_as_float32(crf, emissions, tags)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.1, 1.0, 3.0, 6.0, 9.0, 14.0, 60.0, 150.0]),
    spread=st.sampled_from([0.5, 20.0, 1000.0]),
    tags=st.integers(1, 9),
)
def test_what_the_plan_promises(seed: int, size: float, spread: float, tags: int) -> None:
    """Two-valued scores at the edge of each dtype: the worst for the bound."""
    generator = torch.Generator().manual_seed(seed)
    crf = CRF(tags, reduction="none")
    with torch.no_grad():
        for parameter in crf.parameters():
            high = torch.rand(parameter.shape, generator=generator) < 0.3
            parameter.copy_(1.0371 * size * high)  # no sum of these is exact
    emissions = 1.0371 * spread * (torch.rand(2, 50, tags, generator=generator) < 0.5)
    assert_as_exact_as_float32(crf, emissions, crf.decode(emissions).sequences)


def test_plan_rule() -> None:
    both = (torch.float32, torch.float64)
    sizes: dict[str, Any] = {"tags": 4, "time": 100, "reach": 1}
    gentle = scaled.plan(both, drop=0.5, **sizes)
    assert gentle is not None
    assert gentle.dtype == torch.float32
    assert gentle.interval > 5
    steep = scaled.plan(both, drop=50.0, **sizes)
    assert steep is not None
    assert steep.dtype == torch.float64
    for drop in (500.0, math.inf, math.nan):
        assert scaled.plan(both, drop=drop, **sizes) is None
    apart: dict[str, Any] = {"tags": 4, "reach": math.inf, "drop": 5.0}
    assert scaled.plan(both, time=10, **apart) is not None  # ten steps cannot drop far
    assert scaled.plan(both, time=1000, **apart) is None


def test_scores_of_ten_thousand() -> None:
    """−1e4 as 'forbidden' works, if slowly: the path that avoids it is certain."""
    crf = CRF(3, boundaries=False, reduction="none")
    with torch.no_grad():
        crf.transitions.fill_(0.0)
        crf.transitions[0, 1] = -1e4
    emissions = torch.zeros(1, 20, 3, requires_grad=True)
    tags = torch.zeros(1, 20, dtype=torch.long)
    tags[0, 1] = 1
    loss = crf(emissions, tags)
    assert loss.item() == pytest.approx(1e4 + 20 * math.log(3), rel=1e-3)
    loss.backward()
    assert emissions.grad is not None
    assert emissions.grad.isfinite().all()


def test_confident_models_keep_their_digits() -> None:
    """log Z and score are near 26 000, where float32 counts in steps of 0.002."""
    generator = torch.Generator().manual_seed(0)
    crf = CRF(4, reduction="none")
    emissions = torch.randn(2, 500, 4, generator=generator) + 40.0
    emissions[..., 1] += 12.0
    tags = torch.ones(2, 500, dtype=torch.long)
    expected, _ = in_log_space(crf, emissions, tags, None)
    assert expected.max() < 0.1
    torch.testing.assert_close(crf(emissions, tags).double(), expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    crf = CRF(5, reduction="none")
    emissions = (3 * torch.randn(3, 40, 5)).to(dtype).requires_grad_()
    tags = torch.randint(5, (3, 40))
    loss = crf(emissions, tags)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, crf(emissions.float(), tags))
    loss.sum().backward()
    assert emissions.grad is not None
    assert emissions.grad.dtype == dtype
    assert crf.decode(emissions).scores.dtype == torch.float32
    assert crf.marginals(emissions).dtype == torch.float32
    assert torch.equal(crf.decode(emissions).sequences, crf.decode(emissions.float()).sequences)


def test_autocast_changes_nothing() -> None:
    crf = CRF(9, reduction="none")
    emissions, tags = torch.randn(2, 30, 9, requires_grad=True), torch.randint(9, (2, 30))
    expected = crf(emissions, tags)
    gradients = torch.autograd.grad(expected.sum(), [emissions, *crf.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = crf(emissions, tags)
        found = torch.autograd.grad(loss.sum(), [emissions, *crf.parameters()])
        marginals = crf.marginals(emissions.detach())
    torch.testing.assert_close(loss, expected)
    for a, e in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, e)
    torch.testing.assert_close(marginals, crf.marginals(emissions.detach()))


def test_minus_infinity_among_emissions(generator: torch.Generator) -> None:
    """A tag forbidden at a position, in both spaces, with and without constraints."""
    emissions = torch.randn(3, 12, 4, generator=generator)
    emissions[:, 3, 1] = -torch.inf
    emissions[:, 7, [0, 2]] = -torch.inf
    for crf in (
        CRF(4, reduction="none", forbidden="inf"),
        CRF(4, scheme="BMES", tag_names=WORDS, reduction="none", forbidden="inf"),
    ):
        tags = crf.decode(emissions).sequences
        tags[2, 3] = 1
        assert_as_exact_as_float32(crf, emissions, tags)
        assert crf(emissions, tags)[2] == torch.inf


def test_fully_forbidden_column_has_no_nan_gradient() -> None:
    crf = CRF(3, reduction="none")
    with torch.no_grad():
        crf.transitions[:, 1] = -torch.inf
    emissions = torch.randn(2, 6, 3, requires_grad=True)
    loss = crf(emissions, torch.zeros(2, 6, dtype=torch.long))
    loss.sum().backward()
    for tensor in (emissions, *crf.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_row_without_a_path_has_no_nan_gradient() -> None:
    crf = CRF(3, reduction="none", forbidden="inf")
    emissions = torch.randn(2, 60, 3)
    emissions[0, 2] = -torch.inf
    emissions.requires_grad_()
    partition = crf.log_partition(emissions)
    assert partition[0] == -torch.inf
    assert partition[1].isfinite()
    loss = crf(emissions, torch.zeros(2, 60, dtype=torch.long))
    assert loss[0] == torch.inf
    for value in (partition, loss):
        gradients = torch.autograd.grad(
            value.sum(), [emissions, *crf.parameters()], retain_graph=True
        )
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][0] == 0).all()
    assert (crf.marginals(emissions)[0] == 0).all()
    assert (crf.marginals(emissions.detach())[0] == 0).all()
    assert crf.entropy(emissions)[0] == 0


def test_one_synchronisation_for_a_loss(transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = Tensor.tolist

    def spy(self: Tensor) -> Any:
        shapes.append(tuple(self.shape))
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", spy)
    crf = CRF(4, scheme="BMES", tag_names=WORDS)
    mask = torch.arange(50) < torch.tensor([[50], [20]])
    with transfers:
        crf(torch.randn(2, 50, 4), torch.zeros(2, 50, dtype=torch.long), mask).backward()
    assert shapes == [(6,)]
    assert transfers.count == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rejects_scores_that_are_not_finite(wrong: float) -> None:
    crf, tags = CRF(3), torch.zeros(2, 4, dtype=torch.long)
    emissions = torch.zeros(2, 4, 3)
    emissions[1, 2, 0] = wrong
    calls = (
        lambda: crf(emissions, tags),
        lambda: crf.log_prob(emissions, tags),
        lambda: crf.log_partition(emissions),
        lambda: crf.marginals(emissions),
        lambda: crf.entropy(emissions),
        lambda: crf.sample(emissions, 2),
        lambda: crf.decode(emissions),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match="row 1, position 2, tag 0") as caught:
            call()
        assert caught.value.argument == "emissions"
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert crf(emissions, tags, mask).isfinite()
    emissions[1, 3, 1] = wrong
    with pytest.raises(ArgumentError, match="row 1, position 3, tag 1"):
        crf(emissions, tags, mask)
    for name in ("transitions", "start_transitions", "end_transitions"):
        broken = CRF(3)
        with torch.no_grad():
            getattr(broken, name).view(-1)[-1] = wrong
        with pytest.raises(ArgumentError, match=f"`{name}` of CRF must be below") as caught:
            broken(torch.zeros(2, 4, 3), tags)
        assert caught.value.argument == name
        with pytest.raises(ArgumentError, match=f"`{name}` of CRF"):
            broken.decode(torch.zeros(2, 4, 3))


def test_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has none, log space takes the place of float64."""
    monkeypatch.setattr(likelihood, "widest_dtype", lambda _: torch.float32)
    monkeypatch.setattr(scaled, "widest_dtype", lambda _: torch.float32)
    plans = used_plans(monkeypatch)
    crf = CRF(4, reduction="none")
    with torch.no_grad():
        crf.transitions.mul_(20)
    emissions, tags = torch.randn(2, 30, 4), torch.zeros(2, 30, dtype=torch.long)
    loss = crf(emissions, tags)
    assert plans == [None]
    expected, _ = in_log_space(crf, emissions, tags)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
