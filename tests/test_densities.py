"""Densities: by name, from YAML, and what is wrong with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.core.densities import DENSITIES, Density, make_density, read_density
from kexue.core.errors import ArgumentError, FileFormatError

MIXTURE = "density: gaussian-mixture\nweights: [1, 3]\nmeans: [[-2, 0], [2, 1]]\nscales: [1, 0.5]\n"


def grid(low: float, high: float, num: int, dimensions: int) -> tuple[Tensor, float]:
    """Return points of a lattice and the volume of a cell."""
    axis = torch.linspace(low, high, num, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    return points, ((high - low) / (num - 1)) ** dimensions


@pytest.mark.parametrize(
    ("name", "settings", "mean", "variance"),
    [
        ("gaussian", {}, [0, 0], [1, 1]),
        ("gaussian", {"mean": [1, -1], "covariance": [[2, 0.5], [0.5, 1]]}, [1, -1], [2, 1]),
        ("gaussian", {"num_features": 1}, [0], [1]),
        ("banana", {"scale": 1.5}, [0, 0], [2.25, 1 + 2 * 0.01 * 1.5**4]),
        ("funnel", {"num_features": 2, "scale": 0.5}, [0, 0], [0.25, math.exp(0.125)]),
        (
            "gaussian-mixture",
            {"weights": [1, 3], "means": [[-2, 0], [2, 1]], "scales": [1.0, 0.5]},
            [1, 0.75],
            [0.25 * (1 + 9) + 0.75 * (0.25 + 1), 0.25 * (1 + 0.75**2) + 0.75 * (0.25 + 0.25**2)],
        ),
    ],
)
def test_densities_have_the_moments_they_should(
    name: str, settings: dict[str, Any], mean: list[float], variance: list[float]
) -> None:
    density = make_density(name, settings, dtype=torch.float64)
    assert isinstance(density, Density)
    assert density.num_features == len(mean)
    assert density.dtype == torch.float64
    points, _ = grid(-12, 12, 1201, len(mean))
    law = density(points).softmax(0)
    found = law @ points
    assert found.tolist() == pytest.approx(mean, abs=1e-3)
    assert (law @ (points - found).square()).tolist() == pytest.approx(variance, rel=1e-3)


def test_a_gaussian_knows_its_conditionals() -> None:
    covariance = torch.tensor([[2.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 0.5]]).double()
    density = make_density(
        "gaussian", {"mean": [1, 2, 3], "covariance": covariance.tolist()}, dtype=torch.float64
    )
    assert isinstance(density, Density)
    assert density.draw_conditional is not None
    point = torch.tensor([[0.5, 9.0, 2.0]], dtype=torch.float64)
    drawn = density.draw_conditional(point.expand(50_000, 3), 1, torch.Generator().manual_seed(0))
    others = [0, 2]
    gain = covariance[1, others] @ torch.linalg.inv(covariance[others][:, others])
    wanted = 2 + gain @ (point[0, others] - torch.tensor([1.0, 3.0]).double())
    variance = 1 - gain @ covariance[others, 1]
    assert float(drawn.mean()) == pytest.approx(float(wanted), abs=0.02)
    assert float(drawn.var()) == pytest.approx(float(variance), rel=0.03)


def test_a_table_is_logits() -> None:
    found = make_density("table", {"probabilities": [[1, 0], [2, 5]]})
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.exp(), torch.tensor([[1.0, 0.0], [2.0, 5.0]]))
    same = make_density("table", {"logits": [0.0, -math.inf]}, dtype=torch.float64)
    assert isinstance(same, Tensor)
    assert same.tolist() == [0.0, -math.inf]


def test_reads_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURE, encoding="utf-8")
    found = read_density(path)
    assert isinstance(found, Density)
    same = make_density(
        "gaussian-mixture",
        {"weights": [0.25, 0.75], "means": [[-2, 0], [2, 1]], "scales": [1, 0.5]},
    )
    assert isinstance(same, Density)
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(points) - found(points[:1]), same(points) - same(points[:1]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- 1", "must hold a mapping with the key `density`"),
        ("weights: [1]", "must hold a mapping with the key `density`"),
        ("density: [1]", "`density` must be one of gaussian, "),
        ("density: gausian", r"Found 'gausian'. Did you mean 'gaussian'\?"),
        ("density: {", "is not valid YAML"),
        ("density: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("density: banana\ncurvture: 1", r"has no 'curvture'. Did you mean 'curvature'\?"),
        ("density: banana\nscale: 0", "`scale` must be positive. Found 0"),
        ("density: banana\nscale: wide", "`scale` must be a finite number. Found 'wide'"),
        ("density: banana\ncurvature: .nan", "`curvature` must be a finite number. Found nan"),
        ("density: funnel\nnum_features: 1.5", "`num_features` must be a whole number"),
        ("density: gaussian-mixture\nmeans: [[1]]", "needs `weights`"),
        (MIXTURE + "colour: red", "has no 'colour'"),
        (MIXTURE.replace("[1, 3]", "[1, -3]"), "`weights` must be positive"),
        (MIXTURE.replace("[1, 3]", "[1, 3, 4]"), r"`weights` must have shape \[2\]. Found \[3\]"),
        (MIXTURE.replace("[2, 1]", "[2]"), "`means` must be numbers in rows of one length"),
        (MIXTURE.replace("[2, 1]", "[2, .nan]"), "`means` must be .*none NaN"),
        (MIXTURE.replace("[2, 1]", "[2, .inf]"), "`means` must be finite"),
        ("density: gaussian\ncovariance: [[1, 2], [2, 1]]", "symmetric and positive definite"),
        ("density: gaussian\ncovariance: [[1, 0], [0.5, 1]]", "symmetric and positive definite"),
        ("density: gaussian\ncovariance: [[1, 2]]", "`covariance` must be square"),
        ("density: gaussian\ncorrelation: 1", "symmetric and positive definite"),
        ("density: gaussian\nmean: [1, 2, 3]", r"`mean` must have shape \[2\]. Found \[3\]"),
        ("density: table", "`probabilities` or `logits` must be given"),
        ("density: table\nprobabilities: [0, 0]", "must be finite, not negative and not all zero"),
        ("density: table\nprobabilities: [1, -1]", "must be finite, not negative"),
        ("density: table\nlogits: []", "`logits` must be a list of numbers"),
        ("density: table\nlogits: 3", "`logits` must be a list of numbers"),
    ],
)  # fmt: skip
def test_rejects_yaml(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "density.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError, match=words) as caught:
        read_density(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rejects_a_name_as_an_argument() -> None:
    with pytest.raises(ArgumentError, match="`density` must be one of") as caught:
        make_density("rosenbrock")
    assert caught.value.argument == "density"
    assert set(DENSITIES) >= {"gaussian", "gaussian-mixture", "banana", "funnel", "table"}
