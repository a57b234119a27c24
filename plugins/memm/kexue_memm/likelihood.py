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
  probabilities minus one-hot, on the same pass. Where a normaliser of a batch is too large or too
  small to be accurate (f + g beyond some 60 in float32), the batch goes the direct way.
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
    """The mean loss and its gradients, which are None where they were not asked for."""

    loss: Float[Tensor, ""]
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
    if total is None or not needs_gradient:
        return None if total is None else total.loss
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
    """Return the mean loss and, on the same pass, its gradient; None if not accurate.

    For few tags the number of operations is what costs, so all directions are in one tensor.
    """
    tags, num_tags = task.tags, len(matrix)
    scores = task.tokens.pack(emissions).contiguous()
    exp_scores, exp_matrix = scores.exp(), matrix.exp()
    alone = exp_matrix.new_ones(1, num_tags)  # e^0 for a token without a neighbour
    rows = task.tokens.neighbours(tags, num_tags, step=num_tags + 1)
    if task.direction == "both":
        tables = torch.cat((exp_matrix, alone, exp_matrix.T, alone))
    elif task.direction == "forward":
        tables, rows = torch.cat((exp_matrix, alone)), rows[:1]
    else:
        tables, rows = torch.cat((exp_matrix.T, alone)), rows[1:] - (num_tags + 1)
    products = _FewProducts if num_tags <= _FEW_TAGS else _ManyProducts
    scored = products(exp_scores, tables, rows)
    inverses = scored.normalisers.reciprocal()

    # Probabilities of the true tags.
    pairs = torch.add(tags, rows, alpha=num_tags).view(-1)
    true = tables.view(-1).index_select(0, pairs).view_as(rows)
    true = true.mul_(scored.take(tags)).mul_(inverses)
    nll = -float(true.log_().sum())

    # Then no product that counts has a factor that underflowed, and none was too large.
    largest = max(1.0, float(exp_scores.amax()) * float(tables.amax()))
    least = torch.finfo(matrix.dtype).tiny ** 0.75 * largest
    if not (float(scored.normalisers.amin()) > least and math.isfinite(nll)):
        return None
    count = float(task.count)
    loss = matrix.new_full((), max(nll, 0.0) / count)  # rounding can take it below 0
    if not gradient:
        return _Total(loss)

    # Probabilities minus one-hot: the gradient with respect to f + g.
    d_scores, d_tables = scored.gradients(inverses.mul_(1 / count), tags, len(rows) / count)
    d_matrix = d_tables[:num_tags]
    if task.direction == "both":  # reads the same pairs twice
        d_matrix += d_tables[num_tags + 1 : -1].T
    counts = torch.bincount(pairs[: len(tags)], minlength=num_tags * (num_tags + 1))
    d_matrix.sub_(counts.view(-1, num_tags)[:num_tags], alpha=len(rows) / count)
    d_matrix = d_matrix.T if task.direction == "backward" else d_matrix
    return _Total(loss, task.tokens.unpack(d_scores), d_matrix)


_FEW_TAGS = 32  # up to here products of matrices cost less than gathering rows


class _FewProducts:
    """Scores each token after every tag by one product of matrices, and keeps the one that counts.

    The gradient is two more such products: nothing of the size direction x token x tag is formed.
    Along tokens memory is contiguous, so that no loop is as short as the tags are few.

    Args:
        exp_scores: e^f.
        tables: e^g, its rows in all directions one below the other.
        rows: Which of them each token meets.
    """

    def __init__(
        self,
        exp_scores: Float[Tensor, "token tag"],
        tables: Float[Tensor, "row tag"],
        rows: Int[Tensor, "direction token"],
    ) -> None:
        self.tables, self.rows = tables, rows
        # The same product transposes e^f, for less than a copy takes.
        identity = torch.eye(tables.shape[1], dtype=tables.dtype, device=tables.device)
        products = torch.cat((tables, identity)) @ exp_scores.T
        self.normalisers = products.gather(0, rows)
        self.by_tag = products[len(tables) :]

    def take(self, tags: Int[Tensor, " token"]) -> Float[Tensor, "1 token"]:
        """Return e^f of the tags."""
        return self.by_tag.gather(0, tags.unsqueeze(0))

    def gradients(
        self, weights: Float[Tensor, "direction token"], tags: Int[Tensor, " token"], share: float
    ) -> tuple[Float[Tensor, "token tag"], Float[Tensor, "row tag"]]:
        """Return the gradients of Σ log normalisers with respect to log e^f and log e^g.

        Args:
            weights: 1 / normalisers, times whatever weighs the logarithms.
            tags: Where ``share`` is subtracted from the first gradient.
            share: How much.
        """
        shares = weights.new_zeros(len(self.tables), weights.shape[1])
        shares.scatter_(0, self.rows, weights)
        d_scores = (self.tables.T @ shares).mul_(self.by_tag)
        d_scores.scatter_add_(0, tags.unsqueeze(0), weights.new_full((1, len(tags)), -share))
        return d_scores.T, (shares @ self.by_tag.T).mul_(self.tables)


class _ManyProducts:
    """Multiplies each token's scores by the row of its neighbour.

    Args:
        exp_scores: As there.
        tables: As there.
        rows: As there.
    """

    def __init__(
        self,
        exp_scores: Float[Tensor, "token tag"],
        tables: Float[Tensor, "row tag"],
        rows: Int[Tensor, "direction token"],
    ) -> None:
        self.exp_scores, self.tables, self.rows = exp_scores, tables, rows.reshape(-1)
        products = tables.index_select(0, self.rows)
        self.products = products.view(len(rows), *exp_scores.shape).mul_(exp_scores)
        self.normalisers = self.products.sum(2)

    def take(self, tags: Int[Tensor, " token"]) -> Float[Tensor, "1 token"]:
        """Return e^f of the tags."""
        return self.exp_scores.gather(1, tags.unsqueeze(1)).T

    def gradients(
        self, weights: Float[Tensor, "direction token"], tags: Int[Tensor, " token"], share: float
    ) -> tuple[Float[Tensor, "token tag"], Float[Tensor, "row tag"]]:
        """Return what the other does."""
        parts = self.products.mul_(weights.unsqueeze(2))
        d_tables = torch.zeros_like(self.tables).index_add_(0, self.rows, parts.flatten(0, 1))
        # Adding two tensors is faster than a sum along an axis.
        d_scores = parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]
        d_scores.scatter_add_(1, tags.unsqueeze(1), weights.new_full((len(tags), 1), -share))
        return d_scores, d_tables


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
        return total.loss

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        emissions, matrix, d_emissions, d_matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is differentiated in its turn
            result = _differentiable_gradient(ctx.task, emissions, matrix, weight)
        else:
            result = (d_emissions * weight, d_matrix * weight)
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
