"""What post 5542 claims of the CRF, measured: against softmax per position, and by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, DecodeResult, Figure, Report, Table
from kexue.core.lab.models import SoftmaxTagger
from kexue.core.lab.segmentation import ENCODERS, SETTING, Run, Scores, measure, train_all
from kexue.core.text import spread
from kexue_crf.constraints import scheme_constraints
from kexue_crf.crf import CRF
from kexue_crf.decoding import viterbi

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["enumeration", "segmentation"]

_POST = "https://kexue.fm/archives/5542"

Runs = Mapping[tuple[str, str], Sequence[Run]]
"""Runs by head and encoder, one per seed."""

_HEADS: Mapping[str, Callable[[int], nn.Module]] = {
    "softmax": lambda tags: SoftmaxTagger(tags, reduction="token_mean"),
    "CRF": lambda tags: CRF(tags, reduction="token_mean"),
}


class _ConstrainedSoftmax(nn.Module):
    """A softmax per position that is decoded under the constraints of a scheme."""

    def __init__(self, tag_names: Sequence[str]) -> None:
        super().__init__()
        allowed = scheme_constraints(tag_names, "BMES")
        for name in ("start", "transitions", "end"):
            forbidden = ~getattr(allowed, name)
            scores = torch.zeros(forbidden.shape).masked_fill(forbidden, -torch.inf)
            self.register_buffer(name, scores)

    def decode(self, scores: Tensor, *, mask: Tensor | None = None) -> DecodeResult:
        device = scores.device
        start, transitions, end = (
            self.get_buffer(n).to(device) for n in ("start", "transitions", "end")
        )
        return viterbi(scores, transitions, start=start, end=end, mask=mask)


def _constrained(run: Run) -> nn.Module:
    """Return the head of a run with what BMES forbids forbidden."""
    names = run.tagger.tags
    if run.head == "softmax":
        return _ConstrainedSoftmax(names)
    head = CRF(len(names), scheme="BMES", tag_names=names)
    head.load_state_dict(run.tagger.head.state_dict())
    return head.to(next(run.tagger.parameters()).device)


def segmentation(context: Context) -> Report:
    """Segment text into words with softmax and with a CRF on the same encoders."""
    runs = train_all(context, _HEADS)
    legal = {
        key: [measure(context, run.tagger, _constrained(run)) for run in of]
        for key, of in runs.items()
    }
    return Report(
        [*_claims(runs), _constraint_claim(runs, legal)],
        [_table(runs, legal)],
        [
            Figure("F1 of the words, per seed", partial(_plot_f1, runs, legal)),
            Figure(
                "Transitions that a CRF learnt",
                partial(_plot_transitions, runs["CRF", "weak"][0]),
                "From row to column. What no segmentation has is low without being forbidden.",
            ),
        ],
        [
            SETTING,
            _gain_note(legal),
        ],
    )


def _f1(runs: Runs, head: str, encoder: str) -> list[float]:
    return [run.scores.f1 for run in runs[head, encoder]]


def _claims(runs: Runs) -> list[Claim]:
    claims = []
    for encoder, least in (("weak", 0.02), ("strong", 0.0)):
        crf, softmax = _f1(runs, "CRF", encoder), _f1(runs, "softmax", encoder)
        gains = [a - b for a, b in zip(crf, softmax, strict=True)]
        if encoder == "weak":
            statement = "Where the encoder is weak, the transitions of a CRF make up for it."
            expected = f"F1 above softmax by at least {least} on every seed."
            holds = min(gains) >= least
        else:
            statement = "Where the encoder is strong, a CRF still does not do worse than softmax."
            expected = "F1 at least that of softmax on average."
            holds = fmean(gains) >= least
        measured = f"F1: CRF {spread(crf)}, softmax {spread(softmax)}."
        claims.append(Claim(statement, f"{_POST}, section “图示”", measured, expected, holds))
    illegal = {
        (head, encoder): fmean(run.scores.illegal for run in runs[head, encoder])
        for head, encoder in runs
    }
    ratios = {e: illegal["CRF", e] / max(illegal["softmax", e], 1e-9) for e in ENCODERS}
    figures = ", ".join(
        f"{e} encoder {illegal['CRF', e]:.2f} against {illegal['softmax', e]:.2f}" for e in ENCODERS
    )
    claims.append(
        Claim(
            "A CRF learns which tags may follow each other: s is not followed by m or e.",
            f"{_POST}, section “图示”",
            f"Illegal pairs per 1000 tags, CRF against softmax: {figures}.",
            "At most half of softmax's, with both encoders.",
            max(ratios.values()) <= 0.5,
        )
    )
    return claims


def _constraint_claim(runs: Runs, legal: Mapping[tuple[str, str], Sequence[Scores]]) -> Claim:
    gains = {
        encoder: [
            after.f1 - run.scores.f1
            for run, after in zip(runs["CRF", encoder], legal["CRF", encoder], strict=True)
        ]
        for encoder in ENCODERS
    }
    left = sum(s.illegal for of in legal.values() for s in of)
    figures = "; ".join(f"{e} encoder {spread(g, 4)}" for e, g in gains.items())
    return Claim(
        "Viterbi under constraints gives legal sequences only, at no loss.",
        "https://github.com/bojone/crf, word_seg.py (first tag b or s, last e or s)",
        f"Illegal pairs left: {left:g}. Change of the CRF's F1: {figures}.",
        "No illegal pair; F1 not lower on average.",
        left == 0 and all(fmean(g) >= 0 for g in gains.values()),
    )


def _gain_note(legal: Mapping[tuple[str, str], Sequence[Scores]]) -> str:
    gains = {
        e: fmean(s.f1 for s in legal["CRF", e]) - fmean(s.f1 for s in legal["softmax", e])
        for e in ENCODERS
    }
    figures = " and ".join(f"{g:+.3f} with the {e} encoder" for e, g in gains.items())
    return (
        f"Softmax decoded under hard constraints takes part of the gain: what is left to the CRF, "
        f"both constrained, is {figures} in F1."
    )


def _table(runs: Runs, legal: Mapping[tuple[str, str], Sequence[Scores]]) -> Table:
    rows = [
        [
            head,
            encoder,
            spread(run.scores.f1 for run in of),
            spread(s.f1 for s in legal[head, encoder]),
            spread(run.scores.accuracy for run in of),
            spread((run.scores.illegal for run in of), 2),
        ]
        for (head, encoder), of in runs.items()
    ]
    columns = ["head", "encoder", "F1", "F1, constrained", "accuracy of tags", "illegal per 1000"]
    return Table("Segmentation of the test part", columns, rows)


def _plot_f1(runs: Runs, legal: Mapping[tuple[str, str], Sequence[Scores]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    names = []
    for place, (head, encoder) in enumerate(runs):
        free = _f1(runs, head, encoder)
        axes.plot([place] * len(free), free, "o", color="#2c6fbb", label=None if place else "free")
        bound = [s.f1 for s in legal[head, encoder]]
        axes.plot(
            [place + 0.15] * len(bound),
            bound,
            "D",
            color="#c0392b",
            markersize=5,
            label=None if place else "constrained",
        )
        names.append(f"{head}\n{encoder} encoder")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="F1 of the words")
    axes.legend()


def _plot_transitions(run: Run, canvas: Canvas) -> None:
    axes = canvas.subplots()
    matrix = run.tagger.head.get_parameter("transitions").detach().cpu()
    most = float(matrix.abs().max())
    picture = axes.imshow(matrix, cmap="RdBu", vmin=-most, vmax=most)
    names = run.tagger.tags
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    for i, j in itertools.product(range(len(names)), repeat=2):
        axes.text(j, i, f"{float(matrix[i, j]):.1f}", ha="center", va="center")
    canvas.colorbar(picture)


# -- exact statements ------------------------------------------------------------------------------


def enumeration(context: Context) -> Report:
    """Compare recursion and Viterbi with the enumeration of all sequences, in float64."""
    del context
    tags, time = 3, 5
    generator = torch.Generator().manual_seed(0)
    errors = {"log Z": 0.0, "gradient": 0.0, "marginals": 0.0}
    wrong_paths = 0
    trials = 20
    for scale in (1.0, 30.0):  # the second is too wide for probability space
        for _ in range(trials // 2):
            crf = CRF(tags).double()
            emissions = scale * torch.randn(1, time, tags, dtype=torch.float64, generator=generator)
            _compare(crf, emissions, errors)
            wrong_paths += _wrong_path(crf, emissions)
    measured = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Report(
        [
            Claim(
                "The recursion of eq. (9) and (10) gives the normaliser, in linear time.",
                f"{_POST}, section “归一化因子”",
                f"{trials} draws, {tags} tags, {time} positions, {tags**time} sequences, float64; "
                f"greatest relative differences: {measured}.",
                "At most 1e-10.",
                max(errors.values()) <= 1e-10,
            ),
            Claim(
                "Dynamic programming finds the best of all sequences.",
                f"{_POST}, section “动态规划”",
                f"{wrong_paths} of {trials} draws with another path.",
                "None.",
                wrong_paths == 0,
            ),
        ]
    )


def _all_scores(crf: CRF, emissions: Tensor) -> tuple[Tensor, Tensor]:
    """Return all sequences and their scores."""
    time, tags = emissions.shape[1:]
    paths = torch.tensor(list(itertools.product(range(tags), repeat=time)))
    scores = emissions[0, torch.arange(time), paths].sum(1)
    scores = scores + crf.transitions[paths[:, :-1], paths[:, 1:]].sum(1)
    if crf.start_transitions is not None and crf.end_transitions is not None:
        scores = scores + crf.start_transitions[paths[:, 0]] + crf.end_transitions[paths[:, -1]]
    return paths, scores


def _compare(crf: CRF, emissions: Tensor, errors: dict[str, float]) -> None:
    """Keep the greatest relative differences from enumeration."""
    leaf = emissions.clone().requires_grad_()
    paths, scores = _all_scores(crf, leaf)
    wanted = scores.logsumexp(0)
    inputs = [leaf, crf.transitions]
    slopes = torch.autograd.grad(wanted, inputs)
    mine = emissions.clone().requires_grad_()
    found = crf.log_partition(mine).sum()
    gradients = torch.autograd.grad(found, [mine, crf.transitions])
    probabilities = (scores - wanted).exp().detach()
    marginals = torch.stack(
        [(probabilities[:, None] * (paths == tag)).sum(0) for tag in range(emissions.shape[2])], -1
    )
    pairs = {
        "log Z": [(found, wanted)],
        "gradient": list(zip(gradients, slopes, strict=True)),
        "marginals": [(crf.marginals(emissions)[0], marginals)],
    }
    for name, compared in pairs.items():
        for a, b in compared:
            known = b.detach()
            difference = float((a.detach() - known).abs().max() / known.abs().max().clamp(min=1))
            errors[name] = max(errors[name], difference)


def _wrong_path(crf: CRF, emissions: Tensor) -> bool:
    paths, scores = _all_scores(crf, emissions)
    best: list[int] = paths[int(scores.argmax())].tolist()
    return crf.decode(emissions).tolist()[0] != best
