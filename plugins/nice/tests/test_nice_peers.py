"""Parity: the log-density of nflows and normflows with the same weights."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue_nice import NICE

D = 8
NORMAL: Any = torch.distributions.Normal


@pytest.fixture
def model() -> NICE:
    torch.manual_seed(0)
    made = NICE(D, hidden=[16, 16], split="half")
    with torch.no_grad():
        made.scale.log_scale.normal_(std=0.3)
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
def test_matches_nflows(model: NICE, x: Tensor) -> None:
    coupling = pytest.importorskip("nflows.transforms.coupling")
    transforms = importlib.import_module("nflows.transforms")

    class Shift(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, inputs: Tensor, context: Any = None) -> Tensor:
            del context
            return self.net(inputs)  # type: ignore[no-any-return]

    half = torch.arange(D) >= D // 2
    layers = []
    for k, ours in enumerate(model.couplings):
        mask = (half if k % 2 == 0 else ~half).int()
        layers.append(coupling.AdditiveCouplingTransform(mask, lambda i, o, m=ours: Shift(m.shift)))
    theirs = transforms.CompositeTransform(layers)
    h, log_det = theirs(x)
    wanted = NORMAL(0.0, 1.0).log_prob(model.scale(h)).sum(-1) + log_det
    assert torch.allclose(model.log_prob(x), wanted + model.scale.log_det, atol=1e-5)
    found, _ = theirs.inverse(h)
    assert torch.allclose(model.decode(model.scale(h)), found, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_matches_normflows(model: NICE, x: Tensor) -> None:
    flows = pytest.importorskip("normflows.flows")
    blocks: list[Any] = []
    for ours in model.couplings:
        blocks += [flows.AffineCouplingBlock(copy.deepcopy(ours.shift), scale=False)]
        blocks += [flows.Permute(D, mode="swap")]
    h, log_det = x, torch.zeros(len(x))
    for block in blocks:  # in our direction, theirs maps latent rows to data
        h, added = block(h)
        log_det = log_det + added
    wanted = NORMAL(0.0, 1.0).log_prob(model.scale(h)).sum(-1) + log_det
    assert torch.allclose(model.log_prob(x), wanted + model.scale.log_det, atol=1e-5)
