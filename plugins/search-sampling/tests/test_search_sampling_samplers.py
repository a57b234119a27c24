"""The samplers: exact laws on spaces that can be counted, moments of skewed targets, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core import ArgumentError, Sampler, Samples
from kexue.core.component import PAD
from kexue.core.densities import Density, make_density
from kexue.core.errors import WorkError
from kexue_search_sampling import (
    Bigrams,
    GaussianProposal,
    Gibbs,
    Importance,
    IndependentProposal,
    MetropolisHastings,
    Rejection,
    SimulatedAnnealing,
    StudentT,
    expectation,
    keyword_text,
    resample,
)
from kexue_search_sampling.annealing import temperatures
from kexue_search_sampling.gibbs import draw_classes
from kexue_search_sampling.spaces import Reals

CHAINS: dict[str, Any] = {"num_chains": 2000, "diagnose": False}
SAMPLERS: dict[str, Callable[..., Any]] = {
    "rejection": Rejection,
    "importance": Importance,
    "metropolis-hastings": lambda **given: MetropolisHastings(
        **{**CHAINS, "warmup": 200, "thin": 40, **given}
    ),
    "gibbs": lambda **given: Gibbs(**{**CHAINS, "warmup": 20, "thin": 6, **given}),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(sampler: Any, target: Any, num: int, seed: int = 0) -> Samples:
    """Draw, with equal weights."""
    found: Samples = sampler.sample(target, num, generator=seeded(seed))
    return found if found.weights is None else resample(found, num // 5, generator=seeded(seed))


def exponential(points: Tensor) -> Tensor:
    """Skewed: the mean is 1, the variance 1, the third central moment 2; zero below 0."""
    x = points[:, 0]
    return torch.where(x >= 0, -x, -math.inf)


def power_of(power: int, points: Tensor) -> Tensor:
    return points[:, 0].double() ** power


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_a_table_as_it_is(name: str, dtype: torch.dtype) -> None:
    table = torch.tensor([[0.0, 1.0, -math.inf], [-1.0, 0.5, 0.25]], dtype=dtype)
    values = drawn(SAMPLERS[name](), table, 20_000).values
    counts = (values[:, 0] * 3 + values[:, 1]).bincount(minlength=6)
    wanted = table.double().flatten().softmax(0)
    assert values.shape[1:] == (2,)
    assert counts[2] == 0
    assert chisquare(counts[wanted > 0], wanted[wanted > 0] * len(values)).pvalue > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_sequences_as_they_are(name: str) -> None:
    shortest = 3 if name == "gibbs" else 1
    model = Bigrams(["abba", "cabac"], alphabet="abc", max_length=3, min_length=shortest)
    target = keyword_text(model, [] if name == "gibbs" else ["b"])
    values = drawn(SAMPLERS[name](), target, 20_000).values
    rows = [
        [*tokens, *[PAD] * (3 - n)]
        for n in range(shortest, 4)
        for tokens in product(range(3), repeat=n)
    ]
    states = torch.tensor(rows)
    wanted = target(states).exp()
    counts = (values[:, None] == states).all(2).sum(0)
    assert int(counts.sum()) == len(values)
    assert counts[wanted == 0].sum() == 0
    inside = wanted > 0
    share = wanted[inside] / wanted.sum()
    assert chisquare(counts[inside], share * len(values)).pvalue > 1e-3


def test_gibbs_scores_all_replacements_where_no_conditionals_are_given() -> None:
    model = Bigrams(["abba", "cabac"], alphabet="abc", max_length=3)
    target = keyword_text(model, ["b"])
    assert target.conditional_logits is None
    values = drawn(SAMPLERS["gibbs"](), target, 20_000).values
    states = torch.tensor(list(product(range(3), repeat=3)))
    wanted = target(states).exp()
    counts = (values[:, None] == states).all(2).sum(0)
    inside = wanted > 0
    share = wanted[inside] / wanted.sum()
    assert counts[~inside].sum() == 0
    assert chisquare(counts[inside], share * len(values)).pvalue > 1e-3


@pytest.mark.parametrize(
    "sampler",
    [
        Rejection(num_features=1),
        Importance(num_features=1),
        MetropolisHastings(num_features=1, thin=20, **CHAINS),
        MetropolisHastings(num_features=1, thin=20, step_size=1.5, **CHAINS),
        MetropolisHastings(
            IndependentProposal(StudentT(Reals(1, torch.float32, torch.device("cpu")), 2.0)),
            num_features=1, warmup=100, thin=20, **CHAINS,
        ),
    ],
    ids=["rejection", "importance", "adapted walk", "fixed walk", "independent proposals"],
)  # fmt: skip
def test_moments_of_a_skewed_target(sampler: Sampler) -> None:
    found: Samples = sampler.sample(exponential, 40_000, generator=seeded())
    counted = found.values if found.weights is None else found.values[found.weights > 0]
    assert (counted >= 0).all()
    count = len(found.values) if found.weights is None else 1 / float(found.weights.square().sum())
    for power, wanted, variance in ((1, 1.0, 1.0), (2, 2.0, 20.0), (3, 6.0, 684.0)):
        mean, _ = expectation(found, partial(power_of, power))
        assert abs(float(mean) - wanted) < 5 * math.sqrt(variance / count)


def test_gibbs_of_a_gaussian_whose_conditionals_are_known() -> None:
    target = make_density("gaussian", {"mean": [1.0, -2.0], "covariance": [[2, 1.2], [1.2, 1]]})
    assert isinstance(target, Density)
    values = Gibbs(**CHAINS, thin=10).sample(target, 40_000, generator=seeded()).values
    torch.testing.assert_close(values.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.05)
    wanted = torch.tensor([[2, 1.2], [1.2, 1]])
    torch.testing.assert_close(values.T.cov(), wanted, rtol=0.05, atol=0)


def test_a_random_walk_finds_both_modes_and_the_covariance() -> None:
    settings = {"weights": [0.25, 0.75], "means": [[-2, 0], [2, 1]], "scales": [1.0, 0.5]}
    target = make_density("gaussian-mixture", settings, dtype=torch.float64)
    found = MetropolisHastings(num_chains=400, thin=10).sample(target, 40_000, generator=seeded())
    assert found.values.dtype == torch.float64
    mean, _ = expectation(found, lambda x: x)
    assert mean.tolist() == pytest.approx([1.0, 0.75], abs=0.06)
    assert found.diagnostics["r_hat"] < 1.02
    assert 0.15 < found.diagnostics["acceptance"] < 0.6


@pytest.mark.parametrize("name", ["banana", "funnel"])
def test_moments_of_bent_targets(name: str) -> None:
    target = make_density(name, {"scale": 1.0} if name == "funnel" else {})
    sampler = MetropolisHastings(num_chains=1000, warmup=1000, thin=60)
    values = sampler.sample(target, 20_000, generator=seeded()).values
    spread = 1.0 if name == "funnel" else 3.0
    assert float(values[:, 0].mean()) == pytest.approx(0, abs=0.1 * spread)
    assert float(values[:, 0].std()) == pytest.approx(spread, rel=0.06)
    assert float(values[:, 1].mean()) == pytest.approx(0, abs=0.1)


def test_a_temperature_is_a_power() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampler = SAMPLERS["metropolis-hastings"](temperature=2.0)
    counts = sampler.sample(logits, 20_000, generator=seeded()).values.bincount(minlength=3)
    assert chisquare(counts, (logits.double() / 2).softmax(0) * 20_000).pvalue > 1e-3


def test_classes_are_drawn_by_their_logits() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, -math.inf, -math.inf]])
    found = draw_classes(logits.repeat_interleave(9000, 0), seeded())
    first, second = found[:9000].bincount(minlength=3), found[9000:].bincount(minlength=3)
    assert first[1] == 0
    assert chisquare(first[[0, 2]], logits[0, [0, 2]].double().softmax(0) * 9000).pvalue > 1e-3
    assert chisquare(second).pvalue > 1e-3


# -- chains ---------------------------------------------------------------------------------------


def test_chains_hold_the_draws() -> None:
    found = MetropolisHastings(num_chains=7, num_features=2).sample(
        lambda x: -x.square().sum(1), 100, generator=seeded()
    )
    assert found.chains is not None
    assert found.chains.shape == (7, 15, 2)
    assert torch.equal(found.values, found.chains.transpose(0, 1).flatten(0, 1)[:100])
    assert set(found.diagnostics) == {
        "acceptance", "step_size", "r_hat", "effective_sample_size", "effective_per_second",
        "seconds",
    }  # fmt: skip


def test_thinning_keeps_every_so_many_steps() -> None:
    target = torch.randn(50, generator=seeded())
    every = MetropolisHastings(num_chains=5, warmup=7).sample(target, 60, generator=seeded())
    third = MetropolisHastings(num_chains=5, warmup=7, thin=3).sample(
        target, 20, generator=seeded()
    )
    assert every.chains is not None
    assert third.chains is not None
    assert torch.equal(every.chains[:, 2::3], third.chains)


def test_the_number_of_chains_follows_the_number_of_draws() -> None:
    for num, chains in ((10, 4), (1000, 10), (50_000, 500)):
        found = Gibbs(warmup=0).sample(torch.zeros(2), num, generator=seeded())
        assert found.chains is not None
        assert len(found.chains) == chains


def recorded_walk(**settings: Any) -> tuple[Samples, list[Tensor]]:
    """Draw from a scaled Gaussian, and keep every point that was proposed."""
    proposed: list[Tensor] = []

    def target(points: Tensor) -> Tensor:
        proposed.append(points.clone())
        return -0.5 * (points[:, 0] / 20).square()

    sampler = MetropolisHastings(num_chains=4000, num_features=1, diagnose=False, **settings)
    return sampler.sample(target, 4000 * 30, generator=seeded()), proposed


def test_the_step_size_is_learned_and_then_fixed() -> None:
    found, proposed = recorded_walk(warmup=600)
    assert found.chains is not None
    draws = found.chains[:, :, 0]
    steps = torch.stack(proposed[-29:], 1)[:, :, 0] - draws[:, :-1]
    spread = steps.std(0)
    assert float(spread.std() / spread.mean()) < 0.02  # the error of 4000 draws is 0.011
    assert float(spread.mean()) == pytest.approx(
        found.diagnostics["step_size"] * 20, rel=0.1
    )  # times the standard deviation that the covariance has learned
    warm = [float(new.std()) for new in proposed[1:3]]
    assert max(warm) < 0.3 * float(spread.mean())  # it began with far smaller steps
    assert found.diagnostics["acceptance"] == pytest.approx(0.44, abs=0.03)


def test_the_draws_do_not_depend_on_how_many_follow() -> None:
    target = make_density("banana")
    few = MetropolisHastings(num_chains=10, warmup=200).sample(target, 500, generator=seeded())
    more = MetropolisHastings(num_chains=10, warmup=200).sample(target, 500, generator=seeded())
    assert torch.equal(few.values, more.values)
    assert few.diagnostics["step_size"] == more.diagnostics["step_size"]


def test_learning_the_covariance_pays() -> None:
    target = make_density("gaussian", {"num_features": 10, "correlation": 0.95})
    learned, fixed = (
        MetropolisHastings(num_chains=200, warmup=1500, step_size=size).sample(
            target, 60_000, generator=seeded()
        )
        for size in (None, 0.15)
    )
    gain = learned.diagnostics["effective_sample_size"] / fixed.diagnostics["effective_sample_size"]
    assert gain > 3
    assert learned.diagnostics["acceptance"] == pytest.approx(0.255, abs=0.04)


def test_chains_start_where_they_are_told() -> None:
    init = torch.full((3, 2), 5.0, dtype=torch.float64)
    found = MetropolisHastings(GaussianProposal(1e-6), init=init, warmup=0, diagnose=False).sample(
        lambda x: -x.square().sum(1), 3, generator=seeded()
    )
    torch.testing.assert_close(found.values, init, rtol=0, atol=1e-4)
    with pytest.raises(ArgumentError, match="`init` of Gibbs must have shape") as caught:
        Gibbs(init=torch.zeros(3, 2)).sample(torch.zeros(4), 3)
    assert caught.value.argument == "init"


def test_chains_that_start_outside_find_the_support() -> None:
    def far(points: Tensor) -> Tensor:
        inside = (points - 6).abs().amax(1) < 1
        return torch.where(inside, 0.0, -math.inf)

    sampler = MetropolisHastings(num_chains=50, num_features=1, step_size=1.0, warmup=3000)
    values = sampler.sample(far, 5000, generator=seeded()).values
    assert ((values - 6).abs() < 1).all()
    stuck = MetropolisHastings(num_chains=50, num_features=1, step_size=0.01, warmup=1)
    with pytest.raises(ArgumentError, match="Found none for 50 of 50 chains"):
        stuck.sample(far, 5000, generator=seeded())


# -- searching ------------------------------------------------------------------------------------


def test_annealing_finds_the_best_text() -> None:
    lines = ["the other thing", "that is there", "with them"]
    model = Bigrams(lines, max_length=4)
    target = keyword_text(model, ["th"])
    found = SimulatedAnnealing(num_steps=4000).sample(target, 100, generator=seeded())
    states = torch.tensor(list(product(range(27), repeat=2)))
    pair = model.encode("th").expand(len(states), 2)
    spread = [torch.cat([states[:, :place], pair, states[:, place:]], 1) for place in range(3)]
    best = target(torch.cat(spread)).max()
    assert found.diagnostics["best_log_density"] == pytest.approx(float(best))
    assert float(target(found.values[:1])) == pytest.approx(float(best))
    scores = target(found.values)
    assert (scores[:-1] >= scores[1:]).all()
    assert found.diagnostics["worst_log_density"] == pytest.approx(float(scores[-1]))


def test_annealing_narrows_down_a_continuous_maximum() -> None:
    target = make_density("banana", dtype=torch.float64)
    found = SimulatedAnnealing(num_steps=3000, end_temperature=1e-4).sample(
        target, 20, generator=seeded()
    )
    torch.testing.assert_close(
        found.values[0], torch.tensor([0.0, -0.9], dtype=torch.float64), rtol=0, atol=0.1
    )
    assert found.diagnostics["best_log_density"] > -1e-3


@pytest.mark.parametrize("schedule", ["geometric", "linear", "logarithmic"])
def test_temperatures_fall_from_the_first_to_the_last(schedule: Any) -> None:
    falling = temperatures(schedule, 50, 2.0, 0.1)
    assert len(falling) == 50
    assert falling[0] == pytest.approx(2.0)
    assert falling[-1] == pytest.approx(0.1)
    assert falling == sorted(falling, reverse=True)
    assert temperatures(schedule, 1, 2.0, 0.1) == [2.0]
    with pytest.raises(ArgumentError, match="`schedule` must be"):
        temperatures("cubic", 5, 1.0, 0.1)  # type: ignore[arg-type]


# -- independent draws ------------------------------------------------------


def test_rejection_of_a_table_knows_its_bound() -> None:
    found = Rejection().sample(torch.tensor([1.0, 0.0, -math.inf]), 9000, generator=seeded())
    assert found.diagnostics["log_bound"] == pytest.approx(1.0 + math.log(3))
    assert found.diagnostics["acceptance"] == pytest.approx((1 + math.exp(-1)) / 3, abs=0.02)
    assert found.diagnostics["max_log_ratio"] <= found.diagnostics["log_bound"] + 1e-9


def test_rejection_decides_again_when_its_bound_grows() -> None:
    target = make_density("gaussian", {"mean": [0.5], "covariance": [[1.0]]})
    sampler = Rejection(scale=2.0, batch_size=10)  # the bound grows from batch to batch
    found = sampler.sample(target, 10_000, generator=seeded())
    assert found.diagnostics["log_bound"] == found.diagnostics["max_log_ratio"]
    assert float(found.values.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(found.values.std()) == pytest.approx(1.0, abs=0.04)


def test_rejection_refuses_a_bound_that_is_too_small() -> None:
    with pytest.raises(ArgumentError, match="`log_bound` of Rejection must be at least") as caught:
        Rejection(log_bound=0.0).sample(torch.tensor([1.0, 0.0]), 10, generator=seeded())
    assert caught.value.argument == "log_bound"


def test_rejection_gives_up() -> None:
    target = keyword_text(Bigrams(["a"], max_length=8), ["zzzzzzzz"])
    with pytest.raises(WorkError, match=r"kept 0 of 5000 draws, and 3 were asked for"):
        Rejection(max_tries=5000).sample(target, 3, generator=seeded())


@pytest.mark.parametrize("sampler", [Rejection, Importance])
def test_takes_a_distribution_of_torch(sampler: Callable[..., Any]) -> None:
    q = torch.distributions.Normal(torch.zeros(2), 2.0)
    target = make_density("gaussian", {"mean": [0.5, 0.0], "covariance": [[1, 0.5], [0.5, 1]]})
    before = torch.get_rng_state()
    found = sampler(q).sample(target, 20_000, generator=seeded())
    again = sampler(q).sample(target, 20_000, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.values, again.values)
    mean, _ = expectation(found, lambda x: x)
    assert mean.tolist() == pytest.approx([0.5, 0.0], abs=0.05)
    with pytest.raises(ArgumentError, match=r"`proposal` of .* must have `sample` and `log_prob`"):
        sampler(3).sample(target, 10)


def test_importance_knows_the_normaliser_and_its_error() -> None:
    target = make_density("gaussian", {"num_features": 3}, dtype=torch.float64)
    errors, claimed = [], []
    for seed in range(30):
        found = Importance(scale=1.5).sample(target, 4000, generator=seeded(seed))
        mean, error = expectation(found, lambda x: x[:, 0])
        errors.append(float(mean))
        claimed.append(float(error))
        assert found.diagnostics["log_normalizer"] == pytest.approx(
            1.5 * math.log(2 * math.pi), abs=0.1
        )
        assert found.diagnostics["pareto_k"] < 0.5
    assert torch.tensor(errors).square().mean().sqrt() == pytest.approx(
        sum(claimed) / len(claimed), rel=0.4
    )


def test_importance_sees_a_proposal_that_is_too_narrow() -> None:
    target = make_density("gaussian", {"num_features": 2})
    narrow = torch.distributions.Normal(torch.zeros(2), 0.4)
    found = Importance(narrow).sample(target, 20_000, generator=seeded())
    assert found.diagnostics["pareto_k"] > 0.6


def test_resampling_is_as_even_as_can_be() -> None:
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    found = resample(Samples(torch.arange(4), weights=weights), 1000, generator=seeded())
    counts = found.values.bincount(minlength=4)
    assert (counts - 1000 * weights).abs().max() <= 1
    assert found.weights is None
    with pytest.raises(ArgumentError, match="`samples` must have weights"):
        resample(Samples(torch.arange(4)), 3)


# -- bad input ------------------------------------------------------------------------------------

EVERY: dict[str, Callable[..., Any]] = {
    **SAMPLERS,
    "simulated-annealing": lambda **given: SimulatedAnnealing(**{"num_steps": 10, **given}),
}


@pytest.mark.parametrize("name", EVERY)
def test_no_draws(name: str) -> None:
    assert EVERY[name]().sample(torch.zeros(3), 0).values.shape == (0,)
    assert EVERY[name]().sample(torch.zeros(3, 2), 0).values.shape == (0, 2)
    with pytest.raises(ArgumentError, match=r"`num_samples` of .* must not be negative"):
        EVERY[name]().sample(torch.zeros(3), -1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0.0, math.nan]), "must be -inf or a number, everywhere. Found nan"),
        (torch.tensor([0.0, math.inf]), "must be -inf or a number, everywhere. Found inf"),
        (torch.full((2,), -math.inf), "must have a logit above -inf"),
        (torch.zeros(0), "must be floating-point logits"),
        (torch.zeros(()), "must be floating-point logits"),
        (torch.zeros(3).long(), "must be floating-point logits"),
        (3, "must be logits or a function"),
    ],
    ids=["nan", "inf", "nowhere", "empty", "scalar", "whole", "number"],
)
def test_rejects_a_target(name: str, target: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        EVERY[name]().sample(target, 5)
    assert caught.value.argument == "target"


@pytest.mark.parametrize("name", [name for name in EVERY if name != "gibbs"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rejects_a_function_that_is_not_a_density(name: str, wrong: float) -> None:
    with pytest.raises(ArgumentError, match=r"must be -inf or a number, everywhere. Found"):
        EVERY[name](num_features=1).sample(lambda x: torch.full((len(x),), wrong), 5)
    with pytest.raises(ArgumentError, match=r"must return one log-density per point, shape \["):
        EVERY[name](num_features=1).sample(lambda x: x, 5)
    with pytest.raises(ArgumentError, match=r"`num_features` of .* must be given") as caught:
        EVERY[name]().sample(lambda x: x.sum(1), 5)
    assert caught.value.argument == "num_features"


def test_a_density_that_turns_bad_on_the_way_is_seen() -> None:
    def target(points: Tensor) -> Tensor:
        return torch.where(points[:, 0] > 3, math.nan, -0.5 * points[:, 0].square())

    with pytest.raises(ArgumentError, match="Found nan at"):
        MetropolisHastings(num_features=1, num_chains=100).sample(target, 10_000)


def test_gibbs_says_what_it_needs() -> None:
    with pytest.raises(ArgumentError, match="must have conditionals"):
        Gibbs(num_features=1).sample(lambda x: x.sum(1), 5)
    target = keyword_text(Bigrams(["ab"], max_length=3, min_length=1))
    with pytest.raises(ArgumentError, match="must be of sequences of one length"):
        Gibbs().sample(target, 5)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: MetropolisHastings(num_chains=0), "num_chains"),
        (lambda: MetropolisHastings(warmup=-1), "warmup"),
        (lambda: MetropolisHastings(thin=0), "thin"),
        (lambda: MetropolisHastings(step_size=0.0), "step_size"),
        (lambda: MetropolisHastings(temperature=math.inf), "temperature"),
        (lambda: Gibbs(thin=1.5), "thin"),  # type: ignore[arg-type]
        (lambda: Importance(scale=-1.0), "scale"),
        (lambda: Rejection(log_bound=math.nan), "log_bound"),
        (lambda: Rejection(max_tries=0), "max_tries"),
        (lambda: SimulatedAnnealing(num_steps=0), "num_steps"),
        (lambda: SimulatedAnnealing(start_temperature=0.001), "end_temperature"),
        (lambda: SimulatedAnnealing(schedule="cubic"), "schedule"),  # type: ignore[arg-type]
    ],
)
def test_rejects_settings(make: Callable[[], Any], culprit: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{culprit}`") as caught:
        make()
    assert caught.value.argument == culprit


# -- text -----------------------------------------------------------------------------------------


def test_bigrams_score_and_draw_texts() -> None:
    model = Bigrams(["abba", "Cab!"], alphabet=" abc", max_length=3, min_length=2)
    rows = [[*t, *[PAD] * (3 - n)] for n in (2, 3) for t in product(range(4), repeat=n)]
    states = torch.tensor(rows)
    law = model.log_prob(states).exp()
    assert float(law.sum()) == pytest.approx(1.0)
    assert model.log_prob(torch.tensor([[0, PAD, PAD]])) == -math.inf
    values = model.sample(40_000, seeded())
    counts = (values[:, None] == states).all(2).sum(0)
    assert chisquare(counts, law * 40_000).pvalue > 1e-3
    assert model.decode(torch.tensor([[1, 2, PAD]])) == ["ab"]
    assert model.encode("ab?").tolist() == [1, 2, 0]


def test_a_model_of_the_text_is_a_proposal() -> None:
    model = Bigrams(["the path that they took", "other"], max_length=4)
    target = keyword_text(model, ["th"])
    found = Rejection(model, log_bound=0.0).sample(target, 2000, generator=seeded())
    texts = model.decode(found.values)
    assert all("th" in text for text in texts)
    total = Importance(model).sample(target, 50_000, generator=seeded())
    assert math.exp(total.diagnostics["log_normalizer"]) == pytest.approx(
        found.diagnostics["acceptance"], rel=0.1
    )


def test_chains_of_texts_start_with_their_keywords() -> None:
    model = Bigrams(["the path that they took", "other"], min_length=6, max_length=9)
    target = keyword_text(model, ["th", "er"])
    assert target.start is not None
    assert (target(target.start(500, seeded())) > -math.inf).all()
    found = MetropolisHastings(num_chains=100, warmup=100).sample(target, 500, generator=seeded())
    assert all("th" in text and "er" in text for text in model.decode(found.values))
    with pytest.raises(ArgumentError, match="`keywords` must fit into a text beside each other"):
        keyword_text(model, ["other", "there"])


def test_annealing_says_that_it_found_nothing() -> None:
    target = Density(lambda x: torch.full((len(x),), -math.inf), num_features=1)
    with pytest.raises(ArgumentError, match="Found none for 3 of 3 chains"):
        SimulatedAnnealing(num_steps=5).sample(target, 3)


@pytest.mark.parametrize("keyword", ["", "toolong", "A"])
def test_rejects_a_keyword(keyword: str) -> None:
    with pytest.raises(ArgumentError, match="`keywords` must be"):
        keyword_text(Bigrams(["a"], max_length=4), [keyword])


def test_rejects_a_model_without_letters_or_room() -> None:
    with pytest.raises(ArgumentError, match="`alphabet`"):
        Bigrams(["a"], max_length=4, alphabet="aa")
    with pytest.raises(ArgumentError, match="`min_length`"):
        Bigrams(["a"], max_length=4, min_length=5)
