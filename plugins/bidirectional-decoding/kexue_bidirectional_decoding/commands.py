"""``kexue fit`` and ``kexue run`` of ``decoder/bidirectional-beam``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Job, Result
from kexue.core.lab.texts import (
    alphabet_of,
    fit_text_model,
    held_out_pairs,
    load_text_model,
    prompts,
)
from kexue.core.language import Vocabulary, pad_ids
from kexue.core.plots import histogram
from kexue.core.training import CONFIG, read_config
from kexue_bidirectional_decoding.model import BidirectionalSeq2Seq
from kexue_bidirectional_decoding.scorer import BidirectionalScorer
from kexue_bidirectional_decoding.two_models import TwoModels

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


def run(
    job: Job, *, batch_size: int = 64, same_length: bool = False, right: str | None = None
) -> Result:
    """Answer every line of the files, or of standard input.

    Args:
        job: The call; ``--model`` names what ``kexue fit`` wrote.
        batch_size: Lines that are answered together.
        same_length: Each answer is as long as its source; a model that was fitted with
            interaction mask then asks what it was fitted to ask.
        right: Folder of a second language model, which writes from the right: it was fitted to
            targets that are turned round. The one of --model then writes from the left; both are
            of transformers or of kexue fit, have the same tokens, and know nothing of each other.
    """
    if job.model is None:
        raise ArgumentError(
            f"{job.id} needs a fitted model: `--model folder`, as `kexue fit {job.id} pairs.tsv "
            "-o folder` writes it; or two, `--model folder --right folder`.",
            argument="model",
        )
    if batch_size < 1:
        raise ArgumentError(
            f"`--batch-size` must be at least 1. Found {batch_size}.", argument="batch_size"
        )
    model: BidirectionalScorer
    vocabulary: Vocabulary
    if right is None:
        fitted = _loaded(job.model).to(job.device, job.dtype).eval()
        model, vocabulary = fitted, fitted.vocabulary
    else:
        if same_length:
            raise ArgumentError(
                "`--same-length` must be left out with `--right`: two models that know nothing of "
                "each other have no use for a length.",
                argument="same_length",
            )
        model, vocabulary = _two(job, Path(right))
    decoder = job.build()
    lines: list[str] = []
    scores: list[float] = []
    from_right = ended = 0
    given = _checked(prompts(job))
    with job.progress.task("decoding") as task:
        while texts := list(islice(given, batch_size)):
            ids, mask = pad_ids([vocabulary.encode(text) for text in texts], device=job.device)
            lengths = mask.sum(1) if same_length else None
            found = decoder.decode(model, prompt=ids, mask=mask, lengths=lengths)
            lines += [vocabulary.decode(row) for row in found.tolist()]
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


def _two(job: Job, right: Path) -> tuple[TwoModels, Vocabulary]:
    """Read two language models, whose tokens must be the same."""
    left = load_text_model(job.model or Path(), device=job.device, dtype=job.dtype)
    other = load_text_model(right, device=job.device, dtype=job.dtype)
    if _tokens(left.vocabulary) != _tokens(other.vocabulary):
        raise FileFormatError(
            f"{right} must have the same tokens as {job.model}, in the same order: both write the "
            "same texts. It has others.",
            path=right,
        )
    return TwoModels(left.scorer(), other.scorer()), left.vocabulary


def _tokens(vocabulary: Any) -> Any:
    tokenizer = getattr(vocabulary, "tokenizer", None)
    return vocabulary.alphabet if tokenizer is None else tokenizer.get_vocab()


def _loaded(folder: Path) -> BidirectionalSeq2Seq:
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ArgumentError(
            f"`--right` must name a second model: {folder} holds one of transformers, which has "
            "one direction.",
            argument="right",
        )
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
