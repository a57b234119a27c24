"""The exact laws of chains on texts that can be counted: what the experiments compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from kexue.core.language import MaskedScorer
from kexue_bert_sampling.scans import Scan

__all__ = ["all_texts", "codes", "stationary_law", "total_variation", "transition"]


def all_texts(tokens: int, length: int) -> Tensor:
    """Return all texts of a length, ``[state, time]``, in the order of their codes."""
    return torch.cartesian_prod(*[torch.arange(tokens)] * length).view(-1, length)


def codes(texts: Tensor, tokens: int) -> Tensor:
    """Return the state that each text ``[sample, time]`` is."""
    powers = tokens ** torch.arange(texts.shape[1] - 1, -1, -1)
    return (texts * powers).sum(1)


def total_variation(a: Tensor, b: Tensor) -> float:
    """Return half the sum of absolute differences of two laws ``[state]``."""
    return float((a - b).abs().sum() / 2)


@torch.no_grad()
def transition(scorer: MaskedScorer, tokens: int, length: int, places: Sequence[int]) -> Tensor:
    """Return the transition matrix ``[state, state]`` of drawing some places anew at once.

    Args:
        scorer: The masked language model; only its first tokens count.
        tokens: How many.
        length: Tokens of a text.
        places: Which are masked together.
    """
    states = all_texts(tokens, length)
    drawn = torch.tensor(places)
    masked = states.index_fill(1, drawn, scorer.mask_id)
    law = scorer(masked, None, drawn.expand(len(states), -1))[..., :tokens].double().softmax(-1)
    kept = torch.tensor([place for place in range(length) if place not in places], dtype=torch.long)
    found = (states[:, None, kept] == states[None, :, kept]).all(2).double()
    for number, place in enumerate(places):
        found *= law[:, number][:, states[:, place]]  # p(the new token given the old state)
    return found


def stationary_law(
    scorer: MaskedScorer, tokens: int, length: int, scan: Scan, block: int = 1
) -> Tensor:
    """Return the law ``[state]`` that a scan leaves as it is.

    Args:
        scorer: The masked language model.
        tokens: How many count.
        length: Tokens of a text.
        scan: ``"random"``, one step of which leaves it; or ``"systematic"``, a sweep.
        block: Places a step.
    """
    step: Tensor
    if scan == "random":
        subsets = combinations(range(length), block)
        step = torch.stack([transition(scorer, tokens, length, s) for s in subsets]).mean(0)
    else:
        parts = [range(length)[start : start + block] for start in range(0, length, block)]
        step = _product(transition(scorer, tokens, length, part) for part in parts)
    for _ in range(16):  # 65536 steps
        step = step @ step
        step = step / step.sum(1, keepdim=True)
    return step[0]


def _product(matrices: Iterable[Tensor]) -> Tensor:
    first, *others = matrices
    for matrix in others:
        first = first @ matrix
    return first
