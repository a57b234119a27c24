"""The integral of the gradient along straight lines, within a bound on memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.core.errors import ArgumentError, WorkError
from kexue_integrated_gradients.attribution import Attributions
from kexue_integrated_gradients.scoring import Score

__all__ = ["average", "integrate"]

_Tensors = tuple[Tensor, ...]


def integrate(
    score: Score, start: _Tensors, end: _Tensors, quadrature: tuple[Any, Any], max_rows: int
) -> Attributions:
    """Integrate the gradient of a score; start again with half the rows when memory runs out.

    Args:
        score: F, what is integrated along.
        start: x̄, where the lines begin, a tensor per input.
        end: x, where they end.
        quadrature: Where on [0, 1] the gradient is taken, and with which weights.
        max_rows: At most so many rows in a forward pass.

    Returns:
        The values as a tuple, one tensor per input.

    Raises:
        ArgumentError: If the model does not fit its inputs.
        WorkError: If the gradient is not finite.
    """
    while True:
        try:
            return _integrate(score, start, end, quadrature, max_rows)
        except torch.OutOfMemoryError:
            if max_rows == 1:
                raise
            max_rows //= 2


def _integrate(
    score: Score, start: _Tensors, end: _Tensors, quadrature: tuple[Any, Any], max_rows: int
) -> Attributions:
    if 0 < score.rows * (len(quadrature[0]) + 2) <= max_rows:
        found = _at_once(score, start, end, quadrature)
        if found is not None:
            return found
    exact = torch.promote_types(end[0].dtype, torch.float32)
    blocks = [
        slice(first, min(first + max_rows, score.rows)) for first in range(0, score.rows, max_rows)
    ]
    # first: what does not fit shows here, before the work
    outputs, baseline_outputs = (_outputs(score, x, blocks, exact) for x in (end, start))
    for what, row, remedy in (
        ("input", outputs, "Leave it out, or explain another output."),
        ("baseline", baseline_outputs, "Choose another baseline."),
    ):
        if not torch.isfinite(row).all():
            raise WorkError(
                f"The output of the model is not finite at the {what} of row "
                f"{int((~torch.isfinite(row)).nonzero()[0, 0])}. {remedy}"
            )
    differences = tuple(_exact(x) - _exact(b) for x, b in zip(end, start, strict=True))
    values = tuple(torch.zeros_like(d) for d in differences)
    points, weights = (torch.as_tensor(q, dtype=exact, device=end[0].device) for q in quadrature)
    for block in blocks:
        copies = max(1, max_rows // (block.stop - block.start))
        for alphas, shares in zip(
            torch.split(points, copies), torch.split(weights, copies), strict=True
        ):
            gradients = _gradients(score, start, differences, block, alphas)
            for total, gradient in zip(values, gradients, strict=True):
                total[block] += _weighted(shares, gradient, total.dtype)
    for total, difference in zip(values, differences, strict=True):
        total.mul_(difference)
        if not torch.isfinite(total).all():
            raise _not_finite(score, start, differences, points, total)
    together = sum(v.to(exact)[..., None].flatten(1).sum(1) for v in values)
    return Attributions(values, together - (outputs - baseline_outputs), outputs, baseline_outputs)


def _at_once(
    score: Score, start: _Tensors, end: _Tensors, quadrature: tuple[Any, Any]
) -> Attributions | None:
    """Integrate with one forward pass, which the ends of the lines are points of.

    Returns:
        None where something does not fit, is not finite or not in full precision: the passes that
        follow then find out what, of the rows as they were given.
    """
    device, exact = end[0].device, end[0].dtype
    alike = {x.dtype for x in end} == {exact} and exact in {torch.float32, torch.float64}
    if not alike or torch.is_autocast_enabled(device.type):
        return None
    points, shares = (
        np.concatenate([[first], q, [last]])
        for q, first, last in zip(quadrature, (0, 0), (1, 0), strict=True)
    )
    alphas = torch.as_tensor(points, dtype=exact, device=device)
    differences = tuple(x - b for x, b in zip(end, start, strict=True))
    path = []
    for x, b, d in zip(end, start, differences, strict=True):
        line = torch.addcmul(b, alphas.view(-1, *[1] * d.ndim), d)
        line[-1] = x  # not b + (x - b)
        path.append(line.flatten(0, 1).requires_grad_())
    try:
        outputs = score(tuple(path), slice(0, score.rows), len(points))
        weights = torch.as_tensor(shares, dtype=outputs.dtype, device=outputs.device)
        weights = weights.repeat_interleave(score.rows)
        gradients = torch.autograd.grad(
            outputs, path, weights, allow_unused=True, materialize_grads=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 -- raised again, of the rows as they were given
        return None
    values = tuple(
        g.view(len(points), *d.shape)[1:-1].sum(0).mul_(d)
        for g, d in zip(gradients, differences, strict=True)
    )
    every = outputs.detach().to(exact).view(len(points), score.rows)
    together = sum(v.reshape(score.rows, -1).sum(1) for v in values)
    error = together - (every[-1] - every[0])
    if not torch.isfinite(error).all():
        return None
    return Attributions(values, error, every[-1], every[0])


def _weighted(shares: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the gradients of the points of each row, in full precision under autocast too."""
    rows = len(gradient) // len(shares)
    steps = gradient.to(dtype).reshape(len(shares), rows, *gradient.shape[1:])
    with torch.autocast(gradient.device.type, enabled=False):
        total: Tensor = torch.tensordot(shares.to(dtype), steps, 1)
    return total


