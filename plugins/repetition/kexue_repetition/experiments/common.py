"""What the experiments share: text, decoders of it, and repetition as measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.core import Context
from kexue.core.lab.data import text
from kexue.core.lab.language import CharacterModel
from kexue_repetition.estimation import estimate_transitions, numbered
from kexue_repetition.statistics import repeated_ngrams
from kexue_repetition.transitions import Transitions, sample_walks

__all__ = [
    "LENGTH",
    "PAPER",
    "POST",
    "bigram",
    "frequent_words",
    "language_model",
    "lines_of",
    "measured",
    "prompts_of",
    "seeded",
]

POST = "https://kexue.fm/archives/8128"
PAPER = "https://arxiv.org/abs/2012.14660"
LENGTH = 60
"""Characters of a text that is measured."""


def lines_of(context: Context) -> list[str]:
    """Return the lines of the embedded text that decoders are trained on."""
    return text().train[: context.pick(None, 1500)]


def bigram(texts: Sequence[Sequence[Any]]) -> Transitions:
    """Return the bigram decoder of texts, which does not end."""
    ids, tokens = numbered(texts)
    return estimate_transitions(ids, tokens=tokens, ended=False)


def frequent_words(lines: Sequence[str], least: int = 8) -> Transitions:
    """Return the bigram decoder of the words that occur often; others are one token."""
    words = [line.split() for line in lines]
    counts = Counter(word for line in words for word in line)
    ids, tokens = numbered([[w if counts[w] >= least else "…" for w in line] for line in words])
    return estimate_transitions(ids, tokens=tokens, ended=False, unseen=0.5)


def seeded(seed: int) -> torch.Generator:
    """Return a source of randomness."""
    return torch.Generator().manual_seed(seed)


def measured(
    decoder: Transitions, seed: int, walks: int = 150, space: str = ""
) -> tuple[float, float]:
    """Return seq-rep-4 of what a decoder writes: of 60 characters, and of 60 tokens.

    Args:
        decoder: Its tokens are strings, or tuples of them.
        seed: Of the walks.
        walks: How many.
        space: What stands between tokens.
    """
    ids = sample_walks(decoder, walks, LENGTH, generator=seeded(seed))
    rows = [[decoder.name(i) for i in row if i >= 0] for row in ids.tolist()]
    texts = [space.join(row)[:LENGTH] for row in rows]
    characters = float(repeated_ngrams(numbered(texts)[0], 4).mean())
    return characters, float(repeated_ngrams(ids, 4).mean())


def language_model(context: Context, seed: int) -> CharacterModel:
    """Return a recurrent language model of the text's characters, trained once per call."""

    def train() -> CharacterModel:
        lines = lines_of(context)[: context.pick(1500, 400)]
        torch.manual_seed(seed)
        model = CharacterModel("".join(sorted(set("".join(lines)))), width=64)
        model.to(context.device)
        model.fit(lines, epochs=context.pick(3, 1), batch_size=32, lr=5e-3, seed=seed)
        return model.eval()

    return context.once(("repetition language model", seed), train)


def prompts_of(context: Context, model: CharacterModel, characters: int = 10) -> Tensor:
    """Return the beginnings of held-out lines as ids."""
    lines = [line for line in text().test if len(line) >= characters][: context.pick(60, 20)]
    rows = [model.vocabulary.encode(line[:characters]) for line in lines]
    return torch.tensor(rows, device=context.device)
