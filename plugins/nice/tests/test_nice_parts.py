"""Coupling, scale, priors and grey levels, each against what defines it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.device import make_generator
from kexue_nice import AdditiveCoupling, DiagonalScale, GaussianPrior, LogisticPrior
from kexue_nice.dequantisation import add_noise, bits_per_dim, cell, to_levels
from kexue_nice.layers import perceptron
from kexue_nice.priors import Prior

JACOBIAN: Any = torch.autograd.functional.jacobian
DISTRIBUTIONS: dict[str, tuple[Prior, Any]] = {
    "gaussian": (GaussianPrior(), torch.distributions.Normal(0.0, 1.0)),
    "logistic": (
        LogisticPrior(),
        torch.distributions.TransformedDistribution(
            torch.distributions.Uniform(0.0, 1.0), [torch.distributions.SigmoidTransform().inv]
        ),
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def coupling(sign: int = 1) -> AdditiveCoupling:
    return AdditiveCoupling(perceptron([3, 8, 2]), sign=sign).double()


@pytest.mark.parametrize("sign", [1, -1])
def test_coupling_has_log_determinant_zero(sign: int) -> None:
    layer = coupling(sign)

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x[:3], layer(x[None, :3], x[None, 3:])[0]])

    jacobian = JACOBIAN(whole, torch.randn(5, dtype=torch.float64))
    assert torch.equal(jacobian, jacobian.tril())
    assert torch.equal(jacobian.diagonal(), torch.ones(5, dtype=torch.float64))
    assert torch.linalg.slogdet(jacobian).logabsdet == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_coupling_is_undone(sign: int) -> None:
    layer = coupling(sign)
    kept, changed = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    h = layer(kept, changed)
    assert torch.allclose(h, changed + sign * layer.shift(kept), atol=1e-15)
    assert torch.allclose(layer.inverse(kept, h), changed, atol=1e-15)


def test_coupling_takes_any_function() -> None:
    layer = AdditiveCoupling(nn.Flatten())
    kept, changed = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(layer(kept, changed), changed + kept)


@pytest.mark.parametrize("sign", [0, 2, 0.5])
def test_coupling_rejects_other_signs(sign: int) -> None:
    with pytest.raises(ArgumentError, match="`sign` of AdditiveCoupling must be 1 or -1"):
        AdditiveCoupling(nn.Identity(), sign=sign)


def test_coupling_gradient() -> None:
    layer = coupling()
    kept = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    changed = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (kept, changed))
    assert torch.autograd.gradcheck(layer.inverse, (kept, changed))


def test_scale_has_the_log_determinant_of_its_jacobian() -> None:
    scale = DiagonalScale(4).double()
    nn.init.normal_(scale.log_scale)
    jacobian = JACOBIAN(lambda h: scale(h[None])[0], torch.randn(4, dtype=torch.float64))
    assert torch.equal(jacobian, jacobian.diagonal().diag())
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, scale.log_det)
    h = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(scale.inverse(scale(h)), h, atol=1e-14)


def test_scale_matches_a_deviation() -> None:
    h = torch.randn(500, 4) * torch.tensor([1e-3, 1.0, 30.0, 0.0]) + 5
    scale = DiagonalScale(4)
    scale.match(h, 2.0)
    found = scale(h).std(0, correction=0)
    assert torch.allclose(found[1:3], torch.tensor(2.0))
    assert torch.isfinite(scale.log_scale).all()
    assert found[0] < 2.0
    assert scale.log_scale[0] == scale.log_scale[3]
    scale.match(torch.ones(3, 4), 1.0)
    assert torch.equal(scale.log_scale, torch.zeros(4))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_prior_matches_torch(name: str) -> None:
    prior, distribution = DISTRIBUTIONS[name]
    z = torch.linspace(-8, 8, 30).view(10, 3)
    assert torch.allclose(prior.log_prob(z), distribution.log_prob(z).sum(-1), atol=1e-4)
    far = prior.log_prob(torch.tensor([[1e4, -1e4]]))
    assert torch.isfinite(far).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_prior_integrates_to_one_and_has_its_deviation(name: str) -> None:
    prior, _ = DISTRIBUTIONS[name]
    z = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
    density = prior.log_prob(z[:, None]).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1.0, abs=1e-9)
    deviation = torch.trapezoid(density * z.square(), z).sqrt().item()
    assert deviation == pytest.approx(prior.std, abs=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_prior_samples_are_of_its_density(name: str) -> None:
    prior, _ = DISTRIBUTIONS[name]
    like = torch.empty(20_000, dtype=torch.float64)
    drawn = prior.sample(like, make_generator(0)).sort().values
    z = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    density = prior.log_prob(z[:, None]).exp()
    cumulative = torch.cumulative_trapezoid(density, z)
    wanted = cumulative[torch.searchsorted(z[1:], drawn).clamp_max(len(cumulative) - 1)]
    found = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    # Kolmogorov-Smirnov: beyond 1.95 / √n once in a thousand times
    assert (found - wanted).abs().max() < 1.95 / math.sqrt(len(drawn))
    assert torch.equal(prior.sample(like, make_generator(3)), prior.sample(like, make_generator(3)))


@given(levels=st.integers(2, 300), seed=st.integers(0, 100))
def test_noise_stays_in_its_cell_and_is_rounded_away(levels: int, seed: int) -> None:
    generator = make_generator(seed)
    k = torch.randint(levels, (50,), generator=generator)
    x = k.double() / (levels - 1)
    noisy = add_noise(x, cell(levels), generator)
    assert ((noisy - x).abs() <= 0.5 / (levels - 1) + 1e-12).all()
    assert torch.equal((to_levels(noisy, levels) * (levels - 1)).round().long(), k)


def test_levels_are_within_black_and_white() -> None:
    found = to_levels(torch.tensor([-3.0, 0.26, 0.6, 7.0]), 5)
    assert found.tolist() == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_levels_cost_their_logarithm(levels: int) -> None:
    """The uniform density over all cells is the code that gives each level log2(L) bits."""
    low, high = 0.0 - 0.5 / (levels - 1), 1.0 + 0.5 / (levels - 1)
    nats = torch.tensor(10 * math.log(high - low))
    assert bits_per_dim(nats, 10, levels).item() == pytest.approx(math.log2(levels), abs=1e-6)
