"""``decoder/bidirectional-beam``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kexue.core import Decoder, Example
from kexue_bidirectional_decoding.scorer import pair_scorer
from kexue_bidirectional_decoding.search import BidirectionalResult, bidirectional_beam_search
from kexue_bidirectional_decoding.targets import check_marks

__all__ = ["BidirectionalBeam"]


class BidirectionalBeam(Decoder):
    """Beam search from both ends in step, each side given the other's hypotheses.

    With k hypotheses l and k hypotheses r, token y is added to l with the score
    log (1/k) Σ_r p(y | l, r), and to r likewise. What depends on a side alone is computed for k + k
    hypotheses and kept; attention between all k² pairs is one product.

    Args:
        beam: Hypotheses per side, k; 1 is greedy search.
        max_new_tokens: Tokens per side at most, the last mark included.
        length_penalty: Exponent of the length that sums of log-probabilities are divided by when
            they are compared; 0 compares sums.
        both: Go on until the best of both sides have ended.
        start_id: What texts begin with, and from the right end with; for plain functions.
        end_id: What texts end with, and from the right begin with; for plain functions.

    Raises:
        ArgumentError: If ``start_id`` is ``end_id``.

    References:
        https://kexue.fm/archives/6877; Zhou, Zhang and Zong, Synchronous Bidirectional Neural
        Machine Translation, TACL 2019, https://arxiv.org/abs/1905.04847.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import BidirectionalBeam
        >>> def spell(source, left, right):  # the word is 4 5 6 7, whatever the source
        ...     follows = torch.tensor([0, 0, 4, 0, 5, 6, 7, 3])  # 2 begins, 3 ends
        ...     precedes = torch.tensor([0, 0, 0, 7, 2, 4, 5, 6])
        ...     logits = [10.0 * torch.eye(8)[t[x[:, -1]]] for t, x in
        ...               ((follows, left), (precedes, right))]
        ...     return logits[0], logits[1]
        >>> found = BidirectionalBeam(beam=2).decode(spell, prompt=torch.tensor([[9]]))
        >>> found.tolist(), found.from_right.tolist()
        ([[4, 5, 6, 7, 3]], [False])
    """

    needs_fitting: ClassVar[bool] = True
    compilable: ClassVar[bool] = False

    def __init__(
        self,
        beam: int = 3,
        *,
        max_new_tokens: int = 64,
        length_penalty: float = 0.0,
        both: bool = False,
        start_id: int = 2,
        end_id: int = 3,
    ) -> None:
        check_marks(start_id, end_id)
        self.beam = beam
        self.max_new_tokens = max_new_tokens
        self.length_penalty = length_penalty
        self.both = both
        self.start_id = start_id
        self.end_id = end_id

    def decode(  # type: ignore[override]
        self,
        scores: Any,
        *,
        prompt: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> BidirectionalResult:
        """Return the better of the two sides' best texts.

        Args:
            scores: A :class:`~kexue_bidirectional_decoding.BidirectionalScorer`; two language
                models, such as those of transformers, the second of which writes from the right
                (see :class:`~kexue_bidirectional_decoding.TwoModels`); or a function from sources
                and the prefixes of both sides, ``[pair, time]`` each, to the logits ``[pair,
                token]`` of both.
            prompt: Sources; ids.
            mask: True at real tokens of the sources; all are by default.
            lengths: Tokens that each text is known to have; unknown by default.

        Raises:
            ArgumentError: If an argument is out of range, or the model has no room for the tokens.
            WorkError: If the model's scores are NaN.
        """
        scorer = pair_scorer(scores, start_id=self.start_id, end_id=self.end_id)
        return bidirectional_beam_search(
            scorer,
            prompt,
            width=self.beam,
            max_new_tokens=self.max_new_tokens,
            mask=mask,
            lengths=lengths,
            length_penalty=self.length_penalty,
            both=self.both,
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sources of ragged lengths, and a function that turns them round."""
        prompt = torch.randint(4, 9, (3, 6), generator=generator)
        mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
        inputs = {"scores": _mirrored, "prompt": prompt, "mask": mask}
        return Example({"beam": 2, "max_new_tokens": 5}, inputs)


def _mirrored(source: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Score the source from its end highest, and all else by what the other side has written."""
    sides = []
    for own, other, text, mark in ((left, right, source.flip(1), 3), (right, left, source, 2)):
        step, time = own.shape[1] - 1, source.shape[1]
        wanted = text[:, step] if step < time else torch.full_like(own[:, 0], mark)
        place = torch.arange(9, device=own.device)
        noise = (other.sum(1, keepdim=True) * (place + 1) % 7).to(torch.get_default_dtype()) / 7
        sides.append(4.0 * (place == wanted[:, None]) + noise)
    return sides[0], sides[1]
