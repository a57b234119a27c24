r"""Negative log-likelihood of each tag given its neighbour, with an analytic gradient.

With f the emissions, g the transitions and y the tags, a chain read from left to right gives

.. math::
    -\log P(y_k | y_{k-1}) = \log \sum_j e^{f_k(j) + g(y_{k-1}, j)} - f_k(y_k) - g(y_{k-1}, y_k),

the first tag without g (equations 5 and 6 of the post); from right to left it is the same with
the transposed g. There is no recursion: every token is a softmax of its own.

Two ways lead to these numbers:

* :func:`_direct` adds a row of g to the emissions and takes the cross-entropy, under autograd.
* :func:`_multiply` multiplies :math:`e^f` by a row of :math:`e^g`, so that both directions share
  one exponential and no softmax runs along a short axis, and takes the gradient, probabilities
  minus one-hot, on the same pass. Both factors are scaled to at most 1, so products can underflow
  but not overflow. A normaliser is at least its own gold product; where the smallest gold product
  of a batch is too small to bound the relative error, the batch goes the direct way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_memm.tokens import Tokens
from kexue_memm.transitions import Transitions

__all__ = ["Direction", "readings", "token_nll"]

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
    emissions: Float[Tensor, "token tag"],
    tags: Int[Tensor, " token"],
    tokens: Tokens,
    transitions: Transitions,
    *,
    direction: Direction = "both",
    scale: float = 1.0,
    total: bool = False,
) -> Float[Tensor, "direction token"] | Float[Tensor, ""]:
    """Return the negative log-likelihood of each token's tag in nats, once per direction.

    Args:
        emissions: Scores of the tokens, float32 or float64.
        tags: int64, from 0.
        tokens: How the tokens are chained.
        transitions: Scores of neighbouring tags, of the dtype of ``emissions``.
        direction: Which neighbour a tag is conditioned on.
        scale: Factor of the scores of a token that has a neighbour.
        total: Return the sum over tokens and directions; its gradient is cheaper.

    Raises:
        ArgumentError: If a tag does not exist or has probability zero.
    """
    num_tags = emissions.shape[1]
    known = tags.clamp(0, num_tags - 1)  # lookups stay inside; the check comes with the result
    unknown = (known != tags).any()
    # Forming g and e^g pays where they are not larger than the batch. A compiler fuses the direct
    # way by itself and could not see through the other.
    if scale == 1 and num_tags <= len(emissions) and not torch.compiler.is_compiling():
        task = _Task(known, tokens, direction, total)
        fused = _fused(emissions, transitions.matrix(), task, unknown)
        if fused is not None:
            return fused
    nll = _direct(emissions, known, readings(tokens, transitions, direction), scale)
    # One synchronisation with the device, as in `_fused`.
    if bool(unknown | (nll == torch.inf).any()):
        _reject(nll, tags, tokens, num_tags)
    return nll.sum() if total else nll


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
    """What emissions and transitions are scored against, and whether the losses are summed."""

    tags: Int[Tensor, " token"]
    tokens: Tokens
    direction: Direction
    total: bool


@dataclass(frozen=True, slots=True)
class _Terms:
    """The loss of each token, and the smallest of the products that it is the logarithm of.

    The gradients are of the weighted sum of the losses; None where they are not asked for.
    """

    nll: Float[Tensor, "direction token"]
    smallest: Float[Tensor, ""]
    d_emissions: Float[Tensor, "token tag"] | None = None
    d_matrix: Float[Tensor, "tag tag"] | None = None


def _fused(
    emissions: Float[Tensor, "token tag"],
    matrix: Float[Tensor, "tag tag"],
    task: _Task,
    unknown: Tensor,
) -> Float[Tensor, "direction token"] | Float[Tensor, ""] | None:
    """Return the loss with its analytic gradient; None where products would not be accurate."""
    needs_gradient = torch.is_grad_enabled() and (emissions.requires_grad or matrix.requires_grad)
    terms = _multiply(emissions, matrix, task, gradient=needs_gradient and task.total)
    # The one synchronisation with the device: a tag that does not exist counts as too small.
    smallest = terms.smallest.masked_fill_(unknown, 0).item()
    if not smallest > torch.finfo(matrix.dtype).tiny ** 0.75:
        return None
    if not needs_gradient:
        return terms.nll.sum() if task.total else terms.nll
    result: Tensor = _Analytic.apply(emissions, matrix, task, terms)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def _multiply(
    emissions: Float[Tensor, "token tag"],
    matrix: Float[Tensor, "tag tag"],
    task: _Task,
    *,
    gradient: bool,
    weights: Float[Tensor, "direction token"] | None = None,
) -> _Terms:
    """Return the losses and, on the same pass, their gradient.

    Args:
        emissions: Scores of the tokens.
        matrix: Scores of neighbouring tags.
        task: Tags and chains.
        gradient: Whether to take the gradient.
        weights: Weight of each loss in the gradient; 1 by default.
    """
    num_tags = len(matrix)
    exp_emissions = (emissions - emissions.amax()).exp_()
    exp_matrix = Transitions((matrix - matrix.amax()).exp_())
    each = readings(task.tokens, exp_matrix, task.direction)
    # All directions in one tensor: for few tags, the number of operations is what costs.
    no_history = matrix.new_ones(1, num_tags)  # e^0
    tables = torch.cat([part for _, table in each for part in (table.left, no_history)])
    factors = _Factors(exp_emissions, tables, task.tags, _history(task.tags, each, num_tags))
    terms = _few_tags if num_tags <= _FEW_TAGS else _many_tags
    nll, smallest, d_emissions, d_tables = terms(factors, weights, gradient=gradient)
    if d_tables is None:
        return _Terms(nll, smallest)
    d_matrix = _add(
        part[:-1] if tokens.step > 0 else part[:-1].T
        for (tokens, _), part in zip(each, d_tables.chunk(len(each)), strict=True)
    )
    return _Terms(nll, smallest, d_emissions, d_matrix)


_FEW_TAGS = 32  # up to here products of matrices cost less than gathering rows


class _Factors(NamedTuple):
    """What the losses are computed from, both factors of the products at most 1.

    Args:
        exp_emissions: e^f, up to a constant.
        tables: e^g as each direction reads it, and a row of ones; one below the other.
        tags: The true tags.
        history: Row of ``tables`` that each token is scored after.
    """

    exp_emissions: Float[Tensor, "token tag"]
    tables: Float[Tensor, "row tag"]
    tags: Int[Tensor, " token"]
    history: Int[Tensor, "direction token"]


_Slopes = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Losses, smallest gold product, and the gradients of emissions and tables where asked for."""


