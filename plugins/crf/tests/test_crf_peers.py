"""Beside pytorch-crf: the same numbers where it is right, right numbers where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchcrf
from torch import Tensor

from kexue.core.interfaces.decoder import PAD
from kexue_crf import CRF

SHAPES = [(2, 3, 5), (4, 1, 3), (1, 9, 1), (5, 40, 4), (3, 60, 17), (2, 12, 40)]


def both(tags: int, **params: Any) -> tuple[CRF, torchcrf.CRF]:
    """A CRF of ours with the parameters of one of theirs."""
    theirs = torchcrf.CRF(tags, batch_first=True)
    torch.nn.init.normal_(theirs.transitions)
    ours = CRF(tags, **params)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(batch: int, time: int, tags: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * time * tags)
    emissions = torch.randn(batch, time, tags, generator=generator)
    gold = torch.randint(tags, (batch, time), generator=generator)
    lengths = torch.randint(1, time + 1, (batch, 1), generator=generator)
    return emissions, gold, torch.arange(time) < lengths


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
def test_loss_and_gradients_are_those_of_pytorch_crf(
    shape: tuple[int, int, int], reduction: str
) -> None:
    ours, theirs = both(shape[2], reduction=reduction)
    emissions, tags, mask = inputs(*shape)
    mine, their = emissions.clone().requires_grad_(), emissions.clone().requires_grad_()
    loss, expected = ours(mine, tags, mask), -theirs(their, tags, mask, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in theirs.named_parameters():
        their_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, their_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paths_are_those_of_pytorch_crf(shape: tuple[int, int, int]) -> None:
    ours, theirs = both(shape[2])
    emissions, _, mask = inputs(*shape)
    assert ours.decode(emissions, mask=mask).tolist() == theirs.decode(emissions, mask)


def test_equally_good_paths_are_those_of_pytorch_crf() -> None:
    for tags in (3, 30):
        ours, theirs = both(tags)
        with torch.no_grad():
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter.round_()
        theirs.load_state_dict(ours.state_dict())
        emissions, _, mask = inputs(20, 15, tags)
        emissions = emissions.round()
        assert ours.decode(emissions, mask=mask).tolist() == theirs.decode(emissions, mask)


def test_time_major_inputs() -> None:
    theirs = torchcrf.CRF(4)
    ours = CRF(4, batch_first=False, reduction="none")
    ours.load_state_dict(theirs.state_dict())
    emissions, tags, mask = (values.transpose(0, 1).contiguous() for values in inputs(3, 7, 4))
    expected = -theirs(emissions, tags, mask, reduction="none")
    torch.testing.assert_close(ours(emissions, tags, mask), expected)
    assert ours.decode(emissions, mask=mask).sequences.shape == (3, 7)
    assert ours.decode(emissions, mask=mask).tolist() == theirs.decode(emissions, mask)
    assert ours.decode_nbest(emissions, 2, mask=mask).sequences.shape == (3, 2, 7)
    assert ours.sample(emissions, 2, mask=mask).shape == (3, 2, 7)
    torch.testing.assert_close(ours.log_prob(emissions, tags, mask), expected.neg())
    constrained = CRF(4, batch_first=False, scheme="BMES", tag_names=list("SBME"))
    decoded = constrained.decode(emissions, mask=mask).sequences
    assert constrained(emissions, decoded.T, mask).isfinite()
    marginals = ours.marginals(emissions, mask)
    assert marginals.shape == emissions.shape
    torch.testing.assert_close(marginals.sum(2), mask.float())


def test_state_dict_goes_both_ways() -> None:
    ours, theirs = CRF(6), torchcrf.CRF(6)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert set(CRF(6, boundaries=False).state_dict()) == {"transitions"}


def test_any_tag_may_stand_at_masked_positions() -> None:
    """There: an IndexError for -100."""
    ours, theirs = both(4, reduction="none")
    emissions, tags, mask = inputs(4, 6, 4)
    assert not mask.all()
    expected = -theirs(emissions, tags, mask, reduction="none")
    for junk in (-100, 4, 10**9):
        torch.testing.assert_close(ours(emissions, tags.masked_fill(~mask, junk), mask), expected)


def test_first_position_may_be_masked() -> None:
    """There: an error, so that BERT's [CLS] must be cut off."""
    ours, theirs = both(4, reduction="none")
    emissions, tags, _ = inputs(3, 6, 4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0] = False
    expected = -theirs(emissions[:, 1:], tags[:, 1:], mask[:, 1:], reduction="none")
    torch.testing.assert_close(ours(emissions, tags, mask), expected)
    found = ours.decode(emissions, mask=mask).sequences
    assert (found[:, 0] == PAD).all()
    assert found[:, 1:].tolist() == theirs.decode(emissions[:, 1:], mask[:, 1:])


