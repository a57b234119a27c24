"""Networks that the experiments explain, and digits to train them on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Context
from kexue.core.lab.data import digits
from kexue.core.training import adam

__all__ = ["SETTING", "Digits", "digit_network", "gradient"]

SETTING = (
    "Digits: 1400 images to train and 397 to test, 200 of which are explained; a perceptron "
    "64-128-128-10 with ReLU. The baseline is the black image."
)


class Digits(NamedTuple):
    """A trained network and the images that it was not trained on.

    Args:
        model: Images ``[batch, 64]`` to logits.
        x: Some of these images.
        predicted: The classes that the model gives them.
        accuracy: The share of all of them that is right.
    """

    model: nn.Sequential
    x: Tensor
    predicted: Tensor
    accuracy: float


def digit_network(context: Context, seed: int, *, penalty: float = 0.0) -> Digits:
    """Train a network on digits, once for each seed and penalty.

    Args:
        context: Where it is kept.
        seed: Seed of the split, the weights and the batches.
        penalty: Weight of the squared gradient of the loss with respect to the input.
    """
    return context.once(("digits", seed, penalty), lambda: _train(context, seed, penalty))


def _train(context: Context, seed: int, penalty: float) -> Digits:
    data = digits()
    x, y = torch.from_numpy(data.images).flatten(1), torch.from_numpy(data.labels)
    torch.manual_seed(seed)
    train, test = torch.split(torch.randperm(len(x)), [1400, len(x) - 1400])
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = adam(model.parameters(), lr=3e-3)
    for _ in range(context.pick(300, 150)):
        rows = train[torch.randint(len(train), (128,))]
        batch = x[rows].requires_grad_(penalty > 0)
        loss = F.cross_entropy(model(batch), y[rows])
        if penalty:
            (slope,) = torch.autograd.grad(loss * len(rows), batch, create_graph=True)
            loss = loss + penalty * slope.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        predicted = model(x[test]).argmax(1)
    accuracy = float((predicted == y[test]).double().mean())
    return Digits(model.double().eval(), x[test[:200]].double(), predicted[:200], accuracy)


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of one output per row at the input."""
    leaf = x.clone().requires_grad_()
    outputs = model(leaf).gather(1, target[:, None])
    return torch.autograd.grad(outputs.sum(), leaf)[0]
