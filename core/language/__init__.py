"""Language models as decoders and samplers see them, and search over them."""

from __future__ import annotations

from kexue.core.language.adapters import masked_scorer, next_token_scorer
from kexue.core.language.scorer import (
    FunctionMaskedScorer,
    FunctionScorer,
    MaskedScorer,
    NextTokenScorer,
    aligned,
    check_prompt,
    select_rows,
)
from kexue.core.language.search import (
    beam_search,
    draw,
    generate,
    greedy,
    log_probabilities,
    truncate,
)
from kexue.core.language.vocabulary import Characters, TokenizerVocabulary, Vocabulary, pad_ids

__all__ = [
    "Characters",
    "FunctionMaskedScorer",
    "FunctionScorer",
    "MaskedScorer",
    "NextTokenScorer",
    "TokenizerVocabulary",
    "Vocabulary",
    "aligned",
    "beam_search",
    "check_prompt",
    "draw",
    "generate",
    "greedy",
    "log_probabilities",
    "masked_scorer",
    "next_token_scorer",
    "pad_ids",
    "select_rows",
    "truncate",
]
