"""Numbers as text: .csv .tsv .txt .json .jsonl, to arrays and back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.core.component import PAD
from kexue.core.errors import FileFormatError
from kexue.core.lines import detail, read_lines

__all__ = ["as_table", "numeric", "read_json", "read_jsonl", "read_table", "to_lists"]

Array = NDArray[Any]

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": " "}
_TRUTH = {"true": True, "false": False}
_KINDS = {"U": "text", "S": "text", "c": "complex numbers", "V": "records", "M": "dates"}


# -- tables -------------------------------------------------------------------------------------


def read_table(path: str | Path) -> dict[str, Array]:
    """Read rows of numbers: separated by commas (.csv), tabs (.tsv), or spaces or commas.

    The first line may be a header: one in which nothing is a number. Numbers written without a
    point or an exponent stay whole; ``true`` and ``false`` are numbers too. A single column gives
    a single axis, and rows of whole numbers may have unequal lengths.
    """
    rows: list[Sequence[float]] = []
    places: list[int] = []
    header = False
    for number, cells in _cells(path):
        row = _numbers(cells)
        if row is not None:
            rows.append(row)
            places.append(number)
        elif rows or header or any(cell and _numbers([cell]) for cell in cells):
            raise _bad_cell(path, number, cells)
        else:
            header = True
    if not rows:
        below = " below its header" if header else ""
        raise FileFormatError(f"{_name(path)} holds no numbers{below}.", path=path)
    array = _rectangle(path, rows, lambda i: f"line {places[i]}")
    return {"": array[:, 0] if array.shape[1] == 1 else array}


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def _cells(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each line that is not blank, with the line's number."""
    suffix = Path(path).suffix.lower()
    if suffix in {".csv", ".tsv"}:
        rows = _separated(path, _SEPARATORS[suffix])
    else:
        rows = (
            (number, line.split(",") if "," in line else line.split())
            for number, line in enumerate(_whole_lines(path), start=1)
        )
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        if cells not in ([], [""]):
            yield number, cells


