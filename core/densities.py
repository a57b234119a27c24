"""Distributions that a sampler is run on: by name, from a small YAML file, or made in Python."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kexue.core.catalogue import load_yaml
from kexue.core.errors import ArgumentError, FileFormatError, ManifestError, did_you_mean
from kexue.core.lines import check_file

__all__ = ["DENSITIES", "Density", "make_density", "read_density"]


@dataclass(frozen=True)
class Density:
    """An unnormalised log-density that says where it is defined.

    It is a function from points to log-densities, so any such function can stand in its place
    where the sampler is told the rest.

    Args:
        log_prob: From points ``[chain, feature]``, or sequences ``[chain, time]`` of tokens with
            -1 behind the end, to log-densities ``[chain]`` in nats.
        num_features: Features of a point; None for sequences.
        num_tokens: Tokens to choose from at each place of a sequence; None for points.
        min_length: Tokens of the shortest sequence.
        max_length: Tokens of the longest sequence.
        dtype: Floating-point type of the points; torch's default type if None.
        start: ``(num, generator)`` to points of positive density, for chains to start from.
        draw_conditional: ``(points, place, generator)`` to draws ``[chain]`` of that feature given
            the others, where they are known.
        conditional_logits: ``(sequences, place)`` to logits ``[chain, token]`` of that place given
            the others, where they are cheaper than ``num_tokens`` calls.
        to_text: From sequences to a line of text each.
    """

    log_prob: Callable[[Tensor], Tensor]
    num_features: int | None = None
    num_tokens: int | None = None
    min_length: int = 0
    max_length: int = 0
    dtype: torch.dtype | None = None
    start: Callable[[int, torch.Generator | None], Tensor] | None = None
    draw_conditional: Callable[[Tensor, int, torch.Generator | None], Tensor] | None = None
    conditional_logits: Callable[[Tensor, int], Tensor] | None = None
    to_text: Callable[[Tensor], list[str]] | None = None

    def __call__(self, points: Tensor) -> Tensor:
        """Return the log-densities of points."""
        return self.log_prob(points)


Where = Mapping[str, Any]
"""Device and dtype of a density's numbers."""


