"""Questions to a generated knowledge base: subject, property, meaning, in two orders.

The base is made like the one of the post. A subject has one to three meanings, such as a book and
a river of the same name, whose description no question gives; each has some properties. A question
is about a property of a subject, in words that training did not have for that property.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.text import spread
from kexue_trie_decoding.experiments.models import Pairs, answers, free, train
from kexue_trie_decoding.index import TrieIndex

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["knowledge"]

_POST = "https://kexue.fm/archives/8802"
_NAMES = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
_MEANINGS = "金生丽水玉出昆冈剑号巨阙珠称夜光"
_ORDERS = {"S, P, M": "甲", "S, M, P": "乙"}
"""How an entry is written, and what a question begins with so that one model can do both."""

_PROPERTIES = {
    "主讲课程": ("{}的主讲课程是什么", "{}讲哪门课程", "{}主要讲什么课程"),
    "主要成就": ("{}的主要成就是什么", "{}有什么成就", "{}取得过哪些主要的成就"),
    "主要作品": ("{}的主要作品是什么", "{}有什么作品", "{}主要写过哪些作品"),
    "火车站距离": ("{}的火车站距离是多少", "{}距离火车站多少公里", "{}离火车站有多远"),
    "机场距离": ("{}的机场距离是多少", "{}距离机场多少公里", "{}离机场有多远"),
    "酒店星级": ("{}的酒店星级是多少", "{}是什么星级", "{}是几星级的酒店"),
    "酒店地址": ("{}的酒店地址是什么", "{}的地址在哪里", "{}这家酒店在什么地址"),
    "出版社": ("{}的出版社是什么", "{}的出版社是哪家", "{}由哪家出版社出版"),
    "出版时间": ("{}的出版时间是多少", "{}是哪年出版的", "{}什么时间出版"),
    "作者": ("{}的作者是什么", "{}是哪位作者", "{}是哪位作者写的"),
    "喜欢": ("{}喜欢的是什么", "{}最喜欢哪些", "{}平时喜欢什么"),
    "讨厌": ("{}讨厌的是什么", "{}最讨厌哪些", "{}平时讨厌什么"),
    "出生地": ("{}的出生地是什么", "{}的出生地在哪里", "{}出生在什么地方"),
    "出生日期": ("{}的出生日期是多少", "{}是哪年出生", "{}出生于哪个日期"),
    "职业": ("{}的职业是什么", "{}是什么职业", "{}从事哪种职业"),
}
"""Ways to ask for each property; the last of each is for testing alone."""

_AHEAD = {"from the start": 0, "behind the subject": 1}


class _Fact(NamedTuple):
    subject: str
    property: str
    meaning: str

    def entry(self, order: str) -> str:
        """Return the fact as a sequence, in the order of the name's letters."""
        fields = {"S": self.subject, "P": self.property, "M": self.meaning}
        return "|".join(fields[letter] for letter in order.split(", "))

    def question(self, order: str, way: str) -> str:
        return _ORDERS[order] + way.format(self.subject)


class _Measured(NamedTuple):
    """Exact match of one seed, by order and then by method; and of the free decoding's subject."""

    exact: dict[tuple[str, str], float]
    ambiguous: float


def knowledge(context: Context) -> Report:
    """Answer questions about subjects that training did not have."""
    runs = [_run(context, seed) for seed in context.seeds]
    exact = {key: [run.exact[key] for run in runs] for key in runs[0].exact}
    methods = list(dict.fromkeys(method for _, method in exact))
    rows = [[method, *(spread(exact[order, method]) for order in _ORDERS)] for method in methods]
    return Report(
        [_order_claim(exact), _lookahead_claim(exact)],
        [Table("Exact match of subject, property and meaning", ["decoding", *_ORDERS], rows)],
        [
            Figure(
                "Exact match by the order of the fields",
                partial(_plot, exact, methods),
                "Bars are means, dots the seeds. A meaning that is said first is guessed; behind "
                "the property the tree often leaves but one.",
            )
        ],
        [
            (
                "A generated base: 400 subjects of two or three characters, each with one to three "
                "meanings of two characters that are drawn at random, each with 4 of 15 "
                "properties. Questions in the tests are about other subjects than in training, and "
                f"in other words. {spread(run.ambiguous for run in runs)} of them have several "
                "right meanings, of which one counts. One model learns both orders, told apart by "
                "the first character of the question."
            )
        ],
    )