def _separated(path: str | Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_whole_lines(path), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise FileFormatError(
            f"{path}, line {reader.line_num} is not a line of a {Path(path).suffix} file: "
            f"{detail(error)}.",
            path=path,
        ) from error


def _whole_lines(path: str | Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(path), start=1):
        if "\r" in line:
            raise FileFormatError(
                f"{_name(path)}, line {number} holds a carriage return. Save the file with "
                f"\\n or \\r\\n at the ends of lines.",
                path=path,
            )
        yield line


def _numbers(cells: Sequence[str]) -> Sequence[float] | None:
    """Return the numbers that cells are, or None if one of them is none."""
    if "_" in "".join(cells):  # Python reads 1_000, nobody writes it
        return None
    for convert in (int, float, _number_or_truth):
        try:
            return [convert(cell) for cell in cells]
        except ValueError:
            continue
    return None


def _number_or_truth(cell: str) -> float:
    truth = _TRUTH.get(cell.lower())
    return float(cell) if truth is None else truth


def _bad_cell(path: str | Path, number: int, cells: Sequence[str]) -> FileFormatError:
    column, cell = next((i, c) for i, c in enumerate(cells, start=1) if _numbers([c]) is None)
    what = f"{_short(repr(cell))} is not a number" if cell else "the cell is empty"
    return FileFormatError(f"{_name(path)}, line {number}, column {column}: {what}.", path=path)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


# -- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Array]:
    """Read nested lists as one nameless array, or an object of them as one array per field."""
    document = _parsed(path, path.read_bytes(), f"{path}")
    if not isinstance(document, Mapping):
        return {"": _nested(path, document, "the document")}
    if not document:
        raise FileFormatError(f"{path} holds no fields.", path=path)
    return {name: _nested(path, value, f"field {name!r}") for name, value in document.items()}


def read_jsonl(path: Path) -> dict[str, Array]:
    """Read one JSON value a line: numbers or lists make one array, objects one per field."""
    rows: list[Any] = []
    places: list[int] = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            rows.append(_parsed(path, line, f"{path}, line {number}"))
            places.append(number)
    if not rows:
        raise FileFormatError(f"{path} holds no values.", path=path)
    _check_alike(path, rows, places)
    if not isinstance(rows[0], Mapping):
        return {"": _nested(path, rows, "", lambda i: f"line {places[i]}")}
    return {
        name: _nested(
            path, [r[name] for r in rows], f"field {name!r}", lambda i: f"line {places[i]}"
        )
        for name in rows[0]
    }


def _parsed(path: Path, text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON: {detail(error)}.", path=path) from error


def _check_alike(path: Path, rows: Sequence[Any], places: Sequence[int]) -> None:
    """Refuse lines of which some are objects, or objects with different fields."""
    wanted = _fields(rows[0])
    for place, row in zip(places, rows, strict=True):
        found = _fields(row)
        if (found is None) != (wanted is None) or sorted(found or ()) != sorted(wanted or ()):
            raise FileFormatError(
                f"{path}, line {place} must be {_form(wanted)}, as line {places[0]} is. "
                f"Found {_form(found)}.",
                path=path,
            )
    if wanted == []:
        raise FileFormatError(f"{path}, line {places[0]} holds no fields.", path=path)


def _fields(row: Any) -> list[str] | None:
    return list(row) if isinstance(row, Mapping) else None


def _form(fields: list[str] | None) -> str:
    return "a number or a list" if fields is None else f"an object of {', '.join(fields) or '{}'}"


def _nested(
    path: Path, value: Any, where: str, row_name: Callable[[int], str] | None = None
) -> Array:
    """Turn nested lists into an array, padding ragged rows of whole numbers."""
    if isinstance(value, list) and any(isinstance(row, list) for row in value):
        for i, row in enumerate(value):
            if not isinstance(row, list):
                place = row_name(i) if row_name else f"{where}, item {i + 1}"
                raise FileFormatError(
                    f"{path}: {place} must be a list, as others are. "
                    f"Found {_short(json.dumps(row))}.",
                    path=path,
                )
        if all(not isinstance(item, list | dict) for row in value for item in row):
            return _rectangle(path, value, row_name or (lambda i: f"{where}, row {i + 1}"))
    return _array(path, value, where)


# -- arrays -------------------------------------------------------------------------------------


def _rectangle(
    path: str | Path, rows: Sequence[Sequence[Any]], name: Callable[[int], str]
) -> Array:
    """Return rows as an array; rows of whole numbers are padded to the length of the longest."""
    longest = max(map(len, rows))
    short = next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if short is None:
        return _array(path, rows, "")
    padded = np.full((len(rows), longest), PAD, dtype=np.int64)
    for i, row in enumerate(rows):
        for x in row:
            if not _is_whole(x):
                raise FileFormatError(
                    f"{_name(path)}: only rows of whole numbers may have unequal lengths. Found "
                    f"{len(rows[0])} values in {name(0)}, {len(rows[short])} in {name(short)}, "
                    f"and {_short(json.dumps(x))} in {name(i)}.",
                    path=path,
                )
        padded[i, : len(row)] = [int(x) for x in row]
    return padded


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2.0**63
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _array(path: str | Path, value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise FileFormatError(
            f"{path}: {where or 'the lines'} must be nested lists of equal lengths.", path=path
        ) from error
    if array.dtype == object and all(isinstance(x, int | float) for x in array.flat):
        try:
            array = array.astype(np.float64)  # whole numbers beyond 64 bits
        except OverflowError:
            raise FileFormatError(
                f"{path}{f': {where}' if where else ''} holds a number beyond 1e308.", path=path
            ) from None
    return numeric(path, where, array)


def numeric(path: str | Path, where: str, array: Array) -> Array:
    """Return an array that torch takes: real numbers in the byte order of the machine.

    Args:
        path: The file that it is from.
        where: Its name, or its place in the file; may be empty.
        array: The array.

    Raises:
        FileFormatError: If it does not hold real numbers.
    """
    kind = array.dtype.kind
    if kind not in "biuf":
        found = _KINDS.get(kind) or _odd_one(array)
        place = f"{path}: {where}" if where else f"{path}"
        raise FileFormatError(f"{place} must hold numbers. Found {found}.", path=path)
    if kind == "f" and array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _odd_one(array: Array) -> str:
    """Say what an array of Python objects holds that is not a number."""
    odd = next((x for x in array.flat if not isinstance(x, int | float)), None)
    words = {type(None): "null", str: "text", dict: "an object", list: "a list"}
    return words.get(type(odd), f"{array.dtype}") if array.dtype == object else f"{array.dtype}"


# -- writing ------------------------------------------------------------------------------------


def to_lists(array: Array) -> Any:
    """Return nested lists; reading them gives the array again.

    Rows of whole numbers lose the padding behind their end, as long as one row needs none: the
    longest row tells the reader how far to pad.
    """
    rows = array.tolist()
    if array.dtype.kind == "i" and array.ndim == 2 and array.size:
        padding = array == PAD
        behind = np.logical_and.accumulate(padding[:, ::-1], axis=1)[:, ::-1]
        if (padding == behind).all() and not behind[:, -1].all():
            widths = array.shape[1] - behind.sum(axis=1)
            return [row[:width] for row, width in zip(rows, widths.tolist(), strict=True)]
    return rows


def as_table(path: Path, array: Array) -> str:
    """Return an array of up to two axes as the text of a .csv, .tsv or .txt file.

    Raises:
        FileFormatError: If it has more.
    """
    suffix = path.suffix.lower()
    if array.ndim > 2:
        raise FileFormatError(
            f"{path} can hold at most two axes. Found {array.ndim}; write .npy, .npz or .json.",
            path=path,
        )
    if array.ndim < 2:
        rows: Iterable[Any] = array.reshape(-1, 1).tolist()
    elif suffix == ".txt":
        blank = [PAD] if array.size else []  # a blank line would be no row
        rows = (row or blank for row in to_lists(array))
    else:
        rows = array.tolist()
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=_SEPARATORS[suffix], lineterminator="\n").writerows(rows)
    return buffer.getvalue()
