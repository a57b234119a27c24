"""Six derivations of any optimizer, freely composed, and compositions that have names.

``optimizer/weight-decay``, ``optimizer/layer-adaptation``, ``optimizer/piecewise-linear-lr``,
``optimizer/grad-accumulation``; ``optimizer/lamb``, ``optimizer/lars``, ``optimizer/adamw-lr``.
Lookahead and lazy updates are those of ``kexue_lookahead``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_derived_optimizers.accumulation import GradAccumulation as GradAccumulation
    from kexue_derived_optimizers.accumulation import (
        with_grad_accumulation as with_grad_accumulation,
    )
    from kexue_derived_optimizers.compositions import LAMB as LAMB
    from kexue_derived_optimizers.compositions import LARS as LARS
    from kexue_derived_optimizers.compositions import AdamWLR as AdamWLR
    from kexue_derived_optimizers.layer_adaptation import LayerAdaptation as LayerAdaptation
    from kexue_derived_optimizers.layer_adaptation import (
        with_layer_adaptation as with_layer_adaptation,
    )
    from kexue_derived_optimizers.lookahead import with_lazy as with_lazy
    from kexue_derived_optimizers.lookahead import with_lookahead as with_lookahead
    from kexue_derived_optimizers.piecewise_linear import PiecewiseLinearLR as PiecewiseLinearLR
    from kexue_derived_optimizers.piecewise_linear import piecewise_linear as piecewise_linear
    from kexue_derived_optimizers.piecewise_linear import (
        with_piecewise_linear_lr as with_piecewise_linear_lr,
    )
    from kexue_derived_optimizers.weight_decay import WeightDecay as WeightDecay
    from kexue_derived_optimizers.weight_decay import with_weight_decay as with_weight_decay

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accumulation": ["GradAccumulation", "with_grad_accumulation"],
        "compositions": ["LAMB", "LARS", "AdamWLR"],
        "layer_adaptation": ["LayerAdaptation", "with_layer_adaptation"],
        "lookahead": ["with_lazy", "with_lookahead"],
        "piecewise_linear": [
            "PiecewiseLinearLR",
            "piecewise_linear",
            "with_piecewise_linear_lr",
        ],
        "weight_decay": ["WeightDecay", "with_weight_decay"],
    },
)

_POST = "Su, 6个派生优化器的简单介绍及其实现, 2019, https://kexue.fm/archives/7094"
_ACCUMULATION = "Su, 用时间换取效果：Keras梯度累积优化器, 2019, https://kexue.fm/archives/6794"
_DECAY = (
    "Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, "
    "https://arxiv.org/abs/1711.05101"
)
_LAMB = (
    "You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, "
    "ICLR 2020, https://arxiv.org/abs/1904.00962"
)
_LARS = (
    "You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, 2017, "
    "https://arxiv.org/abs/1708.03888"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "optimizer",
            "weight-decay",
            "kexue_derived_optimizers.weight_decay:WeightDecay",
            "Decoupled weight decay around any optimizer.",
            references=(_POST, _DECAY),
            tags=("derivation", "regularisation"),
        ),
        Component(
            "optimizer",
            "layer-adaptation",
            "kexue_derived_optimizers.layer_adaptation:LayerAdaptation",
            "Any optimizer, each tensor moved by a share of its own norm.",
            references=(_POST, _LAMB),
            tags=("derivation", "large-batch"),
        ),
        Component(
            "optimizer",
            "piecewise-linear-lr",
            "kexue_derived_optimizers.piecewise_linear:PiecewiseLinearLR",
            "Any optimizer with a learning rate that is piecewise linear in the steps.",
            references=(_POST,),
            tags=("derivation", "schedule", "warm-up"),
        ),
        Component(
            "optimizer",
            "grad-accumulation",
            "kexue_derived_optimizers.accumulation:GradAccumulation",
            "Any optimizer, stepped once for several small batches.",
            references=(_POST, _ACCUMULATION),
            tags=("derivation", "memory", "large-batch"),
        ),
        Component(
            "optimizer",
            "lamb",
            "kexue_derived_optimizers.compositions:LAMB",
            "Adam with weight decay, each tensor moved by a share of its own norm.",
            references=(_POST, _LAMB),
            tags=("adaptive", "large-batch"),
        ),
        Component(
            "optimizer",
            "lars",
            "kexue_derived_optimizers.compositions:LARS",
            "SGD with momentum, each tensor moved by a share of its own norm.",
            references=(_POST, _LAMB, _LARS),
            tags=("large-batch",),
        ),
        Component(
            "optimizer",
            "adamw-lr",
            "kexue_derived_optimizers.compositions:AdamWLR",
            "AdamW with a piecewise-linear learning rate.",
            references=(_POST, _DECAY),
            tags=("adaptive", "schedule", "warm-up"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "identities",
            "kexue_derived_optimizers.experiments:identities",
            "What each derivation must be equal to, to the last digits.",
            references=(_POST, _DECAY, _LAMB),
        ),
        Experiment(
            "composition",
            "kexue_derived_optimizers.composition:composition",
            "Where the order of derivations matters, and what a piecewise-linear rate can be.",
            references=(_POST,),
        ),
        Experiment(
            "training",
            "kexue_derived_optimizers.training:training",
            "Digits: weight decay beside L2, and LAMB beside Adam on the whole set as one batch.",
            references=(_POST, _DECAY, _LAMB),
        ),
    ]
