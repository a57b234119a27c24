"""Attention over a long sequence: eight heads of 64 features, 64 landmarks.

Peers: lucidrains' nystrom-attention, if it is installed, and torch's scaled_dot_product_attention,
which is exact. The heads alone are measured, forward and with the gradient, and the layer with
its projections, whose cost is the same for both. One head of ours and of lucidrains' is compared
before the clock starts (with several, its scaling depends on all of them).

Floor: four products of 2 n m d operations, where the peer has five, two softmaxes over n m numbers,
one pass over queries and keys for the landmarks, and 24 products of 2 m³ for the pseudo-inverse.
Below a thousand positions the last are a quarter of the time, and the same in both. The gradient
adds ten products of the first kind, two of them the scores formed anew, and 48 of the second; the
peer, which keeps its scores, ten and 48.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, compare, peak_megabytes
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_nystromformer import NystromAttention, nystrom_attention

__all__ = ["rows"]

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_HEADS, _WIDTH, _LANDMARKS = 8, 64, 64
_PEER = "nystrom-attention (lucidrains)"
_EXACT = "scaled_dot_product_attention"
_How = Callable[[Callable[[Tensor], Tensor], Tensor], Callable[[], object]]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the shortest length, and fewer pairs.
    """
    try:
        peer = importlib.import_module("nystrom_attention").NystromAttention
    except ImportError:
        print("nystromformer: nystrom-attention is not installed.", file=sys.stderr)
        peer = None
    pairs = 5 if quick else 15
    if peer is not None:
        _check(peer)
    for length in _LENGTHS[:1] if quick else _LENGTHS:
        joined = torch.randn(1, length, 3 * _HEADS * _WIDTH)
        case = f"1 x {length}, {_HEADS} heads"
        if peer is not None:
            theirs = _bare(peer, _HEADS)
            for task, how in (("attention", _forward), ("attention, gradient", _gradient)):
                ours = how(_ours, joined)
                held = _memory(case, how, length, "peer")
                yield compare(task, held, ours, how(theirs, joined), peer_name=_PEER, pairs=pairs)
            yield compare("layer", case, *_layers(peer, length), peer_name=_PEER, pairs=pairs)
        ours, exact = _forward(_ours, joined), _forward(_exact, joined)
        few = min(pairs, max(5, 40960 // length))  # a call takes seconds at the end
        held = _memory(case, _forward, length, "exact")
        yield compare("attention", held, ours, exact, peer_name=_EXACT, pairs=few, warmup=1)
        if length <= 4096:  # the gradient of the exact one takes seconds beyond
            ours, exact = _gradient(_ours, joined), _gradient(_exact, joined)
            task, held = "attention, gradient", _memory(case, _gradient, length, "exact")
            yield compare(task, held, ours, exact, peer_name=_EXACT, pairs=pairs)


def _split(joined: Tensor) -> list[Tensor]:
    return [torch.unflatten(x, 2, (-1, _WIDTH)).transpose(1, 2) for x in joined.chunk(3, 2)]


def _ours(joined: Tensor) -> Tensor:
    query, key, value = _split(joined)
    out = nystrom_attention(query, key, value, num_landmarks=_LANDMARKS)
    return out.transpose(1, 2).flatten(2)


def _exact(joined: Tensor) -> Tensor:
    query, key, value = _split(joined)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _bare(peer: Callable[..., Any], heads: int) -> Callable[[Tensor], Tensor]:
    """Return the peer without its projections, of queries, keys and values side by side."""
    width = heads * _WIDTH
    module: Any = peer(width, _WIDTH, heads, num_landmarks=_LANDMARKS, residual=False)
    module.to_qkv = module.to_out = nn.Identity()
    found: Callable[[Tensor], Tensor] = module
    return found


def _forward(attention: Callable[[Tensor], Tensor], joined: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: attention(joined))


def _gradient(attention: Callable[[Tensor], Tensor], joined: Tensor) -> Callable[[], object]:
    leaf = joined.clone().requires_grad_()
    upstream = torch.randn(*joined.shape[:2], joined.shape[2] // 3)

    def step() -> None:
        leaf.grad = None
        attention(leaf).backward(upstream)  # type: ignore[no-untyped-call]

    return step


def _memory(case: str, how: _How, length: int, peer: str) -> str:
    """Add to the case how much memory a call takes beyond its inputs."""
    ours, theirs = (peak_megabytes(_prepared, how, who, length) for who in ("ours", peer))
    return f"{case}: {ours:.0f} MB, peer {theirs:.0f} MB"


def _prepared(how: _How, who: str, length: int) -> Callable[[], object]:
    if who == "peer":
        attention = _bare(importlib.import_module("nystrom_attention").NystromAttention, _HEADS)
    else:
        attention = _ours if who == "ours" else _exact
    how(attention, torch.randn(1, _LANDMARKS + 1, 3 * _HEADS * _WIDTH))()  # what is made once
    return how(attention, torch.randn(1, length, 3 * _HEADS * _WIDTH))


def _layers(
    peer: Callable[..., Any], length: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    width = _HEADS * _WIDTH
    features = torch.randn(1, length, width)
    ours = NystromAttention(width, _HEADS, num_landmarks=_LANDMARKS)
    theirs = peer(width, _WIDTH, _HEADS, num_landmarks=_LANDMARKS, residual=False)
    return _forward(ours, features), _forward(theirs, features)


def _check(peer: Callable[..., Any]) -> None:
    joined = torch.randn(1, 1024, 3 * _WIDTH)
    torch.testing.assert_close(_ours(joined), _bare(peer, 1)(joined), rtol=0, atol=1e-5)


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:20} {row.case:20} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}",
            flush=True,
        )
