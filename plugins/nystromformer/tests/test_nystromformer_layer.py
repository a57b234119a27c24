"""The layer: torch's multi-head attention where it is exact, its weights, padding, skip."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import ArgumentError
from kexue_nystromformer import NystromAttention, nystrom_attention
from kexue_nystromformer.folded import worth_folding

LENGTHS = (20, 9, 3, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8180)


def padded() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 20, 8), torch.arange(20) < torch.tensor(LENGTHS)[:, None]


def torch_attention(**options: Any) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv_kernel", [None, 3])
def test_is_multihead_attention_where_landmarks_cover_the_sequence(
    bias: bool, conv_kernel: int | None
) -> None:
    attention = torch_attention(bias=bias)
    layer = NystromAttention.from_multihead(attention, num_landmarks=20, conv_kernel=conv_kernel)
    features, mask = padded()
    wanted, _ = attention(features, features, features, key_padding_mask=~mask)
    torch.testing.assert_close(layer(features, mask)[mask], wanted[mask], rtol=0, atol=1e-5)
    wanted, _ = attention(features, features, features)
    torch.testing.assert_close(layer(features), wanted, rtol=0, atol=1e-5)


def test_weights_go_both_ways() -> None:
    attention, layer = torch_attention(), NystromAttention(8, 2)
    layer.load_state_dict(attention.state_dict())
    other = torch_attention()
    other.load_state_dict(layer.state_dict())
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_converting_copies_and_keeps_mode_and_type() -> None:
    attention = torch_attention(dropout=0.1).double().eval()
    layer = NystromAttention.from_multihead(attention, num_landmarks=5, iterations=4)
    assert (layer.num_landmarks, layer.iterations, layer.training) == (5, 4, False)
    assert layer.in_proj_weight.dtype == torch.float64
    with torch.no_grad():
        layer.in_proj_weight.zero_()
    assert attention.in_proj_weight is not None
    assert attention.in_proj_weight.any()


@pytest.mark.parametrize("options", [{"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_refuses_to_convert_what_it_has_not(options: dict[str, Any]) -> None:
    with pytest.raises(
        ArgumentError, match=r"`attention` of NystromAttention\.from_multihead must"
    ):
        NystromAttention.from_multihead(nn.MultiheadAttention(8, 2, **options))


def test_is_projections_around_the_function() -> None:
    layer = NystromAttention(8, 2, num_landmarks=4)
    features, mask = padded()
    q, k, v = (
        x.reshape(4, 20, 2, 4).transpose(1, 2)
        for x in F.linear(features, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    heads = nystrom_attention(q, k, v, mask[:, None, None], num_landmarks=4)
    wanted = layer.out_proj(heads.transpose(1, 2).reshape(4, 20, 8)) * mask[..., None]
    torch.testing.assert_close(layer(features, mask), wanted)


@pytest.mark.parametrize("conv_kernel", [None, 5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_is_unpadded(conv_kernel: int | None, side: str) -> None:
    layer = NystromAttention(8, 2, num_landmarks=4, conv_kernel=conv_kernel)
    assert layer.in_proj_bias is not None
    nn.init.normal_(layer.in_proj_bias)  # what would show at padding
    features, mask = padded()
    if side == "left":
        mask = mask.flip(1)
    dirty = features.masked_fill(~mask[..., None], float("nan"))
    found = layer(dirty, mask)
    for b in range(4):
        alone = layer(features[b, mask[b]][None])
        torch.testing.assert_close(found[b, mask[b]][None], alone, rtol=0, atol=1e-5)
    assert not found[~mask].any()


def test_the_convolution_is_one_kernel_per_head() -> None:
    layer = NystromAttention(8, 2, num_landmarks=20, conv_kernel=3).double()
    plain = NystromAttention(8, 2, num_landmarks=20).double()
    plain.load_state_dict(
        {name: x for name, x in layer.state_dict().items() if not name.startswith("conv.")}
    )
    features = torch.randn(1, 6, 8, dtype=torch.float64)
    value = F.linear(features, layer.in_proj_weight, layer.in_proj_bias)[0, :, 16:]
    assert layer.conv is not None
    kernels = layer.conv.weight[:, 0, :, 0]
    skip = torch.zeros(6, 8, dtype=torch.float64)
    for t in range(6):
        for offset in (-1, 0, 1):
            if 0 <= t + offset < 6:
                skip[t] += value[t + offset] * kernels[:, offset + 1].repeat_interleave(4)
    wanted = plain(features)[0] + skip @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(features)[0], wanted)


def test_has_a_gradient_for_every_parameter() -> None:
    layer = NystromAttention(8, 2, num_landmarks=4, conv_kernel=3)
    features, mask = padded()
    layer(features, mask).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_copies_and_says_what_it_is() -> None:
    layer = NystromAttention(8, 2, num_landmarks=4, conv_kernel=3, bias=False)
    features, mask = padded()
    wanted = layer(features, mask)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(twin(features, mask), wanted)
    assert "8, num_heads=2, num_landmarks=4, iterations=6, bias=False" in repr(layer)


def test_replaces_attention_in_an_encoder() -> None:
    """As the attention of a block that is trained for a few steps."""
    layer = NystromAttention(8, 2, num_landmarks=4)
    head = nn.Linear(8, 1)
    features = torch.randn(16, 30, 8)
    target = features[:, :, 0].mean(1, keepdim=True) * 4
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(head((features + layer(features)).mean(1)), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 8, "num_heads": 3}, "`num_heads` .* must divide num_features = 8. Foun"),
        ({"num_features": 0}, "`num_features` .* at least 1. Found 0"),
        ({"num_features": 8, "num_heads": 0}, "`num_heads` .* at least 1. Found 0"),
        ({"num_features": 8, "num_landmarks": 0}, "`num_landmarks` .* at least 1. Found 0"),
        ({"num_features": 8, "iterations": True}, "`iterations` .* whole number .* Found True"),
        ({"num_features": 8, "conv_kernel": 4}, "`conv_kernel` .* must be odd. Found 4"),
        ({"num_features": 8, "conv_kernel": -1}, "`conv_kernel` .* at least 1. Found -1"),
    ],
)
def test_rejects_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NystromAttention(**arguments)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.ones(2, 5), None, r"`features` .* \[batch, time, 8\]. Found .* \[2, 5\]"),
        (torch.ones(2, 5, 4), None, r"`features` .* Found torch.float32 of shape \[2, 5, 4\]"),
        (torch.ones(2, 5, 8).int(), None, "`features` .* Found torch.int32"),
        (torch.ones(2, 5, 8), torch.ones(2, 4).bool(), r"`mask` .* = \[2, 5\]. Found \[2, 4\]"),
        (torch.ones(2, 5, 8), torch.ones(2, 5), r"`mask` .* must be bool, .* `mask.bool\(\)`"),
    ],
)
def test_rejects_inputs(features: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NystromAttention(8)(features, mask)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "time", "num_landmarks"), [(1, 32, 4), (3, 50, 4), (2, 64, 1)])
def test_folding_the_projections_changes_nothing(
    bias: bool, batch: int, time: int, num_landmarks: int
) -> None:
    """A mask of what is all real takes the other way."""
    layer = NystromAttention(8, 2, num_landmarks=num_landmarks, bias=bias).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    features = torch.randn(batch, time, 8, dtype=torch.float64, requires_grad=True)
    every = torch.ones(batch, time, dtype=torch.bool)
    assert worth_folding(features, num_heads=2, num_landmarks=num_landmarks)
    upstream = torch.randn(batch, time, 8, dtype=torch.float64)
    leaves = [features, *layer.parameters()]
    outputs = [layer(features), layer(features, every)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    before = features.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(layer(features), outputs[0].detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(features, before)


def test_folding_is_for_long_sequences_of_plain_numbers() -> None:
    def worth(*shape: int, **how: Any) -> bool:
        settings = {"num_heads": 2, "num_landmarks": 4, **how}
        dtype = settings.pop("dtype", torch.float32)
        return worth_folding(torch.zeros(*shape, dtype=dtype), **settings)

    assert worth(1, 32, 8)
    assert not worth(1, 31, 8)
    assert not worth(0, 32, 8)
    assert not worth(1, 64, 8, num_landmarks=5)
    assert not worth(1, 64, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not worth(1, 64, 8)


def test_folded_scores_may_be_large() -> None:
    layer = NystromAttention(8, 2, num_landmarks=4)
    features = 300 * torch.randn(2, 64, 8)
    every = torch.ones(2, 64, dtype=torch.bool)
    found = layer(features).detach()
    assert found.isfinite().all()
    double = copy.deepcopy(layer).double()
    wanted = double(features.double(), every).detach()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
