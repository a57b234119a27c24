"""``kexue fit`` and ``kexue run`` of ``decoder/bidirectional-beam``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Job, Result
from kexue.core.lab.texts import alphabet_of, fit_text_model, held_out_pairs, prompts
from kexue.core.language import pad_ids
from kexue.core.plots import histogram
from kexue.core.training import read_config
from kexue_bidirectional_decoding.model import BidirectionalSeq2Seq

__all__ = ["fit", "run"]


def fit(
    job: Job,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 3e-3,
    patience: int = 3,
    width: int = 96,
    heads: int = 8,
    interaction: str = "mask",
    dropout: float = 0.1,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit two decoders to pairs of texts.

    The file has a pair a line, a tab between source and target; every tenth is held out.

    Args:
        job: The call.
        epochs: Passes over the pairs, at most.
        batch_size: Pairs per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement.
        width: Features per character, even, and a multiple of heads.
        heads: Heads of the attention between the decoders.
        interaction: mask, post or none; mask hides what leaks the target in training, post does
            not, and with none the decoders do not know of each other.
        dropout: Probability of dropping a feature in training.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    train, valid = held_out_pairs(job)
    torch.manual_seed(job.seed)
    model = BidirectionalSeq2Seq(
        alphabet_of(chain(*train)),
        width=width,
        heads=heads,
        interaction=interaction,
        dropout=dropout,
    )
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "patience": patience}
    return fit_text_model(job, model, train, valid, options, resume=resume, overwrite=overwrite)


def run(job: Job, *, batch_size: int = 64, same_length: bool = False) -> Result:
    """Answer every line of the files, or of standard input.

    Args:
        job: The call; ``--model`` names what ``kexue fit`` wrote.
        batch_size: Lines that are answered together.
        same_length: Each answer is as long as its source; a model that was fitted with
            interaction mask then asks what it was fitted to ask.
    """
    if job.model is None:
        raise ArgumentError(
            f"{job.id} needs a fitted model: `--model folder`, as `kexue fit {job.id} pairs.tsv "
            "-o folder` writes it.",
            argument="model",
        )
    if batch_size < 1:
        raise ArgumentError(
            f"`--batch-size` must be at least 1. Found {batch_size}.", argument="batch_size"
        )
    model = _loaded(job.model).to(job.device, job.dtype).eval()
    decoder = job.build()
    lines: list[str] = []
    scores: list[float] = []
    from_right = ended = 0
    given = _checked(prompts(job))
    with job.progress.task("decoding") as task:
        while texts := list(islice(given, batch_size)):
            ids, mask = pad_ids(
                [model.vocabulary.encode(text) for text in texts], device=job.device
            )
            lengths = mask.sum(1) if same_length else None
            found = decoder.decode(model, prompt=ids, mask=mask, lengths=lengths)
            lines += [model.vocabulary.decode(row) for row in found.tolist()]
            scores += found.scores.tolist()
            from_right += int(found.from_right.sum())
            ended += int(found.ended.sum())
            task.advance(len(texts))
    summary = {
        "texts": len(lines),
        "from the right": from_right,
        "cut off": len(lines) - ended,
        "mean score": sum(scores) / max(len(scores), 1),
    }
    values = torch.tensor(scores)
    return Result(
        summary,
        {"scores": values},
        lines=lines,
        plot=lambda figure: histogram(figure, values, "score per text, nats"),
    )


def _checked(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ArgumentError(
                f"Line {number} must hold a source. Found an empty one.", argument="files"
            )
        yield line.strip()


def _loaded(folder: Path) -> BidirectionalSeq2Seq:
    config = read_config(folder)
    described = config["model"]
    form = described.get("form") if isinstance(described, dict) else None
    if form != BidirectionalSeq2Seq.form:
        raise FileFormatError(
            f"{folder} must hold a model of decoder/bidirectional-beam. It was fitted with "
            f"{config['component']}.",
            path=folder,
        )
    return BidirectionalSeq2Seq.load(folder)
