"""A model explained on rows from files, some rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError, KexueError, WorkError
from kexue.core.job import Progress
from kexue_integrated_gradients.attribution import Attributions
from kexue_integrated_gradients.integrated_gradients import CompletenessWarning
from kexue_integrated_gradients.rows import Rows, Tokens, reason
from kexue_integrated_gradients.scoring import as_index, measuring
from kexue_integrated_gradients.tokens import Pooling, token_scores

__all__ = ["Explanation", "Explanations", "explain"]

_BLOCK = 256
"""Rows at a time, so that progress shows."""


@dataclass(frozen=True)
class Explanation:
    """What explained one row.

    Args:
        values: The attributions; a score per token for tokens.
        target: The index of the output; None if the model has one only.
        error: The completeness error.
        output: F(x).
        baseline_output: F(x̄).
    """

    values: Tensor
    target: Tensor | None
    error: Tensor
    output: Tensor
    baseline_output: Tensor

    @property
    def title(self) -> str:
        """Which output it is, and from where to where it went."""
        index = [] if self.target is None else self.target.tolist()
        name = f"output {','.join(map(str, index))}: " if index else ""
        return f"{name}{float(self.baseline_output):.3g} → {float(self.output):.3g}"


Explanations = list[Explanation]


def explain(
    attribution: Any,
    model: Callable[..., Any],
    rows: Rows | Tokens,
    *,
    targets: Callable[[list[int]], Any],
    baselines: Callable[[Tensor], Any],
    layer: str | None,
    pooling: Pooling,
    progress: Progress,
) -> Explanations:
    """Explain every row.

    Args:
        attribution: The component.
        model: The model.
        rows: The rows.
        targets: Returns the target of some rows; None for the highest output.
        baselines: Returns the baselines of some inputs.
        layer: The layer to attribute to.
        pooling: What becomes of the vectors of tokens.
        progress: Where to report.

    Raises:
        WorkError: If the model fails.
    """
    done: dict[int, Explanation] = {}
    with progress.task("attributing", len(rows)) as task:
        for numbers, inputs in rows.blocks(_BLOCK):
            try:
                target = targets(numbers)
                target = _predicted(model, inputs) if target is None else target
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CompletenessWarning)  # told once, for all rows
                    found: Attributions = attribution.attribute(
                        model, inputs, baselines(inputs), target=target, layer=layer
                    )
            except KexueError:
                raise
            except Exception as error:  # a user's model fails in any way
                raise WorkError(
                    f"The model failed on inputs of shape {list(inputs.shape)}: {reason(error)}."
                ) from error
            if isinstance(rows, Tokens):
                found = found._replace(values=token_scores(found.values, pooling))
            done.update(zip(numbers, _split(found, as_index(target, len(inputs))), strict=True))
            task.advance(len(numbers))
    return [done[number] for number in range(len(rows))]


def _predicted(model: Callable[..., Any], inputs: Tensor) -> Tensor | None:
    """Return the index of the highest output per row; None if there is only one."""
    with measuring(model), torch.no_grad():
        outputs = model(inputs)
    if not isinstance(outputs, Tensor) or outputs.numel() == len(inputs):
        return None
    if outputs.ndim != 2:
        raise ArgumentError(
            f"`--target` must say which of the outputs {list(outputs.shape[1:])} of a row is "
            f"explained, as in `--target 0,0`.",
            argument="target",
        )
    return outputs.argmax(1)


def _split(found: Attributions, index: Tensor | None) -> Explanations:
    rows = zip(*found, strict=True)
    return [
        Explanation(values, None if index is None else index[i], error, output, below)
        for i, (values, error, output, below) in enumerate(rows)
    ]
