"""Gibbs sampling of text from a masked language model: ``sampler/mlm-gibbs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_bert_sampling.joint import JointScorer as JointScorer
    from kexue_bert_sampling.quality import Trigrams as Trigrams
    from kexue_bert_sampling.quality import ngrams as ngrams
    from kexue_bert_sampling.quality import overlap as overlap
    from kexue_bert_sampling.quality import self_bleu as self_bleu
    from kexue_bert_sampling.sampler import MLMGibbs as MLMGibbs

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "joint": ["JointScorer"],
        "quality": ["Trigrams", "ngrams", "overlap", "self_bleu"],
        "sampler": ["MLMGibbs"],
    },
)

_POST = "苏剑林, 【搜出来的文本】⋅(三)基于BERT的文本采样, 2021, https://kexue.fm/archives/8119"
_PAPER = (
    "Wang and Cho, BERT has a Mouth, and It Must Speak: BERT as a Markov Random Field Language "
    "Model, 2019, https://arxiv.org/abs/1902.04094"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "sampler",
            "mlm-gibbs",
            "kexue_bert_sampling.sampler:MLMGibbs",
            "Text of a masked language model: one token after the other masked and drawn anew.",
            references=(_POST, _PAPER),
            tags=("mcmc", "discrete", "text"),
            run="kexue_bert_sampling.commands:run",
            fit="kexue.core.lab.texts:fit_masked",
            apply="kexue_bert_sampling.commands:apply",
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    package = "kexue_bert_sampling"
    return [
        Experiment(
            "stationary",
            f"{package}.experiments:stationary",
            "The law of the chains beside the exact one, on texts of three tokens.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "text",
            f"{package}.text_experiments:text",
            "Text of a small masked language model: how it improves with the steps.",
            references=(_POST, _PAPER),
        ),
    ]
