"""What both experiments share: a small model, trained for so many steps, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kexue.core.lab.language import CharacterSeq2Seq
from kexue.core.language import beam_search, pad_ids
from kexue.core.training import adam
from kexue_trie_decoding.index import TrieIndex
from kexue_trie_decoding.trie_beam import TrieBeam

__all__ = ["Pairs", "answers", "free", "train"]

Pairs = Sequence[tuple[str, str]]
"""Questions and their targets."""


def train(
    alphabet: str,
    draw: Callable[[int], Pairs],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    width: int = 64,
    batch: int = 128,
    lr: float = 6e-3,
) -> CharacterSeq2Seq:
    """Train a model on fresh pairs.

    Args:
        alphabet: The characters of both sides.
        draw: Returns so many pairs.
        steps: Of Adam, more than 10, its rate rising over a tenth and then falling to 0.
        seed: Of the weights.
        device: Where.
        width: Features.
        batch: Pairs per step.
        lr: The greatest learning rate.
    """
    torch.manual_seed(seed)
    model = CharacterSeq2Seq(alphabet, width=width).to(device)
    optimizer = adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        given = {name: part.to(device) for name, part in model.collate(draw(batch)).items()}
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(given))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _prompts(model: CharacterSeq2Seq, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    device = model.output.weight.device
    return pad_ids([model.vocabulary.encode(q) for q in questions], device=device)


def free(model: CharacterSeq2Seq, questions: Sequence[str], longest: int, width: int) -> list[str]:
    """Return what the model answers without a tree, of at most ``longest`` tokens."""
    prompt, mask = _prompts(model, questions)
    found = beam_search(model, prompt, mask=mask, width=width, max_new_tokens=longest)
    return [model.vocabulary.decode(row) for row in found.sequences.tolist()]


def answers(
    model: CharacterSeq2Seq, index: TrieIndex, questions: Sequence[str], **settings: object
) -> list[str]:
    """Return what :class:`TrieBeam` answers.

    Args:
        model: The model.
        index: The database.
        questions: Texts.
        settings: Of the decoder.
    """
    prompt, mask = _prompts(model, questions)
    decoder = TrieBeam(index.to(prompt.device), **settings)  # type: ignore[arg-type]
    found = decoder.decode(model, prompt=prompt, mask=mask)
    return [model.vocabulary.decode(row) for row in found.sequences.tolist()]
