"""One self-contained page, and the same as JSON."""

from __future__ import annotations

import base64
import datetime as dt
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kexue.core.environment import environment
from kexue.core.experiments import Figure, Outcome, to_json
from kexue.core.files import atomic_write, write_json
from kexue.core.plots import draw
from kexue.core.text import format_cell

__all__ = ["drawn", "write_report"]

_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


def write_report(
    outcomes: Sequence[Outcome], folder: Path, *, command: str, quick: bool, jobs: int = 1
) -> Path:
    """Write ``report.html`` and ``report.json``.

    Args:
        outcomes: What was run.
        folder: Where; made if it does not exist.
        command: The command that shows it again.
        quick: Whether it was the smaller version.
        jobs: How many processes ran side by side.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = [c for o in outcomes if o.report for c in o.report.claims]
    facts = {
        "command": command,
        "quick": quick,
        "jobs": jobs,
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "held": sum(c.holds for c in claims),
        "total": len(claims),
        "environment": environment(),
    }
    page = _render(outcomes, facts)
    write_json(folder / "report.json", {**facts, "experiments": [to_json(o) for o in outcomes]})
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


def _render(outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> str:
    import jinja2

    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = format_cell
    pictures = {
        o.experiment.id: [
            {
                "title": f.title,
                "caption": f.caption,
                "svg": base64.b64encode(_svg(f.plot)).decode(),
            }
            for f in (o.report.figures if o.report else ())
        ]
        for o in outcomes
    }
    template = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(outcomes=outcomes, pictures=pictures, **facts)


@dataclass(frozen=True)
class _Drawn:
    """What has drawn a picture already."""

    svg: bytes

    def __call__(self, canvas: object) -> None:
        raise TypeError(f"The picture is drawn; it cannot be drawn into {canvas}.")


def drawn(figure: Figure) -> Figure:
    """Return a picture that needs nothing more to be drawn, and can be pickled."""
    return replace(figure, plot=_Drawn(_svg(figure.plot)))


def _svg(plot: Callable[[Any], object]) -> bytes:
    if isinstance(plot, _Drawn):
        return plot.svg
    buffer = io.BytesIO()
    draw(plot).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