def gaussian(
    where: Where,
    *,
    mean: Any = None,
    covariance: Any = None,
    num_features: int = 2,
    correlation: float = 0.0,
) -> Density:
    """A Gaussian: of a mean and a covariance, or with unit variances and one correlation."""
    matrix = _gaussian_covariance(where, covariance, num_features, correlation)
    size = len(matrix)
    centre = _numbers("mean", [0.0] * size if mean is None else mean, where, (size,))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not torch.allclose(matrix, matrix.T):
        raise ArgumentError(
            "`covariance` must be symmetric and positive definite.", argument="covariance"
        )
    whiten = torch.linalg.inv(factor).T.contiguous()
    precision, shift = whiten @ whiten.T, -centre @ whiten

    def log_prob(points: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm(torch.addmm(shift, points, whiten), dim=-1)
        return distance.square_().mul_(-0.5)

    def draw_conditional(points: Tensor, place: int, generator: torch.Generator | None) -> Tensor:
        row = precision[place] / precision[place, place]
        others = (points - centre) @ row - (points[:, place] - centre[place])
        noise = points.new_empty(len(points)).normal_(generator=generator)
        found: Tensor = centre[place] - others + noise * precision[place, place].rsqrt()
        return found

    return Density(log_prob, size, dtype=centre.dtype, draw_conditional=draw_conditional)


def _gaussian_covariance(
    where: Where, covariance: Any, num_features: int, correlation: float
) -> Tensor:
    if covariance is not None:
        matrix = _numbers("covariance", covariance, where, (None, None))
        if len(matrix) != matrix.shape[1]:
            raise ArgumentError(
                f"`covariance` must be square. Found shape {list(matrix.shape)}.",
                argument="covariance",
            )
        return matrix
    size = _whole("num_features", num_features)
    rho = _finite("correlation", correlation)
    return torch.eye(size, **where) * (1 - rho) + rho


def gaussian_mixture(where: Where, *, weights: Any, means: Any, scales: Any = 1.0) -> Density:
    """A mixture of round Gaussians: weights, means and standard deviations."""
    centres = _numbers("means", means, where, (None, None))
    count, size = centres.shape
    shares = _numbers("weights", weights, where, (count,))
    spread = [scales] * count if isinstance(scales, int | float) else scales
    widths = _numbers("scales", spread, where, (count,))
    for name, values in (("weights", shares), ("scales", widths)):
        if not (values > 0).all():
            raise ArgumentError(
                f"`{name}` must be positive. Found {values.tolist()}.", argument=name
            )
    height = shares.log() - size * widths.log()

    def log_prob(points: Tensor) -> Tensor:
        distances: Tensor = torch.linalg.vector_norm(points[:, None] - centres, dim=-1) / widths
        return (height - 0.5 * distances.square()).logsumexp(-1)

    return Density(log_prob, size, dtype=centres.dtype)


def banana(where: Where, *, curvature: float = 0.1, scale: float = 3.0) -> Density:
    """A bent Gaussian: x is N(0, scale²), y is N(curvature (x² − scale²), 1)."""
    bend, width = _finite("curvature", curvature), _positive("scale", scale)

    def log_prob(points: Tensor) -> Tensor:
        x, y = points.unbind(-1)
        bent = y - bend * (x.square() - width**2)
        return -0.5 * ((x / width).square() + bent.square())

    return Density(log_prob, 2, dtype=where["dtype"])


def funnel(where: Where, *, num_features: int = 10, scale: float = 3.0) -> Density:
    """Neal's funnel: the first feature v is N(0, scale²), the others are N(0, exp(v))."""
    size, width = _whole("num_features", num_features), _positive("scale", scale)

    def log_prob(points: Tensor) -> Tensor:
        v, rest = points[:, 0], points[:, 1:]
        inside = rest.square().sum(-1) * torch.exp(-v) + (size - 1) * v
        return -0.5 * ((v / width).square() + inside)

    return Density(log_prob, size, dtype=where["dtype"])


def table(where: Where, *, probabilities: Any = None, logits: Any = None) -> Tensor:
    """A table with an axis per variable: probabilities up to a factor, or their logarithms."""
    if (probabilities is None) == (logits is None):
        raise ArgumentError(
            "`probabilities` or `logits` must be given, not both.", argument="logits"
        )
    if logits is not None:
        return _numbers("logits", logits, where, None)
    found = _numbers("probabilities", probabilities, where, None)
    if not ((found >= 0).all() and found.isfinite().all() and found.sum() > 0):
        raise ArgumentError(
            "`probabilities` must be finite, not negative and not all zero.",
            argument="probabilities",
        )
    return found.log()


DENSITIES: dict[str, Callable[..., Density | Tensor]] = {
    "gaussian": gaussian,
    "gaussian-mixture": gaussian_mixture,
    "banana": banana,
    "funnel": funnel,
    "table": table,
}
"""Functions of ``where`` (device and dtype) and the keys of the YAML file."""


def make_density(
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Density | Tensor:
    """Return a density by name.

    Args:
        name: One of :data:`DENSITIES`.
        settings: Its arguments, as plain data.
        device: Where its numbers are; torch's default device if None.
        dtype: Their type.

    Returns:
        A :class:`Density`, or the logits of a table with an axis per variable.

    Raises:
        ArgumentError: If there is no such density, or an argument is not of its form.
    """
    if str(name) not in DENSITIES:
        raise ArgumentError(
            f"`density` must be one of {', '.join(DENSITIES)}. Found {name!r}."
            f"{did_you_mean(str(name), DENSITIES)}",
            argument="density",
        )
    build, given = DENSITIES[name], dict(settings or {})
    known = {
        key: p
        for key, p in inspect.signature(build).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key in given:
        if key not in known:
            raise ArgumentError(
                f"The density {name!r} has no {key!r}.{did_you_mean(str(key), known)} "
                f"It takes: {', '.join(known)}.",
                argument=str(key),
            )
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise ArgumentError(f"The density {name!r} needs `{missing[0]}`.", argument=missing[0])
    return build({"device": device, "dtype": dtype}, **given)


def read_density(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Density | Tensor:
    """Read a density from YAML: ``density``, its name, beside its arguments.

    Raises:
        FileFormatError: If the file is not YAML, or what it says is not of its form.
    """
    path = Path(path)
    check_file(path)
    try:
        found = load_yaml(path)
    except ManifestError as error:
        raise FileFormatError(str(error), path=path) from error
    if not isinstance(found, dict) or "density" not in found:
        raise FileFormatError(
            f"{path} must hold a mapping with the key `density`, one of {', '.join(DENSITIES)}.",
            path=path,
        )
    settings = {key: value for key, value in found.items() if key != "density"}
    try:
        return make_density(found["density"], settings, device=device, dtype=dtype)
    except ArgumentError as error:
        raise FileFormatError(f"{path}: {error}", path=path) from error


# -- checks ---------------------------------------------------------------------------------------


def _numbers(name: str, value: Any, where: Where, shape: Sequence[int | None] | None) -> Tensor:
    try:
        found = torch.tensor(value, **where)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"`{name}` must be numbers in rows of one length. Found {value!r}.", argument=name
        ) from error
    if shape is not None and not _fits(list(found.shape), shape):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ArgumentError(
            f"`{name}` must have shape [{wanted}]. Found {list(found.shape)}.", argument=name
        )
    if found.numel() == 0 or not found.ndim or found.isnan().any():
        raise ArgumentError(f"`{name}` must be a list of numbers, none NaN.", argument=name)
    if shape is not None and not found.isfinite().all():
        raise ArgumentError(f"`{name}` must be finite. Found {found.tolist()}.", argument=name)
    return found


def _fits(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(found) == len(shape) and all(
        n is None or n == m for m, n in zip(found, shape, strict=True)
    )


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"`{name}` must be a finite number. Found {value!r}.", argument=name)
    return float(value)


def _positive(name: str, value: Any) -> float:
    if not _finite(name, value) > 0:
        raise ArgumentError(f"`{name}` must be positive. Found {value!r}.", argument=name)
    return float(value)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(
            f"`{name}` must be a whole number, at least 1. Found {value!r}.", argument=name
        )
    return value
