"""Two language models that know nothing of each other, one for each direction."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.language import NextTokenScorer, next_token_scorer
from kexue_bidirectional_decoding.scorer import BidirectionalScorer, Scores

__all__ = ["TwoModels"]


class TwoModels(BidirectionalScorer):
    """One language model that writes from the left, and one that writes from the right.

    The second was trained on targets whose tokens are turned round, on sources as they are. Both
    end with the same end token, begin with what they were trained to begin with, and have caches of
    their own. Neither looks at what the other has written: of the post's method this is the search
    from both ends and the choice between them, not the attention.

    Args:
        left: Whatever :func:`~kexue.core.language.next_token_scorer` takes: a model of transformers
            that generates, a function from ids ``[row, time]`` to logits, or a scorer.
        right: The same, of reversed targets, with the same tokens.
        end_id: The end token; by default the models' own.

    Raises:
        ArgumentError: If the end token is not known, or not one and the same.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import BidirectionalBeam, TwoModels
        >>> def up(ids):  # 4 5 6, and 3 ends
        ...     return 9.0 * torch.eye(8)[torch.tensor([4, 0, 0, 0, 5, 6, 3, 0])[ids[:, -1]]]
        >>> def down(ids):  # 6 5 4, and is surer
        ...     return 20.0 * torch.eye(8)[torch.tensor([6, 0, 0, 0, 3, 4, 5, 0])[ids[:, -1]]]
        >>> found = BidirectionalBeam().decode(
        ...     TwoModels(up, down, end_id=3), prompt=torch.tensor([[0]]))
        >>> found.tolist(), found.from_right.tolist()
        ([[4, 5, 6, 3]], [True])
    """

    def __init__(self, left: Any, right: Any, *, end_id: int | None = None) -> None:
        self.sides: tuple[NextTokenScorer, NextTokenScorer]
        self.sides = next_token_scorer(left), next_token_scorer(right)
        own = {side.eos_id for side in self.sides} if end_id is None else {end_id}
        if len(own) > 1 or not isinstance(end := next(iter(own)), int):
            raise ArgumentError(
                "`end_id` must be given: the models do not name one and the same end token. Found "
                f"{self.sides[0].eos_id} and {self.sides[1].eos_id}.",
                argument="end_id",
            )
        self.start_id = self.end_id = end

    @property
    def begins(self) -> None:
        """Nothing: the models may write any token, as they may alone."""
        return

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens the model with less room can write."""
        rooms = [room for side in self.sides if (room := side.room(prompt_length)) is not None]
        return max(min(rooms), 0) if rooms else None

    def begin(
        self,
        prompt: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        lengths: Int[Tensor, " row"] | None = None,
    ) -> Any:
        """Read the sources by both models; known lengths are of no use to them."""
        del lengths
        read = [side.begin(prompt, mask) for side in self.sides]
        sizes = [logits.shape[-1] for logits, _ in read]
        if sizes[0] != sizes[1]:
            raise ArgumentError(
                "`right` must have the tokens of `left`. Found "
                f"{sizes[1]} of them, and {sizes[0]} of `left`.",
                argument="right",
            )
        return self._cache(read, len(prompt))

    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "side row own"],
        stopped: Bool[Tensor, "side row own"] | None = None,
    ) -> Any:
        """Read one more token per hypothesis; what has ended reads on, which nobody looks at."""
        if stopped is not None:
            tokens = tokens.masked_fill(stopped, self.end_id)
        caches, _ = cache
        read = [
            side.advance(cache, ids.flatten())
            for side, cache, ids in zip(self.sides, caches, tokens, strict=True)
        ]
        return self._cache(read, tokens.shape[1])

    def pairs(self, cache: Any) -> Scores:
        """Return each side's logits, the same for all hypotheses of the other."""
        logits: Float[Tensor, "side row own token"] = cache[1]
        return logits[:, :, :, None].expand(-1, -1, -1, logits.shape[2], -1)

    def select(self, cache: Any, hypotheses: Int[Tensor, "side row own"]) -> Any:
        """Return hypotheses."""
        caches, logits = cache
        before = logits.shape[1] * logits.shape[2]
        selected = [
            side.select(part, places.flatten() - i * before)
            for i, (side, part, places) in enumerate(
                zip(self.sides, caches, hypotheses, strict=True)
            )
        ]
        return selected, logits.flatten(0, 2)[hypotheses]

    @staticmethod
    def _cache(read: list[tuple[Tensor, Any]], rows: int) -> Any:
        logits = torch.stack([logits.view(rows, -1, logits.shape[-1]) for logits, _ in read])
        return [cache for _, cache in read], logits
