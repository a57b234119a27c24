"""Text generation that ends: consistent sampling, the self-terminating layer, and plain searches.

``sampler/consistent-top-k``, ``sampler/consistent-nucleus``, ``sampler/ancestral``,
``decoder/greedy``, ``decoder/beam``, ``layer/self-terminating`` and ``loss/self-terminating``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_consistent_decoding.decoders import Beam as Beam
    from kexue_consistent_decoding.decoders import Greedy as Greedy
    from kexue_consistent_decoding.ends import log_end_floor as log_end_floor
    from kexue_consistent_decoding.ends import non_termination_ratio as non_termination_ratio
    from kexue_consistent_decoding.ends import steps_to_end as steps_to_end
    from kexue_consistent_decoding.layer import SelfTerminatingLayer as SelfTerminatingLayer
    from kexue_consistent_decoding.layer import SelfTerminatingLoss as SelfTerminatingLoss
    from kexue_consistent_decoding.processors import (
        CandidatesLogitsProcessor as CandidatesLogitsProcessor,
    )
    from kexue_consistent_decoding.processors import (
        SelfTerminatingLogitsProcessor as SelfTerminatingLogitsProcessor,
    )
    from kexue_consistent_decoding.samplers import Ancestral as Ancestral
    from kexue_consistent_decoding.samplers import ConsistentNucleus as ConsistentNucleus
    from kexue_consistent_decoding.samplers import ConsistentTopK as ConsistentTopK
    from kexue_consistent_decoding.samplers import consistent as consistent
    from kexue_consistent_decoding.scorer import SelfTerminating as SelfTerminating
    from kexue_consistent_decoding.terminating import self_terminating as self_terminating

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "decoders": ["Beam", "Greedy"],
        "ends": ["log_end_floor", "non_termination_ratio", "steps_to_end"],
        "layer": ["SelfTerminatingLayer", "SelfTerminatingLoss"],
        "processors": ["CandidatesLogitsProcessor", "SelfTerminatingLogitsProcessor"],
        "samplers": ["Ancestral", "ConsistentNucleus", "ConsistentTopK", "consistent"],
        "scorer": ["SelfTerminating"],
        "terminating": ["self_terminating"],
    },
)

_POST = "苏剑林, 如何应对Seq2Seq中的“根本停不下来”问题？, 2020, https://kexue.fm/archives/7500"
_PAPER = (
    "Welleck, Kulikov, Kim, Pang and Cho, Consistency of a Recurrent Language Model With Respect "
    "to Incomplete Decoding, EMNLP 2020, https://arxiv.org/abs/2002.02492"
)
_TOP_K = "Fan, Lewis and Dauphin, Hierarchical Neural Story Generation, 2018, https://arxiv.org/abs/1805.04833"
_NUCLEUS = (
    "Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, "
    "https://arxiv.org/abs/1904.09751"
)
_FIT = "kexue.core.lab.texts:fit_causal"


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    package = "kexue_consistent_decoding"
    samples: dict[str, Any] = {"fit": _FIT, "apply": f"{package}.commands:sample_text"}
    decodes: dict[str, Any] = {
        "run": f"{package}.commands:decode_ids",
        "fit": _FIT,
        "apply": f"{package}.commands:decode_text",
    }
    return [
        Component(
            "sampler",
            "consistent-top-k",
            f"{package}.samplers:ConsistentTopK",
            "Top-k sampling that always keeps the end token, and so ends with probability 1.",
            references=(_POST, _PAPER, _TOP_K),
            tags=("text", "consistent"),
            **samples,
        ),
        Component(
            "sampler",
            "consistent-nucleus",
            f"{package}.samplers:ConsistentNucleus",
            "Nucleus sampling that always keeps the end token, and so ends with probability 1.",
            references=(_POST, _PAPER, _NUCLEUS),
            tags=("text", "consistent"),
            **samples,
        ),
        Component(
            "sampler",
            "ancestral",
            f"{package}.samplers:Ancestral",
            "Ancestral, top-k and nucleus sampling as they are usual, which may never end.",
            references=(_POST, _TOP_K, _NUCLEUS),
            tags=("text",),
            **samples,
        ),
        Component(
            "decoder",
            "greedy",
            f"{package}.decoders:Greedy",
            "Greedy search over any language model.",
            references=(_POST,),
            tags=("text", "search"),
            **decodes,
        ),
        Component(
            "decoder",
            "beam",
            f"{package}.decoders:Beam",
            "Beam search over any language model.",
            references=(_POST,),
            tags=("text", "search"),
            **decodes,
        ),
        Component(
            "layer",
            "self-terminating",
            f"{package}.layer:SelfTerminatingLayer",
            "Output layer whose probability of the end only grows: every search ends in time.",
            references=(_POST, _PAPER),
            tags=("text", "consistent"),
        ),
        Component(
            "loss",
            "self-terminating",
            f"{package}.layer:SelfTerminatingLoss",
            "Negative log-likelihood of texts under the self-terminating layer.",
            references=(_POST, _PAPER),
            tags=("text", "consistent"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    package = "kexue_consistent_decoding.experiments"
    return [
        Experiment(
            "termination",
            f"{package}:termination",
            "Which decoding algorithms end on a trained recurrent network, and when.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "self-terminating",
            f"{package}:self_termination",
            "The self-terminating layer: its bound for greedy and beam search, and its price.",
            references=(_POST, _PAPER),
        ),
    ]
