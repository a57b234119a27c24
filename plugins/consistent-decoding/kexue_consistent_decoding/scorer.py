"""The self-terminating layer step by step: a scorer around a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.language import NextTokenScorer, next_token_scorer
from kexue_consistent_decoding.ends import as_end_ids, steps_to_end
from kexue_consistent_decoding.terminating import check_epsilon, self_terminating

__all__ = ["SelfTerminating"]


class SelfTerminating(NextTokenScorer):
    """A language model behind the self-terminating layer: every search over it ends.

    What :class:`SelfTerminatingLayer` does over time, token by token, for any search of
    ``kexue.core.language``. The prompt is context (β = 1): the first new token is t = 0, so that
    within ``steps_to_end(epsilon)`` new tokens greedy search ends, whatever the prompt.

    Args:
        model: Whatever ``next_token_scorer`` takes, trained with :class:`SelfTerminatingLoss`.
        epsilon: ε, in [0, 1); that of the training.
        eos_id: The end token, or several; the model's own by default.

    Raises:
        ArgumentError: If ε is out of range, or the end token is not known.

    Example:
        >>> import torch
        >>> from kexue.core.language import generate
        >>> from kexue_consistent_decoding import SelfTerminating, steps_to_end
        >>> def never_ends(ids):  # the end token is 0, and its logit says: go on
        ...     return torch.tensor([50.0, 1.0, 2.0]).expand(len(ids), 3)
        >>> scorer = SelfTerminating(never_ends, epsilon=0.2, eos_id=0)
        >>> generate(scorer, torch.tensor([[1]]), max_new_tokens=99).tolist()
        [[2, 2, 0]]
        >>> steps_to_end(0.2)
        4

    References:
        - https://kexue.fm/archives/7500 and https://arxiv.org/abs/2002.02492
    """

    def __init__(
        self, model: Any, *, epsilon: float = 1e-3, eos_id: int | Sequence[int] | None = None
    ) -> None:
        check_epsilon("SelfTerminating", epsilon)
        self.scorer = next_token_scorer(model)
        given = self.scorer.eos_id if eos_id is None else eos_id
        if given is None:
            raise ArgumentError(
                "`eos_id` of SelfTerminating must be given: the model does not say its end token.",
                argument="eos_id",
            )
        self.epsilon = epsilon
        self.end_ids = as_end_ids("SelfTerminating", given)
        self.eos_id = self.end_ids[0] if len(self.end_ids) == 1 else self.end_ids
        self.max_length = self.scorer.max_length

    @property
    def steps_to_end(self) -> int:
        """Within how many new tokens greedy search ends."""
        return steps_to_end(self.epsilon, num_ends=len(self.end_ids))

    def room(self, prompt_length: int) -> int | None:
        """Return how many tokens may follow a prompt of so many; None for any number."""
        return self.scorer.room(prompt_length)

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read prompts; return log-probabilities of what follows, and the cache."""
        logits, inner = self.scorer.begin(prompt, mask)
        return self._next(logits, inner, None)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read one more token per row; return log-probabilities of what follows, and the cache."""
        inner, log_continue = cache
        logits, inner = self.scorer.advance(inner, tokens)
        return self._next(logits, inner, log_continue)

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        """Return the cache of some rows, each named any number of times."""
        inner, log_continue = cache
        return self.scorer.select(inner, rows), log_continue.index_select(0, rows)

    def _next(self, logits: Tensor, inner: Any, before: Tensor | None) -> tuple[Tensor, Any]:
        scores, log_continue = self_terminating(
            logits, before, eos_id=self.end_ids, epsilon=self.epsilon
        )
        return scores, (inner, log_continue)
