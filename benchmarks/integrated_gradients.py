"""Integrated gradients of a perceptron and convolutions on digits, and of a text classifier.

Peer: captum. Its default is 50 Gauss–Legendre nodes; ours takes as many, and their values are
compared before the clock starts. In the rows of equal error captum takes 50 steps of the paper's
sum, and ours the fewest nodes whose mean completeness error is not larger, found before the clock
starts; both errors, over the mean difference of the outputs, stand in the case. Both return the
completeness error. A loop over the steps, as in the post's script, is there for scale.

Floor: n forward and backward passes of each row, and the two forward passes of the error, which are
points of the same pass where all fit into it. With convolutions ours is within a tenth of it, so
that at equal nodes little can be gained; a small perceptron is bound by memory, where captum
repeats, scales and stacks all points of all rows.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import Row, compare
from torch import Tensor, nn

from kexue.core.lab.data import digits
from kexue_integrated_gradients import Attributions, integrated_gradients

__all__ = ["rows"]

_STEPS = 50


class Case(NamedTuple):
    """A model, what it is applied to, and what is explained.

    Args:
        name: What to call it.
        model: The model.
        x: The inputs.
        target: The output of each row.
        layer: The layer to attribute to.
    """

    name: str
    model: nn.Sequential
    x: Tensor
    target: Tensor
    layer: str | None = None


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Only the smallest case, and fewer pairs.
    """
    cases = [_perceptron(1), _perceptron(397), _convolutions(64), _text()]
    pairs = 5 if quick else 15
    for case in cases[:1] if quick else cases:
        ours = partial(_ours, case, _STEPS)
        name = f"{case.name}, {_STEPS} nodes each"
        theirs, paper = _captum(case, "gausslegendre"), _captum(case, "riemann_right")
        if theirs is not None and paper is not None:
            _check(case, theirs)
            yield compare(
                "integrated gradients", name, ours, theirs, peer_name="captum", pairs=pairs
            )
            yield _at_equal_error(case, paper, pairs)
        if case.layer is None:
            yield compare(
                "integrated gradients",
                name,
                ours,
                partial(_loop, case, _STEPS),
                peer_name="a loop over the steps",
                pairs=pairs,
            )


def _at_equal_error(case: Case, peer: Callable[[], tuple[Tensor, Tensor]], pairs: int) -> Row:
    _, delta = peer()
    wanted = float(delta.abs().mean())
    steps = next(n for n in range(2, 4 * _STEPS) if _error(case, n) <= wanted)
    difference = _ours(case, _STEPS)
    scale = float((difference.outputs - difference.baseline_outputs).abs().mean())
    return compare(
        "integrated gradients",
        f"{case.name}, equal error: {steps} nodes ({_error(case, steps) / scale:.1e}), "
        f"{_STEPS} of the sum ({wanted / scale:.1e})",
        partial(_ours, case, steps),
        peer,
        peer_name="captum",
        pairs=pairs,
    )


def _error(case: Case, steps: int) -> float:
    return float(_ours(case, steps).error.abs().mean())


def _ours(case: Case, steps: int) -> Attributions:
    return integrated_gradients(
        case.model, case.x, target=case.target, layer=case.layer, steps=steps, tolerance=9.0
    )


def _captum(case: Case, method: str) -> Callable[[], tuple[Tensor, Tensor]] | None:
    try:
        attr = importlib.import_module("captum.attr")
    except ImportError:
        print("integrated gradients: captum is not installed, it is left out.", file=sys.stderr)
        return None
    settings: dict[str, Any] = {
        "target": case.target,
        "n_steps": _STEPS,
        "method": method,
        "return_convergence_delta": True,
    }
    if case.layer is None:
        method_of = attr.IntegratedGradients(case.model)
        return lambda: method_of.attribute(case.x, **settings)
    method_of = attr.LayerIntegratedGradients(case.model, case.model.get_submodule(case.layer))
    return lambda: method_of.attribute(case.x, torch.zeros_like(case.x), **settings)


def _loop(case: Case, steps: int) -> Tensor:
    """One step of the midpoint sum at a time."""
    total = torch.zeros_like(case.x)
    for k in range(steps):
        point = ((k + 0.5) / steps * case.x).requires_grad_()
        out = case.model(point).gather(1, case.target[:, None])
        total += torch.autograd.grad(out.sum(), point)[0]
    return case.x * total / steps


def _check(case: Case, peer: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Compare the values and the errors."""
    ours, (values, delta) = _ours(case, _STEPS), peer()
    top = float(values.abs().max())
    torch.testing.assert_close(ours.values, values, rtol=1e-4, atol=1e-5 * top)
    torch.testing.assert_close(ours.error, delta.to(ours.error), rtol=1e-2, atol=1e-4 * top)


def _perceptron(batch: int) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    name = f"perceptron 64-128-128-10, {batch} digit{'s' * (batch > 1)}"
    return _on_digits(name, model, batch)


def _convolutions(batch: int) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )
    return _on_digits(f"convolutions 16-32, {batch} digits", model, batch)


def _on_digits(name: str, model: nn.Sequential, batch: int) -> Case:
    """Train on the first digits, and explain some of the last."""
    data = digits()
    x, y = torch.from_numpy(data.images)[:, None], torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        chosen = torch.randint(1400, (128,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Case(name, model.eval(), x[1400 : 1400 + batch], y[1400 : 1400 + batch])


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _text() -> Case:
    """Token ids with a zero vector for id 0, which both take as the baseline."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.GELU(), _Mean(), nn.Linear(128, 2)]
    model = nn.Sequential(nn.Embedding(1000, 64, padding_idx=0), *layers)
    ids, target = torch.randint(1, 1000, (32, 40)), torch.randint(2, (32,))
    return Case("text, 32 rows of 40 tokens", model.eval(), ids, target, layer="0")


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.case:100} {row.ours_ms:9.3f} ms  {row.peer_ms:9.3f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
