"""Tiny reference models for experiments and for ``kexue fit``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core.component import PAD, Example
from kexue.core.interfaces.decoder import Decoder, DecodeResult
from kexue.core.interfaces.loss import Loss

__all__ = ["CharacterEncoder", "SoftmaxTagger", "integers", "pad_spellings"]

T = TypeVar("T")


class CharacterEncoder(nn.Module):
    """Tokens to features: what a token is made of, then its neighbourhood.

    A token of one character is an embedding; a longer one is the maximum over a convolution of its
    characters. Residual convolutions over the tokens follow; padding stays zero, so that a sentence
    has the same features alone and in a batch.

    Args:
        num_characters: Size of the alphabet, padding and unknown included.
        width: Features per token.
        layers: Convolutions over the tokens; each widens the view by ``kernel - 1`` tokens.
        kernel: Tokens that a convolution sees, odd.
        words: Whether tokens have several characters.
        dropout: Probability of dropping a feature in training.
    """

    def __init__(
        self,
        num_characters: int,
        *,
        width: int = 64,
        layers: int = 3,
        kernel: int = 3,
        words: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, width, padding_idx=0)
        self.spelling = nn.Conv1d(width, width, 3, padding=1) if words else None
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, characters: Int[Tensor, "batch time spelling"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time feature"]:
        """Return the features.

        Args:
            characters: Ids of the characters of each token, 0 behind its last.
            mask: True at real tokens.
        """
        embedded = self.embedding(characters)  # [batch, time, spelling, feature]
        if self.spelling is None:
            features = embedded[:, :, 0]
        else:
            flat = embedded.flatten(0, 1).transpose(1, 2)
            convolved = self.spelling(flat).masked_fill(
                characters.flatten(0, 1)[:, None] == 0, -torch.inf
            )
            features = convolved.amax(-1).view(*embedded.shape[:2], -1)
            features = torch.where(mask[..., None], features, 0.0)
        real = mask[:, None].to(features.dtype)
        hidden = features.transpose(1, 2) * real  # [batch, feature, time]
        for convolution in self.convolutions:
            hidden = (hidden + F.relu(convolution(hidden))) * real
        dropped: Tensor = self.dropout(hidden.transpose(1, 2))
        return dropped


class SoftmaxTagger(Loss, Decoder):
    """The baseline that knows no transitions: a softmax per position.

    Args:
        num_tags: Number of tags.
        reduction: ``"mean"`` or ``"sum"`` over sequences, ``"token_mean"``, or ``"none"``.
    """

    trainable: ClassVar[bool] = True
    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum", "token_mean")

    def __init__(self, num_tags: int, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.num_tags = num_tags

    def forward(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Tensor:
        """Return the cross-entropy in nats."""
        real = torch.ones_like(tags, dtype=torch.bool) if mask is None else mask
        targets = torch.where(real, tags, PAD)
        losses = F.cross_entropy(
            emissions.transpose(1, 2), targets, ignore_index=PAD, reduction="none"
        )
        if self.reduction == "token_mean":
            return losses.sum() / real.sum().clamp(min=1)
        rows = losses.sum(1)
        return (
            rows
            if self.reduction == "none"
            else rows.sum()
            if self.reduction == "sum"
            else rows.mean()
        )

    def decode(
        self,
        scores: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return the best tag at each position."""
        best = scores.max(-1)
        if mask is None:
            return DecodeResult(best.indices, best.values.sum(1))
        return DecodeResult(
            torch.where(mask, best.indices, PAD), torch.where(mask, best.values, 0.0).sum(1)
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences of up to five positions and four tags."""
        mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
        inputs: dict[str, Any] = {
            "emissions": torch.randn(3, 5, 4, generator=generator),
            "tags": torch.randint(4, (3, 5), generator=generator),
            "mask": mask,
        }
        return Example({"num_tags": 4}, {**inputs, "scores": inputs["emissions"]})


def pad_spellings(
    sentences: Sequence[Sequence[Sequence[T]]], look_up: Callable[[T], int]
) -> tuple[Int[Tensor, "batch time spelling"], Bool[Tensor, "batch time"]]:
    """Return the ids of characters as one tensor padded with 0, and where there are tokens.

    Args:
        sentences: Characters by token by sentence.
        look_up: Returns the id of a character.
    """
    tokens = list(chain.from_iterable(sentences))
    mask = _prefixes(map(len, sentences))
    spelled = _prefixes(map(len, tokens))
    ids = torch.zeros_like(spelled, dtype=torch.long)
    ids[spelled] = integers(map(look_up, chain.from_iterable(tokens)))
    padded = ids.new_zeros(*mask.shape, ids.shape[1])
    padded[mask] = ids
    return padded, mask


def integers(values: Iterable[int]) -> Int[Tensor, " value"]:
    """Return integers as a tensor; for many of them, several times as fast as ``torch.tensor``."""
    return torch.from_numpy(np.fromiter(values, np.int64))


def _prefixes(lengths: Iterable[int]) -> Bool[Tensor, "row column"]:
    """Return rows that begin with so many True; one column at least."""
    counts = integers(lengths)
    longest = int(counts.max()) if len(counts) else 0
    return torch.arange(max(1, longest)) < counts[:, None]
