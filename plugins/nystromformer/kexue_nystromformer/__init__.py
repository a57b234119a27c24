"""Nyström attention: softmax attention in linear time through landmarks.

``layer/nystrom-attention``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_nystromformer.attention import nystrom_attention as nystrom_attention
    from kexue_nystromformer.landmarks import segment_means as segment_means
    from kexue_nystromformer.layer import NystromAttention as NystromAttention
    from kexue_nystromformer.pseudo_inverse import pseudo_inverse as pseudo_inverse

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention": ["nystrom_attention"],
        "landmarks": ["segment_means"],
        "layer": ["NystromAttention"],
        "pseudo_inverse": ["pseudo_inverse"],
    },
)

_POST = "Su, Nyströmformer：基于矩阵分解的线性化Attention方案, 2021, https://kexue.fm/archives/8180"
_PAPER = (
    "Xiong et al., Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention, "
    "AAAI 2021, https://arxiv.org/abs/2102.03902"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's component."""
    return [
        Component(
            "layer",
            "nystrom-attention",
            "kexue_nystromformer.layer:NystromAttention",
            "Multi-head self-attention in linear time, through landmarks.",
            references=(_POST, _PAPER),
            tags=("attention", "linear", "long-sequences"),
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "inverse",
            "kexue_nystromformer.experiments:inverse",
            "The iterative pseudo-inverse, and what becomes of attention with it.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "photographs",
            "kexue_nystromformer.experiments:photographs",
            "How near the attention over the patches of two photographs is to softmax attention.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "scaling",
            "kexue_nystromformer.scaling:scaling",
            "Time and memory against the length, beside exact attention.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "training",
            "kexue_nystromformer.experiments:training",
            "A classifier of digits with Nyström attention and with softmax attention.",
            references=(_POST, _PAPER),
        ),
    ]
