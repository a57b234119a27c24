"""Repetition: how likely a decoder is to repeat itself, and what makes it.

``analyzer/repetition``, and the kind ``analyzer`` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, Interface, hookimpl

if TYPE_CHECKING:
    from kexue_repetition.analyzer import Analyzer as Analyzer
    from kexue_repetition.analyzer import Repetition as Repetition
    from kexue_repetition.analyzer import RepetitionAnalyzer as RepetitionAnalyzer
    from kexue_repetition.bounds import Bounds as Bounds
    from kexue_repetition.bounds import repetition_bounds as repetition_bounds
    from kexue_repetition.estimation import estimate_transitions as estimate_transitions
    from kexue_repetition.estimation import numbered as numbered
    from kexue_repetition.index import RepetitionIndex as RepetitionIndex
    from kexue_repetition.index import repetition_index as repetition_index
    from kexue_repetition.pairs import WorstPairs as WorstPairs
    from kexue_repetition.pairs import worst_pairs as worst_pairs
    from kexue_repetition.rebalancing import RebalancedEncoding as RebalancedEncoding
    from kexue_repetition.sampling import model_transitions as model_transitions
    from kexue_repetition.statistics import LongestRepeat as LongestRepeat
    from kexue_repetition.statistics import immediate_repeats as immediate_repeats
    from kexue_repetition.statistics import longest_repeat as longest_repeat
    from kexue_repetition.statistics import repeated_ngrams as repeated_ngrams
    from kexue_repetition.statistics import repeated_tokens as repeated_tokens
    from kexue_repetition.transitions import Transitions as Transitions
    from kexue_repetition.transitions import sample_walks as sample_walks
    from kexue_repetition.truncation import truncate_transitions as truncate_transitions

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "analyzer": ["Analyzer", "Repetition", "RepetitionAnalyzer"],
        "bounds": ["Bounds", "repetition_bounds"],
        "estimation": ["estimate_transitions", "numbered"],
        "index": ["RepetitionIndex", "repetition_index"],
        "pairs": ["WorstPairs", "worst_pairs"],
        "rebalancing": ["RebalancedEncoding"],
        "sampling": ["model_transitions"],
        "statistics": [
            "LongestRepeat",
            "immediate_repeats",
            "longest_repeat",
            "repeated_ngrams",
            "repeated_tokens",
        ],
        "transitions": ["Transitions", "sample_walks"],
        "truncation": ["truncate_transitions"],
    },
)

_POST = "Su, Seq2Seq重复解码现象的理论分析尝试, 2021, https://kexue.fm/archives/8128"
_PAPER = (
    "Fu, Lam, So and Shi, A Theoretical Analysis of the Repetition Problem in Text Generation, "
    "AAAI 2021, https://arxiv.org/abs/2012.14660"
)


@hookimpl
def kexue_interfaces() -> list[Interface]:
    """Return the kind that the plugin brings."""
    return [
        Interface(
            kind="analyzer",
            target="kexue_repetition.analyzer:Analyzer",
            summary="A decoder's transition matrix, or texts, to figures about how it writes.",
            method="analyze",
            run="kexue_repetition.running:run",
            apply="kexue_repetition.running:apply",
            checks="kexue_repetition.conformance:checks",
            template="kexue_repetition:analyzer.py.txt",
        )
    ]


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's component."""
    return [
        Component(
            "analyzer",
            "repetition",
            "kexue_repetition.analyzer:RepetitionAnalyzer",
            "The index of repeated decoding, its bounds, and the pairs of tokens that cause it.",
            references=(_POST, _PAPER),
            tags=("text", "generation", "evaluation"),
            fit="kexue.core.lab.texts:fit_causal",
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    return [
        Experiment(
            "bounds",
            "kexue_repetition.experiments.bounds:bounds",
            "The index, its bounds and estimates on random and trained matrices; walks counted.",
            references=(_POST, _PAPER),
        ),
        Experiment(
            "decoding",
            "kexue_repetition.experiments.decoding:decoding",
            "Greedy, top-k and nucleus decoding of a bigram decoder and of a trained model.",
            references=(_POST,),
        ),
        Experiment(
            "rebalancing",
            "kexue_repetition.experiments.rebalancing:rebalancing",
            "Merging likely pairs: the index, the eigenvalue, and repetition as measured.",
            references=(_POST, _PAPER),
        ),
    ]
