"""Google-style docstrings, as far as the framework reads them.

A general parser of four dialects costs every ``kexue show`` 10 ms; the house has one dialect.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Docstring", "parse_docstring"]

_HEADER = re.compile(
    r"(Args|Arguments|Attributes|Examples?|Keyword|Notes?|Raises|References|Returns|Shape|Warning"
    r"|Warns|Yields):[ ]*$"
)
_ENTRY = re.compile(r"\*{0,2}(\w+)(?: *\([^)]*\))?:[ ]*(.*)$")


class Docstring(NamedTuple):
    """A docstring in parts.

    Args:
        prose: What stands before the first section.
        params: What ``Args`` says of each argument, on one line.
        sections: The other sections, dedented.
    """

    prose: str
    params: dict[str, str]
    sections: dict[str, str]

    @property
    def returns(self) -> str:
        """What ``Returns`` says, on one line."""
        return " ".join(self.sections.get("Returns", "").split())

    @property
    def example(self) -> str:
        """The lines of the first example: what is typed at ``>>>`` and what comes back."""
        text = self.sections.get("Example") or self.sections.get("Examples") or ""
        return "\n".join(line for line in text.splitlines() if line.strip())


def parse_docstring(text: str) -> Docstring:
    """Split a dedented docstring into its parts."""
    prose: list[str] = []
    sections: dict[str, list[str]] = {}
    current = prose
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = sections.setdefault(header[1], [])
        elif current is not prose and line and not line.startswith(" "):
            prose.append(line)  # a section ends where the text is no longer indented
            current = prose
        else:
            current.append(line)
    bodies = {name: _dedented(lines) for name, lines in sections.items()}
    arguments = bodies.pop("Args", "") or bodies.pop("Arguments", "")
    return Docstring("\n".join(prose).strip(), _entries(arguments), bodies)


def _dedented(lines: list[str]) -> str:
    widths = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    margin = min(widths, default=0)
    return "\n".join(line[margin:] for line in lines).strip("\n")


def _entries(text: str) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        entry = None if line.startswith(" ") else _ENTRY.match(line)
        if entry is not None:
            current = entries.setdefault(entry[1], [])
            current.append(entry[2])
        else:
            current.append(line.strip())
    return {name: " ".join(filter(None, parts)) for name, parts in entries.items()}
