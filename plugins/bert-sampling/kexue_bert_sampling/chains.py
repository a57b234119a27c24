"""Chains of texts whose tokens are masked and drawn anew, many in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.errors import WorkError
from kexue.core.language import MaskedScorer, log_probabilities, truncate
from kexue_bert_sampling.randomness import Randomness
from kexue_bert_sampling.scans import Scan, choose
from kexue_bert_sampling.starts import Start

__all__ = ["Chains", "Rule", "draw_at", "find_places", "modules_of"]

_TOKEN, _FILL = 2, 3  # purposes of random numbers; scans have another
_BLOCK = 64  # steps whose random numbers are made at once, and that are checked at once


@dataclass(frozen=True)
class Rule:
    """How tokens are drawn.

    Args:
        scan: Which places a step draws.
        block: How many.
        temperature: τ: logits are divided by it; 0 takes the best token.
        start_temperature: τ at the first step, from where it falls in a line while warming up.
        warmup: Steps of the warm-up.
        top_k: How many of the best tokens may be drawn; 0 for all.
        top_p: Share of probability whose best tokens may be drawn.
        forbidden: Tokens that are never drawn.
        batch_size: Chains that the model reads at once.
    """

    scan: Scan = "random"
    block: int = 1
    temperature: float = 1.0
    start_temperature: float | None = None
    warmup: int = 0
    top_k: int = 0
    top_p: float = 1.0
    forbidden: tuple[int, ...] = ()
    batch_size: int = 256

    def temperature_at(self, step: int) -> float:
        """Return τ of a step."""
        if self.start_temperature is None or step >= self.warmup:
            return self.temperature
        share = step / self.warmup
        return self.start_temperature + share * (self.temperature - self.start_temperature)


def draw_at(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the token at which the cumulated probability passes a uniform number.

    Args:
        logits: Shape ``[..., token]``; -inf is never drawn.
        uniform: Numbers in [0, 1), shape ``[...]``.
    """
    mass = logits.double().softmax(-1).cumsum(-1)
    total = mass[..., -1:]
    # A level that is rounded up to the total would pass it nowhere.
    level = torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, level, right=True)[..., 0]
    return drawn.clamp_(max=logits.shape[-1] - 1)


