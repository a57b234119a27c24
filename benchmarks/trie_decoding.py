"""The prefix tree beside transformers' ``prefix_allowed_tokens_fn`` with a tree of dicts.

Both constrain the same rows at every step of decoding entries to their ends: eight tokens drawn by
Zipf's law and the end token. Ours is :class:`TrieLogitsProcessor`, theirs is
``PrefixConstrainedLogitsProcessor`` with nested dicts, walked from the root for each row as in
GENRE; both take and return the whole scores ``[row, token]``, and both get the rows of the step
before in another order, as beams are. Results are compared before the clock starts. The time of a
model is not in it.

A row of the first step, where all rows are at the root with its thousands of children, and one of
the seventh, where nodes have one or two, say what the sum is made of.

Floor: a new array of the scores is written once, which is 64 × 21 128 numbers or 5.4 MB in the
larger vocabulary, 0.15 ms with two threads; behind that each row is searched for in the keys three
times, which is some 40 µs for 64 rows. Ours makes some forty calls of a few microseconds around it,
whatever the tree; theirs some fifteen per row, besides the dense passes.

``decoder/trie-beam`` writes no such array: it takes the scores of what may follow, and beam search
normalises and chooses among those. Its rows are a step of it beside theirs, which both take the
scores of all tokens, and the whole search beside the same search with theirs, with a model that
costs nothing.

Building is compared with the dicts' too; they take 26 to 30 times the memory: 8 bytes a node here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Row, compare
from numpy.typing import NDArray
from torch import Tensor

from kexue.core import DecodeResult
from kexue.core.language import NextTokenScorer, beam_search
from kexue_trie_decoding import TrieBeam, TrieIndex, TrieLogitsProcessor
from kexue_trie_decoding.slots import Slots

__all__ = ["rows"]

LENGTH = 8
END = 0
Step = Callable[[Tensor, Tensor], Tensor]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: The smaller database alone.
    """
    for count in (100_000,) if quick else (100_000, 1_000_000):
        for vocabulary in (2048, 21_128):
            entries = _entries(count, vocabulary)
            dicts = _nested(entries)
            index = TrieIndex.build(entries, END)
            for beams in (64, 256):
                yield from _steps(index, dicts, entries, beams, vocabulary)
            if vocabulary > 2048:
                del dicts
                yield _building(entries)


def _entries(count: int, vocabulary: int) -> NDArray[np.int64]:
    """Draw entries whose tokens are Zipf's, as those of names are."""
    rng = np.random.default_rng(count)
    chances = 1 / np.arange(1, vocabulary)
    return 1 + rng.choice(vocabulary - 1, (count, LENGTH), p=chances / chances.sum())


def _nested(entries: NDArray[np.int64]) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for sequence in entries.tolist():
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
        node[END] = {}
    return root


def _theirs(root: dict[int, Any]) -> Step:
    from transformers import PrefixConstrainedLogitsProcessor

    def allowed(batch: int, ids: Tensor) -> list[int]:
        del batch
        node = root
        for token in ids.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [END]  # a beam of no probability is anywhere

    step: Step = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
    return step


