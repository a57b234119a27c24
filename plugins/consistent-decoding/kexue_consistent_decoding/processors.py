"""The same for transformers' own ``generate``: logits processors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.errors import MissingDependencyError
from kexue_consistent_decoding.ends import as_end_ids
from kexue_consistent_decoding.samplers import TextSampler
from kexue_consistent_decoding.terminating import check_epsilon, self_terminating

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise MissingDependencyError(
        "A logits processor", "transformers", "pip install transformers"
    ) from error

__all__ = ["CandidatesLogitsProcessor", "SelfTerminatingLogitsProcessor"]

_NORMAL = 1e-4  # how near the sum of probabilities is to 1, if it is


class CandidatesLogitsProcessor(LogitsProcessor):
    """A sampler's candidates for ``generate(..., do_sample=True)``.

    transformers truncates once more behind it, by default to the 50 best tokens, which may lose the
    end again: call ``generate`` with ``top_k=0, top_p=1.0``.

    Args:
        sampler: A sampler with ``eos_id``, such as ``ConsistentTopK(50, eos_id=…)``.

    Raises:
        ArgumentError: If it is no sampler of this package.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import CandidatesLogitsProcessor, ConsistentNucleus
        >>> processor = CandidatesLogitsProcessor(ConsistentNucleus(0.6, eos_id=3))
        >>> processor(torch.tensor([[0]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
        tensor([[3., -inf, -inf, 0.]])
    """

    def __init__(self, sampler: TextSampler) -> None:
        if not isinstance(sampler, TextSampler):
            raise ArgumentError(
                "`sampler` of CandidatesLogitsProcessor must be one such as ConsistentTopK. "
                f"Found {type(sampler).__name__}.",
                argument="sampler",
            )
        self.sampler = sampler

    def __call__(  # type: ignore[override, unused-ignore]
        self, input_ids: Int[Tensor, "row time"], scores: Float[Tensor, "row token"]
    ) -> Float[Tensor, "row token"]:
        """Return scores that are above -∞ for the candidates alone.

        Args:
            input_ids: Not needed.
            scores: Of the next token.
        """
        del input_ids
        return self.sampler.candidates(scores)


class SelfTerminatingLogitsProcessor(LogitsProcessor):
    """The self-terminating layer for ``generate``, greedy or sampling: one object per call.

    Its state, log α, is per text. Rows that transformers reorders, repeats or drops are recognised
    by the tokens before them. Beam search takes softmaxes before it processes, which loses the
    logit that says to go on: that is refused; ``Beam`` over :class:`SelfTerminating` does it.

    Args:
        eos_id: The end token, or several.
        epsilon: ε, in [0, 1); that of the training.

    Raises:
        ArgumentError: If an argument is out of range, or scores are normalised already.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import SelfTerminatingLogitsProcessor
        >>> processor = SelfTerminatingLogitsProcessor(eos_id=0, epsilon=0.5)
        >>> for ids in ([[1]], [[1, 2]]):
        ...     found = processor(torch.tensor(ids), torch.tensor([[60.0, 1.0, 1.0]]))
        ...     print(found.exp().round(decimals=3).tolist())
        [[0.5, 0.25, 0.25]]
        [[0.75, 0.125, 0.125]]
    """

    def __init__(self, eos_id: int | Sequence[int], *, epsilon: float = 1e-3) -> None:
        self.end_ids = as_end_ids("SelfTerminatingLogitsProcessor", eos_id)
        check_epsilon("SelfTerminatingLogitsProcessor", epsilon)
        self.epsilon = epsilon
        self._before: tuple[Tensor, Tensor] | None = None

    def __call__(  # type: ignore[override, unused-ignore]
        self, input_ids: Int[Tensor, "row time"], scores: Float[Tensor, "row token"]
    ) -> Float[Tensor, "row token"]:
        """Return log-probabilities, in nats.

        Args:
            input_ids: The tokens so far, the prompt included.
            scores: Logits of the next token.
        """
        if len(scores) and bool(scores.double().logsumexp(-1).abs().max() < _NORMAL):
            raise ArgumentError(
                "`scores` of SelfTerminatingLogitsProcessor must be logits. Found log-probabilities"
                ", as beam search gives them: use Beam over SelfTerminating instead.",
                argument="scores",
            )
        found, after = self_terminating(
            scores, self._state(input_ids), eos_id=self.end_ids, epsilon=self.epsilon
        )
        self._before = (input_ids.clone(), after)
        return found

    def _state(self, ids: Tensor) -> Tensor | None:
        """Return log α of the rows that these texts come from; None at the first token."""
        if self._before is None:
            return None
        known, log_continue = self._before
        if ids.shape[1] != known.shape[1] + 1:
            return None
        same = (ids[:, None, :-1] == known).all(-1)  # [row, known row]
        if not bool(same.any(1).all()):
            return None
        return log_continue[same.to(torch.uint8).argmax(1)]
