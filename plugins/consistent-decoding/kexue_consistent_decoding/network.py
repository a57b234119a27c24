"""One small recurrent network of characters per seed, which all experiments share."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kexue.core import Context
from kexue.core.component import PAD
from kexue.core.device import make_generator
from kexue.core.lab.data import text
from kexue.core.lab.language import CharacterModel
from kexue_consistent_decoding.layer import SelfTerminatingLoss

__all__ = ["CONTEXT", "Network", "networks", "with_end_row"]

CONTEXT = 10
"""Characters of a prompt, and at which no text ends."""

_WIDTH = 96


@dataclass(frozen=True)
class Network:
    """A trained network, and the lines that it has not seen.

    Args:
        model: Its states are bounded: tanh.
        held_out: Ids and targets of unseen lines.
        train: The same of lines that it was trained on.
        prompts: The first characters of unseen lines.
    """

    model: CharacterModel
    held_out: dict[str, Tensor]
    train: dict[str, Tensor]
    prompts: Tensor


def networks(context: Context) -> dict[int, Network]:
    """Return a network per seed."""
    return {
        seed: context.once(("consistent-decoding", seed), partial(_network, context, seed))
        for seed in context.seeds
    }


def _network(context: Context, seed: int) -> Network:
    lines = text()
    train = [line for line in lines.train if len(line) > CONTEXT]
    unseen = [line for line in lines.test + lines.valid if len(line) > CONTEXT]
    train = train[:: context.pick(1, 6)]
    alphabet = "".join(sorted({c for line in train for c in line}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel(alphabet, cell="rnn", width=_WIDTH).to(context.device)
    model.fit(
        train, epochs=context.pick(2, 1), batch_size=128, lr=8e-3, seed=seed,
        progress=context.progress,
    )  # fmt: skip
    model.eval().requires_grad_(requires_grad=False)
    count = context.pick(60, 15)
    order = torch.randperm(len(unseen), generator=make_generator(seed)).tolist()
    prompts = [model.vocabulary.encode(unseen[i][:CONTEXT]) for i in order[:count]]
    return Network(
        model,
        _batch(context, model, unseen[:300]),
        _batch(context, model, train[: context.pick(1000, 300)]),
        torch.tensor(prompts, device=context.device),
    )


def _batch(context: Context, model: CharacterModel, lines: list[str]) -> dict[str, Tensor]:
    return {name: ids.to(context.device) for name, ids in model.collate(lines).items()}


def with_end_row(network: Network, epsilon: float, seed: int, *, steps: int = 80) -> CharacterModel:
    """Return the network with the end token's row fitted anew, to the self-terminating loss.

    Nothing else changes. Behind the layer a token is an end or another; of what kind the other is,
    the row has no part in: a softmax of two tokens says all of the loss that depends on it.

    Args:
        network: The network.
        epsilon: ε.
        seed: Decides the order of the lines.
        steps: Steps of Adam.
    """
    model = copy.deepcopy(network.model)
    end = int(model.eos_id or 0)
    ids, targets = network.train["ids"], network.train["targets"]
    with torch.no_grad():
        hidden, _ = model.body(model.embedding(ids))
    is_other = (targets != end).long().masked_fill(targets == PAD, PAD)  # 0: the end
    row = torch.zeros(hidden.shape[-1], device=ids.device, requires_grad=True)
    bias = torch.full((), 4.0, device=ids.device, requires_grad=True)
    loss = SelfTerminatingLoss(0, epsilon=epsilon, context_len=CONTEXT, reduction="token_mean")
    optimizer = torch.optim.Adam([row, bias], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    order = make_generator(seed)
    for _ in range(steps):
        some = torch.randint(len(ids), (128,), generator=order).to(ids.device)
        z = hidden[some] @ row + bias
        optimizer.zero_grad()
        loss(torch.stack([z, torch.zeros_like(z)], -1), is_other[some]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        model.output.weight[end] = row
        model.output.bias[end] = bias
    return model
