"""Text as token ids and back: characters, or a tokenizer of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError

__all__ = ["Characters", "TokenizerVocabulary", "Vocabulary", "pad_ids"]


class Vocabulary(Protocol):
    """Text as token ids and back."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    @property
    def bos_id(self) -> int | None:
        """The token that texts begin with, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The token that texts end with, if there is one."""

    @property
    def mask_id(self) -> int | None:
        """The token that stands for an unknown one, if there is one."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that are no text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without tokens that are no text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; tokens that are no text, and PAD, are left out."""


class Characters:
    """One token per character, behind five that are no text.

    Text is taken as it is: no case folding, no normalisation; a character is a code point.

    Args:
        alphabet: The characters, each once.
        unknown: What becomes of others: ``"raise"``, or ``"replace"`` by the unknown token.

    Example:
        >>> from kexue.core.language import Characters
        >>> characters = Characters("字科学空间")
        >>> characters.encode("科学")
        [6, 7]
        >>> characters.decode([6, 7, characters.eos_id])
        '科学'
    """

    pad_id, bos_id, eos_id, mask_id, unknown_id = range(5)
    special_ids = tuple(range(5))

    def __init__(self, alphabet: str, *, unknown: str = "raise") -> None:
        if len(set(alphabet)) != len(alphabet):
            twice = next(c for c, n in Counter(alphabet).items() if n > 1)
            raise ArgumentError(
                f"`alphabet` must have each character once. Found {twice!r} twice.",
                argument="alphabet",
            )
        if unknown not in {"raise", "replace"}:
            raise ArgumentError(
                f"`unknown` must be 'raise' or 'replace'. Found {unknown!r}.", argument="unknown"
            )
        self.alphabet = alphabet
        self.unknown = unknown
        self._ids = {c: i for i, c in enumerate(alphabet, len(self.special_ids))}

    @classmethod
    def of(cls, texts: Iterable[str], *, unknown: str = "raise") -> Characters:
        """Return the vocabulary of all characters of some texts."""
        return cls("".join(sorted({c for text in texts for c in text})), unknown=unknown)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.special_ids) + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            ArgumentError: If a character is not known, and ``unknown`` is ``"raise"``.
        """
        if self.unknown == "replace":
            return [self._ids.get(c, self.unknown_id) for c in text]
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            (character,) = error.args
            raise ArgumentError(
                f"`text` must be of the model's {len(self.alphabet)} characters. Found "
                f"{character!r} in {text[:60]!r}. Leave it out, or fit the model to text that has "
                "it.",
                argument="text",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the unknown token is written as U+FFFD."""
        first = len(self.special_ids)
        known = ("\ufffd" if i == self.unknown_id else self.alphabet[i - first] for i in ids
                 if i == self.unknown_id or i >= first)  # fmt: skip
        return "".join(known)


class TokenizerVocabulary:
    """A tokenizer of transformers.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.mask_id: int | None = tokenizer.mask_token_id
        self.special_ids = tuple(tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        kept = [i for i in ids if i != PAD]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text


def pad_ids(
    rows: Sequence[Sequence[int]], *, device: torch.device | None = None, pad_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ids ``[row, time]``, padded on the right, and the mask of the real ones.

    Args:
        rows: Ids per row.
        device: Where; the default device if None.
        pad_id: What stands behind the ends.

    Example:
        >>> from kexue.core.language import pad_ids
        >>> ids, mask = pad_ids([[5, 6], [7]])
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [7, 0]], [[True, True], [True, False]])
    """
    longest = max((len(row) for row in rows), default=0)
    filled = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    ids = torch.tensor(filled, dtype=torch.long, device=device).view(len(rows), longest)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]
