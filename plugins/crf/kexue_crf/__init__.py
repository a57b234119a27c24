"""Linear-chain conditional random field: a post of kexue.fm as a plugin.

Scores whole tag sequences, normalised exactly; a loss and its decoder in one module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_crf.constraints import Constraints, scheme_constraints
    from kexue_crf.crf import CRF
    from kexue_crf.decoding import viterbi, viterbi_nbest

__all__ = ["CRF", "Constraints", "scheme_constraints", "viterbi", "viterbi_nbest"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "constraints": ["Constraints", "scheme_constraints"],
        "crf": ["CRF"],
        "decoding": ["viterbi", "viterbi_nbest"],
    },
)

_REFERENCES = (
    "苏剑林, 简明条件随机场CRF介绍（附带纯Keras实现）, https://kexue.fm/archives/5542",
    "Lafferty, McCallum & Pereira, Conditional Random Fields, ICML 2001",
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the loss and the decoder: the same module."""
    return [
        Component(
            "loss",
            "crf",
            "kexue_crf.crf:CRF",
            "Negative log-likelihood of tag sequences under a linear-chain CRF, exact and fast.",
            references=_REFERENCES,
            tags=("sequence", "structured"),
        ),
        Component(
            "decoder",
            "crf",
            "kexue_crf.crf:CRF",
            "Best tag sequences of a linear-chain CRF (Viterbi), with constraints and n-best.",
            references=_REFERENCES,
            tags=("sequence", "structured"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "segmentation",
            "kexue_crf.experiments:segmentation",
            "Segmentation of text: a CRF beside softmax per position.",
            references=_REFERENCES,
        ),
        Experiment(
            "enumeration",
            "kexue_crf.experiments:enumeration",
            "Recursion and Viterbi beside the enumeration of all sequences.",
            references=_REFERENCES,
        ),
    ]
