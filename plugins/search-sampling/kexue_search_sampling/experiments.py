"""What post 8062 claims of sampling, on text whose law can be counted.

p is a chain of letter bigrams of CPython's help topics, texts have up to four letters, and χ asks
for the keyword "th": the post's target ρ(x) = p(x) χ(x), with half a million texts to be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kexue.core import ArgumentError, Claim, Context, Figure, Report, Table
from kexue.core.component import PAD
from kexue.core.densities import Density
from kexue.core.device import make_generator
from kexue.core.lab.data import text
from kexue.core.text import spread
from kexue_search_sampling.annealing import SimulatedAnnealing
from kexue_search_sampling.gibbs import Gibbs
from kexue_search_sampling.importance import Importance, expectation
from kexue_search_sampling.metropolis import MetropolisHastings
from kexue_search_sampling.rejection import Rejection
from kexue_search_sampling.text import Bigrams, keyword_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["chains", "independent"]

_POST = "https://kexue.fm/archives/8062"
_KEYWORD = "th"
_LENGTH = 4
_SIZES = (1000, 10_000, 100_000)
_LENGTHS = (2, 4, 6, 8, 10)
_SETTING = (
    "p: letter bigrams with add-one smoothing of the training lines of CPython's help topics, 27 "
    'letters. χ: the text contains "th". The total variation of draws to the exact law is beside '
    "that of as many draws of the exact law, since it is above zero for any finite number."
)


class _Letters:
    """Texts of independent letters, as frequent as in the model: a proposal that is further away.

    Args:
        model: Whose letters.
    """

    def __init__(self, model: Bigrams) -> None:
        self.model = model

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        law = self.model.log_first.exp()
        count = num * self.model.max_length
        drawn = torch.multinomial(law, count, replacement=True, generator=generator)
        return drawn.view(num, self.model.max_length)

    def log_prob(self, sequences: Tensor) -> Tensor:
        return self.model.log_first[sequences].sum(1)


def _model(context: Context, length: int, shortest: int | None = None) -> Bigrams:
    lines = context.once("search-sampling/lines", lambda: text().train)
    return Bigrams(lines, max_length=length, min_length=shortest)


def _every(letters: int, shortest: int, longest: int) -> Tensor:
    """Return all texts, padded."""
    parts = []
    for length in range(shortest, longest + 1):
        rows = torch.cartesian_prod(*[torch.arange(letters)] * length).view(-1, length)
        parts.append(torch.nn.functional.pad(rows, (0, longest - length), value=PAD))
    return torch.cat(parts)


class _Law:
    """The exact law of a density on few sequences.

    Args:
        target: The density.
        letters: Its letters.
    """

    def __init__(self, target: Density, letters: int) -> None:
        self.states = _every(letters, target.min_length, target.max_length)
        self.base = letters + 1
        self.target = target
        scores = target(self.states)
        self.total = float(scores.exp().sum())
        self.law = scores.softmax(0)
        self.index = torch.full((self.base**target.max_length,), -1)
        self.index[self._codes(self.states)] = torch.arange(len(self.states))

    def _codes(self, sequences: Tensor) -> Tensor:
        powers = self.base ** torch.arange(sequences.shape[1])
        return ((sequences + 1) * powers).sum(1)

    def distance(self, values: Tensor) -> float:
        """Return the total variation between the law and the frequencies of some draws."""
        counts = self.index[self._codes(values)].bincount(minlength=len(self.law))
        return float((counts / len(values) - self.law).abs().sum() / 2)

    def some(self, num: int, seed: int) -> Tensor:
        """Return uniform draws of the sequences that are possible."""
        possible = (self.law > 0).double()
        generator = make_generator(seed)
        drawn = torch.multinomial(possible, num, replacement=True, generator=generator)
        return self.states[drawn]

    def exact(self, num: int, generator: torch.Generator) -> Tensor:
        """Return draws of the law itself."""
        drawn = torch.multinomial(self.law, num, replacement=True, generator=generator)
        return self.states[drawn]


# -- independent draws ----------------------------------------------------------------------------


def independent(context: Context) -> Report:
    """Check rejection and importance sampling against the exact law."""
    model = _model(context, _LENGTH)
    target = keyword_text(model, [_KEYWORD])
    law = _Law(target, len(model.alphabet))
    claims = [
        *_rejection(context, model, target, law),
        _too_small(context, model, target, law),
    ]
    claim, errors = _importance(context, model, target, law)
    by_length, shares = _dimension(context)
    rows = [[n, spread(values, 5)] for n, values in shares.items()]
    return Report(
        [*claims, claim, by_length],
        [Table("Effective share of draws of independent letters", ["letters", "share"], rows)],
        [
            Figure("Importance sampling: error", partial(_plot_errors, errors)),
            Figure("Effective share of the draws", partial(_plot_shares, shares)),
        ],
        [_SETTING],
    )


def _rejection(context: Context, model: Bigrams, target: Density, law: _Law) -> tuple[Claim, Claim]:
    num = context.pick(20_000, 10_000)
    found: dict[float, list[tuple[float, float, float]]] = {}
    for log_bound in (0.0, math.log(4)):
        for seed in context.seeds:
            generator = make_generator(seed)
            drawn = Rejection(model, log_bound=log_bound).sample(target, num, generator=generator)
            exact = law.exact(num, generator)
            rate = law.total / math.exp(log_bound)
            error = math.sqrt(rate * (1 - rate) / drawn.diagnostics["tries"])
            found.setdefault(log_bound, []).append(
                (
                    (drawn.diagnostics["acceptance"] - rate) / error,
                    law.distance(drawn.values) / law.distance(exact),
                    drawn.diagnostics["acceptance"],
                )
            )
    tight, loose = found.values()
    exact_law = Claim(
        "Rejection sampling keeps draws of the target's law, and as many as ρ sums to.",
        f"{_POST}, section “拒绝采样”",
        f"total variation over that of exact draws: {spread([r for _, r, _ in tight])}; kept "
        f"{spread([a for *_, a in tight], 4)} of the draws, ρ sums to {law.total:.4f}.",
        "A ratio of at most 1.1 on average, and within 4 standard errors.",
        fmean(r for _, r, _ in tight) <= 1.1 and max(abs(z) for z, *_ in tight) <= 4,
    )
    scaled = Claim(
        "To divide the acceptance probability by four changes the work, not the law.",
        f"{_POST}, section “拒绝采样”",
        f"total variation over that of exact draws: {spread([r for _, r, _ in loose])}; kept "
        f"{spread([a for *_, a in loose], 4)} of the draws.",
        f"A ratio of at most 1.1 on average, and {law.total / 4:.4f} within 4 standard errors.",
        fmean(r for _, r, _ in loose) <= 1.1 and max(abs(z) for z, *_ in loose) <= 4,
    )
    return exact_law, scaled


def _too_small(context: Context, model: Bigrams, target: Density, law: _Law) -> Claim:
    """Take a bound that is twenty times too small, on a proposal that is further away."""
    letters = _Letters(model)
    log_q, log_rho = letters.log_prob(law.states), target(law.states)
    log_bound = float((log_rho - log_q).max()) - math.log(20)
    kept = (log_q + (log_rho - log_q - log_bound).clamp(max=0)).exp()
    apart = float((kept / kept.sum() - law.law).abs().sum() / 2)
    refused = 0
    for seed in context.seeds:
        try:
            Rejection(letters, log_bound=log_bound).sample(
                target, 1000, generator=make_generator(seed)
            )
        except ArgumentError:
            refused += 1
    return Claim(
        "With a bound that ρ/q exceeds, the law is another; the sampler sees it.",
        f"{_POST}, section “拒绝采样”",
        f"bound 20 times too small: total variation of the law kept {apart:.3f}; refused in "
        f"{refused} of {len(context.seeds)} runs.",
        "Above 0.05, and refused in all.",
        apart > 0.05 and refused == len(context.seeds),
    )


def _importance(
    context: Context, model: Bigrams, target: Density, law: _Law
) -> tuple[Claim, dict[int, list[float]]]:
    """Estimate the expected number of letters e."""
    letter = int(model.encode("e")[0])

    def count(sequences: Tensor) -> Tensor:
        return (sequences == letter).sum(1).double()

    wanted = float(law.law @ count(law.states))
    repeats = context.pick(10, 5)
    errors: dict[int, list[float]] = {}
    for num in _SIZES:
        for seed in context.seeds:
            squares = []
            for repeat in range(repeats):
                generator = make_generator(1000 * seed + repeat)
                drawn = Importance(_Letters(model)).sample(target, num, generator=generator)
                squares.append((float(expectation(drawn, count)[0]) - wanted) ** 2)
            errors.setdefault(num, []).append(math.sqrt(sum(squares) / repeats))
    slopes = [
        math.log10(last / before)
        for before, last in zip(errors[_SIZES[-2]], errors[_SIZES[-1]], strict=True)
    ]
    slope = fmean(slopes)
    claim = Claim(
        "Weights of ρ/q, known up to a factor, give expectations; the error falls like 1/√N.",
        f"{_POST}, section “重要采样”",
        f"root mean square error of the expected number of e, {repeats} runs a seed: "
        + "; ".join(f"{spread(values)} of {num} draws" for num, values in errors.items())
        + f"; slope of the logarithms at the end {slope:.2f}.",
        "A slope from -0.7 to -0.3.",
        -0.7 <= slope <= -0.3,
    )
    return claim, errors


def _dimension(context: Context) -> tuple[Claim, dict[int, list[float]]]:
    num = context.pick(50_000, 20_000)
    shares: dict[int, list[float]] = {}
    for length in _LENGTHS:
        model = _model(context, length)
        for seed in context.seeds:
            drawn = Importance(_Letters(model)).sample(
                keyword_text(model), num, generator=make_generator(seed)
            )
            shares.setdefault(length, []).append(drawn.diagnostics["effective_sample_size"] / num)
    means = [fmean(values) for values in shares.values()]
    claim = Claim(
        "A proposal that is not close loses its draws fast as texts grow longer.",
        f"{_POST}, sections “困难分析” and “拒绝采样”",
        "effective share of draws of independent letters for the bigram model: "
        + ", ".join(f"{m:.4f} at {n}" for n, m in zip(shares, means, strict=True))
        + " letters.",
        "Falls with every length, to less than a twentieth.",
        all(b < a for a, b in pairwise(means)) and means[-1] < means[0] / 20,
    )
    return claim, shares


def _plot_errors(errors: Mapping[int, Sequence[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for seed in range(len(next(iter(errors.values())))):
        axes.plot(list(errors), [values[seed] for values in errors.values()], "o-", color="#3465a4")
    first = next(iter(errors))
    line = [errors[first][0] * math.sqrt(first / num) for num in errors]
    axes.plot(list(errors), line, "--", color="gray", label="1/√N")
    axes.set(xscale="log", yscale="log", xlabel="draws", ylabel="root mean square error")
    axes.legend()


def _plot_shares(shares: Mapping[int, Sequence[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for length, values in shares.items():
        axes.plot([length] * len(values), values, "o", color="#3465a4")
    axes.set(yscale="log", xlabel="letters", ylabel="effective share of the draws")


# -- chains ---------------------------------------------------------------------------------------

_STEPS = (1, 3, 10, 30, 100, 300, 600)
_SWEEPS = (1, 2, 3, 5, 10, 20)

Distances = dict[int, list[float]]


def chains(context: Context) -> Report:
    """Let many chains walk, and look how far their law is from the target's."""
    num = context.pick(6000, 3000)
    model = _model(context, _LENGTH, 2)
    edited = _Law(keyword_text(model, [_KEYWORD]), len(model.alphabet))
    starts = [edited.some(num, seed) for seed in context.seeds]
    walking = _approach(edited, starts, context.pick(_STEPS, _STEPS[:-1]), _walk)
    short = _model(context, 3)
    drawn = _Law(keyword_text(short), len(short.alphabet))
    uniform = [drawn.some(num, seed) for seed in context.seeds]
    sweeping = _approach(drawn, uniform, _SWEEPS, _sweep)
    exact = [
        [law.distance(law.exact(num, make_generator(seed))) for seed in context.seeds]
        for law in (edited, drawn)
    ]
    return Report(
        [
            _arrival("Metropolis-Hastings with edits", walking, exact[0], num),
            _arrival("Gibbs sampling", sweeping, exact[1], num),
            _search(context),
        ],
        [],
        [
            Figure(
                "Metropolis-Hastings: from the start to the target",
                partial(_plot_approach, walking, exact[0], "steps"),
                'Two to four letters with "th", from uniform ones; the last text of each chain.',
            ),
            Figure(
                "Gibbs sampling: from the start to the target",
                partial(_plot_approach, sweeping, exact[1], "sweeps"),
                "Three letters, from uniform letters.",
            ),
        ],
        [_SETTING],
    )


