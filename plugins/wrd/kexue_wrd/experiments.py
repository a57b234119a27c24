"""What post 7388 and the papers claim of WMD and WRD: the bounds, and what they are good for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import text
from kexue.core.text import spread
from kexue_wrd.bags import Bags
from kexue_wrd.cooccurrence import fit_vectors
from kexue_wrd.geometry import MOVER, ROTATOR, Geometry
from kexue_wrd.index import TransportIndex
from kexue_wrd.similarity import WordMoverSimilarity, WordRotatorSimilarity
from kexue_wrd.tokens import STOP_WORDS, tokenizer
from kexue_wrd.vectors import WordVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["bounds", "retrieval"]

_POST = "https://kexue.fm/archives/7388"
_WMD = "http://proceedings.mlr.press/v37/kusnerb15.html"
_WRD = "https://arxiv.org/abs/2004.15003"
_NEIGHBOURS = 10
_TOLERANCE = 1e-9
_GEOMETRIES = {"WMD": MOVER, "WRD": ROTATOR}


# -- bounds ----------------------------------------------------------------------------------------


class _Searched(NamedTuple):
    """One corpus and its queries.

    Args:
        exact: Shape ``[query, document]``: the distances.
        bounds: The bounds of the same pairs by name.
        solved: How many problems the search solved.
        wrong: How many neighbours it found at another distance than a full comparison.
    """

    exact: Tensor
    bounds: dict[str, Tensor]
    solved: int
    wrong: int

    def excess(self, name: str) -> float:
        """How far a bound is above the distance at most, over pairs without an empty text."""
        compared = self.exact.isfinite()
        return float((self.bounds[name] - self.exact)[compared].max())

    def left(self, name: str) -> float:
        """The share of pairs that a bound alone does not exclude, were the answer known."""
        reach = self.exact.topk(_NEIGHBOURS, largest=False).values[:, -1:]
        return float((self.bounds[name] <= reach).double().mean())


def bounds(context: Context) -> Report:
    """Count violations of the bounds, and what a search by them has to solve."""
    parts = text()
    lines = [tokenizer("words")(line) for line in (*parts.train, *parts.valid, *parts.test)]
    lines = [[word.lower() for word in line] for line in lines]
    vectors = fit_vectors(lines)
    runs: dict[str, list[_Searched]] = {name: [] for name in _GEOMETRIES}
    for seed in context.seeds:
        order = np.random.default_rng(seed).permutation(len(lines))
        documents, queries = context.pick(800, 400), context.pick(25, 10)
        held, asked = order[:documents], order[documents : documents + queries]
        for name, geometry in _GEOMETRIES.items():
            runs[name].append(
                _search(geometry, vectors, [lines[i] for i in held], [lines[i] for i in asked])
            )
    claims = [claim for name, run in runs.items() for claim in _bound_claims(name, run)]
    return Report(
        [*claims, _range(runs["WRD"])],
        [_left_over(runs)],
        [
            Figure(
                "Bound over distance",
                partial(_plot_tightness, {n: r[0] for n, r in runs.items()}),
                "How much of the distance each bound reaches, over the pairs of the first seed.",
            ),
            Figure(
                "Share of pairs to be solved for the 10 nearest",
                partial(_plot_left, runs),
                "One dot per seed; the first two are what the bound alone cannot exclude.",
            ),
        ],
        [
            (
                "Lines of CPython's reference text, queries and documents disjoint; vectors of 100 "
                "dimensions from PPMI and SVD of the same text."
            )
        ],
    )


def _search(
    geometry: Geometry,
    vectors: WordVectors,
    documents: Sequence[Sequence[str]],
    queries: Sequence[Sequence[str]],
) -> _Searched:
    exact_vectors = vectors.vectors.double()
    weights = geometry.place(exact_vectors)[1].numpy()

    def count(texts: Sequence[Sequence[str]]) -> Bags:
        places = [[vectors.place(word) for word in words] for words in texts]
        return Bags.count([[p for p in row if p is not None] for row in places], weights)

    index, asked = TransportIndex(geometry, exact_vectors, count(documents)), count(queries)
    exact, _ = index.distances(asked)
    found = index.search(asked, _NEIGHBOURS)
    nearest = exact.topk(_NEIGHBOURS, largest=False).values
    wrong = int(((found.distances - nearest).abs() > _TOLERANCE).sum())
    centroid, relaxed = index.bounds(asked)
    return _Searched(exact, {"centroids": centroid, "relaxed": relaxed}, found.solved, wrong)


def _bound_claims(name: str, runs: Sequence[_Searched]) -> list[Claim]:
    excess = {bound: max(run.excess(bound) for run in runs) for bound in ("centroids", "relaxed")}
    pairs = sum(int(run.exact.isfinite().sum()) for run in runs)
    left = [run.left("centroids") for run in runs]
    shares = [run.solved / run.exact.numel() for run in runs]
    wrong = sum(run.wrong for run in runs)
    return [
        Claim(
            f"Neither the bound by centroids nor the relaxed one ever exceeds {name}.",
            f"{_POST}, sections “下界公式”; {_WMD}, section 4",
            f"{pairs} pairs, greatest excess: centroids {excess['centroids']:.1e}, relaxed "
            f"{excess['relaxed']:.1e}.",
            f"At most {_TOLERANCE:g}.",
            max(excess.values()) <= _TOLERANCE,
        ),
        Claim(
            f"The bound by centroids alone filters out most sentences of a search by {name}.",
            f"{_POST}, sections “下界公式”",
            f"Share of pairs that it cannot exclude for the {_NEIGHBOURS} nearest: {spread(left)}.",
            "Less than half, on every seed.",
            max(left) < 0.5,
        ),
        Claim(
            f"With all bounds a search by {name} finds the nearest, for a part of the work.",
            f"{_WMD}, section 4 (prefetch and prune)",
            f"{wrong} neighbours at another distance; share of pairs solved {spread(shares)}.",
            "None; at most a quarter, on every seed.",
            wrong == 0 and max(shares) <= 0.25,
        ),
    ]


def _range(runs: Sequence[_Searched]) -> Claim:
    finite = torch.cat([run.exact[run.exact.isfinite()] for run in runs])
    least, most = float(finite.min()), float(finite.max())
    return Claim(
        "WRD lies in [0, 2].",
        f"{_POST}, section “Word Rotator's Distance”",
        f"From {least:.3f} to {most:.3f} over {len(finite)} pairs.",
        "Within.",
        least >= 0 and most <= 2,
    )


def _left_over(runs: dict[str, list[_Searched]]) -> Table:
    rows = [
        [
            name,
            spread(run.left("centroids") for run in of),
            spread(run.left("relaxed") for run in of),
            spread(run.solved / run.exact.numel() for run in of),
        ]
        for name, of in runs.items()
    ]
    columns = ["distance", "bound by centroids", "relaxed bound", "solved by the search"]
    return Table(f"Share of pairs to be solved for the {_NEIGHBOURS} nearest", columns, rows)


_COLOURS = {"centroids": "#c0392b", "relaxed": "#2c6fbb"}


def _plot_tightness(first: dict[str, _Searched], canvas: Canvas) -> None:
    for axes, (name, run) in zip(canvas.subplots(1, 2, sharey=True), first.items(), strict=True):
        usable = run.exact.isfinite() & (run.exact > 0)
        for bound, colour in _COLOURS.items():
            ratio = (run.bounds[bound][usable] / run.exact[usable]).numpy()
            axes.hist(ratio, bins=60, range=(0, 1), color=colour, alpha=0.7, label=bound)
        axes.set(xlabel=f"bound / {name}", ylabel="pairs" if name == "WMD" else "")
        axes.legend(title="bound")


def _plot_left(runs: dict[str, list[_Searched]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, marker in (("WMD", "o"), ("WRD", "s")):
        points = [
            (place, value)
            for run in runs[name]
            for place, value in enumerate(
                (run.left("centroids"), run.left("relaxed"), run.solved / run.exact.numel())
            )
        ]
        offset = -0.06 if name == "WMD" else 0.06
        axes.plot([x + offset for x, _ in points], [y for _, y in points], marker, label=name)
    axes.set_xticks([0, 1, 2], ["by centroids", "relaxed", "search, all bounds"])
    axes.set(ylabel="share of pairs", ylim=(0, 1.05), xlim=(-0.5, 2.5))
    axes.legend()


# -- retrieval -------------------------------------------------------------------------------------

_METHODS: dict[str, Callable[..., WordMoverSimilarity | WordRotatorSimilarity]] = {
    "WMD": WordMoverSimilarity,
    "WMD, unit vectors": partial(WordMoverSimilarity, normalize=True),
    "WRD": WordRotatorSimilarity,
}
_CENTROIDS = "cosine of sums"
_NORMS: dict[str, Literal["information", "factors"]] = {
    "norms of the factors": "factors",
    "norms by information": "information",
}
_SETTINGS = [(length, without) for length in (10, 20) for without in (False, True)]
_Ranks = dict[tuple[str, int, bool, str], list[float]]
"""Mean reciprocal ranks over the seeds, by norms, length of query, without stop words, method."""


def retrieval(context: Context) -> Report:
    """Find the other half of a topic by a few words of it."""
    from pydoc_data.topics import topics

    texts = [[w.lower() for w in tokenizer("words")(topics[name])] for name in sorted(topics)]
    vectors = {name: fit_vectors(texts, norms=norms) for name, norms in _NORMS.items()}
    asked = texts[:: context.pick(1, 3)]
    scores: _Ranks = {}
    for seed in context.seeds:
        for length, without in _SETTINGS:
            rng = np.random.default_rng(seed)
            queries, candidates = _draw(asked, length, rng, without=without)
            for norms, of in vectors.items():
                for name in (*_METHODS, _CENTROIDS):
                    rank = _mean_reciprocal_rank(name, of, queries, candidates)
                    scores.setdefault((norms, length, without, name), []).append(rank)
    return Report(
        [
            *(_by_angle(norms, scores) for norms in vectors),
            *(_stop_words(norms, scores) for norms in vectors),
            _importance(vectors["norms of the factors"], texts),
        ],
        [_rank_table(norms, scores) for norms in vectors],
        [
            Figure(
                f"Finding text of the same topic, {norms}",
                partial(_plot_ranks, norms, scores),
                "Mean over the seeds, with the least and the greatest.",
            )
            for norms in vectors
        ],
        [
            (
                f"{len(asked)} topics of CPython's reference text; of each that is long enough, "
                f"the query is some consecutive words of the first half, the candidates are as "
                f"many of the second half of each. Vectors of 100 dimensions from PPMI and SVD of "
                f"the same text, with the norms that the factors have, and with -log p(w)."
            )
        ],
    )


def _draw(
    texts: Sequence[Sequence[str]], length: int, rng: np.random.Generator, *, without: bool
) -> tuple[list[list[str]], list[list[str]]]:
    """Draw a query and a candidate from the two halves of every text that is long enough."""
    kept = [[w for w in words if not (without and w in STOP_WORDS)] for words in texts]
    queries, candidates = [], []
    for words in kept:
        half = len(words) // 2
        if half > length:
            begin, other = rng.integers(half - length), rng.integers(half - length)
            queries.append(words[begin : begin + length])
            candidates.append(words[half + other : half + other + length])
    return queries, candidates


def _mean_reciprocal_rank(
    name: str,
    vectors: WordVectors,
    queries: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[str]],
) -> float:
    """Return the mean of 1 / rank of the candidate from the query's own topic."""
    if name == _CENTROIDS:
        sums = [_sums(vectors, texts) for texts in (queries, candidates)]
        alike = sums[0] @ sums[1].T
    else:
        alike = _METHODS[name](vectors).matrix(queries, candidates)
    own = alike.diagonal()[:, None]
    ranks = 1 + (alike > own).sum(1) + ((alike == own).sum(1) - 1) / 2  # ties share their ranks
    return float((1 / ranks.double()).mean())


