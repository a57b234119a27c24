"""Texts to tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from kexue.core.errors import ArgumentError, did_you_mean
from kexue.core.files import read_lines
from kexue.core.loading import load_target

__all__ = ["STOP_WORDS", "Tokenizer", "stop_word_set", "tokenizer"]

Tokenizer = Callable[[str], Sequence[str]]
"""A text to its tokens."""

# kana and Chinese characters are words of their own: nothing between them marks words
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_SINGLE}]|[^\\W{_SINGLE}]+(?:['’][^\\W{_SINGLE}]+)*")

_BUILT_IN: dict[str, Tokenizer] = {
    "words": _WORD.findall,
    "spaces": str.split,
    "characters": lambda text: [c for c in text if not c.isspace()],
}

_ENGLISH = """
    a about above after again against all also am an and any are as at be because been before being
    below between both but by can could did do does doing down during each either else etc few for
    from further had has have having he her here hers herself him himself his how however i if in
    into is it its itself just may me might more most must my myself neither no nor not of off on
    once only or other our ours ourselves out over own rather same shall she should since so some
    such than that the their theirs them themselves then there these they this those though through
    thus to too under until up upon us very was we were what when where whether which while who whom
    whose why will with within without would yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_ENGLISH.split())
"""English function words, for ``stop_words="english"``."""


def tokenizer(tokens: str | Tokenizer) -> Tokenizer:
    """Return what splits a text.

    Args:
        tokens: ``"words"`` (runs of letters and digits; each Chinese character or kana alone),
            ``"spaces"``, ``"characters"``, ``file.py:function`` or ``module:function``, or a
            function from a text to its tokens.

    Raises:
        ArgumentError: If there is no such way.
    """
    if callable(tokens):
        return tokens
    if tokens in _BUILT_IN:
        return _BUILT_IN[tokens]
    if ":" not in tokens:
        raise ArgumentError(
            f"`tokens` must be one of {', '.join(_BUILT_IN)}, or file.py:function. "
            f"Found {tokens!r}.{did_you_mean(tokens, _BUILT_IN)}",
            argument="tokens",
        )
    function = load_target(tokens)
    if not callable(function):
        raise ArgumentError(
            f"`tokens` must name a function. {tokens} is {type(function).__name__}.",
            argument="tokens",
        )
    found: Tokenizer = function
    return found


def stop_word_set(given: str | Collection[str] | None) -> frozenset[str]:
    """Return the words to leave out, in lower case.

    Args:
        given: ``"english"`` for :data:`STOP_WORDS`, a file of one word a line, a collection, or
            None for no words.
    """
    if given is None:
        return frozenset()
    if given == "english":
        return STOP_WORDS
    if not isinstance(given, str):
        return frozenset(word.lower() for word in given)
    if not Path(given).exists():
        raise ArgumentError(
            f"`stop_words` must be 'english' or a file of one word a line. "
            f"Found {given!r}, which is no file.",
            argument="stop_words",
        )
    return frozenset(line.strip().lower() for line in read_lines(given)) - {""}
