"""Milliseconds for a thousand effective draws of a Gaussian with correlations 0.9.

Peers: blackjax's random-walk Metropolis, with the very same steps (2.38 / √d times the Cholesky
factor of the covariance), compiled and vectorised over as many chains; emcee's stretch move, with
its own number of walkers in one vectorised call. blackjax does not learn its steps, so ours are
given here as well; emcee does not need to. All start from exact draws. Before the clock starts, the
variances of all must be the target's.

Effective draws are the bulk effective sample size, the least of all features, by one function for
all; it agrees with ArviZ. The steps of ours and blackjax's have one law, so that the ratio there
is that of the times of a step.

Floor: a step needs d normal numbers a chain, some 7 ns each from torch on one core, and the density
d² multiplications. In ten dimensions ours takes some three times the normal numbers alone, for a
dozen kernels a step; the floor of the arithmetic comes in sight from fifty dimensions.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Row, compare
from torch import Tensor

from kexue.core.densities import make_density
from kexue_search_sampling import GaussianProposal, MetropolisHastings, effective_sample_size

__all__ = ["rows"]

_CORRELATION = 0.9


@dataclass(frozen=True)
class Case:
    """One target and how much is drawn of it.

    Args:
        features: Dimensions.
        chains: Chains in parallel.
        steps: Steps of each.
    """

    features: int
    chains: int
    steps: int

    @functools.cached_property
    def covariance(self) -> Tensor:
        """The target's covariance."""
        return torch.eye(self.features) * (1 - _CORRELATION) + _CORRELATION

    @property
    def factor(self) -> Tensor:
        """The Cholesky factor of a step's covariance."""
        found: Tensor = torch.linalg.cholesky(self.covariance)
        return found * (2.38 / math.sqrt(self.features))

    @property
    def start(self) -> Tensor:
        """Exact draws, one for each chain."""
        noise = torch.randn(self.chains, self.features, generator=torch.Generator().manual_seed(0))
        found: Tensor = noise @ torch.linalg.cholesky(self.covariance).T
        return found

    @property
    def name(self) -> str:
        """What the table shows."""
        return f"{self.features} dimensions, {self.chains} chains, {self.steps} steps"


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest case, and fewer pairs.
    """
    cases = [Case(10, 1000, 400), Case(10, 100, 1000), Case(50, 1000, 400)]
    pairs = 5 if quick else 9
    for case in cases[:1] if quick else cases:
        for peer_name, make in _peers():
            ours, peer = _ours(case), make(case)
            found = [effective(case, draw()) for draw in (ours, peer)]
            timed = compare(
                "random walk", case.name, ours, peer, peer_name=peer_name, pairs=pairs, warmup=1
            )
            yield _per_thousand(timed, *found)


def effective(case: Case, chains: Tensor) -> float:
    """Return the least effective sample size of draws ``[chain, draw, feature]``.

    Raises:
        AssertionError: If a variance is not the target's.
    """
    found = effective_sample_size(chains)
    error = (chains.double().var((0, 1)) - 1).abs().max() / (2 / found.min()).sqrt()
    if not error < 6:
        raise AssertionError(f"{case.name}: a variance is {float(error):.1f} standard errors off")
    return float(found.min())


def _per_thousand(row: Row, ours: float, peer: float) -> Row:
    """Return times for a thousand effective draws in place of times of a call."""
    gain = ours / peer
    return replace(
        row,
        ours_ms=row.ours_ms * 1000 / ours,
        peer_ms=row.peer_ms * 1000 / peer,
        ratio=row.ratio * gain,
        low=row.low * gain,
        high=row.high * gain,
    )


def _ours(case: Case) -> Callable[[], Tensor]:
    settings = {"num_features": case.features, "correlation": _CORRELATION}
    target = make_density("gaussian", settings)
    sampler = MetropolisHastings(
        GaussianProposal(case.factor), warmup=0, init=case.start, diagnose=False
    )
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        found = sampler.sample(target, case.chains * case.steps, generator=generator)
        return found.values.view(case.steps, case.chains, -1).transpose(0, 1)

    return draw


def _peers() -> Iterator[tuple[str, Callable[[Case], Callable[[], Tensor]]]]:
    for name, package, make in (
        ("blackjax, the same steps", "blackjax", _blackjax),
        ("emcee, stretch move", "emcee", _emcee),
    ):
        if importlib.util.find_spec(package) is None:
            print(f"search-sampling: {package} is not installed, left out.", file=sys.stderr)
        else:
            yield name, make


def _blackjax(case: Case) -> Callable[[], Tensor]:
    blackjax, jax = importlib.import_module("blackjax"), importlib.import_module("jax")
    jnp = jax.numpy
    precision = jnp.asarray(torch.linalg.inv(case.covariance).numpy())
    factor = jnp.asarray(case.factor.numpy())
    kernel = blackjax.additive_step_random_walk.normal_random_walk(
        lambda x: -0.5 * x @ precision @ x, factor
    )

    def steps_of(key: Any, states: Any) -> Any:
        def step(states: Any, key: Any) -> Any:
            states, _ = jax.vmap(kernel.step)(jax.random.split(key, case.chains), states)
            return states, states.position

        return jax.lax.scan(step, states, jax.random.split(key, case.steps))[1]

    walk = jax.jit(steps_of)
    states = jax.vmap(kernel.init)(jnp.asarray(case.start.numpy()))
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def draw() -> Tensor:
        drawn = walk(next(keys), states).block_until_ready()
        return torch.utils.dlpack.from_dlpack(drawn).transpose(0, 1)

    return draw


def _emcee(case: Case) -> Callable[[], Tensor]:
    emcee = importlib.import_module("emcee")
    precision = torch.linalg.inv(case.covariance).double().numpy()
    start = case.start.double().numpy()

    def log_prob(points: Any) -> Any:
        return -0.5 * ((points @ precision) * points).sum(1)

    def draw() -> Tensor:
        sampler = emcee.EnsembleSampler(case.chains, case.features, log_prob, vectorize=True)
        sampler.run_mcmc(start, case.steps)
        return torch.from_numpy(sampler.get_chain()).transpose(0, 1)

    return draw


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.case:46} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
