"""Three remedies against exposure bias in sequence-to-sequence training.

``sampler/token-replacement`` with ``loss/gradient-penalty-embedding``, and scheduled sampling, the
usual remedy, to compare them with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_exposure_bias.penalty import GradientPenaltyEmbedding as GradientPenaltyEmbedding
    from kexue_exposure_bias.penalty import gradient_penalty as gradient_penalty
    from kexue_exposure_bias.replacement import TokenReplacement as TokenReplacement
    from kexue_exposure_bias.scheduled import exponential_decay as exponential_decay
    from kexue_exposure_bias.scheduled import inverse_sigmoid_decay as inverse_sigmoid_decay
    from kexue_exposure_bias.scheduled import linear_decay as linear_decay
    from kexue_exposure_bias.scheduled import mix_predictions as mix_predictions
    from kexue_exposure_bias.scheduled import step_by_step as step_by_step

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "penalty": ["GradientPenaltyEmbedding", "gradient_penalty"],
        "replacement": ["TokenReplacement"],
        "scheduled": [
            "exponential_decay",
            "inverse_sigmoid_decay",
            "linear_decay",
            "mix_predictions",
            "step_by_step",
        ],
    },
)

_POST = "苏剑林, Seq2Seq中Exposure Bias现象的浅析与对策, 2020, https://kexue.fm/archives/7259"
_PENALTY = "苏剑林, 对抗训练浅谈：意义、方法和思考, 2020, https://kexue.fm/archives/7234"
_SCHEDULED = (
    "Bengio et al., Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks, "
    "2015, https://arxiv.org/abs/1506.03099"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "sampler",
            "token-replacement",
            "kexue_exposure_bias.replacement:TokenReplacement",
            "Decoder inputs in which some tokens are swapped for others of the same sequence.",
            references=(_POST, _SCHEDULED),
            tags=("seq2seq", "text", "regularisation"),
            run="kexue_exposure_bias.commands:run",
        ),
        Component(
            "loss",
            "gradient-penalty-embedding",
            "kexue_exposure_bias.penalty:GradientPenaltyEmbedding",
            "Cross-entropy plus the squared norm of its gradient with respect to the embeddings.",
            references=(_POST, _PENALTY),
            tags=("seq2seq", "adversarial", "regularisation"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "beams",
            "kexue_exposure_bias.experiments.laws:beams",
            "The post's example: a wider beam loses the target.",
            references=(_POST,),
        ),
        Experiment(
            "law",
            "kexue_exposure_bias.experiments.laws:law",
            "What is replaced, and by what, counted.",
            references=(_POST,),
        ),
        Experiment(
            "spaces",
            "kexue_exposure_bias.experiments.spaces:spaces",
            "Restoring the spaces of phrases: four ways of training, three beams.",
            references=(_POST, _PENALTY, _SCHEDULED),
        ),
    ]
