"""What the terminal shows: tables, bars, JSON."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from kexue.core.job import Progress, Quiet
from kexue.core.text import format_cell

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "note",
    "only_json",
    "print_facts",
    "print_json",
    "print_table",
    "print_text",
    "progress",
]

_LEAST = 30  # columns that the last column of a table needs, to be read


_document: TextIO | None = None  # where the one document goes while only_json() holds


@contextmanager
def only_json() -> Iterator[None]:
    """Keep standard output for what :func:`print_json` prints.

    Whatever else is printed, by plugins and by what they import, goes to standard error.
    """
    global _document  # noqa: PLW0603 -- one process, one standard output
    _document = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _document = None


def print_json(document: Any) -> None:
    """Print one JSON document; what JSON lacks becomes ``"NaN"``, ``"Infinity"``, or text."""
    stream = _document or sys.stdout
    unicode = (stream.encoding or "utf-8").lower().startswith("utf")
    options: dict[str, Any] = {"indent": 2, "ensure_ascii": not unicode, "default": str}
    try:
        text = json.dumps(document, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(_finite(document), **options)
    print(text, file=stream)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table: drawn on a terminal, aligned plain text in a pipe."""
    cells = [[format_cell(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw_table(columns, cells, title)
        return
    if title:
        print(title)
    widths = _widths([list(columns), *cells])
    for row in [list(columns), *cells]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _draw_table(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    *before, last = _widths([list(columns), *cells])
    room = console.width - sum(before) - 3 * len(before) - 4
    if room < min(last, _LEAST):
        _print_stacked(console, columns, cells, title)
        return
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for i, column in enumerate(columns):
        end = i == len(columns) - 1
        table.add_column(column, overflow="fold", ratio=1 if end else None, no_wrap=not end)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _print_stacked(
    console: Console, columns: Sequence[str], cells: Sequence[Sequence[str]], title: str
) -> None:
    """Print the last column under the others, where it would be too narrow beside them."""
    from rich.padding import Padding
    from rich.text import Text

    widths = _widths([list(columns), *cells])[:-1]
    if sum(widths) + 2 * len(widths) > console.width:
        widths = [0] * len(widths)
    if title:
        console.print(Text(title, style="italic"))
    for style, row in (("italic", columns), *(("bold", row) for row in cells)):
        *head, last = row
        line = "  ".join(cell.ljust(w) for cell, w in zip(head, widths, strict=True))
        console.print(Text(line.rstrip(), style=style))
        if last:
            indented = Padding(
                Text(last, style=style.replace("bold", "")), (0, 0, 0, 4), expand=False
            )
            console.print(indented)


def print_text(text: str) -> None:
    """Print prose; on a terminal, paragraphs are filled to its width."""
    print("\n\n".join(map(_filled, text.split("\n\n"))))


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one below the other."""
    width = max(map(len, facts), default=0) + 2
    for name, value in facts.items():
        print(_filled(f"{name:{width}}{value}", hanging=width))


def _filled(paragraph: str, hanging: int = 0) -> str:
    """Return a paragraph filled to the terminal's width; as it is in a pipe, or if it is laid out.

    Args:
        paragraph: Lines without a blank one.
        hanging: How far all lines but the first are indented.
    """
    width = shutil.get_terminal_size().columns
    lines = paragraph.splitlines()
    laid_out = any(line.startswith(" ") for line in lines)
    if not sys.stdout.isatty() or laid_out or all(len(line) <= width for line in lines):
        return paragraph
    return textwrap.fill(
        " ".join(lines),
        width,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


class _Bars:
    """Progress as bars on a terminal; lines that stay go to standard error in any case."""

    def __init__(self) -> None:
        self._live: Any = None

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Any]:
        if not sys.stderr.isatty():
            with Quiet().task(description, total) as quiet:
                yield quiet
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        outer = self._live
        if outer is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
        live = self._live
        number = live.add_task(description, total=total, shown="")
        try:
            yield _Bar(live, number)
        finally:
            live.remove_task(number)
            if outer is None:
                live.stop()
                self._live = None

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            note(text)


class _Bar:
    def __init__(self, live: Any, number: Any) -> None:
        self._live, self._number = live, number

    def advance(self, steps: float = 1, **shown: Any) -> None:
        text = "  ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
        )
        self._live.update(self._number, advance=steps, shown=text)


def progress(*, quiet: bool) -> Progress:
    """Return where long work reports to; nowhere if ``quiet``."""
    return Quiet() if quiet else _Bars()
