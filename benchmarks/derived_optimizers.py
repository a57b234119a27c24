"""One step over a transformer of 25 M numbers: derived beside its base, LAMB beside its peers.

A derivation is compared with its own base: the ratio is the base's time over ours, 0.87 where ours
takes 15 % more. Windows and cycles are compared with as many steps of the base. Peers of whole
compositions are torch.optim.AdamW and, if it is installed, pytorch_optimizer, with its settings
nearest to ours: its Lamb clips ‖θ‖ at 10 and divides the rate by 1 − β₁ᵗ, its LARS has the ratio
before the momentum and none for vectors.

Floor, in bytes per number (float32). Fused Adam reads θ, g, m and v and writes θ, m and v: 28.
Weight decay is done within, 0 more; where parameters of a group are excluded, 8. A schedule: 0.
Lookahead: 16 every k-th step. A window of k: 12 per call. Layer adaptation has to have all of u
before it scales it. On a CPU it walks buckets of 2 M numbers, or one tensor, with one u for all,
which stays in a cache: beside Adam's own 20 bytes (its θ is u) θ is read and written, 28 in all, as
many as Adam's. Bytes are not what it waits for then: clearing u, two norms and the scaled sum are
as many numbers from the cache, and take longer than Adam. Around SGD with momentum u is SGD's
buffer: one tensor after the other, a sum into it, two dot products, a sum into θ, which reads and
writes what SGD does, 20 bytes; torch's operations for it, called one by one on tensors at hand, are
a row of their own. Weight decay multiplies θ where that is read anyway. Peak memory beyond the
base's stands in the case, 99 MB being one number for each: u of a bucket for layer adaptation, the
sums of a window, the slow weights.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, compare, peak_megabytes, transformer_shapes
from torch import nn

from kexue_derived_optimizers import (
    LAMB,
    LARS,
    AdamWLR,
    with_grad_accumulation,
    with_layer_adaptation,
    with_lookahead,
    with_piecewise_linear_lr,
    with_weight_decay,
)

__all__ = ["rows"]

Make = Callable[..., torch.optim.Optimizer]
_RATE = 1e-3
_ADAM: Any = torch.optim.Adam
_SGD: Any = torch.optim.SGD
_DERIVED: dict[str, Callable[[Any], Make]] = {
    "with_weight_decay": with_weight_decay,
    "with_piecewise_linear_lr": partial(with_piecewise_linear_lr, lr_schedule={1000: 1.0}),
    "with_layer_adaptation": with_layer_adaptation,
}
_IN_CYCLES: dict[str, tuple[Callable[[Any], Make], int]] = {  # calls differ: how many are a cycle
    "with_lookahead": (partial(with_lookahead, slow_steps=5), 5),
    "with_grad_accumulation": (partial(with_grad_accumulation, grad_accum_steps=4), 4),
}
_HOW: dict[str, dict[str, Any]] = {
    "default": {},  # one tensor after the other, on a CPU
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: A smaller transformer, and fewer pairs.
    """
    shapes = transformer_shapes(96, 2, 500) if quick else transformer_shapes()
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    size = f"{len(shapes)} tensors, {numbers / 1e6:.2f} M numbers"
    settings: dict[str, Any] = {"pairs": 5 if quick else 11, "budget_s": 6.0}
    for how, options in _HOW.items():
        yield from _derived(_ADAM, "Adam", how, options, shapes, size, settings)
        adamw = _stepper(shapes, torch.optim.AdamW, **options)
        ours = _stepper(shapes, AdamWLR, **options)
        peer_name = f"torch.optim.AdamW, {how}"
        yield compare("AdamWLR", f"{how}: {size}", ours, adamw, peer_name=peer_name, **settings)
    options = {"momentum": 0.9}
    yield from _derived(_SGD, "SGD with momentum", "default", options, shapes, size, settings)
    ours, plain = (_stepper(shapes, b, **options) for b in (with_layer_adaptation(_SGD), _SGD))
    bare = _bare(shapes, options["momentum"])
    peer_name = "its operations on SGD's buffers, one by one"
    yield compare("with_layer_adaptation", size, ours, bare, peer_name=peer_name, **settings)
    case = f"those operations: {size}"
    peer_name = "torch.optim.SGD with momentum, default"
    yield compare("with_layer_adaptation", case, bare, plain, peer_name=peer_name, **settings)
    try:
        peers = importlib.import_module("pytorch_optimizer")
    except ImportError:
        print("derived-optimizers: pytorch_optimizer is not installed.", file=sys.stderr)
        return
    theirs = _stepper(shapes, peers.Lamb, weight_decay=0.01, weight_decouple=False)
    for how, options in _HOW.items():
        ours = _stepper(shapes, LAMB, **options)
        peer_name = "pytorch_optimizer.Lamb, foreach"
        yield compare("LAMB", f"{how}: {size}", ours, theirs, peer_name=peer_name, **settings)
    theirs = _stepper(shapes, peers.LARS)
    for how, options in _HOW.items():
        ours = _stepper(shapes, LARS, **options)
        peer_name = "pytorch_optimizer.LARS, foreach"
        yield compare("LARS", f"{how}: {size}", ours, theirs, peer_name=peer_name, **settings)