def _run(context: Context, seed: int) -> _Measured:
    rng = Random(seed)
    subjects, facts = _base(rng)
    trained_on = set(subjects[: 6 * len(subjects) // 10])
    train_facts = [fact for fact in facts if fact.subject in trained_on]
    test = [fact for fact in facts if fact.subject not in trained_on]
    asked = rng.sample(test, context.pick(150, 15))
    ways = "".join(way for several in _PROPERTIES.values() for way in several)
    letters = {*_NAMES, *_MEANINGS, *ways, *"".join(_PROPERTIES), *_ORDERS.values(), "|"}
    model = train(
        "".join(sorted(letters - {"{", "}"})),
        partial(_draw, rng, train_facts),
        steps=context.pick(220, 12),
        seed=seed,
        device=context.device,
        lr=1e-2,
    )
    (bar,) = model.vocabulary.encode("|")
    exact: dict[tuple[str, str], float] = {}
    for order in _ORDERS:
        entries = [model.vocabulary.encode(fact.entry(order)) for fact in facts]
        index = TrieIndex.build(entries, model.vocabulary.eos_id)
        questions = [fact.question(order, _PROPERTIES[fact.property][-1]) for fact in asked]
        wanted = [fact.entry(order) for fact in asked]

        def score(found: Sequence[str], wanted: Sequence[str] = wanted) -> float:
            return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)

        exact[order, "free"] = score(free(model, questions, index.max_length, 3))
        for width, beams in ((1, "1 beam"), (3, "3 beams")):
            exact[order, f"tree, {beams}"] = score(answers(model, index, questions, width=width))
            for name, after in _AHEAD.items():
                ahead = {"lookahead": True, "separator_id": bar, "after": after}
                found = answers(model, index, questions, width=width, **ahead)
                exact[order, f"tree, {beams}, look-ahead {name}"] = score(found)
    return _Measured(exact, _ambiguous(facts, asked))


def _base(rng: Random) -> tuple[list[str], list[_Fact]]:
    drawn = ("".join(rng.choices(_NAMES, k=rng.choice((2, 3)))) for _ in range(4000))
    subjects = list(dict.fromkeys(drawn))[:400]
    facts = []
    for subject in subjects:
        for _ in range(rng.choice((1, 2, 3))):
            meaning = "".join(rng.choices(_MEANINGS, k=2))
            facts += [_Fact(subject, p, meaning) for p in rng.sample(list(_PROPERTIES), 4)]
    return subjects, list(dict.fromkeys(facts))


def _draw(rng: Random, facts: Sequence[_Fact], count: int) -> Pairs:
    pairs = []
    for fact in rng.choices(facts, k=count):
        order = rng.choice(list(_ORDERS))
        way = rng.choice(_PROPERTIES[fact.property][:-1])
        pairs.append((fact.question(order, way), fact.entry(order)))
    return pairs


def _ambiguous(facts: Sequence[_Fact], asked: Sequence[_Fact]) -> float:
    """Return the share of questions that several entries answer."""
    counts: dict[tuple[str, str], int] = {}
    for fact in facts:
        counts[fact[:2]] = counts.get(fact[:2], 0) + 1
    return sum(counts[fact[:2]] > 1 for fact in asked) / len(asked)


# -- claims ----------------------------------------------------------------------------------------

_Exact = dict[tuple[str, str], list[float]]


def _order_claim(exact: _Exact) -> Claim:
    gains = {
        beams: [
            a - b
            for a, b in zip(
                exact["S, P, M", f"tree, {beams}"], exact["S, M, P", f"tree, {beams}"], strict=True
            )
        ]
        for beams in ("3 beams", "1 beam")
    }
    said = "; ".join(f"{beams} {spread(values)}" for beams, values in gains.items())
    values = gains["3 beams"]
    return Claim(
        "Subject, property, meaning is a better order than subject, meaning, property, by 8 to 10 "
        "points.",
        f"{_POST}, section 本文方案",
        f"Gain in exact match: {said}.",
        "Of 3 beams, as in the post's code, at least 0.08 on average, and positive on every seed.",
        sum(values) / len(values) >= 0.08 and min(values) > 0,
    )


def _lookahead_claim(exact: _Exact) -> Claim:
    said, means = [], {}
    for beams in ("3 beams", "1 beam"):
        for name in _AHEAD:
            better = exact["S, P, M", f"tree, {beams}, look-ahead {name}"]
            values = [
                a - b for a, b in zip(better, exact["S, P, M", f"tree, {beams}"], strict=True)
            ]
            means[beams, name] = sum(values) / len(values)
            said.append(f"{name}, {beams}, {spread(values)}")
    return Claim(
        "Look-ahead behind the subject adds about 4 points.",
        f"{_POST}, section “前瞻”策略",
        f"Gain in exact match: {'; '.join(said)}.",
        "At least 0.02 on average behind the subject, of 3 beams, as in the post.",
        means["3 beams", "behind the subject"] >= 0.02,
    )


def _plot(exact: _Exact, methods: Sequence[str], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for i, order in enumerate(_ORDERS):
        places = [place + 0.36 * (i - 0.5) for place in range(len(methods))]
        values = [exact[order, method] for method in methods]
        axes.barh(places, [sum(v) / len(v) for v in values], 0.34, label=order)
        for y, of in zip(places, values, strict=True):
            axes.plot(of, [y] * len(of), "o", color="black", markersize=3)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set(xlabel="exact match")
    axes.legend(title="order of the entry", loc="upper right")
