"""Transition matrices of texts, and of models through what they write."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError
from kexue_repetition.transitions import Transitions, with_float64

__all__ = ["checked_ids", "estimate_transitions", "numbered"]

Tokens = Sequence[Hashable]


def numbered(
    texts: Iterable[Tokens], tokens: Sequence[Hashable] | None = None
) -> tuple[Int[Tensor, "row time"], tuple[Hashable, ...]]:
    """Return texts as ids, and what the ids stand for, in the order in which they occur.

    Args:
        texts: Lists of tokens, or strings, whose tokens are their characters.
        tokens: A vocabulary that is known, to number by.

    Returns:
        Ids ``[row, time]``, right-padded with :data:`~kexue.core.PAD`, and the tokens.

    Raises:
        ArgumentError: If ``texts`` is a single string, or a token is not among ``tokens``.

    Example:
        >>> from kexue_repetition import numbered
        >>> ids, tokens = numbered(["忐忑", "忑"])
        >>> ids.tolist(), tokens
        ([[0, 1], [1, -1]], ('忐', '忑'))
    """
    if isinstance(texts, str):
        raise ArgumentError(
            "`texts` must be a list of texts. Found one text; put it in brackets.",
            argument="texts",
        )
    places: dict[Hashable, int] = {token: i for i, token in enumerate(tokens or ())}
    grow = tokens is None
    rows = []
    for number, text in enumerate(texts):
        if grow:
            rows.append([places.setdefault(token, len(places)) for token in text])
            continue
        try:
            rows.append([places[token] for token in text])
        except KeyError as error:
            raise ArgumentError(
                f"`texts` must be made of `tokens`. Found {error.args[0]!r} in text {number}.",
                argument="texts",
            ) from error
    ids = np.full((len(rows), max(map(len, rows), default=0)), PAD, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return torch.from_numpy(ids), tuple(places)


def checked_ids(ids: Tensor, name: str = "ids") -> Tensor:
    """Return ids as int64, once it is certain that they are rows with padding behind.

    Raises:
        ArgumentError: If they are not ``[row, time]``, hold fractions or negative numbers other
            than the padding, or have padding before a token.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.is_complex():
        found = f"{list(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(
            f"`{name}` must be whole numbers [row, time], right-padded with {PAD}. Found {found}.",
            argument=name,
        )
    ids = ids.long()
    padding = ids == PAD
    if bool((ids < PAD).any()) or bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ArgumentError(
            f"`{name}` must be at least 0, with {PAD} behind the end of a row only.", argument=name
        )
    return ids


def estimate_transitions(
    ids: Int[Tensor, "row time"],
    *,
    num_tokens: int | None = None,
    tokens: Sequence[Hashable] | None = None,
    eos_id: int | None = None,
    ended: bool | Bool[Tensor, " row"] = True,
    unseen: float = 0.0,
) -> Transitions:
    """Return the bigram decoder that texts look like: P_ij = count of ij / count of i.

    For a model that is no bigram decoder it is the best one by likelihood on what the model wrote
    (the post's P, of which each step of the model is a perturbation).

    Args:
        ids: Texts, right-padded with :data:`~kexue.core.PAD`, such as ``DecodeResult.sequences``.
        num_tokens: Size of the vocabulary; that of ``tokens``, or the largest id and one, by
            default.
        tokens: The names of the ids.
        eos_id: The end token, where the texts hold one: what follows it is not looked at.
        ended: Whether a row that reaches its last token without ``eos_id`` ended there, or was
            cut off; for all, or per row.
        unseen: Occurrences of something unseen that are added behind each token. Above 0 no
            transition is certain, so that R is finite.

    Returns:
        Transitions, with the shares of first tokens as ``start``.

    Raises:
        ArgumentError: If ids are not those of the vocabulary, or a setting is outside its range.

    Example:
        >>> import torch
        >>> from kexue_repetition import estimate_transitions
        >>> estimate_transitions(torch.tensor([[0, 1, 0, 1], [0, 0, 1, -1]])).dense()
        tensor([[0.2500, 0.7500],
                [0.3333, 0.0000]], dtype=torch.float64)
    """
    if not 0 <= unseen < float("inf"):
        raise ArgumentError(f"`unseen` must be at least 0. Found {unseen!r}.", argument="unseen")
    device = ids.device if isinstance(ids, Tensor) else None
    rows = checked_ids(ids).cpu().numpy()
    if num_tokens is None:
        num_tokens = len(tokens) if tokens is not None else int(rows.max(initial=-1)) + 1
    if rows.max(initial=-1) >= num_tokens or (tokens is not None and len(tokens) != num_tokens):
        raise ArgumentError(
            f"`num_tokens` must be above every id and the length of `tokens`. Found {num_tokens}, "
            f"the largest id {rows.max(initial=-1)}"
            + (f" and {len(tokens)} tokens." if tokens is not None else "."),
            argument="num_tokens",
        )
    inside, stops = _until_end(rows, eos_id, ended)
    kept = np.where(inside, rows, PAD)
    left, right = kept[:, :-1].ravel(), kept[:, 1:].ravel()
    both = (left >= 0) & (right >= 0)
    shape = (num_tokens, num_tokens)
    counts = sparse.coo_array((np.ones(both.sum()), (left[both], right[both])), shape=shape).tocsr()
    lengths = inside.sum(1)
    last = kept[np.arange(len(kept)), np.maximum(lengths - 1, 0)][(lengths > 0) & stops]
    totals = np.asarray(counts.sum(axis=1)).ravel() + np.bincount(last, minlength=num_tokens)
    totals = totals + np.where(totals > 0, unseen, 0.0)
    counts.data /= np.repeat(np.maximum(totals, 1e-300), np.diff(counts.indptr))
    first = kept[:, 0][lengths > 0] if kept.shape[1] else np.zeros(0, dtype=np.int64)
    start = np.bincount(first, minlength=num_tokens) / len(first) if len(first) else None
    names = None if tokens is None else tuple(tokens)
    where = None if device is None else with_float64(device)
    return Transitions(counts, names, start, where)


def _until_end(
    rows: np.ndarray, eos_id: int | None, ended: bool | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return which places come before the end, and which rows have one."""
    inside = rows != PAD
    stops = np.broadcast_to(np.asarray(ended), (len(rows),)).copy() if np.ndim(ended) == 0 else None
    if stops is None:
        stops = torch.as_tensor(ended).cpu().numpy().astype(bool)
    if stops.shape != (len(rows),):
        raise ArgumentError(
            f"`ended` must be one for all rows or of shape [row] = [{len(rows)}]. "
            f"Found {list(stops.shape)}.",
            argument="ended",
        )
    if eos_id is not None:
        ends = rows == eos_id
        inside &= np.cumsum(ends, axis=1) == 0
        stops = stops | ends.any(axis=1)
    return inside, stops
