"""Multi-head self-attention in linear time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import ArgumentError, Example, Layer
from kexue_nystromformer.attention import attend
from kexue_nystromformer.checks import check_count, check_features, check_mask
from kexue_nystromformer.folded import attend_folded, worth_folding

__all__ = ["NystromAttention"]

_OWNER = "NystromAttention"


class NystromAttention(Layer):
    """Multi-head self-attention whose time and memory grow with the length, not its square.

    Choose it for sequences of a thousand positions or more that may be seen as a whole: documents,
    images, audio. Do not choose it for generation, since it cannot be causal, nor for short ones:
    up to ``num_landmarks`` positions it is exact attention, and until some hundreds exact
    attention is faster.

    Each head is :func:`~kexue_nystromformer.nystrom_attention` of three projections. Parameters
    have the names and shapes of ``torch.nn.MultiheadAttention``, so that either loads the
    ``state_dict`` of the other; :meth:`from_multihead` converts a module.

    Args:
        num_features: Features per position, a multiple of ``num_heads``.
        num_heads: Heads.
        num_landmarks: m, the number of segments whose means stand for all positions.
        iterations: Steps of the pseudo-inverse; the paper takes 6.
        conv_kernel: Width, odd, of a depthwise convolution of the values over time that is added
            to each head (33 in the paper's code). None for none.
        bias: Whether the projections have a bias.

    Raises:
        ArgumentError: If a number is out of range, or an input does not fit.

    Example:
        >>> import torch
        >>> from kexue_nystromformer import NystromAttention
        >>> layer = NystromAttention(64, num_heads=4, num_landmarks=16)
        >>> lengths = torch.tensor([1000, 300])
        >>> mask = torch.arange(1000) < lengths[:, None]
        >>> layer(torch.randn(2, 1000, 64), mask).shape
        torch.Size([2, 1000, 64])

    References:
        - https://kexue.fm/archives/8180
        - Xiong et al., Nyströmformer, AAAI 2021, https://arxiv.org/abs/2102.03902
    """

    def __init__(
        self,
        num_features: int,
        num_heads: int = 8,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        conv_kernel: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_count(_OWNER, "num_features", num_features, least=1)
        check_count(_OWNER, "num_heads", num_heads, least=1)
        check_count(_OWNER, "num_landmarks", num_landmarks, least=1)
        check_count(_OWNER, "iterations", iterations, least=0)
        if num_features % num_heads:
            raise ArgumentError(
                f"`num_heads` of {_OWNER} must divide num_features = {num_features}. "
                f"Found {num_heads}.",
                argument="num_heads",
            )
        self.num_features = num_features
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.iterations = iterations
        self.in_proj_weight = nn.Parameter(torch.empty(3 * num_features, num_features))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * num_features)) if bias else None
        self.out_proj = nn.Linear(num_features, num_features, bias=bias)
        self.conv = None if conv_kernel is None else _depthwise(num_heads, conv_kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as ``torch.nn.MultiheadAttention`` does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.conv is not None:
            self.conv.reset_parameters()

    @classmethod
    def from_multihead(
        cls,
        attention: nn.MultiheadAttention,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        conv_kernel: int | None = None,
    ) -> NystromAttention:
        """Return a layer with a copy of the weights of exact attention.

        Dropout of attention weights is left out, since they are never formed. A convolution starts
        at 0.

        Args:
            attention: The module; keys and values as wide as queries, no ``add_bias_kv`` and no
                ``add_zero_attn``. The layer is batch-first whether it is or not.
            num_landmarks: m.
            iterations: Steps of the pseudo-inverse.
            conv_kernel: Width of the convolution.

        Raises:
            ArgumentError: If the module has something that this layer has not.
        """
        weight = attention.in_proj_weight
        if weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ArgumentError(
                f"`attention` of {_OWNER}.from_multihead must have keys and values of "
                f"embed_dim = {attention.embed_dim} features, no add_bias_kv and no "
                f"add_zero_attn. Found {attention}.",
                argument="attention",
            )
        layer = cls(
            attention.embed_dim,
            attention.num_heads,
            num_landmarks=num_landmarks,
            iterations=iterations,
            conv_kernel=conv_kernel,
            bias=attention.in_proj_bias is not None,
        ).to(weight.device, weight.dtype)
        state = attention.state_dict()
        if layer.conv is not None:
            state["conv.weight"] = torch.zeros_like(layer.conv.weight)
        layer.load_state_dict(state)
        return layer.train(attention.training)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return (
            f"{self.num_features}, num_heads={self.num_heads}, "
            f"num_landmarks={self.num_landmarks}, iterations={self.iterations}, "
            f"bias={self.in_proj_bias is not None}"
        )

    def forward(
        self,
        features: Float[Tensor, "batch time feature"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time feature"]:
        """Return the new features, 0 at padding.

        Args:
            features: One vector per position.
            mask: True at real positions, wherever they are; all by default. What stands elsewhere
                is not seen, and real positions count as if they followed each other. Only the
                convolution sees their distance.
        """
        check_features(_OWNER, features, self.num_features)
        check_mask(_OWNER, mask, features)
        weights = self.in_proj_weight, self.out_proj.weight
        counts = {"num_heads": self.num_heads, "num_landmarks": self.num_landmarks}
        if mask is None and self.conv is None and worth_folding(features, *weights, **counts):
            inward = self.in_proj_weight, self.in_proj_bias
            outward = self.out_proj.weight, self.out_proj.bias
            return attend_folded(features, inward, outward, **counts, iterations=self.iterations)
        hidden = None if mask is None else ~mask[:, :, None]
        if hidden is not None:
            features = features.masked_fill(hidden, 0)
        projected = F.linear(features, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)
            for x in projected.chunk(3, 2)
        )
        out = attend(
            query,
            key,
            value,
            mask,
            scale=query.shape[-1] ** -0.5,
            num_landmarks=self.num_landmarks,
            iterations=self.iterations,
        )
        if self.conv is not None:
            if mask is not None:
                value = value.masked_fill(~mask[:, None, :, None], 0)
            out = out + self.conv(value)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out if hidden is None else out.masked_fill(hidden, 0)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return sequences of five, three and one positions, and two landmarks."""
        inputs: dict[str, Any] = {
            "features": torch.randn(3, 5, 4, generator=generator),
            "mask": torch.arange(5) < torch.tensor([5, 3, 1])[:, None],
        }
        params = {"num_features": 4, "num_heads": 2, "num_landmarks": 2, "conv_kernel": 3}
        return Example(params, inputs)


def _depthwise(num_heads: int, kernel: int) -> nn.Conv2d:
    """Return a convolution over time with one kernel per head."""
    check_count(_OWNER, "conv_kernel", kernel, least=1)
    if kernel % 2 == 0:
        raise ArgumentError(
            f"`conv_kernel` of {_OWNER} must be odd. Found {kernel}.", argument="conv_kernel"
        )
    return nn.Conv2d(
        num_heads, num_heads, (kernel, 1), padding=(kernel // 2, 0), groups=num_heads, bias=False
    )
