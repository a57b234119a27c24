"""The index and what bounds it, on random and trained matrices."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_repetition.bounds import Bounds, repetition_bounds
from kexue_repetition.experiments.common import (
    LENGTH,
    PAPER,
    POST,
    bigram,
    frequent_words,
    language_model,
    lines_of,
    prompts_of,
    seeded,
)
from kexue_repetition.index import RepetitionIndex, repetition_index
from kexue_repetition.sampling import model_transitions
from kexue_repetition.statistics import immediate_repeats
from kexue_repetition.transitions import Transitions, sample_walks
from kexue_repetition.truncation import truncate_transitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["bounds"]

_DECODINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-3": {"top_k": 3},
    "greedy": {"top_k": 1},
}


class _Case(NamedTuple):
    """A matrix and what is known of it.

    Args:
        name: Where it is from.
        decoding: What was done to it.
        decoder: The matrix.
        found: R.
        bounds: What bounds it.
    """

    name: str
    decoding: str
    decoder: Transitions
    found: RepetitionIndex
    bounds: Bounds


def bounds(context: Context) -> Report:
    """Measure the index, its bounds and its estimates."""
    cases = _cases(context)
    trained = [case for case in cases if case.name != "random"]
    claims = [
        _walks(context),
        _closed_form(cases),
        _are_bounds(cases),
        _rows(cases),
        _even(cases),
        _estimates_bound(cases),
        _estimates(cases),
        _first_term(cases),
        _expected(context),
    ]
    columns = ["matrix", "decoding", "tokens", "ζ", "λ₁", "lower, all", "lower, first", "R"]
    columns += ["upper", "ζ sum, all", "ζ sum, first"]
    rows = [
        [
            c.name,
            c.decoding,
            len(c.decoder),
            c.bounds.nonzero,
            c.found.eigenvalue,
            c.bounds.lower_trace,
            c.bounds.lower_diagonal,
            c.found.value,
            c.bounds.upper,
            c.bounds.zeta_trace,
            c.bounds.zeta_diagonal,
        ]
        for c in trained
    ]
    figure = Figure(
        "R beside its bounds and the ζ estimates",
        partial(_plot, cases),
        "One point per matrix; what is above the line exceeds R. Left: the upper "
        "bound and the counted lower ones. Right: the estimates.",
    )
    notes = (
        f"{len(cases)} matrices: Dirichlet rows of 2 to 50 tokens and two concentrations, bigrams "
        "of characters and of frequent words of CPython's reference text, and what a recurrent "
        "model of its characters writes; each decoded in four ways, and multiplied by 0.95 (the "
        "end comes with 0.05 everywhere), so that R is finite."
    )
    return Report(claims, [Table("Trained matrices", columns, rows)], [figure], [notes])


def _cases(context: Context) -> list[_Case]:
    given: list[tuple[str, Transitions]] = []
    sizes = context.pick((2, 5, 20, 50), (2, 10))
    for seed, n, concentration in itertools.product(context.seeds, sizes, (0.1, 1.0)):
        torch.manual_seed(1000 * seed + n)
        rows = torch.distributions.Dirichlet(torch.full((n,), concentration)).sample((n,))
        given.append(("random", Transitions.of(rows.double())))
    lines = lines_of(context)
    given.append(("characters", bigram(lines)))
    given.append(("words", frequent_words(lines, context.pick(15, 20))))
    model = language_model(context, 0)
    written, _ = model_transitions(
        model,
        prompts_of(context, model),
        max_new_tokens=LENGTH,
        samples=context.pick(5, 2),
        generator=seeded(0),
    )
    given.append(("a model's texts", written))
    cases = []
    with context.progress.task("bounds", len(given)) as bar:
        for name, full in given:
            for decoding, settings in _DECODINGS.items():
                cut = truncate_transitions(full, **settings)
                decoder = cut.replaced(0.95 * cut.matrix)
                index = repetition_index(decoder)
                found = repetition_bounds(decoder, index=index)
                cases.append(_Case(name, decoding, decoder, index, found))
            bar.advance()
    return cases


def _walks(context: Context) -> Claim:
    worst = 0.0
    for seed in context.seeds:
        drawn = torch.rand(4, 4, generator=seeded(seed), dtype=torch.float64)
        p = (drawn / drawn.sum(1, keepdim=True)).numpy()
        for k in range(1, 5):
            total = 0.0
            for loop in itertools.product(range(4), repeat=k):
                way = [*loop, *loop, loop[0]]
                total += math.prod(float(p[i, j]) for i, j in itertools.pairwise(way))
            found = float(np.trace(np.linalg.matrix_power(p * p, k)))
            worst = max(worst, abs(float(total) - found))
    return Claim(
        "The probabilities of all repeated sub-sequences of k tokens add up to Tr (P ∘ P)ᵏ.",
        f"{POST}, eqs. (3) and (4)",
        f"4 tokens, k up to 4, every sequence enumerated: greatest difference {worst:.1e}.",
        "At most 1e-12.",
        bool(worst <= 1e-12),
    )


def _closed_form(cases: list[_Case]) -> Claim:
    series, eigenvalues = [], []
    for case in cases:
        if len(case.decoder) > 200:
            continue
        s = case.decoder.dense().square()
        found = torch.linalg.eigvals(s)
        eigenvalues.append(_relative(float((found / (1 - found)).sum().real), case.found.value))
        total, power = 0.0, s
        for _ in range(400):
            total += float(power.trace())
            power = power @ s
        series.append(_relative(total, case.found.value))
    worst = max(*series, *eigenvalues)
    return Claim(
        "R = Σₖ Tr Sᵏ = Σᵢ λᵢ(S) / (1 − λᵢ(S)).",
        f"{POST}, eqs. (5) and (14)",
        f"{len(series)} matrices of at most 200 tokens: greatest relative difference of the sum "
        f"of 400 traces {max(series):.1e}, of that over the eigenvalues {max(eigenvalues):.1e}.",
        "At most 1e-8.",
        worst <= 1e-8,
    )


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-300) if wanted else abs(found)


def _are_bounds(cases: list[_Case]) -> Claim:
    slack = 1 + 1e-9
    wrong = sum(
        not (
            c.bounds.lower_trace <= slack * c.bounds.lower_diagonal
            and c.bounds.lower_diagonal <= slack * c.found.value
            and c.found.value <= slack * c.bounds.upper
        )
        for c in cases
    )
    tight = [c for c in cases if c.decoding == "greedy"]
    gap = max(_relative(c.bounds.lower_diagonal, c.found.value) for c in tight)
    return Claim(
        "With the non-zero loops counted, Σₖ (Tr Pᵏ)²/Nₖ ≤ Σₖ Σᵢ ((Pᵏ)ᵢᵢ)²/Nₖᵢ ≤ R ≤ "
        "nλ₁/(1 − λ₁); greedy decoding reaches the second.",
        f"{POST}, eqs. (7), (9) and “一个上界”",
        f"{len(cases)} matrices, {wrong} outside; greedy: R above the bound by {gap:.1e} of itself "
        "at most.",
        "None; at most 1e-6.",
        bool(wrong == 0 and gap <= 1e-6),
    )


def _rows(cases: list[_Case]) -> Claim:
    wrong = sum(
        not c.bounds.row_bounds[0] * (1 - 1e-9)
        <= c.found.eigenvalue
        <= c.bounds.row_bounds[1] * (1 + 1e-9)
        for c in cases
    )
    return Claim(
        "min Σⱼ P²ᵢⱼ ≤ λ₁(P ∘ P) ≤ max Σⱼ P²ᵢⱼ over the rows.",
        f"{POST}, eq. (16)",
        f"{len(cases)} matrices, {wrong} outside.",
        "None.",
        wrong == 0,
    )


def _even(cases: list[_Case]) -> Claim:
    # without the end, rows add up to 1
    products = [
        len(c.decoder) * c.found.eigenvalue / 0.95**2
        for c in cases
        if c.name == "random" and c.decoding == "full"
    ]
    n = 20
    even = n * repetition_index(np.full((n, n), 1 / n)).eigenvalue
    return Claim(
        "λ₁ is least, 1/n, where all rows are even.",
        f"{POST}, eq. (17)",
        f"nλ₁: even rows {even:.6f}, {len(products)} random stochastic matrices "
        f"{min(products):.3f} to {max(products):.3f}.",
        "1 to within 1e-9; more than 1.",
        abs(even - 1) <= 1e-9 and min(products) > 1,
    )


def _estimates_bound(cases: list[_Case]) -> Claim:
    above = {
        name: sum(getattr(c.bounds, name) > c.found.value * (1 + 1e-6) for c in cases)
        for name in ("zeta_trace", "zeta_diagonal")
    }
    return Claim(
        "With ζᵏnᵏ for the numbers of loops, neither sum is guaranteed to be a lower bound.",
        f"{POST}, “一个下界”",
        f"Above R: eq. (8) on {above['zeta_trace']}, eq. (11) on {above['zeta_diagonal']} of "
        f"{len(cases)} matrices.",
        "On at least one, each.",
        min(above.values()) > 0,
    )


def _estimates(cases: list[_Case]) -> Claim:
    parts, holds = [], True
    for number, name in ((8, "zeta_trace"), (11, "zeta_diagonal")):
        near = {
            d: [
                0.5 <= getattr(c.bounds, name) / c.found.value <= 2
                for c in cases
                if c.decoding == d and c.found.value > 0
            ]
            for d in _DECODINGS
        }
        share = sum(map(sum, near.values())) / sum(map(len, near.values()))
        holds &= bool(share >= 0.5)
        detail = ", ".join(f"{d} {sum(v)} of {len(v)}" for d, v in near.items())
        parts.append(f"eq. ({number}) {share:.0%} ({detail})")
    return Claim(
        "Either sum may nevertheless be taken for an estimate of R.",
        f"{POST}, “一个下界”; {PAPER}, definition 2.3",
        f"Within a factor of 2 of R: {'; '.join(parts)}.",
        "On at least half of the matrices, each.",
        holds,
    )


def _first_term(cases: list[_Case]) -> Claim:
    shares = [
        c.found.eigenvalue / (1 - c.found.eigenvalue) / c.found.value
        for c in cases
        if c.found.value > 0
    ]
    under = int(sum(share <= 0.5 for share in shares))
    return Claim(
        "The term of the largest eigenvalue dominates R.",
        f"{POST}, “一个上界”",
        f"λ₁/(1 − λ₁) over R: median {float(np.median(shares)):.2f}, {min(shares):.2f} to "
        f"{max(shares):.2f}; at most half on {under} of {len(shares)} matrices.",
        "More than half on every matrix.",
        bool(under == 0),
    )


def _expected(context: Context) -> Claim:
    decoder = bigram(lines_of(context))
    walks, lengths = context.pick(4000, 1000), (LENGTH - 1) // 2
    p = decoder.dense().numpy()
    power, diagonals = np.eye(len(p)), []
    for _ in range(lengths):
        power = power @ (p * p)
        diagonals.append(np.diag(power).copy())
    now, expected = np.asarray(decoder.start), 0.0
    for step in range(LENGTH):
        expected += sum(float(now @ d) for d in diagonals[: max(0, (LENGTH - 1 - step) // 2)])
        now = now @ p
    found, errors = [], []
    for seed in context.seeds:
        counts = immediate_repeats(
            sample_walks(decoder, walks, LENGTH, generator=seeded(seed)), lengths
        ).sum(1)
        found.append(float(counts.double().mean()))
        errors.append(float(counts.double().std()) / math.sqrt(walks))
    off = max(abs(f - expected) / e for f, e in zip(found, errors, strict=True))
    return Claim(
        "R is about what is written: its parts by token, weighed with how often tokens occur, are "
        "the expected number of repeated sub-sequences.",
        f"{POST}, “二元解码”",
        f"{walks} texts of {LENGTH} characters: {expected:.4f} expected in each, counted "
        f"{spread(found, 4)}; {off:.1f} standard errors apart at most.",
        "At most 4 standard errors, on every seed.",
        off <= 4,
    )


def _plot(cases: list[_Case], figure: Canvas) -> None:
    figure.set_size_inches(10, 4.2)
    ours, theirs = figure.subplots(1, 2)
    kept = [c for c in cases if c.found.value > 1e-6]
    r = np.array([c.found.value for c in kept])
    series = [
        (ours, "upper", "upper bound", "#888a85", "^"),
        (ours, "lower_trace", "lower bound, all loops", "#3465a4", "v"),
        (ours, "lower_diagonal", "lower bound, by first token", "#204a87", "."),
        (theirs, "zeta_trace", "ζ estimate, all loops, eq. (8)", "#cc0000", "."),
        (theirs, "zeta_diagonal", "ζ estimate, by first token, eq. (11)", "#f57900", "."),
    ]
    for axes, name, label, color, marker in series:
        values = np.array([getattr(c.bounds, name) for c in kept])
        axes.plot(r, np.maximum(values, 1e-7), marker, color=color, label=label, alpha=0.7)
    for axes, title in ((ours, "Bounds"), (theirs, "Estimates")):
        axes.plot([r.min(), r.max()], [r.min(), r.max()], color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="R", title=title)
        axes.legend(fontsize=8)
