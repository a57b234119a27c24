"""Landmarks: the means of consecutive segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_nystromformer.checks import without_autocast

__all__ = ["Segments", "segment_means"]


class Segments(NamedTuple):
    """How the real positions of each row are divided.

    Of n real positions, m − n mod m segments get ⌊n/m⌋ and the others, at the end, one more. Where
    there are fewer positions than segments, the last ones hold one each and the first are empty.

    Args:
        members: Which positions a segment holds, shape ``[batch, segment, time]``.
        counts: How many, shape ``[batch, segment]``.
    """

    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, mask: Tensor, num_segments: int) -> Segments:
        """Divide the real positions of ``mask``, shape ``[batch, time]``."""
        real = mask.sum(-1, keepdim=True)
        short = real // num_segments
        number_of_short = num_segments - real % num_segments
        place = mask.cumsum(-1) - 1
        beyond = place - number_of_short * short
        segment = torch.where(
            beyond < 0, place // short.clamp(min=1), number_of_short + beyond // (short + 1)
        )
        every = torch.arange(num_segments, device=mask.device)
        counts = short + (every >= number_of_short)
        return cls((segment.unsqueeze(1) == every[:, None]) & mask.unsqueeze(1), counts)

    def means(self, features: Tensor) -> Tensor:
        """Return the means of ``[batch, head, time, feature]``, 0 for empty segments."""
        wide = torch.promote_types(features.dtype, torch.float32)  # sums of float16 may overflow
        with without_autocast(features.device.type):
            sums = torch.einsum("bst,bhtd->bhsd", self.members.to(wide), features.to(wide))
        return (sums / self.counts.clamp(min=1)[:, None, :, None]).to(features.dtype)


def even_means(features: Tensor, num_segments: int) -> Tensor:
    """Return the means of ``[batch, head, time, feature]``, every position real."""
    short, rest = divmod(features.shape[2], num_segments)
    if not rest:
        return _equal_means(features, num_segments)
    first, last = features.tensor_split([(num_segments - rest) * short], 2)
    return torch.cat([_equal_means(first, num_segments - rest), _equal_means(last, rest)], 2)


def _equal_means(features: Tensor, num_segments: int) -> Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)  # sums of float16 may overflow
    means = _divided(features, num_segments).mean(2, dtype=wide)
    return means.to(features.dtype).transpose(1, 2)


def _divided(features: Tensor, num_segments: int) -> Tensor:
    """Give each of these segments, all of one length, an axis: ``[batch, segment, time, head, …]``.

    With the heads inside, as projections lie, a position is read as one piece.
    """
    batch, heads, time, width = features.shape
    shape = batch, num_segments, time // num_segments, heads, width
    return features.transpose(1, 2).view(shape)


def even_landmarks(features: Tensor, num_segments: int) -> tuple[Tensor, int]:
    """Return the means times a number, and this number.

    Where all segments have one length these are their sums: dividing them takes some 2 % of the
    time of attention at length 512, and the factors of later products do it for nothing.
    """
    length, rest = divmod(features.shape[2], num_segments)
    if rest:
        return even_means(features, num_segments), 1
    return _divided(features, num_segments).sum(2).transpose(1, 2), length


def add_shares(gradient: Tensor, upstream: Tensor) -> None:
    """Add to a gradient, ``[batch, head, time, feature]``, that of its :func:`even_landmarks`."""
    num_segments = upstream.shape[2]
    short, rest = divmod(gradient.shape[2], num_segments)
    if not rest:
        _divided(gradient, num_segments).add_(upstream.transpose(1, 2).unsqueeze(2))
        return
    split = num_segments - rest
    for start, segments, length in ((0, split, short), (split, rest, short + 1)):
        part = gradient.narrow(2, start * short, segments * length)
        share = upstream.narrow(2, start, segments) / length
        _divided(part, segments).add_(share.transpose(1, 2).unsqueeze(2))


def segment_means(
    features: Float[Tensor, "batch head time feature"],
    num_landmarks: int,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch head landmark feature"]:
    """Return the landmarks: the means of ``num_landmarks`` consecutive segments.

    Positions that are not real count for nothing, neither in the sums nor in the lengths.

    Args:
        features: Queries or keys. At padding they must be finite.
        num_landmarks: m, positive. Without a mask, at most the length.
        mask: True at real positions; all by default. A row with fewer than m of them gets empty
            segments, whose mean is 0.

    Raises:
        ArgumentError: If ``num_landmarks`` is not positive, or beyond the length.

    Example:
        >>> import torch
        >>> from kexue_nystromformer import segment_means
        >>> segment_means(torch.arange(5.0).view(1, 1, 5, 1), 2).flatten()
        tensor([0.5000, 3.0000])
    """
    time = features.shape[2]
    if num_landmarks < 1 or (mask is None and num_landmarks > time):
        raise ArgumentError(
            f"`num_landmarks` of segment_means must be from 1 to the length, {time}. "
            f"Found {num_landmarks}.",
            argument="num_landmarks",
        )
    if mask is None:
        return even_means(features, num_landmarks)
    return Segments.of(mask, num_landmarks).means(features)
