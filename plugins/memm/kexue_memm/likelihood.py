r"""Negative log-likelihood of each tag given its neighbour, with an analytic gradient.

With f the emissions, g the transitions and y the tags, a chain read from left to right gives

.. math::
    -\log P(y_k | y_{k-1}) = \log \sum_j e^{f_k(j) + g(y_{k-1}, j)} - f_k(y_k) - g(y_{k-1}, y_k),

the first tag without g (equations 5 and 6 of the post); from right to left it is the same with
the transposed g. There is no recursion: every token is a softmax of its own.

Two ways lead to these numbers:

* :func:`_direct` adds a row of g to the emissions and takes the cross-entropy, under autograd.
* :func:`_multiply` gives their sum. It multiplies :math:`e^f` by a row of :math:`e^g`, so that both
  directions share one exponential and no softmax runs along a short axis, and takes the gradient,
  probabilities minus one-hot, on the same pass. What the true tags contribute is counted. Where a
  normaliser of a batch is too large or too small to be accurate (f + g beyond some 60 in float32),
  the batch goes the direct way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_memm.tokens import Tokens
from kexue_memm.transitions import Transitions

__all__ = ["Direction", "mean_nll", "readings", "token_nll"]

Direction = Literal["both", "forward", "backward"]

Readings = tuple[tuple[Tokens, Transitions], ...]
"""A batch and its transitions, once per direction in which the chains are read."""


def readings(tokens: Tokens, transitions: Transitions, direction: Direction) -> Readings:
    """Return the chains and the transitions as each direction reads them."""
    forward = (tokens, transitions)
    if direction == "forward":
        return (forward,)
    backward = (tokens.reversed(), transitions.reversed())
    return (backward,) if direction == "backward" else (forward, backward)


def token_nll(
    emissions: Float[Tensor, "batch time tag"],
    tags: Int[Tensor, "batch time"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    direction: Direction = "both",
    scale: float = 1.0,
) -> Float[Tensor, "direction token"]:
    """Return the negative log-likelihood of each token's tag in nats, once per direction.

    Args:
        emissions: Scores, float32 or float64.
        tags: int64, from 0.
        tokens: Where the real positions are, and how they are chained.
        transitions: Scores of neighbouring tags, of the dtype of ``emissions``.
        direction: Which neighbour a tag is conditioned on.
        scale: Factor of the scores of a token that has a neighbour.

    Raises:
        ArgumentError: If a tag does not exist or has probability zero.
    """
    num_tags = emissions.shape[2]
    packed = tokens.pack(tags)
    known = packed.clamp(0, num_tags - 1)  # lookups stay inside; the check comes with the result
    each = readings(tokens, transitions, direction)
    nll = _direct(tokens.pack(emissions), known, each, scale)
    # The one synchronisation with the device.
    if bool((known != packed).any() | (nll == torch.inf).any()):
        _reject(nll, packed, tokens, num_tags)
    return nll


def mean_nll(
    emissions: Float[Tensor, "batch time tag"],
    tags: Int[Tensor, "batch time"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    direction: Direction = "both",
    scale: float = 1.0,
    count: float | Tensor = 1,
) -> Float[Tensor, ""]:
    """Return the sum of :func:`token_nll` over tokens, the mean over directions, in less time.

    Args:
        emissions: As there.
        tags: As there.
        tokens: As there.
        transitions: As there.
        direction: As there.
        scale: As there.
        count: What the sum is divided by.

    Raises:
        ArgumentError: As there.
    """
    count = 2 * count if direction == "both" else count
    # Forming g and e^g pays where they are not larger than the batch. A compiler fuses the direct
    # way by itself and could not see through the other.
    pays = emissions.shape[2] <= len(tokens) and not torch.compiler.is_compiling()
    if scale == 1 and pays:
        task = _Task(tokens.pack(tags), tokens, direction, count)
        fused = _fused(emissions, transitions.matrix(), task)
        if fused is not None:
            return fused
    each = token_nll(emissions, tags, tokens, transitions, direction=direction, scale=scale)
    return each.sum() / count


def _direct(
    emissions: Float[Tensor, "token tag"], tags: Int[Tensor, " token"], each: Readings, scale: float
) -> Float[Tensor, "direction token"]:
    """Return the cross-entropy of f + g in each reading, by autograd."""
    values = []
    for tokens, transitions in each:
        is_first = tokens.is_first(tags)
        logits = emissions + transitions.rows(tokens.previous(tags, 0), is_first)
        if scale != 1:
            factor = torch.where(is_first, 1.0, scale).to(logits.dtype)
            logits = logits * factor.unsqueeze(1)
        impossible = logits.gather(1, tags.unsqueeze(1)).squeeze(1) == -torch.inf
        nll = F.cross_entropy(logits, tags, reduction="none")
        values.append(nll.masked_fill(impossible, torch.inf))  # NaN where all scores are -inf
    return torch.stack(values)


@dataclass(frozen=True, slots=True)
class _Task:
    """What emissions and transitions are scored against, and what the sum is divided by."""

    tags: Int[Tensor, " token"]
    tokens: Tokens
    direction: Direction
    count: float | Tensor


class _Total(NamedTuple):
    """The summed loss and its gradients, which are None where they were not asked for."""

    nll: Float[Tensor, ""]
    d_emissions: Float[Tensor, "batch time tag"] | None = None
    d_matrix: Float[Tensor, "tag tag"] | None = None


def _fused(
    emissions: Float[Tensor, "batch time tag"], matrix: Float[Tensor, "tag tag"], task: _Task
) -> Float[Tensor, ""] | None:
    """Return the mean with its analytic gradient; None where it would not be accurate."""
    lowest, highest = task.tags.aminmax()
    if int(lowest) < 0 or int(highest) >= len(matrix):
        return None
    needs_gradient = torch.is_grad_enabled() and (emissions.requires_grad or matrix.requires_grad)
    total = _multiply(emissions, matrix, task, gradient=needs_gradient)
    if total is None:
        return None
    if not needs_gradient:
        return total.nll / task.count
    result: Tensor = _Analytic.apply(emissions, matrix, task, total)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def _multiply(
    emissions: Float[Tensor, "batch time tag"],
    matrix: Float[Tensor, "tag tag"],
    task: _Task,
    *,
    gradient: bool,
) -> _Total | None:
    """Return the summed loss and, on the same pass, its gradient; None if not accurate."""
    tags, num_tags = task.tags, len(matrix)
    scores = task.tokens.pack(emissions)
    exp_scores, exp_matrix = scores.exp(), matrix.exp()
    # All directions in one tensor: for few tags, the number of operations is what costs.
    ways = {"both": slice(2), "forward": slice(1), "backward": slice(1, 2)}[task.direction]
    each = [exp_matrix, exp_matrix.T][ways]
    tables = F.pad(torch.stack(each, 1), (0, 0, 0, 0, 0, 1), value=1)  # e^0 without a neighbour
    neighbours = task.tokens.neighbours(tags, num_tags)
    products = _few_products if num_tags <= _FEW_TAGS else _many_products
    normalisers, d_scores, d_tables = products(
        exp_scores, tables, neighbours[ways], gradient=gradient
    )
    # What belongs to the true tags, f(y) and g(y, y'), is the same in every direction.
    gold = torch.arange(0, scores.numel(), num_tags, device=tags.device).add_(tags)
    pairs = torch.add(tags, neighbours[0], alpha=num_tags)
    counts = torch.bincount(pairs, minlength=tables[:, 0].numel()).view(-1, num_tags)[:-1]
    # A confident model's loss is a small difference of large sums.
    exact = torch.float32 if tags.device.type == "mps" else torch.float64
    gold_scores = scores.flatten().index_select(0, gold).sum(dtype=exact)
    gold_scores += torch.xlogy(counts, exp_matrix.to(exact)).sum()
    nll = torch.sub(normalisers.log().sum(dtype=exact), gold_scores, alpha=len(each))
    # Then no product that counts has a factor that underflowed, and none was too large.
    largest = max(1.0, float(exp_scores.amax()) * float(tables.amax()))
    least = torch.finfo(matrix.dtype).tiny ** 0.75 * largest
    if not (float(normalisers.amin()) > least and math.isfinite(nll)):
        return None
    nll = nll.clamp_(min=0).to(matrix.dtype)  # rounding can take it below 0
    if d_scores is None or d_tables is None:
        return _Total(nll)
    # Probabilities minus one-hot: the gradient with respect to f + g.
    minus_one = d_scores.new_full((), -len(each))
    d_scores.view(-1).scatter_add_(0, gold, minus_one.expand(len(gold)))
    d_matrix = counts * minus_one
    if task.direction != "backward":
        d_matrix += d_tables[:-1, 0]
    if task.direction != "forward":
        d_matrix += d_tables[:-1, -1].T
    return _Total(nll, task.tokens.unpack(d_scores), d_matrix)


_FEW_TAGS = 32  # up to here products of matrices cost less than gathering rows

_Products = tuple[Tensor, Tensor | None, Tensor | None]
"""Normalisers, the sums of the products; and the gradients of the logarithms of these."""


def _few_products(
    exp_scores: Float[Tensor, "token tag"],
    tables: Float[Tensor, "history direction tag"],
    history: Int[Tensor, "direction token"],
    *,
    gradient: bool,
) -> _Products:
    """Score each token after every tag by one product of matrices, and keep the one that counts.

    The gradient is two more such products: nothing of the size direction x token x tag is formed.
    """
    table = tables.flatten(0, 1)
    num_rows, size = len(table), history.numel()
    places = torch.arange(size, device=history.device).add_(history.reshape(-1), alpha=size)
    normalisers = (table @ exp_scores.T).view(-1).index_select(0, places)
    if not gradient:
        return normalisers, None, None
    shares = table.new_zeros(num_rows * len(exp_scores))
    shares = shares.scatter_(0, places, normalisers.reciprocal()).view(num_rows, -1)
    d_scores = (shares.T @ table).mul_(exp_scores)
    return normalisers, d_scores, (shares @ exp_scores).mul_(table).view_as(tables)


def _many_products(
    exp_scores: Float[Tensor, "token tag"],
    tables: Float[Tensor, "history direction tag"],
    history: Int[Tensor, "direction token"],
    *,
    gradient: bool,
) -> _Products:
    """Multiply each token's scores by the row of its neighbour."""
    directions = len(history)
    rows = torch.arange(directions, device=history.device).unsqueeze(1)
    rows = torch.add(rows, history, alpha=directions).view(-1)
    table = tables.flatten(0, 1)
    products = table.index_select(0, rows).view(directions, *exp_scores.shape).mul_(exp_scores)
    normalisers = products.sum(2, keepdim=True)
    if not gradient:
        return normalisers, None, None
    probabilities = products.div_(normalisers)
    d_tables = torch.zeros_like(table).index_add_(0, rows, probabilities.flatten(0, 1))
    # Adding two tensors is faster than a sum along an axis.
    d_scores = probabilities[0] + probabilities[1] if directions == 2 else probabilities[0]
    return normalisers, d_scores, d_tables.view_as(tables)


