"""The deterministic decoding algorithms of the post: greedy and beam search."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core import ArgumentError, Example
from kexue.core.interfaces.decoder import Decoder, DecodeResult
from kexue.core.language import beam_search, generate
from kexue_consistent_decoding.ends import as_end_ids

__all__ = ["Beam", "Greedy", "TextDecoder", "count_to_four"]


def count_to_four(ids: Tensor) -> Tensor:
    """Return logits of a model of five tokens that counts, and ends with 0 behind 4."""
    return 4 * torch.nn.functional.one_hot((ids[:, -1] + 1) % 5, 5).float() + torch.arange(5) / 9


class TextDecoder(Decoder):
    """A search for the best text that a language model continues a prompt by.

    Args:
        eos_id: The end token, or several; those of the model by default.
    """

    compilable = False  # the search ends when its data say so

    def __init__(self, eos_id: int | Sequence[int] | None = None) -> None:
        self.end_ids = None if eos_id is None else as_end_ids(type(self).__name__, eos_id)

    def decode(
        self,
        scores: Any,
        prompt: Int[Tensor, "batch time"] | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        max_new_tokens: int = 200,
    ) -> DecodeResult:
        """Return the best continuation of each prompt, as far as the search finds it.

        Args:
            scores: A language model: whatever ``kexue.core.language.next_token_scorer`` takes.
            prompt: Ids; of an encoder-decoder the sources.
            mask: True at real tokens of the prompt; all are by default.
            max_new_tokens: How many tokens to add at most.

        Returns:
            The new tokens, the end token included, right-padded with PAD; their log-probability,
            in nats; and which have ended.

        Raises:
            ArgumentError: If an argument is out of range.
        """
        if prompt is None:
            raise ArgumentError(
                f"`prompt` of {type(self).__name__} must be given: token ids of shape [row, time].",
                argument="prompt",
            )
        return self._search(scores, prompt, mask=mask, max_new_tokens=max_new_tokens)

    @abstractmethod
    def _search(self, model: Any, prompt: Tensor, **given: Any) -> DecodeResult:
        """Search."""

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return a model that counts, and three prompts."""
        prompt = torch.randint(1, 5, (3, 4), generator=generator)
        mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
        given = {"scores": count_to_four, "prompt": prompt, "mask": mask, "max_new_tokens": 3}
        return Example({"eos_id": 0}, given)


class Greedy(TextDecoder):
    """Greedy search: the best token at every step.

    Inconsistent: a model that finds no end the best token goes on for ever, often in a loop. Over
    :class:`SelfTerminating` it ends within :func:`steps_to_end` tokens.

    Args:
        eos_id: The end token, or several; those of the model by default.

    Raises:
        ArgumentError: If ``eos_id`` is no token.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import Greedy
        >>> def count_up(ids):
        ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 5, 5).float()
        >>> found = Greedy(eos_id=0).decode(count_up, torch.tensor([[1], [3]]))
        >>> found.tolist(), found.ended.tolist()
        ([[2, 3, 4, 0], [4, 0]], [True, True])

    References:
        - https://kexue.fm/archives/7500
    """

    def __init__(self, *, eos_id: int | Sequence[int] | None = None) -> None:
        super().__init__(eos_id)

    def _search(self, model: Any, prompt: Tensor, **given: Any) -> DecodeResult:
        return generate(model, prompt, eos_id=self.end_ids, **given)


class Beam(TextDecoder):
    """Beam search: the ``width`` best texts at every step, completed ones set aside.

    Inconsistent like greedy search, which it is with one beam. Over :class:`SelfTerminating`,
    without a length penalty, it ends within ``steps_to_end(epsilon, width=width)`` tokens.

    Args:
        width: Beams.
        length_penalty: Completed texts are compared by their log-probability over this power of
            their length: 0 is the post's total score, 1 its average.
        num_return: Texts per prompt, best first, one below the other.
        eos_id: The end token, or several; those of the model by default.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import Beam
        >>> table = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.5, 0.4], [0.9, 0.05, 0.05]]).log()
        >>> prompt = torch.tensor([[1]])
        >>> found = Beam(width=2, eos_id=0).decode(lambda ids: table[ids[:, -1]], prompt)
        >>> found.tolist(), round(float(found.scores.exp()), 4)  # greedy search stays at 1
        ([[2, 0]], 0.36)

    References:
        - https://kexue.fm/archives/7500
    """

    def __init__(
        self,
        width: int = 4,
        *,
        length_penalty: float = 0.0,
        num_return: int = 1,
        eos_id: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(eos_id)
        for name, value, most in (
            ("width", width, None),
            ("num_return", num_return, width),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or (most is not None and value > most):
                above = "" if most is None else f", at most `width`, {most}"
                raise ArgumentError(
                    f"`{name}` of Beam must be a number, at least 1{above}. Found {value!r}.",
                    argument=name,
                )
        self.width = width
        self.length_penalty = length_penalty
        self.num_return = num_return

    def _search(self, model: Any, prompt: Tensor, **given: Any) -> DecodeResult:
        return beam_search(
            model,
            prompt,
            width=self.width,
            length_penalty=self.length_penalty,
            num_return=self.num_return,
            eos_id=self.end_ids,
            **given,
        )
