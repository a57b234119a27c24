"""Small drawings; matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue.core.errors import FileFormatError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "PLOT_SUFFIXES",
    "are_images",
    "chains",
    "check_plot",
    "curves",
    "draw",
    "histogram",
    "images",
    "paths",
    "write_plot",
]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_BLUE = "#3465a4"


def draw(plot: Callable[[Figure], object], *, width: float = 7.0, height: float = 4.0) -> Figure:
    """Return a figure that ``plot`` has drawn into; no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    plot(figure)
    return figure


def check_plot(path: Path) -> None:
    """Refuse a file that no picture can be drawn into.

    Raises:
        FileFormatError: If the suffix is not one of .png, .svg, .pdf, or the file cannot be
            written.
    """
    from kexue.core.writing import check_place

    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise FileFormatError(
            f"{path} must end in one of {' '.join(PLOT_SUFFIXES)}. "
            f"Found {path.suffix or 'no suffix'!r}.",
            path=path,
        )
    check_place(path)


def write_plot(path: Path, plot: Callable[[Figure], object]) -> None:
    """Draw into a file.

    Raises:
        FileFormatError: If there can be no such picture; see :func:`check_plot`.
    """
    from kexue.core.writing import atomic_path

    check_plot(path)
    figure = draw(plot)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def _values(values: Any) -> NDArray[np.float64]:
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def histogram(figure: Figure, values: Any, label: str, *, weights: Any = None) -> None:
    """Draw how values are distributed; NaN and infinities are counted in the label.

    Args:
        figure: An empty figure.
        values: Numbers.
        label: What they are.
        weights: How much each row of ``values`` counts; all alike by default.
    """
    import numpy as np

    table = _values(values)
    numbers = table.ravel()
    finite = np.isfinite(numbers)
    shown = numbers[finite]
    left_out = len(numbers) - len(shown)
    counts = None
    if weights is not None:
        counts = np.repeat(_values(weights), numbers.size // max(1, len(table)))[finite]
    axes = figure.subplots()
    axes.hist(shown, bins=_bins(shown), color=_BLUE, weights=counts)
    axes.set(xlabel=f"{label} ({left_out} not finite)" if left_out else label, ylabel="count")


def _bins(values: NDArray[np.float64]) -> Any:
    """Return bins: one per value where there are few whole ones, else forty."""
    import numpy as np

    if len(values) and (values == np.round(values)).all() and np.ptp(values) < 60:
        return np.arange(values.min() - 0.5, values.max() + 1)
    return 40


def chains(figure: Figure, draws: Any, label: str, *, features: int = 3, shown: int = 6) -> None:
    """Draw, for the first features, some chains' traces, all draws' histogram, autocorrelation.

    Args:
        figure: An empty figure.
        draws: Shape ``[chain, draw]`` or ``[chain, draw, feature]``.
        label: What the numbers are.
        features: How many features at most, a row each.
        shown: How many chains have their trace drawn.
    """
    values = _values(draws)
    values = values[..., None] if values.ndim == 2 else values
    rows = min(features, values.shape[2])
    figure.set_size_inches(11, 2.6 * rows + 0.4)
    grid = figure.subplots(rows, 3, squeeze=False, width_ratios=[2, 1, 1])
    for feature, (trace, counts, decay) in enumerate(grid):
        column = values[:, :, feature]
        name = f"{label} {feature}" if values.shape[2] > 1 else label
        for chain in column[:shown]:
            trace.plot(chain, linewidth=0.7)
        trace.set(xlabel="draw", ylabel=name)
        counts.hist(column.ravel(), bins=_bins(column.ravel()), color=_BLUE)
        counts.set(xlabel=name, ylabel="count")
        lags = _mean_autocorrelation(column)
        decay.bar(range(len(lags)), lags, color=_BLUE, width=0.8)
        decay.set(xlabel="lag", ylabel="autocorrelation", ylim=(min(-0.1, lags.min()), 1.05))


def _mean_autocorrelation(column: NDArray[np.float64], most: int = 60) -> NDArray[np.float64]:
    """Return the chains' mean autocorrelation by lag; zero for draws that are all the same."""
    import numpy as np

    centred = column - column.mean()
    length = centred.shape[1]
    power = np.abs(np.fft.rfft(centred, 2 * length, axis=1)) ** 2
    covariance = np.fft.irfft(power.mean(0))[: min(most, length)]
    return covariance / covariance[0] if covariance[0] > 0 else np.zeros_like(covariance)


def curves(
    figure: Figure, lines: Mapping[str, Sequence[float]], *, x: str, y: str, log: bool = False
) -> None:
    """Draw one line per name over its index."""
    axes = figure.subplots()
    for name, line in lines.items():
        axes.plot(range(len(line)), line, label=name)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    if len(lines) > 1:
        axes.legend()


def paths(
    figure: Figure, height: Callable[[Any], Any], ways: Mapping[str, Any], *, grid: int = 60
) -> None:
    """Draw ways through a plane over the contours of a function.

    Args:
        figure: Where.
        height: The function, of points ``[point, 2]``.
        ways: Points ``[step, 2]``, by name.
        grid: At how many places along each axis the function is evaluated.
    """
    import numpy as np
    import torch

    lines = {name: _values(way) for name, way in ways.items()}
    points = np.concatenate(list(lines.values()))
    points = points[np.isfinite(points).all(1)]
    # A way that leaps out of the plane must not shrink the rest to a dot; all begin inside.
    shown = np.concatenate(
        [np.quantile(points, [0.01, 0.99], axis=0), *(line[:1] for line in lines.values())]
    )
    low, high = shown.min(0), shown.max(0)
    margin = 0.2 * np.maximum(high - low, 1e-3)
    x, y = (np.linspace(low[i] - margin[i], high[i] + margin[i], grid) for i in range(2))
    plane = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    heights = _values(height(torch.from_numpy(plane))).reshape(grid, grid)
    axes = figure.subplots()
    if np.isfinite(heights).all() and np.ptp(heights) > 0:
        above = heights - heights.min()
        axes.contour(x, y, np.log10(above + 1e-3 * above.max()), 20, cmap="Greys", linewidths=0.7)
    for name, line in lines.items():
        (drawn,) = axes.plot(line[:, 0], line[:, 1], label=name, linewidth=1.2)
        axes.plot(line[:1, 0], line[:1, 1], "x", color=drawn.get_color(), markersize=6)
        axes.plot(line[-1:, 0], line[-1:, 1], "o", color=drawn.get_color(), markersize=4)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="first parameter")
    axes.set_ylabel("second parameter")


