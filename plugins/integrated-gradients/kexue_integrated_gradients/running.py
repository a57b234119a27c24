"""``kexue run attribution/…``: a model and a file of rows to attributions and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError
from kexue.core.files import read_arrays
from kexue.core.inputs import read_floats
from kexue.core.job import Job, Result
from kexue_integrated_gradients.explaining import explain
from kexue_integrated_gradients.models import load_model
from kexue_integrated_gradients.results import as_result
from kexue_integrated_gradients.rows import Rows, Tokens, read_rows
from kexue_integrated_gradients.tokens import Pooling, token_scores

__all__ = ["run"]


def run(
    job: Job,
    *,
    target: str = "predicted",
    baseline: str = "zero",
    layer: str | None = None,
    tokenizer: str | None = None,
    layout: str = "channels-first",
    pooling: str = "sum",
) -> Result:
    """Explain what a model makes of a file: MODEL INPUTS [baselines=FILE] [target=FILE].

    MODEL is TorchScript, an exported program (.pt2) or file.py:model. INPUTS are rows of numbers,
    an image or a folder of images (0 to 1), token ids, or with --tokenizer lines of text. Rows of
    baselines=FILE are averaged over; target=FILE holds an index per row. --plot draws bars, heat
    maps, or with .html the tokens in colour.

    Args:
        job: The call.
        target: Which output: predicted (the highest), an index, or indices like 3,1.
        baseline: What inputs are compared with: zero, mean (of the inputs), or a number, which for
            tokens is an id.
        layer: The layer to attribute to; for tokens the embedding, if there is more than one.
        tokenizer: file.py:function from a text to its ids, or to (ids, tokens).
        layout: How the model takes images: channels-first, channels-last or flat.
        pooling: One score per token from its vector: sum, l2 or absmax.
    """
    given, files = _files(job)
    token_scores(torch.zeros(1), cast(Pooling, pooling))  # refuses an unknown one before the work
    model = load_model(job, given[0], by_layer=bool(layer or tokenizer))
    ids = layer is not None or bool(_embeddings(model))
    rows = read_rows(job, given[1], tokenizer=tokenizer, layout=layout, ids=ids)
    # the weights were for the model
    attribution: Any = dataclasses.replace(job, weights=None).build()
    found = explain(
        attribution,
        model,
        rows,
        targets=_targets(job, target, files.get("target"), len(rows)),
        baselines=_baselines(job, rows, baseline, files.get("baselines")),
        layer=_embedding(model) if isinstance(rows, Tokens) and layer is None else layer,
        pooling=cast(Pooling, pooling),
        progress=job.progress,
    )
    return as_result(rows, found, title=job.id, tolerance=getattr(attribution, "tolerance", None))


def _files(job: Job) -> tuple[list[str], dict[str, str]]:
    """Return the model and the inputs, and the files that were named."""
    named: dict[str, str] = {}
    plain: list[str] = []
    for given in job.files:
        name, separator, path = given.partition("=")
        if separator and name in {"baselines", "target", "model", "inputs"}:
            named[name] = path
        else:
            plain.append(given)
    for name in ("inputs", "model"):
        if name in named:
            plain.insert(len(plain) if name == "inputs" else 0, named.pop(name))
    if len(plain) != 2:
        raise ArgumentError(
            f"{job.id} takes a model and its inputs, in this order. Found {len(plain)} "
            f"{'file' if len(plain) == 1 else 'files'}.",
            argument="files",
        )
    return plain, named


def _embeddings(model: Callable[..., Any]) -> list[str]:
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return [name for name, module in modules if isinstance(module, nn.Embedding) and name]


def _embedding(model: Callable[..., Any]) -> str:
    """Return the name of the only embedding."""
    found = _embeddings(model)
    if len(found) == 1:
        return found[0]
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    known = found or [name for name, _ in named if name]
    raise ArgumentError(
        f"`--layer` must name the embedding that the ids go through. "
        f"The model has: {', '.join(known) or 'no layers that can be seen'}.",
        argument="layer",
    )


def _targets(job: Job, target: str, path: str | None, rows: int) -> Callable[[list[int]], Any]:
    """Return what gives the targets of some rows; None stands for the highest output."""
    if path is not None:
        index = _target_file(path, rows).to(job.device)
        return lambda numbers: index[numbers]
    if target == "predicted":
        return lambda _: None
    try:
        given = tuple(int(part) for part in target.split(","))
    except ValueError as error:
        raise ArgumentError(
            f"`--target` must be predicted, an index, or indices like 3,1. Found {target!r}.",
            argument="target",
        ) from error
    return lambda _: given


def _target_file(path: str, rows: int) -> Tensor:
    array = next(iter(read_arrays(path).values()))
    if array.ndim not in {1, 2} or len(array) != rows:
        raise ArgumentError(
            f"`target` in {path} must have one index for each of the {rows} rows. "
            f"Found shape {list(array.shape)}.",
            argument="target",
        )
    if not np.array_equal(array, np.floor(array)):
        raise ArgumentError(f"`target` in {path} must be whole numbers.", argument="target")
    return torch.from_numpy(array.astype(np.int64))


def _baselines(
    job: Job, rows: Rows | Tokens, baseline: str, path: str | None
) -> Callable[[Tensor], Any]:
    """Return what gives the baselines for some inputs."""
    number = _number(baseline)
    if isinstance(rows, Tokens):
        if path is not None or not (baseline == "zero" or (number is not None and number >= 0)):
            raise ArgumentError(
                f"`--baseline` must be zero, the zero vector, or the id of a token. "
                f"Found {path or baseline!r}.",
                argument="baseline",
            )
        if baseline == "zero":
            return lambda _: None
        return lambda ids: torch.full_like(ids, int(number or 0))
    if path is not None:
        several = _rows_of(job, path, rows)
        return lambda _: several
    if baseline == "mean":
        mean = rows.values.double().mean(0).to(rows.values.dtype)
        return lambda _: mean
    if baseline != "zero" and number is None:
        raise ArgumentError(
            f"`--baseline` must be zero, mean or a number; a file is given as baselines=FILE. "
            f"Found {baseline!r}.",
            argument="baseline",
        )
    return lambda _: number or 0.0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _rows_of(job: Job, path: str, rows: Rows) -> list[Tensor]:
    """Read baselines: one, or several along the first axis."""
    values = read_floats(job, path, "baselines", rows=True)
    shape = rows.values.shape[1:]
    if values.shape != shape and values.shape[1:] != shape:
        raise ArgumentError(
            f"`baselines` in {path} must have the shape of a row, {list(shape)}, or several along "
            f"the first axis. Found {list(values.shape)}.",
            argument="baselines",
        )
    return [values] if values.shape == shape else list(values)
