"""Distances of two sequences of word vectors, and the bounds below them.

With vectors w_1 … w_n of one text and w'_1 … w'_m of the other:

====================  ===============================  =================  =========================
distance              masses                           cost               bound by centroids
====================  ===============================  =================  =========================
word mover's          p_i = 1 / n                      |w_i - w'_j|       |sum p w - sum q w'|
word rotator's        p_i = |w_i| / sum |w|            1 - cos(w_i, w'_j) |sum p u - sum q u'|² / 2
====================  ===============================  =================  =========================

where u = w / |w|, so that sum p u = sum w / sum |w|. The second bound is the post's own. The
relaxed bound drops one of the two constraints: max(sum p_i min_j cost_ij, sum q_j min_i cost_ij).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue_wrd.geometry import MOVER, ROTATOR, Geometry
from kexue_wrd.transport import transport

__all__ = ["relaxed_wmd", "relaxed_wrd", "wcd", "wmd", "wrd", "wrd_centroid_bound"]


def wmd(
    x: Float[Tensor, "n feature"],
    y: Float[Tensor, "m feature"],
    *,
    x_counts: Float[Tensor, " n"] | None = None,
    y_counts: Float[Tensor, " m"] | None = None,
) -> Tensor:
    """Return the word mover's distance of two texts, exactly.

    Kusner et al. 2015; post 7388. The distance is |·| of the vectors as they are, so that it has
    their scale; gensim's divides them by their norms first. It is a metric. Differentiable.

    Args:
        x: A vector per word.
        y: The other text's.
        x_counts: How often each word of ``x`` occurs; once by default. Any positive weights.
        y_counts: The same for ``y``.

    Returns:
        One number >= 0, in the inputs' dtype; float32 for half precision.

    Raises:
        ArgumentError: If a text has no words, shapes do not fit, or a vector is not finite.

    Example:
        >>> import torch
        >>> from kexue_wrd import wmd
        >>> wmd(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.6180)
    """
    return _exact(MOVER, x, y, x_counts, y_counts)


def wrd(
    x: Float[Tensor, "n feature"],
    y: Float[Tensor, "m feature"],
    *,
    x_counts: Float[Tensor, " n"] | None = None,
    y_counts: Float[Tensor, " m"] | None = None,
) -> Tensor:
    """Return the word rotator's distance of two texts, exactly; it lies in [0, 2].

    Yokoi et al. 2020; post 7388. Zero vectors have no mass and no direction, and are left out.
    It is no metric: 1 - cos breaks the triangle inequality. Differentiable.

    Args:
        x: A vector per word.
        y: The other text's.
        x_counts: How often each word of ``x`` occurs; once by default. Any positive weights.
        y_counts: The same for ``y``.

    Returns:
        One number, in the inputs' dtype; float32 for half precision. The post's similarity is
        one minus it.

    Raises:
        ArgumentError: If a text has no words or only zero vectors, shapes do not fit, or a vector
            is not finite.

    Example:
        >>> import torch
        >>> from kexue_wrd import wrd
        >>> wrd(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0]]))
        tensor(0.2500)
    """
    return _exact(ROTATOR, x, y, x_counts, y_counts)


def wcd(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> Tensor:
    """Return the word centroid distance, a lower bound of :func:`wmd`.

    Args:
        x: A vector per word.
        y: The other text's.
    """
    return _centroid_bound(MOVER, x, y)


def wrd_centroid_bound(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> Tensor:
    """Return the post's lower bound of :func:`wrd`, |sum x / sum |x| - sum y / sum |y||² / 2.

    Args:
        x: A vector per word.
        y: The other text's.
    """
    return _centroid_bound(ROTATOR, x, y)


def relaxed_wmd(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> Tensor:
    """Return the relaxed word mover's distance (Kusner et al., section 4), below :func:`wmd`.

    Args:
        x: A vector per word.
        y: The other text's.
    """
    return _relaxed(MOVER, x, y)


def relaxed_wrd(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> Tensor:
    """Return the same relaxation of the word rotator's distance, below :func:`wrd`.

    Args:
        x: A vector per word.
        y: The other text's.
    """
    return _relaxed(ROTATOR, x, y)


def _exact(
    geometry: Geometry, x: Tensor, y: Tensor, x_counts: Tensor | None, y_counts: Tensor | None
) -> Tensor:
    (x, p), (y, q) = _placed(geometry, x, y, x_counts, y_counts)
    return transport(p, q, geometry.cost(x, y))


def _centroid_bound(geometry: Geometry, x: Tensor, y: Tensor) -> Tensor:
    (x, p), (y, q) = _placed(geometry, x, y)
    return geometry.of_squared((p @ x - q @ y).square().sum())


def _relaxed(geometry: Geometry, x: Tensor, y: Tensor) -> Tensor:
    (x, p), (y, q) = _placed(geometry, x, y)
    cost = geometry.cost(x, y)
    return torch.maximum(p @ cost.amin(1), q @ cost.amin(0))


def _placed(
    geometry: Geometry,
    x: Tensor,
    y: Tensor,
    x_counts: Tensor | None = None,
    y_counts: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the points and masses of both texts."""
    _check_vectors("x", x)
    _check_vectors("y", y)
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(
            f"`y` must have the features of `x`, {x.shape[1]}. Found {y.shape[1]}.", argument="y"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (
        _with_masses(geometry, "x", x.to(dtype), x_counts),
        _with_masses(geometry, "y", y.to(dtype), y_counts),
    )


def _with_masses(
    geometry: Geometry, name: str, vectors: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    points, weights = geometry.place(vectors)
    if counts is not None:
        _check_counts(f"{name}_counts", counts, len(vectors))
        weights = weights * counts.to(weights)
    kept = weights.detach() > 0
    if not kept.any():
        raise ArgumentError(
            f"`{name}` must hold a word that weighs more than 0. All {len(vectors)} weigh 0.",
            argument=name,
        )
    return points[kept], weights[kept] / weights[kept].sum()


def _check_vectors(name: str, vectors: Tensor) -> None:
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or 0 in vectors.shape:
        found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ArgumentError(
            f"`{name}` must have shape [n, feature], a vector for each of at least one word. "
            f"Found {found}.",
            argument=name,
        )
    if not vectors.is_floating_point():
        raise ArgumentError(
            f"`{name}` must be floating point. Found {vectors.dtype}.", argument=name
        )
    broken = ~torch.isfinite(vectors).all(1)
    if broken.any():
        at = int(broken.nonzero()[0])
        raise ArgumentError(f"`{name}` must be finite. Word {at} is not.", argument=name)


def _check_counts(name: str, counts: Tensor, words: int) -> None:
    if not isinstance(counts, Tensor) or counts.shape != (words,):
        found = list(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ArgumentError(
            f"`{name}` must have shape [{words}], one number per word. Found {found}.",
            argument=name,
        )
    if not (torch.isfinite(counts) & (counts >= 0)).all():
        raise ArgumentError(f"`{name}` must be finite and not negative.", argument=name)
