"""The maximum-entropy Markov model: one module, a loss to train with and a decoder that fits it."""

from __future__ import annotations

import contextlib
import warnings
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kexue.core.component import Example
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import Decoder, DecodeResult
from kexue.core.interfaces.loss import Loss
from kexue_memm import decoding
from kexue_memm.checks import (
    check_choice,
    check_emissions,
    check_mask,
    check_positive,
    check_tags,
)
from kexue_memm.decoding import Mode
from kexue_memm.likelihood import Direction, mean_nll, token_nll
from kexue_memm.tokens import Tokens
from kexue_memm.transitions import Transitions

__all__ = ["MEMM"]

Reduction = Literal["none", "mean", "sum", "token_mean"]

_MODES: dict[Direction, Mode] = {
    "both": "geometric",
    "forward": "forward",
    "backward": "backward",
}

_LARGEST_MATRIX = 1 << 13
"""Tags above which decoding refuses to form ``left @ right.T`` (0.25 GiB in float32)."""


class MEMM(Loss, Decoder):
    r"""Maximum-entropy Markov model, from emissions and tags to a loss, and to the best tags.

    It maps scores of each tag at each position, and the tags themselves, to their negative
    log-likelihood in nats, as a CRF does; but each tag is normalised locally, given the true tag
    beside it, so that nothing is recursive and training costs a few softmaxes per position.
    Choose it where a CRF is too slow or the tags are too many for one (a vocabulary: ``rank``).
    Where the encoder is weak and tags are few, a CRF is usually more accurate, because a model
    that always sees the true neighbour learns less from the input (label bias).

    With emissions f, transitions g (row: the tag to the left) and tags :math:`y_1 \dots y_n`:

    .. math::
        P_\rightarrow(y) &= \prod_k \operatorname{softmax}_{y_k}(f_k + g(y_{k-1}, \cdot))

        P_\leftarrow(y) &= \prod_k \operatorname{softmax}_{y_k}(f_k + g(\cdot, y_{k+1}))

        \text{loss} &= -\tfrac12 \log P_\rightarrow(y) - \tfrac12 \log P_\leftarrow(y)
        \qquad \text{(direction "both")}

    These are equations 5 to 7 and 8 of the post; the first factor of the one and the last of the
    other are without g.

    Both directions share g. With ``rank`` r, :math:`g = L R^\top` and no [tag, tag] matrix is ever
    formed where it would be larger than the emissions of the batch. The loss takes time
    O(batch · time · tag), with a low rank O(batch · time · tag · rank), and memory
    O(batch · time · tag). Decoding takes time O(batch · time · tag²), with ``num_candidates`` m
    and a low rank O(batch · time · m · (m + tag · rank)).

    Parameters: ``transitions`` [tag, tag], or ``left`` and ``right`` [tag, rank]; Glorot-uniform.

    Deviations from the post and its code: decoding defaults to the distribution that was trained;
    the released scripts maximise the unnormalised sum of f and g (``mode="raw"``), which is a
    CRF's search. The released layer halves f + g wherever a tag has a neighbour (``scale=0.5``)
    and averages over tokens (``reduction="token_mean"``). Its learning-rate factor for the
    transitions is :func:`~kexue_memm.learning_rates.param_groups`.

    Args:
        num_tags: Number of tags.
        direction: Which neighbour a tag is conditioned on: ``"forward"`` the one to its left,
            ``"backward"`` the one to its right, ``"both"`` the mean of the two losses.
        rank: Rank of the transitions; a full matrix by default.
        scale: Factor of f + g where a tag has a neighbour: 1 is the post's formula, 0.5 what
            bert4keras computes.
        mode: What decoding maximises: ``"forward"`` or ``"backward"`` the probability in that
            direction, ``"geometric"`` the geometric mean of both, ``"raw"`` the sum of f and g.
            By default what was trained: geometric for both directions.
        num_candidates: Tags that decoding keeps per position, those that promise most; all, and
            an exact search, by default.
        reduction: ``"mean"`` over the sequences that have a real position, ``"sum"``, ``"none"``
            (one value per sequence), or ``"token_mean"`` over the real positions.

    Raises:
        ArgumentError: If an argument is not of these.

    Warns:
        UserWarning: If ``rank`` is not smaller than ``num_tags``.

    Example:
        >>> import torch
        >>> memm = MEMM(3)
        >>> emissions = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]])
        >>> _ = torch.nn.init.zeros_(memm.transitions)
        >>> round(memm(emissions, torch.tensor([[0, 1, 2]])).item(), 4)
        0.7186
        >>> memm.decode(emissions).tolist()
        [[0, 1, 2]]

    References:
        J. Su, 2020, https://kexue.fm/archives/7213.
        A. McCallum, D. Freitag, F. Pereira, Maximum Entropy Markov Models for Information
        Extraction and Segmentation, ICML 2000.
        Z. Sun et al., Fast Structured Decoding for Sequence Models, NeurIPS 2019,
        https://arxiv.org/abs/1910.11555 (low rank and candidates, there for a CRF).
    """

    trainable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    reductions: ClassVar[tuple[str, ...]] = get_args(Reduction)

    def __init__(
        self,
        num_tags: int,
        *,
        direction: Direction = "both",
        rank: int | None = None,
        scale: float = 1.0,
        mode: Mode | None = None,
        num_candidates: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        check_positive("num_tags", num_tags, whole=True)
        check_choice("direction", direction, _MODES)
        check_positive("scale", scale, whole=False)
        if mode is not None:
            check_choice("mode", mode, get_args(Mode))
        if num_candidates is not None:
            check_positive("num_candidates", num_candidates, whole=True)
        self.num_tags = num_tags
        self.direction: Direction = direction
        self.rank = rank
        self.scale = scale
        self.mode: Mode = mode or _MODES[direction]
        self.num_candidates = num_candidates
        if rank is None:
            self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        else:
            check_positive("rank", rank, whole=True)
            if rank >= num_tags:
                warnings.warn(
                    f"`rank` of MEMM should be below num_tags = {num_tags} to save anything. "
                    f"Found {rank}; leave it out for a full matrix.",
                    stacklevel=2,
                )
            self.left = nn.Parameter(torch.empty(num_tags, rank))
            self.right = nn.Parameter(torch.empty(num_tags, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the transitions anew, Glorot-uniform as in bert4keras."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """Return the negative log-likelihood in nats, reduced; differentiable twice.

        Args:
            emissions: Scores f of the tags. -inf forbids a tag.
            tags: The true tags, from 0. At masked positions they may be anything.
            mask: True at real positions, in any pattern: the chain connects the real positions.
                All are real by default.

        Returns:
            A scalar, or one value per sequence with ``reduction="none"``; float32 (float64 where
            an input is). A sequence without a real position has the loss 0.

        Raises:
            ArgumentError: If shapes, dtypes or devices do not fit, or if a tag at a real position
                does not exist or has probability zero.
        """
        if self.reduction == "none":
            return -self.log_prob(emissions, tags, mask)
        scores, transitions, tokens = self._prepare_loss(emissions, tags, mask)
        if self.reduction == "mean":
            count = tokens.count_rows()
        else:
            count = 1 if self.reduction == "sum" else max(len(tokens), 1)
        with _full_precision(scores):
            return mean_nll(
                scores,
                tags.long(),
                tokens,
                transitions,
                direction=self.direction,
                scale=self.scale,
                count=count,
            )

    def log_prob(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        *,
        direction: Direction | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the log-probability of each sequence of tags in nats.

        For ``"forward"`` and ``"backward"`` it is normalised: over all sequences of tags, the
        probabilities add up to 1. For ``"both"`` it is the mean of these two logarithms, which is
        the negative loss and belongs to no normalised distribution (the sum is at most 1).

        Args:
            emissions: Scores f of the tags.
            tags: Tags from 0.
            mask: True at real positions; all by default.
            direction: The direction; by default the one that is trained.

        Raises:
            ArgumentError: As in :meth:`forward`.
        """
        if direction is not None:
            check_choice("direction", direction, _MODES)
        scores, transitions, tokens = self._prepare_loss(emissions, tags, mask)
        with _full_precision(scores):
            nll = token_nll(
                scores,
                tags.long(),
                tokens,
                transitions,
                direction=direction or self.direction,
                scale=self.scale,
            )
        return -tokens.sum_rows(nll.mean(0))

    def marginals(
        self,
        emissions: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        direction: Literal["forward", "backward"] | None = None,
    ) -> Float[Tensor, "batch time tag"]:
        """Return the probability of each tag at each position.

        A recursion over time, each step of which takes a tensor [batch, tag, tag].

        Args:
            emissions: Scores f of the tags.
            mask: True at real positions; all by default.
            direction: Whose chain; by default the one that is trained. Needed for ``"both"``,
                which is not one chain.

        Returns:
            Probabilities, which add up to 1 over the tags of a real position and are 0 at a
            masked one.

        Raises:
            ArgumentError: If shapes, dtypes or devices do not fit, or there is no one direction.
        """
        chosen = direction or self.direction
        if chosen == "both":
            raise ArgumentError(
                "`direction` of MEMM.marginals must be 'forward' or 'backward', because the mean "
                "of both losses belongs to no one chain. Found 'both'; name one of them.",
                argument="direction",
            )
        check_choice("direction", chosen, _MODES)
        scores, transitions = self._prepare(emissions, mask)
        with _full_precision(scores):
            matrix = transitions.matrix()
            if chosen == "forward":
                return decoding.marginals(scores, matrix, scale=self.scale, mask=mask)
            mirrored = None if mask is None else mask.flip(1)
            result = decoding.marginals(scores.flip(1), matrix.T, scale=self.scale, mask=mirrored)
            return result.flip(1)

    @torch.no_grad()
    def decode(
        self,
        emissions: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        mode: Mode | None = None,
    ) -> DecodeResult:
        """Return the best tags of each row and their score.

        Exact, unless ``num_candidates`` is below ``num_tags``: then it is the best sequence of
        the candidates, with its exact score. Of equally good sequences it is the one with the
        lowest last tag, among these the one with the lowest last but one, and so on.

        Args:
            emissions: Scores f of the tags. -inf forbids a tag.
            mask: True at real positions, in any pattern: the chain connects the real positions.
                All are real by default.
            mode: What to maximise, for this call.

        Returns:
            ``sequences``, int64, PAD at masked positions; ``scores``, what was maximised: the
            log-probability in nats in modes ``"forward"`` and ``"backward"``, the mean of both in
            ``"geometric"``, the sum of f and g in ``"raw"``.

        Raises:
            ArgumentError: If shapes, dtypes or devices do not fit, a score is NaN or +inf, or the
                tags are too many for a search without ``num_candidates``.
        """
        if mode is not None:
            check_choice("mode", mode, get_args(Mode))
        scores, transitions = self._prepare(emissions, mask)
        self._check_search()
        tokens = Tokens.of(scores, mask)
        with _full_precision(scores):
            return decoding.decode(
                tokens.pack(scores),
                tokens,
                transitions,
                mode=mode or self.mode,
                scale=self.scale,
                num_candidates=self.num_candidates,
                mask=mask,
            )

    def extra_repr(self) -> str:
        """Return the arguments of the constructor that matter, for ``repr``."""
        parts = [f"{self.num_tags}, direction={self.direction!r}, mode={self.mode!r}"]
        for name, default in (("rank", None), ("scale", 1.0), ("num_candidates", None)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join([*parts, f"reduction={self.reduction!r}"])

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three rows of four tags, of five, three and one real positions.

        Args:
            generator: Source of randomness; the global one by default.
        """
        emissions = torch.randn(3, 5, 4, generator=generator)
        tags = torch.randint(4, (3, 5), generator=generator)
        mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
        return Example({"num_tags": 4}, {"emissions": emissions, "tags": tags, "mask": mask})

    def _prepare_loss(
        self, emissions: Tensor, tags: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Transitions, Tokens]:
        """Check, convert, and find the real positions."""
        scores, transitions = self._prepare(emissions, mask)
        check_tags(tags, emissions)
        return scores, transitions, Tokens.of(scores, mask)

    def _prepare(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Transitions]:
        """Check, and convert to the dtype of the computation."""
        left = self.transitions if self.rank is None else self.left
        check_emissions(emissions, self.num_tags, left.device)
        check_mask(mask, emissions)
        dtype = torch.promote_types(emissions.dtype, left.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        right = None if self.rank is None else self.right.to(dtype)
        return emissions.to(dtype), Transitions(left.to(dtype), right)

    def _check_search(self) -> None:
        """Refuse to form a huge matrix from thin ones."""
        is_exact = self.num_candidates is None or self.num_candidates >= self.num_tags
        if is_exact and self.rank is not None and self.num_tags > _LARGEST_MATRIX:
            raise ArgumentError(
                f"`num_candidates` of MEMM must be given to decode {self.num_tags} tags, because "
                f"an exact search needs a [tag, tag] matrix. Found {self.num_candidates}; try 64.",
                argument="num_candidates",
            )


def _full_precision(scores: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast does not touch products of matrices."""
    device = scores.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
