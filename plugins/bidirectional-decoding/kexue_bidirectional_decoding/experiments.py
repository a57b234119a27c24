"""What post 6877 and its paper claim, measured on words of real text with hidden letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_bidirectional_decoding.words import (
    HIDDEN,
    Kind,
    Restored,
    begun,
    hold_out,
    restore,
    vocabulary_of_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["words"]

_POST = "https://kexue.fm/archives/6877"
_PAPER = "https://arxiv.org/abs/1905.04847"
_NAMES: Mapping[Kind, str] = {
    "none": "each alone",
    "post": "post: plain teacher forcing",
    "mask": "mask: without the leak",
    "pseudo": "pseudo: partners read pseudo-targets",
}

Runs = Mapping[Kind, Sequence[Restored]]
"""What the models of each kind make of the words, one per seed."""


def words(context: Context) -> Report:
    """Restore words from the left, from the right, and from both ends."""
    known = vocabulary_of_text()
    together, apart, width = context.pick((7, 3, 64), (1, 1, 32))
    runs: dict[Kind, list[Restored]] = {name: [] for name in _NAMES}
    held = 0
    for seed in context.seeds:
        times, most = context.pick((2, len(known)), (1, 48))
        data = hold_out(known, seed, times=times, most=most, device=context.device)
        held = len(data.hidden)
        first = begun(context, data, seed=seed, epochs=together, width=width)
        for name, found in runs.items():
            found.append(restore(context, data, first, name, seed=seed, epochs=apart))
    return Report(
        [
            _asymmetry(runs),
            _leak(runs),
            _sum_below_one(runs),
            _without_leak(runs),
            _choosing(runs),
            _exact_match(runs),
            _retrained(runs),
        ],
        [_table(runs)],
        [
            Figure(
                "Right letters at both ends of a word",
                partial(_plot_ends, runs),
                "Means over the seeds. A line that falls from left to right is a decoder that is "
                "better at what it writes first.",
            ),
            Figure(
                "Loss in training against words restored",
                partial(_plot_leak, runs),
                "One point per seed. Plain teacher forcing of both directions has the lower loss.",
            ),
        ],
        [
            (
                f"{len(known)} words of 7 to 12 letters of CPython's reference text, 15 % held out "
                f"per seed, {held} questions; {HIDDEN:.0%} of the letters are "
                "hidden, others each time in training. The share was chosen for the accuracy of "
                "the decoder from the left alone: words must be restored for exact match to say "
                "anything."
            ),
            (
                f"GRU of width {width}, 64 words a step, Adam; beam 3. All models of a seed share "
                f"{together} passes as two decoders that know nothing of each other, and go on for "
                f"{apart} passes each as what they are, with the same words and hidden letters. "
                "The length is that of the source, and the model without the leak is told so."
            ),
            (
                "Pseudo-targets are what the two decoders of the shared passes write, greedily, "
                "for the same hidden letters."
            ),
        ],
    )


def _of(runs: Runs, name: Kind, figure: str) -> list[float]:
    """Return a figure per seed, such as ``"left.first"``."""
    found: list[float] = []
    for run in runs[name]:
        value: Any = run
        for part in figure.split("."):
            value = getattr(value, part)
        found.append(float(value))
    return found


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _asymmetry(runs: Runs) -> Claim:
    ends = {(s, e): _of(runs, "none", f"{s}.{e}") for s in ("left", "right") for e in _ENDS}
    left = _less(ends["left", "first"], ends["left", "last"])
    right = _less(ends["right", "last"], ends["right", "first"])
    return Claim(
        "Writing from the left gets the first letters right more often than the last; writing from "
        "the right, the other way round.",
        f"{_POST}, section “背景介绍” (40.21 % and 35.10 %; 35.67 % and 39.47 %)",
        f"first and last four letters, from the left {spread(ends['left', 'first'])} and "
        f"{spread(ends['left', 'last'])}, from the right {spread(ends['right', 'first'])} and "
        f"{spread(ends['right', 'last'])}.",
        "On every seed.",
        min(left) > 0 and min(right) > 0,
    )


def _leak(runs: Runs) -> Claim:
    alone, post = _of(runs, "none", "held_out"), _of(runs, "post", "held_out")
    gains = _less(_of(runs, "post", "chosen"), _of(runs, "none", "chosen"))
    return Claim(
        "With plain teacher forcing of both directions the loss is lower only because the target "
        "leaks: held-out words are not restored better.",
        f"{_POST}, section “思考分析”, 3",
        f"nats per held-out letter {spread(post)}, each direction alone {spread(alone)}; words "
        f"restored, less those of two directions alone: {spread(gains)}.",
        "The loss at least 0.05 lower on every seed; the gain in words at most 0 on average.",
        max(_less(post, alone)) <= -0.05 and fmean(gains) <= 0,
    )


def _sum_below_one(runs: Runs) -> Claim:
    alone, post = _of(runs, "none", "training"), _of(runs, "post", "training")
    both = [2 * value for value in post]
    return Claim(
        "Late in training the sum of both directions' losses is below that of a single direction "
        "trained alone.",
        f"{_POST}, section “思考分析”, 3",
        f"last pass over the words: sum {spread(both)} nats per letter, one direction alone "
        f"{spread(alone)}.",
        "Below on every seed.",
        max(_less(both, alone)) < 0,
    )


def _without_leak(runs: Runs) -> Claim:
    alone, mask = (_of(runs, name, "left.last") for name in ("none", "mask"))
    gaps = {
        name: [abs(run.left.first - run.left.last) for run in runs[name]]
        for name in ("none", "mask")
    }
    return Claim(
        "Trained without the states that leak, the side from the left makes fewer errors at the "
        "end of a word, and its two ends are more alike (ours; the post retrains).",
        f"{_POST}, section “改进生成的原因”",
        f"last four letters {spread(mask)}, alone {spread(alone)}; difference of first and last "
        f"four {spread(gaps['mask'])}, alone {spread(gaps['none'])}.",
        "At least 0.03 more of the last four, and at most half the difference, on average.",
        fmean(_less(mask, alone)) >= 0.03 and fmean(gaps["mask"]) <= 0.5 * fmean(gaps["none"]),
    )


def _choosing(runs: Runs) -> Claim:
    chosen = _of(runs, "none", "chosen")
    left, right = (_of(runs, "none", f"{side}.words") for side in ("left", "right"))
    gains = _less(chosen, [max(pair) for pair in zip(left, right, strict=True)])
    return Claim(
        "Taking the direction with the better score restores more words than either alone (here "
        "with directions that know nothing of each other).",
        f"{_POST}, section “双向束搜索”",
        f"words restored {spread(chosen)}, from the left {spread(left)}, from the right "
        f"{spread(right)}; gain over the better {spread(gains)}.",
        "A gain of at least 0.01 on average.",
        fmean(gains) >= 0.01,
    )


def _exact_match(runs: Runs) -> Claim:
    both = _of(runs, "mask", "chosen")
    alone = [max(run.left.words, run.right.words) for run in runs["none"]]
    return Claim(
        "Decoding from both ends in step restores more words than the better of left to right and "
        "right to left at equal width.",
        f"{_PAPER}, abstract (BLEU of translations, there with pseudo-targets)",
        f"words restored without the leak {spread(both)}, the better single direction "
        f"{spread(alone)}; gain {spread(_less(both, alone))}; "
        f"{runs['mask'][0].parameters} and {runs['none'][0].parameters} parameters.",
        "A gain above 0 on average.",
        fmean(_less(both, alone)) > 0,
    )


def _retrained(runs: Runs) -> Claim:
    pseudo, post = _of(runs, "pseudo", "chosen"), _of(runs, "post", "chosen")
    return Claim(
        "Trained with partners that read pseudo-targets, as in decoding, both directions restore "
        "more words than with partners that read the target.",
        f"{_POST}, section “思考分析”, 3; {_PAPER}",
        f"words restored {spread(pseudo)}, with plain teacher forcing {spread(post)}; gain "
        f"{spread(_less(pseudo, post))}.",
        "A gain above 0 on average.",
        fmean(_less(pseudo, post)) > 0,
    )


_ENDS = ("first", "last")


def _table(runs: Runs) -> Table:
    columns = ["model", "side", "first 4", "last 4", "letters", "words", "chosen", "nats held out"]
    rows = []
    for name, title in _NAMES.items():
        for side, text in (("left", "from the left"), ("right", "from the right")):
            figures = ("first", "last", "letters", "words")
            cells = [spread(_of(runs, name, f"{side}.{figure}")) for figure in figures]
            shared = [spread(_of(runs, name, figure)) for figure in ("chosen", "held_out")]
            rows.append([title, text, *cells, *shared])
    return Table("Shares that are right, of held-out words", columns, rows)


_COLOURS: Mapping[Kind, str] = {
    "none": "#7f8c8d",
    "post": "#c0392b",
    "mask": "#2c6fbb",
    "pseudo": "#27ae60",
}


def _plot_ends(runs: Runs, canvas: Canvas) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, side, title in zip(
        panels, ("left", "right"), ("written from the left", "written from the right"), strict=True
    ):
        for name, label in _NAMES.items():
            ends = [_of(runs, name, f"{side}.{end}") for end in _ENDS]
            axes.plot([0, 1], [fmean(end) for end in ends], "-", color=_COLOURS[name], label=label)
            for place, end in enumerate(ends):
                axes.plot([place] * len(end), end, "o", color=_COLOURS[name], alpha=0.5)
        axes.set_xticks([0, 1], ["first four", "last four"])
        axes.set_xlim(-0.3, 1.3)
        axes.set_title(title)
    panels[0].set_ylabel("share of letters that are right")
    panels[0].legend(fontsize="small")


def _plot_leak(runs: Runs, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, label in _NAMES.items():
        losses, shares = _of(runs, name, "held_out"), _of(runs, name, "chosen")
        axes.plot(losses, shares, "o", color=_COLOURS[name], label=label)
    axes.set(xlabel="nats per held-out letter, given the letters before", ylabel="words restored")
    axes.legend()
