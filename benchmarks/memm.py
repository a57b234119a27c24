"""MEMM, loss with its gradient, and decoding.

Peers: torch's cross-entropy on the flattened positions (the floor: a softmax without neighbours),
the post's formula written plainly in torch (two cross-entropies under autograd), and the CRF that
a user would take instead, `torchcrf.CRF` of pytorch-crf 0.7.2 (another loss of the same inputs).
The plain formula's value and gradient are compared before the clock starts.

Floor: both directions together must read the emissions, write their gradient (8 bytes per score
in float32) and take one exponential; cross-entropy alone takes two softmax passes. Up to 32 tags
ours takes three thin products of matrices and some 45 small operations, which are most of its time
for small batches, where a second thread speeds cross-entropy up and not them (rows on one thread
are marked); beyond, 14 passes over direction x token x tag. Of a large tag set the product with the
transitions is the floor: 2 x 2 x 3 x rank operations per score for both directions with their
gradient, 15 ms at 20,000 tags on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Row, compare, peak_megabytes
from torch import Tensor
from torchcrf import CRF

from kexue_memm import MEMM

__all__ = ["rows"]

SHAPES = ((64, 80, 4), (64, 512, 4), (32, 128, 20), (16, 64, 200))  # batch, time, tags
LARGE = (4, 32, 20_000)


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest shape, and fewer pairs.
    """
    pairs = 5 if quick else 15
    if not quick:
        yield _large(pairs)
    for shape in SHAPES[:1] if quick else SHAPES:
        yield from _losses(shape, pairs)
        yield from _decoders(shape, pairs)


def _data(batch: int, time: int, tags: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return emissions, tags and a mask of lengths from a third of the time on."""
    generator = torch.Generator().manual_seed(0)
    emissions = torch.randn(batch, time, tags, generator=generator).requires_grad_()
    lengths = torch.randint(time // 3, time + 1, (batch, 1), generator=generator)
    lengths[0] = time
    labels = torch.randint(tags, (batch, time), generator=generator)
    return emissions, labels, torch.arange(time) < lengths


def _step(
    loss: Callable[..., Tensor], arguments: tuple[Any, ...], inputs: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*arguments), inputs)

    return step


def _plain(memm: MEMM, emissions: Tensor, labels: Tensor) -> Tensor:
    """The post's formula: one cross-entropy per direction, the neighbour's row of g added."""
    total = emissions.new_zeros(())
    for way in (1, -1):
        if memm.rank is None:
            history = (memm.transitions if way > 0 else memm.transitions.T)[labels]
        else:
            near, far = (memm.left, memm.right)[::way]
            history = near[labels] @ far.T
        logits = emissions.clone()
        if way > 0:
            logits[:, 1:] += history[:, :-1]
        else:
            logits[:, :-1] += history[:, 1:]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (2 * len(labels))


def _losses(shape: tuple[int, int, int], pairs: int) -> Iterator[Row]:
    emissions, labels, mask = _data(*shape)
    case = " x ".join(map(str, shape))
    flat = emissions.flatten(0, 1)
    whole = _step(F.cross_entropy, (flat, labels.flatten()), [emissions])
    padded = labels.masked_fill(~mask, -100).flatten()
    ragged = _step(F.cross_entropy, (flat, padded), [emissions])
    crf = CRF(shape[2], batch_first=True)
    scored = [emissions, crf.transitions]
    both, forward = MEMM(shape[2]), MEMM(shape[2], direction="forward")
    inputs = [emissions, both.transitions]
    ours = _step(both, (emissions, labels), inputs)
    plain = _step(_plain, (both, emissions, labels), inputs)
    for mine, theirs in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    task = "loss and gradient, both"
    for name, peer in (
        ("cross-entropy", whole),
        ("the formula in torch", plain),
        ("torchcrf.CRF", _step(crf, (emissions, labels), scored)),
    ):
        yield compare(task, case, ours, peer, peer_name=name, pairs=pairs)
    ours = _step(both, (emissions, labels, mask), inputs)
    for name, peer in (
        ("cross-entropy", ragged),
        ("torchcrf.CRF", _step(crf, (emissions, labels, mask), scored)),
    ):
        yield compare(f"{task}, ragged", case, ours, peer, peer_name=name, pairs=pairs)
    alone = _step(forward, (emissions, labels), [emissions, forward.transitions])
    task = "loss and gradient, forward"
    yield compare(task, case, alone, whole, peer_name="cross-entropy", pairs=pairs)
    ours = _step(both, (emissions, labels), inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for way, step in (("both", ours), ("forward", alone)):
            task = f"loss and gradient, {way}, one thread"
            yield compare(task, case, step, whole, peer_name="cross-entropy", pairs=pairs)
    finally:
        torch.set_num_threads(threads)


def _decoders(shape: tuple[int, int, int], pairs: int) -> Iterator[Row]:
    emissions, _, mask = _data(*shape)
    case = " x ".join(map(str, shape))
    crf = CRF(shape[2], batch_first=True)
    scores = emissions.detach()

    def theirs() -> object:
        return crf.decode(scores, mask)

    for memm in (MEMM(shape[2]), MEMM(shape[2], mode="raw")):

        def ours(memm: MEMM = memm) -> object:
            return memm.decode(scores, mask=mask).tolist()

        task = f"decode, {memm.mode}"
        yield compare(task, case, ours, theirs, peer_name="torchcrf.CRF", pairs=pairs)


def _large_step() -> Callable[[], object]:
    emissions, labels, _ = _data(*LARGE)
    memm = MEMM(LARGE[2], rank=32)
    return _step(memm, (emissions, labels), [emissions, memm.left, memm.right])


def _large(pairs: int) -> Row:
    """A vocabulary as the tag set: the matrix of transitions would take 1.6 GB."""
    emissions, labels, _ = _data(*LARGE)
    memm = MEMM(LARGE[2], rank=32)
    inputs = [emissions, memm.left, memm.right]
    ours = _step(memm, (emissions, labels), inputs)
    megabytes = peak_megabytes(_large_step)
    return compare(
        "loss and gradient, both",
        f"{' x '.join(map(str, LARGE))}, rank 32 (ours: {megabytes:.0f} MB more)",
        ours,
        _step(_plain, (memm, emissions, labels), inputs),
        peer_name="the formula in torch",
        pairs=pairs,
    )
