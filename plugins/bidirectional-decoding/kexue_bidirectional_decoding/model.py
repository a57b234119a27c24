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
from kexue_bidirectional_decoding.pseudo import Partners
from kexue_bidirectional_decoding.scorer import BidirectionalScorer, Scores
from kexue_bidirectional_decoding.targets import (
    BidirectionalTargets,
    bidirectional_cross_entropy,
    make_bidirectional,
)

__all__ = ["BidirectionalSeq2Seq"]

_ROOM = 16  # steps that a cache has room for at first; it is doubled


class _Weights(NamedTuple):
    """The decoders' weights, ``[side, in, out]``: one product computes both sides."""

    inputs: tuple[Tensor, Tensor]  # of a GRU: bias and weights, of what it reads
    states: tuple[Tensor, Tensor]  # and of its states
    mixes: tuple[Tensor, Tensor]
    asks: Tensor | None  # queries, keys and values
    crosses: Tensor | None


class _Cache(NamedTuple):
    """Hypotheses of both sides, ``[side, hypothesis, ...]``; sources, ``[row, ...]``."""

    state: Tensor  # of the decoders
    own: Tensor  # what goes into the output before the partner is asked
    query: Tensor  # [side, hypothesis, feature]
    past: Tensor  # [side × hypothesis, time, feature]: keys and values, and room for more
    time: int  # how many of them are filled
    steps: Tensor | None  # how many of them are read; None: all
    memory: Tensor  # [row, source, feature]
    hidden: Tensor | None  # −∞ at padding of the sources, for attention
    lengths: Tensor | None  # of the targets, where they are known
    weights: _Weights


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
        *,
        partners: Partners | None = None,
    ) -> tuple[Float[Tensor, "row time token"], Float[Tensor, "row time token"]]:
        """Return the logits of what follows each input of both decoders.

        Args:
            source: Ids, padding on the right.
            mask: True at real ones.
            left_in: The start token and the target.
            right_in: The end token and the target from its end.
            lengths: Tokens of each target; ``interaction="mask"`` cannot be trained without.
            partners: What the partners have read, if it is not the target; see
                :func:`~kexue_bidirectional_decoding.pseudo_targets`.
        """
        memory, state = self._encode(source, mask)
        inputs = (left_in, right_in)
        hidden = self._written(inputs, state)
        mixed = [self._mixed(h, memory, mask, right=bool(i)) for i, h in enumerate(hidden)]
        if self.between is not None:
            others: dict[str, Any] = {}
            if partners is not None:
                others["partners"] = self._written(partners[:2], state)
                others["steps"] = partners[2:]
            asked = self.between(*hidden, lengths, **others)
            mixed = [m + self.crosses[i](asked[i]) for i, m in enumerate(mixed)]
        left, right = (self.output(self.dropout(m.tanh())) for m in mixed)
        return left, right

    def _written(self, inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, ...]:
        """Return the states of both decoders, which have read these."""
        return tuple(
            decoder(self.dropout(self.embedding(ids)), state[None].contiguous())[0]
            for decoder, ids in zip(self.decoders, inputs, strict=True)
        )

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
    ) -> Any:
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
        hidden: Tensor | None = None
        if not bool(real.all()):
            hidden = torch.zeros_like(memory[..., 0]).masked_fill(~real, -torch.inf)[:, None, None]
        states = state.expand(2, -1, -1)
        past = state.new_empty(2 * len(state), _ROOM, 2 * state.shape[1])
        known = lengths if self.interaction == "mask" else None
        cache = _Cache(
            states, states, states, past, 0, None, memory, hidden, known, self._stacked()
        )
        marks = torch.tensor([self.start_id, self.end_id], device=ids.device)
        return self.read(cache, marks[:, None, None].expand(2, len(ids), 1))

    def _stacked(self) -> _Weights:
        def stack(modules: Any, name: str) -> Tensor:
            stacked = torch.stack([getattr(module, name) for module in modules])
            return stacked[:, None] if "bias" in name else stacked.mT

        rnn, between = self.decoders, self.between
        return _Weights(
            (stack(rnn, "bias_ih_l0"), stack(rnn, "weight_ih_l0")),
            (stack(rnn, "bias_hh_l0"), stack(rnn, "weight_hh_l0")),
            (stack(self.mixes, "bias"), stack(self.mixes, "weight")),
            None if between is None else stack((between.left, between.right), "weight"),
            None if between is None else stack(self.crosses, "weight"),
        )

    def read(
        self,
        cache: Any,
        tokens: Int[Tensor, "side row own"],
        stopped: Bool[Tensor, "side row own"] | None = None,
    ) -> Any:
        """Read one more character per hypothesis."""
        cache = _Cache(*cache)
        weights, width = cache.weights, cache.state.shape[2]
        if stopped is not None:
            tokens = tokens.masked_fill(stopped, 0)
        # A GRU's step, as torch.nn.GRU takes it, of both sides at once.
        x = torch.baddbmm(weights.inputs[0], self.embedding(tokens.flatten(1)), weights.inputs[1])
        h = torch.baddbmm(weights.states[0], cache.state, weights.states[1])
        gates = (x[..., : 2 * width] + h[..., : 2 * width]).sigmoid_()
        new = torch.addcmul(x[..., 2 * width :], gates[..., :width], h[..., 2 * width :]).tanh_()
        state = new.lerp_(cache.state, gates[..., width:])
        found = self._looked_up(state, cache)
        mixed = torch.baddbmm(weights.mixes[0], torch.cat([state, found], 2), weights.mixes[1])
        changed: dict[str, Any] = {"own": mixed}
        if weights.asks is not None:
            asks = torch.bmm(state, weights.asks)
            past, time = cache.past, cache.time
            if time == past.shape[1]:
                past = torch.cat([past, torch.empty_like(past)], 1)
            past[:, time] = asks[..., width:].flatten(0, 1)
            changed |= {"query": asks[..., :width], "past": past, "time": time + 1}
        if stopped is not None:
            state = torch.where(stopped.flatten(1)[..., None], cache.state, state)
        if stopped is not None or cache.steps is not None:
            steps = cache.steps
            if steps is None:
                steps = torch.full(state.shape[:2], cache.time, device=state.device)
            changed["steps"] = steps + (1 if stopped is None else ~stopped.flatten(1))
        return cache._replace(state=state, **changed)

    @staticmethod
    def _looked_up(state: Tensor, cache: _Cache) -> Tensor:
        """Return what states find in the sources."""
        rows = len(cache.memory)
        query = state.view(2, rows, -1, state.shape[2]).transpose(0, 1)  # [row, side, own, feature]
        memory = cache.memory[:, None]
        found = F.scaled_dot_product_attention(
            query.reshape(rows, 1, -1, state.shape[2]), memory, memory, cache.hidden
        )
        return found.view(query.shape).transpose(0, 1).reshape(state.shape)

    def pairs(self, cache: Any) -> Scores:
        """Return the logits of all pairs: one product asks all partners of all rows."""
        cache = _Cache(*cache)
        rows, width = len(cache.memory), cache.state.shape[2]
        own = cache.own.view(2, rows, 1, -1, width)
        beams = own.shape[3]
        logits: Tensor
        if cache.weights.crosses is None:
            logits = self.output(own.tanh())
            return logits.transpose(2, 3).expand(-1, -1, -1, beams, -1)
        asked = self._asked(cache, rows, beams)
        crossed = torch.bmm(asked.view(2, -1, width), cache.weights.crosses)
        mixed = crossed.view(2, rows, beams, beams, width).add_(own).tanh_()
        logits = self.output(mixed)  # [side, row, partner, own, token]
        return logits.transpose(2, 3)

    def _asked(self, cache: _Cache, rows: int, beams: int) -> Tensor:
        """Return what hypotheses find at their partners, ``[side, row, partner, own, feature]``."""
        heads = self.between.heads if self.between is not None else 1
        size = cache.query.shape[2] // heads
        # The partner's hypotheses are the batch, the own side's the positions that ask.
        query = cache.query.flip(0).view(2, rows, 1, beams, heads, size)
        query = query.expand(-1, -1, beams, -1, -1, -1).transpose(3, 4).flatten(0, 2)
        past = cache.past[:, : cache.time]
        past = past.view(*past.shape[:2], 2, heads, size).transpose(1, 3)
        asked = F.scaled_dot_product_attention(
            query, past[:, :, 0], past[:, :, 1], self._seen(cache, beams)
        )
        asked = asked.transpose(1, 2).reshape(2, -1)
        return asked.flip(0).view(2, rows, beams, beams, heads * size)

    def _seen(self, cache: _Cache, beams: int) -> Tensor | None:
        """Return which states of each partner may be asked; None for all."""
        if cache.steps is None and cache.lengths is None:
            return None
        places = torch.arange(cache.time, device=cache.past.device)
        seen = torch.ones(1, 1, dtype=torch.bool, device=places.device)
        if cache.steps is not None:
            seen = places < cache.steps.view(-1, 1)
        if cache.lengths is not None:
            last = (cache.lengths - cache.time).clamp(min=0)  # n − t − 1
            last = last.repeat_interleave(beams).repeat(2)
            seen = seen & (places <= last[:, None])
        return seen[:, None, None]

    def select(self, cache: Any, hypotheses: Int[Tensor, "side row own"]) -> Any:
        """Return hypotheses; sources are copied only when rows are left out."""
        cache = _Cache(*cache)
        flat = hypotheses.flatten()
        shape = (2, -1, cache.state.shape[2])
        # Only what the next step reads: the mix and the queries are computed anew there.
        parts: dict[str, Any] = {
            "state": cache.state.flatten(0, 1).index_select(0, flat).view(shape)
        }
        if self.between is not None:
            parts["past"] = cache.past.index_select(0, flat)
        if cache.steps is not None:
            parts["steps"] = cache.steps.flatten().index_select(0, flat).view(2, -1)
        if hypotheses.shape[1] != len(cache.memory):
            rows = hypotheses[0, :, 0] // (cache.state.shape[1] // len(cache.memory))
            parts["memory"] = cache.memory[rows]
            for name in ("hidden", "lengths"):
                if getattr(cache, name) is not None:
                    parts[name] = getattr(cache, name)[rows]
        return cache._replace(**parts)
