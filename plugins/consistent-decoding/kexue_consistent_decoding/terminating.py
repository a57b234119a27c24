"""The self-terminating output layer: the probability of the end only grows, and tends to 1.

=============  ==================================================================================
symbol         name
=============  ==================================================================================
z_t            the logits of the end tokens, together: their logsumexp; for one token its logit
β_t            ``log_factor``: (1-ε) sigmoid(z_t), the post's σ(w_end·h_t + b_end); here a *high*
               logit of the end token means to go on
α_t            ``log_continue``: β_0 ⋯ β_t, the probability of anything but an end
=============  ==================================================================================

p(end at t) = 1 - α_t ≥ 1 - (1-ε)^(t+1), and another token v has α_t softmax(logits without ends)_v.
All is computed as logarithms: log α_t is a sum over time, log p(end) = log(-expm1(log α_t)).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kexue.core.device import widest_float
from kexue.core.errors import ArgumentError
from kexue_consistent_decoding.ends import as_end_ids, check_end_ids, ends_tensor

__all__ = ["check_epsilon", "log_continuation", "log_end", "self_terminating"]

_HALF = -0.6931471805599453  # log 1/2: where the two forms of log(1 - e^a) are alike exact


def self_terminating(
    logits: Float[Tensor, "row token"],
    log_continue: Float[Tensor, " row"] | None = None,
    *,
    eos_id: int | Sequence[int],
    epsilon: float = 1e-3,
) -> tuple[Float[Tensor, "row token"], Float[Tensor, " row"]]:
    """Return the log-probabilities of the next token, and the state after it.

    One step of :class:`~kexue_consistent_decoding.SelfTerminatingLayer`, which does all at once.

    Args:
        logits: Scores of the next token; those of the end tokens say how likely it is to go on.
            Where they are -∞ the end is forbidden: the step counts as none.
        log_continue: log α of the step before; None before the first.
        eos_id: The end token, or several.
        epsilon: ε, in [0, 1).

    Returns:
        Log-probabilities in nats, at least float32, and log α.

    Raises:
        ArgumentError: If an argument is out of range, or a shape does not fit.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import self_terminating
        >>> state = None
        >>> for _ in range(3):  # a model that never wants to end
        ...     scores, state = self_terminating(
        ...         torch.tensor([[99.0, 0.0, 0.0]]), state, eos_id=0, epsilon=0.1
        ...     )
        ...     print([round(p, 4) for p in scores.exp()[0].tolist()])
        [0.1, 0.45, 0.45]
        [0.19, 0.405, 0.405]
        [0.271, 0.3645, 0.3645]
    """
    check_epsilon("self_terminating", epsilon)
    ends = as_end_ids("self_terminating", eos_id)
    if logits.ndim != 2 or (log_continue is not None and log_continue.shape != logits.shape[:1]):
        found = None if log_continue is None else list(log_continue.shape)
        raise ArgumentError(
            "`logits` of self_terminating must have shape [row, token] and `log_continue` [row]. "
            f"Found {list(logits.shape)} and {found}.",
            argument="logits",
        )
    check_end_ids("self_terminating", ends, logits.shape[-1])
    shown, after = log_continuation(logits[:, None], ends, epsilon, None, before=log_continue)
    return head(logits, shown[:, 0], ends), after[:, 0]


def check_epsilon(owner: str, epsilon: float) -> None:
    """Refuse an ε outside of [0, 1), and warn of 0, which guarantees nothing.

    Args:
        owner: Whom errors name.
        epsilon: ε.

    Raises:
        ArgumentError: If it is outside.
    """
    if not 0 <= epsilon < 1:
        raise ArgumentError(
            f"`epsilon` of {owner} must be in [0, 1). Found {epsilon!r}.", argument="epsilon"
        )
    if epsilon == 0 and not torch.compiler.is_compiling():
        warnings.warn(
            f"`epsilon` of {owner} is 0: nothing guarantees that a text ends.",
            UserWarning,
            stacklevel=3,
        )


def log_continuation(
    logits: Float[Tensor, "batch time token"],
    ends: tuple[int, ...],
    epsilon: float,
    mask: Bool[Tensor, "batch time"] | None,
    *,
    context: int = 0,
    before: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Return log α at every position: as it is to be used there, and as it goes on.

    They differ where the text cannot end: in the context, and where the end tokens are at -∞.

    Args:
        logits: Scores of the token that follows each position.
        ends: The end tokens.
        epsilon: ε.
        mask: True at real positions; the others have no part in the product.
        context: How many real positions come first at which the text cannot end.
        before: log α before the first position; 0 by default.
    """
    wide = widest_float(logits.device)  # thousands of small terms
    z = logits[..., list(ends)].to(wide)
    z = z[..., 0] if len(ends) == 1 else z.logsumexp(-1)
    closed = z.isneginf()
    if context:
        real = torch.ones_like(closed) if mask is None else mask
        closed = closed | (real & (real.cumsum(1) <= context))
    out = closed if mask is None else closed | ~mask
    factor = torch.log1p(torch.as_tensor(-epsilon, dtype=wide, device=z.device))
    log_factor = factor + F.logsigmoid(z.masked_fill(closed, 0.0))
    after = log_factor.masked_fill(out, 0.0).cumsum(1)
    if before is not None:
        after = after + before.to(wide)[:, None]
    return after.masked_fill(closed, 0.0), after


def log_end(log_continue: Float[Tensor, " *batch"]) -> Float[Tensor, " *batch"]:
    """Return log(1 - α) of log α ≤ 0; -∞, without a gradient, at 0."""
    open_ = log_continue < 0
    a = torch.where(open_, log_continue, -1.0)
    near = torch.log(-torch.expm1(a.clamp(min=_HALF)))
    far = torch.log1p(-torch.exp(a.clamp(max=_HALF)))
    return torch.where(a > _HALF, near, far).masked_fill(~open_, -torch.inf)


def head(
    logits: Float[Tensor, "*batch token"], log_continue: Tensor, ends: tuple[int, ...]
) -> Float[Tensor, "*batch token"]:
    """Return log-probabilities of all tokens.

    Without a gradient the vocabulary is copied once and worked on in place.

    Args:
        logits: Scores.
        log_continue: log α, shape ``[*batch]``.
        ends: The end tokens.
    """
    if logits.dtype in {torch.float16, torch.bfloat16}:
        logits = logits.float()
    index = ends_tensor(ends, logits.device)
    p_end = log_end(log_continue)[..., None]
    shares = logits[..., list(ends)]
    if len(ends) > 1:
        p_end = p_end + shares.log_softmax(-1).masked_fill(shares.isneginf(), -torch.inf)
    p_end = p_end.to(logits.dtype)
    log_continue = log_continue[..., None].to(logits.dtype)
    if (logits.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        others = logits.index_fill(-1, index, -torch.inf).log_softmax(-1) + log_continue
        return others.index_copy(-1, index, p_end)
    found = logits.clone(memory_format=torch.contiguous_format).index_fill_(-1, index, -torch.inf)
    torch.log_softmax(found, -1, out=found)
    return found.add_(log_continue).index_copy_(-1, index, p_end)
