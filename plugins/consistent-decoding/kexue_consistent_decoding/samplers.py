"""The stochastic decoding algorithms of the post: ancestral, top-k and nucleus sampling.

Each with its consistent form, whose candidates always include the end tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError, Example
from kexue.core.device import widest_float
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.interfaces.sampler import Sampler, Samples
from kexue.core.language import draw, generate, next_token_scorer, truncate
from kexue_consistent_decoding.ends import as_end_ids, check_end_ids, ends_tensor

__all__ = ["Ancestral", "ConsistentNucleus", "ConsistentTopK", "TextSampler", "consistent"]

Ends = tuple[int, ...] | None


def consistent(
    logits: Float[Tensor, "row token"],
    eos_id: int | Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Float[Tensor, "row token"]:
    """Return logits whose candidates alone are above -∞: the truncated ones, and the end tokens.

    A softmax of the result renormalises over them (definitions 3.1 and 3.2 of the paper).

    Args:
        logits: Scores of the next token; an end token at -∞ stays forbidden.
        eos_id: The end token, or several.
        temperature: What logits are divided by, above 0: at 0 nothing but the best is ever drawn.
        top_k: How many of the best stay; 0 for all.
        top_p: The least set of best tokens that has this probability stays; 1 for all.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import consistent
        >>> consistent(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 3, top_k=2)
        tensor([[3., 2., -inf, 0.]])
    """
    ends = as_end_ids("consistent", eos_id)
    if not temperature > 0:
        raise ArgumentError(
            f"`temperature` must be above 0. Found {temperature!r}: the end would never be drawn "
            "where it is not the best. Use greedy search over SelfTerminating.",
            argument="temperature",
        )
    check_end_ids("consistent", ends, logits.shape[-1])
    kept = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if kept is logits:
        return kept
    index = ends_tensor(ends, logits.device)
    return kept.index_copy_(-1, index, logits[..., list(ends)] / temperature)


class TextSampler(Sampler):
    """Draws the next token from some candidates: as it is, over a model, or as part of a search.

    An instance is what ``kexue.core.language.generate`` takes as ``choose``.

    Args:
        eos_id: The end token, or several; those of the model by default.
    """

    def __init__(self, eos_id: int | Sequence[int] | None = None) -> None:
        self.end_ids: Ends = None if eos_id is None else as_end_ids(type(self).__name__, eos_id)

    @abstractmethod
    def candidates(
        self, logits: Float[Tensor, "row token"], ends: Ends = None
    ) -> Float[Tensor, "row token"]:
        """Return logits that are above -∞ for the candidates alone.

        Args:
            logits: Scores of the next token.
            ends: The end tokens; those of the sampler by default.
        """

    def __call__(self, logits: Float[Tensor, "row token"], generator: Any = None) -> Tensor:
        """Draw one token per row.

        Args:
            logits: Scores of the next token.
            generator: Source of randomness, or one per row; the global one by default.

        Returns:
            Ids, shape ``[row]``.
        """
        return draw(self.candidates(logits), generator)

    def sample(
        self,
        target: Float[Tensor, " token"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw tokens from the scores of one step; :meth:`generate` draws texts from a model.

        Args:
            target: Scores of the next token.
            num_samples: How many draws.
            generator: Source of randomness; the global one by default.

        Returns:
            Ids, shape ``[sample]``, how many candidates there were, and their probability before
            the others were left out.

        Raises:
            ArgumentError: If ``target`` is not of that shape.
        """
        if not isinstance(target, Tensor) or target.ndim != 1 or not target.is_floating_point():
            given = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ArgumentError(
                f"`target` of {type(self).__name__} must be logits of shape [token]. "
                f"Found {given}. For texts of a language model call `generate`.",
                argument="target",
            )
        wide = target.to(widest_float(target.device))
        logits = self.candidates(wide[None])[0]
        cumulated = logits.softmax(0).cumsum(0)
        uniform = torch.rand(num_samples, generator=generator, device=wide.device, dtype=wide.dtype)
        found = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True)
        kept = ~logits.isneginf()
        figures = {
            "candidates": float(kept.sum()),
            "probability": float(wide.softmax(0)[kept].sum()),
        }
        return Samples(found.clamp_(max=len(target) - 1), figures)

    def generate(
        self,
        model: Any,
        prompt: Int[Tensor, "row time"],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 200,
        mask: Bool[Tensor, "row time"] | None = None,
        generator: Any = None,
        on_tokens: Callable[[Tensor, Tensor], object] | None = None,
    ) -> DecodeResult:
        """Draw texts that continue prompts.

        Args:
            model: Whatever ``kexue.core.language.next_token_scorer`` takes.
            prompt: Ids.
            num_samples: Texts per prompt, one below the other.
            max_new_tokens: How many tokens to add at most.
            mask: True at real tokens of the prompt; all are by default.
            generator: Source of randomness, or one per text.
            on_tokens: Called with the rows that go on and their tokens, after each step.

        Returns:
            The new tokens, the end token included, right-padded with PAD; their log-probability
            under the model, in nats; and which have ended.

        Raises:
            ArgumentError: If an argument is out of range, or no end token is known.
        """
        if num_samples < 1:
            raise ArgumentError(
                f"`num_samples` must be at least 1. Found {num_samples}.", argument="num_samples"
            )
        scorer = next_token_scorer(model)
        ends = self._ends(scorer.eos_id)
        rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(num_samples)
        return generate(
            scorer,
            prompt[rows],
            mask=None if mask is None else mask[rows],
            max_new_tokens=max_new_tokens,
            eos_id=ends,
            choose=partial(self._choose, ends),
            generator=generator,
            on_tokens=on_tokens,
        )

    def _choose(self, ends: Ends, logits: Tensor, generator: Any) -> Tensor:
        return draw(self.candidates(logits, ends), generator)

    def _ends(self, models: int | Sequence[int] | None) -> Ends:
        """Return the sampler's end tokens, else the model's."""
        name = type(self).__name__
        return self.end_ids or (None if models is None else as_end_ids(name, models))

    def __repr__(self) -> str:
        """Return the constructor's arguments."""
        given = {"eos_id": self.end_ids, **vars(self)}
        given.pop("end_ids")
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class _Consistent(TextSampler):
    """A sampler that always keeps the end tokens, and cannot be without one."""

    def __init__(self, eos_id: int | Sequence[int] | None, temperature: float) -> None:
        super().__init__(eos_id)
        consistent(torch.zeros(1, 2), 0, temperature=temperature)
        self.temperature = temperature

    @abstractmethod
    def _truncation(self) -> dict[str, Any]:
        """Return which tokens are candidates beside the ends, as :func:`consistent` takes it."""

    def candidates(
        self, logits: Float[Tensor, "row token"], ends: Ends = None
    ) -> Float[Tensor, "row token"]:
        """Return logits that are above -∞ for the candidates alone.

        Args:
            logits: Scores of the next token.
            ends: The end tokens; those of the sampler by default.
        """
        ends = self._needed(ends)
        return consistent(logits, ends, temperature=self.temperature, **self._truncation())

    def _needed(self, ends: Ends) -> tuple[int, ...]:
        found = ends or self.end_ids
        if found is None:
            raise ArgumentError(
                f"`eos_id` of {type(self).__name__} must be given: it is the token that always "
                "stays among the candidates, and the model does not say it.",
                argument="eos_id",
            )
        return found

    def _ends(self, models: int | Sequence[int] | None) -> Ends:
        return self._needed(super()._ends(models))


