"""Scores of tokens, and a page that shows them in colour."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from torch import Tensor

from kexue.core.errors import ArgumentError

__all__ = ["Pooling", "token_scores", "tokens_page"]

Pooling = Literal["sum", "l2", "absmax"]

_RED, _BLUE = "214,39,40", "31,119,180"
_STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
p { margin: 0 0 1.2em; overflow-wrap: anywhere; }
small { display: block; color: #666; line-height: 1.4; }
span { padding: .15em .2em; border-radius: .2em; white-space: pre-wrap; }
"""


def token_scores(values: Tensor, pooling: Pooling = "sum") -> Tensor:
    """Return one score per token from the values of its vector.

    Args:
        values: Attributions to embeddings, ``[..., feature]``.
        pooling: ``"sum"`` keeps the sign, and the scores of a text still add up to the difference
            of the outputs; ``"l2"`` is the norm, as in the post's code, and ``"absmax"`` the
            largest absolute value: importance without direction.

    Returns:
        Shape ``[...]``.

    Raises:
        ArgumentError: If the pooling is unknown or there is no axis of features.
    """
    if pooling not in ("sum", "l2", "absmax"):
        raise ArgumentError(
            f"`pooling` must be 'sum', 'l2' or 'absmax'. Found {pooling!r}.", argument="pooling"
        )
    if not values.ndim or not values.shape[-1]:
        raise ArgumentError(
            f"`values` must have shape [..., feature]. Found {list(values.shape)}.",
            argument="values",
        )
    if pooling == "sum":
        return values.sum(-1)
    return values.norm(2 if pooling == "l2" else float("inf"), dim=-1)  # type: ignore[no-any-return]


def tokens_page(
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float] | Tensor],
    captions: Sequence[str] = (),
    *,
    title: str = "Attributions",
) -> str:
    """Return a self-contained HTML page of tokens: red speaks for the output, blue against it.

    The strongest token of a text has the full colour; whatever the tokens hold is escaped.

    Args:
        texts: The tokens of each text.
        scores: A score per token.
        captions: A line for each text; none by default.
        title: Title of the page.

    Raises:
        ArgumentError: If the numbers of texts, tokens, scores or captions do not agree.
    """
    lengths = [len(tokens) for tokens in texts]
    if lengths != [len(row) for row in scores]:
        raise ArgumentError(
            f"`scores` must have one score per token, {lengths}. "
            f"Found {[len(row) for row in scores]}.",
            argument="scores",
        )
    if captions and len(captions) != len(texts):
        raise ArgumentError(
            f"`captions` must have one line per text, {len(texts)}. Found {len(captions)}.",
            argument="captions",
        )
    rows = []
    for number, (tokens, row) in enumerate(zip(texts, scores, strict=True)):
        numbers = [float(score) for score in row]
        top = max((abs(score) for score in numbers), default=0.0) or 1.0
        spans = " ".join(
            _span(token, score, top) for token, score in zip(tokens, numbers, strict=True)
        )
        caption = f"<small>{escape(captions[number])}</small>" if captions else ""
        rows.append(f"<p>{caption}{spans}</p>")
    return (
        f'<!doctype html>\n<html>\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(rows)
        + "\n</body>\n</html>\n"
    )


def _span(token: str, score: float, top: float) -> str:
    colour = _RED if score > 0 else _BLUE
    return (
        f'<span style="background:rgba({colour},{0.8 * abs(score) / top:.3f})" '
        f'title="{score:+.4g}">{escape(token)}</span>'
    )
