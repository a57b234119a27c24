"""The linear-chain conditional random field as a module: a loss and its decoder in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kexue.core.component import Example
from kexue.core.eager import eagerly
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import Decoder, DecodeResult
from kexue.core.interfaces.loss import Loss
from kexue_crf import decoding, likelihood, log_space
from kexue_crf.chains import computing_dtype
from kexue_crf.checks import (
    check_emissions,
    check_mask,
    check_tags,
    forbidden_tags,
    not_finite,
    tags_out_of_range,
)
from kexue_crf.constraints import Constraints, scheme_constraints

__all__ = ["CRF"]


class CRF(Loss, Decoder):
    r"""Linear-chain conditional random field: scores of whole tag sequences, normalised exactly.

    Maps emissions ``[batch, time, tag]`` and tags ``[batch, time]`` to the negative log-likelihood
    of the tags in nats, and emissions to the best sequence. Choose it where neighbouring tags
    constrain each other (segmentation, entities, chunks); where they do not, softmax per position
    is cheaper and as good, and with tens of thousands of tags a MEMM is affordable and this is not.

    With emissions :math:`h_t`, transitions :math:`g` and, with ``boundaries``, start and end
    scores, the post's (4), (5), (7) and (10) are

    .. math::
        f(y) &= start[y_1] + \sum_t h_t[y_t] + \sum_{t \ge 2} g[y_{t-1}, y_t] + end[y_n] \\
        P(y) &= e^{f(y)} / Z, \qquad loss = -\log P = \log Z - f(y) \\
        Z_{t+1} &= (Z_t G) \otimes H_{t+1}, \qquad G = e^g,\; H = e^h

    Time :math:`O(time \cdot tag^2)` per sequence, one product of matrices per position for loss
    and gradient together; memory :math:`O(time \cdot tag)`, not tag². Gradients are analytic;
    they can be differentiated again (slower, on a tape in log space). Scores that are too far
    apart for probability space are summed in log space: see :mod:`kexue_crf.scaled`.

    The parameters are named and laid out as in pytorch-crf: its ``state_dict`` loads.

    Deviations from the post: padding is a mask, not a further tag; start and end scores are there
    unless ``boundaries=False``, which is the post; tags can be forbidden exactly. The sign is the
    post's, a loss; pytorch-crf returns its negative.

    Args:
        num_tags: Number of tags, at least 1.
        boundaries: Learn a score of each tag as the first and as the last.
        scheme: Forbid what this scheme of ``tag_names`` does not allow: BMES, BMEWO, BIES, BIOES,
            BILOU, BIO or IOB2.
        tag_names: Name of each tag, in order; needed by ``scheme``.
        constraints: Forbid what these do not allow: Constraints, or a bool matrix ``[from, to]``,
            true where neighbours are allowed. What is forbidden has probability exactly 0.
        batch_first: Inputs are ``[batch, time, …]``; false for ``[time, batch, …]``. Decoded
            sequences are ``[batch, time]`` either way.
        forbidden: What the loss of tags that are forbidden is: ``"raise"`` an ArgumentError that
            names the first, or ``"inf"``, with gradient 0 from their row.
        reduction: ``"mean"`` over the sequences with at least one real position, ``"sum"``,
            ``"token_mean"`` over the real positions of all, or ``"none"``.

    Raises:
        ArgumentError: If an argument does not meet its condition; in use also if shapes or dtypes
            do not fit, a score is NaN or :math:`+\infty`, or a tag is out of range or forbidden.

    Example:
        >>> crf = CRF(4, scheme="BMES", tag_names=["S", "B", "M", "E"])
        >>> emissions = torch.randn(2, 5, 4, requires_grad=True)
        >>> tags = torch.tensor([[1, 3, 0, 1, 3], [0, 1, 3, -100, -100]])
        >>> crf(emissions, tags, tags >= 0).backward()
        >>> crf.decode(emissions, mask=tags >= 0).sequences.shape
        torch.Size([2, 5])

    Source: 苏剑林, 简明条件随机场CRF介绍（附带纯Keras实现）, https://kexue.fm/archives/5542;
    Lafferty, McCallum & Pereira, Conditional Random Fields, ICML 2001.
    """

    trainable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum", "token_mean")

    start_transitions: nn.Parameter | None
    end_transitions: nn.Parameter | None
    allowed_start: Tensor | None
    allowed_transitions: Tensor | None
    allowed_end: Tensor | None

    def __init__(
        self,
        num_tags: int,
        *,
        boundaries: bool = True,
        scheme: str | None = None,
        tag_names: Sequence[str] | None = None,
        constraints: Constraints | Bool[Tensor, "tag tag"] | None = None,
        batch_first: bool = True,
        forbidden: Literal["raise", "inf"] = "raise",
        reduction: Literal["none", "mean", "sum", "token_mean"] = "mean",
    ) -> None:
        super().__init__(reduction)
        _check_arguments(num_tags, scheme, tag_names, forbidden)
        self.num_tags = num_tags
        self.boundaries = boundaries
        self.scheme = scheme
        self.tag_names = None if tag_names is None else tuple(tag_names)
        self.batch_first = batch_first
        self.forbidden = forbidden
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        for name in ("start_transitions", "end_transitions"):
            scores = nn.Parameter(torch.empty(num_tags)) if boundaries else None
            self.register_parameter(name, scores)
        self._constrain(_all_constraints(num_tags, scheme, self.tag_names, constraints))
        self.reset_parameters()

    def _constrain(self, constraints: Constraints | None) -> None:
        # Not persistent: they follow the device and leave the state_dict as pytorch-crf's is.
        for name in ("start", "transitions", "end"):
            allowed = None if constraints is None else getattr(constraints, name).clone()
            self.register_buffer(f"allowed_{name}", allowed, persistent=False)
        self._reach = 1 if constraints is None else constraints.reach

    def reset_parameters(self) -> None:
        """Draw the transitions as the post does, Glorot uniform, and boundaries near 0."""
        nn.init.xavier_uniform_(self.transitions)
        for scores in (self.start_transitions, self.end_transitions):
            if scores is not None:
                nn.init.uniform_(scores, -0.1, 0.1)

    def extra_repr(self) -> str:
        """Return what distinguishes this CRF."""
        scheme = "" if self.scheme is None else f", scheme={self.scheme!r}"
        return (
            f"{self.num_tags}, boundaries={self.boundaries}{scheme}, reduction={self.reduction!r}"
        )

    @eagerly
    def forward(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " ..."]:
        """Return the negative log-likelihood of the tags, in nats.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            tags: The tags; anything where masked.
            mask: True at real positions, in any pattern: the chain connects the real positions.
                All are real by default.

        Returns:
            A scalar, or ``[batch]`` with ``reduction="none"``; float32 for float32 and below,
            float64 for float64. A row without a real position has loss 0.
        """
        emissions, mask = self._inputs(emissions, mask)
        tags = self._tags(tags, emissions)
        losses = self._losses(emissions, tags, mask, raising=self.forbidden == "raise")
        return self._reduce(losses, emissions, mask)

    def _reduce(self, losses: Tensor, emissions: Tensor, mask: Tensor | None) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        batch, time, _ = emissions.shape
        if self.reduction == "token_mean":
            return total / (max(batch * time, 1) if mask is None else mask.sum().clamp_(min=1))
        rows = batch if time else 0
        return total / (max(rows, 1) if mask is None else mask.any(1).sum().clamp_(min=1))

    @eagerly
    def log_prob(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the log-probability of the tags of each row, in nats; −inf if forbidden.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            tags: The tags; anything where masked.
            mask: True at real positions, in any pattern; all by default.
        """
        emissions, mask = self._inputs(emissions, mask)
        tags = self._tags(tags, emissions)
        return -self._losses(emissions, tags, mask, raising=False)

    def _losses(
        self, emissions: Tensor, tags: Tensor, mask: Tensor | None, *, raising: bool
    ) -> Tensor:
        if not emissions.numel():
            return self._nothing(emissions)
        problem = likelihood.prepare(self._scores(emissions), mask)
        path, score, extremes = likelihood.gold_path(problem, tags)
        facts = likelihood.Facts.of(problem, *extremes, score.min())
        self._check_facts(facts, emissions, mask)
        if facts.lowest_tag < 0 or facts.highest_tag >= self.num_tags:
            raise tags_out_of_range(tags, mask, self.num_tags, "CRF")
        if raising and facts.lowest_score == -torch.inf:
            raise forbidden_tags(problem.scores, tags, mask, self.tag_names, "CRF")
        return likelihood.log_partition(problem, facts, path, score)

    @eagerly
    def score(
        self,
        emissions: Float[Tensor, "batch time tag"],
        tags: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the score f of the tags of each row, not normalised; −inf if forbidden.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            tags: The tags; anything where masked.
            mask: True at real positions, in any pattern; all by default.
        """
        emissions, mask = self._inputs(emissions, mask)
        tags = self._tags(tags, emissions)
        if not emissions.numel():
            return self._nothing(emissions)
        lowest, highest = torch.aminmax(tags if mask is None else torch.where(mask, tags, 0))
        if not bool((lowest >= 0) & (highest < self.num_tags)):
            raise tags_out_of_range(tags, mask, self.num_tags, "CRF")
        return likelihood.path_score(self._scores(emissions), tags, mask)

    @eagerly
    def log_partition(
        self,
        emissions: Float[Tensor, "batch time tag"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return log Z of each row, in nats; −inf if every path is forbidden.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            mask: True at real positions, in any pattern; all by default.
        """
        emissions, mask = self._inputs(emissions, mask)
        if not emissions.numel():
            return self._nothing(emissions)
        problem, facts = self._problem(emissions, mask)
        found = likelihood.log_partition(problem, facts) + problem.baseline()
        return found.to(problem.edge_peak.dtype)

    @eagerly
    def marginals(
        self,
        emissions: Float[Tensor, "batch time tag"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time tag"]:
        """Return the probability of each tag at each position, 0 where masked.

        They can be differentiated: where a gradient may be asked for they are computed on a tape
        in log space, which is slower; use ``torch.no_grad()`` where none is.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            mask: True at real positions, in any pattern; all by default.
        """
        emissions, mask = self._inputs(emissions, mask)
        if emissions.numel():
            problem, facts = self._problem(emissions, mask)
            found = likelihood.marginals(problem, facts)
        else:
            found = torch.zeros_like(emissions, dtype=computing_dtype(emissions, self.transitions))
        return found if self.batch_first else found.transpose(0, 1)

    @eagerly
    def entropy(
        self,
        emissions: Float[Tensor, "batch time tag"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the entropy of each row's distribution over sequences, in nats; differentiable.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            mask: True at real positions, in any pattern; all by default.
        """
        emissions, mask = self._inputs(emissions, mask)
        if not emissions.numel():
            return self._nothing(emissions)
        problem, _ = self._problem(emissions, mask)
        nodes, edges = likelihood.time_major(problem.scores, problem)
        found = log_space.chain_entropy(nodes, edges, problem.chains.last)
        found = found.masked_fill(problem.chains.lengths == 0, 0)
        return found.to(problem.edge_peak.dtype)

    @eagerly
    def decode(
        self,
        emissions: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return the best sequence of each row; of equally good ones, as :func:`viterbi` says.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            mask: True at real positions, in any pattern; all by default.

        Returns:
            ``sequences`` ``[batch, time]``, at the positions of the input, PAD where masked, and
            ``scores`` ``[batch]``, the f of the sequences. PAD everywhere and −inf for a row all
            of whose paths are forbidden.
        """
        emissions, mask = self._inputs(emissions, mask)
        return decoding.best(self._scores(emissions), mask, "CRF")

    @eagerly
    def decode_nbest(
        self,
        emissions: Float[Tensor, "batch time tag"],
        n: int,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return the n best sequences of each row, best first.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            n: How many.
            mask: True at real positions, in any pattern; all by default.

        Returns:
            ``sequences`` ``[batch, n, time]`` and ``scores`` ``[batch, n]``; PAD and −inf where a
            row has fewer than n paths.
        """
        emissions, mask = self._inputs(emissions, mask)
        return decoding.nbest(self._scores(emissions), mask, n, "CRF")

    @eagerly
    @torch.no_grad()
    def sample(
        self,
        emissions: Float[Tensor, "batch time tag"],
        num_samples: int,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch num_samples time"]:
        """Return sequences drawn from the distribution, exactly and independently.

        Args:
            emissions: Score of each tag at each position; −inf forbids it there.
            num_samples: How many per row.
            mask: True at real positions, in any pattern; all by default.
            generator: Source of randomness, on the device of ``emissions``; torch's default one
                if None.

        Returns:
            ``[batch, num_samples, time]``, int64; PAD where masked, and everywhere in a row all of
            whose paths are forbidden.
        """
        emissions, mask = self._inputs(emissions, mask)
        decoding.check_count(num_samples, "num_samples", "CRF")
        if not emissions.numel():
            return decoding.no_sequences(emissions, num_samples)
        problem, _ = self._problem(emissions, mask)
        nodes, edges = likelihood.time_major(problem.scores, problem)
        scores = torch.stack(log_space.forward_scores(nodes, edges))
        return decoding.sample(scores, edges, problem.chains, num_samples, generator)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three ragged sequences over four tags.

        Args:
            generator: Source of randomness; the global one by default.
        """
        mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
        tags = torch.randint(4, (3, 6), generator=generator)
        return Example(
            params={"num_tags": 4},
            inputs={
                "emissions": torch.randn(3, 6, 4, generator=generator),
                "tags": torch.where(mask, tags, 0),
                "mask": mask,
            },
        )

    def _inputs(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return emissions and mask batch first, if they fit."""
        emissions = self._batch_first(emissions)
        mask = None if mask is None else self._batch_first(mask)
        check_emissions(emissions, "CRF", self.num_tags)
        check_mask(mask, emissions, "CRF")
        return emissions, mask

    def _tags(self, tags: Tensor, emissions: Tensor) -> Tensor:
        """Return tags batch first, if they fit."""
        tags = self._batch_first(tags)
        check_tags(tags, emissions, "CRF")
        return tags.long()

    def _batch_first(self, values: Tensor) -> Tensor:
        return values if self.batch_first or values.dim() < 2 else values.transpose(0, 1)

    def _scores(self, emissions: Tensor) -> likelihood.Scores:
        """Return the scores, forbidden ones −inf."""
        return likelihood.Scores(
            emissions,
            _forbid(self.transitions, self.allowed_transitions),
            self._boundary(self.start_transitions, self.allowed_start),
            self._boundary(self.end_transitions, self.allowed_end),
            self.allowed_transitions,
            self._reach,
        )

    def _boundary(self, scores: Tensor | None, allowed: Tensor | None) -> Tensor | None:
        if scores is None and allowed is not None:
            scores = torch.zeros_like(self.transitions[0])
        return None if scores is None else _forbid(scores, allowed)

    def _problem(
        self, emissions: Tensor, mask: Tensor | None
    ) -> tuple[likelihood.Problem, likelihood.Facts]:
        problem = likelihood.prepare(self._scores(emissions), mask)
        facts = likelihood.Facts.of(problem)
        self._check_facts(facts, emissions, mask)
        return problem, facts

    def _check_facts(self, facts: likelihood.Facts, emissions: Tensor, mask: Tensor | None) -> None:
        if not (facts.peak < torch.inf and facts.edge_peak < torch.inf):
            raise not_finite(emissions, mask, dict(self.named_parameters()), "CRF")

    def _nothing(self, emissions: Tensor) -> Tensor:
        """Return zeros ``[batch]`` that have a gradient, for a batch without a position."""
        zero = self.transitions[:0].sum()
        for boundary in (self.start_transitions, self.end_transitions):
            zero = zero if boundary is None else zero + boundary[:0].sum()
        dtype = computing_dtype(emissions, self.transitions)
        return emissions.to(dtype).flatten(1).sum(1) + zero.to(dtype)


def _forbid(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def _check_arguments(
    num_tags: int, scheme: str | None, tag_names: Sequence[str] | None, forbidden: str
) -> None:
    if num_tags < 1:
        raise ArgumentError(
            f"`num_tags` of CRF must be at least 1. Found {num_tags}.", argument="num_tags"
        )
    if tag_names is not None and len(tag_names) != num_tags:
        raise ArgumentError(
            f"`tag_names` of CRF must name num_tags = {num_tags} tags. Found {len(tag_names)}.",
            argument="tag_names",
        )
    if scheme is not None and tag_names is None:
        raise ArgumentError(
            f"`tag_names` of CRF must be given with scheme={scheme!r}, in the order of the tags. "
            f"Found None.",
            argument="tag_names",
        )
    if forbidden not in {"raise", "inf"}:
        raise ArgumentError(
            f"`forbidden` of CRF must be 'raise' or 'inf'. Found {forbidden!r}.",
            argument="forbidden",
        )


def _all_constraints(
    num_tags: int,
    scheme: str | None,
    tag_names: Sequence[str] | None,
    constraints: Constraints | Tensor | None,
) -> Constraints | None:
    """Return what scheme and constraints allow together."""
    if constraints is not None and not isinstance(constraints, Constraints):
        anywhere = torch.ones(num_tags, dtype=torch.bool)
        constraints = Constraints(anywhere, torch.as_tensor(constraints).cpu(), anywhere)
    if constraints is not None and len(constraints.start) != num_tags:
        raise ArgumentError(
            f"`constraints` of CRF must be for num_tags = {num_tags} tags. "
            f"Found {len(constraints.start)}.",
            argument="constraints",
        )
    if scheme is None or tag_names is None:
        return constraints
    of_scheme = scheme_constraints(tag_names, scheme)
    return of_scheme if constraints is None else of_scheme & constraints