def test_holes_connect_their_sides() -> None:
    """There: accepted, and a negative loss, because the end is taken for sum(mask)."""
    ours, theirs = both(4, reduction="none")
    emissions, tags, _ = inputs(1, 8, 4)
    mask = torch.tensor([[True, False, True, True, False, False, True, True]])
    kept = mask[0].nonzero().view(-1)
    full = torch.ones(1, len(kept), dtype=torch.bool)
    expected = -theirs(emissions[:, kept], tags[:, kept], full, reduction="none")
    torch.testing.assert_close(ours(emissions, tags, mask), expected)
    found = ours.decode(emissions, mask=mask).sequences
    assert found[:, kept].tolist() == theirs.decode(emissions[:, kept], full)


def test_minus_infinity_is_a_score() -> None:
    """There: NaN losses and gradients."""
    ours, _ = both(4, reduction="none")
    emissions, tags, mask = inputs(3, 6, 4)
    emissions = emissions.clone()
    emissions[:, 2, 3] = -torch.inf
    with torch.no_grad():
        ours.transitions[1, 2] = -torch.inf
        ours.transitions[:, 3] = -torch.inf
        ours.get_parameter("start_transitions")[3] = -torch.inf
    emissions.requires_grad_()
    loss = ours(emissions, torch.zeros_like(tags), mask)
    loss.sum().backward()
    assert loss.isfinite().all()
    for tensor in (emissions, *ours.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert (ours.decode(emissions, mask=mask).sequences != 3).all()


def test_empty_row_is_not_an_error() -> None:
    """There: an error for the batch."""
    ours, _ = both(4)
    emissions, tags, _ = inputs(2, 5, 4)
    mask = torch.tensor([[True] * 5, [False] * 5])
    loss = ours(emissions, tags, mask)
    torch.testing.assert_close(loss, ours(emissions[:1], tags[:1]))
    assert ours.decode(emissions, mask=mask).tolist()[1] == []


def test_decoding_does_not_fetch_token_by_token(transfers: Any) -> None:
    """There: one transfer per token, each of which waits for the device."""
    ours, theirs = both(4)
    emissions, _, mask = inputs(4, 20, 4)
    with transfers:
        ours.decode(emissions, mask=mask).tolist()
    assert transfers.count == 1
    with transfers:
        theirs.decode(emissions, mask)
    assert transfers.count > mask.sum()


def test_gradients_are_nearer_to_float64() -> None:
    ours, theirs = both(6, reduction="none")
    emissions, tags, mask = inputs(4, 300, 6)
    exact = CRF(6, reduction="none").double()
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    leaves = [emissions.clone().requires_grad_() for _ in range(2)]
    reference = emissions.double().requires_grad_()
    exact(reference, tags, mask).sum().backward()
    ours(leaves[0], tags, mask).sum().backward()
    (-theirs(leaves[1], tags, mask)).backward()
    assert reference.grad is not None
    mine, their = ((leaf.grad - reference.grad).abs().max() for leaf in leaves)  # type: ignore[operator]
    assert mine < 2e-6
    assert mine < their / 5
