"""lucidrains' implementation: equal where it is right, and what it does elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue_nystromformer import NystromAttention, nystrom_attention

peer = pytest.importorskip("nystrom_attention", reason="the peer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8180)


def bare(num_features: int, num_landmarks: int) -> Any:
    """Return the peer's attention of one head, without projections, of ``[batch, time, 3 d]``."""
    module = peer.NystromAttention(
        num_features, num_features, 1, num_landmarks=num_landmarks, residual=False
    )
    module.to_qkv = module.to_out = nn.Identity()
    return module


def ours(joined: Tensor, num_landmarks: int) -> Tensor:
    q, k, v = (x.unsqueeze(1) for x in joined.chunk(3, -1))
    return nystrom_attention(q, k, v, num_landmarks=num_landmarks).squeeze(1)


@pytest.mark.parametrize(("time", "features", "num_landmarks"), [(512, 64, 64), (96, 8, 32)])
def test_one_head_of_one_row_is_equal(time: int, features: int, num_landmarks: int) -> None:
    joined = torch.randn(1, time, 3 * features)
    torch.testing.assert_close(
        ours(joined, num_landmarks), bare(features, num_landmarks)(joined), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("residual", [False, True])
def test_the_layer_is_equal_with_its_weights(residual: bool) -> None:
    theirs = peer.NystromAttention(16, 16, 1, num_landmarks=8, residual=residual).eval()
    layer = NystromAttention(16, 1, num_landmarks=8, conv_kernel=33 if residual else None).eval()
    state = {
        "in_proj_weight": theirs.to_qkv.weight,
        "in_proj_bias": torch.zeros(48),
        "out_proj.weight": theirs.to_out[0].weight,
        "out_proj.bias": theirs.to_out[0].bias,
    }
    if residual:
        state["conv.weight"] = theirs.res_conv.weight
    layer.load_state_dict(state)
    features = torch.randn(1, 64, 16)
    torch.testing.assert_close(layer(features), theirs(features), rtol=0, atol=1e-5)


def test_rows_do_not_see_each_other_here() -> None:
    """The peer scales its start by the greatest norm of the whole batch."""
    joined = torch.randn(2, 64, 24)
    joined[0] *= 3
    alone = bare(8, 16)(joined[1:])
    assert (bare(8, 16)(joined)[1:] - alone).abs().max() > 1e-3
    torch.testing.assert_close(ours(joined, 16)[1:], alone, rtol=0, atol=1e-5)
