"""One step of AdaX over the parameters of a transformer.

Peers: the arithmetic of the paper's code, tensor by tensor with the growing v, in calls that torch
still takes; torch.optim.Adam, which has as much to read and write, fused and foreach.
pytorch_optimizer 4.1.0 has no AdaX. One step of the arithmetic is compared before the clock starts.

Floor: a step must read parameter, gradient and two moments and write all but the gradient, 28 bytes
per number in float32, as fused Adam does. Ours with ε beside the root is that; inside, one addition
to v̂ makes it 36. By lists it is some 80, of which the caches serve most.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, compare, transformer_shapes
from torch import Tensor, nn

from kexue_adax import AdaX

__all__ = ["rows"]

_RATE = 1e-3
Shapes = list[tuple[int, ...]]
_OURS: dict[str, dict[str, Any]] = {
    "AdaX": {},
    "AdaX, ε outside": {"eps_mode": "outside"},
    "AdaX, lists": {"foreach": True},
}


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest case, and fewer pairs.
    """
    cases = {"small": [(32, 32), (32,), (64, 32), ()] * 25, "transformer": transformer_shapes()}
    pairs = 5 if quick else 15
    for name, shapes in list(cases.items())[:1] if quick else cases.items():
        _check(shapes)
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        case = f"{name}: {len(shapes)} tensors, {numbers / 1e6:.2f} M numbers"
        for task, settings in _OURS.items():
            for peer_name, make in _peers().items():
                ours, _ = _stepper(shapes, partial(AdaX, lr=_RATE, **settings))
                peer, _ = _stepper(shapes, make)
                yield compare(task, case, ours, peer, peer_name=peer_name, pairs=pairs)


def _peers() -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    return {
        "the paper's arithmetic, in a loop": _Growing,
        "torch.optim.Adam, foreach=True": partial(torch.optim.Adam, lr=_RATE, foreach=True),
        "torch.optim.Adam, fused=True": partial(torch.optim.Adam, lr=_RATE, fused=True),
    }


class _Growing:
    """AdaX with the growing v, tensor by tensor, in place."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        rate = _RATE * math.sqrt(1.0001**self.t - 1)
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            m.mul_(0.9).add_(gradient, alpha=0.1)
            v.mul_(1.0001).addcmul_(gradient, gradient, value=1e-4)
            p.addcdiv_(m, v.sqrt().add_(1e-12), value=-rate)


def _stepper(
    shapes: Shapes, make: Callable[[list[nn.Parameter]], Any]
) -> tuple[Callable[[], object], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return make(parameters).step, parameters


def _check(shapes: Shapes) -> None:
    """Compare the parameters after two steps, with an ε that is not seen."""
    found: list[list[Tensor]] = []
    makes: list[Callable[[list[nn.Parameter]], Any]] = [
        partial(AdaX, lr=_RATE, **{**settings, "eps": 1e-20}) for settings in _OURS.values()
    ]
    for make in (*makes, _Growing):
        step, parameters = _stepper(shapes, make)
        step()
        step()
        found.append([p.detach() for p in parameters])
    for one in found[:-1]:
        torch.testing.assert_close(one, found[-1], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:16} {row.case:42} {row.ours_ms:8.3f} ms  {row.peer_ms:8.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
