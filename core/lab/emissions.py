"""A decoder fitted to, and applied to, a user's own emissions: no encoder, arrays in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kexue.core.component import PAD
from kexue.core.describe import describe_component
from kexue.core.errors import ArgumentError
from kexue.core.interfaces import INTERFACES
from kexue.core.interfaces.decoder import decoded
from kexue.core.job import Job, Result
from kexue.core.training import Examples, Trainable

__all__ = ["EmissionModel", "are_arrays", "decode_emissions", "read_labelled"]

_SUFFIXES = {".npy", ".npz", ".safetensors", ".json", ".jsonl"}


def are_arrays(files: Sequence[str]) -> bool:
    """Whether files hold arrays rather than text."""
    return bool(files) and all(Path(name).suffix.lower() in _SUFFIXES for name in files)


class EmissionModel(Trainable):
    """The head of a tagger alone: what it learns are its own parameters, such as transitions.

    Args:
        head: A module that is both a Loss of (emissions, tags, mask) and a Decoder.
        head_config: What it was built from, ``{use: id, with: {…}}``.
    """

    objective: ClassVar[tuple[str, str]] = ("accuracy", "max")

    def __init__(self, head: nn.Module, head_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.head = head
        self._head_config = dict(head_config)

    def config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` needs."""
        return {"head": self._head_config}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the model; its head comes from the registry."""
        from kexue.core.registry import build

        return cls(build(config["head"]), config["head"])

    def collate(self, examples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Pad emissions and tags of some sequences."""
        emissions = nn.utils.rnn.pad_sequence([e for e, _ in examples], batch_first=True)
        tags = nn.utils.rnn.pad_sequence([t for _, t in examples], batch_first=True)
        lengths = torch.tensor([len(t) for _, t in examples], device=tags.device)
        mask = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        return {"emissions": emissions, "tags": tags, "mask": mask}

    def size(self, example: tuple[Tensor, Tensor]) -> int:
        """Return the number of positions."""
        return len(example[1])

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the head's loss."""
        loss: Tensor = self.head(batch["emissions"], batch["tags"], batch["mask"])
        return loss

    def evaluate(self, examples: Examples, *, batch_size: int = 64) -> dict[str, float]:
        """Return the accuracy of the decoded tags, and how many sequences are right as a whole."""
        right = positions = whole = 0
        with torch.no_grad():
            for batch, _ in self._batches(examples, batch_size):
                found = self.head.decode(batch["emissions"], mask=batch["mask"])  # type: ignore[operator]
                hits = (found.sequences == batch["tags"]) & batch["mask"]
                right += int(hits.sum())
                positions += int(batch["mask"].sum())
                whole += int((hits | ~batch["mask"]).all(1).sum())
        return {"accuracy": right / max(positions, 1), "exact": whole / max(len(examples), 1)}


def read_labelled(job: Job) -> list[tuple[Tensor, Tensor]]:
    """Read emissions, tags and, where there is one, a mask, and return the sequences.

    Tags below zero end a sequence where there is no mask.

    Raises:
        ArgumentError: If an array is missing or does not fit the others.
    """
    component = job.description.component
    interface = next(i for i in INTERFACES if i.kind == component.kind)
    described = describe_component(component, replace(interface, method="forward"))
    tensors = replace(job, description=described).tensors()
    emissions, tags = tensors["emissions"], tensors["tags"]
    mask = tensors.get("mask", tags >= 0)
    if not mask.any():
        raise ArgumentError("`mask` must leave at least one position. Found none.", argument="mask")
    rows = zip(emissions, tags, mask, strict=True)
    return [(e[m], t[m]) for e, t, m in rows if m.any()]


def decode_emissions(job: Job, head: Any, tags: Sequence[str] = ()) -> Result:
    """Decode a file of emissions with a fitted head.

    Args:
        job: The call.
        head: The fitted head.
        tags: Names of the tags, told in the summary.
    """
    result = decoded(head, job.tensors())
    if tags:
        result.summary["tags"] = list(tags)
    length = (result.arrays["sequences"] != PAD).sum()
    result.summary["positions"] = int(length)
    return result
