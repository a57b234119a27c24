"""One optimizer step over a hundred tensors.

Peers: torch.optim.Adafactor, with and without foreach, and those of transformers and
pytorch_optimizer, if they are installed. All are given one learning rate, without momentum and
decay; torch's differs from ours in ε₁ only. One step of each is compared before the clock starts.

Floor: a step must read the gradient twice, read the parameter twice (its RMS, then the update) and
write it once, 20 bytes per number in float32. Ours moves some 44: g², its means over rows and over
columns, its bilinear form, g times rows, the sum, and the RMS of the parameter; torch's some 70.
Below a few thousand numbers per tensor both are bound by the calls: ours makes about 20 for a list
of tensors, and about 8 for each matrix in it, which is one stack where small shapes are alike.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, compare, transformer_shapes
from torch import nn

from kexue_adafactor import Adafactor

__all__ = ["rows"]

_RATE = 1e-3
Shapes = list[tuple[int, ...]]


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest case, and fewer pairs.
    """
    cases = {
        "small": _small(),
        "transformer": _transformer(),
        "all different": _different(),
        "large transformer": transformer_shapes(),
    }
    peers = list(_peers())
    pairs = 5 if quick else 15
    for name, shapes in list(cases.items())[:1] if quick else cases.items():
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        case = f"{name}: {len(shapes)} tensors, {numbers / 1e6:.2f} M numbers"
        ours, _ = _stepper(shapes, Adafactor, lr=_RATE)
        for peer_name, make, settings in peers:
            peer, _ = _stepper(shapes, make, **settings)
            _check(shapes, make, settings)
            yield compare("Adafactor", case, ours, peer, peer_name=peer_name, pairs=pairs)


def _peers() -> Iterator[tuple[str, Callable[..., torch.optim.Optimizer], dict[str, Any]]]:
    for foreach in (True, False):
        name = f"torch.optim.Adafactor, foreach={foreach}"
        yield name, torch.optim.Adafactor, {"lr": _RATE, "foreach": foreach}
    # pytorch_optimizer has a first moment unless told not to, and caps β̂ at the second beta
    fixed = {"lr": _RATE, "relative_step": False, "scale_parameter": True}
    others: dict[str, tuple[str, str, dict[str, Any]]] = {
        "transformers.Adafactor": ("transformers.optimization", "Adafactor", fixed),
        "pytorch_optimizer.AdaFactor": (
            "pytorch_optimizer", "AdaFactor", {**fixed, "betas": (None, 0.999)},
        ),
    }  # fmt: skip
    for name, (module, attribute, settings) in others.items():
        try:
            theirs = getattr(importlib.import_module(module), attribute)
        except ImportError:
            print(f"adafactor: {module} is not installed, its rows are left out.", file=sys.stderr)
            continue
        yield name, theirs, settings


def _small() -> Shapes:
    """Five shapes, twenty times each."""
    return [(32, 32), (32,), (16, 16, 3, 3), (64, 32), ()] * 20


def _transformer() -> Shapes:
    """Six layers of width 256 with embeddings."""
    norm: Shapes = [(256,), (256,)]
    linear: Shapes = [(256, 256), (256,)]
    layer = [*norm, *linear * 4, *norm, (1024, 256), (1024,), (256, 1024), (256,)]
    return [(2000, 256), *layer * 6, *norm, (2000,)]


def _different() -> Shapes:
    """Fifty matrices, 25 vectors and 25 kernels of convolutions; hardly a shape twice."""
    generator = torch.Generator().manual_seed(0)
    sides = [16, 32, 64, 128, 256, 384, 512]

    def side() -> int:
        return sides[int(torch.randint(len(sides), (), generator=generator))]

    shapes: Shapes = []
    for _ in range(25):
        shapes += [(side(), side()), (side(),), (side(), side()), (side() // 4, side() // 4, 3, 3)]
    return shapes


def _stepper(
    shapes: Shapes, make: Callable[..., torch.optim.Optimizer], **settings: Any
) -> tuple[Callable[[], object], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return make(parameters, **settings).step, parameters


def _check(
    shapes: Shapes, make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    """Compare the parameters after one step."""
    ours, found = _stepper(shapes, Adafactor, lr=_RATE)
    theirs, wanted = _stepper(shapes, make, **settings)
    ours()
    theirs()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.case:46} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
