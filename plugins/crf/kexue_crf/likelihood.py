"""Log-likelihood of tags under a chain, and its gradients: what the CRF module computes with.

Scores are first made relative to the best tag of each position and to the best transition. All
sums are then of what differs from these, so that log Z and the score of the tags, which nearly
cancel where a model is confident, never meet as large numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue_crf import log_space, scaled
from kexue_crf.chains import Chains, computing_dtype, widest_dtype

__all__ = [
    "Facts",
    "Problem",
    "Scores",
    "gold_path",
    "log_partition",
    "marginals",
    "path_score",
    "prepare",
    "time_major",
]


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a chain.

    Args:
        emissions: ``[batch, time, tag]``.
        transitions: ``[from, to]``, −inf where forbidden.
        start: ``[tag]``, added at the first real position; or None.
        end: ``[tag]``, added at the last real position; or None.
        allowed: ``[from, to]``, false where ``transitions`` are −inf by design; None if nowhere.
        reach: In how many steps exactly any tag leads to any other along allowed transitions;
            infinite if never.
    """

    emissions: Float[Tensor, "batch time tag"]
    transitions: Float[Tensor, "tag tag"]
    start: Float[Tensor, " tag"] | None = None
    end: Float[Tensor, " tag"] | None = None
    allowed: Bool[Tensor, "tag tag"] | None = None
    reach: float = 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the scores, in order."""
        return self.emissions, self.transitions, self.start, self.end

    def need_gradient(self) -> bool:
        """Return whether a gradient by one of them may be asked for."""
        return torch.is_grad_enabled() and any(
            score is not None and score.requires_grad for score in self.tensors()
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """Scores relative to the best, and what the recursions need beside them.

    Args:
        scores: The scores as they were given.
        chains: Which position is which step.
        log_nodes: ``[batch * time + 1, tag]``: emissions with start and end scores, their maximum
            in each row 0. The last row is 0: it stands for what is behind a chain's end.
        log_edges: ``[from, to]``: transitions, their maximum 0.
        peaks: ``[batch * time + 1]``: what was subtracted from each row.
        edge_peak: What was subtracted from the transitions.
        drop: What the best continuation from a tag costs per step, at most, in nats.
    """

    scores: Scores
    chains: Chains
    log_nodes: Float[Tensor, "rows tag"]
    log_edges: Float[Tensor, "tag tag"]
    peaks: Float[Tensor, " rows"]
    edge_peak: Float[Tensor, ""]
    drop: Float[Tensor, ""]

    def baseline(self) -> Float[Tensor, " batch"]:
        """Return what was subtracted from the score of every path of a chain."""
        rows = self.chains.rows
        peaks = self.peaks.index_select(0, rows.view(-1)).view_as(rows)
        total = torch.where(self.chains.valid, peaks, 0).sum(0, dtype=widest_dtype(peaks))
        return total + self.edge_peak * self.chains.last


@dataclass(frozen=True, slots=True)
class Facts:
    """What the host knows after the one synchronisation of a call.

    Args:
        peak: The highest score of a tag at a real position; NaN if one is NaN.
        edge_peak: The highest transition; NaN if one is NaN.
        drop: What the best continuation from a tag costs per step, at most, in nats.
        lowest_tag: The lowest tag.
        highest_tag: The highest tag.
        lowest_score: The lowest score of a row of tags; −inf if one is forbidden.
    """

    peak: float
    edge_peak: float
    drop: float
    lowest_tag: float = 0
    highest_tag: float = 0
    lowest_score: float = 0

    @classmethod
    def of(cls, problem: Problem, *more: Tensor) -> Facts:
        """Bring them to the host: of the problem and, if there are tags, of these."""
        peaks, mask = problem.peaks[:-1], problem.chains.mask
        if mask is not None:
            peaks = torch.where(mask.reshape(-1), peaks, -torch.inf)
        device_side = (peaks.max(), problem.edge_peak, problem.drop, *more)
        return cls(*torch.stack([fact.detach() for fact in device_side]).tolist())


@torch.no_grad()
def prepare(scores: Scores, mask: Bool[Tensor, "batch time"] | None) -> Problem:
    """Make scores relative to the best.

    Args:
        scores: The scores, of at least one row and one position.
        mask: True at real positions; None where all are.
    """
    chains = Chains.of(scores.emissions, mask)
    dtype = computing_dtype(*scores.tensors())
    edges = scores.transitions.to(dtype)
    edge_peak = _finite(edges.max())
    edges = edges - edge_peak
    # Where transitions are forbidden by design, the others set the pace.
    within = edges if scores.allowed is None else torch.where(scores.allowed, edges, 0)
    drop = -within.min()
    nodes = _emission_rows(scores, dtype)
    if scores.reach > 1:
        drop = drop + _spread(nodes[:-1], mask) + _span(scores.start) + _span(scores.end)
    for boundary, rows in ((scores.start, chains.rows[0]), (scores.end, chains.ends)):
        if boundary is not None:
            nodes.index_add_(0, rows, boundary.to(dtype).expand(len(rows), -1))
    nodes[-1] = 0
    peaks = _finite(nodes.amax(1))
    nodes.sub_(peaks.unsqueeze(1))
    return Problem(scores, chains, nodes, edges, peaks, edge_peak, drop)


def _finite(values: Tensor) -> Tensor:
    """Return ``values`` with 0 for −inf: what may be subtracted without making NaN."""
    return values.masked_fill(values == -torch.inf, 0)


def _emission_rows(scores: Scores, dtype: torch.dtype) -> Tensor:
    batch, time, tags = scores.emissions.shape
    rows = scores.emissions.new_empty(batch * time + 1, tags, dtype=dtype)
    rows[:-1].view(batch, time, tags).copy_(scores.emissions)
    return rows


def _spread(nodes: Tensor, mask: Tensor | None) -> Tensor:
    """Return how far apart the tags of one position are, at most; infinite if one is −inf."""
    spread = nodes.amax(1) - nodes.amin(1)
    return (spread if mask is None else torch.where(mask.reshape(-1), spread, 0)).max()


def _span(boundary: Tensor | None) -> Tensor | float:
    """Return how far apart the tags that may start or end are."""
    if boundary is None:
        return 0.0
    highest = boundary.max()
    return highest - torch.where(boundary == -torch.inf, highest, boundary).min()


def gold_path(
    problem: Problem, tags: Int[Tensor, "batch time"]
) -> tuple[Int[Tensor, "time batch"], Float[Tensor, " batch"], tuple[Tensor, Tensor]]:
    """Return the tags as paths, their scores beside the best of each position, and their range.

    Args:
        problem: The problem.
        tags: Any numbers where masked. Tags out of range are moved into it.

    Returns:
        The path, step by step, 0 behind a chain's end; its score; the lowest and highest tag.
    """
    chains, count = problem.chains, problem.log_nodes.shape[1]
    path = tags.reshape(-1).index_select(0, chains.rows.view(-1)).view_as(chains.rows)
    path.masked_fill_(~chains.valid, 0)
    extremes = torch.aminmax(path)
    path.clamp_(0, count - 1)
    nodes, edges = _indices(path, chains, count)
    score = problem.log_nodes.view(-1).index_select(0, nodes.view(-1)).view_as(nodes)
    score[1:] += problem.log_edges.reshape(-1).index_select(0, edges.view(-1)).view_as(edges)
    score = score.masked_fill_(~chains.valid, 0).sum(0, dtype=widest_dtype(score))
    return path, score, (extremes.min, extremes.max)


def _indices(path: Tensor, chains: Chains, tags: int) -> tuple[Tensor, Tensor]:
    """Return where a path's scores stand in flattened emissions and transitions."""
    nodes = torch.add(path, chains.rows, alpha=tags)
    return nodes, torch.add(path[1:], path[:-1], alpha=tags)


