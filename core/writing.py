"""Writing files whole: beside their place first, and renamed when all went well."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kexue.core.errors import FileFormatError, WorkError
from kexue.core.lines import detail

__all__ = ["atomic_path", "atomic_write", "check_place", "write_json", "write_lines"]


def check_place(path: str | Path) -> Path:
    """Return where a file can be written, links followed.

    Args:
        path: The file, which may exist.

    Raises:
        FileFormatError: If the folder does not exist or may not be written to, or something other
            than a file is there.
    """
    if str(path) == "-":
        raise FileFormatError(
            "`-` is no place to write to. Without it, results go to standard output.", path=path
        )
    try:
        place = Path(os.path.realpath(path))
        there = place.stat().st_mode if place.exists() else None
        folder = place.parent.is_dir()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be written: {detail(error)}.", path=path) from error
    if there is not None and stat.S_ISDIR(there):
        raise FileFormatError(f"{path} is a folder. Name a file in it.", path=path)
    if there is not None and not stat.S_ISREG(there):
        raise FileFormatError(f"{path} is not a regular file and is left as it is.", path=path)
    if not folder:
        raise FileFormatError(
            f"{path} cannot be written: there is no folder {Path(path).parent}.", path=path
        )
    if not os.access(place if there is not None else place.parent, os.W_OK):
        raise FileFormatError(f"{path} cannot be written: Permission denied.", path=path)
    return place


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, and rename it to ``path`` when all went well.

    A link is followed, and a file that is replaced leaves its permissions to the new one.

    Raises:
        FileFormatError: If there can be no such file; see :func:`check_place`.
        WorkError: If writing fails, for example because the disk is full.
    """
    place = check_place(path)
    try:
        handle, name = tempfile.mkstemp(
            dir=place.parent, prefix=f".{place.name[:40]}.", suffix=place.suffix
        )
    except OSError as error:
        raise FileFormatError(f"{path} cannot be written: {detail(error)}.", path=path) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(_permissions(place))
        temporary.replace(place)
    except OSError as error:
        raise WorkError(
            f"{path} could not be written: {detail(error)}. What was there before is unchanged."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _permissions(place: Path) -> int:
    if place.exists():
        return stat.S_IMODE(place.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a whole file, beside its place first."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write text lines as they come; the file appears when the last is written."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as stream,
    ):
        stream.writelines(f"{line}\n" for line in lines)


def write_json(path: str | Path, document: Any) -> None:
    """Write one JSON document."""
    atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
