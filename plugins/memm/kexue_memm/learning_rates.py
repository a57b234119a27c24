"""A learning rate of its own for the transitions."""

from __future__ import annotations

from typing import Any

from torch import nn

from kexue_memm.memm import MEMM

__all__ = ["param_groups"]


def param_groups(model: nn.Module, lr: float, *, multiplier: float) -> list[dict[str, Any]]:
    """Return two parameter groups: the model's, and the transitions of its MEMMs.

    The transitions are few and see every token, but start near zero beside a pretrained encoder
    whose learning rate is tiny; the NER script of the post trains them 1000 times faster. With
    Adam, that is the same as its factor inside the layer.

    Args:
        model: A model with :class:`~kexue_memm.memm.MEMM` somewhere in it.
        lr: Learning rate of everything else.
        multiplier: Factor of ``lr`` for the transitions.

    Returns:
        Groups for the constructor of an optimizer.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(8, 4), "head": MEMM(4)})
        >>> optimizer = torch.optim.Adam(param_groups(model, 1e-5, multiplier=1000))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(2, 1e-05), (1, 0.01)]
    """
    heads = (module for module in model.modules() if isinstance(module, MEMM))
    transitions = {id(p): p for head in heads for p in head.parameters()}
    others = [p for p in model.parameters() if id(p) not in transitions]
    return [
        {"params": others, "lr": lr},
        {"params": list(transitions.values()), "lr": lr * multiplier},
    ]
