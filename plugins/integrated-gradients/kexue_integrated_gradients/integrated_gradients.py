"""Integrated gradients: gradients averaged on the way from a baseline to the input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from kexue.core.component import Example
from kexue_integrated_gradients.arguments import (
    as_tensors,
    check_floating,
    check_settings,
    usable,
)
from kexue_integrated_gradients.attribution import Attribution, Attributions, Baseline, Target
from kexue_integrated_gradients.baselines import baseline_sets
from kexue_integrated_gradients.integral import average, integrate
from kexue_integrated_gradients.layers import FromLayer, find_layer
from kexue_integrated_gradients.quadrature import Rule, nodes
from kexue_integrated_gradients.scoring import Score, as_index, measuring

__all__ = ["CompletenessWarning", "IntegratedGradients", "example_model", "integrated_gradients"]

_NUMBERS = 2**18
"""Numbers of all points of a forward pass, unless ``max_rows`` says otherwise: they stay in a
cache, and what a model makes of them in memory."""
_BLOCK = 256
"""Rows of a forward pass that only looks at a layer, unless ``max_rows`` says otherwise."""

_Tensors = tuple[Tensor, ...]


class CompletenessWarning(UserWarning):
    """The values miss the difference of the outputs by more than the tolerance."""


def integrated_gradients(
    model: Callable[..., Any],
    inputs: Tensor | _Tensors,
    baselines: Baseline | list[Baseline] | None = None,
    *,
    target: Target | None = None,
    layer: nn.Module | str | None = None,
    additional: tuple[Any, ...] = (),
    steps: int = 32,
    rule: Rule = "gauss-legendre",
    max_rows: int | None = None,
    tolerance: float = 0.05,
) -> Attributions:
    r"""Attribute an output of a model to its inputs.

    With the input x, the baseline x̄ and the explained output F, input i gets

    .. math::
        (x_i - \bar x_i) \sum_k w_k \frac{\partial F}{\partial x_i}
        \bigl(\bar x + \alpha_k (x - \bar x)\bigr),

    its share of F(x) - F(x̄): the integral of the gradient along the straight line (eq. 1 of the
    paper), by quadrature. The post takes absolute values; ``values.abs()`` does.

    ``rule`` chooses the nodes. Gauss–Legendre needs the fewest, and none at the ends, where a
    gradient may be infinite; ``"right"`` is the sum of the paper (its eq. 3), and ``"left"`` that
    of the post, which walks from x to x̄. The completeness error takes two more points, the
    ends. A module is evaluated as in ``eval()`` and left as it was; modules behind a plain function
    are the caller's to set.

    Args:
        model: A module, or any function of tensors ``[batch, ...]``, whose output is ``[batch]``
            or ``[batch, ...]`` and treats rows independently.
        inputs: What it is applied to, ``[batch, ...]``, floating point, or anything with
            ``layer``; a tuple where the model takes several.
        baselines: x̄: a number or tensor that broadcasts to the inputs, or a tuple of them where
            there are several inputs; zeros by default. The results for a list of baselines are
            averaged. With ``layer``, a tensor of integers replaces the inputs, anything else the
            layer's output.
        target: Which output: an index, a tuple of indices for outputs of several axes, or a list
            or tensor of one index per row, ``[batch]`` or ``[batch, axis]``. May be left out where
            there is one output.
        layer: A layer within the model, or its name. It is attributed to the layer's output, for
            example the vectors of an embedding, whose inputs have no gradient.
        additional: Further arguments of the model, to which nothing is attributed. A tensor whose
            first axis is as long as the batch is taken row by row, such as a mask.
        steps: Nodes of the quadrature.
        rule: ``"gauss-legendre"``, ``"midpoint"``, ``"trapezoid"``, ``"left"`` or ``"right"``.
        max_rows: At most so many rows in a forward pass, steps of all rows counted; the bound on
            memory. By default as many as make 2¹⁸ numbers. Halved when memory runs out.
        tolerance: Warn if the values miss the difference of the outputs by more than this share.

    Returns:
        The values in the shape of the inputs (of the layer's output), float32 for float16 and
        bfloat16, with the completeness error and both outputs.

    Warns:
        CompletenessWarning: If the completeness error is beyond the tolerance.

    Raises:
        ArgumentError: If an argument does not fit the others or the model.
        WorkError: If the gradient is not finite somewhere on the way.

    Example:
        >>> import torch
        >>> from kexue_integrated_gradients import integrated_gradients
        >>> x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
        >>> found = integrated_gradients(lambda x: x[:, 0] ** 2 * x[:, 1], x, steps=2)
        >>> [round(v, 6) for v in found.values[0].tolist()]  # of F = x² y: two thirds, one third
        [6.0, 3.0]
    """
    points, weights = nodes(rule, steps)
    check_settings(model, max_rows, tolerance)
    with measuring(model):
        given = as_tensors(inputs)
        extra = tuple(usable(a) if isinstance(a, Tensor) else a for a in additional)
        rows = len(given[0])
        index = as_index(target, rows)
        if layer is not None:
            seen = FromLayer(model, find_layer(model, layer))

            def embed(ids: _Tensors) -> Tensor:
                return seen.output((*ids, *extra), rows, max_rows or _BLOCK)

            ends: _Tensors = (embed(given),)
            starts = baseline_sets(baselines, ends, embed, given)
            score = Score(seen, (*given, *extra), index, rows)
        else:
            check_floating(given)
            ends, starts = given, baseline_sets(baselines, given)
            score = Score(model, extra, index, rows)
        bound = max_rows or _rows_within(ends)
        parts = [integrate(score, start, ends, (points, weights), bound) for start in starts]
    found = average(parts)
    _warn(found, tolerance, rule, steps)
    return found if isinstance(inputs, tuple) and layer is None else _unpacked(found)


def _unpacked(found: Attributions) -> Attributions:
    return found._replace(values=found.values[0])


def _rows_within(inputs: _Tensors) -> int:
    numbers = sum(t[:1].numel() for t in inputs)
    return max(1, _NUMBERS // max(1, numbers))


def _warn(found: Attributions, tolerance: float, rule: str, steps: int) -> None:
    if found.relative_error <= tolerance:
        return
    rounding = torch.finfo(found.error.dtype).eps ** 0.5
    size = sum(float(v.abs().sum()) for v in found.values)
    if float(found.error.abs().sum()) <= rounding * size:
        return
    remedy = "" if rule == "gauss-legendre" else ", or `rule='gauss-legendre'`"
    warnings.warn(
        f"The attributions miss the difference F(x) - F(baseline) by {found.relative_error:.1%} "
        f"on average, more than `tolerance`, {tolerance:.1%}. Use more `steps` than {steps}"
        f"{remedy}.",
        CompletenessWarning,
        stacklevel=3,
    )


class IntegratedGradients(Attribution):
    """Integrated gradients with fixed settings; see :func:`integrated_gradients`.

    A value is a feature's share of F(x) - F(x̄), in the unit of the output: positive where the
    feature speaks for it. Time and memory are those of ``steps`` forward and backward passes,
    ``max_rows`` rows at a time.

    Args:
        steps: Nodes of the quadrature.
        rule: ``"gauss-legendre"``, ``"midpoint"``, ``"trapezoid"``, ``"left"`` or ``"right"``.
        max_rows: At most so many rows in a forward pass; by default as many as make 2¹⁸ numbers.
        tolerance: Warn if the values miss the difference of the outputs by more than this share.

    Raises:
        ArgumentError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from kexue_integrated_gradients import IntegratedGradients
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> found = IntegratedGradients(steps=1).attribute(model, torch.tensor([[3.0, -1.0]]))
        >>> found.values, found.outputs
        (tensor([[ 3., -1.]]), tensor([2.]))

    References:
        - https://kexue.fm/archives/7533
        - https://arxiv.org/abs/1703.01365
    """

    complete: ClassVar[bool] = True
    implementation_invariant: ClassVar[bool] = True

    def __init__(
        self,
        steps: int = 32,
        *,
        rule: Rule = "gauss-legendre",
        max_rows: int | None = None,
        tolerance: float = 0.05,
    ) -> None:
        nodes(rule, steps)
        check_settings(len, max_rows, tolerance)
        self.steps = steps
        self.rule: Rule = rule
        self.max_rows = max_rows
        self.tolerance = tolerance

    def attribute(
        self,
        model: Callable[..., Any],
        inputs: Num[Tensor, "batch ..."] | tuple[Tensor, ...],
        baselines: Float[Tensor, "batch ..."] | Baseline | list[Baseline] | None = None,
        *,
        target: Int[Tensor, " batch"] | Target | None = None,
        layer: nn.Module | str | None = None,
        additional: tuple[Any, ...] = (),
    ) -> Attributions:
        """Return what each input contributed to an output.

        Args:
            model: A module, or any function of tensors, rows to rows.
            inputs: What it is applied to; floating point, or anything with ``layer``.
            baselines: x̄, what the inputs are compared with: a number or tensor that broadcasts,
                or a list of them to average over; zeros by default.
            target: Which output: an index, a tuple of them, or one index per row.
            layer: A layer, or its name, to attribute to its output: the embedding of token ids.
            additional: Further arguments of the model, row by row where they are as long as the
                batch.
        """
        return integrated_gradients(
            model,
            inputs,
            baselines,
            target=target,
            layer=layer,
            additional=additional,
            steps=self.steps,
            rule=self.rule,
            max_rows=self.max_rows,
            tolerance=self.tolerance,
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three rows of four features, with a class each."""
        inputs = torch.randn(3, 4, generator=generator)
        target = torch.randint(2, (3,), generator=generator)
        return Example({}, {"model": example_model, "inputs": inputs, "target": target})

    def __repr__(self) -> str:
        return (
            f"IntegratedGradients(steps={self.steps}, rule={self.rule!r}, "
            f"max_rows={self.max_rows}, tolerance={self.tolerance})"
        )


def example_model(x: Tensor) -> Tensor:
    """Score two classes, ``[batch, 2]``, from rows of three or more features."""
    return torch.stack([x[:, 0] * x[:, 1] + x[:, 2:].sum(1), x.tanh().sum(1)], dim=1)
