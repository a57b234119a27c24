"""Rejection, importance, Metropolis-Hastings and Gibbs sampling, and simulated annealing.

``sampler/rejection``, ``sampler/importance``, ``sampler/metropolis-hastings``, ``sampler/gibbs``
and ``sampler/simulated-annealing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_search_sampling.annealing import SimulatedAnnealing as SimulatedAnnealing
    from kexue_search_sampling.diagnostics import autocorrelation as autocorrelation
    from kexue_search_sampling.diagnostics import effective_sample_size as effective_sample_size
    from kexue_search_sampling.diagnostics import split_r_hat as split_r_hat
    from kexue_search_sampling.distributions import StudentT as StudentT
    from kexue_search_sampling.distributions import Uniform as Uniform
    from kexue_search_sampling.edits import EditProposal as EditProposal
    from kexue_search_sampling.gibbs import Gibbs as Gibbs
    from kexue_search_sampling.importance import Importance as Importance
    from kexue_search_sampling.importance import expectation as expectation
    from kexue_search_sampling.importance import resample as resample
    from kexue_search_sampling.metropolis import MetropolisHastings as MetropolisHastings
    from kexue_search_sampling.pareto import pareto_k as pareto_k
    from kexue_search_sampling.proposals import GaussianProposal as GaussianProposal
    from kexue_search_sampling.proposals import IndependentProposal as IndependentProposal
    from kexue_search_sampling.proposals import Proposal as Proposal
    from kexue_search_sampling.proposals import TableProposal as TableProposal
    from kexue_search_sampling.rejection import Rejection as Rejection
    from kexue_search_sampling.text import Bigrams as Bigrams
    from kexue_search_sampling.text import keyword_text as keyword_text

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annealing": ["SimulatedAnnealing"],
        "diagnostics": ["autocorrelation", "effective_sample_size", "split_r_hat"],
        "distributions": ["StudentT", "Uniform"],
        "edits": ["EditProposal"],
        "gibbs": ["Gibbs"],
        "importance": ["Importance", "expectation", "resample"],
        "metropolis": ["MetropolisHastings"],
        "pareto": ["pareto_k"],
        "proposals": ["GaussianProposal", "IndependentProposal", "Proposal", "TableProposal"],
        "rejection": ["Rejection"],
        "text": ["Bigrams", "keyword_text"],
    },
)

_POST = "苏剑林, 【搜出来的文本】⋅(一)从文本生成到搜索采样, 2021, https://kexue.fm/archives/8062"
_SECOND = "苏剑林, 【搜出来的文本】⋅(二)从MCMC到模拟退火, 2021, https://kexue.fm/archives/8084"
_HASTINGS = (
    "Hastings, Monte Carlo sampling methods using Markov chains and their applications, 1970, "
    "https://doi.org/10.1093/biomet/57.1.97"
)
_GEMAN = (
    "Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of "
    "images, 1984, https://doi.org/10.1109/TPAMI.1984.4767596"
)
_KIRKPATRICK = (
    "Kirkpatrick, Gelatt and Vecchi, Optimization by simulated annealing, 1983, "
    "https://doi.org/10.1126/science.220.4598.671"
)
_PSIS = "Vehtari et al., Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646"
_R_HAT = "Vehtari et al., Rank-normalization, folding, and localization, https://arxiv.org/abs/1903.08008"


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    package = "kexue_search_sampling"
    return [
        Component(
            "sampler",
            "rejection",
            f"{package}.rejection:Rejection",
            "Independent, exact draws: those of an easy distribution, some of which are kept.",
            references=(_POST,),
            tags=("exact", "independent"),
        ),
        Component(
            "sampler",
            "importance",
            f"{package}.importance:Importance",
            "Weighted draws of an easy distribution, for expectations and normalisers.",
            references=(_POST, _PSIS),
            tags=("weighted", "independent"),
        ),
        Component(
            "sampler",
            "metropolis-hastings",
            f"{package}.metropolis:MetropolisHastings",
            "Many chains of moves that are accepted by the Metropolis-Hastings rule.",
            references=(_POST, _SECOND, _HASTINGS, _R_HAT),
            tags=("mcmc", "discrete", "continuous"),
        ),
        Component(
            "sampler",
            "gibbs",
            f"{package}.gibbs:Gibbs",
            "Many chains that draw one place after another given all others.",
            references=(_POST, _SECOND, _GEMAN, _R_HAT),
            tags=("mcmc", "discrete"),
        ),
        Component(
            "sampler",
            "simulated-annealing",
            f"{package}.annealing:SimulatedAnnealing",
            "Many searches for the most probable point, at a falling temperature.",
            references=(_POST, _SECOND, _KIRKPATRICK),
            tags=("search", "discrete", "continuous"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    package = "kexue_search_sampling.experiments"
    return [
        Experiment(
            "independent",
            f"{package}:independent",
            "Rejection and importance sampling of text with a keyword, beside its exact law.",
            references=(_POST,),
        ),
        Experiment(
            "chains",
            f"{package}:chains",
            "Metropolis-Hastings, Gibbs and annealing of such text, beside its exact law.",
            references=(_POST, _SECOND),
        ),
    ]
