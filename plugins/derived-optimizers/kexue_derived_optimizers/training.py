"""What the papers behind post 7094 promise for training, tried on digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_derived_optimizers.compositions import LAMB
from kexue_derived_optimizers.weight_decay import with_weight_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["training"]

_POST = "https://kexue.fm/archives/7094"
_DECAY_PAPER = "https://arxiv.org/abs/1711.05101"
_LAMB_PAPER = "https://arxiv.org/abs/1904.00962"
_FEW = 150  # images to train on where overfitting is looked at
_SETTING = (
    "Digits, a perceptron 64-64-10, no schedule. Of 1797 images 300 choose λ or the rate for each "
    "seed, 300 test. Weight decay and L2: 150 images as one batch, Adam at 0.003. LAMB and AdamW: "
    "1197 images as one batch, λ = 0.01."
)

Make = Callable[[Any], torch.optim.Optimizer]


def training(context: Context) -> Report:
    """Compare weight decay with L2 on few images, and LAMB with AdamW on all as one batch."""
    images = digits()
    x = torch.from_numpy(images.images).flatten(1)
    y = torch.from_numpy(images.labels)
    against_l2 = _against_l2(context, x, y)
    against_adam = _against_adam(context, x, y)
    losses = {
        name: [min(runs, key=lambda r: r[1])[2] for runs in seeds]
        for name, seeds in {**against_l2, **against_adam}.items()
    }
    decay, l2, lamb, adam = losses.values()
    claims = [
        Claim(
            "Weight decay prevents overfitting better than L2 in Adam, each at its best λ.",
            f"{_POST}, section “权重衰减”; {_DECAY_PAPER}",
            f"test loss in nats: weight decay {spread(decay)}, L2 {spread(l2)}",
            "A lower mean.",
            sum(decay) < sum(l2),
        ),
        Claim(
            "LAMB beats Adam at large batches (all images as one), each at its best rate.",
            f"{_POST}, section “层自适应”; {_LAMB_PAPER}",
            f"test loss in nats: LAMB {spread(lamb)}, AdamW {spread(adam)}",
            "A lower mean.",
            sum(lamb) < sum(adam),
        ),
    ]
    rows = [
        [name, value, spread([runs[i][2] for runs in seeds])]
        for name, seeds in {**against_l2, **against_adam}.items()
        for i, (value, *_) in enumerate(seeds[0])
    ]
    return Report(
        claims,
        [Table("Test loss, nats", ["optimizer", "λ or rate", "over three seeds"], rows)],
        [
            Figure(
                "Test loss by λ, and by rate",
                partial(_plot, [against_l2, against_adam]),
                "Means over seeds; left 150 images, right all images as one batch.",
            )
        ],
        [_SETTING],
    )


Runs = Mapping[str, list[list[tuple[float, float, float]]]]
"""For each optimizer and seed: what was tried, and its losses on validation and test part."""


def _against_l2(context: Context, x: Tensor, y: Tensor) -> Runs:
    rates = context.pick((0.0, 0.001, 0.003, 0.01, 0.03), (0.0, 0.01))
    decays = context.pick((0.0, 0.1, 0.3, 1.0, 3.0), (0.0, 0.3))
    decayed: Any = with_weight_decay(torch.optim.Adam)
    tried: dict[str, list[tuple[float, Make]]] = {
        "weight decay": [(d, partial(decayed, lr=3e-3, weight_decay_rate=d)) for d in decays],
        "L2": [(d, partial(torch.optim.Adam, lr=3e-3, weight_decay=d)) for d in rates],
    }
    return _all(context, tried, (x, y), rows=_FEW, steps=context.pick(200, 60))


def _against_adam(context: Context, x: Tensor, y: Tensor) -> Runs:
    lamb_rates = context.pick((0.01, 0.02, 0.03, 0.05, 0.1), (0.02, 0.05))
    adam_rates = context.pick((0.003, 0.01, 0.02, 0.03, 0.1), (0.01, 0.03))
    decayed: Any = with_weight_decay(torch.optim.Adam)
    tried: dict[str, list[tuple[float, Make]]] = {
        "LAMB": [(r, partial(LAMB, lr=r)) for r in lamb_rates],
        "AdamW": [(r, partial(decayed, lr=r)) for r in adam_rates],
    }
    return _all(context, tried, (x, y), rows=len(x) - 600, steps=context.pick(80, 20))


def _all(
    context: Context,
    tried: Mapping[str, Sequence[tuple[float, Make]]],
    data: tuple[Tensor, Tensor],
    *,
    rows: int,
    steps: int,
) -> Runs:
    found: dict[str, list[list[tuple[float, float, float]]]] = {}
    total = len(context.seeds) * sum(map(len, tried.values()))
    with context.progress.task(" and ".join(tried), total) as bar:
        for name, settings in tried.items():
            found[name] = []
            for seed in context.seeds:
                runs = []
                for value, make in settings:
                    runs.append((value, *_train(data, seed, make, rows=rows, steps=steps)))
                    bar.advance()
                found[name].append(runs)
    return found


def _train(
    data: tuple[Tensor, Tensor], seed: int, make: Make, *, rows: int, steps: int
) -> tuple[float, float]:
    """Return the losses on the validation and the test part."""
    x, y = data
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(model.parameters())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, valid, test = torch.split(order, [len(x) - 600, 300, 300])
    images, labels = x[train[:rows]], y[train[:rows]]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(x), y, reduction="none").double()
    found = float(losses[valid].mean()), float(losses[test].mean())
    return found if all(map(math.isfinite, found)) else (math.inf, math.inf)


def _plot(parts: Sequence[Runs], canvas: Canvas) -> None:
    left, right = canvas.subplots(1, 2)
    for axes, runs, what in ((left, parts[0], "λ"), (right, parts[1], "γ")):
        for name, seeds in runs.items():
            values = [value for value, *_ in seeds[0]]
            means = [sum(s[i][2] for s in seeds) / len(seeds) for i in range(len(values))]
            axes.plot(values, means, "o-", label=name)
        axes.set(xlabel=what, ylabel="test loss, nats", yscale="log")
        axes.set_xscale("symlog", linthresh=min(v for s in runs.values() for v, *_ in s[0] if v))
        axes.legend()
