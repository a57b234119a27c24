r"""Sums over all paths in probability space: both directions in one loop, gradients without a tape.

With :math:`H_t = e^{h_t}` and :math:`G = e^g`, each scaled to a largest entry of 1, the recursion
of the post's (10) and its mirror image,

.. math::
    \alpha_{t+1} = (\alpha_t G) \otimes H_{t+1}, \qquad
    \tilde\beta_{t-1} = (\tilde\beta_t G^\top) \otimes H_{t-1}
    \quad\text{for}\quad \tilde\beta_t = H_t \otimes \beta_t,

are one batched product of matrices per step when the second runs on reversed chains. The
gradients of :math:`\log Z` by emissions and transitions are

.. math::
    \gamma_t = \alpha_t \otimes \beta_t / Z, \qquad
    \sum_t \xi_t = G \otimes \sum_t \alpha_t^\top \tilde\beta_{t+1} / Z,

the second one product for all steps.

**When this is exact.** Numbers are divided by their sum every ``interval`` steps. All terms are
positive: nothing cancels, and mass is lost only where a number falls below the smallest one of its
dtype. Let any tag lead to any other in exactly ``reach`` steps, and let the best continuation from
a tag cost at most ``drop`` nats per step. Between divisions the largest entry then falls by at
most ``drop`` and grows by at most ``log(tag)`` per step, and what one tag can still gain on
another is settled within ``reach`` steps. Following both directions over up to ``interval`` steps
each, the share of Z that is lost is at most

.. math::
    time \cdot tiny \cdot \exp(2 (interval + reach)(drop + \log tag) + 4 \log tag).

:func:`plan` takes the dtype and the interval for which that is below rounding, or neither: then
:mod:`kexue_crf.log_space` does the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kexue_crf.chains import Chains, widest_dtype

__all__ = ["Messages", "Plan", "expectations", "pass_messages", "plan"]

_BUDGET = {torch.float32: 87.3 - 20.0, torch.float64: 708.3 - 44.0}
"""Nats between the smallest normal number and what may be lost of Z, a hundredth of rounding."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How probability space is safe.

    Args:
        dtype: What to compute in.
        interval: After how many steps to divide by the sum.
    """

    dtype: torch.dtype
    interval: int


def plan(
    dtypes: Sequence[torch.dtype], *, tags: int, time: int, drop: float, reach: float
) -> Plan | None:
    """Return the first of ``dtypes`` in which probability space loses nothing, or None.

    Args:
        dtypes: What may be computed in, preferred first.
        tags: Number of tags.
        time: Number of steps.
        drop: What the best continuation from any tag costs per step, at most, in nats.
        reach: In how many steps exactly any tag leads to any other; infinite if never.
    """
    # Within a chain of `time` steps no path can cost more than `time` drops.
    reach = min(reach, time)
    log_tags = math.log(tags)
    rate = 2 * max(drop + log_tags, 1e-9)
    for dtype in dtypes:
        steps = (_BUDGET[dtype] - 4 * log_tags - math.log(time)) / rate - reach
        if steps >= 1:
            return Plan(dtype, int(min(steps, time)))
    return None


@dataclass(frozen=True, slots=True)
class Messages:
    r"""What the loop leaves.

    Args:
        states: Step by step :math:`\alpha_t` in ``[:, 0]`` and, on reversed chains,
            :math:`\tilde\beta` in ``[:, 1]``; each divided by something.
        edges: G and its transpose.
        log_total: :math:`\log \sum_j \alpha_n[j]`, per chain.
    """

    states: Float[Tensor, "time direction batch tag"]
    edges: Float[Tensor, "direction tag tag"]
    log_total: Float[Tensor, " batch"]


def pass_messages(
    log_nodes: Float[Tensor, "rows tag"],
    log_edges: Float[Tensor, "tag tag"],
    chains: Chains,
    plan: Plan,
    *,
    both: bool,
) -> Messages:
    """Run the recursion.

    Args:
        log_nodes: ``[batch * time + 1, tag]``: h, its maximum 0 in each row; the last row is 0.
            Overwritten.
        log_edges: ``[from, to]``: g, its maximum 0.
        chains: Which row is which step of which chain.
        plan: Dtype and interval.
        both: Run both directions, for gradients; else only forward, for the total.
    """
    edges = log_edges.to(plan.dtype).exp().unsqueeze(0)
    order = chains.rows.unsqueeze(1)
    if both:
        edges = torch.cat([edges, edges.transpose(1, 2)])
        order = torch.stack([chains.rows, chains.rows.gather(0, chains.mirrored())], 1)
    # Behind a chain's end H is 1: what runs on there stays positive and is not looked at.
    order = order.masked_fill(~chains.valid.unsqueeze(1), len(log_nodes) - 1)
    nodes = log_nodes.to(plan.dtype).exp_().index_select(0, order.view(-1))
    states = nodes.view(*order.shape, -1)
    scales = _recur(states, edges, plan.interval)
    return Messages(states, edges, _log_total(states, scales, chains, plan.interval))


def _recur(states: Tensor, edges: Tensor, interval: int) -> list[Tensor]:
    """Turn H into states, in place; return what they were divided by."""
    tiny = torch.finfo(states.dtype).tiny  # a chain without a path stays 0 and is not 0 / 0
    steps = states.unbind(0)
    arriving = torch.empty_like(steps[0])
    scales = []
    for t in range(1, len(steps)):
        torch.bmm(steps[t - 1], edges, out=arriving)
        steps[t].mul_(arriving)
        if t % interval == 0:
            scale = steps[t].sum(-1, keepdim=True).clamp_(min=tiny)
            steps[t].div_(scale)
            scales.append(scale)
    return scales


def _log_total(states: Tensor, scales: list[Tensor], chains: Chains, interval: int) -> Tensor:
    batch, tags = states.shape[2:]
    slots = torch.add(chains.batch, chains.last, alpha=states.shape[1] * batch)
    total = states.view(-1, tags).index_select(0, slots).sum(-1).log_().to(widest_dtype(states))
    if scales:
        logs = torch.stack(scales)[:, 0, :, 0].log_()
        at = torch.arange(1, len(scales) + 1, device=states.device) * interval
        total += logs.mul_(at[:, None] <= chains.last).sum(0, dtype=total.dtype)
    return total


def expectations(
    messages: Messages, chains: Chains, weight: Float[Tensor, " batch"], *, edges: bool
) -> tuple[Float[Tensor, "rows tag"], Float[Tensor, "tag tag"] | None]:
    r"""Return the gradients of :math:`\sum_b weight_b \log Z_b`: expected counts.

    Args:
        messages: What the loop left, in both directions.
        chains: Which row is which step of which chain.
        weight: One factor per chain.
        edges: Also those of the pairs of tags.

    Returns:
        ``[batch * time, tag]``, by the emissions, 0 where masked; and ``[from, to]``, by the
        transitions.
    """
    _, _, batch, tags = messages.states.shape
    # alpha, on reversed chains, where beta is: alpha[s] stands beside beta[s].
    mirrored = chains.mirrored()
    slots = torch.add(chains.batch, mirrored, alpha=2 * batch)
    alpha = messages.states.view(-1, tags).index_select(0, slots.view(-1)).view(-1, batch, tags)
    entering = messages.states[:-1, 1].reshape(-1, tags)  # at s - 1, where alpha is at s
    beta = torch.ones_like(alpha)
    # Products are written with out=, which autocast leaves in their dtype.
    torch.mm(entering, messages.edges[1], out=beta[1:].view(-1, tags))
    products = beta.mul_(alpha)
    total = products.sum(-1)  # Z, divided as alpha and beta are
    nowhere = ~(chains.valid & (total > 0))
    factor = (weight / total).masked_fill_(nowhere, 0).unsqueeze(-1)
    slots = torch.add(chains.batch, mirrored, alpha=batch).T.gather(1, chains.steps)
    nodes = products.mul_(factor).view(-1, tags).index_select(0, slots.view(-1))
    if not edges:
        return nodes, None
    leaving = alpha.mul_(factor)[1:].view(-1, tags)
    pairs = torch.mm(leaving.T, entering, out=torch.empty_like(messages.edges[0]))
    return nodes, pairs.mul_(messages.edges[0])