class Ancestral(TextSampler):
    """Ancestral sampling, and its truncations that may lose the end token: top-k and nucleus.

    Each token is drawn from the softmax of the scores, or from a part of it: the k best, the
    smallest set of best tokens that has probability p, or both. Truncated, it is inconsistent: as
    long as the end token is not among the candidates, a text goes on with certainty. This is what
    libraries call sampling; :class:`ConsistentTopK` and :class:`ConsistentNucleus` mend it.

    Args:
        top_k: How many of the best tokens are candidates; 0 for all, 1 for greedy search.
        top_p: The probability of the smallest set that is; 1 for all.
        temperature: What scores are divided by before; 0 leaves the best token.
        eos_id: The end token, or several; those of the model by default.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import Ancestral
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> drawn = Ancestral(top_p=0.8).sample(scores, 1000, generator=torch.manual_seed(0))
        >>> drawn.values.unique().tolist(), round(drawn.diagnostics["probability"], 3)
        ([0, 1], 0.881)

    References:
        - https://kexue.fm/archives/7500
        - Fan et al., 2018, https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al., 2019,
          https://arxiv.org/abs/1904.09751 (nucleus)
    """

    def __init__(
        self,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        eos_id: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(eos_id)
        truncate(torch.zeros(1, 1), temperature=temperature, top_k=top_k, top_p=top_p)
        self.top_k = top_k
        self.top_p = top_p
        self.temperature = temperature

    def candidates(
        self, logits: Float[Tensor, "row token"], ends: Ends = None
    ) -> Float[Tensor, "row token"]:
        """Return logits that are above -∞ for the candidates alone.

        Args:
            logits: Scores of the next token.
            ends: Not needed.
        """
        del ends
        return truncate(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return the scores of five tokens."""
        return Example({}, {"target": torch.randn(5, generator=generator), "num_samples": 100})


class ConsistentTopK(_Consistent):
    """Top-k sampling that always keeps the end token: it ends with probability 1.

    Candidates are the k best tokens and the end tokens, renormalised. For a model whose states are
    bounded, p(end) then has a positive lower bound at every step (:func:`log_end_floor`), so that
    generation ends almost surely; when, that does not say. A handful more candidates changes
    little else: the end is drawn as often as the model finds it probable. An end token at -∞ (a
    minimal length) stays forbidden.

    Args:
        k: How many of the best tokens are candidates, at least 1; from the vocabulary's size on it
            is ancestral sampling.
        eos_id: The end token, or several; those of the model by default.
        temperature: What scores are divided by before, above 0.

    Raises:
        ArgumentError: If an argument is out of range, or no end token is known.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import ConsistentTopK
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> sampler = ConsistentTopK(1, eos_id=3)
        >>> drawn = sampler.sample(scores, 1000, generator=torch.manual_seed(0))
        >>> drawn.values.unique().tolist(), round(drawn.diagnostics["probability"], 3)
        ([0, 3], 0.676)

    References:
        - https://kexue.fm/archives/7500
        - Welleck et al., 2020, definition 3.2, https://arxiv.org/abs/2002.02492
    """

    def __init__(
        self,
        k: int = 10,
        *,
        eos_id: int | Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(eos_id, temperature)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ArgumentError(
                f"`k` of ConsistentTopK must be a number of tokens, at least 1. Found {k!r}.",
                argument="k",
            )
        self.k = k

    def _truncation(self) -> dict[str, Any]:
        return {"top_k": self.k}

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return the scores of four tokens, the worst of which is the end: all are candidates."""
        target = torch.cat([torch.randn(3, generator=generator), torch.tensor([-3.0])])
        return Example({"k": 3, "eos_id": 3}, {"target": target, "num_samples": 100})


class ConsistentNucleus(_Consistent):
    """Nucleus (top-p) sampling that always keeps the end token: it ends with probability 1.

    Candidates are the smallest set of best tokens that has probability p, and the end tokens,
    renormalised; otherwise as :class:`ConsistentTopK`.

    Args:
        p: The probability that the best tokens must have, in (0, 1]; 1 is ancestral sampling.
        eos_id: The end token, or several; those of the model by default.
        temperature: What scores are divided by before, above 0.

    Raises:
        ArgumentError: If an argument is out of range, or no end token is known.

    Example:
        >>> import torch
        >>> from kexue_consistent_decoding import ConsistentNucleus
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> sampler = ConsistentNucleus(0.6, eos_id=3)
        >>> drawn = sampler.sample(scores, 1000, generator=torch.manual_seed(0))
        >>> drawn.values.unique().tolist(), drawn.diagnostics["candidates"]
        ([0, 3], 2.0)

    References:
        - https://kexue.fm/archives/7500
        - Welleck et al., 2020, definition 3.3, https://arxiv.org/abs/2002.02492
    """

    def __init__(
        self,
        p: float = 0.9,
        *,
        eos_id: int | Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(eos_id, temperature)
        if not 0 < p <= 1:
            raise ArgumentError(
                f"`p` of ConsistentNucleus must be in (0, 1]. Found {p!r}.", argument="p"
            )
        self.p = p

    def _truncation(self) -> dict[str, Any]:
        return {"top_p": self.p}

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return the scores of four tokens, the worst of which is the end: all are candidates."""
        target = torch.cat([torch.rand(3, generator=generator), torch.tensor([-4.0])])
        return Example({"p": 0.95, "eos_id": 3}, {"target": target, "num_samples": 100})
