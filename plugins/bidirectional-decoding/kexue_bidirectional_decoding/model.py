"""A small model of characters that reads a text and writes another from both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kexue.core import ArgumentError
from kexue.core.language import Characters, aligned, check_prompt, pad_ids
from kexue.core.training import Trainable
from kexue_bidirectional_decoding.interactive import InteractiveAttention
from kexue_bidirectional_decoding.scorer import BidirectionalScorer, Scores
from kexue_bidirectional_decoding.targets import (
    BidirectionalTargets,
    bidirectional_cross_entropy,
    make_bidirectional,
)

__all__ = ["BidirectionalSeq2Seq"]


class _Cache(NamedTuple):
    """Hypotheses of one side, ``[hypothesis, ...]``; sources and their lengths, ``[row, ...]``."""

    state: Tensor  # of the decoder
    own: Tensor  # what goes into the output before the partner is asked
    query: Tensor  # [hypothesis, head, feature]
    keys: Tensor  # [hypothesis, head, time, feature]
    values: Tensor
    steps: Tensor  # how many of them are read
    memory: Tensor  # [row, source, feature]
    mask: Tensor
    lengths: Tensor | None  # of the targets, where they are known


class BidirectionalSeq2Seq(Trainable, BidirectionalScorer):
    """Two GRU decoders with attention to the source and, above, to each other.

    A bidirectional GRU reads the source. One decoder writes the target from the left, one from the
    right; they share embedding and output, and no other weights. The states of each, beside what
    it finds in the source and in the partner's states, pass one hidden layer to the output.

    Args:
        alphabet: The characters of both sides.
        width: Features, even, and a multiple of ``heads``.
        heads: Heads of the attention between the decoders.
        interaction: ``"mask"``, where no state is asked that has read what is to be predicted;
            ``"post"``, plain teacher forcing; ``"none"``, two decoders that know nothing of each
            other. See :func:`~kexue_bidirectional_decoding.visible`.
        dropout: Probability of dropping a feature in training.

    Raises:
        ArgumentError: If a size does not fit, or ``interaction`` is another word.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import BidirectionalBeam, BidirectionalSeq2Seq
        >>> model = BidirectionalSeq2Seq("ab", width=16).eval()
        >>> source = torch.tensor([model.vocabulary.encode("abba")])
        >>> found = BidirectionalBeam(max_new_tokens=8).decode(model, prompt=source)
        >>> found.scores.shape
        torch.Size([1])
    """

    form: ClassVar[str] = "bidirectional"

    def __init__(
        self,
        alphabet: str,
        *,
        width: int = 96,
        heads: int = 8,
        interaction: str = "mask",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if interaction not in {"mask", "post", "none"}:
            raise ArgumentError(
                f"`interaction` must be 'mask', 'post' or 'none'. Found {interaction!r}.",
                argument="interaction",
            )
        if width % 2:
            raise ArgumentError(f"`width` must be even. Found {width}.", argument="width")
        self.vocabulary = Characters(alphabet, unknown="replace")
        self._sizes = {
            "width": width,
            "heads": heads,
            "interaction": interaction,
            "dropout": dropout,
        }
        self.interaction = interaction
        self.start_id = self.vocabulary.bos_id
        self.end_id = self.vocabulary.eos_id
        size = self.vocabulary.size
        self.source_embedding = nn.Embedding(size, width)
        self.embedding = nn.Embedding(size, width)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoders = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.between: InteractiveAttention | None = None
        if interaction != "none":
            self.between = InteractiveAttention(
                width, heads, leak="mask" if interaction == "mask" else "post"
            )
            # What is found at the partner, as part of the mix: it alone depends on the pair.
            self.crosses = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, size)

    def config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` needs."""
        return {"form": self.form, "alphabet": self.vocabulary.alphabet, **self._sizes}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BidirectionalSeq2Seq:
        """Build the model with fresh weights."""
        return cls(**{key: value for key, value in config.items() if key != "form"})

    # -- training -----------------------------------------------------------------------------

    def collate(self, examples: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Return sources and their mask, and the targets of both directions."""
        encode = self.vocabulary.encode
        source, mask = pad_ids([encode(source) for source, _ in examples])
        targets = make_bidirectional(
            *pad_ids([encode(target) for _, target in examples]),
            start_id=self.start_id,
            end_id=self.end_id,
        )
        return {"source": source, "mask": mask, **targets._asdict()}

    def size(self, example: tuple[str, str]) -> int:
        """Return the number of characters."""
        return sum(map(len, example))

    def forward(
        self,
        source: Int[Tensor, "row source"],
        mask: Bool[Tensor, "row source"],
        left_in: Int[Tensor, "row time"],
        right_in: Int[Tensor, "row time"],
        lengths: Int[Tensor, " row"] | None = None,
    ) -> tuple[Float[Tensor, "row time token"], Float[Tensor, "row time token"]]:
        """Return the logits of what follows each input of both decoders.

        Args:
            source: Ids, padding on the right.
            mask: True at real ones.
            left_in: The start token and the target.
            right_in: The end token and the target from its end.
            lengths: Tokens of each target; ``interaction="mask"`` cannot be trained without.
        """
        memory, state = self._encode(source, mask)
        inputs = (left_in, right_in)
        hidden = [
            self.decoders[i](self.dropout(self.embedding(ids)), state[None].contiguous())[0]
            for i, ids in enumerate(inputs)
        ]
        mixed = [self._mixed(h, memory, mask, right=bool(i)) for i, h in enumerate(hidden)]
        if self.between is not None:
            asked = self.between(*hidden, lengths)
            mixed = [m + self.crosses[i](asked[i]) for i, m in enumerate(mixed)]
        left, right = (self.output(self.dropout(m.tanh())) for m in mixed)
        return left, right

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return nats per character, the mean of both directions, ends counted as characters."""
        targets = BidirectionalTargets(*(batch[name] for name in BidirectionalTargets._fields))
        left, right = self(
            batch["source"], batch["mask"], targets.left_in, targets.right_in, targets.lengths
        )
        return bidirectional_cross_entropy(left, right, targets)

    def _encode(self, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        lengths = mask.sum(1)
        packed = pack_padded_sequence(
            self.dropout(self.source_embedding(source)),
            lengths.clamp(min=1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        hidden, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(hidden, batch_first=True, total_length=source.shape[1])
        return memory, torch.cat([last[0], last[1]], 1)

    def _mixed(self, hidden: Tensor, memory: Tensor, mask: Tensor, *, right: bool) -> Tensor:
        """Return a side's part of the hidden layer: its states, what they find in the source."""
        scores = hidden @ memory.mT / hidden.shape[-1] ** 0.5  # [row, time, source]
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        mixed: Tensor = self.mixes[right](torch.cat([hidden, weights @ memory], -1))
        return mixed

    # -- as a scorer --------------------------------------------------------------------------

    def begin(
        self,
        prompt: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        lengths: Int[Tensor, " row"] | None = None,
    ) -> tuple[Any, Any]:
        """Read sources, none of which may be empty."""
        mask = check_prompt(prompt, mask)
        if len(prompt) and not bool(mask.any(1).all()):
            raise ArgumentError(
                "`prompt` must hold a character in every row: it is what is answered. Found none "
                f"in row {int((~mask.any(1)).nonzero()[0])}.",
                argument="prompt",
            )
        ids, real = aligned(prompt, mask)
        memory, state = self._encode(ids.masked_fill(~real, 0), real)
        heads = self.between.heads if self.between is not None else 1
        query = state.view(len(state), heads, state.shape[1] // heads)
        keys = query[:, :, None][:, :, :0]
        steps = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        known = lengths if self.interaction == "mask" else None
        cache = _Cache(state, state, query, keys, keys, steps, memory, real, known)
        return cache, cache

    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "row own"],
        going: Bool[Tensor, "row own"],
        *,
        right: bool,
    ) -> Any:
        """Read one more character per hypothesis."""
        cache = _Cache(*cache)
        flat, goes = tokens.flatten(), going.flatten()
        embedded = self.embedding(flat.masked_fill(~goes, 0))[:, None]
        hidden, _ = self.decoders[right](embedded, cache.state[None])
        state = torch.where(goes[:, None], hidden[:, 0], cache.state)
        beams = hidden[:, 0].view(*tokens.shape, hidden.shape[2])
        mixed = self._mixed(beams, cache.memory, cache.mask, right=right).flatten(0, 1)
        changed: dict[str, Tensor] = {"state": state, "own": mixed}
        if self.between is not None:
            q, k, v = self.between.project(hidden, right=right)
            changed["query"] = q[:, :, 0]
            changed["keys"] = torch.cat([cache.keys, k], 2)
            changed["values"] = torch.cat([cache.values, v], 2)
        return cache._replace(steps=cache.steps + goes, **changed)

    def pairs(self, left: Any, right: Any) -> tuple[Scores, Scores]:
        """Return the logits of all pairs: one product asks all partners of all rows."""
        sides = _Cache(*left), _Cache(*right)
        return self._asked(*sides, right=False), self._asked(*sides[::-1], right=True)

    def _asked(self, own: _Cache, partner: _Cache, *, right: bool) -> Tensor:
        rows = len(own.memory)
        k, m = len(own.state) // rows, len(partner.state) // rows
        mixed = own.own.view(rows, k, 1, -1)
        if self.between is None:
            logits: Tensor = self.output(mixed.tanh())
            return logits.expand(-1, -1, m, -1)
        # Hypotheses of the partner are the batch, those of the own side the positions that ask.
        query = own.query.view(rows, 1, k, *own.query.shape[1:]).expand(-1, m, -1, -1, -1)
        query = query.transpose(2, 3).flatten(0, 1)  # [row × partner, head, own, feature]
        time = partner.keys.shape[2]
        places = torch.arange(time, device=query.device)
        seen = places < partner.steps[:, None]
        if own.lengths is not None:
            last = (own.lengths - time).clamp(min=0).repeat_interleave(m)  # n − t − 1
            seen = seen & (places <= last[:, None])
        asked = F.scaled_dot_product_attention(
            query, partner.keys, partner.values, seen[:, None, None]
        )
        asked = asked.transpose(1, 2).flatten(2).view(rows, m, k, -1).transpose(1, 2)
        mixed = mixed + self.crosses[right](asked)
        paired: Tensor = self.output(mixed.tanh())
        return paired

    def select(self, cache: Any, hypotheses: Int[Tensor, "row own"]) -> Any:
        """Return hypotheses; sources are copied only when rows are left out."""
        cache = _Cache(*cache)
        flat = hypotheses.flatten()
        parts = {name: getattr(cache, name).index_select(0, flat) for name in _Cache._fields[:6]}
        if len(hypotheses) != len(cache.memory):
            rows = hypotheses[:, 0] // (len(cache.state) // len(cache.memory))
            parts |= {"memory": cache.memory[rows], "mask": cache.mask[rows]}
            if cache.lengths is not None:
                parts["lengths"] = cache.lengths[rows]
        return cache._replace(**parts)
