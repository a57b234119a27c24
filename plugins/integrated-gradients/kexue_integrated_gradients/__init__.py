"""Integrated gradients: what each input contributed to a model's output.

``attribution/integrated-gradients``, and the kind ``attribution`` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, Interface, hookimpl

if TYPE_CHECKING:
    from kexue_integrated_gradients.attribution import (
        Attribution as Attribution,
    )
    from kexue_integrated_gradients.attribution import (
        Attributions as Attributions,
    )
    from kexue_integrated_gradients.integrated_gradients import (
        IntegratedGradients as IntegratedGradients,
    )
    from kexue_integrated_gradients.integrated_gradients import (
        integrated_gradients as integrated_gradients,
    )
    from kexue_integrated_gradients.tokens import token_scores as token_scores
    from kexue_integrated_gradients.tokens import tokens_page as tokens_page

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attribution": ["Attribution", "Attributions"],
        "integrated_gradients": ["IntegratedGradients", "integrated_gradients"],
        "tokens": ["token_scores", "tokens_page"],
    },
)

_POST = "Su, 积分梯度：一种新颖的神经网络可视化方法, 2020, https://kexue.fm/archives/7533"
_PAPER = (
    "Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, ICML 2017, "
    "https://arxiv.org/abs/1703.01365"
)
_COUNTERFACTUALS = (
    "Sundararajan, Taly and Yan, Gradients of Counterfactuals, 2016, "
    "https://arxiv.org/abs/1611.02639"
)


@hookimpl
def kexue_interfaces() -> list[Interface]:
    """Return the kind that the plugin brings."""
    return [
        Interface(
            kind="attribution",
            target="kexue_integrated_gradients.attribution:Attribution",
            summary="A model and its inputs to what each input contributed to the output.",
            method="attribute",
            run="kexue_integrated_gradients.running:run",
            checks="kexue_integrated_gradients.conformance:checks",
            template="kexue_integrated_gradients:attribution.py.txt",
        )
    ]


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's component."""
    return [
        Component(
            "attribution",
            "integrated-gradients",
            "kexue_integrated_gradients.integrated_gradients:IntegratedGradients",
            "Gradients integrated from a baseline to the input; complete, and measured to be.",
            references=(_POST, _PAPER, _COUNTERFACTUALS),
            tags=("interpretability", "saliency", "gradients"),
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "axioms",
            "kexue_integrated_gradients.experiments.axioms:axioms",
            "Completeness by rule and steps, saturation, and invariance to the wiring.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "deletion",
            "kexue_integrated_gradients.experiments.deletion:deletion",
            "Which pixels matter: deleting them by gradient and by integrated gradient.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "sentences",
            "kexue_integrated_gradients.experiments.sentences:sentences",
            "A classifier of sentences as in the post: which words decide, and for which class.",
            references=(_POST,),
        ),
    ]
