"""Where chains start: a text, a text with gaps, or masks alone; and what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.language import MaskedScorer
from kexue_bert_sampling.randomness import Randomness

__all__ = ["Start", "check_init", "masked_rows", "start_of"]

_LENGTH = 4  # the purpose of random numbers that are lengths
_SHORTEST, _LONGEST = 8, 32  # of the post's author's example


@dataclass(frozen=True)
class Start:
    """Texts between the tokens that a model wants around them.

    Args:
        ids: Shape ``[chain, time]``, with the mask where there is padding.
        real: True at real tokens, shape ``[chain, time]``.
        free: True at tokens that are drawn, shape ``[chain, time]``.
        inside: True at tokens of the text, shape ``[chain, text]``.
        before: Tokens before the text.
    """

    ids: Tensor
    real: Tensor
    free: Tensor
    inside: Tensor
    before: int

    def texts(self, ids: Tensor) -> Tensor:
        """Return the texts in some ids, ``[chain, text]`` with PAD behind their ends."""
        text = ids[:, self.before : self.before + self.inside.shape[1]]
        return torch.where(self.inside, text, PAD)


def masked_rows(
    num_chains: int,
    scorer: MaskedScorer,
    *,
    low: int | None,
    high: int | None,
    around: int,
    owner: str,
    randomness: Randomness,
) -> Tensor:
    """Return masks of random lengths, ``[chain, text]`` with PAD behind their ends.

    Args:
        num_chains: How many rows.
        scorer: Whose masks.
        low: The least length; None for 8, or as long as it can be.
        high: The greatest; None for 32, or as long as it can be.
        around: Tokens around each text.
        owner: Who asks, as errors name it.
        randomness: Source of the lengths.

    Raises:
        ArgumentError: If the lengths are no range, or longer than the model can read.
    """
    room = None if scorer.max_length is None else scorer.max_length - around
    longest = min(max(0, room), max(_LONGEST, low or 0)) if room is not None else _LONGEST
    high = max(longest, low or 0) if high is None else high
    low = min(_SHORTEST, high) if low is None else low
    if low > high:
        raise ArgumentError(
            f"`min_length` of {owner} must be at most `max_length`. Found {low} and {high}.",
            argument="min_length",
        )
    check_room(high, scorer, around, owner, "max_length")
    chain = torch.arange(num_chains, device=randomness.device)
    uniform = randomness.uniform(_LENGTH, torch.zeros_like(chain), chain, torch.zeros_like(chain))
    lengths = low + (uniform * (high - low + 1)).long()
    widest = int(lengths.max()) if num_chains else high
    places = torch.arange(widest, device=randomness.device)
    return torch.where(places < lengths[:, None], scorer.mask_id, PAD)


def check_room(length: int, scorer: MaskedScorer, around: int, owner: str, name: str) -> None:
    """Refuse texts that are longer than the model can read.

    Raises:
        ArgumentError: If one is.
    """
    if scorer.max_length is not None and length + around > scorer.max_length:
        extra = f", {around} of them for what stands around a text" if around else ""
        raise ArgumentError(
            f"`{name}` of {owner} must fit the model, which reads {scorer.max_length} tokens"
            f"{extra}. Found {length}.",
            argument=name,
        )


def check_init(init: Tensor, num_chains: int | None, owner: str, device: torch.device) -> Tensor:
    """Return the texts that chains start from, a row for each.

    Args:
        init: Ids, shape ``[time]`` or ``[chain, time]``.
        num_chains: How many there must be; as many as there are if None.
        owner: Who asks, as errors name it.
        device: Where they are wanted.

    Raises:
        ArgumentError: If shape or type is another, there are other rows, or PAD is not at the end.
    """
    if init.ndim not in {1, 2} or init.is_floating_point() or init.dtype is torch.bool:
        raise ArgumentError(
            f"`init` of {owner} must be token ids of shape [time] or [chain, time]. Found "
            f"{init.dtype} of shape {list(init.shape)}.",
            argument="init",
        )
    rows = init.detach().to(device, torch.long)
    rows = rows[None] if rows.ndim == 1 else rows
    if num_chains is not None and len(rows) == 1:
        rows = rows.expand(num_chains, -1)
    if num_chains is not None and len(rows) != num_chains:
        raise ArgumentError(
            f"`init` of {owner} must have a row for each of {num_chains} chains, or one. Found "
            f"{len(rows)}.",
            argument="init",
        )
    inside = rows != PAD
    gap = bool((inside[:, 1:] & ~inside[:, :-1]).any())
    if gap or bool((rows < PAD).any()):
        raise ArgumentError(
            f"`init` of {owner} must be token ids, 0 or more, with {PAD} behind the end of rows "
            f"only. Found {'it elsewhere' if gap else int(rows.min())}.",
            argument="init",
        )
    return rows


def start_of(
    rows: Tensor,
    scorer: MaskedScorer,
    *,
    frozen: Tensor | None,
    prefix: Sequence[int],
    suffix: Sequence[int],
    owner: str,
) -> Start:
    """Put texts between what the model wants around them.

    Args:
        rows: Ids, shape ``[chain, text]``, with PAD behind their ends.
        scorer: The model.
        frozen: True at tokens that stay; shape ``[text]`` or ``[chain, text]``.
        prefix: Tokens before each text.
        suffix: Tokens behind each text.
        owner: Who asks, as errors name it.

    Raises:
        ArgumentError: If ``frozen`` has another shape or type, or keeps a mask; if a text is longer
            than the model can read.
    """
    inside = rows != PAD
    lengths = inside.sum(1, keepdim=True)
    check_room(
        int(lengths.max()) if len(rows) else 0, scorer, len(prefix) + len(suffix), owner, "init"
    )
    kept = _check_frozen(frozen, rows, scorer.mask_id, owner)
    num, time = rows.shape
    shape = (num, len(prefix) + time + len(suffix))
    ids = rows.new_full(shape, scorer.mask_id)
    ids[:, : len(prefix)] = rows.new_tensor(prefix)
    text = slice(len(prefix), len(prefix) + time)
    ids[:, text] = torch.where(inside, rows, scorer.mask_id)
    ends = len(prefix) + lengths
    places = torch.arange(shape[1], device=rows.device)
    behind = ends + torch.arange(len(suffix), device=rows.device)
    ids.scatter_(1, behind, rows.new_tensor(suffix).expand(num, -1))
    free = torch.zeros(shape, dtype=torch.bool, device=rows.device)
    free[:, text] = inside & ~kept
    return Start(ids, places < ends + len(suffix), free, inside, len(prefix))


def _check_frozen(frozen: Tensor | None, rows: Tensor, mask_id: int, owner: str) -> Tensor:
    if frozen is None:
        return torch.zeros_like(rows, dtype=torch.bool)
    if frozen.dtype is not torch.bool or frozen.shape not in {rows.shape, rows.shape[1:]}:
        raise ArgumentError(
            f"`frozen` of {owner} must be bool of shape {list(rows.shape)} or "
            f"{list(rows.shape[1:])}, as `init`. Found {frozen.dtype} of shape "
            f"{list(frozen.shape)}.",
            argument="frozen",
        )
    kept = frozen.to(rows.device).expand_as(rows)
    if bool((kept & (rows == mask_id)).any()):
        raise ArgumentError(
            f"`frozen` of {owner} must not keep a mask: it would never be drawn.", argument="frozen"
        )
    return kept
