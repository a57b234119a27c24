"""Where the decay of AdaX leads: digits with Adam and AdaX, and with three decays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue_adax.adax import AdaX
from kexue_adax.experiments import SHARES, one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["training"]

_POST = "https://kexue.fm/archives/7387"
_PAPER = "https://arxiv.org/abs/2004.09740"
_TESTED = 300
_BATCH = 32
_RATES = (1e-3, 5e-3, 1e-2)
_HIGH = (5e-3, 1e-2)
_SETTING = (
    "Digits: 1497 images to train and 300 to test, split anew with each of five seeds; a "
    "perceptron 64-64-10, cross-entropy, batches of 32, no schedule. The networks of all seeds are "
    "trained side by side in one tensor, as all of the methods work number by number."
)


def training(context: Context) -> Report:
    """Train on digits with Adam and AdaX, and with the three decays and all else equal."""
    data = _Data(5)
    epochs = context.pick(30, 4)
    makes: dict[tuple[str, float], Callable[[Any], torch.optim.Optimizer]] = {}
    for rate in _RATES:
        makes["Adam", rate] = partial(torch.optim.Adam, lr=rate)
        makes["AdaX", rate] = partial(AdaX, lr=rate)
    for rate in _HIGH:
        for name in ("Adam", "Adafactor"):
            makes[f"{name}'s decay", rate] = partial(_Averaged, SHARES[name], lr=rate)
    found: dict[tuple[str, float], _Run] = {}
    with context.progress.task("digits", len(makes)) as bar:
        for key, make in makes.items():
            with one_thread():
                found[key] = _train(data, epochs, make)
            bar.advance()
    alike = {
        (name, rate): found["AdaX" if name == "AdaX" else f"{name}'s decay", rate]
        for rate in _HIGH
        for name in SHARES
    }
    claims = [
        Claim(
            "At high rates AdaX generalises better than Adam.",
            f"{_PAPER}, abstract; {_POST}",
            f"test loss of AdaX less Adam's after {epochs} epochs, in nats: "
            + "; ".join(
                f"lr {rate:g}: {spread(_differences(found, rate), 4)}, of "
                f"{_mean(found['Adam', rate].test):.4f}"
                for rate in _RATES
            ),
            "On average over the seeds negative at lr 0.005 and 0.01.",
            all(_mean(_differences(found, rate)) < 0 for rate in _HIGH),
        ),
        Claim(
            "It is the decay that matters: one that goes to 1 is better than one that goes to β₂.",
            f"{_POST}, section “衰减策略比较”",
            "all else as in AdaX, test loss in nats: "
            + "; ".join(
                f"lr {rate:g}: "
                + ", ".join(f"{n} {_mean(alike[n, rate].test):.4f}" for n in SHARES)
                for rate in _HIGH
            ),
            "With the decays of AdaX and of Adafactor on average less than with Adam's, at each "
            "of the two rates.",
            all(
                _mean(alike[n, r].test) < _mean(alike["Adam", r].test)
                for n in ("AdaX", "Adafactor")
                for r in _HIGH
            ),
        ),
        Claim(
            "With a decay that goes to 1 the rates of the parameters settle, as for SGD.",
            f"{_POST}, section “衰减策略比较”",
            "all else as in AdaX, mean change of log √v̂ per step in the last epoch: "
            + "; ".join(
                f"lr {rate:g}: "
                + ", ".join(f"{n} {_mean(alike[n, rate].restless):.2g}" for n in SHARES)
                for rate in _HIGH
            ),
            "With AdaX's decay less than with Adam's, for each seed and rate.",
            all(
                ours < theirs
                for r in _HIGH
                for ours, theirs in zip(
                    alike["AdaX", r].restless, alike["Adam", r].restless, strict=True
                )
            ),
        ),
    ]
    rows = [
        [rate, name, spread(run.train, 5), spread(run.test, 4)]
        for (name, rate), run in sorted(found.items(), key=lambda item: item[0][1])
    ]
    columns = ["lr", "optimizer", "training loss", "test loss"]
    figure = Figure(
        "Training loss at lr 0.01",
        partial(_plot_losses, {name: alike[name, 1e-2].losses for name in SHARES}),
        "Median, least and greatest over the seeds of the mean of each epoch; all but the decay "
        "is alike.",
    )
    return Report(claims, [Table("Digits, nats", columns, rows)], [figure], [_SETTING])


class _Data:
    """Digits, split once per seed: ``[seed, image, pixel]`` and ``[seed, image]``."""

    def __init__(self, seeds: int) -> None:
        images = digits()
        x = torch.from_numpy(images.images).flatten(1).float()
        y = torch.from_numpy(images.labels)
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        order = torch.stack([torch.randperm(len(x), generator=g) for g in self.generators])
        self.train, self.test = order[:, _TESTED:], order[:, :_TESTED]
        self.x, self.y, self.seeds = x, y, seeds

    def model(self) -> list[nn.Parameter]:
        """Weights ``[seed, in, out]`` and biases ``[seed, 1, out]``, drawn as nn.Linear does."""
        found: list[list[Tensor]] = []
        for seed in range(self.seeds):
            torch.manual_seed(seed)
            layers = [nn.Linear(64, 64), nn.Linear(64, 10)]
            found.append(
                [t for x in layers for t in (x.weight.detach().t(), x.bias.detach()[None])]
            )
        return [nn.Parameter(torch.stack(same).contiguous()) for same in zip(*found, strict=True)]

    def loss(self, model: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return the mean cross-entropy of images ``[seed, row]``, in nats, per seed."""
        hidden = self.x[rows]
        for weight, bias in zip(model[:-2:2], model[1:-2:2], strict=True):
            hidden = torch.baddbmm(bias, hidden, weight).relu()
        scores = torch.baddbmm(model[-1], hidden, model[-2])
        losses = nn.functional.cross_entropy(
            scores.flatten(0, 1), self.y[rows].flatten(), reduction="none"
        )
        return losses.view(rows.shape).mean(1)

    def epoch(self, number: int) -> list[Tensor]:
        """Return batches ``[seed, row]`` in an order that depends on seed and epoch alone."""
        rows = []
        for seed, own in enumerate(self.train):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            rows.append(own[torch.randperm(len(own), generator=generator)])
        return list(torch.split(torch.stack(rows), _BATCH, dim=1))