class _Analytic(torch.autograd.Function):
    """Gives the mean its gradient, which is known."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Float[Tensor, "batch time tag"],
        matrix: Float[Tensor, "tag tag"],
        task: _Task,
        total: _Total,
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(emissions, matrix, total.d_emissions, total.d_matrix)
        ctx.task = task
        return total.nll / task.count

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        emissions, matrix, d_emissions, d_matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is differentiated in its turn
            result = _differentiable_gradient(ctx.task, emissions, matrix, weight)
        else:
            share = weight / ctx.task.count
            result = (d_emissions * share, d_matrix * share)
        return (*result, None, None)


def _differentiable_gradient(
    task: _Task, emissions: Tensor, matrix: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients as functions of emissions, matrix and weight, by autograd."""
    each = readings(task.tokens, Transitions(matrix), task.direction)
    nll = _direct(task.tokens.pack(emissions), task.tags, each, 1.0).sum() / task.count
    inputs = [x for x in (emissions, matrix) if x.requires_grad]
    gradients = iter(torch.autograd.grad(nll, inputs, weight, create_graph=True))
    return tuple(next(gradients) if x.requires_grad else None for x in (emissions, matrix))


def _reject(
    nll: Float[Tensor, "direction token"],
    tags: Int[Tensor, " token"],
    tokens: Tokens,
    num_tags: int,
) -> None:
    """Raise on the first tag that does not exist, else on the first impossible one."""
    unknown = (tags < 0) | (tags >= num_tags)
    is_unknown = bool(unknown.any())
    token = int((unknown if is_unknown else (nll == torch.inf).any(0)).nonzero()[0, 0])
    found = f"Found {int(tags[token])} in {tokens.place(token)}"
    if is_unknown:
        message = (
            f"`tags` of MEMM must be from 0 to {num_tags - 1} at real positions. {found}; "
            f"leave padded positions out with `mask`."
        )
    else:
        message = (
            f"`tags` of MEMM must be possible under `emissions` and the transitions. {found}, "
            f"which is -inf by itself or beside its neighbour."
        )
    raise ArgumentError(message, argument="tags")
