"""kexue-bidirectional-decoding: seq2seq decoding from both ends at once.

Post: https://kexue.fm/archives/6877. This module is the manifest and imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_bidirectional_decoding.decoder import BidirectionalBeam as BidirectionalBeam
    from kexue_bidirectional_decoding.interactive import (
        InteractiveAttention as InteractiveAttention,
    )
    from kexue_bidirectional_decoding.interactive import visible as visible
    from kexue_bidirectional_decoding.model import BidirectionalSeq2Seq as BidirectionalSeq2Seq
    from kexue_bidirectional_decoding.pseudo import Partners as Partners
    from kexue_bidirectional_decoding.pseudo import pseudo_targets as pseudo_targets
    from kexue_bidirectional_decoding.scorer import BidirectionalScorer as BidirectionalScorer
    from kexue_bidirectional_decoding.scorer import FunctionPairScorer as FunctionPairScorer
    from kexue_bidirectional_decoding.search import BidirectionalResult as BidirectionalResult
    from kexue_bidirectional_decoding.search import (
        bidirectional_beam_search as bidirectional_beam_search,
    )
    from kexue_bidirectional_decoding.targets import BidirectionalTargets as BidirectionalTargets
    from kexue_bidirectional_decoding.targets import (
        bidirectional_cross_entropy as bidirectional_cross_entropy,
    )
    from kexue_bidirectional_decoding.targets import make_bidirectional as make_bidirectional
    from kexue_bidirectional_decoding.targets import reverse_rows as reverse_rows
    from kexue_bidirectional_decoding.two_models import TwoModels as TwoModels

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "decoder": ["BidirectionalBeam"],
        "interactive": ["InteractiveAttention", "visible"],
        "model": ["BidirectionalSeq2Seq"],
        "pseudo": ["Partners", "pseudo_targets"],
        "scorer": ["BidirectionalScorer", "FunctionPairScorer"],
        "search": ["BidirectionalResult", "bidirectional_beam_search"],
        "targets": [
            "BidirectionalTargets",
            "bidirectional_cross_entropy",
            "make_bidirectional",
            "reverse_rows",
        ],
        "two_models": ["TwoModels"],
    },
)

_REFERENCES = (
    "J. Su, seq2seq之双向解码, 2019, https://kexue.fm/archives/6877",
    (
        "L. Zhou, J. Zhang, C. Zong, Synchronous Bidirectional Neural Machine Translation, "
        "TACL 2019, https://arxiv.org/abs/1905.04847"
    ),
)
_COMMANDS = "kexue_bidirectional_decoding.commands"


@hookimpl
def kexue_components() -> list[Component]:
    """Return the decoder."""
    return [
        Component(
            "decoder",
            "bidirectional-beam",
            "kexue_bidirectional_decoding.decoder:BidirectionalBeam",
            "Beam search from both ends in step, each side given the other's hypotheses.",
            references=_REFERENCES,
            tags=("text", "seq2seq", "beam-search"),
            run=f"{_COMMANDS}:run",
            fit=f"{_COMMANDS}:fit",
            apply=f"{_COMMANDS}:run",
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "words",
            "kexue_bidirectional_decoding.experiments:words",
            "Words with hidden letters: from the left, from the right, and from both ends.",
            references=_REFERENCES,
        )
    ]
