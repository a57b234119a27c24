"""Pseudo-targets: what partners have read in training when nothing may leak from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.language import check_prompt
from kexue_bidirectional_decoding.scorer import BidirectionalScorer
from kexue_bidirectional_decoding.search import bidirectional_beam_search
from kexue_bidirectional_decoding.targets import reverse_rows

__all__ = ["Partners", "pseudo_targets"]


class Partners(NamedTuple):
    """What the partners read in training instead of the target, position by position.

    Args:
        left_in: Shape ``[row, time]``: the start token, and a text from the left; 0 behind its end.
        right_in: The end token, and a text from its end; 0 behind.
        left_steps: Shape ``[row]``: how many of ``left_in`` are real, the mark included.
        right_steps: How many of ``right_in`` are.
    """

    left_in: Tensor
    right_in: Tensor
    left_steps: Tensor
    right_steps: Tensor


def pseudo_targets(
    scorer: BidirectionalScorer,
    prompt: Int[Tensor, "row time"],
    mask: Bool[Tensor, "row time"] | None = None,
    *,
    time: int,
    width: int = 1,
    lengths: Int[Tensor, " row"] | None = None,
) -> Partners:
    """Return what a model writes itself, for another that is trained to attend to it.

    The post's remedy for the leak, and its paper's: a first model answers the sources; then the
    target is learnt from a partner that has read such an answer, not the target, as in decoding.

    Args:
        scorer: The first model, in evaluation mode; it needs the marks of the second.
        prompt: Sources.
        mask: True at real tokens of the sources; all are by default.
        time: Positions of the targets' inputs; longer answers are cut off.
        width: Hypotheses per side of its search.
        lengths: Tokens that each answer is known to have; unknown by default.

    Raises:
        ArgumentError: If an argument is out of range, or the model has no room for the tokens.

    References:
        https://kexue.fm/archives/6877, section “思考分析”, 3.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import FunctionPairScorer, pseudo_targets
        >>> follows, precedes = torch.tensor([[0, 0, 4, 0, 5, 3], [0, 0, 0, 5, 2, 4]])
        >>> def spell(source, left, right):  # 4 5, whatever the source
        ...     return torch.eye(6)[follows[left[:, -1]]], torch.eye(6)[precedes[right[:, -1]]]
        >>> found = pseudo_targets(FunctionPairScorer(spell), torch.tensor([[9]]), time=4)
        >>> found.left_in.tolist(), found.right_in.tolist(), found.left_steps.tolist()
        ([[2, 4, 5, 0]], [[3, 5, 4, 0]], [3])
    """
    mask = check_prompt(prompt, mask)
    found = bidirectional_beam_search(
        scorer, prompt, width=width, max_new_tokens=time, mask=mask, lengths=lengths, both=True
    )
    inputs: list[Tensor] = []
    steps: list[Tensor] = []
    for side, turn in ((found.left, False), (found.right, True)):
        ended = torch.zeros(len(prompt)).bool() if side.ended is None else side.ended
        count = (side.sequences != PAD).sum(1) - ended.to(prompt.device).long()
        ids = reverse_rows(side.sequences, count) if turn else side.sequences
        line = prompt.new_zeros(len(prompt), time + 1)
        line[:, 0] = scorer.end_id if turn else scorer.start_id
        line[:, 1 : ids.shape[1] + 1] = ids
        behind = torch.arange(time + 1, device=prompt.device) > count[:, None]
        inputs.append(line.masked_fill(behind, 0)[:, :time])
        steps.append((count + 1).clamp(max=time))
    return Partners(*inputs, *steps)
