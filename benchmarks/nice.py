"""Negative log-likelihood with its gradient, and sampling, of four additive couplings.

Peers: the additive couplings of nflows and normflows, and zuko's coupling with its additive
transformation; zuko's own `NICE` is affine. All have the same perceptrons with the same weights,
the same split in halves, swapped between couplings, and a learned or fixed diagonal scale. The
log-density of the same rows is compared before the clock starts. Those not installed are left out.

Floor: the products of matrices of the perceptrons, 2 operations per weight and row forward, 6 with
the gradient, which are the same for all. Ours adds a gather, four sums of halves, a product by the
scale and the sum of squares; the peers scatter and gather both halves at each coupling, and add
log-determinants that are 0. So the ratio falls to 1 as perceptrons widen.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from harness import Row, compare
from torch import Tensor, nn

from kexue_nice import NICE

__all__ = ["rows"]

CASES = ((64, 512, (128, 128)), (64, 128, (256, 256)), (784, 128, (1000,) * 5))
"""Features, batch, hidden widths; the last is the post's for MNIST."""


class Peer(NamedTuple):
    """Another implementation of the same flow.

    Args:
        name: Whose.
        log_prob: Rows to log-densities.
        sample: A number of rows to rows.
        parameters: What the gradient is of.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    parameters: list[nn.Parameter]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest case, and fewer pairs.
    """
    pairs = 5 if quick else 15
    for features, batch, hidden in CASES[:1] if quick else CASES:
        torch.manual_seed(0)
        model = NICE(features, hidden=hidden, split="half")
        nn.init.normal_(model.scale.log_scale, std=0.1)
        x = torch.randn(batch, features)
        widths = (
            "-".join(map(str, hidden)) if len(set(hidden)) > 1 else f"{len(hidden)}×{hidden[0]}"
        )
        case = f"{features} features, {batch} rows, m of {widths}"
        ours = Peer("ours", model.log_prob, model.generate, list(model.parameters()))
        for peer in _peers(model):
            with torch.no_grad():
                torch.testing.assert_close(
                    peer.log_prob(x), model.log_prob(x), rtol=1e-4, atol=1e-3
                )
            for task, timed in (("loss and gradient", _gradient), ("sampling", _sampling)):
                yield compare(
                    task, case, timed(ours, x), timed(peer, x), peer_name=peer.name, pairs=pairs
                )  # fmt: skip


def _gradient(flow: Peer, x: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(-flow.log_prob(x).mean(), flow.parameters)


def _sampling(flow: Peer, x: Tensor) -> Callable[[], object]:
    def draw() -> Tensor:
        with torch.no_grad():
            return flow.sample(len(x))

    return draw


def _peers(model: NICE) -> Iterator[Peer]:
    for make in (_nflows, _normflows, _zuko):
        name = make.__name__[1:]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield make(model)
        except ImportError:
            print(f"nice: {name} is not installed, its rows are left out.", file=sys.stderr)


def _nflows(model: NICE) -> Peer:
    transforms = importlib.import_module("nflows.transforms")
    coupling = importlib.import_module("nflows.transforms.coupling")
    flows = importlib.import_module("nflows.flows.base")
    distributions = importlib.import_module("nflows.distributions.normal")

    class Shift(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, inputs: Tensor, context: Any = None) -> Any:
            del context
            return self.net(inputs)

    half = torch.arange(model.num_features) >= model.sizes[0]
    layers: list[nn.Module] = []
    shifts: list[Any] = [ours.shift for ours in model.couplings]
    for k, shift in enumerate(shifts):
        mask = (half if k % 2 == 0 else ~half).int()
        layers.append(
            coupling.AdditiveCouplingTransform(mask, lambda _i, _o, net=shift: Shift(net))
        )
    scale = model.scale.log_scale.detach().exp()
    layers.append(transforms.PointwiseAffineTransform(torch.zeros_like(scale), scale))
    base = distributions.StandardNormal([model.num_features])
    flow = flows.Flow(transforms.CompositeTransform(layers), base)
    return Peer("nflows", flow.log_prob, flow.sample, list(flow.parameters()))


def _normflows(model: NICE) -> Peer:
    normflows = importlib.import_module("normflows")
    shifts: list[Any] = [copy.deepcopy(ours.shift) for ours in model.couplings]
    blocks: list[nn.Module] = []
    for shift in reversed(shifts):  # theirs map latent rows to data
        net = _Negative(shift)
        blocks += [normflows.flows.Permute(model.num_features, mode="swap")]
        blocks += [normflows.flows.AffineCouplingBlock(net, scale=False)]
    base = normflows.distributions.DiagGaussian(model.num_features)
    with torch.no_grad():
        base.log_scale.copy_(-model.scale.log_scale)
    flow = normflows.NormalizingFlow(base, blocks)
    return Peer("normflows", flow.log_prob, lambda n: flow.sample(n)[0], list(flow.parameters()))


class _Negative(nn.Module):
    """A perceptron whose last layer's weights have changed their signs."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        with torch.no_grad():
            for parameter in net[-1].parameters():
                parameter.neg_()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def _zuko(model: NICE) -> Peer:
    coupling = importlib.import_module("zuko.flows.coupling")
    lazy = importlib.import_module("zuko.lazy")
    univariate = importlib.import_module("zuko.transforms").AdditiveTransform
    distributions = importlib.import_module("zuko.distributions")
    features = model.num_features
    half = torch.arange(features) >= model.sizes[0]
    layers: list[Any] = []
    shifts: list[Any] = [ours.shift for ours in model.couplings]
    for k, shift in enumerate(shifts):
        layer = coupling.GeneralCouplingTransform(
            features,
            mask=~half if k % 2 == 0 else half,
            univariate=univariate,
            shapes=[()],
            hidden_features=model.hidden,
        )
        layer.hyper.load_state_dict(shift.state_dict())
        layers.append(layer)
    scale = torch.exp(-model.scale.log_scale.detach())
    base = lazy.UnconditionalDistribution(
        distributions.DiagNormal, torch.zeros(features), scale, buffer=True
    )
    flow = lazy.Flow(lazy.LazyComposedTransform(*layers), base)
    return Peer(
        "zuko",
        lambda x: flow().log_prob(x),
        lambda n: flow().sample((n,)),
        [p for p in flow.parameters() if p.requires_grad],
    )


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.case:46} {row.task:18} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
