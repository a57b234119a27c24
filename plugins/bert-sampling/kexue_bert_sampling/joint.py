"""A joint distribution as the masked language model that knows it.

A masked language model is asked for p(x_i | the tokens that are not masked). Of a table these are
sums and quotients. Chains over it have a law that can be counted, which no learned model has.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kexue.core import ArgumentError
from kexue.core.language import MaskedScorer

__all__ = ["JointScorer"]


class JointScorer(MaskedScorer):
    """The exact conditionals of a table, with masked tokens summed out.

    Args:
        logits: Logarithms of a joint distribution up to a constant, with an axis per place and as
            many entries as there are tokens; shorter axes lack the last tokens.

    Raises:
        ArgumentError: If it is no table of logits, or has NaN, +inf, or none above -inf.

    Example:
        >>> import torch
        >>> from kexue_bert_sampling import JointScorer
        >>> joint = JointScorer(torch.tensor([[0.1, 0.4], [0.3, 0.2]]).log())
        >>> ids = torch.tensor([[joint.mask_id, 1]])
        >>> joint(ids, None, torch.tensor([[0]])).softmax(-1)  # 0.4 and 0.2, normalised
        tensor([[[0.6667, 0.3333]]], dtype=torch.float64)
    """

    def __init__(self, logits: Tensor) -> None:
        if not logits.ndim or not logits.is_floating_point() or not logits.numel():
            raise ArgumentError(
                "`target` must be floating-point logits of shape [token] or [token, …, token]. "
                f"Found {logits.dtype} of shape {list(logits.shape)}.",
                argument="target",
            )
        table = logits.detach().double()
        if not (table < torch.inf).all() or not (table > -torch.inf).any():
            raise ArgumentError(
                "`target` must be -inf or a number everywhere, and a number somewhere. Found NaN, "
                "+inf, or -inf alone.",
                argument="target",
            )
        size = max(logits.shape)
        for axis in range(logits.ndim):  # a last entry for the mask: the others' sum
            missing = size - table.shape[axis]
            padding = [0] * (2 * (logits.ndim - 1 - axis)) + [0, missing]
            table = F.pad(table, padding, value=-torch.inf)
            table = torch.cat([table, table.logsumexp(axis, keepdim=True)], axis)
        self.mask_id = self.num_tokens = size
        self.max_length = logits.ndim
        self._flat = table.flatten()
        self._strides = torch.tensor(table.stride(), device=logits.device)

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self._flat.device

    def __call__(
        self,
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None,
        positions: Int[Tensor, "row position"],
    ) -> Float[Tensor, "row position token"]:
        """Return log p(x_i = ·, the other unmasked tokens) at the positions, in float64."""
        if ids.shape[1] != len(self._strides) or (mask is not None and not mask.all()):
            raise ArgumentError(
                f"`ids` must have a token for each of {len(self._strides)} places. Found "
                f"{ids.shape[1] if mask is None else sorted(set(mask.sum(1).tolist()))}.",
                argument="ids",
            )
        steps = self._strides[positions]  # [row, position]
        others = (ids * self._strides).sum(1, keepdim=True) - ids.gather(1, positions) * steps
        tokens = torch.arange(self.num_tokens, device=ids.device)
        return self._flat[others[..., None] + steps[..., None] * tokens]
