"""Simulated annealing.

To search for the most probable x is to sample from ρ(x)^(1/τ) while the temperature τ falls to
zero: a move that changes log ρ by Δ is accepted with probability min(1, e^(Δ/τ)), corrected for the
proposal as in Metropolis-Hastings. Many chains search at once, and each keeps the best it has seen.

Deviations: the result is the best point of a chain, not its last. The step of a random walk over
real vectors follows the acceptance rate all the way, since no law has to be kept.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue_search_sampling.adaptation import StepSize, optimal_acceptance
from kexue_search_sampling.metropolis import local_proposal
from kexue_search_sampling.proposals import GaussianProposal, Proposal
from kexue_search_sampling.settings import check_num_samples, check_settings, check_start
from kexue_search_sampling.spaces import Reals, resolve
from kexue_search_sampling.walk import Walk, check_support

__all__ = ["SimulatedAnnealing", "temperatures"]

_BLOCK = 10  # steps at one temperature

Schedule = Literal["geometric", "linear", "logarithmic"]


def temperatures(schedule: Schedule, steps: int, start: float, end: float) -> list[float]:
    """Return a falling temperature per step, from ``start`` to ``end``.

    Args:
        schedule: ``"geometric"`` falls by one factor, ``"linear"`` by one difference, and
            ``"logarithmic"`` like a / log(k + b), which is the slow one that finds the maximum
            surely (Geman and Geman, 1984).
        steps: How many.
        start: The first.
        end: The last.

    Raises:
        ArgumentError: If the schedule is unknown.
    """
    shares = [k / max(1, steps - 1) for k in range(steps)]
    if schedule == "geometric":
        return [start * (end / start) ** share for share in shares]
    if schedule == "linear":
        return [start + (end - start) * share for share in shares]
    if schedule == "logarithmic":
        growth = (start / end - 1) / math.log(max(2, steps))
        return [start / (1 + growth * math.log(1 + k)) for k in range(steps)]
    raise ArgumentError(
        f"`schedule` must be 'geometric', 'linear' or 'logarithmic'. Found {schedule!r}.",
        argument="schedule",
    )


class SimulatedAnnealing(Sampler):
    """As many searches for the most probable point as draws are asked for, best first.

    Args:
        proposal: How chains move, instead of the usual way for the target; see
            :class:`~kexue_search_sampling.MetropolisHastings`.
        num_steps: Steps of each chain.
        start_temperature: τ at the first step.
        end_temperature: τ at the last.
        schedule: How τ falls: ``"geometric"``, ``"linear"`` or ``"logarithmic"``.
        num_features: Features of a point, where the target does not say.
        init: Where chains start, shape ``[chain, feature]``; standard normal or uniform by default.

    Raises:
        ArgumentError: If an argument is out of its range, the target is not one, or returns NaN or
            +inf; if no chain finds a point of positive density.

    Example:
        >>> import torch
        >>> from kexue_search_sampling import SimulatedAnnealing
        >>> logits = torch.tensor([0.0, 2.0, 1.9])
        >>> SimulatedAnnealing(num_steps=200).sample(logits, 3).values
        tensor([1, 1, 1])

    Source: https://kexue.fm/archives/8062 and https://kexue.fm/archives/8084; Kirkpatrick, Gelatt
    and Vecchi, Optimization by simulated annealing, 1983.
    """

    known_failures: ClassVar[dict[str, str]] = {
        "frequencies": "it searches: its draws are maxima, not in proportion to the target"
    }

    def __init__(
        self,
        proposal: Proposal | None = None,
        *,
        num_steps: int = 2000,
        start_temperature: float = 1.0,
        end_temperature: float = 0.01,
        schedule: Schedule = "geometric",
        num_features: int | None = None,
        init: Tensor | None = None,
    ) -> None:
        check_settings(
            self, num_steps=num_steps, start_temperature=start_temperature,
            end_temperature=end_temperature,
        )  # fmt: skip
        if end_temperature > start_temperature:
            raise ArgumentError(
                f"`end_temperature` of SimulatedAnnealing must be at most `start_temperature`. "
                f"Found {end_temperature} and {start_temperature}.",
                argument="end_temperature",
            )
        temperatures(schedule, 1, start_temperature, end_temperature)
        self.proposal, self.num_steps, self.schedule = proposal, num_steps, schedule
        self.start_temperature, self.end_temperature = start_temperature, end_temperature
        self.num_features, self.init = num_features, init

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Search.

        Args:
            target: Logits ``[class]``, or a table of them with an axis per variable; or a function
                from points ``[chain, feature]``, or from sequences ``[chain, time]`` of tokens with
                -1 behind the end, to log-densities ``[chain]`` in nats.
            num_samples: How many chains search.
            generator: Source of randomness; the global one by default.

        Returns:
            The best point of each chain, best first; the diagnostics ``acceptance`` and
            ``best_log_density``, ``median_log_density`` and ``worst_log_density``.
        """
        owner = type(self).__name__
        check_num_samples(num_samples, owner)
        problem = resolve(
            target, owner, num_features=self.num_features, init=self.init, generator=generator
        )
        start = check_start(self.init, problem, num_samples, owner, generator)
        if not num_samples:
            return Samples(problem.values(start))
        proposal = self.proposal or local_proposal(problem, 1.0)
        walk = Walk(problem.log_prob, proposal, start, owner, generator)
        following = self.proposal is None and isinstance(problem.space, Reals)
        best, log_best, acceptance = self._search(walk, following=following)
        if not (log_best > -math.inf).any():
            check_support(log_best, owner)
        order = log_best.argsort(descending=True, stable=True)
        ordered = log_best[order]
        diagnostics = {
            "acceptance": acceptance,
            "best_log_density": float(ordered[0]),
            "median_log_density": float(ordered.median()),
            "worst_log_density": float(ordered[-1]),
        }
        return Samples(problem.values(best[order]), diagnostics)

    def _search(self, walk: Walk, *, following: bool) -> tuple[Tensor, Tensor, float]:
        """Walk down the temperatures; return the best points, their log-densities, acceptance."""
        best, log_best = walk.points.clone(), walk.log_density.clone()
        accepted = log_best.new_zeros(())
        features = walk.points.shape[1]
        step = StepSize(1.0, optimal_acceptance(max(1, features)), walk.points.device)
        steps = min(_BLOCK, self.num_steps)
        falling = temperatures(
            self.schedule, -(-self.num_steps // steps), self.start_temperature, self.end_temperature
        )
        left = self.num_steps
        for temperature in falling:
            if following:
                walk.proposal = GaussianProposal(step.value.to(walk.points.dtype))
            rate = walk.run(
                min(steps, left), inverse_temperature=1 / temperature, best=(best, log_best)
            )
            accepted += rate * min(steps, left)
            left -= steps
            if following:
                step.count = min(step.count, 10)  # the walk must keep up with the temperature
                step.update(rate)
        return best, log_best, float(accepted) / self.num_steps

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of two hundred classes, and fewer steps than find the best."""
        inputs = {"target": torch.randn(200, generator=generator), "num_samples": 50}
        return Example({"num_steps": 20}, inputs)