def are_images(shape: Sequence[int]) -> bool:
    """Whether an array of this shape is drawn as pictures: grey, or with 1, 3 or 4 channels last.

    Args:
        shape: Its shape, the rows first.
    """
    return len(shape) == 3 or (len(shape) == 4 and shape[3] in {1, 3, 4})


def images(figure: Figure, pixels: Any, *, columns: int | None = None) -> None:
    """Draw images as a grid: black is 0 and white is 1, or the extremes if they are beyond.

    Args:
        figure: Where.
        pixels: Shape ``[image, height, width]`` or with channels last; the first 64 are drawn.
        columns: Images in a row; as many as there are rows by default.
    """
    import numpy as np

    axes = figure.subplots()
    axes.axis("off")
    grid = _grid(_values(pixels[:64]), columns)
    shown = grid[np.isfinite(grid)]
    if not shown.size:
        return
    low, high = min(0.0, shown.min()), max(1.0, shown.max())
    scaled = np.nan_to_num((grid - low) / (high - low), nan=1.0, posinf=1.0, neginf=0.0)
    axes.imshow(scaled, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _grid(pixels: NDArray[np.float64], columns: int | None) -> NDArray[np.float64]:
    """Lay images out side by side, with lines of NaN between them; NaN is drawn white."""
    import numpy as np

    count, height, width = pixels.shape[:3]
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    shape = (rows * columns, height + 1, width + 1, *pixels.shape[3:])
    cells = np.full(shape, np.nan)
    cells[:count, :-1, :-1] = pixels
    laid = cells.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    grid = laid.reshape(rows * shape[1], columns * shape[2], *shape[3:])[:-1, :-1]
    return grid[..., 0] if grid.shape[2:] == (1,) else grid