def path_score(
    scores: Scores, tags: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None
) -> Float[Tensor, " batch"]:
    """Return the score of tags, not relative to anything, on the tape.

    Args:
        scores: The scores.
        tags: In range, at least where they are real.
        mask: True at real positions; None where all are.
    """
    chains, dtype = Chains.of(scores.emissions, mask), computing_dtype(*scores.tensors())
    path = torch.where(chains.valid, chains.gather(tags), 0)
    nodes, edges = _indices(path, chains, scores.emissions.shape[2])
    score = scores.emissions.reshape(-1)[nodes].to(dtype)
    score = torch.cat([score[:1], score[1:] + scores.transitions.to(dtype).reshape(-1)[edges]])
    total = torch.where(chains.valid, score, 0).sum(0)
    ends = path.gather(0, chains.last.unsqueeze(0)).squeeze(0)
    for boundary, tag in ((scores.start, path[0]), (scores.end, ends)):
        if boundary is not None:
            total = total + boundary.to(dtype)[tag]
    return torch.where(chains.lengths > 0, total, 0)


def _plan(problem: Problem, facts: Facts) -> scaled.Plan | None:
    time, _ = problem.chains.rows.shape
    _, tags = problem.log_nodes.shape
    dtypes = dict.fromkeys((problem.log_nodes.dtype, widest_dtype(problem.log_nodes)))
    reach = problem.scores.reach
    return scaled.plan(tuple(dtypes), tags=tags, time=time, drop=facts.drop, reach=reach)


