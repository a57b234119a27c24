"""Generation constrained to a database of sequences, ``decoder/trie-beam``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_trie_decoding.constrained import Constrained as Constrained
    from kexue_trie_decoding.index import Edges as Edges
    from kexue_trie_decoding.index import TrieIndex as TrieIndex
    from kexue_trie_decoding.lookahead import Coverage as Coverage
    from kexue_trie_decoding.lookahead import LookAhead as LookAhead
    from kexue_trie_decoding.lookahead import (
        longest_common_subsequence as longest_common_subsequence,
    )
    from kexue_trie_decoding.processor import TrieLogitsProcessor as TrieLogitsProcessor
    from kexue_trie_decoding.trie_beam import TrieBeam as TrieBeam

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "constrained": ["Constrained"],
        "index": ["Edges", "TrieIndex"],
        "lookahead": ["Coverage", "LookAhead", "longest_common_subsequence"],
        "processor": ["TrieLogitsProcessor"],
        "trie_beam": ["TrieBeam"],
    },
)

_POST = "苏剑林, Seq2Seq+前缀树:检索任务新范式(以KgCLUE为例), 2021, https://kexue.fm/archives/8802"
_GENRE = (
    "De Cao, Izacard, Riedel and Petroni, Autoregressive Entity Retrieval, ICLR 2021, "
    "https://arxiv.org/abs/2010.00904"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the decoder."""
    return [
        Component(
            "decoder",
            "trie-beam",
            "kexue_trie_decoding.trie_beam:TrieBeam",
            "Beam search constrained to the entries of a prefix tree.",
            references=(_POST, _GENRE),
            tags=("autoregressive", "constrained", "retrieval"),
            run="kexue_trie_decoding.commands:run",
            fit="kexue.core.lab.texts:fit_seq2seq",
            apply="kexue_trie_decoding.commands:apply",
        )
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the post's claims."""
    package = "kexue_trie_decoding.experiments"
    return [
        Experiment(
            "names",
            f"{package}.names:names",
            "Misspelt words to the words of a database: free, in the tree, with look-ahead.",
            references=(_POST, _GENRE),
        ),
        Experiment(
            "knowledge",
            f"{package}.knowledge:knowledge",
            "Questions to a knowledge base: subject, property and meaning in two orders.",
            references=(_POST,),
        ),
    ]
