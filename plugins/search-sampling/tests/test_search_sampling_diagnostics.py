"""Diagnostics beside a plain transcription of their definitions, beside ArviZ, and in theory."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import genpareto, norm, rankdata  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core import ArgumentError
from kexue_search_sampling import (
    autocorrelation,
    effective_sample_size,
    pareto_k,
    split_r_hat,
)


def walks(seed: int, chains: int, draws: int, phi: float) -> NDArray[np.float64]:
    """Return autoregressions whose neighbours have correlation phi, some of them rounded."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((chains, draws))
    x = noise.copy()
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + math.sqrt(1 - phi**2) * noise[:, t]
    return np.round(x) if seed % 3 == 0 else x


def plain_scores(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found = norm.ppf((rankdata(x).reshape(x.shape) - 3 / 8) / (x.size + 1 / 4))
    return np.asarray(found)


def plain_halves(x: NDArray[np.float64]) -> NDArray[np.float64]:
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def plain_effective(x: NDArray[np.float64]) -> float:
    """Return the effective sample size of halves, lag by lag, pair by pair."""
    m, n = x.shape
    if np.ptp(x) == 0:
        return float(x.size)
    centred = x - x.mean(1, keepdims=True)
    autocovariance = [
        float((centred[:, : n - lag] * centred[:, lag:]).sum(1).mean() / n) for lag in range(n)
    ]
    within = autocovariance[0] * n / (n - 1)
    total = autocovariance[0] + float(x.mean(1).var(ddof=1))
    rho = [1.0] + [1 - (within - a) / total for a in autocovariance[1:]]
    time, least, k = -1.0, math.inf, 0
    while k < max(0, (n - 3) // 2) and rho[2 * k] + rho[2 * k + 1] >= 0:
        least = min(least, rho[2 * k] + rho[2 * k + 1])
        time += 2 * least
        k += 1
    time += max(0.0, rho[2 * k])
    return float(m * n / max(time, 1 / math.log10(m * n)))


def plain_r_hat(x: NDArray[np.float64]) -> float:
    n = x.shape[1]
    within = x.var(1, ddof=1).mean()
    return float(np.sqrt(((n - 1) / n * within + x.mean(1).var(ddof=1)) / within))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(4, 70), st.floats(-0.9, 0.99))
def test_match_their_definitions(seed: int, chains: int, draws: int, phi: float) -> None:
    x = walks(seed, chains, draws, phi)
    halves = plain_halves(x)
    given_draws = torch.from_numpy(x)
    assert float(effective_sample_size(given_draws)) == pytest.approx(
        plain_effective(plain_scores(halves)), rel=1e-8
    )
    assert float(effective_sample_size(given_draws, rank_normalized=False)) == pytest.approx(
        plain_effective(halves), rel=1e-8
    )
    if halves.var(1).min() > 0:
        folded = plain_scores(np.abs(halves - np.median(halves)))
        if folded.var(1).max() > 0:
            wanted = max(plain_r_hat(plain_scores(halves)), plain_r_hat(folded))
            assert float(split_r_hat(given_draws)) == pytest.approx(wanted, rel=1e-9)
        assert float(split_r_hat(given_draws, rank_normalized=False)) == pytest.approx(
            plain_r_hat(halves), rel=1e-9
        )


@pytest.mark.parametrize("seed", range(12))
def test_agree_with_arviz(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
        rng = np.random.default_rng(seed)
        x = walks(seed, int(rng.integers(2, 6)), int(rng.integers(4, 200)), rng.uniform(-0.5, 0.99))
        given_draws = torch.from_numpy(x)
        for found, wanted in (
            (effective_sample_size(given_draws), arviz.ess(x, method="bulk")),
            (
                effective_sample_size(given_draws, rank_normalized=False),
                arviz.ess(x, method="mean"),
            ),
            (split_r_hat(given_draws), arviz.rhat(x, method="rank")),
            (split_r_hat(given_draws, rank_normalized=False), arviz.rhat(x, method="split")),
        ):
            assert float(found) == pytest.approx(float(wanted), rel=1e-12)
        lags = autocorrelation(given_draws)
        for chain, line in zip(x, lags, strict=True):
            np.testing.assert_allclose(line, arviz.autocorr(chain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_pareto_k_agrees_with_arviz(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
        weights = np.random.default_rng(seed).standard_normal(500 + 700 * seed) * (1 + seed)
        _, wanted = arviz.psislw(weights.copy())
    assert float(pareto_k(torch.from_numpy(weights))) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.7])
def test_pareto_k_finds_the_shape_of_a_tail(shape: float) -> None:
    found = [
        float(pareto_k(torch.from_numpy(genpareto.rvs(shape, size=40_000, random_state=s)).log()))
        for s in range(5)
    ]
    assert np.mean(found) == pytest.approx(shape, abs=0.1)


def test_pareto_k_without_a_tail() -> None:
    assert pareto_k(torch.zeros(100)) == math.inf
    assert pareto_k(torch.full((10,), -math.inf)) == math.inf
    assert pareto_k(torch.zeros(0)) == math.inf
    with pytest.raises(ArgumentError, match="`log_weights` must have shape"):
        pareto_k(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.4])
def test_the_effective_size_of_an_autoregression_is_known(phi: float) -> None:
    x = torch.from_numpy(walks(1, 50, 4000, phi))
    wanted = x.numel() * (1 - phi) / (1 + phi)
    assert float(effective_sample_size(x)) == pytest.approx(wanted, rel=0.08)
    lags = autocorrelation(x).mean(0)[:5]
    torch.testing.assert_close(lags, phi ** torch.arange(5).double(), rtol=0, atol=0.02)
    assert float(split_r_hat(x)) == pytest.approx(1.0, abs=0.01)


def test_chains_that_disagree_are_seen() -> None:
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = x + torch.arange(4)[:, None]
    assert float(split_r_hat(apart)) > 1.3
    assert float(effective_sample_size(apart)) < 40
    wider = x * torch.tensor([1.0, 1.0, 1.0, 4.0])[:, None]
    assert float(split_r_hat(wider)) > 1.1  # the same place, another width: only folding sees it
    assert float(split_r_hat(wider, rank_normalized=False)) < 1.02


def test_features_do_not_see_each_other() -> None:
    x = torch.from_numpy(walks(4, 3, 41, 0.6))
    y = torch.from_numpy(walks(6, 3, 41, 0.1))
    both = torch.stack([x, y], -1)[..., None]
    for function in (effective_sample_size, split_r_hat):
        found = function(both)
        assert found.shape == (2, 1)
        torch.testing.assert_close(found[:, 0], torch.stack([function(x), function(y)]))
    assert autocorrelation(both).shape == (3, 41, 2, 1)


def test_edges() -> None:
    same = torch.ones(2, 8)
    assert float(effective_sample_size(same)) == 16
    assert math.isnan(float(split_r_hat(same)))
    short = torch.randn(5, 3)
    assert math.isnan(float(effective_sample_size(short)))
    assert math.isnan(float(split_r_hat(short)))
    broken = torch.randn(2, 8, 2)
    broken[0, 0, 0] = math.nan
    assert effective_sample_size(broken).isnan().tolist() == [True, False]
    broken[0, 0, 0] = math.inf
    assert split_r_hat(broken).isnan().tolist() == [True, False]
    assert effective_sample_size(torch.randint(3, (4, 50))).dtype == torch.float64
    for function in (effective_sample_size, split_r_hat, autocorrelation):
        with pytest.raises(ArgumentError, match="`chains` must have shape"):
            function(torch.zeros(3))
        with pytest.raises(ArgumentError, match="`chains` must have shape"):
            function(torch.zeros(0, 3))


def test_views_and_inputs() -> None:
    stored = torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(1))
    view: Tensor = stored.transpose(0, 1)
    before = stored.clone()
    torch.testing.assert_close(
        effective_sample_size(view), effective_sample_size(view.contiguous())
    )
    torch.testing.assert_close(split_r_hat(view), split_r_hat(view.contiguous()))
    assert torch.equal(stored, before)
