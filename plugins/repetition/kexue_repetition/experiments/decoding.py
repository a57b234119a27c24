"""Which decoding repeats itself: a bigram decoder's, and that of a model that sees more."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.language import draw, generate, truncate
from kexue.core.text import spread
from kexue_repetition.experiments.common import (
    LENGTH,
    POST,
    bigram,
    language_model,
    lines_of,
    measured,
    prompts_of,
    seeded,
)
from kexue_repetition.index import repetition_index
from kexue_repetition.statistics import repeated_ngrams
from kexue_repetition.truncation import truncate_transitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["decoding"]

_TOP: dict[str, dict[str, Any]] = {
    "full": {},
    "top-20": {"top_k": 20},
    "top-5": {"top_k": 5},
    "top-2": {"top_k": 2},
    "greedy": {"top_k": 1},
}
_NUCLEUS: dict[str, dict[str, Any]] = {
    "full": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.5": {"top_p": 0.5},
}
_DECODINGS = {**_TOP, **_NUCLEUS, "temperature 0.5": {"temperature": 0.5}}

Measured = dict[str, list[float]]


def decoding(context: Context) -> Report:
    """Measure R and repetition by decoding."""
    decoder = bigram(lines_of(context))
    cut = {name: truncate_transitions(decoder, **s) for name, s in _DECODINGS.items()}
    index = {name: repetition_index(each).value for name, each in cut.items()}
    walked = {n: [measured(each, seed)[0] for seed in context.seeds] for n, each in cut.items()}
    written = _of_models(context)
    claims = [
        _index(index),
        _ordered(walked, "a bigram decoder", list(_TOP)),
        _ordered(walked, "a bigram decoder", list(_NUCLEUS)),
        _ordered(written, "a recurrent model", list(_TOP)),
        _ordered(written, "a recurrent model", list(_NUCLEUS)),
        _less(walked, written),
    ]
    columns = ["decoding", "R", "seq-rep-4, bigram", "seq-rep-4, recurrent model"]
    rows = [[n, index[n], spread(walked[n]), spread(written[n])] for n in _DECODINGS]
    figure = Figure(
        "Repeated 4-grams of characters by decoding",
        partial(_plot, walked, written),
        "Mean and extremes over three seeds.",
    )
    notes = (
        f"Texts of {LENGTH} characters: 150 walks of the bigram decoder of CPython's reference "
        "text; continuations of held-out beginnings by a GRU of its characters, trained for some "
        "seconds, the end token left out. Greedy decoding of the bigram never leaves its loop: R "
        "is infinite."
    )
    return Report(claims, [Table("By decoding", columns, rows)], [figure], [notes])


def _of_models(context: Context) -> Measured:
    found: Measured = {name: [] for name in _DECODINGS}
    with context.progress.task("writing", len(context.seeds) * len(found)) as bar:
        for seed in context.seeds:
            model = language_model(context, seed)
            prompt = prompts_of(context, model)
            for name, settings in _DECODINGS.items():
                ids = generate(
                    model,
                    prompt,
                    max_new_tokens=LENGTH,
                    choose=partial(_without_end, model.vocabulary.special_ids, settings),
                    generator=seeded(seed),
                ).sequences
                found[name].append(float(repeated_ngrams(ids.cpu(), 4).mean()))
                bar.advance()
    return found


def _without_end(
    special: tuple[int, ...], settings: dict[str, Any], logits: Tensor, generator: Any
) -> Tensor:
    """Draw a token that is text."""
    places = torch.tensor(special, device=logits.device)
    return draw(truncate(logits.index_fill(1, places, -torch.inf), **settings), generator)


def _index(index: dict[str, float]) -> Claim:
    chains = [list(_TOP), list(_NUCLEUS)]
    holds = all(index[a] < index[b] for names in chains for a, b in itertools.pairwise(names))
    return Claim(
        "Truncation raises R, greedy decoding most.",
        f"{POST}, “初步结论”",
        "; ".join(" < ".join(f"{n} {index[n]:.3g}" for n in names) for names in chains) + ".",
        "In this order.",
        holds,
    )


def _ordered(found: Measured, of: str, names: list[str]) -> Claim:
    holds = all(
        a < b
        for one, other in itertools.pairwise(names)
        for a, b in zip(found[one], found[other], strict=True)
    )
    what = "the fewer candidates" if names[-1] == "greedy" else "the smaller the nucleus"
    return Claim(
        f"{of.capitalize()} repeats itself more {what}.",
        f"{POST}, “初步结论”" + ("" if "bigram" in of else " and “一般解码”"),
        "seq-rep-4: " + "; ".join(f"{n} {spread(found[n])}" for n in names) + ".",
        "More from each to the next, on every seed.",
        holds,
    )


def _less(walked: Measured, written: Measured) -> Claim:
    names = list(_DECODINGS)
    holds = all(w < b for n in names for w, b in zip(written[n], walked[n], strict=True))
    parts = [f"{n} {_mean(written[n]):.3f} against {_mean(walked[n]):.3f}" for n in names]
    return Claim(
        "A model that sees all that it wrote repeats itself less than a bigram decoder, whatever "
        "the decoding.",
        f"{POST}, “一般解码”",
        f"seq-rep-4 (means): {'; '.join(parts)}.",
        "Less in each decoding, on every seed.",
        holds,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _plot(walked: Measured, written: Measured, figure: Canvas) -> None:
    axes = figure.subplots()
    groups = (("bigram decoder", walked, "#888a85"), ("recurrent model", written, "#3465a4"))
    for shift, (label, found, color) in zip((-0.2, 0.2), groups, strict=True):
        means = [_mean(values) for values in found.values()]
        low = [m - min(v) for m, v in zip(means, found.values(), strict=True)]
        high = [max(v) - m for m, v in zip(means, found.values(), strict=True)]
        places = [place + shift for place in range(len(found))]
        axes.bar(places, means, 0.4, color=color, label=label, yerr=[low, high], capsize=2)
    axes.set_xticks(range(len(walked)), list(walked), rotation=25)
    axes.set_ylabel("seq-rep-4")
    axes.legend()
