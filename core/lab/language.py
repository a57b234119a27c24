"""Small language models of characters: causal, from one text to another, and masked.

They learn real text within a minute on a CPU. Each is a scorer of ``kexue.core.language`` itself,
has a cache where that saves time, and gives a row the same scores alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError
from kexue.core.lab.transformer import Transformer
from kexue.core.language import (
    Characters,
    MaskedScorer,
    NextTokenScorer,
    aligned,
    check_prompt,
    pad_ids,
)
from kexue.core.training import Trainable

__all__ = ["CharacterMaskedModel", "CharacterModel", "CharacterSeq2Seq"]

_CELLS = {"gru": nn.GRU, "rnn": nn.RNN}
_LONGEST = 512  # positions of a Transformer


class _OfCharacters(Trainable):
    """What the models share: a vocabulary, and how they are saved.

    Args:
        alphabet: The characters that the model knows.
        sizes: The other arguments of the constructor.
    """

    form: ClassVar[str]
    """What kind of model a saved folder holds."""

    def __init__(self, alphabet: str, **sizes: Any) -> None:
        super().__init__()
        self.vocabulary = Characters(alphabet, unknown="replace")
        self._sizes = sizes

    def config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` needs."""
        return {"form": self.form, "alphabet": self.vocabulary.alphabet, **self._sizes}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Build the model with fresh weights."""
        return cls(**{key: value for key, value in config.items() if key != "form"})


class CharacterModel(_OfCharacters, NextTokenScorer):
    """A causal language model of characters; every text begins with a token of its own.

    Args:
        alphabet: The characters that the model knows.
        cell: ``"gru"``; ``"rnn"``, whose states are bounded by tanh; or ``"transformer"``.
        width: Features.
        layers: Layers.
        max_length: Characters that a Transformer can read.
        dropout: Probability of dropping a feature in training.
    """

    form: ClassVar[str] = "causal"
    eos_id: int

    def __init__(
        self,
        alphabet: str,
        *,
        cell: str = "gru",
        width: int = 128,
        layers: int = 1,
        max_length: int = _LONGEST,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            alphabet, cell=cell, width=width, layers=layers, max_length=max_length, dropout=dropout
        )
        if cell not in {*_CELLS, "transformer"}:
            raise ArgumentError(
                f"`cell` must be 'gru', 'rnn' or 'transformer'. Found {cell!r}.", argument="cell"
            )
        self.embedding = nn.Embedding(self.vocabulary.size, width)
        self.body: nn.Module
        if cell == "transformer":
            self.body = Transformer(width, layers, max_length=max_length + 1, dropout=dropout)
            self.max_length = max_length
        else:
            between = dropout if layers > 1 else 0.0
            self.body = _CELLS[cell](width, width, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, self.vocabulary.size)
        self.eos_id = self.vocabulary.eos_id

    def collate(self, examples: Sequence[str]) -> dict[str, Tensor]:
        """Return the ids of texts, and what follows each of them, PAD behind the ends."""
        rows = [self.vocabulary.encode(text) for text in examples]
        ids, _ = pad_ids([[self.vocabulary.bos_id, *row] for row in rows])
        targets, _ = pad_ids([[*row, self.vocabulary.eos_id] for row in rows], pad_id=PAD)
        return {"ids": ids, "targets": targets}

    def size(self, example: str) -> int:
        """Return the number of characters."""
        return len(example)

    def forward(self, ids: Int[Tensor, "row time"]) -> Float[Tensor, "row time token"]:
        """Return the logits of what follows each position; ids begin with the first token."""
        embedded = self.dropout(self.embedding(ids))
        hidden, _ = self.body(embedded)
        logits: Tensor = self.output(self.dropout(hidden))
        return logits

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return nats per character, the end of each text counted as one."""
        logits = self(batch["ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=PAD)

    # -- as a scorer --------------------------------------------------------------------------

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read prompts, each behind the first token."""
        mask = check_prompt(prompt, mask)
        recurrent = not isinstance(self.body, Transformer)
        ids, real = aligned(prompt, mask, right=not recurrent)
        if recurrent:
            ids = torch.cat([ids.new_full((len(ids), 1), self.vocabulary.bos_id), ids], 1)
            lengths = real.sum(1) + 1
            packed = pack_padded_sequence(
                self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            _, state = self.body(packed)
            return self.output(state[-1]), state.transpose(0, 1)
        # The first token stands right before the text, behind what is padding.
        ids = torch.cat([ids.new_full((len(ids), 1), self.vocabulary.bos_id), ids], 1)
        starts = (real.shape[1] - real.sum(1))[:, None]
        ids = ids.scatter(1, starts, torch.full_like(starts, self.vocabulary.bos_id))
        real = torch.arange(ids.shape[1], device=ids.device) >= starts
        hidden, cache = self.body(self.embedding(ids), real)
        return self.output(hidden[:, -1]), cache

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read one more character per row."""
        embedded = self.embedding(tokens)[:, None]
        if isinstance(self.body, Transformer):
            hidden, cache = self.body(embedded, None, cache)
            return self.output(hidden[:, -1]), cache
        _, state = self.body(embedded, cache.transpose(0, 1).contiguous())
        return self.output(state[-1]), state.transpose(0, 1)


class CharacterSeq2Seq(_OfCharacters, NextTokenScorer):
    """From one text to another: a bidirectional GRU reads, a GRU with attention writes.

    A prompt is a source; what follows it is the target.

    Args:
        alphabet: The characters of both sides.
        width: Features of the decoder; of the encoder half as many per direction.
        dropout: Probability of dropping a feature in training.
    """

    form: ClassVar[str] = "seq2seq"
    eos_id: int

    def __init__(self, alphabet: str, *, width: int = 96, dropout: float = 0.0) -> None:
        super().__init__(alphabet, width=width, dropout=dropout)
        if width % 2:
            raise ArgumentError(f"`width` must be even. Found {width}.", argument="width")
        self.source_embedding = nn.Embedding(self.vocabulary.size, width)
        self.embedding = nn.Embedding(self.vocabulary.size, width)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.mix = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, self.vocabulary.size)
        self.eos_id = self.vocabulary.eos_id

    def collate(self, examples: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Return sources and their mask, decoder inputs, and targets with PAD behind the ends."""
        ids = self.vocabulary
        source, mask = pad_ids([ids.encode(source) for source, _ in examples])
        targets = [ids.encode(target) for _, target in examples]
        return {
            "source": source,
            "mask": mask,
            "inputs": pad_ids([[ids.bos_id, *row] for row in targets])[0],
            "targets": pad_ids([[*row, ids.eos_id] for row in targets], pad_id=PAD)[0],
        }

    def size(self, example: tuple[str, str]) -> int:
        """Return the number of characters."""
        return sum(map(len, example))

    def encode(
        self, source: Int[Tensor, "row source"], mask: Bool[Tensor, "row source"]
    ) -> tuple[Float[Tensor, "row source feature"], Float[Tensor, "row feature"]]:
        """Return the features of sources, padding on the right, and the decoder's first state."""
        lengths = mask.sum(1)
        embedded = self.dropout(self.source_embedding(source))
        packed = pack_padded_sequence(
            embedded, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(hidden, batch_first=True, total_length=source.shape[1])
        return memory, torch.cat([last[0], last[1]], 1)

    def decode(
        self,
        inputs: Int[Tensor, "row time"],
        state: Float[Tensor, "row feature"],
        memory: Float[Tensor, "row source feature"],
        mask: Bool[Tensor, "row source"],
    ) -> tuple[Float[Tensor, "row time token"], Float[Tensor, "row feature"]]:
        """Return the logits of what follows each decoder input, and the state behind the last."""
        embedded = self.dropout(self.embedding(inputs))
        hidden, last = self.decoder(embedded, state[None].contiguous())
        scores = hidden @ memory.mT / hidden.shape[-1] ** 0.5  # [row, time, source]
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        mixed = self.mix(torch.cat([hidden, weights @ memory], -1)).tanh()
        return self.output(self.dropout(mixed)), last[0]

    def forward(
        self,
        source: Int[Tensor, "row source"],
        mask: Bool[Tensor, "row source"],
        inputs: Int[Tensor, "row time"],
    ) -> Float[Tensor, "row time token"]:
        """Return the logits of what follows each decoder input."""
        memory, state = self.encode(source, mask)
        return self.decode(inputs, state, memory, mask)[0]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return nats per character of the target, its end counted as one."""
        logits = self(batch["source"], batch["mask"], batch["inputs"])
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=PAD)

    # -- as a scorer --------------------------------------------------------------------------

    def begin(
        self, prompt: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"] | None = None
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read sources, none of which may be empty."""
        mask = check_prompt(prompt, mask)
        if len(prompt) and not bool(mask.any(1).all()):
            raise ArgumentError(
                "`prompt` must hold a character in every row: it is what is answered. Found none "
                f"in row {int((~mask.any(1)).nonzero()[0])}.",
                argument="prompt",
            )
        source, real = aligned(prompt, mask)
        memory, state = self.encode(source, real)
        start = source.new_full((len(source),), self.vocabulary.bos_id)
        return self.advance((state, memory, real), start)

    def advance(
        self, cache: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row token"], Any]:
        """Read one more character of each target."""
        state, memory, mask = cache
        logits, state = self.decode(tokens[:, None], state, memory, mask)
        return logits[:, 0], (state, memory, mask)


class CharacterMaskedModel(_OfCharacters, MaskedScorer):
    """A masked language model of characters: a small Transformer that sees both sides.

    A convolution shows it the neighbours of each character first, which attention alone takes
    thousands of steps to find.

    Args:
        alphabet: The characters that the model knows.
        width: Features.
        layers: Layers.
        max_length: Characters that it can read.
        dropout: Probability of dropping a feature in training.
    """

    form: ClassVar[str] = "masked"

    def __init__(
        self,
        alphabet: str,
        *,
        width: int = 64,
        layers: int = 2,
        max_length: int = _LONGEST,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            alphabet, width=width, layers=layers, max_length=max_length, dropout=dropout
        )
        self.max_length = max_length
        self.embedding = nn.Embedding(self.vocabulary.size, width)
        self.near = nn.Conv1d(width, width, 5, padding=2)
        self.body = Transformer(width, layers, max_length=max_length, dropout=dropout, causal=False)
        self.output = nn.Linear(width, self.vocabulary.size)
        self.mask_id = self.vocabulary.mask_id

    def collate(self, examples: Sequence[str]) -> dict[str, Tensor]:
        """Return the ids of texts, and their mask; what is too long is cut off."""
        rows = [self.vocabulary.encode(text)[: self.max_length] for text in examples]
        ids, mask = pad_ids(rows)
        return {"ids": ids, "mask": mask}

    def size(self, example: str) -> int:
        """Return the number of characters."""
        return len(example)

    def forward(
        self,
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        positions: Int[Tensor, "row position"] | None = None,
    ) -> Float[Tensor, "row position token"]:
        """Return the logits at some positions; at all by default."""
        embedded = self.embedding(ids)
        if mask is not None:  # a text ends alike alone and before padding
            embedded = embedded * mask[..., None]
        hidden, _ = self.body(embedded + self.near(embedded.mT).mT, mask)
        if positions is not None:
            hidden = hidden.gather(
                1, positions[..., None].expand(*positions.shape, hidden.shape[2])
            )
        logits: Tensor = self.output(hidden)
        return logits

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return nats per masked character; a share of each text that is uniform in (0, 1)."""
        ids, mask = batch["ids"], batch["mask"]
        share = torch.rand(len(ids), 1, device=ids.device)
        hidden = (torch.rand(ids.shape, device=ids.device) < share) & mask
        logits = self(ids.masked_fill(hidden, self.mask_id), mask)
        losses = F.cross_entropy(logits[hidden], ids[hidden], reduction="sum")
        return losses / hidden.sum().clamp(min=1)
