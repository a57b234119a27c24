"""How text-like texts are, how much of them is copied, and how much they repeat each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from kexue.core import ArgumentError

__all__ = ["Trigrams", "ngrams", "overlap", "self_bleu"]

_WEIGHTS = 0.6, 0.3, 0.1  # of what the last two, the last and no character say


class Trigrams:
    """A language model of character trigrams, interpolated with bigrams, characters and chance.

    p(c given ab) = 0.6 f(c given ab) + 0.3 f(c given b) + 0.1 (n(c) + 1) / (n + V + 1), where f
    are frequencies in the text that it was made of, n(c) of n counts characters and V different
    ones; what no frequency knows falls to the lower orders. All judge texts alike, and none knows
    where texts begin or end.

    Args:
        texts: What it is made of.

    Raises:
        ArgumentError: If there is no character.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
        self._contexts: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
        for text in texts:
            for order, (counts, contexts) in enumerate(
                zip(self._counts, self._contexts, strict=True)
            ):
                counts.update(_ngrams(text, order + 1))
                contexts.update(_ngrams(text[:-1], order) if order else ())
        self._total = self._counts[0].total()
        if not self._total:
            raise ArgumentError("`texts` of Trigrams must hold characters.", argument="texts")

    def log_prob(self, text: str) -> float:
        """Return the log-probability of a text of its length, in nats."""
        return math.fsum(
            math.log(self._prob(text[max(0, place - 2) : place], text[place]))
            for place in range(len(text))
        )

    def perplexity(self, texts: Iterable[str]) -> float:
        """Return exp of the mean negative log-probability of a character; NaN of none."""
        scores = [(self.log_prob(text), len(text)) for text in texts]
        count = sum(length for _, length in scores)
        return math.exp(-math.fsum(score for score, _ in scores) / count) if count else math.nan

    def _prob(self, context: str, character: str) -> float:
        known = len(self._counts[0]) + 1
        found = (self._counts[0][character] + 1) / (self._total + known)
        kept = _WEIGHTS[2]
        for order in (1, 2):
            before = context[len(context) - order :] if len(context) >= order else ""
            seen = self._contexts[order][before] if before else 0
            if not seen:
                break
            share = _WEIGHTS[2 - order] / (kept + _WEIGHTS[2 - order])
            kept += _WEIGHTS[2 - order]
            frequency = self._counts[order][before + character] / seen
            found = share * frequency + (1 - share) * found
        return found


def _ngrams(text: Sequence[str] | str, order: int) -> list[str]:
    return [str(text[i : i + order]) for i in range(len(text) - order + 1)]


def ngrams(texts: Iterable[str], order: int) -> frozenset[str]:
    """Return the n-grams of characters of some texts.

    Args:
        texts: Texts.
        order: n.
    """
    return frozenset(gram for text in texts for gram in _ngrams(text, order))


def overlap(texts: Iterable[str], corpus: Iterable[str], order: int = 8) -> float:
    """Return the share of the texts' n-grams of characters that occur in a corpus; NaN of none.

    Args:
        texts: What may be copied.
        corpus: From where; or what :func:`ngrams` made of it, where it is asked often.
        order: n.
    """
    known = corpus if isinstance(corpus, frozenset) else ngrams(corpus, order)
    grams = [gram for text in texts for gram in _ngrams(text, order)]
    return sum(gram in known for gram in grams) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Return the mean BLEU of each text with all others as references; NaN of fewer than two.

    Of characters, without smoothing: 0 for a text none of whose n-grams of some order occur in
    another; 1 where all are alike. The less, the more the texts differ.

    Args:
        texts: Texts.
        order: Longest n-grams that count.

    Source: Zhu et al., Texygen, 2018, https://arxiv.org/abs/1802.01886; Papineni et al., BLEU,
    2002, https://aclanthology.org/P02-1040.
    """
    if len(texts) < 2:
        return math.nan
    bags = [[Counter(_ngrams(text, n)) for text in texts] for n in range(1, order + 1)]
    best = [_two_best(rows) for rows in bags]
    lengths = Counter(map(len, texts))
    total = 0.0
    for i, text in enumerate(texts):
        log_precision = 0.0
        for rows, greatest in zip(bags, best, strict=True):
            bag = rows[i]
            hits = sum(min(n, _elsewhere(greatest[gram], n)) for gram, n in bag.items())
            if not hits:
                break
            log_precision += math.log(hits / bag.total()) / order
        else:
            total += math.exp(log_precision) * _brevity(len(text), lengths)
    return total / len(texts)


def _two_best(rows: Iterable[Counter[str]]) -> dict[str, tuple[int, int]]:
    """Return how often each n-gram is in the two texts that have it most often."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        for gram, count in row.items():
            first, second = found.get(gram, (0, 0))
            found[gram] = (count, first) if count > first else (first, max(second, count))
    return found


def _elsewhere(best: tuple[int, int], own: int) -> int:
    """Return how often the other text has it that has it most often."""
    return best[1] if own == best[0] else best[0]


def _brevity(length: int, lengths: Counter[int]) -> float:
    """Return BLEU's penalty for a text shorter than the reference nearest in length."""
    others = (n for n, count in lengths.items() if count > (n == length))
    nearest = next(islice(iter(sorted(others, key=lambda n: (abs(n - length), n))), 1))
    return 1.0 if length >= nearest else math.exp(1 - nearest / length)
