"""kexue-memm: maximum-entropy Markov models, locally normalised chains of tags.

Post: https://kexue.fm/archives/7213. The method is :class:`~kexue_memm.memm.MEMM`; this module is
the manifest and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_memm.learning_rates import param_groups
    from kexue_memm.memm import MEMM

__all__ = ["MEMM", "kexue_components", "param_groups"]

_lazy_getattr, _lazy_dir, _ = lazy_loader.attach(
    __name__, submod_attrs={"learning_rates": ["param_groups"], "memm": ["MEMM"]}
)

_REFERENCES = (
    "J. Su, CRF用过了，不妨再了解下更快的MEMM？, 2020, https://kexue.fm/archives/7213",
    (
        "A. McCallum, D. Freitag, F. Pereira, Maximum Entropy Markov Models for Information "
        "Extraction and Segmentation, ICML 2000, https://dl.acm.org/doi/10.5555/645529.658277"
    ),
    (
        "Z. Sun et al., Fast Structured Decoding for Sequence Models, NeurIPS 2019, "
        "https://arxiv.org/abs/1910.11555"
    ),
)


def __getattr__(name: str) -> object:
    value: object = _lazy_getattr(name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


@hookimpl
def kexue_components() -> Iterable[Component]:
    """Return the loss and the decoder, one class."""
    return [
        Component(
            "loss",
            "memm",
            "kexue_memm.memm:MEMM",
            "Sequence labelling loss: cross-entropy of each tag given its neighbour, "
            "left to right, right to left or both.",
            references=_REFERENCES,
            tags=("sequence-labelling", "chain", "local-normalisation"),
        ),
        Component(
            "decoder",
            "memm",
            "kexue_memm.memm:MEMM",
            "Best tag sequence of a maximum-entropy Markov model, by an exact Viterbi search.",
            references=_REFERENCES,
            tags=("sequence-labelling", "chain", "viterbi"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "segmentation",
            "kexue_memm.experiments:segmentation",
            "Segmentation of text: softmax, MEMM, Bi-MEMM and CRF.",
            references=_REFERENCES,
        ),
        Experiment(
            "many-tags",
            "kexue_memm.experiments:many_tags",
            "A training step with 20 000 tags.",
            references=_REFERENCES,
        ),
    ]