def _derived(  # noqa: PLR0917 -- what there is to vary
    base: Any,
    name: str,
    how: str,
    options: dict[str, Any],
    shapes: list[tuple[int, ...]],
    size: str,
    settings: dict[str, Any],
) -> Iterator[Row]:
    """Yield the derivations of a base beside it."""
    plain = _stepper(shapes, base, **options)
    peer = f"torch.optim.{name}, {how}"
    held = peak_megabytes(_cycle, shapes, base, options, 1)
    for task, derive in _DERIVED.items():
        make = derive(base)
        ours = _stepper(shapes, make, **options)
        more = peak_megabytes(_cycle, shapes, make, options, 1) - held
        case = f"{how}: {size}, {more:+.0f} MB"
        yield compare(task, case, ours, plain, peer_name=peer, **settings)
    for task, (derive, calls) in _IN_CYCLES.items():
        make = derive(base)
        more = peak_megabytes(_cycle, shapes, make, options, calls) - held
        yield compare(
            task,
            f"{how}, {calls} calls: {size}, {more:+.0f} MB",
            partial(_repeat, _stepper(shapes, make, **options), calls),
            partial(_repeat, plain, calls),
            peer_name=peer,
            **settings,
        )


def _repeat(step: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        step()


def _cycle(
    shapes: list[tuple[int, ...]], make: Make, options: dict[str, Any], calls: int
) -> Callable[[], object]:
    """Return the first steps, in which all memory is taken."""
    return partial(_repeat, _stepper(shapes, make, **options), calls)


def _bare(shapes: list[tuple[int, ...]], momentum: float) -> Callable[[], object]:
    """Return the steps of layer adaptation over SGD, without any optimizer around them."""
    optimizer: Any = _stepper(shapes, torch.optim.SGD, momentum=momentum)
    optimizer()
    own = optimizer.__self__
    params = own.param_groups[0]["params"]
    rows = [(p.grad, own.state[p]["momentum_buffer"], p.detach()) for p in params]

    def step() -> None:
        for grad, buffer, p in rows:
            torch.add(grad, buffer, alpha=momentum, out=buffer)
            squares = [torch.dot(x.view(-1), x.view(-1)).item() for x in (buffer, p)]
            p.add_(buffer, alpha=-_RATE * math.sqrt(squares[1] / squares[0]))

    return step


def _stepper(shapes: list[tuple[int, ...]], make: Make, **settings: Any) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(0.05 * torch.randn(s, generator=generator)) for s in shapes]
    for p in parameters:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return make(parameters, lr=_RATE, **settings).step


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:25} {row.case:46} {row.ours_ms:8.2f} ms  {row.peer_ms:8.2f} ms  "
            f"x{row.ratio:5.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
