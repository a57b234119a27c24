"""Adafactor: adaptive steps whose second moments are kept as one row and one column per matrix.

``optimizer/adafactor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_adafactor.adafactor import Adafactor as Adafactor

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"adafactor": ["Adafactor"]}
)

_POST = "Su, AdaFactor优化器浅析, 2020, https://kexue.fm/archives/7302"
_PAPER = (
    "Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, ICML 2018, "
    "https://arxiv.org/abs/1804.04235"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's component."""
    return [
        Component(
            "optimizer",
            "adafactor",
            "kexue_adafactor.adafactor:Adafactor",
            "Adaptive optimizer with factored second moments and relative step sizes.",
            references=(_POST, _PAPER),
            tags=("adaptive", "memory", "large-models"),
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "factoring",
            "kexue_adafactor.experiments:factoring",
            "What the factored second moment is the best of, and how many bytes it takes.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "training",
            "kexue_adafactor.experiments:training",
            "Digits with Adafactor and Adam; clipping, and the scale of the loss, on the way.",
            references=(_POST, _PAPER),
        ),
    ]
