"""From scores of the next token to text: one token after the other, or several beams at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.device import widest_float
from kexue.core.errors import ArgumentError, WorkError
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language.adapters import next_token_scorer
from kexue.core.language.scorer import NextTokenScorer, check_prompt

__all__ = ["beam_search", "draw", "generate", "greedy", "log_probabilities", "truncate"]

_HEAD = 1024  # tokens that a nucleus seldom exceeds

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""A source of randomness for all rows, or one per row, so that a row is drawn as if alone."""

Choose = Callable[[Tensor, Randomness], Tensor]
"""From logits ``[row, token]`` to one token per row."""


def log_probabilities(logits: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
    """Return log-probabilities in at least float32; −∞ throughout where no token is possible."""
    logits = _widened(logits)
    total = logits.logsumexp(-1, keepdim=True)
    return logits - total.masked_fill(total == -torch.inf, 0.0)


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def truncate(
    logits: Float[Tensor, "row token"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Float[Tensor, "row token"]:
    """Return logits whose candidates alone are above −∞.

    Args:
        logits: Scores of the next token.
        temperature: What they are divided by; 0 leaves the best token.
        top_k: How many of the best stay; 0 for all.
        top_p: The least set of best tokens that has this probability stays; 1 for all. It is taken
            among those that ``top_k`` leaves.

    Raises:
        ArgumentError: If an argument is out of range.
    """
    _check_truncation(temperature, top_k, top_p)
    tokens = logits.shape[-1]
    if temperature == 0:
        top_k = 1
    elif temperature != 1:
        logits = logits / temperature
    if 0 < top_k < tokens:
        best = logits.topk(top_k, -1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
    return _nucleus(logits, top_p) if top_p < 1 else logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits whose nucleus alone is above −∞; a part is sorted where that is enough."""
    total = _widened(logits).logsumexp(-1, keepdim=True)
    for count in (_HEAD, logits.shape[-1]):
        if count >= logits.shape[-1]:
            best, places = logits.sort(dim=-1, descending=True, stable=True)
        else:
            best, places = logits.topk(count, -1)
        probabilities = (best - total).exp()
        cumulated = probabilities.cumsum(-1)
        if best.shape[-1] == logits.shape[-1] or bool((cumulated[..., -1] >= top_p).all()):
            break
    before = cumulated - probabilities  # of all that are better
    kept = best.masked_fill((before >= top_p) & (before > 0), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, places, kept)


def _check_truncation(temperature: float, top_k: int, top_p: float) -> None:
    for name, value, holds, condition in (
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 for all tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    ):
        if not holds:
            raise ArgumentError(f"`{name}` must be {condition}. Found {value!r}.", argument=name)


def greedy(logits: Float[Tensor, "row token"], generator: Randomness = None) -> Int[Tensor, " row"]:
    """Return the best token of each row."""
    del generator
    return logits.argmax(-1)


def draw(logits: Float[Tensor, "row token"], generator: Randomness = None) -> Int[Tensor, " row"]:
    """Draw one token per row, by one uniform number per row.

    Args:
        logits: Scores of the next token; −∞ is never drawn.
        generator: Source of randomness, or one per row; the global one by default.
    """
    wide = widest_float(logits.device)
    cumulated = logits.to(wide).softmax(-1).cumsum(-1)
    if isinstance(generator, Sequence):
        parts = [torch.rand(1, generator=g, device=g.device, dtype=wide) for g in generator]
        uniform = torch.cat(parts).to(logits.device) if parts else cumulated[:, 0]
    else:
        uniform = torch.rand(len(logits), generator=generator, device=logits.device, dtype=wide)
    # The last sum is not always 1; a number below it meets a token that adds to the sum.
    wanted = (uniform * cumulated[:, -1])[:, None]
    found = torch.searchsorted(cumulated, wanted, right=True)[:, 0]
    return found.clamp_(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: Any,
    prompt: Int[Tensor, "row time"],
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    eos_id: int | Sequence[int] | None = None,
    choose: Choose = greedy,
    generator: Randomness = None,
    on_tokens: Callable[[Tensor, Tensor], object] | None = None,
) -> DecodeResult:
    """Continue prompts token by token; rows that have ended are computed no further.

    Args:
        model: Whatever :func:`~kexue.core.language.next_token_scorer` takes.
        prompt: Ids.
        max_new_tokens: How many tokens to add at most.
        mask: Shape ``[row, time]``, true at real tokens of the prompt; all are by default.
        eos_id: The end token, or several; the model's own by default.
        choose: What picks the token, such as :func:`greedy` or :func:`draw`.
        generator: Source of randomness, or one per row: then a row is drawn as if it were alone.
        on_tokens: Called with the rows that go on and their tokens, after each step.

    Returns:
        The new tokens, the end token included; the sum of their log-probabilities under the model,
        in nats; and which rows have ended.

    Raises:
        ArgumentError: If an argument is out of range, or the model has no room for the tokens.
        WorkError: If the model's scores are NaN.
    """
    scorer = next_token_scorer(model)
    mask = _checked(scorer, prompt, mask, max_new_tokens)
    rows, device = len(prompt), prompt.device
    if not rows or not max_new_tokens:
        return _nothing(rows, device)
    sequences = torch.full((rows, max_new_tokens), PAD, dtype=torch.long, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    live = torch.arange(rows, device=device)
    logits, cache = scorer.begin(prompt, mask)
    ends = _end_ids(scorer, eos_id, logits)
    scores = _widened(logits[:0]).new_zeros(rows)
    for step in range(max_new_tokens):
        tokens = choose(logits, generator)
        sequences[live, step] = tokens
        scores[live] += log_probabilities(logits).gather(1, tokens[:, None])[:, 0]
        if on_tokens is not None:
            on_tokens(live, tokens)
        over = torch.isin(tokens, ends)
        ended[live[over]] = True
        going = (~over).nonzero()[:, 0]
        if not len(going) or step + 1 == max_new_tokens:
            break
        if len(going) < len(live):
            cache, live, tokens = scorer.select(cache, going), live[going], tokens[going]
            if isinstance(generator, Sequence):
                generator = [generator[i] for i in going.tolist()]
        logits, cache = scorer.advance(cache, tokens)
    return _finished(sequences, scores, ended)


@torch.no_grad()
def beam_search(
    model: Any,
    prompt: Int[Tensor, "row time"],
    *,
    width: int,
    max_new_tokens: int,
    mask: Tensor | None = None,
    eos_id: int | Sequence[int] | None = None,
    length_penalty: float = 0.0,
    num_return: int = 1,
) -> DecodeResult:
    """Return the best continuations that a beam of some width finds.

    A row is done once none of its beams can beat the worst of ``width`` hypotheses that have ended.
    Those that have ended come first; the others, which ``max_new_tokens`` cut off, behind them.

    Args:
        model: Whatever :func:`~kexue.core.language.next_token_scorer` takes.
        prompt: Ids.
        width: Prefixes that are kept per row; 1 is greedy search.
        max_new_tokens: How many tokens to add at most.
        mask: Shape ``[row, time]``, true at real tokens of the prompt; all are by default.
        eos_id: The end token, or several; the model's own by default.
        length_penalty: Exponent of the length, the end token included, that the sum of
            log-probabilities is divided by when hypotheses are compared; 0 compares sums.
        num_return: Hypotheses per row, at most ``width``.

    Returns:
        Per row ``num_return`` sequences, best first, one below the other; sums of log-probabilities
        in nats; and which have ended. A hypothesis that does not exist is empty, its score −∞.

    Raises:
        ArgumentError: If an argument is out of range, or the model has no room for the tokens.
        WorkError: If the model's scores are NaN.
    """
    scorer = next_token_scorer(model)
    mask = _checked(scorer, prompt, mask, max_new_tokens)
    if width < 1:
        raise ArgumentError(f"`width` must be at least 1. Found {width}.", argument="width")
    if not 1 <= num_return <= width:
        raise ArgumentError(
            f"`num_return` must be from 1 to `width`, {width}. Found {num_return}.",
            argument="num_return",
        )
    if not math.isfinite(length_penalty) or length_penalty < 0:
        raise ArgumentError(
            f"`length_penalty` must be a finite number of at least 0. Found {length_penalty}.",
            argument="length_penalty",
        )
    if not len(prompt) or not max_new_tokens:
        return _nothing(len(prompt) * num_return, prompt.device)
    logits, cache = scorer.begin(prompt, mask)
    ends = _end_ids(scorer, eos_id, logits)
    beams = _Beams(logits, ends, width=width, longest=max_new_tokens, penalty=length_penalty)
    for step in range(max_new_tokens):
        chosen = beams.extend(logits, step)
        if chosen is None:
            break
        parents, tokens = chosen
        logits, cache = scorer.advance(scorer.select(cache, parents), tokens)
    return beams.best(num_return)


class _Beams:
    """The beams of all rows that are not done, and the hypotheses that have ended.

    Args:
        logits: Of the first token of each row.
        ends: End tokens.
        width: Beams per row.
        longest: Tokens at most.
        penalty: Exponent of the length.
    """

    def __init__(
        self, logits: Tensor, ends: Tensor, *, width: int, longest: int, penalty: float
    ) -> None:
        rows = len(logits)
        self.width, self.longest, self.penalty, self.ends = width, longest, penalty, ends
        like = _widened(logits[:0])
        self.live = torch.arange(rows, device=logits.device)  # rows that are not done
        self.scores = like.new_zeros(rows, 1)  # [live row, beam]
        self.tokens = ends.new_zeros(rows, 1, 0)  # [live row, beam, step]
        # [row, hypothesis]: how good, how probable, and what
        self.good = like.new_full((rows, width), -torch.inf)
        self.probable = self.good.clone()
        self.sequences = ends.new_full((rows, width, longest), PAD)
        self.ended = torch.zeros(rows, width, dtype=torch.bool, device=logits.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=logits.device)  # NaN was met

    def extend(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor] | None:
        """Add a token to every beam; return which beam went on by which token, None if none."""
        live, beams = self.scores.shape
        size = logits.shape[-1]
        total = self.scores[..., None] + log_probabilities(logits).view(live, beams, size)
        # Ends may be among the best: enough are looked at for `width` others to be left.
        most = min(self.width * (1 + len(self.ends)), beams * size)
        scores, flat = total.flatten(1).topk(most, 1)
        self.broken = self.broken | scores.isnan().any()
        parents, tokens = flat // size, flat % size
        history = self.tokens.gather(1, parents[..., None].expand(-1, -1, step))
        history = torch.cat([history, tokens[..., None]], 2)
        over = torch.isin(tokens, self.ends)
        among = over.clone()
        among[:, self.width :] = False  # an end behind the beam is no part of it
        self._keep(scores.masked_fill(~among, -torch.inf), history, ended=True)

        scores = scores.masked_fill(over, -torch.inf)
        scores, order = scores.topk(min(self.width, most), 1)
        self.scores = scores
        self.tokens = history.gather(1, order[..., None].expand(-1, -1, step + 1))
        if step + 1 == self.longest:
            self._cut()
            return None
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        going = self._undecided().nonzero()[:, 0]
        if not len(going):
            return None
        parents = (parents + beams * torch.arange(live, device=flat.device)[:, None])[going]
        self.live, self.scores = self.live[going], self.scores[going]
        self.tokens = self.tokens[going]
        return parents.flatten(), tokens[going].flatten()

    def _keep(self, scores: Tensor, history: Tensor, *, ended: bool) -> None:
        """Merge candidates into the hypotheses of their rows."""
        length = history.shape[2]
        good = torch.cat([self.good[self.live], scores / length**self.penalty], 1)
        probable = torch.cat([self.probable[self.live], scores], 1)
        padded = torch.nn.functional.pad(history, (0, self.longest - length), value=PAD)
        sequences = torch.cat([self.sequences[self.live], padded], 1)
        flag = torch.full_like(scores, ended, dtype=torch.bool)
        flags = torch.cat([self.ended[self.live], flag], 1)
        order = self._order(good, flags)
        self.good[self.live] = good.gather(1, order)
        self.probable[self.live] = probable.gather(1, order)
        self.ended[self.live] = (flags & ~good.isneginf()).gather(1, order)
        self.sequences[self.live] = sequences.gather(
            1, order[..., None].expand(-1, -1, self.longest)
        )

    def _order(self, good: Tensor, flags: Tensor) -> Tensor:
        """Return the places of the best hypotheses, those that have ended before the others."""
        by_score = good.argsort(dim=1, descending=True, stable=True)
        there = ~good.isneginf()
        group = torch.where(there & flags, 0, torch.where(there, 1, 2)).gather(1, by_score)
        found: Tensor = by_score.gather(1, group.argsort(dim=1, stable=True))[:, : self.width]
        return found

    def _cut(self) -> None:
        """Take what has not ended for hypotheses, too."""
        self._keep(self.scores, self.tokens, ended=False)

    def _undecided(self) -> Tensor:
        """Whether a beam of a row could still beat the worst of its hypotheses."""
        # A score can only fall; the length that forgives most is the greatest, or the present one.
        length = self.longest if self.penalty > 0 else self.tokens.shape[2] + 1
        hope: Tensor = self.scores.max(1).values / length**self.penalty
        return (hope > self.good[self.live, -1]) & ~hope.isneginf()

    def best(self, count: int) -> DecodeResult:
        """Return the best hypotheses of each row."""
        sequences = self.sequences[:, :count].flatten(0, 1)
        scores, ended = self.probable[:, :count].flatten(), self.ended[:, :count].flatten()
        sequences = sequences.masked_fill(scores.isneginf()[:, None], PAD)
        scores = scores.masked_fill(self.broken, torch.nan)
        return _finished(sequences, scores, ended)


# -- what both share -----------------------------------------------------------------------------


def _checked(
    scorer: NextTokenScorer, prompt: Tensor, mask: Tensor | None, max_new_tokens: int
) -> Tensor:
    mask = check_prompt(prompt, mask)
    if max_new_tokens < 0:
        raise ArgumentError(
            f"`max_new_tokens` must be at least 0. Found {max_new_tokens}.",
            argument="max_new_tokens",
        )
    longest = int(mask.sum(1).max()) if mask.numel() else 0
    room = scorer.room(longest)
    if room is not None and room < max_new_tokens:
        raise ArgumentError(
            f"`prompt` and `max_new_tokens` must fit the model, which reads {scorer.max_length} "
            f"tokens. Found a prompt of {longest} tokens and max_new_tokens={max_new_tokens}. "
            + (f"Give at most {room} of them." if room > 0 else "Shorten the prompt."),
            argument="prompt",
        )
    return mask


def _end_ids(
    scorer: NextTokenScorer, eos_id: int | Sequence[int] | None, logits: Tensor
) -> Int[Tensor, " end"]:
    given = scorer.eos_id if eos_id is None else eos_id
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    for token in ids:
        if not 0 <= token < logits.shape[-1]:
            raise ArgumentError(
                f"`eos_id` must be one of the model's {logits.shape[-1]} tokens. Found {token}: "
                "no sequence would ever end.",
                argument="eos_id",
            )
    return torch.tensor(ids, dtype=torch.long, device=logits.device)


def _finished(sequences: Tensor, scores: Tensor, ended: Tensor) -> DecodeResult:
    """Return a result without columns that no row needs, after a look at its scores."""
    if bool(scores.isnan().any()):
        raise WorkError(
            "The model's scores are NaN. Look at its weights, or compute in another dtype."
        )
    used = (sequences != PAD).any(0)
    longest = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
    return DecodeResult(sequences[:, :longest], scores, ended)


def _nothing(rows: int, device: torch.device) -> DecodeResult:
    empty = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return DecodeResult(
        empty, torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    )