class _Averaged(torch.optim.Optimizer):
    """AdaX with any decay: no bias correction of m, v̂ averaged with weights 1 − β̂_t."""

    def __init__(self, share: Callable[[int], float], params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.share, self.steps = share, 0
        self.own: list[Tensor] = self.param_groups[0]["params"]
        self.moments, self.seconds = ([torch.zeros_like(p) for p in self.own] for _ in range(2))
        for p, v in zip(self.own, self.seconds, strict=True):
            self.state[p] = {"exp_avg_sq_hat": v}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        del closure
        self.steps += 1
        share = self.share(self.steps)
        grads = [p.grad for p in self.own if p.grad is not None]
        torch._foreach_lerp_(self.moments, grads, 0.1)
        torch._foreach_mul_(self.seconds, 1 - share)
        torch._foreach_addcmul_(self.seconds, grads, grads, share)
        roots = torch._foreach_add(self.seconds, 1e-12)  # noqa: SLF001
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(self.own, self.moments, roots, -self.param_groups[0]["lr"])


class _Run:
    """What one training found, each per seed.

    Args:
        train: Mean loss on all training images.
        test: Mean loss on the test images.
        restless: Mean absolute change of log √v̂ per step in the last epoch.
        losses: Mean loss of each epoch's batches, ``[epoch, seed]``.
    """

    def __init__(
        self, train: list[float], test: list[float], restless: list[float], losses: Tensor
    ) -> None:
        self.train, self.test, self.restless, self.losses = train, test, restless, losses


def _train(data: _Data, epochs: int, make: Callable[[Any], torch.optim.Optimizer]) -> _Run:
    model = data.model()
    optimizer = make(model)
    losses = []
    changes: list[Tensor] = []
    for number in range(epochs):
        batches = data.epoch(number)
        measured = []
        for rows in batches:
            optimizer.zero_grad()
            each = data.loss(model, rows)
            each.sum().backward()  # type: ignore[no-untyped-call]
            before = _roots(optimizer) if number == epochs - 1 else None
            optimizer.step()
            if before is not None:
                changes.append((_roots(optimizer) - before).abs().mean(1))
            measured.append(each.detach())
        losses.append(torch.stack(measured).mean(0))
    with torch.no_grad():
        train, test = (data.loss(model, rows).tolist() for rows in (data.train, data.test))
    restless = torch.stack(changes).mean(0).tolist()
    return _Run(train, test, restless, torch.stack(losses))


def _roots(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return log √(v̂ + ε) of all numbers, ``[seed, number]``; of Adam's, v for v̂."""
    states = optimizer.state.values()
    seconds = [s.get("exp_avg_sq_hat", s.get("exp_avg_sq")) for s in states]
    return torch.cat([v.flatten(1) for v in seconds], 1).add(1e-12).log().mul(0.5)


def _differences(found: dict[tuple[str, float], _Run], rate: float) -> list[float]:
    """Return AdaX's test loss less Adam's, seed by seed."""
    pairs = zip(found["AdaX", rate].test, found["Adam", rate].test, strict=True)
    return [ours - adam for ours, adam in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plot_losses(runs: dict[str, Tensor], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, losses in runs.items():
        epochs = range(1, len(losses) + 1)
        (line,) = axes.plot(epochs, losses.median(1).values.tolist(), label=name)
        low, high = losses.min(1).values.tolist(), losses.max(1).values.tolist()
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel="training loss, nats", yscale="log")
    axes.legend()
