"""``kexue run`` of samplers and decoders on text, with a fitted model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.core.component import PAD
from kexue.core.device import make_generator
from kexue.core.errors import ArgumentError
from kexue.core.inputs import read_array
from kexue.core.interfaces.decoder import DecodeResult, decoded
from kexue.core.job import Job, Result
from kexue.core.lab.texts import TextModel, load_text_model, prompts
from kexue.core.language import Characters, Vocabulary, pad_ids
from kexue.core.loading import load_target

__all__ = ["decode_ids", "decode_text", "sample_text"]

_SEEDS = 1_000_003  # between those of two calls: a generator per text
_NAMED = ("scores", "prompt", "mask")

Continue = Callable[[Tensor, Tensor, int], DecodeResult]
"""From prompts, their mask and the number of the first to what follows them."""


def sample_text(
    job: Job, *, num_samples: int = 1, max_new_tokens: int = 200, batch_size: int = 64
) -> Result:
    """Draw texts that continue the lines of a file, or of standard input.

    A text depends on the seed and the number of its line, not on the other lines.

    Args:
        job: The call.
        num_samples: Texts per line.
        max_new_tokens: How many tokens to add at most.
        batch_size: Lines at a time.
    """
    _check(num_samples=num_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    model = _load(job)
    scorer = model.scorer()
    sampler: Any = job.build(**_ends(model))

    def go_on(ids: Tensor, mask: Tensor, first: int) -> DecodeResult:
        numbers = range(first * num_samples, (first + len(ids)) * num_samples)
        found: DecodeResult = sampler.generate(
            scorer,
            ids,
            mask=mask,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            generator=[make_generator(job.seed * _SEEDS + n, job.device) for n in numbers],
        )
        return found

    return _continued(job, model, go_on, (num_samples, max_new_tokens, batch_size))


def decode_text(job: Job, *, max_new_tokens: int = 200, batch_size: int = 64) -> Result:
    """Continue the lines of a file, or of standard input, by the best text found.

    Args:
        job: The call.
        max_new_tokens: How many tokens to add at most.
        batch_size: Lines at a time.
    """
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens)
    model = _load(job)
    scorer = model.scorer()
    decoder: Any = job.build(**_ends(model))

    def go_on(ids: Tensor, mask: Tensor, first: int) -> DecodeResult:
        del first
        found: DecodeResult = decoder.decode(scorer, ids, mask=mask, max_new_tokens=max_new_tokens)
        return found

    count = getattr(decoder, "num_return", 1)
    return _continued(job, model, go_on, (count, max_new_tokens, batch_size))


def decode_ids(job: Job, *, max_new_tokens: int = 200) -> Result:
    """Continue token ids by a function: FILE.py:SCORES PROMPT [mask=FILE]; text needs --model.

    SCORES maps ids [row, time] to logits [row, token]; PROMPT holds ids, -1 for padding.

    Args:
        job: The call.
        max_new_tokens: How many tokens to add at most.
    """
    files = dict(zip(_NAMED, (f for f in job.files if "=" not in f), strict=False))
    files |= {name: path for name, _, path in (f.partition("=") for f in job.files) if path}
    if len(files) != len(job.files) or not {"scores", "prompt"} <= set(files) <= set(_NAMED):
        raise ArgumentError(
            f"{job.id} takes a function and ids, `file.py:scores prompt.npy`; to continue text, "
            f"`kexue fit {job.id} TEXT -o model/` and `kexue run {job.id} --model model/ PROMPTS`. "
            f"Found {' '.join(job.files) or 'no files'}.",
            argument="files",
        )
    prompt = torch.from_numpy(_ids(files["prompt"])).to(job.device)
    mask = prompt != PAD
    if "mask" in files:
        mask &= torch.from_numpy(read_array(files["mask"]).astype(bool)).to(job.device)
    decoder: Any = job.build()
    scores: Any = load_target(files["scores"])
    found = decoder.decode(scores, prompt, mask=mask, max_new_tokens=max_new_tokens)
    result = decoded(_Known(found), {"scores": prompt})
    result.summary["terminated"] = float(found.ended.double().mean())
    result.arrays["ended"] = found.ended
    return result


class _Known:
    """A decoder that has decoded."""

    def __init__(self, found: DecodeResult) -> None:
        self.found = found

    def decode(self, scores: Tensor) -> DecodeResult:
        del scores
        return self.found


def _ids(path: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = read_array(path, rows=True)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.number) or (array % 1 != 0).any():
        raise ArgumentError(
            f"`prompt` in {path} must be token ids of shape [row, time]. "
            f"Found {array.dtype} of shape {list(array.shape)}.",
            argument="prompt",
        )
    return array.astype(np.int64)


# -- text ------------------------------------------------------------------------------------------


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ArgumentError(
                f"`--{name.replace('_', '-')}` must be at least 1. Found {count}.", argument=name
            )


def _load(job: Job) -> TextModel:
    return load_text_model(job.model or Path(), device=job.device, dtype=job.dtype)


def _ends(model: TextModel) -> dict[str, Any]:
    """Return the model's end tokens as an argument; its tokenizer's where it says none."""
    own = getattr(getattr(model.model, "config", None), "eos_token_id", None)
    found = model.vocabulary.eos_id if own is None else own
    return {} if found is None else {"eos_id": found}


def _continued(job: Job, model: TextModel, go_on: Continue, sizes: tuple[int, int, int]) -> Result:
    """Return the texts as they come, and figures of them that are complete with the last.

    Args:
        job: The call.
        model: The model.
        go_on: Continues a batch.
        sizes: Texts per line, tokens at most, and lines at a time.
    """
    per_line, max_new_tokens, batch_size = sizes
    scorer = model.scorer()
    given = list(prompts(job))
    rows = _encoded(model.vocabulary, given)
    for number, row in enumerate(rows, 1):
        room = scorer.room(len(row))
        if room is not None and room < max_new_tokens:
            raise ArgumentError(
                f"Line {number} and `--max-new-tokens` must fit the model, which reads "
                f"{scorer.max_length} tokens. Found a line of {len(row)} and {max_new_tokens}.",
                argument="max_new_tokens",
            )
    summary: dict[str, Any] = {"texts": len(rows) * per_line}

    def lines() -> Iterator[str]:
        ended: list[bool] = []
        tokens = 0
        with job.progress.task("texts", len(rows)) as task:
            for first in range(0, len(rows), batch_size):
                ids, mask = pad_ids(rows[first : first + batch_size], device=job.device)
                found = go_on(ids, mask, first)
                texts = found.tolist()
                ended += _ended(found)
                tokens += sum(map(len, texts))
                for place, text in enumerate(texts):
                    written = model.vocabulary.decode(text)
                    before = given[first + place // per_line] if model.form == "causal" else ""
                    yield (before + written).replace("\n", "\\n")
                task.advance(len(ids))
        summary["terminated"] = sum(ended) / len(ended) if ended else float("nan")
        summary["mean_new_tokens"] = tokens / len(ended) if ended else float("nan")

    return Result(summary, lines=lines())


def _ended(found: DecodeResult) -> list[bool]:
    return [] if found.ended is None else found.ended.tolist()


def _encoded(vocabulary: Vocabulary, lines: list[str]) -> list[list[int]]:
    """Return the ids of lines; a character that the model does not know is an error."""
    if isinstance(vocabulary, Characters):
        vocabulary = Characters(vocabulary.alphabet)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(vocabulary.encode(line))
        except ArgumentError as error:
            raise ArgumentError(f"Line {number}: {error}", argument="prompt") from error
    return rows
