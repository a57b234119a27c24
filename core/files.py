"""Reading and writing users' files by suffix; nothing is ever unpickled or executed.

Arrays: .npy .npz .safetensors .csv .tsv .json .jsonl .txt. Text: .txt and CoNLL, a line at a time.
Images: files that Pillow reads, or a folder of them. ``-`` is standard input. A file is written
beside its place and renamed, so an interrupted write leaves the old one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kexue.core.errors import FileFormatError
from kexue.core.lines import check_file, detail, read_conll, read_lines
from kexue.core.tables import (
    Array,
    as_table,
    numeric,
    read_json,
    read_jsonl,
    read_table,
    to_lists,
)
from kexue.core.writing import atomic_path, atomic_write, check_place, write_json, write_lines

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGE_SUFFIXES",
    "TABLE_SUFFIXES",
    "atomic_path",
    "atomic_write",
    "check_place",
    "read_arrays",
    "read_conll",
    "read_images",
    "read_lines",
    "write_arrays",
    "write_json",
    "write_lines",
]

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors", ".csv", ".tsv", ".json", ".jsonl", ".txt")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"}
_BEGINNINGS = {".npy": (b"\x93NUMPY",), ".npz": (b"PK\x03\x04", b"PK\x05\x06")}
_PICKLE = b"\x80"


# -- reading arrays -----------------------------------------------------------------------------


def read_arrays(path: str | Path) -> dict[str, Array]:
    """Read the arrays of a file.

    Args:
        path: A file with one of :data:`ARRAY_SUFFIXES`; ``-`` is standard input, read as .txt.

    Returns:
        The arrays by name; a file that holds a single nameless array gives ``{"": array}``. Rows
        of whole numbers of unequal length are right-padded with
        :data:`~kexue.core.component.PAD`.

    Raises:
        FileFormatError: If the file is not what its suffix says, naming the line or field.
    """
    if str(path) == "-":
        return read_table(path)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise FileFormatError(
            f"{path} looks like a pickle, which could run code and is never loaded. Save tensors "
            f"with `safetensors.torch.save_file` or an array with `numpy.save`.",
            path=path,
        )
    check_file(path)
    reader = _READERS.get(suffix)
    if reader is None:
        raise _unknown_suffix(path)
    return reader(path)


def _unknown_suffix(path: Path) -> FileFormatError:
    return FileFormatError(
        f"{path} must end in one of {' '.join(ARRAY_SUFFIXES)}. "
        f"Found {path.suffix or 'no suffix'!r}.",
        path=path,
    )


def _read_npy(path: Path) -> dict[str, Array]:
    _check_beginning(path, ".npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header fails in any way
        raise _not_whole(path, error) from error
    return {"": numeric(path, "", array)}


def _read_npz(path: Path) -> dict[str, Array]:
    _check_beginning(path, ".npz")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:  # as above, and whatever decompression raises
        raise _not_whole(path, error) from error
    if not found:
        raise FileFormatError(f"{path} holds no arrays.", path=path)
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise FileFormatError(f"{path}: {name!r} is not an array.", path=path)
    return {name: numeric(path, name, array) for name, array in found.items()}


def _check_beginning(path: Path, wanted: str) -> None:
    """Refuse a file that begins like another kind, numpy's guess for which is a pickle."""
    with path.open("rb") as stream:
        start = stream.read(6)
    kind = next((suffix for suffix, magic in _BEGINNINGS.items() if start.startswith(magic)), "")
    if kind == wanted:
        return
    if kind:
        raise FileFormatError(f"{path} is {kind} inside; rename it.", path=path)
    if start.startswith(_PICKLE):
        raise _holds_pickle(path)
    raise FileFormatError(f"{path} is not a {wanted} file: it begins with {start!r}.", path=path)


def _holds_pickle(path: Path) -> FileFormatError:
    return FileFormatError(
        f"{path} holds Python objects (a pickle), which could run code and is never loaded. "
        f"Save a plain numeric array with `numpy.save`.",
        path=path,
    )


