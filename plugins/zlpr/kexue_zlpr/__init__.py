"""Softmax cross-entropy generalised to any number of labels per row.

``loss/zlpr`` with ``decoder/zlpr``, and the two losses on the way to it: ``loss/pairwise-softmax``
and the combinatorial ``loss/subset-softmax``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_zlpr.decoder import ThresholdDecoder as ThresholdDecoder
    from kexue_zlpr.pairwise import PairwiseSoftmax as PairwiseSoftmax
    from kexue_zlpr.subset import SubsetSoftmax as SubsetSoftmax
    from kexue_zlpr.zlpr import ZLPR as ZLPR

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "decoder": ["ThresholdDecoder"],
        "pairwise": ["PairwiseSoftmax"],
        "subset": ["SubsetSoftmax"],
        "zlpr": ["ZLPR"],
    },
)

_POST = "Su, 将“Softmax+交叉熵”推广到多标签分类问题, 2020, https://kexue.fm/archives/7359"
_SOFT_POST = "Su, 多标签“Softmax+交叉熵”的软标签版本, 2022, https://kexue.fm/archives/9064"
_PAPER = (
    "Su et al., ZLPR: A Novel Loss for Multi-label Classification, 2022, "
    "https://arxiv.org/abs/2208.02955"
)
_CIRCLE_LOSS = (
    "Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020, "
    "https://arxiv.org/abs/2002.10857"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "loss",
            "zlpr",
            "kexue_zlpr.zlpr:ZLPR",
            "Multi-label softmax cross-entropy with a threshold class; dense or sparse targets.",
            references=(_POST, _SOFT_POST, _PAPER),
            tags=("multi-label", "classification", "extreme"),
        ),
        Component(
            "loss",
            "pairwise-softmax",
            "kexue_zlpr.pairwise:PairwiseSoftmax",
            "Every positive above every negative: the unified pairwise form of softmax.",
            references=(_POST, _CIRCLE_LOSS),
            tags=("multi-label", "classification", "ranking"),
        ),
        Component(
            "loss",
            "subset-softmax",
            "kexue_zlpr.subset:SubsetSoftmax",
            "Softmax over all subsets of a fixed or bounded number of labels, exact and stable.",
            references=(_POST,),
            tags=("multi-label", "classification", "combinatorial"),
        ),
        Component(
            "decoder",
            "zlpr",
            "kexue_zlpr.decoder:ThresholdDecoder",
            "Label sets: the classes above a threshold, at least and at most so many.",
            references=(_POST, _SOFT_POST),
            tags=("multi-label", "classification"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "imbalance",
            "kexue_zlpr.experiments:imbalance",
            "Multi-label text: ZLPR beside binary cross-entropies.",
            references=(_POST, _SOFT_POST, _PAPER),
        ),
        Experiment(
            "identities",
            "kexue_zlpr.experiments:identities",
            "The identities that the posts derive, in float64.",
            references=(_POST, _SOFT_POST, _PAPER),
        ),
    ]