def _sums(vectors: WordVectors, texts: Sequence[Sequence[str]]) -> Tensor:
    rows = []
    for words in texts:
        places = [p for word in words if (p := vectors.place(word)) is not None]
        rows.append(vectors.vectors[places].double().sum(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def _by_angle(norms: str, scores: _Ranks) -> Claim:
    gaps = {
        key: np.subtract(scores[norms, *key, "WRD"], scores[norms, *key, "WMD"])
        for key in _SETTINGS
    }
    said = "; ".join(f"{_setting(*key)} {spread(gap)}" for key, gap in gaps.items())
    return Claim(
        f"WRD finds text of the same topic better than WMD ({norms}).",
        f"{_POST}, section “Word Rotator's Distance”; {_WRD}",
        f"Gain in mean reciprocal rank: {said}.",
        "On average at least 0.02 in each of the four settings.",
        min(float(gap.mean()) for gap in gaps.values()) >= 0.02,
    )


def _stop_words(norms: str, scores: _Ranks) -> Claim:
    gains = {
        length: np.subtract(scores[norms, length, True, "WMD"], scores[norms, length, False, "WMD"])
        for length in (10, 20)
    }
    said = "; ".join(f"{length} words {spread(gain)}" for length, gain in gains.items())
    return Claim(
        f"WMD is better without stop words ({norms}).",
        f"{_POST}, section “Word Mover's Distance”",
        f"Gain in mean reciprocal rank: {said}.",
        "Positive on every seed.",
        min(float(gain.min()) for gain in gains.values()) > 0,
    )


def _importance(vectors: WordVectors, texts: Sequence[Sequence[str]]) -> Claim:
    """Compare the norm of a word's vector with how few topics the word occurs in."""
    topics = Counter(word for words in texts for word in set(words))
    rarity = [-np.log(topics[word]) for word in vectors.words]
    correlation = _rank_correlation(vectors.vectors.norm(dim=1).tolist(), rarity)
    return Claim(
        "The norm of a word's vector grows with the word's importance, PPMI and SVD included.",
        f"{_POST}, section “Word Rotator's Distance”; {_WRD} (of word2vec and GloVe)",
        f"Rank correlation of norm and inverse document frequency over {len(vectors)} words: "
        f"{correlation:.3f}.",
        "Positive.",
        correlation > 0,
    )


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    return float(spearmanr(a, b).statistic)


def _setting(length: int, without: bool) -> str:
    return f"{length} words{' without stop words' if without else ''}"


def _rank_table(norms: str, scores: _Ranks) -> Table:
    names = [*_METHODS, _CENTROIDS]
    rows = [
        [_setting(*key), *(spread(scores[norms, *key, name]) for name in names)]
        for key in _SETTINGS
    ]
    return Table(f"Mean reciprocal rank, {norms}", ["query", *names], rows)


def _plot_ranks(norms: str, scores: _Ranks, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for i, name in enumerate((*_METHODS, _CENTROIDS)):
        values = np.array([scores[norms, *key, name] for key in _SETTINGS])
        means = values.mean(1)
        ends = [means - values.min(1), values.max(1) - means]
        places = np.arange(len(_SETTINGS)) + 0.2 * (i - 1.5)
        axes.bar(places, means, 0.18, yerr=ends, capsize=2, label=name)
    labels = [_setting(*key).replace(" without", "\nwithout") for key in _SETTINGS]
    axes.set_xticks(range(len(_SETTINGS)), labels)
    axes.set(ylabel="mean reciprocal rank", ylim=(0, 0.9))
    axes.legend(ncols=2)