def _walk(law: _Law, init: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    sampler = MetropolisHastings(init=init, warmup=steps - 1, diagnose=False)
    return sampler.sample(law.target, len(init), generator=generator).values


def _sweep(law: _Law, init: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
    sampler = Gibbs(init=init, warmup=sweeps - 1, diagnose=False)
    return sampler.sample(law.target, len(init), generator=generator).values


def _approach(
    law: _Law,
    starts: Sequence[Tensor],
    lengths: Sequence[int],
    go: Callable[[_Law, Tensor, int, torch.Generator], Tensor],
) -> Distances:
    """Return the total variations of many chains after so many steps, one for each start."""
    found: Distances = {}
    for seed, start in enumerate(starts):
        generator, values = make_generator(seed), start
        found.setdefault(0, []).append(law.distance(start))
        for before, length in pairwise((0, *lengths)):
            values = go(law, values, length - before, generator)
            found.setdefault(length, []).append(law.distance(values))
    return found


def _arrival(name: str, found: Distances, exact: Sequence[float], num: int) -> Claim:
    last = max(found)
    ratios = [a / b for a, b in zip(found[last], exact, strict=True)]
    return Claim(
        f"{name} leads any start to the target's law.",
        f"{_POST}; https://kexue.fm/archives/8084",
        f"{num} chains: total variation {spread(found[0])} at the start, "
        f"{spread(found[last])} after {last}; over that of exact draws {spread(ratios)}.",
        "At most 1.05 on average; at least 1.5 at the start.",
        fmean(ratios) <= 1.05 and min(found[0]) >= 1.5 * max(exact),
    )


def _search(context: Context) -> Claim:
    """Search for the most probable text, cooling slowly and not at all."""
    model = _model(context, 8)
    scores = model.log_first
    for _ in range(model.max_length - 1):
        scores = (scores[:, None] + model.log_next).amax(0)
    best = float(scores.max())
    target = keyword_text(model)
    uniform = torch.zeros(len(model.alphabet), dtype=torch.float64)
    shares: dict[float, list[float]] = {}
    for start in (2.0, 0.01):
        for seed in context.seeds:
            generator = make_generator(seed)
            rows = torch.multinomial(uniform.exp(), 200 * 8, replacement=True, generator=generator)
            search = SimulatedAnnealing(
                num_steps=context.pick(2000, 800),
                start_temperature=start,
                end_temperature=0.01,
                init=rows.view(200, 8),
            )
            values = search.sample(target, 200, generator=generator).values
            hits = target(values) > best - 1e-9
            shares.setdefault(start, []).append(float(hits.double().mean()))
    cooled, cold = shares.values()
    return Claim(
        "The most probable text is found by sampling at a falling temperature.",
        f"{_POST}, section “困难分析”; https://kexue.fm/archives/8084",
        f"share of 200 chains that found the best text of 8 letters: cooled {spread(cooled)}, cold "
        f"from the start {spread(cold)}.",
        "More than none on every seed, and more than when cold from the start.",
        min(cooled) > 0 and min(cooled) > max(cold),
    )


def _plot_approach(found: Distances, exact: Sequence[float], unit: str, canvas: Canvas) -> None:
    axes = canvas.subplots()
    lengths = list(found)
    for seed in range(len(exact)):
        axes.plot(lengths, [v[seed] for v in found.values()], "o-", color="#3465a4", alpha=0.6)
    axes.axhspan(min(exact), max(exact), color="#c17d11", alpha=0.5, label="exact draws")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel=unit, ylabel="total variation")
    axes.legend()
