"""Paths through a chain of tags: the best, the n best, and random ones."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.eager import eagerly
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import PAD, DecodeResult
from kexue_crf.chains import Chains, computing_dtype
from kexue_crf.checks import check_emissions, check_mask, check_shape, not_finite
from kexue_crf.likelihood import Scores
from kexue_crf.max_plus import Steps, best_paths

__all__ = ["best", "check_count", "nbest", "no_sequences", "sample", "viterbi", "viterbi_nbest"]


@eagerly
def viterbi(
    emissions: Float[Tensor, "batch time tag"],
    transitions: Float[Tensor, "tag tag"] | Float[Tensor, "batch time-1 tag tag"],
    *,
    start: Float[Tensor, " tag"] | None = None,
    end: Float[Tensor, " tag"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> DecodeResult:
    r"""Return the best path of each row and its score.

    .. math::
        \max_y\; start[y_1] + \sum_t emissions[t, y_t]
            + \sum_{t \ge 2} transitions[y_{t-1}, y_t] + end[y_n]

    Of equally good paths it returns the one whose last tag has the lowest index, among these the
    one whose last but one has, and so on backwards, as pytorch-crf does. (Equal means equal after
    rounding; where scores are not exact numbers, the order of additions can part equal paths.)

    Args:
        emissions: Score of each tag at each position; :math:`-\infty` forbids it.
        transitions: ``[from, to]`` scores of neighbouring tags, :math:`-\infty` forbids; or one
            such matrix per row and step, where ``transitions[b, t]`` leads from position ``t`` to
            position ``t + 1`` (over a masked gap, the matrix that leads into the real position
            behind the gap counts).
        start: Score of each tag as the first; 0 by default.
        end: Score of each tag as the last; 0 by default.
        mask: True at real positions, in any pattern: the chain connects the real positions. All
            are real by default.

    Returns:
        ``sequences`` ``[batch, time]``, int64, at the positions of the input and
        :data:`~kexue.core.interfaces.decoder.PAD` where masked, and ``scores`` ``[batch]``,
        float32 (float64 if an input is). A row without a real position has score 0. A row all of
        whose paths are forbidden has score :math:`-\infty` and PAD everywhere.

    Raises:
        ArgumentError: If shapes or dtypes do not fit, or a score is NaN or :math:`+\infty`.

    Example:
        >>> emissions = torch.tensor([[[1.0, 0.0], [0.2, 0.0]]])
        >>> viterbi(emissions, torch.tensor([[-1.0, 0.0], [0.0, 0.0]])).tolist()
        [[0, 1]]
    """
    scores = Scores(emissions, transitions, start, end)
    _check(scores, mask, "viterbi")
    return best(scores, mask, "viterbi")


@eagerly
def viterbi_nbest(
    emissions: Float[Tensor, "batch time tag"],
    transitions: Float[Tensor, "tag tag"] | Float[Tensor, "batch time-1 tag tag"],
    n: int,
    *,
    start: Float[Tensor, " tag"] | None = None,
    end: Float[Tensor, " tag"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> DecodeResult:
    r"""Return the n best paths of each row, best first, and their scores.

    Of equally good paths the one that :func:`viterbi` would prefer comes first.

    Args:
        emissions: As for :func:`viterbi`.
        transitions: As for :func:`viterbi`.
        n: How many paths, at least 1.
        start: As for :func:`viterbi`.
        end: As for :func:`viterbi`.
        mask: As for :func:`viterbi`.

    Returns:
        ``sequences`` ``[batch, n, time]`` and ``scores`` ``[batch, n]``; PAD and
        :math:`-\infty` where a row has fewer than n paths. A row without a real position has one
        path, of score 0.

    Raises:
        ArgumentError: If shapes or dtypes do not fit, a score is NaN or :math:`+\infty`, or n is
            below 1.

    Example:
        >>> emissions = torch.tensor([[[1.0, 0.0], [0.25, 0.0]]])
        >>> found = viterbi_nbest(emissions, torch.zeros(2, 2), 3)
        >>> found.sequences.tolist(), found.scores.tolist()
        ([[[0, 0], [0, 1], [1, 0]]], [[1.25, 1.0, 0.25]])
    """
    scores = Scores(emissions, transitions, start, end)
    _check(scores, mask, "viterbi_nbest")
    return nbest(scores, mask, n, "viterbi_nbest")


def _check(scores: Scores, mask: Tensor | None, owner: str) -> None:
    check_emissions(scores.emissions, owner)
    check_mask(mask, scores.emissions, owner)
    batch, time, tags = scores.emissions.shape
    axes: str = "[tag, tag]"
    shape: tuple[int, ...] = (tags, tags)
    if scores.transitions.dim() == 4:
        steps = (batch, max(time - 1, 0))
        axes, shape = "[batch, time - 1, tag, tag]", (*steps, *shape)
    check_shape(scores.transitions, "transitions", owner, axes=axes, shape=shape)
    for name, boundary in (("start", scores.start), ("end", scores.end)):
        if boundary is not None:
            check_shape(boundary, name, owner, axes="[tag]", shape=(tags,))


def check_count(count: int, name: str, owner: str) -> None:
    """Raise unless ``count`` is at least 1.

    Raises:
        ArgumentError: If it is not.
    """
    if count < 1:
        raise ArgumentError(
            f"`{name}` of {owner} must be at least 1. Found {count}.", argument=name
        )


def _check_found(highest: Tensor, scores: Scores, mask: Tensor | None, owner: str) -> None:
    """Raise if the best scores show that something was NaN or +inf; the only synchronisation."""
    if not bool((highest < torch.inf).all()):
        names = ("start_transitions", "end_transitions") if owner == "CRF" else ("start", "end")
        others = dict(zip(("transitions", *names), scores.tensors()[1:], strict=True))
        raise not_finite(scores.emissions, mask, others, owner)


def no_sequences(emissions: Tensor, *counts: int) -> Tensor:
    """Return sequences of PAD ``[batch, *counts, time]``."""
    batch, time, _ = emissions.shape
    return torch.full((batch, *counts, time), PAD, device=emissions.device)


@torch.no_grad()
def best(scores: Scores, mask: Tensor | None, owner: str) -> DecodeResult:
    """Return what :func:`viterbi` does, of scores that fit.

    Args:
        scores: The scores; transitions also by position.
        mask: True at real positions; None where all are.
        owner: Who is called, for errors.
    """
    dtype = computing_dtype(*scores.tensors())
    if not scores.emissions.numel():
        zeros = scores.emissions.new_zeros(len(scores.emissions), dtype=dtype)
        return DecodeResult(no_sequences(scores.emissions), zeros)
    chains = Chains.of(scores.emissions, mask)
    nodes = _nodes(scores, chains, dtype)
    end = None if scores.end is None else scores.end.to(dtype)
    found = best_paths(nodes, Steps(scores.transitions.to(dtype), chains), end)
    score = torch.where(chains.lengths > 0, found.score, 0)
    _check_found(score, scores, mask, owner)
    sequences = chains.scatter(found.path, PAD)
    return DecodeResult(sequences.masked_fill_(score.unsqueeze(1) == -torch.inf, PAD), score)


def _nodes(scores: Scores, chains: Chains, dtype: torch.dtype) -> Tensor:
    nodes = chains.gather(scores.emissions).to(dtype)
    if scores.start is not None:
        nodes[0] += scores.start.to(dtype)
    return nodes


@torch.no_grad()
def nbest(scores: Scores, mask: Tensor | None, n: int, owner: str) -> DecodeResult:
    """Return what :func:`viterbi_nbest` does, of scores that fit.

    Each tag keeps its n best prefixes, in slots ``tag * n + rank``; a stable sort keeps the order
    of equal ones.

    Args:
        scores: The scores; transitions also by position.
        mask: True at real positions; None where all are.
        n: How many paths.
        owner: Who is called, for errors.
    """
    check_count(n, "n", owner)
    dtype = computing_dtype(*scores.tensors())
    nothing = scores.emissions.new_full((len(scores.emissions), n), -torch.inf, dtype=dtype)
    nothing[:, 0] = 0
    if not scores.emissions.numel():
        return DecodeResult(no_sequences(scores.emissions, n), nothing)
    chains = Chains.of(scores.emissions, mask)
    steps = Steps(scores.transitions.to(dtype), chains)
    nodes = _nodes(scores, chains, dtype)
    slots, back = _fill_slots(nodes, steps, n)
    if scores.end is not None:
        slots = slots + scores.end.to(dtype).unsqueeze(1)
    score, slot = _highest(slots.flatten(1), n)
    score = torch.where(chains.lengths.unsqueeze(1) > 0, score, nothing)
    _check_found(score, scores, mask, owner)
    path = [slot]
    for pointers in reversed(back):
        path.append(pointers.gather(1, path[-1]))
    found = torch.stack(path[::-1]).div_(n, rounding_mode="floor")
    sequences = torch.stack([chains.scatter(ranked, PAD) for ranked in found.unbind(2)], 1)
    return DecodeResult(sequences.masked_fill_(score.unsqueeze(2) == -torch.inf, PAD), score)


def _highest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n highest of the last axis and where they stand, of equal ones the first."""
    ordered = scores.sort(dim=-1, descending=True, stable=True)
    return ordered.values[..., :n], ordered.indices[..., :n]


