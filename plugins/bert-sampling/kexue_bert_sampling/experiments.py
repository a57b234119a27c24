"""What post 8119 says of the chains, measured on texts whose laws can be counted.

Texts have three tokens out of five. Chains over the true conditionals of a joint distribution must
come to it; those of a learned model have no joint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator
from kexue.core.language import MaskedScorer, masked_scorer
from kexue.core.text import spread
from kexue.core.training import adam
from kexue_bert_sampling.joint import JointScorer
from kexue_bert_sampling.laws import all_texts, codes, stationary_law, total_variation
from kexue_bert_sampling.sampler import MLMGibbs
from kexue_bert_sampling.scans import SCANS, Scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["stationary"]

_POST = "https://kexue.fm/archives/8119"
_TOKENS, _LENGTH = 5, 3
_STEPS = (0, 3, 6, 12, 25, 50, 100)
_COUNTED = (
    "Texts of 3 tokens out of 5: 125. The joint distribution has normal logits with standard "
    "deviation 1.5. Total variation is above zero for any finite number of draws, even of the law "
    "itself: the floor. The learned model has one hidden layer of 16, and is fitted to draws of "
    "the joint with one masked place each."
)

Curves = dict[str, dict[int, list[float]]]
"""By name and number of steps: a figure for each seed."""

Laws = dict[tuple[str, Scan, int], list[Tensor]]
"""By conditionals, scan and places at once: a law for each seed."""


def stationary(context: Context) -> Report:
    """Compare the law of many chains with the exact one."""
    num = context.pick(2000, 600)
    joints = [_joint(seed) for seed in context.seeds]
    models = [_learned(table, context.pick(1000, 250), seed) for seed, table in enumerate(joints)]
    curves = _approach(joints, num)
    laws = [table.flatten().softmax(0) for table in joints]
    floors = [_floor(law, num, seed) for seed, law in enumerate(laws)]
    exact = _stationary_laws([JointScorer(table) for table in joints], models)
    return Report(
        [
            _arrival(curves, floors, num),
            _conditional(joints, num),
            _no_field(exact),
            _own_law(models, exact["learned", "random", 1], num),
            _several(exact, laws),
        ],
        [_distances(exact, laws)],
        [
            Figure(
                "From one text to the joint distribution",
                partial(_plot_approach, curves, floors),
                "True conditionals, the last text of each chain; a step draws one place.",
            )
        ],
        [_COUNTED],
    )


def _joint(seed: int) -> Tensor:
    shape = [_TOKENS] * _LENGTH
    return 1.5 * torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


class _Perceptron(nn.Module):
    """A masked language model of three tokens: one hidden layer, scores of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(_LENGTH * (_TOKENS + 1), 16)
        self.output = nn.Linear(16, _LENGTH * _TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        shown = F.one_hot(ids, _TOKENS + 1).flatten(1).float()
        scores: Tensor = self.output(self.hidden(shown).tanh())
        return scores.view(len(ids), _LENGTH, _TOKENS)


def _learned(table: Tensor, steps: int, seed: int) -> MaskedScorer:
    """Fit a small masked language model to draws of a joint distribution."""
    torch.manual_seed(seed)
    model, generator = _Perceptron(), make_generator(seed)
    scorer = masked_scorer(model, mask_id=_TOKENS)
    optimizer = adam(model.parameters(), lr=1e-2)
    states, law = all_texts(_TOKENS, _LENGTH), table.flatten().softmax(0)
    for _ in range(steps):
        rows = states[torch.multinomial(law, 256, replacement=True, generator=generator)]
        places = torch.randint(_LENGTH, (256, 1), generator=generator)
        scores = scorer(rows.scatter(1, places, scorer.mask_id), None, places)
        loss = F.cross_entropy(scores[:, 0], rows.gather(1, places)[:, 0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return scorer


def _frequencies(texts: Tensor) -> Tensor:
    return codes(texts, _TOKENS).bincount(minlength=_TOKENS**_LENGTH) / len(texts)


def _floor(law: Tensor, num: int, seed: int) -> float:
    """Return the total variation of draws of the law itself, the mean of ten."""
    generator = make_generator(1000 + seed)
    drawn = [torch.multinomial(law, num, replacement=True, generator=generator) for _ in range(10)]
    return fmean(
        total_variation(d.bincount(minlength=len(law)) / num, law.to(d.device)) for d in drawn
    )


def _approach(joints: Sequence[Tensor], num: int) -> Curves:
    curves: Curves = {}
    start = torch.zeros(_LENGTH, dtype=torch.long)
    for scan in SCANS:
        for seed, table in enumerate(joints):
            sampler = MLMGibbs(scan=scan, init=start, num_chains=num, batch_size=num)
            chains = sampler.begin(table, num, generator=make_generator(seed))
            law = table.flatten().softmax(0)
            for steps in _STEPS:
                chains.run(steps - chains.steps)
                distance = total_variation(_frequencies(chains.texts), law)
                curves.setdefault(scan, {}).setdefault(steps, []).append(distance)
    return curves


def _arrival(curves: Curves, floors: Sequence[float], num: int) -> Claim:
    ratios, falls = {}, True
    for scan, curve in curves.items():
        last = curve[_STEPS[-1]]
        ratios[scan] = [d / floor for d, floor in zip(last, floors, strict=True)]
        falls &= all(a > b for a, b in zip(curve[0], curve[_STEPS[2]], strict=True))
        falls &= all(a > b for a, b in zip(curve[_STEPS[2]], last, strict=True))
    return Claim(
        "Gibbs sampling leads from one text to the joint distribution, in any order of places.",
        f"{_POST}, section “采样流程”",
        f"{num} chains, {_STEPS[-1]} steps, total variation over that of exact draws: "
        + "; ".join(f"{scan} {spread(values)}" for scan, values in ratios.items())
        + f"; at the start {fmean(curves['random'][0]) / fmean(floors):.1f}.",
        f"At most 2.5 on every seed; falls from the start to {_STEPS[2]} steps and to the last.",
        falls and max(max(values) for values in ratios.values()) <= 2.5,
    )


def _conditional(joints: Sequence[Tensor], num: int) -> Claim:
    ratios = []
    for seed, table in enumerate(joints):
        sampler = MLMGibbs(
            init=torch.tensor([_TOKENS, 2, _TOKENS]), frozen=torch.tensor([False, True, False]),
            num_chains=num, batch_size=num, warmup=40, thin=1,
        )  # fmt: skip
        values = sampler.sample(table, num, generator=make_generator(seed)).values
        law = table[:, 2].flatten().softmax(0)
        found = codes(values[:, [0, 2]], _TOKENS).bincount(minlength=len(law)) / num
        ratios.append(total_variation(found, law) / _floor(law, num, seed))
    return Claim(
        "With tokens that are kept, the others come from their distribution given these.",
        f"{_POST}, section “采样流程”",
        f"{num} chains, total variation over that of exact draws: {spread(ratios)}.",
        "At most 2.5 on every seed.",
        max(ratios) <= 2.5,
    )


def _stationary_laws(true: Sequence[MaskedScorer], learned: Sequence[MaskedScorer]) -> Laws:
    kinds: list[tuple[Scan, int]] = [("random", 1), ("systematic", 1), ("random", 2), ("random", 3)]
    return {
        (name, scan, block): [stationary_law(s, _TOKENS, _LENGTH, scan, block) for s in scorers]
        for name, scorers in (("true", true), ("learned", learned))
        for scan, block in kinds
    }


def _no_field(exact: Laws) -> Claim:
    apart = {
        name: _apart(exact[name, "random", 1], exact[name, "systematic", 1])
        for name in ("true", "learned")
    }
    return Claim(
        "A masked language model is no Markov random field: its conditionals belong to no joint "
        "distribution, so the law of its chains depends on the order of the places.",
        f"{_POST}, section “吃瓜思考”",
        "total variation between the exact stationary laws of random and systematic scan: "
        f"learned {spread(apart['learned'], 4)}; true conditionals {max(apart['true']):.1e}.",
        "Above 1e-4 on every seed; below 1e-9 for true conditionals.",
        min(apart["learned"]) > 1e-4 and max(apart["true"]) < 1e-9,
    )


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    return [total_variation(a, b) for a, b in zip(some, others, strict=True)]


def _own_law(models: Sequence[MaskedScorer], laws: Sequence[Tensor], num: int) -> Claim:
    ratios = []
    for seed, (scorer, law) in enumerate(zip(models, laws, strict=True)):
        sampler = MLMGibbs(
            min_length=_LENGTH, max_length=_LENGTH, num_chains=num, batch_size=num, warmup=60,
            thin=1,
        )  # fmt: skip
        values = sampler.sample(scorer, num, generator=make_generator(seed)).values
        distance = total_variation(_frequencies(values), law)
        ratios.append(distance / _floor(law, num, seed))
    return Claim(
        "Sampling from a learned model works all the same: chains come to a law of their own.",
        f"{_POST}, section “吃瓜思考”",
        f"{num} chains from masks, total variation to the exact stationary law over that of exact "
        f"draws: {spread(ratios)}.",
        "At most 2.5 on every seed.",
        max(ratios) <= 2.5,
    )


def _several(exact: Laws, laws: Sequence[Tensor]) -> Claim:
    bias = {block: _apart(exact["true", "random", block], laws) for block in (1, 2, 3)}
    return Claim(
        "To draw several places at once takes fewer steps, and samples another law.",
        "https://arxiv.org/abs/1902.04094; the post draws one at a time",
        "total variation of the exact stationary law to the joint: one at a time "
        f"{max(bias[1]):.1e}; two {spread(bias[2])}; three {spread(bias[3])}.",
        "Below 1e-9; above 0.01 on every seed for two; more for three.",
        max(bias[1]) < 1e-9
        and min(bias[2]) > 0.01
        and all(a < b for a, b in zip(bias[2], bias[3], strict=True)),
    )


def _distances(exact: Laws, laws: Sequence[Tensor]) -> Table:
    rows = [
        [name, scan, block, spread(_apart(found, laws), 4)]
        for (name, scan, block), found in exact.items()
    ]
    return Table(
        "Total variation between the stationary law and the joint distribution",
        ["conditionals", "scan", "places at once", "total variation"],
        rows,
    )


def _plot_approach(curves: Curves, floors: Sequence[float], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for (scan, curve), color in zip(curves.items(), ("#3465a4", "#c17d11", "#4e9a06"), strict=True):
        for seed in range(len(floors)):
            label = scan if not seed else "_"  # one entry in the legend
            values = [v[seed] for v in curve.values()]
            axes.plot(list(curve), values, "o-", color=color, label=label)
    axes.axhspan(min(floors), max(floors), color="gray", alpha=0.5, label="exact draws")
    axes.set_xscale("symlog", linthresh=3)
    axes.set(yscale="log", xlabel="steps", ylabel="total variation")
    axes.legend()
