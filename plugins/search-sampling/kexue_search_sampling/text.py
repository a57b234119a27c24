"""A small language model of letters, and texts that must contain keywords.

The post's target: ρ(x) = p(x) χ(x), p(x) a language model, χ(x) whether x contains all keywords.
Here p is a chain of letter bigrams, fitted to lines of text, so that p can be drawn from, scored
for thousands of texts at once, and asked for the letter between two others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.densities import Density

__all__ = ["Bigrams", "contains", "keyword_text"]


class Bigrams:
    """A Markov chain of letters with add-one smoothing.

    Args:
        lines: The text to fit to.
        alphabet: Its letters; everything else is taken as the first of them.
        max_length: Letters of the longest text.
        min_length: Letters of the shortest; lengths are equally likely.

    Raises:
        ArgumentError: If the alphabet has a letter twice or none, or the lengths do not fit.
    """

    def __init__(
        self,
        lines: Iterable[str],
        *,
        max_length: int,
        min_length: int | None = None,
        alphabet: str = " abcdefghijklmnopqrstuvwxyz",
    ) -> None:
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ArgumentError(
                f"`alphabet` of Bigrams must have letters, each once. Found {alphabet!r}.",
                argument="alphabet",
            )
        low = max_length if min_length is None else min_length
        if not 1 <= low <= max_length:
            raise ArgumentError(
                f"`min_length` of Bigrams must be from 1 to `max_length`. Found {low} and "
                f"{max_length}.",
                argument="min_length",
            )
        self.alphabet, self.min_length, self.max_length = alphabet, low, max_length
        first, pairs = self._counts(lines)
        self.log_first = (first / first.sum()).log()
        self.log_next = (pairs / pairs.sum(1, keepdim=True)).log()

    def _counts(self, lines: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return how often each letter and each pair occurs, plus one; pairs end with the line."""
        size = len(self.alphabet)
        joined = "\n".join(lines).lower()
        tokens = self.encode(joined)
        inside = torch.from_numpy(_codes(joined) != ord("\n"))
        pairs = (tokens[:-1] * size + tokens[1:])[inside[:-1] & inside[1:]]
        first = tokens[inside].bincount(minlength=size) + 1.0
        return first.double(), (pairs.bincount(minlength=size * size) + 1.0).double().view(size, -1)

    def encode(self, text: str) -> Tensor:
        """Return the letters of a text as tokens ``[time]``."""
        index = np.zeros(sys.maxunicode + 1, dtype=np.int64)
        index[_codes(self.alphabet)] = np.arange(len(self.alphabet))
        return torch.from_numpy(index[_codes(text)])

    def decode(self, sequences: Tensor) -> list[str]:
        """Return sequences ``[row, time]`` as texts."""
        return ["".join(self.alphabet[t] for t in row if t != PAD) for row in sequences.tolist()]

    def log_prob(self, sequences: Tensor) -> Tensor:
        """Return log p of sequences ``[row, time]``, in nats, shape ``[row]``."""
        log_first, log_next = (t.to(sequences.device) for t in (self.log_first, self.log_next))
        tokens, real = sequences.clamp(min=0), sequences != PAD
        steps = log_next[tokens[:, :-1], tokens[:, 1:]]
        total = torch.where(real[:, 1:], steps, 0.0).sum(1)
        total = total + torch.where(real[:, 0], log_first[tokens[:, 0]], 0.0)
        lengths = real.sum(1)
        fits = (lengths >= self.min_length) & (lengths <= self.max_length)
        return torch.where(fits, total - math.log(self.max_length - self.min_length + 1), -math.inf)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return texts drawn from p, shape ``[num, max_length]`` with -1 behind the end."""
        device = generator.device if generator is not None else self.log_first.device
        cdfs = [t.to(device).exp().cumsum(-1) for t in (self.log_first, self.log_next)]
        shape = (num, self.max_length + 1)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        last = len(self.alphabet) - 1
        columns = [torch.searchsorted(cdfs[0], uniform[:, 0].contiguous(), right=True)]
        for place in range(1, self.max_length):
            rows = cdfs[1][columns[-1].clamp(max=last)]
            level = uniform[:, place, None].contiguous()
            columns.append(torch.searchsorted(rows, level, right=True)[:, 0])
        choices = self.max_length - self.min_length + 1
        lengths = self.min_length + (uniform[:, -1:] * choices).long()
        tokens = torch.stack(columns, 1).clamp_(max=last)
        return torch.where(torch.arange(self.max_length, device=device) < lengths, tokens, PAD)

    def conditional_logits(self, sequences: Tensor, place: int) -> Tensor:
        """Return log p of each letter at a place given its neighbours, ``[row, token]``."""
        log_first, log_next = (t.to(sequences.device) for t in (self.log_first, self.log_next))
        before = (
            log_next[sequences[:, place - 1]] if place else log_first.expand(len(sequences), -1)
        )
        if place + 1 == sequences.shape[1]:
            return before
        return before + log_next[:, sequences[:, place + 1]].T


def _codes(text: str) -> NDArray[np.uint32]:
    """Return the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def contains(sequences: Tensor, keyword: Sequence[int] | Tensor) -> Tensor:
    """Return whether sequences ``[row, time]`` contain some tokens in a row, shape ``[row]``."""
    wanted = torch.as_tensor(keyword, device=sequences.device)
    if not len(wanted) or sequences.shape[1] < len(wanted):
        return sequences.new_full((len(sequences),), not len(wanted), dtype=torch.bool)
    return (sequences.unfold(1, len(wanted), 1) == wanted).all(2).any(1)


def keyword_text(model: Bigrams, keywords: Iterable[str] = ()) -> Density:
    """Return ρ(x) = p(x) χ(x): the model's texts that contain all keywords.

    Args:
        model: p.
        keywords: What a text must contain.

    Raises:
        ArgumentError: If a keyword is longer than a text or not of the alphabet.
    """
    wanted = list(keywords)
    for keyword in wanted:
        if not set(keyword) <= set(model.alphabet) or not 0 < len(keyword) <= model.max_length:
            raise ArgumentError(
                f"`keywords` must be 1 to {model.max_length} of the letters {model.alphabet!r}. "
                f"Found {keyword!r}.",
                argument="keywords",
            )
    tokens = [model.encode(keyword) for keyword in wanted]
    together = sum(map(len, tokens))
    if together > model.max_length:
        raise ArgumentError(
            f"`keywords` must fit into a text beside each other, {model.max_length} letters. "
            f"Found {together}.",
            argument="keywords",
        )

    def log_prob(sequences: Tensor) -> Tensor:
        found = model.log_prob(sequences)
        for keyword in tokens:
            found = torch.where(contains(sequences, keyword), found, -math.inf)
        return found

    def start(num: int, generator: torch.Generator | None) -> Tensor:
        return _with_keywords(model.sample(num, generator), torch.cat(tokens))

    return Density(
        log_prob,
        num_tokens=len(model.alphabet),
        min_length=model.min_length,
        max_length=model.max_length,
        start=start if wanted else model.sample,
        conditional_logits=None if wanted else model.conditional_logits,
        to_text=model.decode,
    )


def _with_keywords(sequences: Tensor, keywords: Tensor) -> Tensor:
    """Return sequences that begin with the keywords, longer ones for it where they must be."""
    found = sequences.clone()
    found[:, : len(keywords)] = keywords.to(found.device)
    return found
