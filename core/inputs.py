"""From files to the named tensors that a component's method takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kexue.core.errors import ArgumentError, FileFormatError, did_you_mean
from kexue.core.files import TABLE_SUFFIXES, read_arrays

if TYPE_CHECKING:
    from kexue.core.describe import Input
    from kexue.core.job import Job

__all__ = ["read_array", "read_floats", "read_inputs", "to_floats"]

_EXACT = 2.0**53  # whole numbers below are exact as floats


def read_inputs(job: Job) -> dict[str, torch.Tensor]:
    """Read a job's files as the inputs of its component; see :meth:`Job.tensors`.

    A file with named arrays fills the inputs of these names; a nameless array fills the next input
    that is still empty; ``name=path`` says which.
    """
    inputs = {row.name: row for row in job.description.inputs}
    arrays = _assign(job, inputs)
    for row in inputs.values():
        if not row.optional and row.name not in arrays:
            raise ArgumentError(
                f"{job.id} needs the input {_label(row)}. Give a file for each of: "
                f"{' '.join(name for name, r in inputs.items() if not r.optional)}.",
                argument=row.name,
            )
    tensors = {
        name: _tensor(job, inputs[name], path, array) for name, (path, array) in arrays.items()
    }
    _check_shapes([inputs[name] for name in tensors], {n: arrays[n][0] for n in arrays}, tensors)
    return tensors


def read_floats(job: Job, path: str, name: str, *, rows: bool = False) -> torch.Tensor:
    """Read a file of one array as floating-point numbers on the job's device.

    Args:
        job: The call.
        path: The file.
        name: What errors call the array.
        rows: Whether a table of one column holds rows of one number each.

    Raises:
        ArgumentError: If it holds NaN, or numbers beyond the job's dtype.
        FileFormatError: If the file is not what its suffix says, or holds several arrays.
    """
    return to_floats(job, path, read_array(path, rows=rows), name)


def read_array(path: str, *, rows: bool = False) -> NDArray[Any]:
    """Read a file of one array.

    Args:
        path: The file.
        rows: Whether a table of one column holds rows of one number each.

    Raises:
        FileFormatError: If the file is not what its suffix says, or holds several arrays.
    """
    arrays = read_arrays(path)
    if len(arrays) > 1:
        raise FileFormatError(
            f"{path} must hold one array. Found {len(arrays)}: {', '.join(arrays)}.", path=path
        )
    array = next(iter(arrays.values()))
    return _as_rows(path, array) if rows else array


def to_floats(job: Job, path: str, array: NDArray[Any], name: str) -> torch.Tensor:
    """Return an array as floating-point numbers on the job's device; see :func:`read_floats`."""
    values = np.array(array, dtype=np.float64)
    _check_nan(name, path, values)
    beyond = np.isfinite(values) & (np.abs(values) > torch.finfo(job.dtype).max)
    if beyond.any():
        dtype = str(job.dtype).removeprefix("torch.")
        raise ArgumentError(
            f"`{name}` in {path} must be within {dtype}, up to {torch.finfo(job.dtype).max:.3g}. "
            f"Found {_first(values, beyond)}. Use `--dtype float64`, or scale it.",
            argument=name,
        )
    return torch.from_numpy(values).to(job.device, job.dtype)


def _as_rows(path: str, array: NDArray[Any]) -> NDArray[Any]:
    """Give a table of one column its second axis."""
    table = path == "-" or Path(path).suffix.lower() in TABLE_SUFFIXES
    return array[:, None] if table and array.ndim == 1 else array


def _label(row: Input) -> str:
    what = " ".join(filter(None, (row.dtype, row.shape)))
    return f"`{row.name}` ({what})" if what else f"`{row.name}`"


# -- which file is which input --------------------------------------------------------------------


def _assign(job: Job, inputs: Mapping[str, Input]) -> dict[str, tuple[str, NDArray[Any]]]:
    found: dict[str, tuple[str, NDArray[Any]]] = {}
    for given in job.files:
        name, path = _named(job, given, inputs)
        arrays = read_arrays(path)
        if name:
            chosen = {name: _only(path, name, arrays)}
        elif set(arrays) == {""}:
            chosen = {_next_free(job, inputs, found): arrays[""]}
        else:
            chosen = _known(path, arrays, inputs)
        for key, array in chosen.items():
            if key in found:
                raise ArgumentError(
                    f"`{key}` of {job.id} must be given once. Found it in {found[key][0]} and in "
                    f"{path}.",
                    argument=key,
                )
            found[key] = (path, array)
    return {n: found[n] for n in inputs if n in found}


def _named(job: Job, given: str, inputs: Mapping[str, Input]) -> tuple[str, str]:
    """Split ``name=path``; a path may hold ``=`` itself."""
    name, separator, path = given.partition("=")
    if not separator or (name not in inputs and (not name.isidentifier() or Path(given).exists())):
        return "", given
    if name not in inputs:
        raise ArgumentError(
            f"{job.id} has no input {name!r}.{did_you_mean(name, inputs)} "
            f"It takes: {', '.join(inputs)}. A file of that name is written ./{given}.",
            argument=name,
        )
    if not path:
        raise ArgumentError(f"`{name}=` must be followed by a file.", argument=name)
    return name, path


