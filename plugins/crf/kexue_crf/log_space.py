r"""The chain's sums in log space: exact for any scores, differentiable any number of times.

The recursion of the post's (9)–(10), :math:`Z_{t+1} = (Z_t G) \otimes H_{t+1}`, in logarithms:

.. math::
    \log\alpha_{t+1}[j] = \log\sum_i \exp(\log\alpha_t[i] + g[i, j]) + h_{t+1}[j]

It takes a tag² exponential per position, where :mod:`kexue_crf.scaled` takes one product of
matrices; it is what that falls back to when scores are too far apart for probability space, and
what is differentiated when gradients are differentiated again.

Everything here is time-major and without gaps: ``nodes`` ``[time, batch, tag]`` are emissions
with the start and end scores in their first and last steps.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue_crf.chains import Chains

__all__ = ["chain_entropy", "forward_scores", "log_partition", "log_product", "marginals"]


class _LogProduct(torch.autograd.Function):
    """Keeps vectors instead of the tag² sums, and has gradient 0 where everything is −inf."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, matrix: Tensor) -> Tensor:
        sums = vectors.unsqueeze(2) + matrix
        peak = _finite(sums.amax(1))
        result = sums.sub_(peak.unsqueeze(1)).exp_().sum(1).log_().add_(peak)
        ctx.save_for_backward(vectors, matrix, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        vectors, matrix, result = ctx.saved_tensors
        shares = (vectors.unsqueeze(2) + matrix - _finite(result).unsqueeze(1)).exp()
        shares = shares * gradient.unsqueeze(1)
        return shares.sum(2), shares.sum(0)


def _finite(values: Tensor) -> Tensor:
    """Return ``values`` with 0 for −inf: what may be subtracted without making NaN."""
    return torch.where(values == -torch.inf, 0, values)


def log_product(
    vectors: Float[Tensor, "batch tag"], matrix: Float[Tensor, "tag tag"]
) -> Float[Tensor, "batch tag"]:
    r"""Return :math:`\log(e^{vectors} e^{matrix})`, with :math:`-\infty` for a sum of nothing.

    Args:
        vectors: A row of logarithms per sequence, over the tags that are left.
        matrix: ``[from, to]`` logarithms.
    """
    result: Tensor = _LogProduct.apply(vectors, matrix)  # type: ignore[no-untyped-call]
    return result


def forward_scores(
    nodes: Float[Tensor, "time batch tag"], edges: Float[Tensor, "tag tag"]
) -> list[Tensor]:
    r"""Return :math:`\log\alpha_t` ``[batch, tag]`` for each step."""
    scores = [nodes[0]]
    for node in nodes[1:].unbind(0):
        scores.append(log_product(scores[-1], edges) + node)
    return scores


def log_partition(
    nodes: Float[Tensor, "time batch tag"],
    edges: Float[Tensor, "tag tag"],
    last: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    r"""Return :math:`\log Z` in nats.

    Args:
        nodes: Scores of the tags, step by step.
        edges: ``[from, to]`` scores.
        last: The last step of each chain.
    """
    return _total(_at_last(forward_scores(nodes, edges), last))


def marginals(
    nodes: Float[Tensor, "time batch tag"], edges: Float[Tensor, "tag tag"], chains: Chains
) -> Float[Tensor, "time batch tag"]:
    r"""Return :math:`\alpha_t \otimes \beta_t / Z`: the probability of each tag at each step.

    Args:
        nodes: Scores of the tags, step by step.
        edges: ``[from, to]`` scores.
        chains: The chains; behind their ends the result is 0, as in a chain without a path.
    """
    mirrored = chains.mirrored().unsqueeze(2).expand_as(nodes)
    alpha = forward_scores(nodes, edges)
    beta = torch.stack(forward_scores(nodes.gather(0, mirrored), edges.T)).gather(0, mirrored)
    # Both hold the score of the step itself.
    possible = nodes > -torch.inf
    joint = torch.stack(alpha) + beta - torch.where(possible, nodes, 0)
    total = _total(_at_last(alpha, chains.last)).unsqueeze(1)
    possible = possible & chains.valid.unsqueeze(2) & (total > -torch.inf)
    return torch.where(possible, joint - _finite(total), -torch.inf).exp()


def _total(scores: Tensor) -> Tensor:
    return log_product(scores, scores.new_zeros(scores.shape[1], 1)).squeeze(1)


def _at_last(scores: list[Tensor], last: Tensor) -> Tensor:
    return torch.stack(scores)[last, torch.arange(len(last), device=last.device)]


def chain_entropy(
    nodes: Float[Tensor, "time batch tag"],
    edges: Float[Tensor, "tag tag"],
    last: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    r"""Return the entropy of the distribution over paths, in nats.

    Beside :math:`\log\alpha` runs the entropy of the prefix given its last tag
    (Hernando, Crespi & Cybenko, 2005), a sum of terms :math:`\ge 0`, so that nothing cancels:

    .. math::
        \eta_{t+1}[j] = \sum_i q_{ij} (\eta_t[i] - \log q_{ij}), \qquad
        q_{ij} = \alpha_t[i] G_{ij} / \sum_k \alpha_t[k] G_{kj}

    Args:
        nodes: Scores of the tags, step by step.
        edges: ``[from, to]`` scores.
        last: The last step of each chain.
    """
    score, entropy = nodes[0], torch.zeros_like(nodes[0])
    scores, entropies = [score], [entropy]
    for node in nodes[1:].unbind(0):
        entropy = _mixture_entropy(score, entropy, edges)
        score = log_product(score, edges) + node
        scores.append(score)
        entropies.append(entropy)
    to_end = edges.new_zeros(edges.shape[0], 1)
    return _mixture_entropy(_at_last(scores, last), _at_last(entropies, last), to_end).squeeze(1)


def _mixture_entropy(score: Tensor, entropy: Tensor, edges: Tensor) -> Tensor:
    joint = score.unsqueeze(2) + edges
    log_share = joint - _finite(log_product(score, edges)).unsqueeze(1)
    possible = log_share > -torch.inf
    log_share = torch.where(possible, log_share, 0)  # 0 · log 0 = 0, and so is its gradient
    share = torch.where(possible, log_share.exp(), 0)
    return (share * (entropy.unsqueeze(2) - log_share)).sum(1)
