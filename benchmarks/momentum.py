"""One optimizer step over the parameters of a transformer: momentum, Nesterov's, and descent.

Peers: torch.optim.SGD in its default, foreach and fused forms, and SGD of pytorch_optimizer, if it
is installed, at the same rates. Parameters are compared after three steps before the clock starts.

Floor: a step of momentum must read gradient, velocity and parameter and write the latter two, 20
bytes per number in float32, which torch's fused kernel does. Ours moves 24, torch's foreach form
32; of Nesterov's method ours moves 36, torch's foreach form 44. State: 4 bytes per number, of all;
the peak of the first step, state included, stands in the case.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, compare, peak_megabytes, transformer_shapes
from torch import nn

from kexue_momentum import HalfNesterov, Momentum, Nesterov

__all__ = ["rows"]

_RATE, _MOMENTUM = 1e-3, 0.9
Shapes = list[tuple[int, ...]]
Make = Callable[..., torch.optim.Optimizer]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: A smaller transformer, and fewer pairs.
    """
    shapes = transformer_shapes(64, 2, 500) if quick else transformer_shapes()
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    size = f"transformer: {len(shapes)} tensors, {numbers / 1e6:.2f} M numbers"
    pairs = 5 if quick else 15
    for task, make, nesterov in (("momentum", Momentum, False), ("nesterov", Nesterov, True)):
        case = f"{size}, ours {peak_megabytes(_stepper, shapes, make):.0f} MB"
        for name, peer in _peers(nesterov=nesterov):
            _check(shapes, make, peer)
            ours, theirs = _stepper(shapes, make), _stepper(shapes, peer)
            yield compare(task, case, ours, theirs, peer_name=name, pairs=pairs)
    ours = _stepper(shapes, HalfNesterov)
    case = f"{size}, ours {peak_megabytes(_stepper, shapes, HalfNesterov):.0f} MB"
    foreach = dict(_peers(nesterov=True))["torch.optim.SGD, foreach"]
    name = "torch.optim.SGD, foreach, nesterov"
    yield compare("half-nesterov", case, ours, _stepper(shapes, foreach), peer_name=name)


def _peers(*, nesterov: bool) -> Iterator[tuple[str, Make]]:
    def torchs(**how: Any) -> Make:
        return lambda params, lr, momentum: torch.optim.SGD(
            params, lr, momentum, nesterov=nesterov, **how
        )

    yield "torch.optim.SGD", torchs()
    yield "torch.optim.SGD, foreach", torchs(foreach=True)
    yield "torch.optim.SGD, fused", torchs(fused=True)
    try:
        theirs = importlib.import_module("pytorch_optimizer").SGD
    except ImportError:
        print("momentum: pytorch_optimizer is not installed, its rows are left out.")
        return
    yield (
        "pytorch_optimizer.SGD",
        lambda params, lr, momentum: theirs(params, lr=lr, momentum=momentum, nesterov=nesterov),
    )


def _parameters(shapes: Shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def _stepper(shapes: Shapes, make: Make) -> Callable[[], object]:
    return make(_parameters(shapes), _RATE, _MOMENTUM).step


def _check(shapes: Shapes, ours: Make, theirs: Make) -> None:
    """Compare the parameters after three steps with fresh gradients."""
    found = []
    for make in (ours, theirs):
        parameters = _parameters(shapes[1:15])
        optimizer = make(parameters, _RATE, _MOMENTUM)
        for _ in range(3):
            for p in parameters:
                p.grad = p.detach().clone()
            optimizer.step()
        found.append(parameters)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:14} {row.case:42} {row.ours_ms:8.2f} ms  {row.peer_ms:8.2f} ms  "
            f"x{row.ratio:5.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