def find_places(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where rows are true: positions ``[row, place]`` from the left, and their numbers."""
    counts = wanted.sum(1)
    order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : max(1, int(counts.max()))], counts


def modules_of(scorer: MaskedScorer) -> list[nn.Module]:
    """Return the modules of a scorer: itself, or what it asks."""
    candidates = (scorer, getattr(scorer, "model", None), getattr(scorer, "function", None))
    return [found for found in candidates if isinstance(found, nn.Module)]


@contextmanager
def _evaluating(scorer: MaskedScorer) -> Iterator[None]:
    """Switch dropout off, or the same seed would not give the same text."""
    training = [module for found in modules_of(scorer) for module in found.modules()]
    training = [module for module in training if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Chains:
    """The state of some chains.

    Args:
        scorer: The masked language model.
        start: Where they start, and what of it is drawn.
        rule: How tokens are drawn.
        randomness: All random numbers.
        owner: Who has chains, as errors name it.
    """

    def __init__(
        self, scorer: MaskedScorer, start: Start, rule: Rule, randomness: Randomness, owner: str
    ) -> None:
        self.scorer, self.start, self.rule = scorer, start, rule
        self.randomness, self.owner = randomness, owner
        self.ids = start.ids.clone()
        self.real = None if bool(start.real.all()) else start.real
        self.places, self.counts = find_places(start.free)
        self.block = min(rule.block, self.places.shape[1])
        self.steps = self.calls = 0
        self._chain = torch.arange(len(self.ids), device=self.ids.device)
        # a model is not shown texts without tokens, of which it might make NaN
        self._asking = self._chain[self.counts > 0]
        self._forbidden = torch.tensor(rule.forbidden, dtype=torch.long, device=self.ids.device)
        self.forget()

    @property
    def texts(self) -> Tensor:
        """The texts as they are now, ``[chain, text]`` with PAD behind their ends."""
        return self.start.texts(self.ids)

    def forget(self) -> None:
        """Begin to count anew what :meth:`statistics` tells of."""
        self._log_prob = torch.zeros((), dtype=torch.float64, device=self.ids.device)
        self._drawn, self._changed = self._log_prob.clone(), self._log_prob.clone()

    def statistics(self) -> dict[str, float]:
        """Return the mean log-probability of drawn tokens, and the share that changed a place.

        The log-probability is the model's, in nats, among tokens that are not forbidden, whatever
        temperature and truncation.
        """
        drawn = float(self._drawn)
        return {
            "token_log_prob": float(self._log_prob) / drawn if drawn else math.nan,
            "changed": float(self._changed) / drawn if drawn else math.nan,
        }

    def run(self, steps: int) -> None:
        """Take steps.

        Raises:
            WorkError: If the model's scores are NaN or +inf, or leave no token to draw.
        """
        if not self.ids.numel() or not bool(self.counts.any()):
            self.steps += steps
            return
        end = self.steps + steps
        with _evaluating(self.scorer):
            while self.steps < end:
                some = range(self.steps, min(end, self.steps + _BLOCK))
                self._run(some)
                self.steps = some.stop

    def _run(self, steps: range) -> None:
        slots, exists = choose(self.rule.scan, self.counts, self.block, steps, self.randomness)
        uniform = self._uniform(_TOKEN, steps)
        totals = []
        for step, slot, real, level in zip(steps, slots, exists, uniform, strict=True):
            positions = self.places.gather(1, slot)
            totals.append(self._draw(positions, real, level, self.rule.temperature_at(step)))
        self._check(torch.stack(totals), steps)

    def fill(self) -> None:
        """Draw what is still masked, from the left; nothing else changes.

        Raises:
            WorkError: As :meth:`run`.
        """
        places, counts = find_places((self.ids == self.scorer.mask_id) & self.start.free)
        some = range(int(counts.max()) if counts.numel() else 0)
        totals = []
        with _evaluating(self.scorer):
            for step, level in zip(some, self._uniform(_FILL, some), strict=True):
                place, exists = places[:, step, None], (step < counts)[:, None]
                totals.append(self._draw(place, exists, level[:, :1], self.rule.temperature))
        if totals:
            self._check(torch.stack(totals), some)

    def _uniform(self, purpose: int, steps: range) -> Tensor:
        step = torch.arange(steps.start, steps.stop, device=self.ids.device)[:, None, None]
        slot = torch.arange(self.block, device=self.ids.device)
        return self.randomness.uniform(purpose, step, self._chain[:, None], slot)

    def _draw(
        self, positions: Tensor, exists: Tensor, uniform: Tensor, temperature: float
    ) -> Tensor:
        """Draw tokens at positions ``[chain, place]`` given all others; return totals to check.

        A place that does not exist stands for the first one, and gets the same token; where the
        first does not exist, there is nothing to draw, and the token stays.
        """
        positions = torch.where(exists, positions, positions[:, :1])
        old = self.ids.gather(1, positions)
        hidden = torch.where(exists[:, :1], self.scorer.mask_id, old)
        scores = self._score(self.ids.scatter(1, positions, hidden), positions)
        scores = scores.index_fill(-1, self._forbidden, -torch.inf)
        log_p = log_probabilities(scores)
        rule = self.rule
        kept = truncate(log_p, temperature=temperature, top_k=rule.top_k, top_p=rule.top_p)
        drawn = draw_at(kept, uniform)
        new = torch.where(exists, drawn, drawn[:, :1])
        new = torch.where(exists[:, :1], new, old)
        self.ids.scatter_(1, positions, new)
        gained = log_p.gather(-1, drawn[..., None])[..., 0]
        self._log_prob += torch.where(exists, gained, 0.0).sum(dtype=torch.float64)
        self._changed += ((new != old) & exists).sum()
        self._drawn += exists.sum()
        sound = torch.where(exists, log_p.amax(-1), 0.0)  # NaN, or -inf where no token is left
        return sound.sum(1)

    def _score(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits ``[chain, place, token]``."""
        parts = []
        for start in range(0, len(self._asking), self.rule.batch_size):
            rows = self._asking[start : start + self.rule.batch_size]
            mask = None if self.real is None else self.real[rows]
            part = self.scorer(ids[rows], mask, positions[rows])
            if not self.calls:
                self._check_scores(part, positions[rows])
            parts.append(part)
            self.calls += 1
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(found) == len(ids):
            return found
        return found.new_zeros(len(ids), *found.shape[1:]).index_copy(0, self._asking, found)

    def _check_scores(self, found: Tensor, positions: Tensor) -> None:
        if found.shape[:-1] != positions.shape or not found.is_floating_point():
            raise ArgumentError(
                f"`target` of {self.owner} must score tokens at the positions, shape "
                f"[{positions.shape[0]}, {positions.shape[1]}, token]. Found {found.dtype} of "
                f"shape {list(found.shape)}.",
                argument="target",
            )
        tokens = found.shape[-1]
        beyond = [token for token in self.rule.forbidden if token >= tokens]
        if self.scorer.mask_id in beyond:  # a model need not score its mask
            beyond.remove(self.scorer.mask_id)
        if beyond:
            raise ArgumentError(
                f"`forbidden` of {self.owner} must be tokens of the model, 0 to {tokens - 1}. "
                f"Found {beyond[0]}.",
                argument="forbidden",
            )
        self._forbidden = self._forbidden[self._forbidden < tokens]

    def _check(self, totals: Tensor, steps: range) -> None:
        wrong = ~totals.isfinite()
        if not bool(wrong.any()):
            return
        step, chain = wrong.nonzero()[0].tolist()
        left = "no token that is not forbidden" if totals[step, chain] == -math.inf else "NaN"
        raise WorkError(
            f"`target` of {self.owner} must give a token to draw a probability above zero. Found "
            f"{left} in step {steps[step]} of chain {chain}."
        )
