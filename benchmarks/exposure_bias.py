"""Token replacement and its rivals: the replacement itself, and whole steps of training.

Peers: the replacement token by token in Python, as it is usually written; scheduled sampling in
two passes and step by step (``kexue_exposure_bias.scheduled``: the libraries that had it are
archived); adversarial training by the fast gradient method, two passes forward and backward, which
the gradient penalty replaces; and the plain step with teacher forcing, which none can undercut.

Floor: replacement reads and writes the ids, 64 KiB at 64 x 128, and draws a number for each: these
numbers are a third of its time, the start of two dozen kernels most of the rest. Beside a step of
training that is a hundredth or less: the ratio to the plain step is 1 but for noise. The penalty's
floor is the graph of a gradient, forward and backward: two plain steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Row, compare
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.lab.language import CharacterSeq2Seq
from kexue_exposure_bias import (
    GradientPenaltyEmbedding,
    TokenReplacement,
    mix_predictions,
    step_by_step,
)

__all__ = ["rows"]

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
Step = Callable[[], object]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Fewer pairs.
    """
    pairs = 5 if quick else 15
    for batch, time in ((64, 128), (16, 512)):
        yield _replacement(batch, time, pairs)
    steps = _Steps(batch=64, time=32)
    case = "GRU with attention, width 96, 64 x 32 characters"
    for task, ours, peer, name in (
        ("step with replacement", steps.replaced, steps.plain, "teacher forcing"),
        ("step with replacement", steps.replaced, steps.two_passes, "scheduled sampling, 2 passes"),
        ("step with replacement", steps.replaced, steps.stepwise, "scheduled sampling, stepwise"),
        ("step with the penalty", steps.penalised, steps.plain, "teacher forcing"),
        ("step with the penalty", steps.penalised, steps.adversarial, "fast gradient method"),
    ):
        yield compare(task, case, ours, peer, peer_name=name, pairs=pairs)


def _replacement(batch: int, time: int, pairs: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, (batch, time), generator=generator)
    mask = torch.arange(time) < torch.randint(1, time + 1, (batch, 1), generator=generator)
    return compare(
        "replacement",
        f"{batch} x {time} tokens",
        partial(TokenReplacement(), tokens, mask, generator=generator),
        partial(_one_by_one, tokens, mask, random.Random(0)),
        peer_name="token by token in Python",
        pairs=pairs,
    )


def _one_by_one(tokens: Tensor, mask: Tensor, rng: random.Random) -> Tensor:
    """Replace tokens in lists, as a data loader would, and make a tensor of them."""
    found = []
    for row, length in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True):
        pool, rate = row[:length], 0.3 if rng.random() < 0.5 else 0.0
        drawn = [rng.choice(pool) if rng.random() < rate else token for token in pool]
        found.append(drawn + row[length:])
    return torch.tensor(found)


class _Steps:
    """Steps of training, forward and backward, on one batch.

    Args:
        batch: Rows.
        time: Characters of the sources; targets are a quarter longer.
    """

    def __init__(self, batch: int, time: int) -> None:
        torch.manual_seed(0)
        self.model = CharacterSeq2Seq(ALPHABET, width=96)
        rng = random.Random(0)
        pairs = []
        for _ in range(batch):
            source = "".join(rng.choice(ALPHABET[:26]) for _ in range(time))
            pairs.append((source, " ".join(source[i : i + 4] for i in range(0, time, 4))))
        self.batch = self.model.collate(pairs)
        self.mask = self.batch["targets"] != PAD
        self.replace = TokenReplacement(exclude=self.model.vocabulary.special_ids)
        self.cross_entropy = GradientPenaltyEmbedding(0.0)
        self.penalty = GradientPenaltyEmbedding()

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(self.batch["source"], self.batch["mask"], inputs)
        return logits

    def _loss(self, logits: Tensor) -> Tensor:
        loss: Tensor = self.cross_entropy(logits, self.batch["targets"])
        return loss

    def plain(self) -> None:
        """Teacher forcing."""
        self.model.zero_grad()
        torch.autograd.backward(self._loss(self._logits(self.batch["inputs"])))

    def replaced(self) -> None:
        """Read replaced tokens."""
        self.model.zero_grad()
        torch.autograd.backward(
            self._loss(self._logits(self.replace(self.batch["inputs"], self.mask)))
        )

    def two_passes(self) -> None:
        """Read what a first pass predicts, in the place of half of the tokens."""
        self.model.zero_grad()
        with torch.no_grad():
            first = self._logits(self.batch["inputs"])
        inputs = mix_predictions(self.batch["inputs"], first, 0.5, mask=self.mask)
        torch.autograd.backward(self._loss(self._logits(inputs)))

    def stepwise(self) -> None:
        """Read what was just predicted, in the place of half of the tokens."""
        self.model.zero_grad()
        memory, state = self.model.encode(self.batch["source"], self.batch["mask"])
        cache = (state, memory, self.batch["mask"])
        logits = step_by_step(self.model.advance, cache, self.batch["inputs"], 0.5, mask=self.mask)
        torch.autograd.backward(self._loss(logits))

    def penalised(self) -> None:
        """Take the gradient penalty of the decoder's embeddings."""
        self.model.zero_grad()
        logits, weight = self._logits(self.batch["inputs"]), self.model.embedding.weight
        self.penalty(logits, self.batch["targets"], embedding=weight).backward()

    def adversarial(self) -> None:
        """Take a second step with the embeddings moved up the gradient of the first."""
        self.plain()
        weight = self.model.embedding.weight
        assert weight.grad is not None  # noqa: S101
        move = weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight += move
        torch.autograd.backward(self._loss(self._logits(self.batch["inputs"])))
        with torch.no_grad():
            weight -= move
