"""End tokens: which they are, whether generation came to one, and when it has to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kexue.core.device import widest_float
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import DecodeResult

__all__ = [
    "as_end_ids",
    "ends_tensor",
    "log_end_floor",
    "non_termination_ratio",
    "steps_to_end",
]


def as_end_ids(owner: str, eos_id: int | Sequence[int]) -> tuple[int, ...]:
    """Return the end tokens as a tuple of different ids.

    Args:
        owner: Whom errors name.
        eos_id: One or several.

    Raises:
        ArgumentError: If there is none, or one is no id.
    """
    given = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given)
    if not given or not whole:
        raise ArgumentError(
            f"`eos_id` of {owner} must be a token id, or several. Found {eos_id!r}. "
            "Of a tokenizer it is tokenizer.eos_token_id.",
            argument="eos_id",
        )
    return tuple(dict.fromkeys(given))


def check_end_ids(owner: str, ends: Sequence[int], tokens: int) -> None:
    """Refuse end tokens that a model does not have, or that leave no other token.

    Args:
        owner: Whom errors name.
        ends: Their ids.
        tokens: Tokens of the model.

    Raises:
        ArgumentError: If that is so.
    """
    if max(ends) >= tokens or len(ends) >= tokens:
        raise ArgumentError(
            f"`eos_id` of {owner} must be among the model's {tokens} tokens, and not all of them. "
            f"Found {', '.join(map(str, ends))}: no text would ever end there.",
            argument="eos_id",
        )


@lru_cache(maxsize=64)
def _ends_tensor(ends: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ends, dtype=torch.long, device=device)


def ends_tensor(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """Return end tokens as a tensor, copied to a device once."""
    if torch.compiler.is_compiling():
        return torch.tensor(ends, dtype=torch.long, device=device)
    return _ends_tensor(ends, device)


def non_termination_ratio(found: DecodeResult | Bool[Tensor, " row"]) -> float:
    """Return the share of texts that did not come to their end token.

    The measure of the paper (section 6), an estimate of the probability of an infinite text once
    ``max_new_tokens`` is large.

    Args:
        found: What ``generate``, ``beam_search``, a sampler or a decoder returned, or its
            ``ended``, shape ``[row]``.

    Returns:
        A number from 0 to 1; NaN of no rows.

    Raises:
        ArgumentError: If the result does not say which rows have ended.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import non_termination_ratio
        >>> non_termination_ratio(torch.tensor([True, True, False, True]))
        0.25
    """
    ended = found.ended if isinstance(found, DecodeResult) else found
    if not isinstance(ended, Tensor) or ended.dtype is not torch.bool or ended.ndim != 1:
        raise ArgumentError(
            "`found` must be a DecodeResult of text, or bool of shape [row]: which rows have "
            f"ended. Found {type(ended).__name__}.",
            argument="found",
        )
    return 1.0 - float(ended.double().mean())


def steps_to_end(epsilon: float, *, width: int = 1, num_ends: int = 1) -> int:
    """Return within how many tokens a search ends under the self-terminating layer.

    At the n-th new token p(end) ≥ 1 - (1-ε)^n (the post's last inequality, n = t + 1). Above 1/2 no
    other token can be the best, so that greedy search ends at the first n > -ln 2 / ln(1-ε). Of m
    end tokens the best has at least a m-th of their probability, which is the greatest of all
    from n > -ln(m+1) / ln(1-ε). From then on every step of a beam search without a length penalty
    completes a text that is at least as probable as all that go on, so that it ends ``width`` - 1
    tokens later at the latest.

    Args:
        epsilon: ε, in (0, 1).
        width: Beams; 1 for greedy search.
        num_ends: m, how many end tokens there are.

    Returns:
        Tokens, the end token included.

    Raises:
        ArgumentError: If an argument is out of range. Without an ε above 0 there is no bound.

    Example:
        >>> from kexue_consistent_decoding import steps_to_end
        >>> [steps_to_end(epsilon) for epsilon in (1e-2, 1e-3, 1e-4)]
        [69, 693, 6932]
    """
    if not 0 < epsilon < 1:
        raise ArgumentError(
            f"`epsilon` must be in (0, 1) for a bound to exist. Found {epsilon!r}.",
            argument="epsilon",
        )
    for name, value in (("width", width), ("num_ends", num_ends)):
        if value < 1:
            raise ArgumentError(f"`{name}` must be at least 1. Found {value!r}.", argument=name)
    return math.floor(math.log(num_ends + 1) / -math.log1p(-epsilon)) + width


def log_end_floor(
    weight: Float[Tensor, "token feature"],
    bias: Float[Tensor, " token"] | None,
    eos_id: int,
    *,
    bound: float = 1.0,
    norm: Literal["max", "euclidean"] = "max",
) -> float:
    """Return the log of a lower bound of p(end) of softmax(W h + b) over all bounded h.

    The constant behind the post's "bounded hidden vectors": with ‖h‖ ≤ r,
    p(end) ≥ 1 / Σ_v exp(r ‖w_v - w_end‖* + b_v - b_end), ‖·‖* the dual norm. Ancestral sampling,
    and truncated sampling that keeps the end token, then end with probability 1, after at most
    1/p tokens on average.

    Args:
        weight: W.
        bias: b; 0 by default.
        eos_id: The end token.
        bound: r.
        norm: In which norm the states are bounded: ``"max"`` for tanh (r = 1), ``"euclidean"`` for
            layer normalisation without scale (r = √feature).

    Returns:
        Nats; the average number of tokens is at most exp of its negative.

    Raises:
        ArgumentError: If shapes do not fit, or ``norm`` is another.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import log_end_floor
        >>> round(log_end_floor(torch.zeros(4, 8), None, 0), 4)  # 1/4, whatever the state
        -1.3863
    """
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        found = None if bias is None else list(bias.shape)
        raise ArgumentError(
            "`weight` must have shape [token, feature] and `bias` [token]. "
            f"Found {list(weight.shape)} and {found}.",
            argument="weight",
        )
    if norm not in {"max", "euclidean"}:
        raise ArgumentError(
            f"`norm` must be 'max' or 'euclidean'. Found {norm!r}.", argument="norm"
        )
    check_end_ids("log_end_floor", as_end_ids("log_end_floor", eos_id), len(weight))
    wide = widest_float(weight.device)
    exact = weight.detach().to(wide)
    offsets = exact.new_zeros(len(exact)) if bias is None else bias.detach().to(wide)
    dual = torch.linalg.vector_norm(exact - exact[eos_id], ord=1 if norm == "max" else 2, dim=1)
    return -float((bound * dual + offsets - offsets[eos_id]).logsumexp(0))