def _gradients(
    score: Score, start: _Tensors, differences: _Tensors, block: slice, alphas: Tensor
) -> _Tensors:
    """Return the gradients at some points of each row of a block, ``[point * row, ...]``."""
    points = tuple(
        (_exact(b[block]) + alphas.view(-1, *[1] * d.ndim) * d[block])
        .to(b.dtype)
        .flatten(0, 1)
        .requires_grad_()
        for b, d in zip(start, differences, strict=True)
    )
    outputs = score(points, block, len(alphas))
    if not outputs.requires_grad:
        raise ArgumentError(
            "`model` must be differentiable in its inputs. Its output carries no gradient; look "
            "for argmax, round, detach, numpy or no_grad in it.",
            argument="model",
        )
    return torch.autograd.grad(
        outputs, points, torch.ones_like(outputs), allow_unused=True, materialize_grads=True
    )


def _outputs(score: Score, x: _Tensors, blocks: list[slice], exact: torch.dtype) -> Tensor:
    with torch.no_grad():
        parts = [score(tuple(t[block] for t in x), block, 1).to(exact) for block in blocks]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=exact, device=x[0].device)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def average(parts: list[Attributions]) -> Attributions:
    """Return the mean of attributions with several baselines; F(x) is the same for all."""
    if len(parts) == 1:
        return parts[0]

    def mean(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).mean(0)

    values = tuple(mean(list(of)) for of in zip(*(p.values for p in parts), strict=True))
    return Attributions(
        values,
        mean([p.error for p in parts]),
        parts[0].outputs,
        mean([p.baseline_outputs for p in parts]),
    )


def _not_finite(
    score: Score, start: _Tensors, differences: _Tensors, points: Tensor, values: Tensor
) -> WorkError:
    row = int((~torch.isfinite(values)).nonzero()[0, 0])
    for alpha in points:
        gradients = _gradients(score, start, differences, slice(row, row + 1), alpha[None])
        if not all(torch.isfinite(g).all() for g in gradients):
            return WorkError(
                f"The gradient of the model is not finite in row {row}, {float(alpha):.3g} of the "
                f"way from the baseline to the input. At an end, `rule='gauss-legendre'` avoids "
                f"the point; elsewhere choose another baseline."
            )
    return WorkError(f"The integral of the gradient overflows in row {row}. Use float64.")
