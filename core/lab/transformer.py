"""A small Transformer, causal with a cache or seeing both sides."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core.errors import ArgumentError

__all__ = ["Transformer"]

Cache = tuple[Tensor, Tensor]
"""Keys and values ``[row, layer, 2, head, time, feature]``, and which positions are real."""


class Transformer(nn.Module):
    """Layers of attention and perceptrons, normalised before each.

    Args:
        width: Features, a multiple of ``heads``.
        layers: Layers.
        heads: Heads of attention.
        max_length: Positions.
        dropout: Probability of dropping a feature in training.
        causal: Whether a position sees only those before it.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        heads: int = 4,
        max_length: int = 512,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError(
                f"`width` must be a multiple of {heads}. Found {width}.", argument="width"
            )
        self.causal = causal
        self.positions = nn.Embedding(max_length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        features: Float[Tensor, "row time feature"],
        mask: Bool[Tensor, "row time"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "row time feature"], Cache]:
        """Return new features, and the cache to go on with.

        Args:
            features: Of the tokens.
            mask: True at real tokens; all are by default. Padding on the left for going on.
            cache: Of the tokens before these.
        """
        rows, time, _ = features.shape
        real = features.new_ones(rows, time, dtype=torch.bool) if mask is None else mask
        keys = real if cache is None else torch.cat([cache[1], real], 1)
        places = keys.long().cumsum(1).sub_(1).clamp_(min=0)[:, -time:]
        if keys.shape[1] > self.positions.num_embeddings:
            raise ArgumentError(
                f"`ids` must have at most {self.positions.num_embeddings} tokens. "
                f"Found {keys.shape[1]}. Cut them, or fit a model with a greater `max_length`.",
                argument="ids",
            )
        allowed = keys[:, None, None, :]  # [row, head, query, key]
        if self.causal and time > 1:
            every = keys.shape[1]
            before = torch.ones(time, every, dtype=torch.bool, device=keys.device)
            # A padded query sees itself: it must see something, and nobody looks at it.
            own = torch.eye(time, dtype=torch.bool, device=keys.device)
            own = F.pad(own, (every - time, 0))
            allowed = (allowed & before.tril(every - time)) | own
        hidden = features + self.positions(places)
        kept = []
        for number, layer in enumerate(self.layers):
            hidden, pair = layer(hidden, allowed, None if cache is None else cache[0][:, number])
            kept.append(pair)
        return self.norm(hidden), (torch.stack(kept, 1), keys)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, allowed: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, time, width = hidden.shape
        projected = self.project(self.before_attention(hidden))
        query, *pair = projected.view(rows, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        pairs = torch.stack(pair, 1)  # [row, 2, head, time, feature]
        if past is not None:
            pairs = torch.cat([past, pairs], 3)
        mixed = F.scaled_dot_product_attention(
            query, pairs[:, 0], pairs[:, 1], attn_mask=allowed.expand(-1, -1, time, -1)
        )
        mixed = mixed.transpose(1, 2).reshape(rows, time, width)
        hidden = hidden + self.dropout(self.merge(mixed))
        return hidden + self.dropout(self.perceptron(self.before_perceptron(hidden))), pairs
