"""Linear-chain CRF: loss with gradient, and Viterbi decoding.

Peer: pytorch-crf 0.7.2 (``torchcrf.CRF``), same parameters, ragged right-padded masks with lengths
from time / 2 to time. Values and paths are compared before the clock starts. Its decoder returns
lists; ours is measured both as it returns (tensors) and with ``.tolist()``.

The shapes span batch 16–64, time 64–512 and 4–200 tags, short and long for few and many tags.

Floor of loss and gradient: 8 batch time tag² operations (two directions, two gradients) and, for
few tags, two operations of about 2 µs per position, because a step needs the one before. At
32 × 256 × 200 that is 2.6 GFLOP, 20 ms on one core with AVX-512, of which we are within a factor
of 1.6; at 16 × 512 × 4 it is 2 ms, and we take 2.5 times that: the rest is memory, fresh buffers
of about ten times the emissions, and some 170 small operations around the loop (1 ms).

Floor of decoding: batch time tag² additions and comparisons, 0.03 ns each in registers. Ours go
through a table in cache, 0.35 ns each; torch has no fused operation for (max, +). For few tags the
same launches, which pieces of the chain share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchcrf
from harness import Row, compare
from torch import Tensor

from kexue_crf import CRF

__all__ = ["SHAPES", "rows"]

SHAPES = (  # batch, time, tags
    (16, 64, 4),
    (64, 128, 4),
    (16, 512, 4),
    (64, 512, 4),
    (32, 128, 9),
    (64, 256, 9),
    (32, 128, 17),
    (64, 256, 17),
    (16, 512, 33),
    (32, 128, 50),
    (64, 128, 100),
    (16, 64, 200),
    (32, 256, 200),
)
QUICK = ((16, 64, 4), (32, 128, 17))
PEER = "pytorch-crf 0.7.2"


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only two small shapes, and fewer pairs.
    """
    pairs = 5 if quick else 15
    for batch, time, tags in QUICK if quick else SHAPES:
        case = f"{batch} x {time}, {tags} tags"
        ours, theirs, emissions, gold, mask = _case(batch, time, tags)
        yield _loss(case, ours, theirs, (emissions, gold, mask), pairs)
        yield from _decode(case, ours, theirs, (emissions.detach(), mask), pairs)


def _case(batch: int, time: int, tags: int) -> tuple[CRF, torchcrf.CRF, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    theirs = torchcrf.CRF(tags, batch_first=True)
    ours = CRF(tags)
    theirs.load_state_dict(ours.state_dict())
    emissions = torch.randn(batch, time, tags, generator=generator).requires_grad_()
    gold = torch.randint(tags, (batch, time), generator=generator)
    lengths = torch.randint(time // 2, time + 1, (batch, 1), generator=generator)
    lengths[0] = time
    return ours, theirs, emissions, gold, torch.arange(time) < lengths


def _loss(
    case: str, ours: CRF, theirs: torchcrf.CRF, inputs: tuple[Tensor, Tensor, Tensor], pairs: int
) -> Row:
    emissions, gold, mask = inputs

    def our_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(*inputs), [emissions, *ours.parameters()])

    def their_step() -> tuple[Tensor, ...]:
        loss = -theirs(emissions, gold, mask, reduction="mean")
        return torch.autograd.grad(loss, [emissions, *theirs.parameters()])

    torch.testing.assert_close(
        ours(*inputs), -theirs(emissions, gold, mask, reduction="mean"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(our_step()[0], their_step()[0], rtol=1e-3, atol=1e-4)
    return compare("loss + gradient", case, our_step, their_step, peer_name=PEER, pairs=pairs)


def _decode(
    case: str, ours: CRF, theirs: torchcrf.CRF, inputs: tuple[Tensor, Tensor], pairs: int
) -> Iterator[Row]:
    emissions, mask = inputs

    def to_tensors() -> object:
        return ours.decode(emissions, mask=mask)

    def to_lists() -> object:
        return ours.decode(emissions, mask=mask).tolist()

    @torch.no_grad()
    def their_lists() -> object:
        return theirs.decode(emissions, mask)

    if to_lists() != their_lists():
        raise AssertionError(f"Paths differ at {case}.")
    yield compare("decode", case, to_tensors, their_lists, peer_name=PEER, pairs=pairs)
    yield compare("decode, as lists", case, to_lists, their_lists, peer_name=PEER, pairs=pairs)
