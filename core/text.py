"""Writing figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["format_cell", "spread"]


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Write figures over seeds as ``mean ± standard deviation (least to greatest)``.

    Example:
        >>> spread([0.5, 0.6, 0.7])
        '0.600 ± 0.100 (0.500 to 0.700)'
    """
    import statistics

    rows = [float(v) for v in values]
    if not rows:
        return "nothing measured"
    deviation = statistics.stdev(rows) if len(rows) > 1 else math.nan
    width = f".{digits}f"
    mean = statistics.fmean(rows)
    extremes = f"{min(rows):{width}} to {max(rows):{width}}"
    return f"{mean:{width}} ± {deviation:{width}} ({extremes})"


def format_cell(value: Any) -> str:
    """Write a cell: floats with four significant digits, everything else as it is."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
