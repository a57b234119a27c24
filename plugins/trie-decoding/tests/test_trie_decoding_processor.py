"""The constraint within transformers' generate, beside its own with a dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_trie_decoding import TrieBeam, TrieIndex, TrieLogitsProcessor

END, PROMPT = 2, 3
GENERATOR = torch.Generator().manual_seed(0)
DATABASE = [
    [3 + i for i in torch.randint(20, (int(n),), generator=GENERATOR).tolist()]
    for n in torch.randint(1, 6, (60,), generator=GENERATOR)
]


def allowed_by_dicts(start: int) -> Any:
    root: dict[int, Any] = {}
    for sequence in DATABASE:
        node = root
        for token in [*sequence, END]:
            node = node.setdefault(token, {})

    def allowed(batch: int, ids: Tensor) -> list[int]:
        node = root
        for token in ids[start:].tolist():
            node = node.get(token, {})
        return list(node) or [END]

    return allowed


def causal() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def encoder_decoder() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=END, pad_token_id=0,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def spread(model: Any) -> Any:
    """Sharpen what a model with random weights says."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("make", [causal, encoder_decoder])
def test_generate_gives_what_it_gives_with_a_dict(make: Any, beams: int) -> None:
    model = spread(make())
    prompt = torch.randint(3, 23, (3, PROMPT), generator=torch.Generator().manual_seed(5))
    start = PROMPT if make is causal else 1
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 7,
        "num_beams": beams,
        "do_sample": False,
    }
    theirs = model.generate(prompt, **settings, prefix_allowed_tokens_fn=allowed_by_dicts(start))
    index = TrieIndex.build(DATABASE, END)
    for processor in (
        TrieLogitsProcessor(index),
        TrieLogitsProcessor(index, start=start),
    ):
        ours = model.generate(prompt, **settings, logits_processor=[processor])
        assert torch.equal(ours, theirs)
    answers = [row[: row.index(END)] for row in ours[:, start:].tolist()]
    assert all(answer in DATABASE for answer in answers)


@pytest.mark.parametrize("make", [causal, encoder_decoder])
def test_beams_over_transformers_models_end_in_the_database(make: Any) -> None:
    model = spread(make())
    prompt = torch.randint(3, 23, (3, PROMPT), generator=torch.Generator().manual_seed(5))
    greedy = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=7,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed_by_dicts(PROMPT if make is causal else 1),
    )
    start = PROMPT if make is causal else 1
    one = TrieBeam(DATABASE, end_id=END, width=1).decode(model, prompt=prompt)
    assert one.tolist() == [[i for i in row[start:] if i] for row in greedy.tolist()]
    several = TrieBeam(DATABASE, end_id=END, width=5, num_return=5).decode(model, prompt=prompt)
    assert all(row[:-1] in DATABASE for row in several.tolist())
    scores = several.scores.view(3, 5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (scores[:, 0] >= one.scores - 1e-4).all()


def test_rows_in_any_order_and_number_are_found_again() -> None:
    index = TrieIndex.build(DATABASE, END)
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((6, 1), 9)
    remembers = TrieLogitsProcessor(index, start=1)
    for step in range(6):
        scores = torch.randn(len(ids), 30, generator=generator)
        fresh = TrieLogitsProcessor(index, start=1)(ids, scores)
        assert torch.equal(remembers(ids, scores), fresh)
        chosen = fresh.argmax(1)
        rows = torch.randint(len(ids), (5 + step % 3,), generator=generator)
        ids = torch.cat([ids, chosen[:, None]], 1)[rows]


def test_a_beam_that_leaves_the_tree_may_only_end() -> None:
    index = TrieIndex.build([[5, 6]], END)
    processor = TrieLogitsProcessor(index, start=0)
    processor(torch.tensor([[5], [5]]), torch.zeros(2, 9))
    masked = processor(torch.tensor([[5, 6], [5, 7]]), torch.zeros(2, 9))
    assert masked.isfinite().nonzero().tolist() == [[0, END], [1, END]]
    ended = processor(torch.tensor([[5, 6, END], [5, 7, END]]), torch.zeros(2, 9))
    assert ended.isfinite().nonzero().tolist() == [[0, END], [1, END]]


def test_a_prompt_that_is_taken_for_an_entry_is_refused() -> None:
    index = TrieIndex.build([[5, 6]], END)
    with pytest.raises(ArgumentError, match=r"Row 1 does not, from place 0\. Give `start`"):
        TrieLogitsProcessor(index, start=0)(torch.tensor([[5], [7]]), torch.zeros(2, 9))
    used = TrieLogitsProcessor(index)
    used(torch.ones(1, 4).long(), torch.zeros(1, 9))
    with pytest.raises(ArgumentError, match="for each call of generate"):
        used(torch.ones(1, 3).long(), torch.zeros(1, 9))
