"""What post 8119 says of the texts that come out, measured.

A small masked language model of characters learns CPython's help topics. What chains make of it is
judged by a trigram model of the same text, which knows nothing of the masked one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator
from kexue.core.lab.data import text as embedded_text
from kexue.core.lab.language import CharacterMaskedModel
from kexue.core.text import spread
from kexue.core.training import adam
from kexue_bert_sampling.quality import Trigrams, ngrams, overlap, self_bleu
from kexue_bert_sampling.sampler import MLMGibbs

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["text"]

_POST = "https://kexue.fm/archives/8119"
_WINDOW = 12  # characters
_SHARE = 0.25  # of them are masked in training
_SWEEPS = (0, 1, 2, 4, 8, 16)
_GRAM = 5  # characters of what counts as copied
_JUDGED = (
    f"Texts of {_WINDOW} characters. The masked model is lab's with one layer of width 64, fitted "
    f"with {_SHARE:.0%} of the characters masked; each seed is chains of its own of one model. "
    "The judge interpolates trigrams of the training text."
)

Curves = dict[str, dict[int, list[float]]]
"""By name and number of sweeps: a figure for each seed."""


def text(context: Context) -> Report:
    """Sample text, and judge it after more and more steps."""
    lines = context.once("bert-sampling/lines", embedded_text)
    judge, known = Trigrams(lines.train), ngrams(lines.train, _GRAM)
    rows, held_out = _windows(lines.train), _windows(lines.test)
    model = _fitted(rows, context.pick(600, 180))
    chains = context.pick(64, 24)
    sweeps = context.pick(_SWEEPS, _SWEEPS[:-2])
    unigram = _unigram(model, rows, chains * len(context.seeds))
    runs: dict[str, dict[str, Any]] = {"from characters": {"init": unigram}, "from masks": {}}
    if not context.quick:
        runs |= {"systematic, from masks": {"scan": "systematic"}, "3 at once": {"block": 3}}
    found = {
        name: _sampled(model, {**given, "num_chains": len(unigram)}, sweeps)
        for name, given in runs.items()
    }
    parts = {name: _parts(texts, chains) for name, texts in found.items()}
    drawn = _parts({0: [model.vocabulary.decode(row) for row in unigram.tolist()]}, chains)[0]
    reference = {"held-out text": [held_out[i::3][:chains] for i in range(3)], "unigrams": drawn}
    perplexities = {
        name: {n: [judge.perplexity(p) for p in some] for n, some in by.items()}
        for name, by in parts.items()
    }
    table = _quality(parts, reference, judge, known, sweeps)
    last = sweeps[-1]
    examples = [[t] for t in found["from masks"][last][:10]]
    natural = judge.perplexity(held_out)
    return Report(
        [
            _better(perplexities, [judge.perplexity(p) for p in drawn], natural, sweeps),
            _distinct({name: by[last] for name, by in parts.items()}),
            _copies(parts, drawn, known, last),
        ],
        [table, Table("Texts from masks", ["text"], examples)],
        [
            Figure(
                "Perplexity of what comes out, by a trigram model",
                partial(_plot_quality, perplexities, natural),
                "A sweep is as many steps as a text has characters; dashed: held-out text.",
            )
        ],
        [_JUDGED],
    )


def _windows(lines: Sequence[str]) -> list[str]:
    joined = " ".join(lines)
    return [joined[i : i + _WINDOW] for i in range(0, len(joined) - _WINDOW, _WINDOW)]


def _fitted(rows: Sequence[str], steps: int) -> CharacterMaskedModel:
    """Fit a masked language model with a fixed share of masks, as BERT is."""
    torch.manual_seed(0)
    alphabet = "".join(sorted({c for row in rows for c in row}))
    model = CharacterMaskedModel(alphabet, width=64, layers=1, max_length=_WINDOW)
    with torch.no_grad():  # small, so that the layers count from the first step
        for table in (model.embedding, model.body.positions):
            table.weight.normal_(std=0.1)
    ids, generator = model.collate(rows)["ids"], make_generator(0)
    optimizer = adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 8e-3, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        some = ids[torch.randint(len(ids), (128,), generator=generator)]
        order = torch.rand(some.shape, generator=generator).argsort(1)
        places = order[:, : round(_SHARE * _WINDOW)]
        scores = model(some.scatter(1, places, model.mask_id), None, places)
        loss = F.cross_entropy(scores.flatten(0, 1), some.gather(1, places).flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def _unigram(model: CharacterMaskedModel, rows: Sequence[str], num: int) -> Tensor:
    """Return texts of independent characters, as frequent as in the text."""
    characters = model.collate(rows)["ids"].flatten()
    index = torch.randint(len(characters), (num, _WINDOW), generator=make_generator(7))
    return characters[index]


def _sampled(
    model: CharacterMaskedModel, given: Mapping[str, Any], sweeps: Sequence[int]
) -> dict[int, list[str]]:
    """Return the texts of all chains after some sweeps; none before the first if all are masks."""
    lengths: dict[str, Any] = {"min_length": _WINDOW, "max_length": _WINDOW}
    if "init" in given:
        lengths = {}
    sampler = MLMGibbs(**given, **lengths, forbidden=model.vocabulary.special_ids)
    chains = sampler.begin(model, given["num_chains"], generator=make_generator(0))
    found = {}
    with torch.no_grad():
        for number in sweeps:
            chains.run(number * -(-_WINDOW // sampler.block) - chains.steps)
            if number:
                chains.fill()
            if number or "init" in given:
                found[number] = [model.vocabulary.decode(row) for row in chains.texts.tolist()]
    return found


def _parts(texts: Mapping[int, list[str]], size: int) -> dict[int, list[list[str]]]:
    """Return the chains of each seed."""
    return {n: [all_[i : i + size] for i in range(0, len(all_), size)] for n, all_ in texts.items()}


def _better(
    found: Curves, unigrams: Sequence[float], natural: float, sweeps: Sequence[int]
) -> Claim:
    first, last = sweeps[1], sweeps[-1]
    curve = found["from characters"]
    return Claim(
        "What comes out is text-like, more so the longer the chain, though not like real text.",
        f"{_POST}, section “参考代码”",
        f"trigram perplexity: unigram draws {spread(unigrams, 1)}, from them after {first} sweep "
        f"{spread(curve[first], 1)}, after {last} {spread(curve[last], 1)}; from masks after "
        f"{last} {spread(found['from masks'][last], 1)}; held-out text {natural:.1f}.",
        "On every seed at most half of that of unigram draws, lower than after the first sweep, "
        "and above that of held-out text.",
        all(
            natural < b <= 0.5 * u and b < a
            for a, b, u in zip(curve[first], curve[last], unigrams, strict=True)
        ),
    )


def _distinct(last: Mapping[str, list[list[str]]]) -> Claim:
    shares = {name: [len(set(p)) / len(p) for p in parts] for name, parts in last.items()}
    return Claim(
        "Samples are diverse: chains do not fall into one text.",
        f"{_POST}, section “参考代码”",
        "share of different texts: "
        + "; ".join(f"{name} {spread(values)}" for name, values in shares.items())
        + ".",
        "At least 0.95 on every seed.",
        min(min(values) for values in shares.values()) >= 0.95,
    )


def _copies(
    parts: Mapping[str, Mapping[int, list[list[str]]]],
    drawn: Sequence[list[str]],
    known: frozenset[str],
    last: int,
) -> Claim:
    ours = [overlap(p, known, _GRAM) for p in parts["from masks"][last]]
    chance = [overlap(p, known, _GRAM) for p in drawn]
    return Claim(
        "Samples show pieces of the training text.",
        f"{_POST}, section “吃瓜思考”",
        f"share of {_GRAM}-grams that occur in the training text: samples {spread(ours)}, "
        f"unigram draws {spread(chance)}.",
        "More than twice as many on every seed.",
        all(a > 2 * b for a, b in zip(ours, chance, strict=True)),
    )


def _quality(
    parts: Mapping[str, Mapping[int, list[list[str]]]],
    reference: Mapping[str, list[list[str]]],
    judge: Trigrams,
    known: frozenset[str],
    sweeps: Sequence[int],
) -> Table:
    def row(name: str, number: Any, some: Sequence[list[str]]) -> list[Any]:
        return [
            name,
            number,
            spread([judge.perplexity(p) for p in some], 1),
            spread([overlap(p, known, _GRAM) for p in some]),
            spread([self_bleu(p) for p in some]),
        ]

    rows = [row(name, "–", some) for name, some in reference.items()]
    shown = (sweeps[1], sweeps[-2], sweeps[-1])
    rows += [row(name, n, by[n]) for name, by in parts.items() for n in shown]
    return Table(
        "Quality and diversity",
        ["texts", "sweeps", "perplexity", f"{_GRAM}-grams of the training text", "self-BLEU"],
        rows,
    )


def _plot_quality(found: Curves, natural: float, canvas: Canvas) -> None:
    axes = canvas.subplots()
    colors = ("#3465a4", "#c17d11", "#4e9a06", "#75507b")
    for (name, curve), color in zip(found.items(), colors, strict=False):
        for seed in range(len(next(iter(curve.values())))):
            label = name if not seed else "_"
            values = [v[seed] for v in curve.values()]
            axes.plot(list(curve), values, "o-", color=color, label=label)
    axes.axhline(natural, ls="--", color="gray")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(yscale="log", xlabel="sweeps", ylabel="perplexity")
    sweeps = sorted({number for curve in found.values() for number in curve})
    axes.set_xticks(sweeps, list(map(str, sweeps)))
    axes.set_yticks([10, 20, 40], ["10", "20", "40"])
    axes.minorticks_off()
    axes.legend()
