"""The self-terminating layer over whole sequences, and its loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kexue.core import ArgumentError, Example
from kexue.core.interfaces.layer import Layer
from kexue.core.interfaces.loss import Loss
from kexue_consistent_decoding.ends import as_end_ids, check_end_ids, ends_tensor, steps_to_end
from kexue_consistent_decoding.terminating import (
    check_epsilon,
    head,
    log_continuation,
    log_end,
)

__all__ = ["SelfTerminatingLayer", "SelfTerminatingLoss"]


class SelfTerminatingLayer(Layer):
    """From a model's logits to log-probabilities under which every search ends.

    Takes the place of log-softmax. With z_t the logit of the end token, α_t = Π_{i≤t} (1-ε)
    sigmoid(z_i): p(end at t) = 1 - α_t, and α_t is shared among the other tokens by a softmax
    without the end. Since p(end at t) ≥ 1 - (1-ε)^(t+1), greedy search ends within -ln 2 / ln(1-ε)
    tokens, whatever the weights are (:attr:`steps_to_end`).

    It costs likelihood where texts are longer than about 1/ε, or where the end is likely at some
    places only: p(end) can never fall again. Choose ε below a tenth of 1 / typical length. Several
    end tokens have 1 - α together, by the softmax of their logits, of which z is the logsumexp.

    Train with :class:`SelfTerminatingLoss`, decode with :class:`SelfTerminating`, both with this
    ε; a model that was not trained with it takes the end token's logit the other way around.
    There are no parameters. O(batch time token), one pass over the vocabulary more than
    log-softmax.

    Args:
        eos_id: The end token, or several; at any index.
        epsilon: ε, in [0, 1); 0 guarantees nothing, and warns.
        context_len: How many real positions come first, in every row, at which the text cannot
            end: β = 1 there. Those of the prompt, in training.

    Raises:
        ArgumentError: If an argument is out of range, or a shape does not fit.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import SelfTerminatingLayer
        >>> layer = SelfTerminatingLayer(eos_id=2, epsilon=0.25)
        >>> logits = torch.tensor([[[0.0, 0.0, 1.1], [9.0, 0.0, 50.0]]])
        >>> [[round(p, 3) for p in row] for row in layer(logits)[0].exp().tolist()]
        [[0.281, 0.281, 0.437], [0.422, 0.0, 0.578]]
        >>> layer.steps_to_end
        3

    References:
        - https://kexue.fm/archives/7500
        - Welleck et al., Consistency of a Recurrent Language Model With Respect to Incomplete
          Decoding, EMNLP 2020, section 5.2, https://arxiv.org/abs/2002.02492
    """

    def __init__(
        self, eos_id: int | Sequence[int], *, epsilon: float = 1e-3, context_len: int = 0
    ) -> None:
        super().__init__()
        self.end_ids = as_end_ids("SelfTerminatingLayer", eos_id)
        check_epsilon("SelfTerminatingLayer", epsilon)
        self.epsilon = epsilon
        self.context_len = _check_context("SelfTerminatingLayer", context_len)

    @property
    def steps_to_end(self) -> int:
        """Within how many tokens greedy search ends."""
        return steps_to_end(self.epsilon, num_ends=len(self.end_ids))

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        ends = self.end_ids[0] if len(self.end_ids) == 1 else self.end_ids
        return f"eos_id={ends}, epsilon={self.epsilon}, context_len={self.context_len}"

    def forward(
        self,
        logits: Float[Tensor, "batch time token"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Tensor:
        """Return log-probabilities of the token that follows each position, in nats.

        Args:
            logits: Scores of that token, from any model; -∞ for an end token forbids the end there,
                and the position counts as none.
            mask: True at real positions, in any pattern; all by default. The others have no part in
                the product; what is returned there is the softmax under the product so far.

        Returns:
            Shape ``[batch, time, token]``; float32 for float16 and bfloat16. -∞ for the end in the
            context.
        """
        _check_logits("SelfTerminatingLayer", logits, mask)
        check_end_ids("SelfTerminatingLayer", self.end_ids, logits.shape[-1])
        shown, _ = log_continuation(
            logits, self.end_ids, self.epsilon, mask, context=self.context_len
        )
        return head(logits, shown, self.end_ids)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences of logits over five tokens, the second of which is the end."""
        logits = torch.randn(3, 4, 5, generator=generator)
        mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
        return Example({"eos_id": 1, "epsilon": 0.01}, {"logits": logits, "mask": mask})


