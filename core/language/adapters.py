"""Models of all makes as scorers: plain functions, torch modules, and those of transformers.

transformers is not imported: its models are known by what they have.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.language.scorer import (
    FunctionMaskedScorer,
    FunctionScorer,
    MaskedScorer,
    NextTokenScorer,
    aligned,
    check_prompt,
    select_rows,
)

__all__ = ["masked_scorer", "next_token_scorer"]


def next_token_scorer(model: Any, *, start_id: int | None = None) -> NextTokenScorer:
    """Return what search needs of a model.

    Args:
        model: A :class:`NextTokenScorer`, which is returned as it is; a transformers model that
            generates, decoder-only or encoder-decoder, with its cache; or any function or module
            from ids ``[row, time]`` to logits ``[row, token]`` or ``[row, time, token]``, which is
            called on whole prefixes without padding.
        start_id: Token that every sequence begins with; of a transformers model its own by default,
            where a prompt is empty.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> import torch
        >>> from kexue.core.language import generate, next_token_scorer
        >>> def count_up(ids):
        ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 5, 5).float()
        >>> scorer = next_token_scorer(count_up)
        >>> generate(scorer, torch.tensor([[0], [2]]), max_new_tokens=3).tolist()
        [[1, 2, 3], [3, 4, 0]]
    """
    if isinstance(model, NextTokenScorer):
        return model
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "generate") and hasattr(model, "forward"):
        if getattr(config, "is_encoder_decoder", False):
            return _EncoderDecoder(model, start_id)
        if "past_key_values" in inspect.signature(model.forward).parameters:
            return _DecoderOnly(model, start_id)
        return FunctionScorer(
            model,
            start_id=start_id,
            eos_id=_one(config, "eos_token_id"),
            max_length=_positions(config),
        )
    if not callable(model):
        raise ArgumentError(
            "`model` must be a NextTokenScorer, a transformers model, or a function from ids "
            f"[row, time] to logits. Found {type(model).__name__}.",
            argument="model",
        )
    return FunctionScorer(model, start_id=start_id)


def masked_scorer(model: Any, *, mask_id: int | None = None) -> MaskedScorer:
    """Return what sampling from a masked language model needs of it.

    Args:
        model: A :class:`MaskedScorer`, which is returned as it is; a transformers masked language
            model; or any function or module from ids ``[row, time]`` to logits ``[row, time,
            token]``, which is called without padding.
        mask_id: The token that stands for an unknown one; needed where the model does not say it.

    Raises:
        ArgumentError: If it is none of these, or ``mask_id`` is missing.
    """
    if isinstance(model, MaskedScorer):
        return model
    if not callable(model):
        raise ArgumentError(
            "`model` must be a MaskedScorer, a transformers model, or a function from ids "
            f"[row, time] to logits. Found {type(model).__name__}.",
            argument="model",
        )
    config = getattr(model, "config", None)
    mask_id = getattr(config, "mask_token_id", None) if mask_id is None else mask_id
    if mask_id is None:
        raise ArgumentError(
            "`mask_id` must be given: the model does not say which token stands for an unknown "
            "one. Of a tokenizer it is tokenizer.mask_token_id.",
            argument="mask_id",
        )
    if config is not None and hasattr(model, "base_model"):
        return _Bert(model, int(mask_id))
    return FunctionMaskedScorer(model, mask_id=int(mask_id))


# -- transformers --------------------------------------------------------------------------------


class _DecoderOnly(NextTokenScorer):
    """A causal model of transformers; its cache mutates, which the contract allows."""

    def __init__(self, model: Any, start_id: int | None) -> None:
        self.model = model
        self.start_id = start_id
        self.eos_id = _one(model.config, "eos_token_id")
        self.max_length = _positions(model.config)
        self._takes = set(inspect.signature(model.forward).parameters)

    def room(self, prompt_length: int) -> int | None:
        return super().room(prompt_length + (self.start_id is not None))

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        mask = check_prompt(prompt, mask)
        start = self.start_id
        if start is None and not bool(mask.any(1).all()):
            start = _one(self.model.config, "bos_token_id")
            if start is None:
                check_prompt(prompt, mask, may_be_empty=False)
        if start is not None:
            empty = ~mask.any(1, keepdim=True)
            first = empty if self.start_id is None else torch.ones_like(empty)
            prompt = torch.cat([prompt.new_full((len(prompt), 1), start), prompt], 1)
            mask = torch.cat([first, mask], 1)
        ids, real = aligned(prompt, mask, right=True)  # then the last position is every row's last
        return self._forward(ids, real, None)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        past, mask = cache
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return self._forward(tokens[:, None], mask, past)

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        past, mask = cache
        return _selected(past, rows), mask.index_select(0, rows)

    def _forward(self, ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
        given: dict[str, Any] = {"attention_mask": mask.long(), "past_key_values": past}
        given |= {"use_cache": True, "return_dict": True}
        if "position_ids" in self._takes:
            places = mask.long().cumsum(1).sub(1).clamp(min=0)
            given["position_ids"] = places[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        out = self.model(input_ids=ids, **given)
        return out.logits[:, -1], (out.past_key_values, mask)


class _EncoderDecoder(NextTokenScorer):
    """An encoder-decoder of transformers: prompts are sources, and what follows is the target."""

    def __init__(self, model: Any, start_id: int | None) -> None:
        self.model = model
        config = model.config
        own = (_one(config, "decoder_start_token_id"), _one(config, "bos_token_id"))
        start = next((token for token in (start_id, *own) if token is not None), None)
        if start is None:
            raise ArgumentError(
                "`start_id` must be given: the model does not say what its targets begin with.",
                argument="start_id",
            )
        self.start_id = start
        self.eos_id = _one(config, "eos_token_id")
        self.max_length = _positions(config)

    def room(self, prompt_length: int) -> int | None:
        if self.max_length is None:
            return None
        return self.max_length - 1 if prompt_length <= self.max_length else -1

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        mask = check_prompt(prompt, mask, may_be_empty=False)
        ids, real = aligned(prompt, mask)
        encoded = self.model.get_encoder()(
            input_ids=ids, attention_mask=real.long(), return_dict=True
        ).last_hidden_state
        start = ids.new_full((len(ids),), self.start_id)
        return self.advance((None, encoded, real), start)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        past, encoded, mask = cache
        out = self.model(
            encoder_outputs=(encoded,),
            attention_mask=mask.long(),
            decoder_input_ids=tokens[:, None],
            past_key_values=past,
            use_cache=True,
            return_dict=True,
        )
        return out.logits[:, -1], (out.past_key_values, encoded, mask)

    def select(self, cache: Any, rows: Int[Tensor, " new"]) -> Any:
        past, *rest = cache
        return (_selected(past, rows), *select_rows(rest, rows))


class _Bert(MaskedScorer):
    """A masked model of transformers, whose head is shown the wanted positions only."""

    def __init__(self, model: Any, mask_id: int) -> None:
        self.model = model
        self.mask_id = mask_id
        self.max_length = _positions(model.config)

    def __call__(
        self,
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None,
        positions: Int[Tensor, "row position"],
    ) -> Float[Tensor, "row position token"]:
        def keep_wanted(module: Any, given: Any, out: Any) -> Any:
            del module, given
            hidden = out[0]
            where = positions[..., None].expand(*positions.shape, hidden.shape[-1])
            return (
                (hidden.gather(1, where), *out[1:])
                if isinstance(out, tuple)
                else _with(out, hidden.gather(1, where))
            )

        handle = self.model.base_model.register_forward_hook(keep_wanted)
        try:
            attention = None if mask is None else mask.long()
            logits: Tensor = self.model(input_ids=ids, attention_mask=attention).logits
        finally:
            handle.remove()
        return logits


def _with(out: Any, hidden: Tensor) -> Any:
    out["last_hidden_state"] = hidden
    return out


def _selected(past: Any, rows: Tensor) -> Any:
    if hasattr(past, "reorder_cache"):
        past.reorder_cache(rows)
        return past
    return select_rows(past, rows)


def _one(config: Any, name: str) -> int | None:
    """Return a token of a configuration, the first where there are several."""
    found = getattr(config, name, None)
    found = found[0] if isinstance(found, list | tuple) and found else found
    return int(found) if isinstance(found, int) else None


def _positions(config: Any) -> int | None:
    """Return how many positions a model has; None where nothing limits them."""
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            # RoBERTa's positions begin behind its padding id
            offset = 2 if getattr(config, "model_type", "") in _SHIFTED else 0
            return found - offset
    return None


_SHIFTED = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer"}
