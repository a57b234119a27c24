"""Scheduled sampling: decoders that read their own predictions while they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue_exposure_bias.checks import check_ids, check_mask, check_number, check_share
from kexue_exposure_bias.randomness import BITS, Generators, coins, draw_bits, of_tokens

__all__ = [
    "exponential_decay",
    "inverse_sigmoid_decay",
    "linear_decay",
    "mix_predictions",
    "step_by_step",
]

Choose = Literal["greedy", "sample"]


def linear_decay(step: float, *, slope: float, start: float = 1.0, floor: float = 0.0) -> float:
    """Return the share of true tokens after some steps: max(floor, start - slope step).

    The schedules of section 2.4 of Bengio et al., 2015, https://arxiv.org/abs/1506.03099.

    Args:
        step: How many steps of training are done.
        slope: How much a step takes away, at least 0.
        start: The share at first.
        floor: The share at last.

    Raises:
        ArgumentError: If a share is outside [0, 1], or a number negative.

    Example:
        >>> from kexue_exposure_bias import linear_decay
        >>> [linear_decay(step, slope=0.25, floor=0.1) for step in (0, 2, 4)]
        [1.0, 0.5, 0.1]
    """
    owner = "linear_decay"
    check_number(owner, "step", step)
    check_number(owner, "slope", slope)
    return max(
        check_share(owner, "floor", floor), check_share(owner, "start", start) - slope * step
    )


def exponential_decay(step: float, *, base: float) -> float:
    """Return the share of true tokens after some steps: base^step.

    Args:
        step: How many steps of training are done.
        base: k of the paper, in [0, 1].

    Raises:
        ArgumentError: If ``base`` is outside [0, 1], or ``step`` negative.

    Example:
        >>> from kexue_exposure_bias import exponential_decay
        >>> exponential_decay(2, base=0.5)
        0.25
    """
    owner = "exponential_decay"
    return float(check_share(owner, "base", base) ** check_number(owner, "step", step))


def inverse_sigmoid_decay(step: float, *, scale: float) -> float:
    """Return the share of true tokens after some steps: k / (k + e^(step / k)).

    Args:
        step: How many steps of training are done.
        scale: k of the paper, at least 1; the share is about a half after k log k steps.

    Raises:
        ArgumentError: If ``scale`` is below 1, or ``step`` negative.

    Example:
        >>> from kexue_exposure_bias import inverse_sigmoid_decay
        >>> round(inverse_sigmoid_decay(0, scale=9), 3)
        0.9
    """
    owner = "inverse_sigmoid_decay"
    check_number(owner, "step", step)
    if check_number(owner, "scale", scale) < 1:
        raise ArgumentError(
            f"`scale` of {owner} must be at least 1. Found {scale!r}.", argument="scale"
        )
    return 1 / (1 + math.exp(min(step / scale, 700.0)) / scale)


def mix_predictions(
    tokens: Int[Tensor, "row time"],
    logits: Float[Tensor, "row time token"],
    true_share: float,
    *,
    mask: Bool[Tensor, "row time"] | None = None,
    choose: Choose = "greedy",
    generator: Generators = None,
) -> Int[Tensor, "row time"]:
    """Return the inputs of the second pass of scheduled sampling in two passes.

    The first pass reads the true tokens and gives ``logits``; the second reads, in the place of
    each but a row's first, with the probability 1 - ``true_share`` what the first pass predicted
    there. All positions at once, for decoders without a recurrence (Mihaylova and Martins, 2019);
    predictions follow true prefixes only, where :func:`step_by_step` lets errors follow errors.
    No gradient flows through the choice.

    Args:
        tokens: What the decoder reads in the first pass, start token first.
        logits: What it gave: at each position scores of the token behind it.
        true_share: Probability of the true token, in [0, 1]; from a schedule such as
            :func:`inverse_sigmoid_decay`.
        mask: True at real tokens; by default where ids are not negative.
        choose: ``"greedy"`` for the most probable token, or ``"sample"``.
        generator: Source of randomness: one for all rows, or a list with one per row; the global
            one by default.

    Raises:
        ArgumentError: If shapes or dtypes do not fit, or an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_exposure_bias import mix_predictions
        >>> tokens = torch.tensor([[0, 1, 2]])
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[3, 3, 3]])).float()
        >>> mix_predictions(tokens, logits, true_share=0.0)
        tensor([[0, 3, 3]])

    References:
        - Mihaylova and Martins, Scheduled Sampling for Transformers, 2019,
          https://arxiv.org/abs/1906.07651
    """
    owner = "mix_predictions"
    check_ids(owner, "tokens", tokens)
    check_mask(owner, "mask", mask, tokens.shape, "tokens")
    check_share(owner, "true_share", true_share)
    _check_choose(owner, choose)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ArgumentError(
            f"`logits` of {owner} must have shape [row, time, token], of `tokens` "
            f"{list(tokens.shape)}. Found {list(logits.shape)}.",
            argument="logits",
        )
    real = tokens >= 0 if mask is None else mask
    rank = real.cumsum(1)
    bits = of_tokens(draw_bits(owner, tokens, generator), rank)
    predicted = _chosen(logits.detach(), choose, bits.roll(-1, 1)).roll(1, 1)
    swapped = real & (rank > 1) & ~coins(bits, true_share)
    return torch.where(swapped, predicted.to(tokens.dtype), tokens)


def step_by_step(
    advance: Callable[[Any, Tensor], tuple[Tensor, Any]],
    cache: Any,
    tokens: Int[Tensor, "row time"],
    true_share: float,
    *,
    mask: Bool[Tensor, "row time"] | None = None,
    choose: Choose = "greedy",
    generator: Generators = None,
) -> Float[Tensor, "row time token"]:
    """Return the logits of a decoder that reads its own predictions, a token after the other.

    Scheduled sampling as Bengio et al. (2015) have it, for recurrent decoders: at each position but
    a row's first the decoder reads the true token with the probability ``true_share``, else what
    it has just predicted. With share 1 this is teacher forcing, with share 0 free running. Time
    steps in sequence; gradients flow through the states, not through the choices.

    Args:
        advance: A cache and ids ``[row]`` to logits ``[row, token]`` and the next cache, as
            ``advance`` of a :class:`kexue.core.language.NextTokenScorer`.
        cache: The decoder's state before the first token.
        tokens: What the decoder reads under teacher forcing, start token first; at least one time.
        true_share: Probability of the true token, in [0, 1].
        mask: True at real tokens; by default where ids are not negative. Padding is read as id 0
            and never replaced.
        choose: ``"greedy"`` for the most probable token, or ``"sample"``.
        generator: Source of randomness: one for all rows, or a list with one per row; the global
            one by default.

    Raises:
        ArgumentError: If shapes or dtypes do not fit, or an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_exposure_bias import step_by_step
        >>> table = torch.eye(4).roll(1, 1)  # after i comes i + 1
        >>> logits = step_by_step(lambda cache, ids: (table[ids], cache), None,
        ...                       torch.tensor([[0, 3, 3]]), true_share=0.0)
        >>> logits.argmax(-1)
        tensor([[1, 2, 3]])

    References:
        - Bengio et al., Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks,
          2015, https://arxiv.org/abs/1506.03099
    """
    owner = "step_by_step"
    check_ids(owner, "tokens", tokens)
    check_mask(owner, "mask", mask, tokens.shape, "tokens")
    check_share(owner, "true_share", true_share)
    _check_choose(owner, choose)
    if not tokens.shape[1]:
        raise ArgumentError(
            f"`tokens` of {owner} must have at least one time. Found shape {list(tokens.shape)}.",
            argument="tokens",
        )
    real = tokens >= 0 if mask is None else mask
    rank = real.cumsum(1)
    bits = of_tokens(draw_bits(owner, tokens, generator), rank)
    swapped = real & (rank > 1) & ~coins(bits, true_share)
    truth = tokens.long().where(real, 0)
    steps: list[Tensor] = []
    read = truth[:, 0]
    for time in range(tokens.shape[1]):
        if time:
            predicted = _chosen(steps[-1].detach(), choose, bits[:, time])
            read = torch.where(swapped[:, time], predicted, truth[:, time])
        logits, cache = advance(cache, read)
        steps.append(logits)
    return torch.stack(steps, 1)


def _chosen(logits: Tensor, choose: str, bits: Tensor) -> Tensor:
    """Return the best tokens, or draws of the softmax by the lower half of the bits."""
    if choose == "greedy" or not logits.numel():
        return logits.argmax(-1) if logits.numel() else logits.sum(-1).long()
    total = logits.double().softmax(-1).cumsum(-1)
    uniform = (bits & ((1 << BITS) - 1)) / (1 << BITS)
    # Scaled to the last sum, so that rounding leaves nothing beyond it.
    place = torch.searchsorted(total, (uniform * total[..., -1])[..., None], right=True)
    return place[..., 0].clamp(max=logits.shape[-1] - 1)


def _check_choose(owner: str, choose: str) -> None:
    if choose not in {"greedy", "sample"}:
        raise ArgumentError(
            f"`choose` of {owner} must be 'greedy' or 'sample'. Found {choose!r}.",
            argument="choose",
        )
