"""NICE: a flow of additive couplings, with exact likelihood, exact inverse and samples.

``generator/nice``, and its parts for flows of your own: :class:`AdditiveCoupling`,
:class:`DiagonalScale` and the priors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_nice.layers import AdditiveCoupling as AdditiveCoupling
    from kexue_nice.layers import DiagonalScale as DiagonalScale
    from kexue_nice.nice import NICE as NICE
    from kexue_nice.priors import GaussianPrior as GaussianPrior
    from kexue_nice.priors import LogisticPrior as LogisticPrior

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "layers": ["AdditiveCoupling", "DiagonalScale"],
        "nice": ["NICE"],
        "priors": ["GaussianPrior", "LogisticPrior"],
    },
)

_POST = "Su, 细水长flow之NICE:流模型的基本概念与实现, 2018, https://kexue.fm/archives/5776"
_PAPER = (
    "Dinh, Krueger and Bengio, NICE: Non-linear Independent Components Estimation, 2014, "
    "https://arxiv.org/abs/1410.8516"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's component."""
    return [
        Component(
            "generator",
            "nice",
            "kexue_nice.nice:NICE",
            "Additive-coupling flow: exact likelihood, exact inverse, samples.",
            references=(_POST, _PAPER),
            tags=("flow", "density", "images"),
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "exactness",
            "kexue_nice.exactness:exactness",
            "Inverse, determinant, mixing and normalisation.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "likelihood",
            "kexue_nice.experiments:likelihood",
            "Digits: bits per dimension beside Gaussians, without mixing, without initialisation.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "sampling",
            "kexue_nice.sampling:sampling",
            "Digits: noise, temperature, the signs of pixels, and the post's pictures.",
            references=(_POST,),
        ),
    ]
