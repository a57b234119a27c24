"""The command line: text of a fitted model, with prompts or without; or of a table of logits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.files import TABLE_SUFFIXES
from kexue.core.inputs import read_floats
from kexue.core.job import Job, Result
from kexue.core.lab.texts import TextModel, load_text_model, prompts
from kexue.core.language import pad_ids
from kexue.core.loading import load_target
from kexue_bert_sampling.chains import Chains
from kexue_bert_sampling.sampler import MLMGibbs

__all__ = ["apply", "run"]

_MASK = re.compile(r"\[MASK(?:\*(\d+))?\]")
_ROWS = 256  # chains of prompts that run together
_IDEOGRAPHS = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
_BETWEEN = re.compile(f"(?<=[{_IDEOGRAPHS}]) (?=[{_IDEOGRAPHS}])")


def run(job: Job, *, num_samples: int = 8) -> Result:
    """Draw from a masked language model.

    With ``--model FOLDER``, the model is in a folder, of ``kexue fit`` or of transformers, and
    texts come out. Without files they have random lengths; with files each line is a prompt, of
    which ``[MASK]``, or ``[MASK*12]`` for twelve, is drawn and the rest kept. A prompt without
    masks is where chains start, and all of it is drawn.

    Without, the file is ``file.py:model``, which may be a scorer, a function or a module; or an
    array of logits with an axis per place, the joint distribution itself.

    Args:
        job: The call.
        num_samples: How many texts, of each prompt if there are any.
    """
    _check_number(num_samples)
    given = job.one_file("logits with an axis per place, or file.py:model; text needs `--model`")
    target: Any
    if ".py:" in given:
        target = load_target(given)
    else:
        target = read_floats(job, given, "target")
        one_row = given == "-" or Path(given).suffix.lower() in TABLE_SUFFIXES
        target = target[0] if one_row and target.ndim == 2 and len(target) == 1 else target
    drawn = job.build().sample(target, num_samples, generator=job.generator())
    summary = {"samples": len(drawn.values), **drawn.diagnostics}
    return Result(summary, {"values": drawn.values, "chains": drawn.chains})


def apply(job: Job, *, num_samples: int = 8, redraw: bool = False) -> Result:
    """Draw texts of a masked language model in a folder.

    Args:
        job: The call.
        num_samples: How many texts, of each prompt if there are any.
        redraw: Draw all of every prompt, not only its masks.
    """
    _check_number(num_samples)
    model = load_text_model(
        job.model or Path(), forms=("masked",), device=job.device, dtype=job.dtype
    )
    around = _around(model)
    forbidden = (*_no_text(model), *job.params.get("forbidden", ()))
    params = {**job.fitting(**around), "forbidden": forbidden}
    summary: dict[str, Any] = {}
    if job.files:
        starts = [_prompt(line, n, model, redraw=redraw) for n, line in enumerate(prompts(job), 1)]
        room = model.masked_scorer().max_length
        _check_prompts(starts, room, sum(map(len, around.values())))
        found = _of_prompts(job, model, params, starts, num=num_samples, summary=summary)
    else:
        found = _of_masks(job, model, params, num_samples, summary)
    as_text = job.out is None or job.out.suffix.lower() == ".txt"
    if as_text:
        return Result(summary, lines=(_text_of(model, row) for row in found))
    ids, mask = pad_ids(list(found), pad_id=PAD)
    del mask
    return Result(summary, {"values": ids})


def _of_masks(
    job: Job, model: TextModel, params: Mapping[str, Any], num: int, summary: dict[str, Any]
) -> Iterator[list[int]]:
    """Yield texts of random lengths, those of a draw as soon as it is there."""
    sampler = job.factory(**params)
    chains = sampler.begin(model.masked_scorer(), num, generator=job.generator())
    draws = -(-num // max(1, len(chains.ids)))

    def rows() -> Iterator[list[int]]:
        yield from islice(_draws(job, sampler, chains, draws), num)

    return _counted(rows(), [chains], summary)


def _draws(job: Job, sampler: MLMGibbs, chains: Chains, draws: int) -> Iterator[list[int]]:
    total = max(0, sampler.warmup - chains.steps) + draws * sampler.thin
    with job.progress.task("steps", total) as task:
        for texts in sampler.draw(chains, draws, on_steps=task.advance):
            yield from _rows_of(texts)


def _of_prompts(
    job: Job,
    model: TextModel,
    params: Mapping[str, Any],
    starts: list[_Prompt],
    *,
    num: int,
    summary: dict[str, Any],
) -> Iterator[list[int]]:
    """Yield the texts of each prompt, some prompts at once.

    Chains are numbered through, so that those of a prompt do not depend on how many go together.
    """
    each = min(num, params.get("num_chains") or num)
    draws = -(-num // each)
    together = max(1, _ROWS // each)
    runs: list[Chains] = []

    def rows() -> Iterator[list[int]]:
        for begin in range(0, len(starts), together):
            some = starts[begin : begin + together]
            ids, _ = pad_ids([p.ids for p in some for _ in range(each)], pad_id=PAD)
            frozen, _ = pad_ids([p.kept for p in some for _ in range(each)])
            given = {**params, "init": ids, "frozen": frozen.bool(), "num_chains": len(ids)}
            sampler = job.factory(**given)
            chains = sampler.begin(
                model.masked_scorer(), len(ids), generator=job.generator(), first=begin * each
            )
            runs.append(chains)
            texts = list(_draws(job, sampler, chains, draws))  # [draw, prompt, chain]
            for p in range(len(some)):
                of_prompt = (
                    texts[d * len(ids) + p * each + c] for d in range(draws) for c in range(each)
                )
                yield from islice(of_prompt, num)

    return _counted(rows(), runs, summary)


def _counted(
    rows: Iterator[list[int]], runs: list[Chains], summary: dict[str, Any]
) -> Iterator[list[int]]:
    """Yield rows, and fill the summary behind the last one."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    for row in rows:
        seen.add(tuple(row))
        count += 1
        yield row
    summary["texts"] = count
    summary["distinct"] = len(seen) / count if count else 0.0
    summary["steps"] = sum(chains.steps for chains in runs)
    if len(runs) == 1:
        summary.update(runs[0].statistics())


