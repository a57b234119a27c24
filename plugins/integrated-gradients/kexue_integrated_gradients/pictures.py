"""Attributions as pictures: bars, and heat maps beside their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_map", "bars", "heat_maps"]

_RED, _BLUE = "#d62728", "#1f77b4"
_Array = NDArray[np.float64]


def as_map(values: _Array) -> _Array | None:
    """Return the values of a row as ``[height, width]``, channels added up; None if it is none.

    Args:
        values: ``[height, width]``, or with one to four channels first or last.
    """
    if values.ndim == 2:
        return values
    if values.ndim == 3 and min(values.shape[0], values.shape[-1]) <= 4:
        summed: _Array = values.sum(0 if values.shape[0] <= 4 else -1)
        return summed
    return None


def heat_maps(
    figure: Figure, maps: Sequence[_Array], titles: Sequence[str], pixels: Any = None
) -> None:
    """Draw up to eight maps, each beside its image if there is one; red speaks for the output."""
    shown = list(maps[:8])
    pairs = 1 if len(shown) <= 4 else 2
    each = 1 if pixels is None else 2
    lines = -(-len(shown) // pairs)
    figure.set_size_inches(2.4 * pairs * each + 0.4, 2.3 * lines + 0.3)
    grid = figure.subplots(lines, pairs * each, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, heat in enumerate(shown):
        place = grid[number // pairs, number % pairs * each :]
        top = float(np.abs(heat).max()) or 1.0
        if pixels is not None:
            place[0].imshow(pixels[number], cmap="gray", interpolation="nearest")
        place[each - 1].imshow(heat, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        place[0].set_title(titles[number], fontsize=9, loc="left")


def bars(
    figure: Figure,
    rows: Sequence[_Array],
    titles: Sequence[str],
    labels: Sequence[Sequence[str]] | None = None,
    most: int = 20,
) -> None:
    """Draw up to four rows as bars, red for positive: the largest values, or all, in their order.

    Args:
        figure: Where.
        rows: The values of each row.
        titles: A title for each row.
        labels: A label for each value; its index by default.
        most: So many bars of a row.
    """
    shown = list(rows[:4])
    longest = max(min(len(row), most) for row in shown)
    figure.set_size_inches(3.4 * len(shown) + 0.6, 0.22 * longest + 1.2)
    for number, axes in enumerate(figure.subplots(1, len(shown), squeeze=False)[0]):
        row = shown[number]
        kept = np.sort(np.argsort(-np.abs(row), kind="stable")[:most])
        axes.barh(range(len(kept)), row[kept], color=[_RED if row[i] > 0 else _BLUE for i in kept])
        names = labels[number] if labels is not None else [str(i) for i in range(len(row))]
        axes.set_yticks(range(len(kept)), [names[i] for i in kept], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(titles[number], fontsize=9)
        left_out = len(row) - len(kept)
        axes.set_xlabel("attribution" + (f" ({left_out} smaller left out)" if left_out else ""))
