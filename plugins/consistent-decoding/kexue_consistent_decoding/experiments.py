"""What post 7500 and the paper claim: what does not end, what ends, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.component import PAD
from kexue.core.device import make_generator
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language import beam_search, generate
from kexue.core.text import spread
from kexue_consistent_decoding.ends import log_end_floor, non_termination_ratio, steps_to_end
from kexue_consistent_decoding.layer import SelfTerminatingLayer, SelfTerminatingLoss
from kexue_consistent_decoding.network import CONTEXT, Network, networks, with_end_row
from kexue_consistent_decoding.samplers import Ancestral, ConsistentNucleus, ConsistentTopK
from kexue_consistent_decoding.scorer import SelfTerminating

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["self_termination", "termination"]

_POST = "https://kexue.fm/archives/7500"
_PAPER = "https://arxiv.org/abs/2002.02492"
_WIDTH = 4
_PAIRS = (
    ("nucleus 0.2", "consistent nucleus 0.2"),
    ("nucleus 0.4", "consistent nucleus 0.4"),
    ("top-2", "consistent top-2"),
)
_SAMPLERS = {
    "ancestral": Ancestral(),
    "nucleus 0.2": Ancestral(top_p=0.2),
    "consistent nucleus 0.2": ConsistentNucleus(0.2),
    "nucleus 0.4": Ancestral(top_p=0.4),
    "consistent nucleus 0.4": ConsistentNucleus(0.4),
    "top-2": Ancestral(top_k=2),
    "consistent top-2": ConsistentTopK(2),
}


# -- which algorithms end --------------------------------------------------------------------------


class _Met:
    """Draws, and remembers the least probability of the end that it met."""

    def __init__(self, network: Network) -> None:
        self.end = int(network.model.eos_id or 0)
        self.least = math.inf

    def __call__(self, logits: Tensor, generator: Any = None) -> Tensor:
        at = float(logits.double().log_softmax(-1)[:, self.end].min())
        self.least = min(self.least, at)
        return Ancestral()(logits, generator)


def termination(context: Context) -> Report:
    """Measure which decoding algorithms end on a trained network."""
    longest = context.pick(600, 150)
    found: dict[str, list[DecodeResult]] = {}
    floors, least = [], []
    with context.progress.task("decoding", 3 * (len(_SAMPLERS) + 1)) as task:
        for seed, network in networks(context).items():
            model, given = network.model, network.prompts
            for name, sampler in {"greedy": None, **_SAMPLERS}.items():
                met = _Met(network) if name == "ancestral" else None
                result = (
                    generate(model, given, max_new_tokens=longest)
                    if sampler is None
                    else generate(
                        model,
                        given,
                        max_new_tokens=longest,
                        choose=met or partial(sampler._choose, (int(model.eos_id or 0),)),  # noqa: SLF001
                        generator=make_generator(seed, context.device),
                    )
                )
                found.setdefault(name, []).append(result)
                least += [met.least] if met is not None else []
                task.advance()
            end = int(model.eos_id or 0)
            floors.append(log_end_floor(model.output.weight, model.output.bias, end))
    ratios = {name: [non_termination_ratio(r) for r in rows] for name, rows in found.items()}
    claims = [
        _does_not_end(ratios, longest),
        *(_mended(ratios, pair, longest) for pair in _PAIRS[:2]),
        _floor(floors, least),
        _lottery(floors, ratios["ancestral"], longest),
    ]
    rows = [[name, spread(ratios[name]), spread(_lengths(found[name]), 1)] for name in ratios]
    return Report(
        claims,
        tables=[
            Table(f"After {longest} characters", ["decoding", "not ended", "mean length"], rows),
            _texts(networks(context)[0], found),
        ],
        figures=[
            Figure(
                "Texts that have not ended",
                partial(_plot_alive, found, longest),
                "Mean over the seeds. Dashed: the same algorithm without the end token kept.",
            )
        ],
        notes=[
            (
                f"A recurrent network (tanh, 96 features) of characters, trained on the lines of "
                f"CPython's reference text; prompts are the first {CONTEXT} characters of "
                f"{len(networks(context)[0].prompts)} unseen lines per seed."
            )
        ],
    )


def _does_not_end(ratios: dict[str, list[float]], longest: int) -> Claim:
    names = ("greedy", "nucleus 0.2")
    measured = "; ".join(f"{name} {spread(ratios[name])}" for name in names)
    return Claim(
        "Nothing guarantees that decoding ends: greedy and nucleus decoding of a trained model go "
        "on and on.",
        f"{_POST}, introduction; {_PAPER}, section 6",
        f"not ended after {longest} characters: {measured}.",
        "More than half on every seed.",
        all(min(ratios[name]) > 0.5 for name in names),
    )


def _mended(ratios: dict[str, list[float]], pair: tuple[str, str], longest: int) -> Claim:
    plain, kept = (ratios[name] for name in pair)
    compared = [(a, b) for a, b in zip(plain, kept, strict=True) if a > 0.5]
    return Claim(
        f"With the end token among its candidates, {pair[0]} sampling ends.",
        f"{_POST}, 主动添加<eos>; {_PAPER}, section 5.1",
        f"not ended after {longest} characters: {spread(plain)}, and {spread(kept)} with it.",
        "At most a tenth of the ratio without it, where that is above a half: on at least one "
        "seed, and on all of these.",
        bool(compared) and all(b <= 0.1 * a for a, b in compared),
    )


def _floor(floors: Sequence[float], least: Sequence[float]) -> Claim:
    shown = ", ".join(f"10^{x / math.log(10):.0f}" for x in floors)
    met = ", ".join(f"{math.exp(x):.1e}" for x in least)
    return Claim(
        "With bounded states p(end) has a positive lower bound at every step.",
        f"{_POST}, 有界的隐向量; {_PAPER}, lemma 3.1",
        f"bound {shown}; least p(end) met in ancestral sampling {met}.",
        "No p(end) below the bound, on every seed.",
        all(low <= x for low, x in zip(floors, least, strict=True)),
    )


def _lottery(floors: Sequence[float], ratios: Sequence[float], longest: int) -> Claim:
    needed = ", ".join(f"10^{-x / math.log(10):.0f}" for x in floors)
    return Claim(
        "That bound has no practical value: by it, enough steps are like enough lottery tickets.",
        f"{_POST}, 有界的隐向量",
        f"by the bound {needed} characters on average; not ended after {longest}: "
        f"{spread(ratios)}.",
        f"More than a thousand times {longest} by the bound, and every text ended, on every seed.",
        all(-x > math.log(1000 * longest) for x in floors) and max(ratios) == 0,
    )


def _lengths(found: Sequence[DecodeResult]) -> list[float]:
    return [float((r.sequences != PAD).sum(1).double().mean()) for r in found]


def _texts(network: Network, found: dict[str, list[DecodeResult]]) -> Table:
    decode = network.model.vocabulary.decode
    start = decode(network.prompts[0].tolist())
    rows = []
    for name, results in found.items():
        ids = [i for i in results[0].sequences[0].tolist() if i != PAD]
        text = decode(ids)
        rows.append([name, f"{start}|{text[:90]}{'…' if len(text) > 90 else ''}", len(ids)])
    return Table("One prompt, seed 0", ["decoding", "text", "characters"], rows)


def _alive(found: Sequence[DecodeResult], longest: int) -> Tensor:
    """Return the share of texts that go on after 0, 1, ... steps, over all seeds."""
    lengths = torch.cat(
        [torch.where(_ended(r), (r.sequences != PAD).sum(1), longest + 1) for r in found]
    )
    steps = torch.arange(longest + 1, device=lengths.device)
    return (lengths[None] > steps[:, None]).double().mean(1).cpu()


def _ended(found: DecodeResult) -> Tensor:
    assert found.ended is not None  # noqa: S101 -- of a language model it never is
    return found.ended


def _plot_alive(found: dict[str, list[DecodeResult]], longest: int, canvas: Canvas) -> None:
    axes = canvas.subplots()
    axes.plot(_alive(found["greedy"], longest), color="black", label="greedy")
    axes.plot(_alive(found["ancestral"], longest), color="grey", label="ancestral")
    for i, (plain, kept) in enumerate(_PAIRS):
        axes.plot(_alive(found[plain], longest), color=f"C{i}", linestyle="--", label=plain)
        axes.plot(_alive(found[kept], longest), color=f"C{i}", label=kept)
    axes.set(xlabel="characters", ylabel="share not ended", ylim=(-0.02, 1.05))
    axes.legend(fontsize="small", ncols=2, loc="center right")


# -- the self-terminating layer --------------------------------------------------------------------


class _Measured(NamedTuple):
    """One ε on one seed.

    Args:
        greedy: Texts of greedy search, given twice the tokens of the bound.
        beam: The best of each beam search, likewise.
        p_end: p(end) at each step of the greedy text that is the longest.
        low: The least margin of p(end) over its bound, over all steps and texts.
        price: Nats per character on unseen lines, beyond the plain softmax.
        difference: Greatest difference of log-probabilities, all at once and step by step.
        total: Greatest distance of a sum of probabilities from 1.
    """

    greedy: DecodeResult
    beam: DecodeResult
    p_end: list[float]
    low: float
    price: float
    difference: float
    total: float


def self_termination(context: Context) -> Report:
    """Measure the self-terminating layer on the same networks."""
    grid = context.pick((1e-2, 1e-3), (5e-2, 1e-2))
    found: dict[float, list[_Measured]] = {epsilon: [] for epsilon in grid}
    plain: list[float] = []
    with context.progress.task("self-terminating", 3 * len(grid)) as task:
        for seed, network in networks(context).items():
            plain.append(_plain_price(network))
            for epsilon in grid:
                found[epsilon].append(
                    _measure(network, epsilon, seed, plain[-1], context.pick(80, 25))
                )
                task.advance()
    claims = [
        *(_bounded(found, epsilon, 1) for epsilon in grid),
        *(_bounded(found, epsilon, _WIDTH) for epsilon in grid),
        _grows(found),
        _alike(found),
        _cheap(found, plain),
    ]
    rows = [
        [
            epsilon,
            steps_to_end(epsilon),
            spread((float(_used(m.greedy).max()) for m in rows_), 0),
            spread((float(_used(m.greedy).double().mean()) for m in rows_), 1),
            spread(m.price for m in rows_),
        ]
        for epsilon, rows_ in found.items()
    ]
    columns = ["ε", "bound", "longest", "mean length", "price, nats per character"]
    return Report(
        claims,
        tables=[Table("Greedy search over the self-terminating layer", columns, rows)],
        figures=[
            Figure(
                "The probability of the end",
                partial(_plot_ends, found),
                "Along the longest greedy text of each seed; dotted the bound 1 - (1-ε)^n, and "
                "vertical the step by which greedy search has ended.",
            )
        ],
        notes=[
            (
                "The networks are those of `termination`, frozen; only the end token's row of the "
                "output layer is fitted anew, to the self-terminating loss. The price of "
                "training a network with the layer from the start may be another."
            )
        ],
    )


def _measure(network: Network, epsilon: float, seed: int, plain: float, steps: int) -> _Measured:
    model = with_end_row(network, epsilon, seed, steps=steps)
    scorer = SelfTerminating(model, epsilon=epsilon)
    end = int(model.eos_id or 0)
    given = network.prompts
    met: list[Tensor] = []  # log p(end) of the rows that go on, by step

    def best(logits: Tensor, generator: object) -> Tensor:
        del generator
        met.append(logits[:, end].double().cpu())
        return logits.argmax(-1)

    room = 2 * steps_to_end(epsilon)
    greedy = generate(scorer, given, max_new_tokens=room, choose=best)
    low = min(float((x.exp() - (1 - (1 - epsilon) ** (n + 1))).min()) for n, x in enumerate(met))
    longest = int(_used(greedy).argmax())
    some = given[:10]
    beam = beam_search(scorer, some, width=_WIDTH, max_new_tokens=room + _WIDTH)
    difference, total, p_end = _both_ways(model, epsilon, given[longest], greedy, longest)
    price = _terminating_price(network, model, epsilon) - plain
    return _Measured(greedy, beam, p_end, low, price, difference, total)


@torch.no_grad()
def _both_ways(
    model: Any, epsilon: float, prompt: Tensor, found: DecodeResult, row: int
) -> tuple[float, float, list[float]]:
    """Compare the layer over a whole text with the scorer step by step."""
    vocabulary = model.vocabulary
    tokens = found.sequences[row][found.sequences[row] != PAD]
    text = torch.cat([prompt.new_tensor([vocabulary.bos_id]), prompt, tokens[:-1]])[None]
    layer = SelfTerminatingLayer(vocabulary.eos_id, epsilon=epsilon, context_len=CONTEXT)
    at_once = layer(model(text))[0, CONTEXT:]
    scorer = SelfTerminating(model, epsilon=epsilon)
    scores, cache = scorer.begin(prompt[None])
    stepwise = [scores[0]]
    for token in tokens[:-1]:
        scores, cache = scorer.advance(cache, token[None])
        stepwise.append(scores[0])
    difference = (at_once - torch.stack(stepwise)).exp().sub(1).abs().max()
    total = (at_once.double().exp().sum(-1) - 1).abs().max()
    return float(difference), float(total), at_once[:, vocabulary.eos_id].exp().tolist()


def _counted(network: Network) -> Tensor:
    """Return the positions of unseen lines whose cost is compared: all behind the context."""
    targets = network.held_out["targets"]
    return (targets != PAD) & (torch.arange(targets.shape[1], device=targets.device) >= CONTEXT)


@torch.no_grad()
def _plain_price(network: Network) -> float:
    logits, targets = network.model(network.held_out["ids"]), network.held_out["targets"]
    counted = _counted(network)
    return float(F.cross_entropy(logits[counted], targets[counted]))


@torch.no_grad()
def _terminating_price(network: Network, model: Any, epsilon: float) -> float:
    targets = network.held_out["targets"]
    end = model.vocabulary.eos_id
    loss = SelfTerminatingLoss(end, epsilon=epsilon, reduction="sum")
    counted = _counted(network)
    return float(loss(model(network.held_out["ids"]), targets, counted) / counted.sum())


def _used(found: DecodeResult) -> Tensor:
    return (found.sequences != PAD).sum(1)


def _bounded(found: dict[float, list[_Measured]], epsilon: float, width: int) -> Claim:
    results = [m.greedy if width == 1 else m.beam for m in found[epsilon]]
    bound = steps_to_end(epsilon, width=width)
    longest = [int(_used(r).max()) for r in results]
    ended = all(bool(_ended(r).all()) for r in results)
    what = "greedy search" if width == 1 else f"beam search of width {width}"
    return Claim(
        f"Over the self-terminating layer with ε = {epsilon:g}, {what} ends within {bound} tokens.",
        f"{_POST}, 自截断设计; {_PAPER}, theorem 5.1",
        f"{sum(len(r.sequences) for r in results)} texts, given {2 * steps_to_end(epsilon)} "
        f"tokens: the longest {', '.join(map(str, longest))}; "
        f"{'all' if ended else 'not all'} ended.",
        f"All ended, none longer than {bound}.",
        ended and max(longest) <= bound,
    )


def _grows(found: dict[float, list[_Measured]]) -> Claim:
    runs = [m for rows in found.values() for m in rows]
    falls = [b - a for m in runs for a, b in zip(m.p_end, m.p_end[1:], strict=False)]
    low = min(m.low for m in runs)
    return Claim(
        "p(end) never falls, and is at least 1 - (1-ε)^(t+1).",
        f"{_POST}, 自截断设计",
        f"least step {min(falls, default=0.0):.1e}; least distance from the bound {low:.1e}.",
        "Both at least -1e-6.",
        min(falls, default=0.0) >= -1e-6 and low >= -1e-6,
    )


def _alike(found: dict[float, list[_Measured]]) -> Claim:
    runs = [m for rows in found.values() for m in rows]
    difference, total = max(m.difference for m in runs), max(m.total for m in runs)
    return Claim(
        "The layer is a distribution, and the same over a whole text as step by step.",
        "arithmetic",
        f"sum of probabilities within {total:.1e} of 1; ratios of probabilities within "
        f"{difference:.1e} of 1.",
        "At most 1e-5 and 1e-4, in float32.",
        total <= 1e-5 and difference <= 1e-4,
    )


def _cheap(found: dict[float, list[_Measured]], plain: Sequence[float]) -> Claim:
    shown = "; ".join(
        f"{spread(m.price for m in rows)} at ε = {epsilon:g}" for epsilon, rows in found.items()
    )
    least = min(found)
    return Claim(
        "On a frozen network the self-terminating layer costs little likelihood.",
        f"{_PAPER}, section 6.2",
        f"nats per character beyond the {spread(plain)} of the softmax: {shown}.",
        f"At most 0.05 at ε = {least:g}, on average.",
        sum(m.price for m in found[least]) / len(found[least]) <= 0.05,
    )


def _plot_ends(found: dict[float, list[_Measured]], canvas: Canvas) -> None:
    every = canvas.subplots(1, len(found))
    for axes, (epsilon, rows) in zip(every, found.items(), strict=True):
        bound = steps_to_end(epsilon)
        for seed, measured in enumerate(rows):
            axes.plot(range(1, len(measured.p_end) + 1), measured.p_end, label=f"seed {seed}")
        steps = range(1, bound + 1)
        axes.plot(steps, [1 - (1 - epsilon) ** n for n in steps], ":", color="black", label="bound")
        axes.axvline(bound, color="grey", linewidth=0.8)
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.set(xlabel="new token", ylabel="p(end)", title=f"ε = {epsilon:g}", ylim=(0, 1))
        axes.legend(fontsize="small", loc="upper left")
