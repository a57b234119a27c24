"""What post 7302 and the paper claim of Adafactor: the factors, their bytes, and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.interfaces.optimizer import state_bytes
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_adafactor.adafactor import Adafactor

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["factoring", "training"]

_POST = "https://kexue.fm/archives/7302"
_PAPER = "https://arxiv.org/abs/1804.04235"
_SIDES = (64, 128, 256, 512, 1024)
_SHAPES: tuple[tuple[int, ...], ...] = ((1024, 1024), (2048, 512), (256, 256, 3, 3), (1024,))
_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adafactor": Adafactor,
    "Adafactor, largest": partial(Adafactor, factor_dims="largest", min_dim_to_factor=128),
    "torch Adafactor": torch.optim.Adafactor,
    "Adam": torch.optim.Adam,
}
_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_BATCHES = (8, 128)
_SETTING = (
    "Digits: 1197 images to train, 300 to choose the learning rate of each optimizer and seed, 300 "
    "to test; a perceptron 64-128-128-10, cross-entropy, no schedule."
)


# -- the factors ---------------------------------------------------------------------------------


def factoring(context: Context) -> Report:
    """Check what R Cᵀ / sum(R) is the best of, and count the bytes of the state."""
    claims = [_optimality(context), _rank_one(context)]
    grown = {name: [_bytes(make, (n, n)) for n in _SIDES] for name, make in _OPTIMIZERS.items()}
    ours, adam = (_exponent(grown[name]) for name in ("Adafactor", "Adam"))
    claims.append(
        Claim(
            "The state of an n × n matrix grows like n, where Adam's grows like n².",
            f"{_POST}, section “低秩分解”; {_PAPER}, section 3",
            f"bytes ∝ n^{ours:.3f}, Adam's ∝ n^{adam:.3f}, for n from {_SIDES[0]} to {_SIDES[-1]}; "
            f"at {_SIDES[-1]}, {grown['Adafactor'][-1] / _SIDES[-1] ** 2:.4f} bytes per parameter, "
            f"Adam's {grown['Adam'][-1] / _SIDES[-1] ** 2:.4f}.",
            "Exponents within 0.01 of 1 and 2.",
            abs(ours - 1) <= 0.01 and abs(adam - 2) <= 0.01,
        )
    )
    rows = [
        ["×".join(map(str, shape)), *(_bytes(make, shape) for make in _OPTIMIZERS.values())]
        for shape in _SHAPES
    ]
    return Report(
        claims,
        [Table("Bytes of state, float32", ["shape", *_OPTIMIZERS], rows)],
        [
            Figure(
                "Bytes of state of n × n matrices",
                partial(_plot_bytes, grown),
                "Adafactor's lines lie on one another.",
            )
        ],
        ["Counted are the tensors that an optimizer holds after a step."],
    )


def _divergence(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return Σ c log(c / ab) − c + ab."""
    product = torch.outer(rows, columns)
    return (matrix * (matrix / product).log() - matrix + product).sum()


def _optimality(context: Context) -> Claim:
    trials = context.pick(2000, 200)
    least = math.inf
    for seed in context.seeds:
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(20, 30, generator=generator, dtype=torch.float64).square()
        rows, columns = matrix.sum(1), matrix.sum(0) / matrix.sum()
        best = _divergence(matrix, rows, columns)
        for _ in range(trials):
            a, b = (
                1 + 0.01 * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
                for x in (rows, columns)
            )
            least = min(least, float(_divergence(matrix, rows * a, columns * b) - best))
    return Claim(
        "Row sums times column sums over the sum is the rank-1 matrix of least I-divergence.",
        f"{_POST}, section “广义KL散度”",
        f"{trials} changes of rows and columns by up to 1 % on each of three random squared "
        f"matrices: the divergence rises by {least:.3g} or more.",
        "It never falls.",
        least >= 0,
    )


def _rank_one(context: Context) -> Claim:
    """The first step is g / √V̂ = ±1 if V̂ is g² itself."""
    errors = []
    for seed in context.seeds:
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(n, generator=generator) for n in (40, 60))
        p = nn.Parameter(torch.zeros(40, 60))
        p.grad = torch.outer(left, right)
        Adafactor([p], lr=1.0, scale_parameter=False).step()
        errors.append(float((p.detach() + p.grad.sign()).abs().max()))
    return Claim(
        "The factored estimate is exact where the squared gradient has rank 1.",
        f"{_PAPER}, section 3",
        f"greatest difference of g/√V̂ from ±1 in float32: {max(errors):.2g}",
        "at most 2e-6",
        max(errors) <= 2e-6,
    )


def _bytes(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shape: tuple[int, ...]
) -> int:
    p = nn.Parameter(torch.ones(shape))
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    return state_bytes(optimizer)


def _exponent(sizes: Sequence[int]) -> float:
    """Return the slope of log bytes over log n between the ends."""
    return math.log(sizes[-1] / sizes[0]) / math.log(_SIDES[-1] / _SIDES[0])


