"""Repetition in four pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kexue_repetition.analyzer import Repetition
from kexue_repetition.index import repetition_index
from kexue_repetition.truncation import truncate_transitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DECODINGS", "overview"]

_BLUE, _RED, _GREY = "#3465a4", "#cc0000", "#888a85"

DECODINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.5": {"top_p": 0.5},
    "top-20": {"top_k": 20},
    "top-5": {"top_k": 5},
    "top-2": {"top_k": 2},
    "greedy": {"top_k": 1},
}
"""Ways of decoding that are compared."""


def overview(found: Repetition, figure: Figure) -> None:
    """Draw loops by length, the bounds, the worst pairs, and what truncation makes of R.

    Args:
        found: What was analyzed.
        figure: An empty figure.
    """
    figure.set_size_inches(11, 7.5)
    ((lengths, bounds), (pairs, decodings)) = figure.subplots(2, 2)
    _lengths(found, lengths)
    _bounds(found, bounds)
    _pairs(found, pairs)
    _decodings(found, decodings)


def _lengths(found: Repetition, axes: Any) -> None:
    values = found.by_length.numpy()
    shown = values[:20]
    axes.bar(range(1, len(shown) + 1), shown, color=_BLUE)
    axes.set(xlabel="tokens of the loop", ylabel="Tr Sᵏ", title="R by the length of loops")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _bounds(found: Repetition, axes: Any) -> None:
    rows = [
        ("upper bound, nλ₁/(1 − λ₁)", found.upper, _GREY),
        ("ζ estimate, by first token", found.zeta_diagonal, _RED),
        ("ζ estimate, all loops", found.zeta_trace, _RED),
        ("R", found.value, _BLUE),
        ("lower bound, by first token", found.lower_diagonal, _GREY),
        ("lower bound, all loops", found.lower_trace, _GREY),
    ]
    values = np.array([float(value) for _, value, _ in rows])
    usable = np.isfinite(values) & (values > 0)
    if usable.any():
        axes.set_xscale("log")
        low, high = values[usable].min() / 3, values[usable].max() * 3
        for place, value in enumerate(values):
            end = value if usable[place] else high if value > 0 else low
            axes.plot([low, end], [place, place], color=rows[place][2], linewidth=6, alpha=0.35)
            axes.plot(end, place, "o", color=rows[place][2])
            text = f"{value:.3g}" if np.isfinite(value) else "∞"
            axes.annotate(text, (end, place), (0, 7), textcoords="offset points", ha="center")
        axes.set_xlim(low, high * 2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(-0.5, len(rows) - 0.2)
    axes.set_title("R, bounds, and the ζ estimates")


def _pairs(found: Repetition, axes: Any) -> None:
    name = found.transitions.name
    drops = found.pair_drop.numpy()[:15]
    finite = drops[np.isfinite(drops)]
    top = float(finite.max()) if len(finite) else 1.0
    values = np.where(np.isfinite(drops), drops, 1.2 * top)
    labels = [
        f"{_drawable(name(i), i)} → {_drawable(name(j), j)}"
        for i, j in found.pairs.tolist()[: len(values)]
    ]
    colors = [_BLUE if math.isfinite(drop) else _RED for drop in drops]
    axes.barh(range(len(values)), values, color=colors)
    axes.set_yticks(range(len(values)), labels, fontsize=8, family=_fonts())
    axes.invert_yaxis()
    axes.set(xlabel="R falls by (red: infinite)", title="The worst pairs")


def _fonts() -> list[str]:
    """Return the installed fonts for Chinese, Japanese and Korean behind the default."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC"]
    wanted += ["Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"]
    return ["DejaVu Sans", *(font for font in wanted if font in known)]


def _drawable(name: str, number: int) -> str:
    """Return a token, or its number where no font has its characters or it is only space."""
    from matplotlib import font_manager

    paths = [font_manager.findfont(font) for font in _fonts()]
    fonts = [font_manager.get_font(path) for path in paths]
    if name.strip() and all(any(f.get_char_index(ord(c)) for f in fonts) for c in name):
        shown = name.replace("$", r"\$")
        return shown if len(shown) <= 14 else shown[:13] + "…"
    return "␣" * len(name) if name and not name.strip(" ") else f"#{number}"


def _decodings(found: Repetition, axes: Any) -> None:
    names, values = [], []
    for name, settings in DECODINGS.items():
        names.append(name)
        values.append(repetition_index(truncate_transitions(found.transitions, **settings)).value)
    shown = np.array(values)
    finite = shown[np.isfinite(shown)]
    top = 1.3 * (float(finite.max()) if len(finite) and finite.max() > 0 else 1.0)
    colors = [_BLUE if math.isfinite(value) else _RED for value in values]
    axes.bar(names, np.where(np.isfinite(shown), shown, top), color=colors)
    for place, value in enumerate(values):
        text = f"{value:.3g}" if math.isfinite(value) else "∞"
        height = value if math.isfinite(value) else top
        axes.annotate(text, (place, height), (0, 2), textcoords="offset points", ha="center")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylabel="R", title="What truncation makes of it")
