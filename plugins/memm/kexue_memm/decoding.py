r"""The best tag sequence of a Markov model, and the marginals of its chains.

Left to right, the log-probability of a whole sequence is a sum of first-order scores,

.. math::
    \log P_\rightarrow(y) = \sum_k f_k(y_k) + \sum_{k \ge 2} g(y_{k-1}, y_k)
        - \log \sum_j e^{f_1(j)} - \sum_{k \ge 2} A_k(y_{k-1}),
    \qquad A_k(a) = \log \sum_j e^{f_k(j) + g(a, j)},

in which each local normaliser :math:`A_k` depends on one tag only: it is folded into the
emissions of the position before, and the search is a Viterbi search with the constant matrix g.
Right to left is its mirror image, and the geometric mean of both directions is half their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core.interfaces.decoder import PAD, DecodeResult
from kexue_crf import viterbi
from kexue_memm.likelihood import Direction, readings
from kexue_memm.tokens import Tokens
from kexue_memm.transitions import Transitions

__all__ = ["Mode", "decode", "marginals"]

Mode = Literal["geometric", "forward", "backward", "raw"]

_DIRECTIONS: dict[Mode, Direction] = {
    "geometric": "both",
    "forward": "forward",
    "backward": "backward",
    "raw": "both",
}

_CHUNK = 1 << 20
"""Elements of the largest temporary tensor of a loop."""


def decode(
    emissions: Float[Tensor, "token tag"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    mode: Mode,
    scale: float = 1.0,
    num_candidates: int | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> DecodeResult:
    """Return the best sequences and their scores.

    Args:
        emissions: Scores of the tokens.
        tokens: How the tokens are chained.
        transitions: Scores of neighbouring tags.
        mode: What is maximised.
        scale: Factor of the scores of a token that has a neighbour; not of mode ``"raw"``.
        num_candidates: Tags that the search keeps per position; all by default.
        mask: True at real positions.
    """
    if mode == "raw":
        scale = 1.0
    scaled = transitions.scaled(scale)
    candidates = None
    if num_candidates is not None and num_candidates < emissions.shape[1]:
        ranks = _rank(
            emissions, tokens, scaled, mode=mode, scale=scale, num_candidates=num_candidates
        )
        candidates = ranks.topk(num_candidates).indices.sort().values  # lowest index wins ties
    nodes = _nodes(emissions, tokens, scaled, mode=mode, scale=scale, candidates=candidates)
    if candidates is None:
        return viterbi(tokens.unpack(nodes), scaled.matrix(), mask=mask)
    pairs = scaled.pairs(tokens.previous(candidates, 0), candidates)
    found = viterbi(tokens.unpack(nodes), tokens.unpack(pairs)[:, 1:], mask=mask)
    chosen = found.sequences.clamp(min=0).unsqueeze(2)
    sequences = tokens.unpack(candidates).gather(2, chosen).squeeze(2)
    return DecodeResult(sequences.masked_fill(found.sequences == PAD, PAD), found.scores)


def _nodes(
    emissions: Float[Tensor, "token tag"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    mode: Mode,
    scale: float,
    candidates: Int[Tensor, "token candidate"] | None,
) -> Float[Tensor, "token candidate"]:
    """Return the score of each tag, or candidate, without its (scaled) transitions."""
    kept = emissions if candidates is None else emissions.gather(1, candidates)
    if mode == "raw":
        return kept
    each = readings(tokens, transitions, _DIRECTIONS[mode])
    total = torch.zeros_like(kept)
    for chain, scores in each:
        begin = kept - _finite(emissions.logsumexp(1, keepdim=True))
        total += torch.where(chain.is_first(kept).unsqueeze(1), begin, scale * kept)
        following = chain.following(emissions, 0) * scale
        normalisers = _finite(_normalisers(following, scores, candidates))
        is_last = chain.reversed().is_first(kept)
        total -= normalisers.masked_fill(is_last.unsqueeze(1), 0)
    return total / len(each)


def _finite(normalisers: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Return 0 for a normaliser over forbidden tags only: no path leads there anyway."""
    return normalisers.masked_fill(normalisers == -torch.inf, 0)