def _check_number(num_samples: int) -> None:
    if num_samples < 1:
        raise ArgumentError(
            f"`--num-samples` must be at least 1. Found {num_samples}.", argument="num_samples"
        )


# -- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """A line as tokens.

    Args:
        ids: The tokens.
        kept: 1 at those that stay.
    """

    ids: list[int]
    kept: list[int]


def _prompt(line: str, number: int, model: TextModel, *, redraw: bool) -> _Prompt:
    """Return the tokens of a line, ``[MASK]`` and ``[MASK*n]`` read as masks."""
    mask_id = model.masked_scorer().mask_id
    pieces: list[list[int]] = []
    end = 0
    for mark in chain(_MASK.finditer(line), (None,)):
        text = line[end : mark.start() if mark else None]
        pieces.append(_encoded(text, number, model))
        if mark:
            pieces.append([mask_id] * int(mark[1] or 1))
            end = mark.end()
    ids = [token for piece in pieces for token in piece]
    if not ids:
        raise ArgumentError(
            f"`prompt` in line {number} must hold a token or a [MASK]. Found {line!r}. Without "
            "files, texts are drawn from masks alone.",
            argument="prompt",
        )
    keep = not redraw and mask_id in ids
    return _Prompt(ids, [int(keep and token != mask_id) for token in ids])


def _encoded(text: str, number: int, model: TextModel) -> list[int]:
    ids = model.vocabulary.encode(text)
    tokenizer = getattr(model.vocabulary, "tokenizer", None)
    unknown = (
        getattr(model.vocabulary, "unknown_id", None)
        if tokenizer is None
        else tokenizer.unk_token_id
    )
    if unknown is not None and unknown in ids:
        one_each = len(ids) == len(text)
        what = repr(text[ids.index(unknown)]) if one_each else f"one in {text!r}"
        raise ArgumentError(
            f"`prompt` in line {number} must be of tokens that the model knows. Found {what}, "
            "which it does not. Write [MASK] in its place to have it drawn.",
            argument="prompt",
        )
    return ids


def _check_prompts(starts: list[_Prompt], room: int | None, around: int) -> None:
    if not starts:
        raise ArgumentError("`prompt` must have a line. The files have none.", argument="prompt")
    for number, start in enumerate(starts, 1):
        if room is not None and len(start.ids) + around > room:
            raise ArgumentError(
                f"`prompt` in line {number} must have at most {room - around} tokens, what the "
                f"model reads. Found {len(start.ids)}.",
                argument="prompt",
            )


def _around(model: TextModel) -> dict[str, Any]:
    """Return what a tokenizer puts before and behind a text, such as [CLS] and [SEP]."""
    tokenizer = getattr(model.vocabulary, "tokenizer", None)
    if tokenizer is None:
        return {"prefix": (), "suffix": ()}
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, special = found["input_ids"], found["special_tokens_mask"]
    text = [i for i, flag in enumerate(special) if not flag]
    if not text:  # "a" itself is unknown, and counts as special
        text = [i for i, token in enumerate(ids) if token == tokenizer.unk_token_id]
    return {"prefix": tuple(ids[: text[0]]), "suffix": tuple(ids[text[-1] + 1 :])}


def _no_text(model: TextModel) -> tuple[int, ...]:
    """Return the tokens that are no text, those that only the model's last layer has included."""
    size = model.vocabulary.size
    config = getattr(model.model, "config", None)
    beyond = range(size, getattr(config, "vocab_size", size) if config is not None else size)
    return (*model.vocabulary.special_ids, *beyond)


def _rows_of(texts: Tensor) -> Iterator[list[int]]:
    for row in texts.tolist():
        yield [token for token in row if token != PAD]


def _text_of(model: TextModel, row: list[int]) -> str:
    """Return a text; tokenizers write spaces between ideographs, which have none."""
    text = model.vocabulary.decode(row)
    if getattr(model.vocabulary, "tokenizer", None) is None:
        return text
    return _BETWEEN.sub("", text)