def _fill_slots(nodes: Tensor, steps: Steps, n: int) -> tuple[Tensor, list[Tensor]]:
    """Return the scores ``[batch, tag, rank]`` at the chains' ends, and where each came from."""
    time, batch, tags = nodes.shape
    slots = nodes.new_full((batch, tags, n), -torch.inf)
    slots[:, :, 0] = nodes[0]
    stay = torch.arange(tags * n, device=nodes.device)
    back = []
    for t in range(1, time):
        value, origin = _advance(slots, steps.into(t).mT, n)
        valid = steps.chains.valid[t].view(-1, 1, 1)
        slots = torch.where(valid, value + nodes[t].unsqueeze(2), slots)
        back.append(torch.where(valid.squeeze(2), origin.flatten(1), stay))
    return slots, back


def _advance(slots: Tensor, into: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n best ``[batch, to, rank]`` of one more step, and the slots they came from.

    The n best come from the n tags whose best prefix is best: only these are looked at.

    Args:
        slots: Scores ``[batch, from, rank]``, best rank first.
        into: Transitions ``[to, from]`` or ``[batch, to, from]``.
        n: How many.
    """
    _, tags, _ = slots.shape
    leading = slots[:, :, 0].unsqueeze(1) + into
    sources = _highest(leading, n)[1].sort().values  # in order of tags again, for equal scores
    arriving = into.expand_as(leading).gather(2, sources).unsqueeze(3)
    ranked = sources.unsqueeze(3).expand(-1, -1, -1, n)
    sums = slots.unsqueeze(1).expand(-1, tags, -1, -1).gather(2, ranked) + arriving
    value, place = _highest(sums.flatten(2), n)
    return value, sources.gather(2, place // n) * n + place % n


def sample(
    scores: Float[Tensor, "time batch tag"],
    edges: Float[Tensor, "tag tag"],
    chains: Chains,
    num_samples: int,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch num_samples time"]:
    """Return random paths: backwards, each tag given the one behind it, by the Gumbel-max rule.

    Args:
        scores: Log-sums over the prefixes that end in each tag, end scores included.
        edges: ``[from, to]`` scores.
        chains: Which position is which step.
        num_samples: How many paths per row.
        generator: Source of randomness.
    """
    time, batch, tags = scores.shape
    into = edges.T.contiguous()
    noise = scores.new_empty(batch, num_samples, tags)

    def draw(log_weights: Tensor) -> Tensor:
        rates = noise.exponential_(generator=generator).clamp_(min=torch.finfo(noise.dtype).tiny)
        return (log_weights - rates.log()).argmax(2)

    ends = scores[chains.last, chains.batch]
    last = tag = draw(ends.unsqueeze(1))
    path = [tag]
    for t in range(time - 2, -1, -1):
        tag = draw(scores[t].unsqueeze(1) + into[tag])
        tag = torch.where((t < chains.last).unsqueeze(1), tag, last)
        path.append(tag)
    found = torch.stack(path[::-1])
    sequences = torch.stack([chains.scatter(drawn, PAD) for drawn in found.unbind(2)], 1)
    impossible = (ends == -torch.inf).all(1) & (chains.lengths > 0)
    return sequences.masked_fill_(impossible.view(-1, 1, 1), PAD)
