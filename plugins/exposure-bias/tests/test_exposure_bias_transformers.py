"""A model of transformers, trained with replaced inputs and with the penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kexue.core import ArgumentError
from kexue_exposure_bias import GradientPenaltyEmbedding, TokenReplacement, gradient_penalty

transformers = pytest.importorskip("transformers")

PAD, BOS, EOS = 1, 0, 2


def model(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        dropout=0.0,
        attn_implementation=attention,
    )
    return transformers.BartForConditionalGeneration(config)


SOURCE = torch.tensor([[BOS, 5, 6, 7, EOS], [BOS, 8, 9, EOS, PAD]])
READ = torch.tensor([[EOS, BOS, 7, 6, 5], [EOS, BOS, 9, 8, PAD]])
LABELS = torch.tensor([[BOS, 7, 6, 5, EOS], [BOS, 9, 8, EOS, -100]])


def test_trains_on_replaced_inputs_with_the_penalty() -> None:
    bart = model("eager")
    replace = TokenReplacement(1.0, 1.0, exclude=[PAD, BOS, EOS])
    read = replace(READ, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read[:, :2], READ[:, :2])
    assert set(read[0, 2:].tolist()) <= {5, 6, 7}
    out = bart(input_ids=SOURCE, decoder_input_ids=read, labels=LABELS)
    weight = bart.get_input_embeddings().weight
    whole = GradientPenaltyEmbedding()(out.logits, LABELS, embedding=weight)
    parts = out.loss + gradient_penalty(out.loss, weight)
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)
    whole.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in bart.parameters())
    assert weight.grad.abs().sum() > 0


def test_names_fused_attention() -> None:
    bart = model("sdpa")
    out = bart(input_ids=SOURCE, decoder_input_ids=READ, labels=LABELS)
    with pytest.raises(ArgumentError, match=r"SDPBackend\.MATH"):
        gradient_penalty(out.loss, bart.get_input_embeddings().weight)
