"""Decoders: scores to discrete sequences."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kexue.core.component import PAD
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.plots import histogram

__all__ = ["PAD", "DecodeResult", "Decoder", "run"]


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What a decoder found.

    Args:
        sequences: Shape ``[batch, time]``, int64, right-padded with :data:`PAD`.
        scores: Shape ``[batch]``: the score that the decoder maximised, per sequence.
        ended: Shape ``[batch]``: whether a sequence has come to its end token; None where there is
            none to come to.
    """

    sequences: Tensor
    scores: Tensor
    ended: Tensor | None = None

    def tolist(self) -> list[list[int]]:
        """Return the sequences as lists, each at its own length.

        One copy to the host for the whole batch.
        """
        return [[int(i) for i in row if i != PAD] for row in self.sequences.tolist()]


class Decoder(Contract):
    """A decoder maps scores to the discrete sequence, per row, that they favour."""

    trainable: ClassVar[bool] = False
    """The decoder is also a :class:`~kexue.core.interfaces.loss.Loss` of (scores, targets, mask)
    and can be the head of a :class:`~kexue.core.lab.tagging.Tagger`."""

    @abstractmethod
    def decode(self, scores: Any, *, mask: Tensor | None = None) -> DecodeResult:
        """Return the best sequence per row and its score.

        Args:
            scores: Shape ``[batch, time, tag]``; a next-token scorer for autoregressive decoders.
            mask: Shape ``[batch, time]``, true at real positions.
        """


def run(job: Job) -> Result:
    """Decode a file of scores into sequences."""
    tensors = job.tensors()
    decoder = job.build(**job.sizes(tensors))
    return decoded(decoder, tensors)


def decoded(decoder: Any, tensors: dict[str, Tensor]) -> Result:
    """Return what a decoder makes of the tensors, the first of which are the scores."""
    scores, *optional = tensors.values()
    names = list(tensors)[1:]
    found = decoder.decode(scores, **dict(zip(names, optional, strict=True)))
    values = found.scores.detach()
    summary = {"sequences": len(values), "mean_score": float(values.double().mean())}
    arrays = {"sequences": found.sequences, "scores": values}
    return Result(
        summary, arrays, plot=lambda figure: histogram(figure, values, "score per sequence")
    )
