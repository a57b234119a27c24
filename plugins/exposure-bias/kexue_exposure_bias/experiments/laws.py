"""Exact and counted: the post's example of a beam that is too wide, and the law of replacement."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.component import PAD
from kexue.core.device import make_generator
from kexue.core.lab.data import text
from kexue.core.language import Characters, beam_search, pad_ids
from kexue.core.text import spread
from kexue_exposure_bias.pictures import draw_replaced
from kexue_exposure_bias.replacement import TokenReplacement

__all__ = ["beams", "law"]

_POST = "https://kexue.fm/archives/7259"

# -- the post's example ----------------------------------------------------------------------------

_TOKENS = "abcd"
_FIRST = {"a": 0.6, "c": 0.4}
_NEXT = {"a": {"b": 0.55, "d": 0.45}, "c": {"b": 0.1, "d": 0.9}}
_JOINT = {"ab": 0.33, "ad": 0.27, "cb": 0.04, "cd": 0.36}
_START = len(_TOKENS)
_CULPRIT = (
    "p(d given c) = 0.9 is the culprit: no training example has c at the start, so nothing has "
    "ever pushed it down."
)


def _table() -> Tensor:
    """Return log p(next | last) of the post's two tables; the last row is that of the start."""
    table = torch.zeros(_START + 1, _START + 1, dtype=torch.float64)
    for token, p in _FIRST.items():
        table[_START, _TOKENS.index(token)] = p
    for last, following in _NEXT.items():
        for token, p in following.items():
            table[_TOKENS.index(last), _TOKENS.index(token)] = p
    return table.log()


def beams(context: Context) -> Report:
    """Decode the post's example with beams of one and two."""
    table = _table().to(context.device)
    prompt = torch.full((1, 1), _START, device=context.device)

    def best(width: int, count: int = 1) -> list[tuple[str, float]]:
        found = beam_search(
            lambda ids: table[ids[:, -1]],
            prompt,
            width=width,
            max_new_tokens=2,
            num_return=count,
        )
        words = ["".join(_TOKENS[i] for i in row) for row in found.tolist()]
        return list(zip(words, found.scores.exp().tolist(), strict=True))

    (narrow,), (wide,) = best(1), best(2)
    every = dict(best(4, 4))
    error = max(abs(every.get(word, 0.0) - p) for word, p in _JOINT.items())
    return Report(
        [
            Claim(
                "A model that is right at every step under teacher forcing finds its target ab "
                "with a beam of 1 and loses it with a beam of 2.",
                f"{_POST}, section “简单例子”",
                f"beam 1: {narrow[0]} of probability {narrow[1]:.2f}; beam 2: {wide[0]} of "
                f"{wide[1]:.2f}; greatest error of a joint probability {error:.1e}.",
                "ab of 0.33, cd of 0.36, and no error above 1e-9.",
                narrow[0] == "ab"
                and wide[0] == "cd"
                and abs(narrow[1] - 0.33) + abs(wide[1] - 0.36) < 1e-9
                and error < 1e-9,
            )
        ],
        [
            Table(
                "All sequences of the example",
                ["sequence", "probability"],
                sorted(every.items(), key=lambda row: -row[1]),
            )
        ],
        notes=[_CULPRIT],
    )


# -- the law of replacement ------------------------------------------------------------------------


def law(context: Context) -> Report:
    """Count what is replaced, by what, in lines of text."""
    lines = [line for line in text().train if len(line) >= 40]
    characters = Characters.of(lines)
    ids, mask = pad_ids(list(map(characters.encode, lines)), pad_id=PAD)
    ids, mask = ids.to(context.device), mask.to(context.device)
    held = _counts(ids, mask, characters.size)
    other = _other_share(ids, mask, held)
    rounds = context.pick(10, 5)
    chosen, replaced, strangers = [], [], 0
    for seed in context.seeds:
        generator = make_generator(seed, context.device)
        rows, tokens, possible = 0, 0, 0.0
        for _ in range(rounds):
            found = TokenReplacement()(ids, generator=generator)
            changed = found != ids
            hit = changed.any(1)
            rows += int(hit.sum())
            tokens += int(changed.sum())
            possible += float(other[hit].sum())
            strangers += int(((held.gather(1, found.clamp(min=0)) == 0) & mask).sum())
        chosen.append(rows / (rounds * len(ids)))
        replaced.append(tokens / possible)
    total = rounds * int(mask.sum())
    example = TokenReplacement(prob=1.0)(ids[:24, :80], generator=make_generator(0, context.device))
    missed = float((-0.3 * other).log1p().sum(1).exp().mean())
    note = (
        f"{len(lines)} lines of at least 40 characters of CPython's help topics. A row counts as "
        "chosen if anything in it changed; a chosen one stays as it is with the probability "
        f"{missed:.0e} on average."
    )
    return Report(
        [
            Claim(
                "Half of the samples stay as they are; in the others 30 % of the tokens are "
                "replaced, by tokens of the same target.",
                f"{_POST}, section “构建负样本”",
                f"{total} tokens a seed: {spread(chosen)} of the rows; in these {spread(replaced)} "
                f"of the tokens, relative to the chance that a donor is another token; "
                f"{strangers} donors from elsewhere.",
                "0.50 ± 0.01 and 0.30 ± 0.01 on every seed, no donor from elsewhere.",
                all(abs(p - 0.5) < 0.01 for p in chosen)
                and all(abs(p - 0.3) < 0.01 for p in replaced)
                and not strangers,
            )
        ],
        figures=[
            Figure(
                "What is replaced",
                partial(draw_replaced, example != ids[:24, :80], mask[:24, :80]),
                "The first 80 characters of 24 chosen lines; red: other than it was.",
            )
        ],
        notes=[note],
    )


def _counts(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """Return how often each row holds each token, shape ``[row, token]``."""
    held = torch.zeros(len(ids), size, device=ids.device)
    return held.scatter_add_(1, ids.clamp(min=0), mask.float())


def _other_share(ids: Tensor, mask: Tensor, held: Tensor) -> Tensor:
    """Return, for each token, the chance that a donor of its row is another; 0 at padding."""
    same = held.gather(1, ids.clamp(min=0)) / mask.sum(1, keepdim=True)
    return torch.where(mask, 1 - same, 0.0)