def log_partition(
    problem: Problem,
    facts: Facts,
    path: Int[Tensor, "time batch"] | None = None,
    score: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""Return :math:`\log Z` of each chain beside the best, minus the score of a path if given.

    Args:
        problem: The problem. Its ``log_nodes`` are used up.
        facts: What is known of it.
        path: Tags, with their score the negative log-likelihood: :math:`+\infty` where that is
            :math:`-\infty`, with gradient 0.
        score: The score of the tags beside the best.
    """
    plan = _plan(problem, facts)
    if plan is None:
        return _in_log_space(problem.scores, problem, path)
    if problem.scores.need_gradient():
        task = _Task(problem, plan, path, score)
        result: Tensor = _LogPartition.apply(task, *problem.scores.tensors())  # type: ignore[no-untyped-call]
        return result
    return _beside(_messages(problem, plan, both=False).log_total, problem, score)


def _messages(problem: Problem, plan: scaled.Plan, *, both: bool) -> scaled.Messages:
    return scaled.pass_messages(
        problem.log_nodes, problem.log_edges, problem.chains, plan, both=both
    )


def _beside(log_total: Tensor, problem: Problem, score: Tensor | None) -> Tensor:
    """Subtract the score of the tags, and settle what has no path."""
    if score is not None:
        log_total = (log_total - score).masked_fill(score == -torch.inf, torch.inf)
    return log_total.masked_fill(problem.chains.lengths == 0, 0).to(problem.edge_peak.dtype)


def time_major(scores: Scores, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return nodes ``[time, batch, tag]`` and edges of the log-space recursions, on the tape.

    In float64 where there is one: far apart is where log space is for, and there sums are large.

    Args:
        scores: What gradients are asked for by.
        problem: What was prepared from their values.
    """
    chains, dtype = problem.chains, widest_dtype(scores.emissions)
    nodes = chains.gather(scores.emissions).to(dtype)
    nodes = nodes - problem.peaks.index_select(0, chains.rows.view(-1)).view(*nodes.shape[:2], 1)
    nodes = torch.where(chains.valid.unsqueeze(2), nodes, 0)
    steps = torch.arange(len(nodes), device=nodes.device).view(-1, 1, 1)
    if scores.start is not None:
        nodes = torch.where(steps == 0, nodes + scores.start.to(dtype), nodes)
    if scores.end is not None:
        nodes = torch.where(steps == chains.last.view(-1, 1), nodes + scores.end.to(dtype), nodes)
    return nodes, scores.transitions.to(dtype) - problem.edge_peak


def _in_log_space(scores: Scores, problem: Problem, path: Tensor | None) -> Tensor:
    nodes, edges = time_major(scores, problem)
    log_total = log_space.log_partition(nodes, edges, problem.chains.last)
    if path is None:
        return _beside(log_total, problem, None)
    score = nodes.gather(2, path.unsqueeze(2)).squeeze(2)
    pairs = edges.reshape(-1)[torch.add(path[1:], path[:-1], alpha=edges.shape[0])]
    score = torch.cat([score[:1], score[1:] + pairs])
    return _beside(log_total, problem, torch.where(problem.chains.valid, score, 0).sum(0))


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be computed, beside the tensors that gradients are asked for by."""

    problem: Problem
    plan: scaled.Plan
    path: Tensor | None
    score: Tensor | None


class _LogPartition(torch.autograd.Function):
    """Probability space with analytic gradients; the gradients' own go through log space."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *scores: Tensor | None) -> Tensor:
        problem = task.problem
        messages = _messages(problem, task.plan, both=True)
        value = _beside(messages.log_total, problem, task.score)
        ctx.save_for_backward(*scores)
        ctx.problem = replace(problem, log_nodes=problem.log_nodes.new_empty(0, 0))
        ctx.messages, ctx.path, ctx.finite = messages, task.path, value.abs() < torch.inf
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be on the tape
            return None, *_taped_gradients(ctx, gradient)
        return None, *_gradients(ctx, gradient.masked_fill(~ctx.finite, 0))


def _taped_gradients(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
    value = _in_log_space(Scores(*tensors), ctx.problem, ctx.path)
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]


def _gradients(ctx: Any, weight: Tensor) -> list[Tensor | None]:
    """Return expected counts minus, if there is a path, its own."""
    chains, path = ctx.problem.chains, ctx.path
    for_emissions, for_transitions, for_start, for_end = ctx.needs_input_grad[1:]
    nodes, edges = scaled.expectations(ctx.messages, chains, weight, edges=for_transitions)
    if path is not None:
        counts = (chains.valid * weight).neg_().to(nodes.dtype)
        node_indices, edge_indices = _indices(path, chains, nodes.shape[1])
        nodes.view(-1).index_add_(0, node_indices.view(-1), counts.view(-1))
        if edges is not None:
            edges.view(-1).index_add_(0, edge_indices.view(-1), counts[1:].view(-1))
    start = nodes.index_select(0, chains.rows[0]).sum(0) if for_start else None
    end = nodes.index_select(0, chains.ends).sum(0) if for_end else None
    tensors = ctx.saved_tensors
    found = (nodes.view_as(tensors[0]) if for_emissions else None, edges, start, end)
    return [
        None if gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, tensors, strict=True)
    ]


def marginals(problem: Problem, facts: Facts) -> Float[Tensor, "batch time tag"]:
    """Return the probability of each tag at each position, 0 where masked.

    On a tape, in log space, where a gradient may be asked for.

    Args:
        problem: The problem. Its ``log_nodes`` are used up.
        facts: What is known of it.
    """
    plan, scores = _plan(problem, facts), problem.scores
    if plan is not None and not scores.need_gradient():
        messages = _messages(problem, plan, both=True)
        ones = messages.log_total.new_ones(len(messages.log_total))
        nodes, _ = scaled.expectations(messages, problem.chains, ones, edges=False)
        return nodes.view(scores.emissions.shape).to(problem.edge_peak.dtype)
    nodes, edges = time_major(scores, problem)
    found = log_space.marginals(nodes, edges, problem.chains)
    batch, time, tags = scores.emissions.shape
    rows = torch.add(problem.chains.batch.unsqueeze(1), problem.chains.steps, alpha=batch)
    found = found.view(-1, tags).index_select(0, rows.view(-1)).view(batch, time, tags)
    return found.to(problem.edge_peak.dtype)
