"""Lookahead and lazy updates around any optimizer, and the engine that derives one from another.

``optimizer/lookahead`` and ``optimizer/lazy``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_lookahead.derivation import Batch as Batch
    from kexue_lookahead.derivation import Derivation as Derivation
    from kexue_lookahead.derived import DerivedOptimizer as DerivedOptimizer
    from kexue_lookahead.derived import derive as derive
    from kexue_lookahead.embedding import Lazy as Lazy
    from kexue_lookahead.lazy import with_lazy as with_lazy
    from kexue_lookahead.lookahead import Lookahead as Lookahead
    from kexue_lookahead.lookahead import with_lookahead as with_lookahead

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "derivation": ["Batch", "Derivation"],
        "derived": ["DerivedOptimizer", "derive"],
        "embedding": ["Lazy"],
        "lazy": ["with_lazy"],
        "lookahead": ["Lookahead", "with_lookahead"],
    },
)

_POST = "Su, Keras实现两个优化器：Lookahead和LazyOptimizer, 2019, https://kexue.fm/archives/6869"
_PAPER = (
    "Zhang, Lucas, Hinton and Ba, Lookahead Optimizer: k steps forward, 1 step back, NeurIPS 2019, "
    "https://arxiv.org/abs/1907.08610"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "optimizer",
            "lookahead",
            "kexue_lookahead.lookahead:Lookahead",
            "Slow weights that follow any optimizer a share of the way, every few steps.",
            references=(_POST, _PAPER),
            tags=("derivation", "averaging"),
        ),
        Component(
            "optimizer",
            "lazy",
            "kexue_lookahead.embedding:Lazy",
            "Adam or SGD that moves only the sampled rows of embeddings, in time of these rows.",
            references=(_POST,),
            tags=("adaptive", "embedding", "sparse"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    where = "kexue_lookahead.experiments"
    return [
        Experiment(
            "lookahead",
            f"{where}.lookahead:lookahead",
            "The variance on a noisy quadratic, and digits in small batches, with Lookahead.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "rows",
            f"{where}.rows:rows",
            "Which rows of an embedding move, and the deferred form beside the dense one.",
            references=(_POST,),
        ),
        Experiment(
            "text",
            f"{where}.text:text",
            "The topics of lines of text with Adam and with lazy updates.",
            references=(_POST,),
        ),
    ]
