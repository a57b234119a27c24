"""Word mover's and word rotator's distance: exact transport between texts, and exact search.

``similarity/wmd`` and ``similarity/wrd`` compare texts; ``wmd``, ``wrd`` and their bounds compare
sequences of vectors; ``transport`` and ``sinkhorn`` solve any transport problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_wrd.cooccurrence import fit_vectors as fit_vectors
    from kexue_wrd.distances import relaxed_wmd as relaxed_wmd
    from kexue_wrd.distances import relaxed_wrd as relaxed_wrd
    from kexue_wrd.distances import wcd as wcd
    from kexue_wrd.distances import wmd as wmd
    from kexue_wrd.distances import wrd as wrd
    from kexue_wrd.distances import wrd_centroid_bound as wrd_centroid_bound
    from kexue_wrd.similarity import WordMoverSimilarity as WordMoverSimilarity
    from kexue_wrd.similarity import WordRotatorSimilarity as WordRotatorSimilarity
    from kexue_wrd.sinkhorn import SinkhornResult as SinkhornResult
    from kexue_wrd.sinkhorn import sinkhorn as sinkhorn
    from kexue_wrd.transport import transport as transport
    from kexue_wrd.transport import transport_plan as transport_plan
    from kexue_wrd.vectors import WordVectors as WordVectors

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cooccurrence": ["fit_vectors"],
        "distances": ["relaxed_wmd", "relaxed_wrd", "wcd", "wmd", "wrd", "wrd_centroid_bound"],
        "similarity": ["WordMoverSimilarity", "WordRotatorSimilarity"],
        "sinkhorn": ["SinkhornResult", "sinkhorn"],
        "transport": ["transport", "transport_plan"],
        "vectors": ["WordVectors"],
    },
)

_POST = "Su, 从EMD、WMD到WRD:文本向量序列的相似度计算, 2020, https://kexue.fm/archives/7388"
_WMD = (
    "Kusner et al., From Word Embeddings To Document Distances, ICML 2015, "
    "http://proceedings.mlr.press/v37/kusnerb15.html"
)
_WRD = "Yokoi et al., Word Rotator's Distance, EMNLP 2020, https://arxiv.org/abs/2004.15003"


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    return [
        Component(
            "similarity",
            "wmd",
            "kexue_wrd.similarity:WordMoverSimilarity",
            "Minus the word mover's distance: optimal transport of words by Euclidean distance.",
            references=(_POST, _WMD),
            tags=("text", "optimal-transport", "search"),
        ),
        Component(
            "similarity",
            "wrd",
            "kexue_wrd.similarity:WordRotatorSimilarity",
            "One minus the word rotator's distance: by angle, words weighed by their norms.",
            references=(_POST, _WRD),
            tags=("text", "optimal-transport", "search"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    return [
        Experiment(
            "bounds",
            "kexue_wrd.experiments:bounds",
            "The bounds hold, and how much of a search each of them saves.",
            references=(_POST, _WMD),
        ),
        Experiment(
            "retrieval",
            "kexue_wrd.experiments:retrieval",
            "Finding text of the same topic by WMD and WRD, with and without stop words.",
            references=(_POST, _WMD, _WRD),
        ),
    ]
