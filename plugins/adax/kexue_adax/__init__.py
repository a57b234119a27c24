"""AdaX and AdaXW: Adam with a memory of second moments that only grows longer.

``optimizer/adax``, ``optimizer/adaxw``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_adax.adax import AdaX as AdaX
    from kexue_adax.adax import AdaXW as AdaXW
    from kexue_adax.official import from_official as from_official

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"adax": ["AdaX", "AdaXW"], "official": ["from_official"]}
)

_POST = "Su, AdaX优化器浅析, 2020, https://kexue.fm/archives/7387"
_PAPER = (
    "Li, Zhang, Wang and Luo, AdaX: Adaptive Gradient Descent with Exponential Long Term Memory, "
    "2020, https://arxiv.org/abs/2004.09740"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "optimizer",
            "adax",
            "kexue_adax.adax:AdaX",
            "Adam whose memory of second moments grows: the decay goes from 0 to 1.",
            references=(_POST, _PAPER),
            tags=("adaptive",),
        ),
        Component(
            "optimizer",
            "adaxw",
            "kexue_adax.adax:AdaXW",
            "AdaX with decoupled weight decay, at the rate that its authors recommend.",
            references=(_POST, _PAPER),
            tags=("adaptive", "weight-decay"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "forms",
            "kexue_adax.experiments:forms",
            "The average beside the growing sum, also where that overflows.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "decay",
            "kexue_adax.experiments:shares",
            "The decays of Adam, Adafactor and AdaX, and where a short memory leads.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "training",
            "kexue_adax.training:training",
            "Digits with Adam and AdaX; and with the three decays, all else equal.",
            references=(_POST, _PAPER),
        ),
    ]
