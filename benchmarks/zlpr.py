"""Multi-label losses, forward and backward.

Peers: bert4torch (the fastest published ZLPR; optional, ``pip install --no-deps bert4torch``),
torch's binary cross-entropy and MultiLabelSoftMarginLoss (another loss of the same inputs), the
post's formula written plainly in torch, and for subsets the recursion over the classes.
Values are compared with the peer's before the clock starts, where the peer computes the same.

Floor: the dense loss must read logits and target and write the gradient, 12 bytes per class in
float32, and take one exponential. Ours moves about 130 bytes in 17 vectorised passes, two of them
softmax kernels, and pays for four fresh buffers. The loss on lists must move 8 bytes and moves 32.
A subset of k labels out of n takes 3 n k multiplications with the gradient; there we are
bound by the launches of some 10 log(n) operations until n batch k reaches a million.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from harness import Row, compare
from torch import Tensor

from kexue_zlpr import ZLPR, SubsetSoftmax

__all__ = ["rows"]

SHAPES = ((64, 1000, 5), (256, 10_000, 10), (32, 100_000, 10))  # rows, classes, labels


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest shape, and fewer pairs.
    """
    peer = _bert4torch_losses()
    pairs = 5 if quick else 15
    for batch, classes, labels in SHAPES[:1] if quick else SHAPES:
        case = f"{batch} x {classes}, {labels} labels"
        yield from _dense(case, *_data(batch, classes, labels), peer, pairs)
    for batch, classes, labels in ((8, 200, 3),) if quick else ((64, 1000, 5), (16, 10_000, 5)):
        yield _subset(batch, classes, labels, pairs)


def _bert4torch_losses() -> ModuleType | None:
    """Load bert4torch's losses alone: its package imports much that they do not need."""
    try:
        distribution = importlib.metadata.distribution("bert4torch")
    except importlib.metadata.PackageNotFoundError:
        print(
            "zlpr: bert4torch is not installed, its rows are left out. "
            "Run `pip install --no-deps bert4torch`.",
            file=sys.stderr,
        )
        return None
    path = str(distribution.locate_file("bert4torch/losses.py"))
    spec = importlib.util.spec_from_file_location("bert4torch_losses", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _data(batch: int, classes: int, labels: int) -> tuple[Tensor, Tensor]:
    """Return logits and as many different labels in each row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator) * 3
    chosen = torch.rand(batch, classes, generator=generator).topk(labels).indices
    return logits.requires_grad_(), chosen


def _step(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        return torch.autograd.grad(loss(logits, target).mean(), logits)[0]

    return step


def _check(ours: Callable[[], Tensor], peer: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-8)


def _plain(logits: Tensor, target: Tensor) -> Tensor:
    """The post's formula: two logsumexp with a zero appended."""
    zero = torch.zeros_like(logits[..., :1])
    positive = target.bool()
    negatives = torch.cat([logits.masked_fill(positive, -math.inf), zero], dim=-1)
    positives = torch.cat([(-logits).masked_fill(~positive, -math.inf), zero], dim=-1)
    return negatives.logsumexp(-1) + positives.logsumexp(-1)


def _dense(
    case: str, logits: Tensor, labels: Tensor, peer: ModuleType | None, pairs: int
) -> Iterator[Row]:
    target = torch.zeros_like(logits, requires_grad=False).scatter_(-1, labels, 1.0)
    ours = _step(ZLPR(), logits, target)
    boolean = _step(ZLPR(), logits, target.bool())
    sparse = _step(ZLPR(sparse=True), logits, labels)
    binary = _step(torch.nn.BCEWithLogitsLoss(), logits, target)
    margin = _step(torch.nn.MultiLabelSoftMarginLoss(), logits, target)
    plain = _step(_plain, logits, target)
    same = {"the post's formula in torch": plain}
    if peer is not None:
        same["bert4torch"] = _step(peer.MultilabelCategoricalCrossentropy(), logits, target)
        listed = _step(peer.SparseMultilabelCategoricalCrossentropy(), logits, labels)
        _check(sparse, listed)
    _check(sparse, ours)
    _check(boolean, ours)
    for name, step in same.items():
        _check(ours, step)
        yield compare("ZLPR", case, ours, step, peer_name=name, pairs=pairs)
    name = "BCEWithLogitsLoss (another loss)"
    yield compare("ZLPR", case, ours, binary, peer_name=name, pairs=pairs)
    yield compare("ZLPR, bool target", case, boolean, binary, peer_name=name, pairs=pairs)
    yield compare(
        "ZLPR", case, ours, margin, peer_name="MultiLabelSoftMarginLoss (another loss)", pairs=pairs
    )
    yield compare("ZLPR, label lists", case, sparse, binary, peer_name=name, pairs=pairs)
    if peer is not None:
        for name, step in (("bert4torch", same["bert4torch"]), ("bert4torch, lists", listed)):
            yield compare("ZLPR, label lists", case, sparse, step, peer_name=name, pairs=pairs)


def _recursion(logits: Tensor, target: Tensor) -> Tensor:
    """E_k <- E_k + e^s E_{k-1} in log space, class by class, without -inf in the gradient."""
    table = logits.new_zeros(len(logits), 1)
    size = int(target[0].sum())
    for score in logits.unbind(-1):
        grown = table[:, 1:], table[:, :-1] + score.unsqueeze(1)
        last = [] if table.shape[1] > size else [table[:, -1:] + score.unsqueeze(1)]
        table = torch.cat([table[:, :1], torch.logaddexp(*grown), *last], dim=1)
    return table[:, size] - (logits * target).sum(-1)


def _subset(batch: int, classes: int, labels: int, pairs: int) -> Row:
    logits, chosen = _data(batch, classes, labels)
    target = torch.zeros_like(logits, requires_grad=False).scatter_(-1, chosen, 1.0)
    ours = _step(SubsetSoftmax(labels), logits, target)
    peer = _step(_recursion, logits, target)
    torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-6)
    case = f"{batch} x {classes}, {labels} labels"
    name = "recursion over the classes, in torch"
    return compare("subset softmax", case, ours, peer, peer_name=name, pairs=pairs)


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:20} {row.case:26} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