def _steps(
    index: TrieIndex, dicts: dict[int, Any], entries: NDArray[np.int64], beams: int, vocabulary: int
) -> Iterator[Row]:
    rng = np.random.default_rng(beams)
    chosen = entries[rng.integers(len(entries), size=beams)]
    start = np.full((beams, 1), END)
    scores = torch.randn(beams, vocabulary, generator=torch.Generator().manual_seed(0))
    given = []
    for length in range(LENGTH + 1):
        chosen = chosen[rng.permutation(beams)]
        given.append(torch.from_numpy(np.concatenate([start, chosen[:, :length]], 1)))
    theirs = _theirs(dicts)
    ours = TrieLogitsProcessor(index, start=1)
    for ids in given:
        if not torch.equal(ours(ids, scores), theirs(ids, scores)):
            raise RuntimeError("The masks differ.")
    case = f"{len(entries)} entries, {beams} rows, {vocabulary} tokens"
    name = "transformers, dicts"
    yield compare(
        "constraint, an entry's 9 steps",
        case,
        lambda: _decode(TrieLogitsProcessor(index, start=1), given, scores),
        lambda: _decode(theirs, given, scores),
        peer_name=name,
        pairs=9,
    )
    if beams == 64:
        yield compare(
            "constraint, the first step",
            case,
            lambda: TrieLogitsProcessor(index, start=1)(given[0], scores),
            partial(theirs, given[0], scores),
            peer_name=name,
        )
        yield compare(
            "constraint, the seventh step",
            case,
            _seventh(index, given, scores),
            partial(theirs, given[6], scores),
            peer_name=name,
        )
        yield compare(
            "trie-beam, the seventh step",
            case,
            _beam_step(index, chosen, scores, 6),
            partial(theirs, given[6], scores),
            peer_name=name,
        )
        yield _searches(index, dicts, scores, case)


class _Free(NextTokenScorer):
    """A model that costs nothing: the same scores for whatever it is asked."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def begin(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the scores."""
        del mask
        return self.scores[: len(prompt)], None

    def advance(self, cache: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the scores."""
        return self.scores[: len(tokens)], cache


def _beam_step(
    index: TrieIndex, entries: NDArray[np.int64], scores: Tensor, step: int
) -> Callable[[], object]:
    """Return a call that makes one step of ``decoder/trie-beam``: reorder, go on, take scores."""
    scorer = Slots(_Free(scores), index)
    _, cache = scorer.begin(torch.full((len(entries), 1), END))
    for length in range(1, step + 1):
        slots = index.walk(torch.from_numpy(entries[:, :length])) - torch.from_numpy(cache.begin)
        if length < step:
            _, cache = scorer.advance(cache, slots)
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0))
    slots = slots[order]
    return lambda: scorer.advance(scorer.select(cache, order), slots)


def _searches(index: TrieIndex, dicts: dict[int, Any], scores: Tensor, case: str) -> Row:
    theirs, width = _theirs(dicts), 4
    prompt = torch.full((len(scores) // width, 1), END)

    def ours() -> DecodeResult:
        decoder = TrieBeam(index, width=width)
        return decoder.decode(lambda ids: scores[: len(ids)], prompt=prompt)

    def peer() -> DecodeResult:
        return beam_search(
            lambda ids: theirs(ids, scores[: len(ids)]),
            prompt,
            width=width,
            max_new_tokens=LENGTH + 1,
            eos_id=END,
        )

    if not torch.equal(ours().sequences, peer().sequences):
        raise RuntimeError("The answers differ.")
    return compare(
        "trie-beam, the whole search", case, ours, peer, peer_name="the same, dicts", pairs=9
    )


def _decode(step: Step, given: list[Tensor], scores: Tensor) -> None:
    for ids in given:
        step(ids, scores)


def _seventh(index: TrieIndex, given: list[Tensor], scores: Tensor) -> Callable[[], object]:
    """Return a call that is the seventh of a decoding, however often it is made."""
    processors = []
    for _ in range(2):
        processor = TrieLogitsProcessor(index, start=1)
        for ids in given[:6]:
            processor(ids, scores)
        processors.append(processor)
    kept, used = processors

    def call() -> object:
        used.__dict__.update(kept.__dict__)
        return used(given[6], scores)

    return call


def _building(entries: NDArray[np.int64]) -> Row:
    return compare(
        "building",
        f"{len(entries)} entries",
        partial(TrieIndex.build, entries, END),
        partial(_nested, entries),
        peer_name="nested dicts",
        pairs=3,
        warmup=0,
    )


if __name__ == "__main__":
    import sys

    for row in rows(quick="--quick" in sys.argv):
        print(row)