class SelfTerminatingLoss(Loss):
    """Negative log-likelihood of texts under the self-terminating layer.

    The cross-entropy of :class:`SelfTerminatingLayer`'s log-probabilities, without computing those
    of all tokens. A first batch without an end token among its targets brings a warning: with the
    end masked as padding, a model never learns to end.

    Args:
        eos_id: The end token, or several; at any index.
        epsilon: ε, in [0, 1); 0 guarantees nothing, and warns.
        context_len: How many real positions come first, in every row, at which the text cannot
            end: an end among their targets costs +∞.
        reduction: ``"mean"`` or ``"sum"`` over rows, ``"token_mean"`` over the real positions of
            all, or ``"none"``.

    Raises:
        ArgumentError: If an argument is out of range, or a shape does not fit.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import SelfTerminatingLoss
        >>> loss = SelfTerminatingLoss(eos_id=0, epsilon=0.5, reduction="none")
        >>> logits = torch.tensor([[[40.0, 0.0, 0.0], [40.0, 0.0, 0.0]]])
        >>> loss(logits, torch.tensor([[1, 0]])).exp()  # 1 / (1/2 · 1/2 · 3/4)
        tensor([5.3333])

    References:
        - https://kexue.fm/archives/7500 and https://arxiv.org/abs/2002.02492
    """

    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum", "token_mean")

    def __init__(
        self,
        eos_id: int | Sequence[int],
        *,
        epsilon: float = 1e-3,
        context_len: int = 0,
        reduction: Literal["none", "mean", "sum", "token_mean"] = "mean",
    ) -> None:
        super().__init__(reduction)
        self.end_ids = as_end_ids("SelfTerminatingLoss", eos_id)
        check_epsilon("SelfTerminatingLoss", epsilon)
        self.epsilon = epsilon
        self.context_len = _check_context("SelfTerminatingLoss", context_len)
        self._seen = False

    def forward(
        self,
        logits: Float[Tensor, "batch time token"],
        target: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Tensor:
        """Return the loss, in nats.

        Args:
            logits: Scores of the token that follows each position.
            target: That token. Below 0 (PAD, or the -100 of other libraries) there is none, as
                where ``mask`` is false.
            mask: True at real positions, in any pattern; all by default. The others have no part
                in the product, either.

        Returns:
            A scalar, or ``[batch]`` with ``reduction="none"``; at least float32.
        """
        _check_logits("SelfTerminatingLoss", logits, mask)
        tokens = logits.shape[-1]
        check_end_ids("SelfTerminatingLoss", self.end_ids, tokens)
        if target.shape != logits.shape[:2] or target.dtype.is_floating_point:
            raise ArgumentError(
                "`target` of SelfTerminatingLoss must be token ids of shape [batch, time] = "
                f"{list(logits.shape[:2])}. Found {target.dtype} of shape {list(target.shape)}.",
                argument="target",
            )
        real = target >= 0 if mask is None else mask & (target >= 0)
        wanted = target.masked_fill(~real, 0).long()
        index = ends_tensor(self.end_ids, logits.device)
        is_end = real & torch.isin(wanted, index)
        self._look(is_end, wanted, tokens)
        losses = self._losses(logits, wanted, is_end, real)
        rows = losses.masked_fill(~real, 0.0).sum(1)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "sum":
            return total
        count = real.sum().clamp(min=1) if self.reduction == "token_mean" else max(len(rows), 1)
        return total / count

    def _losses(self, logits: Tensor, wanted: Tensor, is_end: Tensor, real: Tensor) -> Tensor:
        """Return the cost of every position, anything where it is not real."""
        ends = self.end_ids
        if logits.dtype in {torch.float16, torch.bfloat16}:
            logits = logits.float()
        shown, _ = log_continuation(logits, ends, self.epsilon, real, context=self.context_len)
        index = ends_tensor(ends, logits.device)
        other = next(i for i in range(logits.shape[-1]) if i not in ends)
        kept = wanted.masked_fill(is_end, other)  # any other: it is not looked at
        without = logits.index_fill(-1, index, -torch.inf)
        cost = F.cross_entropy(without.flatten(0, 1), kept.flatten(), reduction="none")
        going_on = cost.view(kept.shape) - shown.to(cost.dtype)
        ending = -log_end(shown).to(cost.dtype)
        if len(ends) > 1:
            which = (wanted[..., None] == index).to(torch.uint8).argmax(-1, keepdim=True)
            shares = logits[..., list(ends)].log_softmax(-1)
            ending = ending - shares.gather(-1, which)[..., 0]
        return torch.where(is_end, ending, going_on)

    def _look(self, is_end: Tensor, wanted: Tensor, tokens: int) -> None:
        """Look at the first batch: are the targets tokens, and is an end among them."""
        if self._seen or torch.compiler.is_compiling() or not wanted.numel():
            return
        if int(wanted.max()) >= tokens:
            raise ArgumentError(
                f"`target` of SelfTerminatingLoss must be below {tokens}, the number of tokens. "
                f"Found {int(wanted.max())}.",
                argument="target",
            )
        self._seen = True
        if not bool(is_end.any()):
            warnings.warn(
                f"No end token ({', '.join(map(str, self.end_ids))}) is among the `target` of this "
                "batch of SelfTerminatingLoss. If none ever is, the model never learns to end; a "
                "padding id that is the end's own, masked, is a common cause.",
                UserWarning,
                stacklevel=4,
            )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three texts of five tokens, the second of which is the end."""
        logits = torch.randn(3, 4, 5, generator=generator)
        target = torch.tensor([[0, 2, 3, 1], [4, 1, -1, -1], [1, -1, -1, -1]])
        given: dict[str, Any] = {"logits": logits, "target": target, "mask": target >= 0}
        return Example({"eos_id": 1, "epsilon": 0.01}, given)


def _check_context(owner: str, context_len: int) -> int:
    if not isinstance(context_len, int) or isinstance(context_len, bool) or context_len < 0:
        raise ArgumentError(
            f"`context_len` of {owner} must be a number of positions, 0 or more. "
            f"Found {context_len!r}.",
            argument="context_len",
        )
    return context_len


def _check_logits(owner: str, logits: Tensor, mask: Tensor | None) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ArgumentError(
            f"`logits` of {owner} must be floating point of shape [batch, time, token]. "
            f"Found {logits.dtype} of shape {list(logits.shape)}.",
            argument="logits",
        )
    if mask is not None and (mask.shape != logits.shape[:2] or mask.dtype is not torch.bool):
        raise ArgumentError(
            f"`mask` of {owner} must be bool of shape [batch, time] = {list(logits.shape[:2])}. "
            f"Found {mask.dtype} of shape {list(mask.shape)}.",
            argument="mask",
        )
