"""Targets of two directions, and the loss of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.language import aligned, check_prompt

__all__ = [
    "BidirectionalTargets",
    "bidirectional_cross_entropy",
    "make_bidirectional",
    "reverse_rows",
]


class BidirectionalTargets(NamedTuple):
    """What two decoders read and are to write, position by position.

    Args:
        left_in: Shape ``[row, time + 1]``: the start token, and the target; 0 behind its end.
        left_out: The target and the end token; PAD behind.
        right_in: The end token, and the target from its end; 0 behind.
        right_out: The target from its end, and the start token; PAD behind.
        lengths: Shape ``[row]``: tokens of each target, without start and end.
    """

    left_in: Tensor
    left_out: Tensor
    right_in: Tensor
    right_out: Tensor
    lengths: Tensor


def reverse_rows(
    ids: Int[Tensor, "row time"], lengths: Int[Tensor, " row"]
) -> Int[Tensor, "row time"]:
    """Return rows with their first ``lengths`` tokens in reverse; what is behind stays there.

    Args:
        ids: Tokens, padding on the right.
        lengths: How many are real.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import reverse_rows
        >>> reverse_rows(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])).tolist()
        [[7, 6, 5], [9, 8, 0]]
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    mirrored = lengths[:, None] - 1 - places
    return ids.gather(1, torch.where(mirrored >= 0, mirrored, places))


def make_bidirectional(
    ids: Int[Tensor, "row time"],
    mask: Bool[Tensor, "row time"] | None = None,
    *,
    start_id: int = 2,
    end_id: int = 3,
) -> BidirectionalTargets:
    """Return inputs and targets of both directions for teacher forcing.

    One pair of marks serves both: from the left a text goes from ``start_id`` to ``end_id``, from
    the right from ``end_id`` to ``start_id`` (https://kexue.fm/archives/6877).

    Args:
        ids: Targets without marks; what stands at padding does not matter.
        mask: True at real tokens, wherever they are; all are by default.
        start_id: What a text begins with.
        end_id: What a text ends with.

    Raises:
        ArgumentError: If the marks are the same, or shapes or types are others.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import make_bidirectional
        >>> ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[True, True], [True, False]])
        >>> found = make_bidirectional(ids, mask)
        >>> found.left_in.tolist(), found.left_out.tolist()
        ([[2, 5, 6], [2, 7, 0]], [[5, 6, 3], [7, 3, -1]])
        >>> found.right_in.tolist(), found.right_out.tolist()
        ([[3, 6, 5], [3, 7, 0]], [[6, 5, 2], [7, 2, -1]])
    """
    check_marks(start_id, end_id)
    tokens, real = aligned(ids, check_prompt(ids, mask))
    tokens, lengths = tokens.long().masked_fill(~real, 0), real.sum(1)
    mirrored = reverse_rows(tokens, lengths)
    return BidirectionalTargets(
        _behind(start_id, tokens),
        _before(end_id, tokens, lengths),
        _behind(end_id, mirrored),
        _before(start_id, mirrored, lengths),
        lengths,
    )


def check_marks(start_id: int, end_id: int) -> None:
    """Refuse equal marks.

    Raises:
        ArgumentError: If they are.
    """
    if start_id == end_id:
        raise ArgumentError(
            f"`end_id` must be another token than `start_id`: each direction ends with what the "
            f"other begins with. Found {end_id} for both.",
            argument="end_id",
        )


def _behind(first: int, tokens: Tensor) -> Tensor:
    return F.pad(tokens, (1, 0), value=first)


def _before(last: int, tokens: Tensor, lengths: Tensor) -> Tensor:
    longer = F.pad(tokens, (0, 1))
    places = torch.arange(longer.shape[1], device=tokens.device)
    longer = longer.masked_fill(places == lengths[:, None], last)
    return longer.masked_fill(places > lengths[:, None], PAD)


def bidirectional_cross_entropy(
    left: Float[Tensor, "row time token"],
    right: Float[Tensor, "row time token"],
    targets: BidirectionalTargets,
) -> Float[Tensor, ""]:
    """Return the mean of both directions' cross-entropies, each in nats per token.

    The end of each text counts as a token. 0 for no tokens at all; float16 and bfloat16 are
    computed in float32.

    Args:
        left: Scores of what follows each of ``targets.left_in``.
        right: Scores of what follows each of ``targets.right_in``.
        targets: What :func:`make_bidirectional` returned.

    Raises:
        ArgumentError: If shapes do not fit.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import bidirectional_cross_entropy, make_bidirectional
        >>> targets = make_bidirectional(torch.tensor([[4, 5, 6]]))
        >>> bidirectional_cross_entropy(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), targets)
        tensor(2.0794)
    """
    parts = []
    for name, logits, wanted in (
        ("left", left, targets.left_out),
        ("right", right, targets.right_out),
    ):
        if logits.ndim != 3 or logits.shape[:2] != wanted.shape:
            raise ArgumentError(
                f"`{name}` must have shape [row, time, token] with the rows and positions of the "
                f"targets, {list(wanted.shape)}. Found {list(logits.shape)}.",
                argument=name,
            )
        exact = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(
            exact.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum"
        )
        parts.append(total / (wanted != PAD).sum().clamp(min=1))
    return (parts[0] + parts[1]) / 2
