"""The transition matrix of a model, through what it writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError
from kexue.core.language import draw, generate, next_token_scorer, truncate
from kexue_repetition.estimation import estimate_transitions
from kexue_repetition.transitions import Transitions
from kexue_repetition.truncation import check_truncation

__all__ = ["model_transitions"]


def model_transitions(
    model: Any,
    prompt: Int[Tensor, "row time"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "row time"] | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    unseen: float = 0.0,
    rows_at_once: int = 256,
    generator: torch.Generator | None = None,
) -> tuple[Transitions, Int[Tensor, "row time"]]:
    """Let a model write, and return the bigram decoder that it looks like.

    The matrix is that of all its steps together: where the model is no bigram decoder, it says how
    often each token came after each, whatever was before. Texts that were cut off by
    ``max_new_tokens`` have no end.

    Args:
        model: Whatever ``kexue.core.language.next_token_scorer`` takes: a model of transformers, a
            function or module from ids to logits, or a scorer.
        prompt: Ids; for an encoder-decoder the source.
        max_new_tokens: Tokens to write at most.
        mask: True at real tokens of the prompts; all are by default.
        samples: Texts per prompt.
        temperature: Of the sampling.
        top_k: Candidates at each step; 0 for all, 1 for greedy decoding.
        top_p: Mass of the nucleus.
        eos_id: The end token; the model's own by default.
        unseen: As for :func:`~kexue_repetition.estimate_transitions`.
        rows_at_once: Texts that are written at the same time.
        generator: Source of randomness; the global one by default.

    Returns:
        The matrix over the tokens of the model, and the texts, the end token left out, right-padded
        with :data:`~kexue.core.PAD`.

    Raises:
        ArgumentError: If a setting is outside its range, or the model cannot read the prompt.

    Example:
        >>> import torch
        >>> from kexue_repetition import model_transitions
        >>> def model(ids):  # counts up, and ends with 3
        ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 4, 4) * 100.0
        >>> found, texts = model_transitions(model, torch.tensor([[0]]), max_new_tokens=5, eos_id=3)
        >>> texts
        tensor([[1, 2]])
        >>> found.dense()[1]
        tensor([0., 0., 1., 0.], dtype=torch.float64)
    """
    check_truncation(temperature, top_k, top_p)
    for name, value in (("samples", samples), ("rows_at_once", rows_at_once)):
        if value < 1:
            raise ArgumentError(f"`{name}` must be at least 1. Found {value}.", argument=name)
    scorer = next_token_scorer(model)
    end = eos_id if eos_id is not None else scorer.eos_id
    ends = torch.tensor([] if end is None else end, dtype=torch.long, device=prompt.device)
    size = 0

    def choose(logits: Tensor, source: Any) -> Tensor:
        nonlocal size
        size = logits.shape[-1]
        kept = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        return draw(kept, source)

    repeated = prompt.repeat_interleave(samples, 0)
    masks = None if mask is None else mask.repeat_interleave(samples, 0)
    parts, ended = [], []
    for begin in range(0, len(repeated), rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        found = generate(
            scorer,
            repeated[rows],
            mask=None if masks is None else masks[rows],
            max_new_tokens=max_new_tokens,
            eos_id=end,
            choose=choose,
            generator=generator,
        )
        parts.append(found.sequences)
        ended.append(found.ended)
    longest = max((part.shape[1] for part in parts), default=0)
    ids = torch.full((len(repeated), longest), PAD, device=prompt.device)
    for number, part in enumerate(parts):
        ids[number * rows_at_once :][: len(part), : part.shape[1]] = part
    ids = ids.masked_fill(torch.isin(ids, ends).cumsum(1) > 0, PAD)
    ids = ids[:, : int((ids != PAD).sum(1).max()) if len(ids) else 0]
    stops: Any = torch.cat([e for e in ended if e is not None]) if ended else torch.zeros(0)
    transitions = estimate_transitions(
        ids, num_tokens=max(size, 1), ended=stops.bool(), unseen=unseen
    )
    return transitions, ids
