"""Explanations as files, figures and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core.job import Result
from kexue_integrated_gradients.attribution import Attributions
from kexue_integrated_gradients.explaining import Explanations
from kexue_integrated_gradients.pictures import as_map, bars, heat_maps
from kexue_integrated_gradients.rows import Rows, Tokens
from kexue_integrated_gradients.tokens import tokens_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_result"]


def as_result(
    rows: Rows | Tokens, found: Explanations, *, title: str, tolerance: float | None
) -> Result:
    """Return what the command line writes and shows.

    Args:
        rows: What was explained.
        found: The explanations.
        title: Title of the page.
        tolerance: Greatest completeness error, as a share, that goes without a warning.
    """
    values = [row.values for row in found]
    plain = [v.detach().cpu().double().numpy() for v in values]
    titles = [f"row {number}, {row.title}" for number, row in enumerate(found)]
    figures = {
        "output": torch.stack([row.output for row in found]),
        "baseline_output": torch.stack([row.baseline_output for row in found]),
        "error": torch.stack([row.error for row in found]),
    }
    whole = Attributions(None, figures["error"], figures["output"], figures["baseline_output"])
    summary = _summary(whole, tolerance)
    arrays = {**_targets(found), **figures}
    if isinstance(rows, Rows):
        stacked = {"attributions": torch.stack(values), **arrays}
        return Result(summary, stacked, plot=partial(_draw, rows, plain, titles))
    padded = {
        "attributions": nn.utils.rnn.pad_sequence(values, batch_first=True),
        "length": torch.tensor([len(v) for v in values]),
        **arrays,
    }
    return Result(
        summary,
        padded,
        plot=lambda figure: bars(figure, plain, titles, rows.texts),
        page=lambda: tokens_page(rows.texts, values, titles, title=title),
    )


def _targets(found: Explanations) -> dict[str, Tensor]:
    indices = [row.target for row in found if row.target is not None]
    return {"target": torch.stack(indices).squeeze(1)} if indices else {}


def _summary(whole: Attributions, tolerance: float | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "rows": len(whole.error),
        "relative_error": whole.relative_error,
        "largest_error": float(whole.error.abs().max()),
    }
    if tolerance is not None and whole.relative_error > tolerance:
        summary["warning"] = (
            "the attributions do not add up to the difference of the outputs; "
            "use more steps, or rule=gauss-legendre"
        )
    return summary


def _draw(rows: Rows, values: Sequence[Any], titles: list[str], figure: Figure) -> None:
    pixels = rows.pixels
    if pixels is not None:  # the model may take them flat
        values = [
            v.reshape(p.shape) if v.ndim == 1 else v for v, p in zip(values, pixels, strict=True)
        ]
    maps = [as_map(v) for v in values]
    drawn = [m for m in maps if m is not None]
    if drawn:
        heat_maps(figure, drawn, titles, pixels)
    else:
        bars(figure, [v.ravel() for v in values], titles)
