"""Gibbs sampling of text from a masked language model.

With l tokens x, again and again a place i is chosen, x_i is masked, and a new token is drawn from
what the model says of place i given all others. Were these conditionals those of one distribution,
its draws would come of it. Those of a learned model are not quite: the chain still comes to rest in
a law of its own, which depends on the order of the places. Use it to see what a masked language
model holds, and to fill gaps; an autoregressive model is faster, and knows its probabilities.

Deviations: none in the default update. Where places are still masked when the warm-up ends, they
are drawn once from left to right, so that no draw holds a mask. The post and the paper take any
place; orders, blocks, temperatures and truncation are beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue.core.device import synchronized_clock
from kexue.core.language import MaskedScorer, masked_scorer, truncate
from kexue_bert_sampling.chains import Chains, Rule, modules_of
from kexue_bert_sampling.joint import JointScorer
from kexue_bert_sampling.randomness import Randomness
from kexue_bert_sampling.scans import SCANS, Scan
from kexue_bert_sampling.starts import check_init, masked_rows, start_of

__all__ = ["MLMGibbs"]

_MOST_CHAINS = 64
_REPORT = 64  # steps between reports of progress


class MLMGibbs(Sampler):
    """Texts of a masked language model: one token after the other masked and drawn anew.

    All chains are rows of one batch, and the model scores its vocabulary at the masked places only.
    A step is one call of the model. The random numbers of a chain follow from the seed, its number
    and the step, so that it is the same however many there are.

    Args:
        scan: Which place is next: ``"random"``, any; ``"systematic"``, from first to last; or
            ``"permutation"``, all in an order that is drawn for each sweep.
        block: Places that are masked and drawn at once, independently: fewer steps, another law.
        temperature: τ, what logits are divided by; 0 takes the best token.
        start_temperature: τ of the first step, from where it falls in a line while warming up.
        top_k: How many of the best tokens may be drawn; 0 for all.
        top_p: The least set of best tokens with this probability may be drawn; 1 for all.
        num_chains: Chains in parallel; None for one per row of ``init`` or per draw, at most 64.
        warmup: Steps before the first draw.
        thin: Steps from a draw to the next.
        min_length: Tokens of the shortest text, 8 by default; lengths are equally likely.
        max_length: Tokens of the longest text, 32 or what the model can read by default.
        init: Where chains start instead of masks: ids ``[time]`` or ``[chain, time]``, PAD behind
            their ends, masks among them or not.
        frozen: True at tokens of ``init`` that stay, ``[time]`` or ``[chain, time]``.
        prefix: Tokens that the model is shown before each text, such as [CLS].
        suffix: Tokens that the model is shown behind each text, such as [SEP].
        forbidden: Tokens that are never drawn, such as [PAD]; the mask never is.
        mask_id: The mask, where the target does not say.
        batch_size: Chains that the model reads at once.

    Raises:
        ArgumentError: If an argument is out of its range or does not fit the model.
        WorkError: If the model's scores are NaN, or leave no token to draw.

    Example:
        >>> import torch
        >>> from kexue_bert_sampling import MLMGibbs
        >>> def alternating(ids):  # says of each token that it is not the one before
        ...     return 50.0 * torch.nn.functional.one_hot(1 - ids.roll(1, 1) % 2, 3)
        >>> sampler = MLMGibbs(scan="systematic", init=torch.tensor([1, 2, 2, 2]), warmup=0, thin=4,
        ...     frozen=torch.tensor([True, False, False, False]), mask_id=2)
        >>> sampler.sample(alternating, 1).values
        tensor([[1, 0, 1, 0]])

    Source: https://kexue.fm/archives/8119; Wang and Cho, BERT has a Mouth, and It Must Speak: BERT
    as a Markov Random Field Language Model, 2019, https://arxiv.org/abs/1902.04094.
    """

    def __init__(
        self,
        *,
        scan: Scan = "random",
        block: int = 1,
        temperature: float = 1.0,
        start_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        num_chains: int | None = None,
        warmup: int = 1000,
        thin: int = 100,
        min_length: int | None = None,
        max_length: int | None = None,
        init: Tensor | None = None,
        frozen: Tensor | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        forbidden: Sequence[int] = (),
        mask_id: int | None = None,
        batch_size: int = 256,
    ) -> None:
        if scan not in SCANS:
            raise ArgumentError(
                f"`scan` of MLMGibbs must be one of {', '.join(SCANS)}. Found {scan!r}.",
                argument="scan",
            )
        _check_counts(
            block=(block, 1), num_chains=(num_chains, 1), warmup=(warmup, 0), thin=(thin, 1),
            min_length=(min_length, 0), max_length=(max_length, 0), batch_size=(batch_size, 1),
        )  # fmt: skip
        no_scores = torch.zeros(1, 1)
        truncate(no_scores, temperature=temperature, top_k=top_k, top_p=top_p)  # checks them
        if start_temperature is not None and not start_temperature >= temperature:
            raise ArgumentError(
                f"`start_temperature` of MLMGibbs must be at least `temperature`, {temperature}. "
                f"Found {start_temperature}.",
                argument="start_temperature",
            )
        negative = next((token for token in forbidden if token < 0), None)
        if negative is not None:
            raise ArgumentError(
                f"`forbidden` of MLMGibbs must be tokens, 0 or more. Found {negative}.",
                argument="forbidden",
            )
        self.scan, self.block, self.batch_size = scan, block, batch_size
        self.temperature, self.start_temperature = temperature, start_temperature
        self.top_k, self.top_p = top_k, top_p
        self.num_chains, self.warmup, self.thin = num_chains, warmup, thin
        self.min_length, self.max_length = min_length, max_length
        self.init, self.frozen, self.mask_id = init, frozen, mask_id
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)
        self.forbidden = tuple(forbidden)

    @torch.no_grad()
    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: A masked language model: whatever
                :func:`~kexue.core.language.masked_scorer` takes; or the logits ``[token]`` or
                ``[token, ..., token]`` of a joint distribution with an axis per place, whose
                conditionals are exact.
            num_samples: How many texts, of all chains together.
            generator: Source of randomness; the global one by default.

        Returns:
            Ids ``[sample, time]``, PAD behind their ends, with the chains; of logits of one axis,
            ``[sample]``. The diagnostics ``token_log_prob``, the mean log-probability of a drawn
            token given all others in nats, ``changed``, the share of draws that gave another token
            than before (these two of what follows the warm-up), ``distinct``, the share of draws
            that differ, ``steps`` and ``seconds`` of all.
        """
        chains = self.begin(target, num_samples, generator=generator)
        clock = synchronized_clock(chains.ids.device)
        draws = list(self.draw(chains, -(-num_samples // max(1, len(chains.ids)))))
        seconds = synchronized_clock(chains.ids.device) - clock
        empty = chains.texts[:, None][:, :0]
        found = torch.stack(draws, 1) if draws else empty  # [chain, draw, time]
        if isinstance(target, Tensor) and target.ndim == 1:
            found = found[..., 0]
        values = found.transpose(0, 1).flatten(0, 1)[:num_samples]
        diagnostics = {
            **chains.statistics(),
            "distinct": _distinct(values),
            "steps": chains.steps,
            "seconds": seconds,
        }
        return Samples(values, diagnostics, chains=found)

    def begin(
        self,
        target: Any,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        first: int = 0,
    ) -> Chains:
        """Return chains at their start.

        Args:
            target: As for :meth:`sample`.
            num_samples: How many texts will be wanted, which says how many chains there are if
                nothing else does.
            generator: Source of randomness, of which all numbers of the chains follow; the global
                one by default.
            first: Number of the first chain; those of several calls with the same seed are then
                the same as if all had begun together.
        """
        owner = type(self).__name__
        if num_samples < 0:
            raise ArgumentError(
                f"`num_samples` of {owner} must not be negative. Found {num_samples}.",
                argument="num_samples",
            )
        scorer = self._scorer(target)
        randomness = Randomness.of(generator, _device(scorer, self.init, generator), first=first)
        rows = self._rows(scorer, num_samples, randomness)
        start = start_of(
            rows, scorer, frozen=self.frozen, prefix=self.prefix, suffix=self.suffix, owner=owner
        )
        rule = Rule(
            self.scan, self.block, self.temperature, self.start_temperature, self.warmup,
            self.top_k, self.top_p, (scorer.mask_id, *self.forbidden), self.batch_size,
        )  # fmt: skip
        return Chains(scorer, start, rule, randomness, owner)

    @torch.no_grad()
    def draw(
        self, chains: Chains, num_draws: int, *, on_steps: Callable[[int], object] | None = None
    ) -> Iterator[Tensor]:
        """Warm chains up, unless they are, and yield the texts of each draw as it comes.

        Args:
            chains: What :meth:`begin` returned.
            num_draws: Texts of each chain.
            on_steps: Called with the number of steps that were taken since the last call.

        Yields:
            Ids ``[chain, time]`` with PAD behind their ends.
        """
        if num_draws and chains.steps < self.warmup:
            _advance(chains, self.warmup - chains.steps, on_steps)
        if num_draws:
            chains.fill()
            chains.forget()
        for _ in range(num_draws):
            _advance(chains, self.thin, on_steps)
            yield chains.texts

    def _scorer(self, target: Any) -> MaskedScorer:
        if isinstance(target, Tensor):
            return JointScorer(target)
        return masked_scorer(target, mask_id=self.mask_id)

    def _rows(self, scorer: MaskedScorer, num_samples: int, randomness: Randomness) -> Tensor:
        """Return the texts that chains start from."""
        owner = type(self).__name__
        for name in ("min_length", "max_length") if self.init is not None else ("frozen",):
            if getattr(self, name) is not None:
                why = "has no use beside" if self.init is not None else "needs"
                raise ArgumentError(f"`{name}` of {owner} {why} `init`.", argument=name)
        several = self.init is not None and self.init.ndim == 2 and len(self.init) > 1
        num = self.num_chains
        if num is None and not several:
            num = min(_MOST_CHAINS, max(1, num_samples))
        if self.init is not None:
            return check_init(self.init, num, owner, randomness.device)
        low, high = self.min_length, self.max_length
        if isinstance(scorer, JointScorer) and low is None and high is None:
            low = high = scorer.max_length
        around = len(self.prefix) + len(self.suffix)
        return masked_rows(
            num or 1,
            scorer,
            low=low,
            high=high,
            around=around,
            owner=owner,
            randomness=randomness,
        )

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits of five classes: a text of one token."""
        inputs = {"target": torch.randn(5, generator=generator), "num_samples": 400}
        return Example({"num_chains": 100, "warmup": 5, "thin": 1}, inputs)


def _advance(chains: Chains, steps: int, on_steps: Callable[[int], object] | None) -> None:
    for start in range(0, steps, _REPORT):
        some = min(_REPORT, steps - start)
        chains.run(some)
        if on_steps is not None:
            on_steps(some)


def _device(
    scorer: MaskedScorer, init: Tensor | None, generator: torch.Generator | None
) -> torch.device:
    """Return where the model is, or else where the chains are to start or random numbers are."""
    for module in modules_of(scorer):
        for parameter in module.parameters():
            return parameter.device
    own = getattr(scorer, "device", None)
    if isinstance(own, torch.device):
        return own
    if init is not None:
        return init.device
    return generator.device if generator is not None else torch.get_default_device()


def _distinct(values: Tensor) -> float:
    """Return the share of different rows."""
    if not values.numel():
        return 1 / len(values) if len(values) else math.nan
    different: Tensor = values.unique(dim=0)  # type: ignore[no-untyped-call]
    return len(different) / len(values)


def _check_counts(**given: tuple[int | None, int]) -> None:
    for name, (value, least) in given.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(
                f"`{name}` of MLMGibbs must be a whole number, at least {least}. Found {value!r}.",
                argument=name,
            )
