"""What every module owes its user: shapes, devices, saving, compiling, errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import kexue_crf
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import Decoder
from kexue.core.interfaces.loss import Loss
from kexue_crf import CRF, likelihood


def example(**params: Any) -> tuple[CRF, dict[str, Tensor]]:
    found = CRF.example(generator=torch.Generator().manual_seed(0))
    return CRF(**{**found.params, **params}), dict(found.inputs)


def test_is_a_loss_and_a_decoder() -> None:
    assert issubclass(CRF, Loss)
    assert issubclass(CRF, Decoder)
    assert CRF.trainable
    assert CRF.differentiable


def test_components_lead_to_the_module() -> None:
    components = kexue_crf.kexue_components()
    assert [component.id for component in components] == ["loss/crf", "decoder/crf"]
    assert {component.target for component in components} == {"kexue_crf.crf:CRF"}


def test_manifest_is_light() -> None:
    code = "import sys, kexue_crf; print(*(m for m in ('torch', 'numpy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_example_runs() -> None:
    crf, inputs = example()
    loss = crf(**inputs)
    loss.backward()
    assert loss.isfinite()
    assert crf.decode(inputs["emissions"], mask=inputs["mask"]).sequences.shape == (3, 6)


def test_repr() -> None:
    crf = CRF(4, scheme="BMES", tag_names=list("sbme"), reduction="sum")
    assert repr(crf) == "CRF(4, boundaries=True, scheme='BMES', reduction='sum')"


def test_boundaries_are_near_zero_and_transitions_glorot() -> None:
    torch.manual_seed(0)
    crf = CRF(6)
    assert crf.start_transitions is not None
    assert crf.start_transitions.abs().max() <= 0.1
    assert 0.5 < crf.transitions.abs().max() <= (6 / 12) ** 0.5
    assert CRF(6, boundaries=False).start_transitions is None


def test_inputs_are_not_modified() -> None:
    crf, inputs = example(boundaries=True)
    before = {name: value.clone() for name, value in inputs.items()}
    parameters = copy.deepcopy(crf.state_dict())
    inputs["emissions"].requires_grad_()
    crf(**inputs).backward()
    emissions, mask = inputs["emissions"], inputs["mask"]
    for call in (crf.decode, crf.marginals, crf.entropy, crf.log_partition):
        call(emissions, mask=mask)
    crf.sample(emissions, 3, mask=mask)
    crf.decode_nbest(emissions, 3, mask=mask)
    for name, value in before.items():
        assert torch.equal(inputs[name].detach(), value)
    for name, value in parameters.items():
        assert torch.equal(crf.state_dict()[name], value)


def test_strided_and_expanded_inputs() -> None:
    crf = CRF(4, reduction="none")
    wide = torch.randn(6, 8, 2, 3)
    emissions = wide[:, ::2, 0].transpose(0, 2)  # [3, 4, 6] without a contiguous axis
    emissions = emissions.transpose(1, 2)[:, :5]
    tags = torch.randint(4, (5,)).expand(3, 5)
    mask = torch.ones(1, 1, dtype=torch.bool).expand(3, 5)
    expected = crf(emissions.contiguous(), tags.contiguous())
    torch.testing.assert_close(crf(emissions, tags, mask), expected)
    assert torch.equal(
        crf.decode(emissions).sequences, crf.decode(emissions.contiguous()).sequences
    )
    crf.transitions = torch.nn.Parameter(torch.randn(4, 4).T)
    crf(emissions, tags, mask).sum().backward()
    assert crf.score(emissions, tags, mask).isfinite().all()
    one = torch.randn(1, 5, 4, requires_grad=True)
    crf(one.expand(3, 5, 4), tags).sum().backward()
    assert one.grad is not None


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 4)], ids=str)
def test_nothing_to_score(shape: tuple[int, int, int]) -> None:
    batch, time, _ = shape
    for boundaries in (True, False):
        crf = CRF(4, boundaries=boundaries)
        emissions = torch.zeros(shape, requires_grad=True)
        tags = torch.zeros(batch, time, dtype=torch.long)
        loss = crf(emissions, tags, tags == 0)
        assert loss.item() == 0
        loss.backward()
        assert all(parameter.grad is not None for parameter in crf.parameters())
        assert crf.log_partition(emissions).shape == (batch,)
        assert crf.score(emissions, tags).shape == (batch,)
        assert crf.entropy(emissions).shape == (batch,)
        assert crf.marginals(emissions).shape == shape
        assert crf.decode(emissions).sequences.shape == (batch, time)
        assert crf.decode_nbest(emissions, 2).sequences.shape == (batch, 2, time)
        assert crf.sample(emissions, 3).shape == (batch, 3, time)


def test_batch_equals_one_by_one() -> None:
    crf, inputs = example(reduction="none")
    together = crf(**inputs)
    for b in range(3):
        alone = crf(**{name: value[b : b + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[b : b + 1])


def test_only_the_asked_gradients_are_computed() -> None:
    crf, inputs = example()
    crf.requires_grad_(requires_grad=False)
    inputs["emissions"].requires_grad_()
    crf(**inputs).backward()
    assert inputs["emissions"].grad is not None
    assert all(parameter.grad is None for parameter in crf.parameters())
    crf, inputs = example()
    crf.get_parameter("end_transitions").requires_grad_(False)
    crf(**inputs).backward()
    found = {name: parameter.grad is not None for name, parameter in crf.named_parameters()}
    assert found == {"transitions": True, "start_transitions": True, "end_transitions": False}


def test_inference_mode() -> None:
    crf, inputs = example(reduction="none")
    emissions, mask = inputs["emissions"], inputs["mask"]
    expected = crf(**inputs).detach(), crf.marginals(emissions, mask).detach()
    with torch.inference_mode():
        fresh = emissions.clone()
        torch.testing.assert_close(crf(**inputs), expected[0])
        torch.testing.assert_close(crf.marginals(fresh, mask), expected[1])
        crf.transitions.mul_(1.0)
        crf.decode(fresh, mask=mask)
        crf.sample(fresh, 2, mask=mask)
        crf.entropy(fresh, mask)


def test_inference_mode_in_log_space() -> None:
    crf, inputs = example()
    with torch.no_grad():
        crf.transitions[0, 0] = -torch.inf
    expected = crf.marginals(inputs["emissions"], inputs["mask"]).detach()
    with torch.inference_mode():
        found = crf.marginals(inputs["emissions"].clone(), inputs["mask"])
    torch.testing.assert_close(found, expected)


def pickled(crf: CRF) -> Any:
    return pickle.loads(pickle.dumps(crf))  # noqa: S301 (of our own making)


@pytest.mark.parametrize("copies", [copy.deepcopy, pickled], ids=["copy", "pickle"])
def test_copies_compute_the_same(copies: Any) -> None:
    crf = CRF(4, scheme="BMES", tag_names=list("SBME"), reduction="none")
    other = copies(crf)
    emissions = torch.randn(2, 5, 4)
    tags = crf.decode(emissions).sequences
    assert torch.equal(other(emissions, tags), crf(emissions, tags))
    assert torch.equal(other.decode(emissions).sequences, tags)


def test_constraints_move_with_the_module() -> None:
    crf = CRF(4, scheme="BMES", tag_names=list("SBME")).to("meta")
    assert crf.allowed_transitions is not None
    assert crf.allowed_transitions.device.type == "meta"
    assert CRF(4, scheme="BMES", tag_names=list("SBME")).double().allowed_start.dtype == torch.bool  # type: ignore[union-attr]


def test_compiled_equals_eager() -> None:
    crf, inputs = example()
    expected = crf(**inputs)
    expected.backward()
    gradient = crf.transitions.grad
    crf.zero_grad()
    compiled = torch.compile(crf, backend="aot_eager")
    found = compiled(**inputs)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(crf.transitions.grad, gradient)
    emissions, mask = inputs["emissions"], inputs["mask"]
    decode = torch.compile(crf.decode, backend="aot_eager")
    assert torch.equal(
        decode(emissions, mask=mask).sequences, crf.decode(emissions, mask=mask).sequences
    )


def test_trains() -> None:
    """A tag that only its neighbour tells is learnt from transitions alone."""
    torch.manual_seed(0)
    crf = CRF(3)
    tags = torch.arange(12).remainder(3).expand(8, 12)
    emissions = torch.zeros(8, 12, 3)
    emissions[:, 0, 0] = 5.0
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = crf(emissions, tags)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(crf.decode(emissions).sequences, tags)


def test_float64_wins() -> None:
    crf, inputs = example()
    assert crf.double()(**inputs).dtype == torch.float64
    assert (
        crf.float()(**{**inputs, "emissions": inputs["emissions"].double()}).dtype == torch.float64
    )


def test_memory_of_the_graph_is_freed() -> None:
    """No cycle keeps the messages alive until the collector comes."""
    import gc
    import weakref

    crf, inputs = example()
    gc.disable()
    try:
        problems: list[Any] = []
        original = likelihood.prepare

        def spy(*args: Any) -> Any:
            problem = original(*args)
            problems.append(weakref.ref(problem.log_nodes))
            return problem

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(likelihood, "prepare", spy)
            crf(**inputs).backward()
        assert problems[0]() is None
    finally:
        gc.enable()


def test_rejects_what_does_not_fit() -> None:
    crf = CRF(4)
    emissions, tags = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ArgumentError, match=r"`num_tags` of CRF must be at least 1. Found 0"):
        CRF(0)
    with pytest.raises(ArgumentError, match=r"`reduction` of CRF must be one of .*token_mean"):
        CRF(4, reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`forbidden` of CRF must be 'raise' or 'inf'"):
        CRF(4, forbidden="ignore")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`emissions` of CRF must have shape"):
        crf(torch.zeros(3, 4), tags)
    with pytest.raises(ArgumentError, match="`emissions` of CRF must be floating-point"):
        crf(torch.zeros(2, 3, 4, dtype=torch.long), tags)
    with pytest.raises(ArgumentError, match=r"must score num_tags = 4 tags .* Found 5"):
        crf(torch.zeros(2, 3, 5), tags)
    with pytest.raises(ArgumentError, match=r"`tags` of CRF .* = \[2, 3\].* Found \[2, 5\]"):
        crf(emissions, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"`tags` of CRF must be integers. Found torch.float32"):
        crf(emissions, tags.float())
    with pytest.raises(ArgumentError, match=r"`mask` of CRF .* Found \[3, 2\]"):
        crf(emissions, tags, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"`mask` of CRF must be bool.* Found torch.uint8"):
        crf(emissions, tags, torch.ones(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("wrong", [-100, 4, 2**40])
def test_rejects_tags_out_of_range(wrong: int) -> None:
    crf = CRF(4)
    tags = torch.zeros(2, 3, dtype=torch.long)
    tags[1, 2] = wrong
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for method in (crf, crf.log_prob, crf.score):
        with pytest.raises(ArgumentError, match=f"Found {wrong} in row 1, position 2") as caught:
            method(torch.zeros(2, 3, 4), tags, mask)
        assert caught.value.argument == "tags"