def _plot_bytes(grown: dict[str, list[int]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, sizes in grown.items():
        axes.plot(_SIDES, sizes, "o-", label=name)
    axes.set(xlabel="n", ylabel="bytes", xscale="log", yscale="log")
    axes.legend()


# -- training --------------------------------------------------------------------------------------


def training(context: Context) -> Report:
    """Train on digits with Adafactor and Adam, and look at the steps on the way."""
    images = digits()
    x = torch.from_numpy(images.images).flatten(1)
    y = torch.from_numpy(images.labels)
    steps = context.pick(400, 100)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    plan = [
        (name, make, rates, batch)
        for batch in _BATCHES
        for name, make, rates in (
            ("Adafactor", Adafactor, context.pick(_RATES, (1e-2,))),
            ("Adam", torch.optim.Adam, context.pick(_ADAM_RATES, (3e-3,))),
        )
    ]
    with context.progress.task("digits", len(plan) * len(context.seeds)) as bar:
        for name, make, rates, batch in plan:
            for seed in context.seeds:
                tried = [
                    (*_train(x, y, seed, batch=batch, steps=steps, make=partial(make, lr=r)), r)
                    for r in rates
                ]
                _, test, rate = max(tried, key=lambda t: t[0])
                found.setdefault((name, batch), []).append((test, rate))
                bar.advance()
    clipped = [_ratios(x, y, seed, steps // 3, 1.0) for seed in context.seeds]
    free = [_ratios(x, y, seed, steps // 3, None) for seed in context.seeds]
    apart = [_apart(x, y, seed) for seed in context.seeds]
    large = max(_BATCHES)
    gaps = {b: _gap(found, b) for b in _BATCHES}
    claims = [
        Claim(
            f"Adafactor trains as well as Adam, each at its best rate (batches of {large}).",
            f"{_PAPER}, section 9; {_POST}",
            f"test accuracy after {steps} steps: Adafactor "
            f"{spread([a for a, _ in found['Adafactor', large]])}, Adam "
            f"{spread([a for a, _ in found['Adam', large]])}.",
            "On average at most 0.01 below.",
            gaps[large] <= 0.01,
        ),
        Claim(
            "Small batches harm Adafactor more than Adam, since factoring adds to their noise.",
            f"{_POST}, section “开源实现”",
            "accuracy of Adam less Adafactor's: "
            + ", ".join(f"{gaps[b]:+.4f} at batches of {b}" for b in _BATCHES),
            "More than 0.01 more at the smaller batch.",
            gaps[min(_BATCHES)] > gaps[large] + 0.01,
        ),
        Claim(
            "With d = 1, no update is larger than α max(ε₂, RMS(θ)).",
            f"{_POST}, section “AdaFactor完整版”; {_PAPER}, section 6",
            f"greatest RMS(update) / (α max(ε₂, RMS(θ))): {max(clipped):.8f}; without clipping "
            f"{spread(free)}.",
            "At most 1 + 1e-6 with clipping, above without.",
            max(clipped) <= 1 + 1e-6 < min(free),
        ),
        Claim(
            "The scale of the loss does not matter.",
            f"{_PAPER}, section 8",
            f"loss × 1000, 50 steps in float32: parameters differ by {max(apart):.2g}",
            "at most 1e-5",
            max(apart) <= 1e-5,
        ),
    ]
    rows = [
        [batch, name, spread([a for a, _ in runs]), ", ".join(f"{r:g}" for _, r in runs)]
        for (name, batch), runs in found.items()
    ]
    columns = ["batch", "optimizer", "test accuracy", "chosen rates"]
    return Report(claims, [Table("Digits", columns, rows)], notes=[_SETTING])


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def _train(
    x: Tensor,
    y: Tensor,
    seed: int,
    *,
    batch: int,
    steps: int,
    make: Callable[[Any], torch.optim.Optimizer],
) -> tuple[float, float]:
    """Return the accuracies on the validation and the test part."""
    model = _model(seed)
    optimizer = make(model.parameters())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, valid, test = torch.split(order, [len(x) - 600, 300, 300])
    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return float(right[valid].double().mean()), float(right[test].double().mean())


def _gap(found: dict[tuple[str, int], list[tuple[float, float]]], batch: int) -> float:
    pairs = zip(found["Adam", batch], found["Adafactor", batch], strict=True)
    return sum(a - b for (a, _), (b, _) in pairs) / len(found["Adam", batch])


def _ratios(x: Tensor, y: Tensor, seed: int, steps: int, clip: float | None) -> float:
    """Return the greatest RMS(update) / (α max(ε₂, RMS(θ))) of a run in float64."""
    model = _model(seed).double()
    optimizer = Adafactor(model.parameters(), lr=0.01, clip=clip)
    greatest = 0.0
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows].double()), y[rows]).backward()  # type: ignore[no-untyped-call]
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            update = float((p.detach() - old).square().mean().sqrt())
            greatest = max(greatest, update / (0.01 * max(1e-3, float(old.square().mean().sqrt()))))
    return greatest


def _apart(x: Tensor, y: Tensor, seed: int) -> float:
    """Return how far two runs are apart whose losses differ by a factor of 1000."""
    models = [_model(seed), _model(seed)]
    optimizers = [Adafactor(model.parameters()) for model in models]
    for _ in range(50):
        rows = torch.randint(len(x), (32,))
        for model, optimizer, scale in zip(models, optimizers, (1.0, 1000.0), strict=True):
            optimizer.zero_grad()
            loss = scale * nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
