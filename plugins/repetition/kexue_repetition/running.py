"""``kexue run analyzer/…``: texts, a transition matrix or a model to figures and a picture."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.job import Job, Result
from kexue.core.lab.texts import load_text_model, prompts
from kexue.core.language import pad_ids
from kexue_repetition.analyzer import Repetition
from kexue_repetition.estimation import estimate_transitions, numbered
from kexue_repetition.pictures import overview
from kexue_repetition.reading import Given, read_files
from kexue_repetition.rebalancing import RebalancedEncoding
from kexue_repetition.sampling import model_transitions
from kexue_repetition.statistics import (
    immediate_repeats,
    longest_repeat,
    repeated_ngrams,
    repeated_tokens,
)
from kexue_repetition.transitions import Transitions, with_float64

__all__ = ["apply", "run"]


def run(
    job: Job,
    *,
    tokenizer: str = "words",
    ended: bool = True,
    unseen: float = 0.0,
    gamma: float | None = None,
) -> Result:
    """Say how much texts repeat themselves, or a decoder would: FILES or MATRIX [tokens=FILE].

    FILES are texts, a line each (.jsonl: strings, {"text": …} or lists of tokens); their transition
    matrix is estimated. MATRIX is an array [token, token] without the end token (.npy, .npz,
    .safetensors, .csv, .tsv, or scipy's sparse .npz). Printed are the worst pairs, written with -o
    all figures; --plot draws loops by length, bounds, worst pairs, and what truncation does.

    Args:
        job: The call.
        tokenizer: How texts are split: words (at spaces), characters, or file.py:function.
        ended: Whether the texts ended where their lines do, or were cut off.
        unseen: Occurrences of something unseen that are added behind each token; above 0 no
            transition is certain.
        gamma: Merge pairs that are likelier than this first (rebalanced encoding), in (0, 1).
    """
    given = read_files(job, tokenizer)
    job.build()  # refuses wrong settings before the work
    if gamma is not None and given.texts is None:
        raise ArgumentError("`--gamma` merges pairs of texts. Found a matrix.", argument="gamma")
    summary: dict[str, Any] = {}
    if given.texts is not None:
        if gamma is not None:
            encoding = RebalancedEncoding(gamma).fit(given.texts)
            given = Given(list(encoding.encode_all(given.texts)), None)
            summary["phrases"] = len(encoding.phrases)
        ids, tokens = numbered(given.texts or [])
        summary |= text_statistics(ids)
        transitions = estimate_transitions(ids, tokens=tokens, ended=ended, unseen=unseen)
    else:
        if unseen or not ended:
            name = "unseen" if unseen else "ended"
            raise ArgumentError(f"`--{name}` is about texts. Found a matrix.", argument=name)
        transitions = given.transitions or Transitions.of([])
    return analysed(job, transitions, summary)


def apply(
    job: Job, *, samples: int = 100, max_new_tokens: int = 200, unseen: float = 0.0
) -> Result:
    """Let a model write behind each line of FILES, or from nothing, and analyze what it wrote.

    MODEL is a folder of `kexue fit` or of transformers. The settings temperature, top_k and top_p
    are those of its decoding here; the transition matrix is that of what it wrote.

    Args:
        job: The call.
        samples: Texts per prompt.
        max_new_tokens: Tokens of a text at most.
        unseen: Occurrences of something unseen that are added behind each token; above 0 no
            transition is certain.
    """
    loaded = load_text_model(str(job.model), device=job.device, dtype=job.dtype)
    vocabulary = loaded.vocabulary
    lines = list(prompts(job)) if job.files else [""]
    rows = [vocabulary.encode(line) for line in lines]
    if not all(rows) and loaded.model is not None and vocabulary.bos_id is not None:
        # a model of characters puts the first token before the prompt itself
        own = getattr(loaded.model, "vocabulary", None) is not None
        rows = [row or ([] if own else [vocabulary.bos_id]) for row in rows]
    prompt, mask = pad_ids(rows, device=job.device)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    decoding = {key: job.params.get(key, value) for key, value in settings.items()}
    transitions, ids = model_transitions(
        loaded.scorer(),
        prompt,
        mask=mask,
        samples=samples,
        max_new_tokens=max_new_tokens,
        unseen=unseen,
        generator=job.generator(),
        **decoding,
    )
    names = tuple(_named(vocabulary, i) for i in range(len(transitions)))
    rest = {key: value for key, value in job.params.items() if key not in settings}
    found = Transitions(transitions.matrix, names, transitions.start, transitions.device)
    return analysed(dataclasses.replace(job, params=rest), found, text_statistics(ids.cpu()))


def _named(vocabulary: Any, token: int) -> str:
    """Return a token as text, and one that is no text by its number."""
    return vocabulary.decode([token]) or f"<{token}>"


def analysed(job: Job, transitions: Transitions, summary: dict[str, Any]) -> Result:
    """Analyze a matrix, and return what the command line shows.

    Args:
        job: The call.
        transitions: The matrix.
        summary: What else is known.
    """
    if transitions.device is None:
        transitions = Transitions(
            transitions.matrix, transitions.tokens, transitions.start, with_float64(job.device)
        )
    found = job.build().analyze(transitions)
    if not isinstance(found, Repetition):
        return Result({**summary, **_plain(found)}, _tensors(found))
    return Result(
        {**summary, **_summary(found)},
        _tensors(found),
        lines=_lines(found),
        plot=partial(overview, found),
    )


def text_statistics(ids: Tensor) -> dict[str, Any]:
    """Return what is known of texts without a model of them.

    Args:
        ids: Shape ``[row, time]``, right-padded.
    """
    lengths = (ids >= 0).sum(1)
    longest = longest_repeat(ids)
    counts = immediate_repeats(ids) if ids.shape[1] > 2 else torch.zeros(1, 1)
    most = int(longest.length.argmax()) if len(ids) else 0
    return {
        "texts": len(ids),
        "tokens": int(lengths.sum()),
        "seq_rep_4": float(repeated_ngrams(ids, 4).mean()),
        "seq_rep_1_to_4": float(repeated_ngrams(ids, 4, pooled=True).mean()),
        "rep_16": float(repeated_tokens(ids, 16).mean()),
        "immediate_repeats_per_1000_tokens": 1000
        * float(counts.sum())
        / max(1, int(lengths.sum())),
        "longest_repeated_block": int(longest.length[most]) if len(ids) else 0,
        "in_text": most,
    }


def _summary(found: Repetition) -> dict[str, Any]:
    decoder = found.transitions
    low, high = found.row_bounds.tolist()
    summary: dict[str, Any] = {
        "vocabulary": len(decoder),
        "nonzero_transitions": decoder.matrix.nnz,
        "R": float(found.value),
        "R_per_token": float(found.value) / max(1, len(decoder)),
        "lower_bound_by_all_loops": float(found.lower_trace),
        "lower_bound_by_first_token": float(found.lower_diagonal),
        "upper_bound": float(found.upper),
        "largest_eigenvalue": float(found.eigenvalue),
        "rows_bound_it": f"{low:.4g} to {high:.4g}",
        "estimates_by_zeta": f"{float(found.zeta_trace):.4g} and {float(found.zeta_diagonal):.4g}",
    }
    if found.certain_loop:
        names = [repr(decoder.name(i)) for i in found.certain_loop[:10]]
        if len(found.certain_loop) > len(names):
            names.append(f"{len(found.certain_loop) - len(names)} more")
        summary["never_left"] = " → ".join(names)
    return summary


def _lines(found: Repetition) -> list[str]:
    """Return the worst pairs as a table."""
    name = found.transitions.name
    rows = zip(
        found.pairs.tolist(),
        found.pair_probability.tolist(),
        found.pair_drop.tolist(),
        found.pair_inflow.tolist(),
        strict=True,
    )
    header = f"{'R falls by':>12}  {'probability':>11}  {'inflow':>8}  pair"
    cells = [
        f"{_number(drop):>12}  {p:>11.4g}  {inflow:>8.4g}  {name(i)!r} → {name(j)!r}"
        for (i, j), p, drop, inflow in rows
    ]
    return [header, *cells] if cells else ["no loop is possible"]


def _number(value: float) -> str:
    return "all" if math.isinf(value) else f"{value:.4g}"


def _tensors(found: Any) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in found._fields}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _plain(found: Any) -> dict[str, Any]:
    return {name: float(value) for name, value in _tensors(found).items() if value.ndim == 0}
