"""Lookahead around fused Adam, and lazy Adam on a table of which a batch touches a part.

Peers: pytorch_optimizer.Lookahead around the same Adam, if it is installed, and that Adam alone,
on 25 M numbers in 147 tensors; for lazy updates torch.optim.SparseAdam, dense Adam (fused and
foreach), and a loop that masks the rows of dense Adam, on 100 000 rows of 64.

Floor of Lookahead: fused Adam reads and writes 28 bytes per number in float32; every k steps 16
more, both weights read and written once, for k = 5 three bytes a step or 11 %. Of lazy updates: 28
bytes per number of the touched rows; ours moves some 90, and finds each row once for each of
parameter and moments.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, compare, transformer_shapes
from torch import Tensor, nn

from kexue_lookahead import Lazy, with_lazy, with_lookahead

__all__ = ["rows"]

_ROWS, _WIDTH, _IDS = 100_000, 64, 2048
Make = Callable[[Any], torch.optim.Optimizer]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Smaller cases, and fewer pairs.
    """
    pairs = 5 if quick else 15
    shapes = transformer_shapes(width=64, vocabulary=1000) if quick else transformer_shapes()
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    case = f"{len(shapes)} tensors, {numbers / 1e6:.2f} M numbers"
    adam: Make = partial(torch.optim.Adam, lr=1e-3, fused=True)
    # a call is a cycle, so that each has its share of mixing
    ours = _cycle(shapes, partial(with_lookahead("adam"), lr=1e-3, fused=True))
    peers: list[tuple[str, Make]] = [("torch.optim.Adam, fused", adam), *_peers(adam)]
    for name, make in peers:
        peer = _cycle(shapes, make)
        yield compare("Lookahead", f"5 steps: {case}", ours, peer, peer_name=name, pairs=pairs)
    count = _ROWS // 10 if quick else _ROWS
    case = f"{count} × {_WIDTH}, {_IDS} ids"
    lazy = _table(count, partial(Lazy, lr=1e-3), sparse=True)
    dense = _table(count, partial(Lazy, lr=1e-3), sparse=False)
    sparse_adam: Make = partial(torch.optim.SparseAdam, lr=1e-3)
    others: list[tuple[str, Make]] = [
        ("torch.optim.Adam, fused (not lazy)", adam),
        ("torch.optim.Adam, foreach (not lazy)", partial(torch.optim.Adam, lr=1e-3, foreach=True)),
        ("with_lazy(Adam), fused", partial(with_lazy("adam"), lr=1e-3, fused=True)),
        ("a dense loop", _Masked),
    ]
    yield compare(
        "Lazy",
        f"sparse gradient: {case}",
        lazy,
        _table(count, sparse_adam, sparse=True),
        peer_name="torch.optim.SparseAdam (moments frozen)",
        pairs=pairs,
    )
    for name, make in others:
        peer = _table(count, make, sparse=False)
        for kind, step in (("sparse", lazy), ("dense", dense)):
            told = f"{kind} gradient: {case}"
            yield compare("Lazy", told, step, peer, peer_name=name, pairs=pairs)


def _peers(adam: Make) -> Iterator[tuple[str, Make]]:
    try:
        theirs = importlib.import_module("pytorch_optimizer").Lookahead
    except ImportError:
        print("lookahead: pytorch_optimizer is not installed, left out.", file=sys.stderr)
        return
    yield "pytorch_optimizer.Lookahead", lambda params: theirs(adam(params), k=5, alpha=0.5)


class _Masked(torch.optim.Optimizer):
    """Adam on all rows, whose updates are multiplied by whether the gradient is there."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
            state["step"] += 1
            m, v, t = state["m"], state["v"], state["step"]
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            seen = p.grad.ne(0).any(1, keepdim=True)
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            p.sub_(1e-3 * update * seen)


def _cycle(shapes: list[tuple[int, ...]], make: Make) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    step = make(parameters).step

    def five() -> None:
        for _ in range(5):
            step()

    return five


def _table(count: int, make: Make, *, sparse: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(count, _WIDTH, generator=generator))
    ids = torch.randint(count, (_IDS,), generator=generator)
    values = torch.randn(_IDS, _WIDTH, generator=generator)
    gradient = torch.sparse_coo_tensor(ids[None], values, weight.shape, check_invariants=True)
    weight.grad = gradient if sparse else gradient.to_dense()
    return make([weight]).step


def _check() -> None:
    """Compare Lazy with the dense loop."""
    found: list[Tensor] = []
    for make, sparse in ((partial(Lazy, lr=1e-3), True), (_Masked, False)):
        step: Any = _table(1000, make, sparse=sparse)
        step()
        step()
        found.append(step.__self__.param_groups[0]["params"][0].detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    _check()
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:10} {row.case:42} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
