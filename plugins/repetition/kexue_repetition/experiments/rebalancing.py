"""Rebalanced encoding, and words beside characters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_repetition.experiments.common import LENGTH, PAPER, POST, bigram, lines_of, measured
from kexue_repetition.index import repetition_index
from kexue_repetition.rebalancing import RebalancedEncoding
from kexue_repetition.transitions import Transitions
from kexue_repetition.truncation import truncate_transitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["rebalancing"]

_DECODINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "top-5": {"top_k": 5},
    "top-2": {"top_k": 2},
    "top-p 0.9": {"top_p": 0.9},
    "greedy": {"top_k": 1},
}


class _Encoded(NamedTuple):
    """A text in some units.

    Args:
        phrases: How many phrases were added.
        tokens: Size of the vocabulary.
        value: R.
        eigenvalue: λ₁.
        repeated: seq-rep-4 of the characters that are written, by decoding and seed.
        in_units: The same of the units.
    """

    phrases: int
    tokens: int
    value: float
    eigenvalue: float
    repeated: dict[str, list[float]]
    in_units: dict[str, list[float]]


def rebalancing(context: Context) -> Report:
    """Measure what merging likely pairs changes."""
    lines = lines_of(context)
    gammas = context.pick((0.9, 0.5, 0.3, 0.2), (0.5, 0.3))
    found: dict[str, _Encoded] = {}
    with context.progress.task("rebalancing", len(gammas) + 2) as bar:
        found["characters"] = _encoded(context, [list(line) for line in lines])
        bar.advance()
        for gamma in gammas:
            encoding = RebalancedEncoding(gamma).fit(lines)
            pieces = encoding.encode_all(lines)
            found[f"γ = {gamma}"] = _encoded(context, pieces, phrases=len(encoding.phrases))
            bar.advance()
        words = bigram([line.split() for line in lines])
        repeated, _ = _written(context, words, space=" ")
        bar.advance()
    merged = [found[f"γ = {gamma}"] for gamma in gammas if gamma <= 0.5]
    names = [f"γ = {gamma}" for gamma in gammas if gamma <= 0.5]
    plain = found["characters"]
    claims = [
        _falls(plain, merged, names, "value", "R"),
        _falls(plain, merged, names, "eigenvalue", "λ₁"),
        *(_less_repeated(plain, merged, names, d, "units") for d in ("full", "top-5", "top-2")),
        *(
            _less_repeated(plain, merged, names, d, "characters")
            for d in ("full", "top-5", "top-2")
        ),
        *(_words(plain, repeated, d) for d in ("full", "top-5", "top-2", "greedy")),
    ]
    columns = [
        "units",
        "phrases",
        "vocabulary",
        "R",
        "λ₁",
        *(f"seq-rep-4, {d}" for d in _DECODINGS),
    ]
    rows: list[list[Any]] = [
        [n, e.phrases, e.tokens, e.value, e.eigenvalue, *(spread(v) for v in e.repeated.values())]
        for n, e in found.items()
    ]
    rows += [
        [f"{n}, 4-grams of units", e.phrases, e.tokens, e.value, e.eigenvalue]
        + [spread(v) for v in e.in_units.values()]
        for n, e in found.items()
    ]
    rows.append(["words", "–", len(words), "–", "–", *(spread(v) for v in repeated.values())])
    everything = {**{n: e.repeated for n, e in found.items()}, "words": repeated}
    figure = Figure(
        "Repeated 4-grams of characters by unit and decoding",
        partial(_plot, everything),
        "Bigram decoders of the same text in larger and larger units.",
    )
    notes = (
        f"Repetition of characters is measured in the first {LENGTH} of 150 texts, whatever the "
        f"units are; that of units in {LENGTH} units. R and λ₁ are about units: those of different "
        "vocabularies count different loops."
    )
    return Report(claims, [Table("By unit", columns, rows)], [figure], [notes])


def _encoded(context: Context, texts: list[Any], phrases: int = 0) -> _Encoded:
    decoder = bigram(texts)
    index = repetition_index(decoder)
    written = _written(context, decoder)
    return _Encoded(phrases, len(decoder), index.value, index.eigenvalue, *written)


def _written(
    context: Context, decoder: Transitions, space: str = ""
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seq-rep-4 of characters and of units, by decoding and seed."""
    found = {}
    for name, settings in _DECODINGS.items():
        cut = truncate_transitions(decoder, **settings)
        found[name] = [measured(cut, seed, space=space) for seed in context.seeds]
    return (
        {name: [a for a, _ in pairs] for name, pairs in found.items()},
        {name: [b for _, b in pairs] for name, pairs in found.items()},
    )


def _falls(
    plain: _Encoded, merged: list[_Encoded], names: list[str], what: str, sign: str
) -> Claim:
    values = [getattr(each, what) for each in merged]
    shown = "; ".join(f"{n} {v:.3f}" for n, v in zip(names, values, strict=True))
    return Claim(
        f"Rebalanced encoding lowers {sign}.",
        f"{POST}, “再次结论”; {PAPER}, section 4",
        f"Characters {getattr(plain, what):.3f}; {shown}.",
        "Lower for every γ up to 0.5.",
        all(value < getattr(plain, what) for value in values),
    )


def _less_repeated(
    plain: _Encoded, merged: list[_Encoded], names: list[str], decoding: str, of: str
) -> Claim:
    what = "repeated" if of == "characters" else "in_units"
    before = getattr(plain, what)[decoding]
    after = [getattr(each, what)[decoding] for each in merged]
    holds = all(a < b for each in after for a, b in zip(each, before, strict=True))
    shown = "; ".join(f"{n} {spread(v)}" for n, v in zip(names, after, strict=True))
    return Claim(
        f"Rebalanced encoding lowers measured repetition of {of} ({decoding}).",
        f"{PAPER}, section 5",
        f"seq-rep-4 of {of}: {spread(before)} before; {shown}.",
        "Lower for every γ up to 0.5, on every seed.",
        holds,
    )


def _words(plain: _Encoded, words: dict[str, list[float]], decoding: str) -> Claim:
    before, after = plain.repeated[decoding], words[decoding]
    return Claim(
        f"Writing words repeats less than writing characters ({decoding}).",
        f"{POST}, “再次结论”",
        f"seq-rep-4 of characters: words {spread(after)}, characters {spread(before)}.",
        "Less on every seed.",
        all(a < b for a, b in zip(after, before, strict=True)),
    )


def _plot(found: dict[str, dict[str, list[float]]], figure: Canvas) -> None:
    axes = figure.subplots()
    width = 0.8 / len(found)
    colors = ["#555753", "#babdb6", "#729fcf", "#3465a4", "#204a87", "#f57900"]
    for number, (name, repeated) in enumerate(found.items()):
        color = colors[-1] if name == "words" else colors[min(number, 4)]
        places = [place + width * (number - (len(found) - 1) / 2) for place in range(len(repeated))]
        means = [sum(values) / len(values) for values in repeated.values()]
        axes.bar(places, means, width, label=name, color=color)
    axes.set_xticks(range(len(_DECODINGS)), list(_DECODINGS))
    axes.set_ylabel("seq-rep-4")
    axes.legend(fontsize=8)
