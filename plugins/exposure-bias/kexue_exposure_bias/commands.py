"""``kexue run sampler/token-replacement``: on lines of text, pairs of them, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError, Samples
from kexue.core.component import PAD
from kexue.core.errors import FileFormatError
from kexue.core.files import ARRAY_SUFFIXES, read_lines
from kexue.core.job import Job, Result
from kexue.core.language import pad_ids
from kexue_exposure_bias.pictures import draw_replaced

__all__ = ["run"]

_CHUNK = 1024  # lines at once
_UNITS = ("characters", "words")
_OF_IDS = set(ARRAY_SUFFIXES) - {".txt", ".tsv"}  # these two are text, the latter pairs of it


def run(job: Job, *, num_samples: int = 1, unit: str = "characters") -> Result:
    """Write lines as a decoder may read them in training, with some tokens replaced.

    A line of text is a target; one with a tab in it is a source, which stays as it is, and a
    target. Files of arrays (.npy, .npz, .safetensors, .json, .jsonl, .csv) hold token ids
    [row, time], padded with -1.

    Args:
        job: The call.
        num_samples: How many draws of each line.
        unit: What a token of text is: characters, or words, which spaces separate.
    """
    if num_samples < 1:
        raise ArgumentError(
            f"`--num-samples` must be at least 1. Found {num_samples}.", argument="num_samples"
        )
    if unit not in _UNITS:
        raise ArgumentError(
            f"`--unit` must be one of {', '.join(_UNITS)}. Found {unit!r}.", argument="unit"
        )
    paths = [name.rpartition("=")[2] for name in job.files]
    if any(Path(path).suffix.lower() in _OF_IDS for path in paths):
        return _on_ids(job, num_samples)
    return _on_text(job, num_samples, unit)


def _on_ids(job: Job, num_samples: int) -> Result:
    tensors = job.tensors()
    drawn: Samples = job.build().sample(
        **tensors, num_samples=num_samples, generator=job.generator()
    )
    target = tensors["target"]
    mask = tensors.get("mask", target >= 0)
    return Result(
        {"rows": len(target), "samples": num_samples, **drawn.diagnostics},
        {"values": drawn.values},
        plot=partial(draw_replaced, drawn.values[0] != target, mask),
    )


# -- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A line of text as tokens.

    Args:
        source: What stands before the tab; None without one.
        target: What is replaced.
    """

    source: Sequence[str] | None
    target: Sequence[str]


def _on_text(job: Job, num_samples: int, unit: str) -> Result:
    lines = _read(job, unit)
    tokens = sorted({t for line in lines for t in (*line.target, *(line.source or ()))})
    ids = {token: i for i, token in enumerate(tokens)}
    replace = job.build(num_tokens=len(tokens))
    _check_pairs(replace, lines)
    generator = job.generator()
    written: list[str] = []
    pictures: list[tuple[Tensor, Tensor]] = []
    rows, changed, real = 0, 0, 0
    with job.progress.task("replacing", len(lines)) as bar:
        for start in range(0, len(lines), _CHUNK):
            chunk = lines[start : start + _CHUNK]
            target = _ids([line.target for line in chunk], ids, job.device)
            source = _ids([line.source or () for line in chunk], ids, job.device)
            values = replace.sample(target, num_samples, source=source, generator=generator).values
            other = values != target
            rows += int(other.any(2).sum())
            changed += int(other.sum())
            real += num_samples * int((target >= 0).sum())
            pictures = pictures or [(other[0], target >= 0)]
            written += _texts(chunk, values, tokens, unit)
            bar.advance(len(chunk))
    summary = {
        "rows": len(lines),
        "samples": num_samples,
        "changed_rows": rows / max(1, num_samples * len(lines)),
        "changed_tokens": changed / max(1, real),
    }
    return Result(
        summary, lines=written, plot=partial(draw_replaced, *pictures[0]) if pictures else None
    )


def _read(job: Job, unit: str) -> list[_Line]:
    def cut(text: str) -> Sequence[str]:
        return text.split() if unit == "words" else text

    found = []
    for path in job.files or ("-",):
        for number, line in enumerate(read_lines(path), 1):
            if line.count("\t") > 1:
                raise FileFormatError(
                    f"Line {number} of {path} must be a target, or a source, a tab and a target. "
                    f"Found {line.count(chr(9))} tabs.",
                    path=path,
                )
            source, tab, target = line.rpartition("\t")
            found.append(_Line(cut(source) if tab else None, cut(target)))
    if not found:
        raise FileFormatError(f"{' '.join(job.files) or 'The input'} holds no lines.")
    return found


def _check_pairs(replace: Any, lines: Sequence[_Line]) -> None:
    if replace.pool == "source_target":
        for number, line in enumerate(lines, 1):
            if line.source is None:
                raise ArgumentError(
                    f"`source` must be in every line for pool='source_target': a source, a tab and "
                    f"a target. Found no tab in line {number}.",
                    argument="source",
                )


def _ids(rows: Sequence[Sequence[str]], ids: dict[str, int], device: torch.device) -> Tensor:
    return pad_ids([[ids[t] for t in row] for row in rows], device=device, pad_id=PAD)[0]


def _texts(chunk: Sequence[_Line], values: Tensor, tokens: Sequence[str], unit: str) -> list[str]:
    """Return the draws of each line below each other, sources before their tabs."""
    between = " " if unit == "words" else ""
    texts = []
    for line, draws in zip(chunk, values.transpose(0, 1).tolist(), strict=True):
        head = "" if line.source is None else between.join(line.source) + "\t"
        texts += [head + between.join(tokens[i] for i in row if i != PAD) for row in draws]
    return texts