def _only(path: str, name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the array of a file that was named for one input."""
    if name in arrays or len(arrays) == 1:
        return arrays.get(name, next(iter(arrays.values())))
    raise FileFormatError(
        f"{path} must hold one array, or one named {name}. Found {', '.join(arrays)}.", path=path
    )


def _next_free(job: Job, inputs: Mapping[str, Input], found: Mapping[str, Any]) -> str:
    free = next((name for name in inputs if name not in found), None)
    if free is None:
        raise ArgumentError(
            f"{job.id} takes {len(inputs)} inputs ({', '.join(inputs)}). "
            f"Found {len(job.files)} files.",
            argument="files",
        )
    return free


def _known(
    path: str, arrays: Mapping[str, NDArray[Any]], inputs: Mapping[str, Input]
) -> dict[str, NDArray[Any]]:
    known = {n: a for n, a in arrays.items() if n in inputs}
    if not known:
        raise FileFormatError(
            f"{path} must hold arrays named {', '.join(inputs)}. Found {', '.join(arrays)}. "
            f"`NAME={path}` takes a single array as the input NAME.",
            path=path,
        )
    return known


# -- what an array must be ------------------------------------------------------------------------


def _tensor(job: Job, row: Input, path: str, array: NDArray[Any]) -> torch.Tensor:
    kind = array.dtype.kind
    anything = row.dtype in {"any", "number", ""}
    if len(row.axes) == 2:
        array = _as_rows(path, array)
    if row.dtype == "float" or (anything and kind == "f"):
        return to_floats(job, path, array, row.name)
    if row.dtype == "bool":
        _check_values(row, path, array, np.isin(array, (0, 1)), "true/false or 0/1")
        return torch.from_numpy(np.array(array, dtype=bool)).to(job.device)
    if kind == "b" and anything:
        return torch.from_numpy(np.array(array)).to(job.device)
    if kind == "f":
        _check_nan(row.name, path, array)
        whole = (array == np.round(array)) & (np.abs(array) < _EXACT)
        _check_values(row, path, array, whole, "whole numbers below 2**53")
    elif kind == "u":
        _check_values(row, path, array, array < 2**63, "whole numbers below 2**63")
    return torch.from_numpy(np.array(array, dtype=np.int64)).to(job.device)


def _check_values(
    row: Input, path: str, array: NDArray[Any], right: NDArray[np.bool_], what: str
) -> None:
    if not right.all():
        raise ArgumentError(
            f"`{row.name}` in {path} must be {what}. Found {_first(array, ~right)}.",
            argument=row.name,
        )


def _check_nan(name: str, path: str, array: NDArray[Any]) -> None:
    missing = np.isnan(array)
    if missing.any():
        raise ArgumentError(
            f"`{name}` in {path} must not hold NaN. "
            f"Found {int(missing.sum())}, the first {_place(missing)}.",
            argument=name,
        )


def _first(array: NDArray[Any], wrong: NDArray[np.bool_]) -> str:
    """Return the first wrong value and where it stands."""
    return f"{array[wrong][0]} {_place(wrong)}".rstrip()


def _place(wrong: NDArray[np.bool_]) -> str:
    index = [int(i) for i in np.argwhere(wrong)[0]]
    return f"at index {index}" if index else ""


def _check_shapes(
    rows: Sequence[Input], paths: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check the number of axes, and that axes of one name have one size."""
    sizes: dict[str, tuple[list[int], str]] = {}
    for row in rows:
        if not row.axes:
            continue
        shape = list(tensors[row.name].shape)
        named = _named_sizes(row.axes, shape)
        if named is None:
            raise ArgumentError(
                f"`{row.name}` in {paths[row.name]} must have {_number_of_axes(row.axes)}, "
                f"{row.shape}. Found shape {shape}.",
                argument=row.name,
            )
        for axis, size in named:
            if axis[0] in "_#." or axis[:2] == "*#":  # nameless, or free to be broadcast
                continue
            fixed = [int(axis)] if axis.isdigit() else size
            first, where = sizes.setdefault(axis, (fixed, row.name))
            if first != size:
                wanted = [n for a in row.axes for n in (sizes[a][0] if a in sizes else [a])]
                other = "" if where == row.name else f", with the {axis} axis of `{where}`"
                raise ArgumentError(
                    f"`{row.name}` in {paths[row.name]} must have shape {row.shape} = "
                    f"[{', '.join(map(str, wanted))}]{other}. Found {shape}.",
                    argument=row.name,
                )


def _named_sizes(axes: Sequence[str], shape: list[int]) -> list[tuple[str, list[int]]] | None:
    """Return the sizes of each named axis, several for ``*batch``; None if the number is wrong."""
    star = next((i for i, axis in enumerate(axes) if axis.startswith(("*", "..."))), None)
    sizes = [[n] for n in shape]
    if star is not None:
        end = len(shape) - (len(axes) - star - 1)
        sizes = [*sizes[:star], shape[star:end], *sizes[max(star, end) :]]
    return list(zip(axes, sizes, strict=True)) if len(axes) == len(sizes) else None


def _number_of_axes(axes: Sequence[str]) -> str:
    fixed = [axis for axis in axes if not axis.startswith(("*", "..."))]
    least = "at least " if len(fixed) < len(axes) else ""
    return f"{least}{len(fixed)} {'axis' if len(fixed) == 1 else 'axes'}"