def _normalisers(
    emissions: Float[Tensor, "token tag"],
    transitions: Transitions,
    candidates: Int[Tensor, "token candidate"] | None,
) -> Float[Tensor, "token candidate"]:
    """Return ``logsumexp_j(emissions[t, j] + g[a, j])`` for all tags or candidates a."""
    if candidates is not None:
        return _add_up(transitions, candidates, emissions.unsqueeze(1), axis=2)
    matrix = transitions.matrix()
    top = _finite(emissions.amax(1, keepdim=True))
    top_of_row = _finite(matrix.amax(1))
    sums = (emissions - top).exp_() @ (matrix - top_of_row.unsqueeze(1)).exp_().T
    if _is_accurate(sums):
        return sums.log_() + top + top_of_row
    chunks = torch.split(emissions, max(1, _CHUNK // matrix.numel()))
    return torch.cat([(chunk.unsqueeze(1) + matrix).logsumexp(2) for chunk in chunks])


def _rank(
    emissions: Float[Tensor, "token tag"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    mode: Mode,
    scale: float,
    num_candidates: int,
) -> Float[Tensor, "token tag"]:
    r"""Return what each tag promises: its emission, and the transitions from a likely neighbour.

    With q the softmax of the emissions, the neighbour leads to tag j with
    :math:`\log \sum_a q(a) e^{g(a, j)}`, summed over its ``num_candidates`` best tags. What the
    tag leads to in its turn is, on the same assumption, its local normaliser, and cancels it: so
    each direction of a model looks back only, and the raw score, not normalised, both ways.
    """
    best = emissions.topk(num_candidates)
    weights = best.values - _finite(emissions.logsumexp(1, keepdim=True))
    each = readings(tokens, transitions, _DIRECTIONS[mode])
    ranks = emissions * scale
    for chain, scores in each:
        before = chain.previous(best.indices, 0)
        log_q = chain.previous(weights, 0).unsqueeze(2)
        arrival = _add_up(scores, before, log_q, axis=1)
        arrival = arrival.masked_fill(chain.is_first(arrival).unsqueeze(1), 0)
        ranks = ranks + (arrival / 2 if mode == "geometric" else arrival)
    return ranks


def _add_up(
    transitions: Transitions,
    tags: Int[Tensor, "token candidate"],
    scores: Float[Tensor, "token candidate tag"],
    *,
    axis: int,
) -> Float[Tensor, "token rest"]:
    """Return ``logsumexp(g[tags] + scores)`` along an axis, g never formed as a whole."""
    num_tags = len(transitions.left)
    size = max(1, _CHUNK // (tags.shape[1] * num_tags))
    buffer = scores.new_empty(min(size, len(tags)), tags.shape[1], num_tags)
    parts = []
    for chunk, part in zip(torch.split(tags, size), torch.split(scores, size), strict=True):
        rows = buffer[: len(chunk)]
        transitions.rows(chunk.flatten(), out=rows.flatten(0, 1))
        result = _log_product(rows, part, axis=axis)
        if result is None:
            transitions.rows(chunk.flatten(), out=rows.flatten(0, 1))
            result = (rows + part).logsumexp(axis)
        parts.append(result)
    return torch.cat(parts)


def _log_product(
    rows: Float[Tensor, "token candidate tag"],
    scores: Float[Tensor, "token candidate tag"],
    *,
    axis: int,
) -> Float[Tensor, "token rest"] | None:
    """Return the logsumexp of the sum of both by a product of exponentials; None if inaccurate.

    The rows are overwritten: passes over memory are what this costs.
    """
    if not rows.numel():
        return None
    top, top_scores = _finite(rows.amax()), _finite(scores.amax((1, 2)).unsqueeze(1))
    weights = (scores - top_scores.unsqueeze(2)).exp_().mT
    table = rows.sub_(top).exp_()
    sums = (table @ weights if axis == 2 else weights @ table).flatten(1)
    return sums.log_() + top + top_scores if _is_accurate(sums) else None


def _is_accurate(sums: Float[Tensor, " ..."]) -> Bool[Tensor, ""]:
    """Return whether what underflowed is a negligible part of every sum of products.

    The products are at most 1. Sums over forbidden tags only are 0, and not accurate either.
    """
    large_enough: Tensor = sums > torch.finfo(sums.dtype).tiny ** 0.75
    return large_enough.all()


def marginals(
    emissions: Float[Tensor, "batch time tag"],
    matrix: Float[Tensor, "tag tag"],
    *,
    scale: float = 1.0,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time tag"]:
    """Return the probability of each tag at each position, the chain read from left to right.

    Args:
        emissions: Scores of the tags.
        matrix: Scores of neighbouring tags.
        scale: Factor of the scores of a position that has a neighbour.
        mask: True at real positions; the chain connects them.
    """
    real = emissions.new_ones(emissions.shape[:2], dtype=torch.bool) if mask is None else mask
    emissions = emissions.masked_fill(~real.unsqueeze(2), 0)
    begun = torch.zeros_like(real[:, :1])
    here = emissions.new_zeros(emissions.shape[0], emissions.shape[2])
    result = []
    for scores, is_real in zip(emissions.unbind(1), real.T.unsqueeze(2), strict=True):
        steps = _softmax(scale * (scores.unsqueeze(1) + matrix))
        reached = (here.unsqueeze(1) @ steps).squeeze(1)
        here = torch.where(is_real, torch.where(begun, reached, _softmax(scores)), here)
        begun = begun | is_real
        result.append(here.masked_fill(~is_real, 0))
    return torch.stack(result, 1) if result else emissions


def _softmax(scores: Float[Tensor, "... tag"]) -> Float[Tensor, "... tag"]:
    """Return the softmax; zeros where every tag is forbidden, such a place being a dead end."""
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