def _not_whole(path: Path, error: Exception) -> FileFormatError:
    """Say that a file with the right beginning is not what it should be."""
    if any(word in str(error) for word in ("Object arrays", "Python objects", "pickle")):
        return _holds_pickle(path)
    return FileFormatError(f"{path} is not a whole {path.suffix} file: {detail(error)}.", path=path)


def _read_safetensors(path: Path) -> dict[str, Array]:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:  # a dtype that this torch has not is a KeyError
        raise _not_whole(path, error) from error
    if not tensors:
        raise FileFormatError(f"{path} holds no tensors.", path=path)
    narrow = {
        name: t.float() if t.dtype.is_floating_point and t.element_size() < 4 else t
        for name, t in tensors.items()
    }
    return {name: numeric(path, name, t.numpy()) for name, t in narrow.items()}


_READERS: Mapping[str, Callable[[Path], dict[str, Array]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".csv": read_table,
    ".tsv": read_table,
    ".txt": read_table,
    ".json": read_json,
    ".jsonl": read_jsonl,
}


# -- reading images -----------------------------------------------------------------------------


def read_images(path: str | Path) -> Array:
    """Read an image or a folder of equally sized images.

    Args:
        path: An image, or a folder whose files with one of :data:`IMAGE_SUFFIXES` are read, hidden
            ones aside.

    Returns:
        Shape ``[image, height, width]`` where all are grey, else
        ``[image, height, width, channel]``; uint8, in the order of the file names. 16 bits are
        brought to 8, and transparency is dropped.

    Raises:
        FileFormatError: If a file is not an image or its size differs from the first.
    """
    path = Path(path)
    images: list[Array] = []
    files = _image_files(path)
    for file in files:
        check_file(file)
        images.append(_read_image(file))
        if images[-1].shape != images[0].shape:
            raise FileFormatError(
                f"{file} must have the size of {files[0].name}, {list(images[0].shape)}. "
                f"Found {list(images[-1].shape)}.",
                path=file,
            )
    return np.stack(images)


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        files = sorted(
            p
            for p in path.iterdir()
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {detail(error)}.", path=path) from error
    if not files:
        raise FileFormatError(f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}).", path=path)
    return files


def _read_image(file: Path) -> Array:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return _pixels(file, image)
    except FileFormatError:
        raise
    except Exception as error:  # Pillow's decoders raise anything
        raise FileFormatError(
            f"{file} is not a whole image: {detail(error)}.", path=file
        ) from error


def _pixels(file: Path, image: Image) -> Array:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts at 255
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in {"I", "F"}:
        raise FileFormatError(
            f"{file} has 32 bits per pixel. Save it with 8 or 16, or as .npy.", path=file
        )
    return np.asarray(image.convert("L" if image.mode in {"1", "L", "LA", "La"} else "RGB"))


# -- writing ------------------------------------------------------------------------------------


def write_arrays(path: str | Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as the suffix of ``path`` says.

    Args:
        path: .npz, .safetensors and .json hold all arrays; .npy, .csv, .tsv, .jsonl and .txt the
            first. Rows of whole numbers lose their padding in .json, .jsonl and .txt where one
            row is full, so that reading gives the array again.
        arrays: The arrays by name; at least one.

    Raises:
        FileFormatError: If the suffix is unknown, or the first array has too many axes for it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    first = next(iter(arrays.values()))
    if suffix == ".npy":
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.lib.format.write_array(stream, np.asarray(first), allow_pickle=False)
    elif suffix == ".npz":
        _write_npz(path, arrays)
    elif suffix == ".safetensors":
        _write_safetensors(path, arrays)
    elif suffix == ".json":
        atomic_write(path, json.dumps({name: to_lists(a) for name, a in arrays.items()}) + "\n")
    elif suffix == ".jsonl":
        rows = to_lists(np.atleast_1d(first))
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    elif suffix in TABLE_SUFFIXES:
        atomic_write(path, as_table(path, first))
    else:
        raise _unknown_suffix(path)


def _write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an archive; ``numpy.savez`` cannot, if an array has the name of its argument."""
    from zipfile import ZipFile

    with atomic_path(path) as temporary, ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def _write_safetensors(path: Path, arrays: Mapping[str, Array]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, temporary)
        except SafetensorError as error:
            raise OSError(detail(error)) from error