def _few_tags(factors: _Factors, weights: Tensor | None, *, gradient: bool) -> _Slopes:
    """Score each token after every tag by one product of matrices, and keep the one that counts.

    The gradient is two more such products: nothing of the size direction x token x tag is formed.
    """
    exp_emissions, tables, tags, history = factors
    normaliser = (tables @ exp_emissions.T).gather(0, history)
    pairs = (history * tables.shape[1]).add_(tags).view(-1)
    gold = tables.view(-1).index_select(0, pairs).view_as(history)
    gold.mul_(exp_emissions.gather(1, tags.unsqueeze(1)).view(-1))
    nll = (normaliser / gold).log_()
    if not gradient:
        return nll, gold.amin(), None, None
    if weights is None:
        shares = normaliser.reciprocal_()
        minus_one = tables.new_full((), -1)
        minus_each, minus_all = minus_one.expand(len(pairs)), minus_one * len(history)
        minus_all = minus_all.expand(len(tags))
    else:
        shares = weights / normaliser
        minus_each, minus_all = -weights.reshape(-1), -_add(weights)
    spread = tables.new_zeros(len(tables), len(tags)).scatter_(0, history, shares)
    # Probabilities minus one-hot: the gradient with respect to f + g.
    d_emissions = (spread.T @ tables).mul_(exp_emissions)
    d_emissions.scatter_add_(1, tags.unsqueeze(1), minus_all.unsqueeze(1))
    d_tables = (spread @ exp_emissions).mul_(tables)
    d_tables.view(-1).scatter_add_(0, pairs, minus_each)
    return nll, gold.amin(), d_emissions, d_tables


def _many_tags(factors: _Factors, weights: Tensor | None, *, gradient: bool) -> _Slopes:
    """Multiply each token's scores by the row of its neighbour."""
    exp_emissions, tables, tags, history = factors
    rows = history.view(-1)
    products = tables.index_select(0, rows).view(len(history), *exp_emissions.shape)
    normaliser = products.mul_(exp_emissions).sum(2, keepdim=True)
    gold = tags.expand(len(history), -1).unsqueeze(2)
    gold_products = products.gather(2, gold)
    nll = (normaliser / gold_products).log_().squeeze(2)
    if not gradient:
        return nll, gold_products.amin(), None, None
    # Probabilities minus one-hot, as above.
    minus_one = products.new_full((), -1).expand(gold.shape)
    residual = products.div_(normaliser).scatter_add_(2, gold, minus_one)
    if weights is not None:
        residual.mul_(weights.unsqueeze(2))
    d_tables = torch.zeros_like(tables).index_add_(0, rows, residual.flatten(0, 1))
    return nll, gold_products.amin(), _add(residual), d_tables


def _add(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or two tensors, faster than along an axis."""
    return functools.reduce(torch.add, tensors)


def _history(
    tags: Int[Tensor, " token"], each: Readings, num_tags: int
) -> Int[Tensor, "direction token"]:
    """Return each token's row in the stacked tables: its neighbour's, or the last for none."""
    rows = [tokens.previous(tags, num_tags) for tokens, _ in each]
    if len(rows) == 1:
        return rows[0].unsqueeze(0)
    return torch.stack((rows[0], rows[1].add_(num_tags + 1)))


class _Analytic(torch.autograd.Function):
    """Gives the losses their gradient: of their sum it is known, of each it is taken again."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Float[Tensor, "token tag"],
        matrix: Float[Tensor, "tag tag"],
        task: _Task,
        terms: _Terms,
    ) -> Float[Tensor, "direction token"] | Float[Tensor, ""]:
        ctx.save_for_backward(emissions, matrix, terms.d_emissions, terms.d_matrix)
        ctx.task = task
        return terms.nll.sum() if task.total else terms.nll

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        emissions, matrix, d_emissions, d_matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is differentiated in its turn
            result = _differentiable_gradient(ctx.task, emissions, matrix, weights)
        elif ctx.task.total:
            result = (d_emissions * weights, d_matrix * weights)
        else:
            terms = _multiply(emissions, matrix, ctx.task, gradient=True, weights=weights)
            result = (terms.d_emissions, terms.d_matrix)
        return (*result, None, None)


def _differentiable_gradient(
    task: _Task, emissions: Tensor, matrix: Tensor, weights: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients as functions of emissions, matrix and weights, by autograd."""
    each = readings(task.tokens, Transitions(matrix), task.direction)
    nll = _direct(emissions, task.tags, each, 1.0)
    nll = nll.sum() if task.total else nll
    inputs = [x for x in (emissions, matrix) if x.requires_grad]
    gradients = iter(torch.autograd.grad(nll, inputs, weights, create_graph=True))
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
