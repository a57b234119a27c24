"""Files: what is read is what was written, and nothing broken gets in or is left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from kexue.core.component import PAD
from kexue.core.errors import FileFormatError, KexueError, WorkError
from kexue.core.files import (
    ARRAY_SUFFIXES,
    TABLE_SUFFIXES,
    atomic_path,
    atomic_write,
    read_arrays,
    read_conll,
    read_images,
    read_lines,
    write_arrays,
    write_json,
    write_lines,
)

Array = NDArray[Any]
BINARY = (".npy", ".npz", ".safetensors")
TEXT = tuple(suffix for suffix in ARRAY_SUFFIXES if suffix not in BINARY)
FLOATS = np.array([[0.5, 1.5, -2.0], [3.25, 4.0, 5.5]])

reproducible = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def refused(words: str, path: object, error: type[KexueError] = FileFormatError) -> Iterator[None]:
    """Assert a refusal in one line that names the file, in the text and as an attribute."""
    with pytest.raises(error, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, FileFormatError):
        assert str(caught.value.path) == str(path)
        assert caught.value.exit_status == 2


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def valid(folder: Path, suffix: str) -> Path:
    path = folder / f"valid{suffix}"
    write_arrays(path, {"scores": FLOATS})
    return path


def only(arrays: Mapping[str, Array]) -> Array:
    (array,) = arrays.values()
    return array


def again(path: Path, array: Array) -> Array:
    """Return what comes back of an array from a file."""
    write_arrays(path, {"scores": array})
    return only(read_arrays(path))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- round trips --------------------------------------------------------------------------------

DTYPES: Sequence[Any] = (np.float32, np.float64, np.int64, np.bool_)
_small = st.integers(-2, 3)  # many paddings, -1


def arrays_of(dtype: Any, shapes: st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[Array]:
    elements = _small if dtype is np.int64 else None
    whole = hnp.arrays(dtype, shapes, elements=elements)
    return st.one_of(whole, hnp.arrays(dtype, shapes)) if dtype is np.int64 else whole


any_shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
full_shape = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)
table_shape = st.one_of(
    hnp.array_shapes(min_dims=1, max_dims=1, min_side=1, max_side=5),
    st.tuples(st.integers(1, 4), st.integers(2, 4)),
)


@pytest.mark.parametrize("suffix", BINARY)
@given(array=st.one_of([arrays_of(dtype, any_shape) for dtype in DTYPES]))
@reproducible
def test_binary_files_give_back_array_dtype_and_shape(suffix: str, array: Array) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = again(Path(folder) / f"a{suffix}", array)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array, strict=True)


@pytest.mark.parametrize("suffix", TEXT)
@given(data=st.data())
@reproducible
def test_text_files_give_back_values_kind_and_shape(suffix: str, data: st.DataObject) -> None:
    shapes = table_shape if suffix in TABLE_SUFFIXES else full_shape
    array = data.draw(st.one_of([arrays_of(dtype, shapes) for dtype in DTYPES]))
    with tempfile.TemporaryDirectory() as folder:
        found = again(Path(folder) / f"a{suffix}", array)
    assert found.dtype.kind == array.dtype.kind
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape


@given(
    arrays=st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="_.-/ ="), min_size=1),
        arrays_of(np.float64, full_shape),
        min_size=1,
        max_size=3,
    )
)
@reproducible
def test_several_arrays_keep_their_names(arrays: dict[str, Array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".npz", ".safetensors", ".json"):
            path = Path(folder) / f"a{suffix}"
            write_arrays(path, arrays)
            found = read_arrays(path)
            assert set(found) == set(arrays)
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array)


@given(rows=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5))
@reproducible
def test_lists_of_indices_lose_their_padding_in_text_and_regain_it(rows: list[list[int]]) -> None:
    longest = max(map(len, rows))
    padded = np.array([row + [PAD] * (longest - len(row)) for row in rows], dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_arrays(path, {"sequences": padded})
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
        np.testing.assert_array_equal(only(read_arrays(path)).reshape(padded.shape), padded)
        if longest > 1:
            np.testing.assert_array_equal(again(Path(folder) / "rows.txt", padded), padded)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ".csv"])
@pytest.mark.parametrize(
    "rows",
    [[[1, PAD], [2, PAD]], [[PAD, 1], [1, PAD]], [[1, PAD, 1], [1, 1, PAD]], [[PAD, PAD], [1, 2]]],
    ids=["all end so", "leading", "inside", "empty row"],
)
def test_rows_that_end_in_minus_one_keep_their_width(
    tmp_path: Path, suffix: str, rows: list[list[int]]
) -> None:
    np.testing.assert_array_equal(again(tmp_path / f"a{suffix}", np.array(rows)), np.array(rows))


def test_rows_with_minus_one_inside_are_written_as_they_are(tmp_path: Path) -> None:
    write_arrays(tmp_path / "spins.jsonl", {"values": np.array([[1, -1, -1], [-1, 1, 1]])})
    assert (tmp_path / "spins.jsonl").read_text() == "[1, -1, -1]\n[-1, 1, 1]\n"


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_a_single_number_is_written(tmp_path: Path, suffix: str) -> None:
    assert float(again(tmp_path / f"a{suffix}", np.array(2.5)).reshape(())) == 2.5


@pytest.mark.parametrize("suffix", TEXT)
def test_nan_and_infinities_come_back(tmp_path: Path, suffix: str) -> None:
    array = np.array([[np.nan, np.inf], [-np.inf, 0.0]])
    np.testing.assert_array_equal(again(tmp_path / f"a{suffix}", array), array)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".txt"])
def test_whole_numbers_beyond_doubles_stay_exact(tmp_path: Path, suffix: str) -> None:
    array = np.array([[2**53 + 1, -(2**63)], [2**63 - 1, 0]])
    found = again(tmp_path / f"a{suffix}", array)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, array)


# -- arrays of any make ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f8"),
        np.arange(3, dtype=">i4"),
        np.array(3.0),
        np.array([1.5, 2.5], dtype=np.longdouble),
        np.array([1.5], dtype=np.float16),
        np.array([True, False]),
        np.array([2**64 - 1], dtype=np.uint64),
        np.zeros((0, 3)),
    ],
    ids=[
        "fortran",
        "big-endian",
        "big int",
        "0-d",
        "longdouble",
        "half",
        "bool",
        "uint64",
        "empty",
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_numpy_arrays_of_any_layout_become_native(
    tmp_path: Path, suffix: str, array: Array
) -> None:
    found = again(tmp_path / f"a{suffix}", array)
    assert found.dtype.isnative
    assert found.dtype.itemsize <= 8
    np.testing.assert_array_equal(found, array)
    torch.from_numpy(np.array(found))  # torch takes it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_safetensors_of_narrow_floats_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.tensor([0.5, -2.0]).to(dtype)}, tmp_path / "w.safetensors")
    found = only(read_arrays(tmp_path / "w.safetensors"))
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.array([1j]), "complex numbers"),
        (np.array(["a"]), "text"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "dates"),
        (np.zeros(2, dtype=[("a", "f4")]), "records"),
    ],
    ids=["complex", "text", "dates", "structured"],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_rejects_arrays_of_no_numbers(
    tmp_path: Path, suffix: str, array: Array, found: str
) -> None:
    path = tmp_path / f"a{suffix}"
    write_arrays(path, {"scores": array})
    with refused(f"must hold numbers. Found {found}", path):
        read_arrays(path)


def test_rejects_complex_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1, dtype=torch.complex64)}, path)
    with refused("w must hold numbers. Found complex", path):
        read_arrays(path)


# -- every type, every defect ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_rejects_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, f"a{suffix}", b"")
    with refused("is empty", path):
        read_arrays(path)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_rejects_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    whole = valid(tmp_path, suffix).read_bytes()
    path = written(tmp_path, f"cut{suffix}", whole[: len(whole) - 6])
    with refused("not a whole|not JSON|unequal lengths|is not a number", path):
        read_arrays(path)


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize("kept", [1, 3, 9, 30])
def test_rejects_a_file_cut_in_its_header(tmp_path: Path, suffix: str, kept: int) -> None:
    path = written(tmp_path, f"cut{suffix}", valid(tmp_path, suffix).read_bytes()[:kept])
    with refused("not a", path):
        read_arrays(path)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
@pytest.mark.parametrize("garbage", [bytes(range(250, 0, -1)), b"\x00" * 64], ids=["noise", "nul"])
def test_rejects_binary_garbage(tmp_path: Path, suffix: str, garbage: bytes) -> None:
    path = written(tmp_path, f"a{suffix}", garbage)
    with refused("is not a|not JSON|not UTF-8|binary", path):
        read_arrays(path)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
@given(data=st.data())
@reproducible
def test_damaged_files_are_refused_or_numbers(suffix: str, data: st.DataObject) -> None:
    """Whatever happens to the bytes of a file, no other error comes out than a refusal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = bytearray(valid(folder, suffix).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            match data.draw(st.sampled_from(["set", "insert", "cut"])):
                case "set":
                    content[place] = data.draw(st.integers(0, 255))
                case "insert":
                    content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
                case _:
                    content = content[: place + 1]
        path = written(folder, f"damaged{suffix}", bytes(content))
        try:
            arrays = read_arrays(path)
        except FileFormatError as error:
            assert str(path) in str(error)  # noqa: PT017 -- either outcome is right
        else:
            assert all(array.dtype.kind in "biuf" for array in arrays.values())


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_rejects_a_missing_file_and_names_its_neighbour(tmp_path: Path, suffix: str) -> None:
    valid(tmp_path, suffix)
    with refused(f"does not exist. Did you mean 'valid{suffix}'", tmp_path / f"vali{suffix}"):
        read_arrays(tmp_path / f"vali{suffix}")
    with refused("There is no folder .*nowhere", tmp_path / "nowhere" / f"a{suffix}"):
        read_arrays(tmp_path / "nowhere" / f"a{suffix}")


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_rejects_a_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"folder{suffix}"
    path.mkdir()
    with refused("is a folder, not a file", path):
        read_arrays(path)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_rejects_a_file_that_may_not_be_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = valid(tmp_path, suffix)
    path.chmod(0)
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing is forbidden to root
    with refused("cannot be read: Permission denied", path):
        read_arrays(path)


def test_rejects_paths_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 300 + ".npy", "a\0b.csv"):
        with refused("cannot be read", tmp_path / name):
            read_arrays(tmp_path / name)


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.png"])
def test_rejects_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    with refused("does not exist", tmp_path / name):  # nothing to say of the suffix of nothing
        read_arrays(tmp_path / name)
    (tmp_path / name).write_text("1")
    with refused("must end in one of .npy .npz .* Found", tmp_path / name):
        read_arrays(tmp_path / name)


# -- nothing is executed --------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("suffix", [*ARRAY_SUFFIXES, ".pkl", ".pt", ".pth", ".bin", ".joblib"])
def test_never_unpickles(tmp_path: Path, suffix: str, protocol: int) -> None:
    content = pickle.dumps(Bomb(tmp_path / "exploded"), protocol)
    path = written(tmp_path, f"bomb{suffix}", content)
    with refused(r"pickle|is not a|not JSON|not UTF-8|binary", path):
        read_arrays(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_never_unpickles_arrays_of_objects(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    objects = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    with path.open("wb") as stream:
        if suffix == ".npy":
            np.save(stream, objects, allow_pickle=True)
        else:
            np.savez(stream, scores=objects)
    with refused("holds Python objects .a pickle.*numpy.save", path):
        read_arrays(path)
    assert not (tmp_path / "exploded").exists()


# -- .npy and .npz --------------------------------------------------------------------------------


def npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def archive(folder: Path, members: Mapping[str, bytes], compression: int = 0) -> Path:
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def npy_claiming(shape: str) -> bytes:
    """Return a header that claims a shape, and no data."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("shape", ["(10000000000000,)", "(-1,)", "('a',)", "((((((1", "(1e3,)"])
def test_rejects_headers_that_lie(tmp_path: Path, shape: str) -> None:
    content = npy_claiming(shape)
    for path in (written(tmp_path, "a.npy", content), archive(tmp_path, {"x.npy": content})):
        with refused("is not a whole", path):
            read_arrays(path)


def test_rejects_an_archive_without_arrays(tmp_path: Path) -> None:
    with refused("holds no arrays", tmp_path / "a.npz"):
        read_arrays(archive(tmp_path, {}))


def test_rejects_an_archive_with_other_files(tmp_path: Path) -> None:
    path = archive(tmp_path, {"x.npy": npy_bytes(FLOATS), "data.pkl": b"\x80\x02."})
    with refused("'data.pkl' is not an array", path):
        read_arrays(path)


def test_members_are_names_and_never_paths(tmp_path: Path) -> None:
    path = archive(tmp_path, {"../../etc/x.npy": npy_bytes(FLOATS)})
    assert list(read_arrays(path)) == ["../../etc/x"]
    assert names(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("place", [45, 60, 90])
def test_rejects_a_damaged_compressed_archive(tmp_path: Path, place: int) -> None:
    path = archive(tmp_path, {"x.npy": npy_bytes(np.arange(500.0))}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))
    with refused("is not a whole .npz file", path):
        read_arrays(path)


def test_rejects_an_encrypted_archive(tmp_path: Path) -> None:
    path = archive(tmp_path, {"x.npy": npy_bytes(FLOATS)})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))
    with refused("encrypted", path):
        read_arrays(path)


def test_says_when_npy_and_npz_are_swapped(tmp_path: Path) -> None:
    for wrong, right in ((".npy", ".npz"), (".npz", ".npy")):
        path = written(tmp_path, f"swapped{wrong}", valid(tmp_path, right).read_bytes())
        with refused(f"is {right} inside; rename it", path):
            read_arrays(path)


def test_writes_an_array_named_like_an_argument_of_numpy(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"file": FLOATS, "allow_pickle": FLOATS})
    assert list(read_arrays(tmp_path / "a.npz")) == ["file", "allow_pickle"]


def test_rejects_safetensors_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with refused("holds no tensors", tmp_path / "a.safetensors"):
        read_arrays(tmp_path / "a.safetensors")


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("plain.csv", "1.5,2\n3,4\n", [[1.5, 2], [3, 4]]),
        ("no last newline.csv", "1.5,2\n3,4", [[1.5, 2], [3, 4]]),
        ("header.csv", "height,width\n1,2\n", [[1, 2]]),
        ("quoted.csv", '"height, cm","width"\n"1","2.5"\n', [[1, 2.5]]),
        ("spaced.csv", '"a", "b"\n 1 ,\t2\n"3", "4"\n', [[1, 2], [3, 4]]),
        ("bom.csv", b"\xef\xbb\xbf1,2\n", [[1, 2]]),
        ("bom header.csv", b"\xef\xbb\xbfa,b\n1,2\n", [[1, 2]]),
        ("crlf.csv", "a,b\r\n1,2\r\n3,4\r\n", [[1, 2], [3, 4]]),
        ("blank lines.csv", "\n\na,b\n\n1,2\n  \n3,4\n\n", [[1, 2], [3, 4]]),
        ("unnamed index.csv", ",a\n0,5\n1,6\n", [[0, 5], [1, 6]]),
        ("words.csv", "nan,inf\n-Infinity,1e-3\n", [[np.nan, np.inf], [-np.inf, 1e-3]]),
        ("truth.csv", "True,False\nfalse,true\n", [[True, False], [False, True]]),
        ("truth and numbers.csv", "0.5,2\n3,true\n", [[0.5, 2], [3, 1]]),
        ("ragged.csv", "1,2,3\n4\n", [[1, 2, 3], [4, -1, -1]]),
        ("column.csv", "x\n1\n2\n", [1, 2]),
        ("huge.csv", f"{10**30},1\n", [[1e30, 1]]),
        ("plain.tsv", "a\tb\n1\t2\n", [[1, 2]]),
        ("spaces.txt", "1  2\t3\n 4 5 6 \n", [[1, 2, 3], [4, 5, 6]]),
        ("commas.txt", "1, 2\n3,4\n", [[1, 2], [3, 4]]),
        ("savetxt.txt", "# a b\n1.0e+00 2.0e+00\n", [[1.0, 2.0]]),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-5:] else "",
)
def test_reads_tables(
    tmp_path: Path, name: str, content: str | bytes, rows: list[list[float]]
) -> None:
    found = only(read_arrays(written(tmp_path, name, content)))
    assert found.dtype == np.array(rows).dtype
    np.testing.assert_array_equal(found, np.array(rows))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("only header.csv", "a,b\n", "holds no numbers below its header"),
        ("blank.csv", "\n \n", "holds no numbers"),
        ("half a header.csv", "1,x\n3,4\n", "line 1, column 2: 'x' is not a number"),
        ("two headers.csv", "a,b\nc,d\n1,2\n", "line 2, column 1: 'c' is not a number"),
        ("late word.csv", "a,b\n\n1,2\n3,oops\n", "line 4, column 2: 'oops' is not a number"),
        ("missing.csv", "1,2,3\n4,,6\n", "line 2, column 2: the cell is empty"),
        ("missing first.csv", "1,,3\n4,5,6\n", "line 1, column 2: the cell is empty"),
        ("trailing.csv", "1,2,\n3,4,\n", "line 1, column 3: the cell is empty"),
        ("only commas.csv", "1,2\n,\n", "line 2, column 1: the cell is empty"),
        ("missing.tsv", "1\t2\t3\n4\t\t6\n", "line 2, column 2: the cell is empty"),
        ("missing.txt", "1,,3\n", "line 1, column 2: the cell is empty"),
        ("underscore.csv", "1_000,2\n", "line 1, column 1: '1_000' is not a number"),
        ("semicolons.csv", "1,5;2,5\n1,2\n", "line 1, column 2: '5;2' is not a number"),
        ("open quote.csv", '1,2\n"3,4\n', "line 2 is not a line of a .csv file"),
        ("long cell.csv", "1," + "x" * 200_000, "line 1 is not a line of a .csv file"),
        ("word.csv", "1," + "x" * 60, r"'x{39}… is not a number"),
        ("old mac.csv", "1,2\r3,4\r", "line 1 holds a carriage return"),
        ("old mac.txt", "1 2\r3 4\r", "line 1 holds a carriage return"),
        ("utf-16.csv", "1,2\n".encode("utf-16"), "line 1 is not UTF-8 text.*Save the file as"),
        ("utf-16 bare.csv", "1,2\n".encode("utf-16-le"), "line 1 is binary.*Save the file as"),
        ("nul.csv", b"1,2\n3,\x004\n", "line 2 is binary"),
        (
            "ragged floats.csv",
            "h\n1,2\n\n3.5\n",
            "only rows of whole numbers.* 2 values in line 2, 1 in line 4, and 3.5 in line 4",
        ),
        (
            "ragged with a float elsewhere.csv",
            "1,2\n3.5,4\n1\n",
            "2 values in line 1, 1 in line 3, and 3.5 in line 2",
        ),
        ("ragged huge.csv", "1e300,2\n3\n", "and 1e.300 in line 1"),
        ("ragged missing.csv", "nan,2\n3\n", "and NaN in line 1"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[-4:-3] == "." else "",
)
def test_rejects_tables_and_names_the_line(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = written(tmp_path, name, content)
    with refused(words, path):
        read_arrays(path)


def test_reads_numbers_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"1 2\n3 4\n")))
    assert only(read_arrays("-")).tolist() == [[1, 2], [3, 4]]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"1 2\n3 x\n")))
    with refused("standard input, line 2, column 2: 'x'", "-"):
        read_arrays("-")


def test_writes_tables_of_two_axes_at_most(tmp_path: Path) -> None:
    for suffix in TABLE_SUFFIXES:
        path = written(tmp_path, f"a{suffix}", "old")
        with refused("at most two axes. Found 3; write .npy", path):
            write_arrays(path, {"scores": np.zeros((2, 2, 2))})
        assert path.read_text() == "old"


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("[true, false]", [True, False]),
        ("[1, 2.5]", [1.0, 2.5]),
        ("[NaN, -Infinity]", [np.nan, -np.inf]),
        ("[[1], [], [2, 3]]", [[1, -1], [-1, -1], [2, 3]]),
        ("[[[1, 2]], [[3, 4]]]", [[[1, 2]], [[3, 4]]]),
        ("[]", np.zeros(0)),
        ("[[], []]", np.zeros((2, 0))),
        (f"[{10**30}, 1]", [1e30, 1.0]),
        ("\ufeff[1]", [1]),
    ],
)
def test_reads_json(tmp_path: Path, text: str, value: Any) -> None:
    found = only(read_arrays(written(tmp_path, "a.json", text)))
    assert found.dtype == np.asarray(value).dtype
    np.testing.assert_array_equal(found, np.asarray(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('["a"]', "the document must hold numbers. Found text"),
        ('"a"', "the document must hold numbers. Found text"),
        ("null", "the document must hold numbers. Found null"),
        ("[1, null]", "the document must hold numbers. Found null"),
        ('[{"a": 1}]', "the document must hold numbers. Found an object"),
        ('{"a": {"b": 1}}', "field 'a' must hold numbers. Found an object"),
        ('{"a": [1], "b": ["x"]}', "field 'b' must hold numbers. Found text"),
        ("{}", "holds no fields"),
        ("[1, [2]]", "the document, item 1 must be a list, as others are. Found 1"),
        ('{"a": [[1], 2]}', "field 'a', item 2 must be a list, as others are. Found 2"),
        ("[[[1], [2, 3]], [[1]]]", "nested lists of equal lengths"),
        ('{"a": [[1, 2.5], [1]]}', "only rows of whole numbers.*and 2.5 in field 'a', row 1"),
        ("[[true], [true, false]]", "and true in the document, row 1"),
        (f"[[{10**30}], [1, 2]]", "only rows of whole numbers"),
        ("[[1e300], [1, 2]]", "only rows of whole numbers"),
        (f"[{10**400}]", "a number beyond 1e308"),
        ("9" * 5000, "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2", "is not JSON"),
        ("[1,]", "is not JSON"),
    ],
    ids=range(20),
)
def test_rejects_json_and_names_the_field(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, "a.json", text)
    with refused(words, path):
        read_arrays(path)


def test_reads_lines_of_json(tmp_path: Path) -> None:
    objects = '{"a": 1, "b": [1]}\n\n{"b": [2, 3], "a": 2}\n'
    found = read_arrays(written(tmp_path, "a.jsonl", objects))
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [1, 2],
        "b": [[1, -1], [2, 3]],
    }
    assert only(read_arrays(written(tmp_path, "b.jsonl", "[1]\n[]\n"))).tolist() == [[1], [-1]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\n", "holds no values"),
        ("[1]\n\n[2\n", "line 3 is not JSON"),
        ('{"a": 1}\n[1]\n', "line 2 must be an object of a, as line 1 is. Found a number or a"),
        ('[1]\n\n{"a": 1}\n', "line 3 must be a number or a list, as line 1 is. Found an object"),
        ('{"a": 1}\n\n{"b": 1}\n', "line 3 must be an object of a, .* Found an object of b"),
        ('{"a": 1}\n{"a": 1, "b": 2}\n', "line 2 must be an object of a"),
        ("{}\n{}\n", "line 1 holds no fields"),
        ("[1]\n\n2\n", "line 3 must be a list, as others are. Found 2"),
        ("[1, 2]\n\n[3.5]\n", "2 values in line 1, 1 in line 3, and 3.5 in line 3"),
        ('{"a": [1, 2]}\n{"a": ["x"]}\n', '"x" in line 2'),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_rejects_lines_of_json_and_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, "a.jsonl", text)
    with refused(words, path):
        read_arrays(path)


# -- text -----------------------------------------------------------------------------------------


def test_reads_lines_without_their_ends(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\ufeffeins\r\nzwei\n\n三")
    assert list(read_lines(path)) == ["eins", "zwei", "", "三"]
    assert list(read_lines(written(tmp_path, "empty.txt", ""))) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"good\nb\xe4d\n", "line 2 is not UTF-8 text: byte 1 is 0xe4"),
        ("good\n".encode("utf-16"), "line 1 is not UTF-8 text: byte 0 is 0xff"),
        (b"good\nb\x00d\n", "line 2 is binary"),
    ],
)
def test_rejects_lines_that_are_no_text(tmp_path: Path, content: bytes, words: str) -> None:
    path = written(tmp_path, "a.txt", content)
    with refused(words, path):
        list(read_lines(path))


def test_rejects_lines_of_no_file(tmp_path: Path) -> None:
    with refused("is a folder", tmp_path):
        list(read_lines(tmp_path))
    with refused("does not exist", tmp_path / "no.txt"):
        list(read_lines(tmp_path / "no.txt"))
    if Path("/proc/self/mem").exists():
        with refused("cannot be read", "/proc/self/mem"):
            list(read_lines("/proc/self/mem"))


CONLL = """-DOCSTART- -X- O

# text = a comment
EU NNP B-ORG
#hashtag NN O
# NN O

#1 O
#\tO
"""


def test_reads_conll(tmp_path: Path) -> None:
    found = list(read_conll(written(tmp_path, "a.conll", CONLL)))
    assert found == [
        (["EU", "#hashtag", "#"], ["B-ORG", "O", "O"]),
        (["#1", "#"], ["O", "O"]),
    ]
    crlf = written(tmp_path, "b.conll", "a\tB\r\n\r\nb\tO")
    assert list(read_conll(crlf)) == [(["a"], ["B"]), (["b"], ["O"])]
    assert list(read_conll(written(tmp_path, "c.conll", ""))) == []


def test_rejects_a_token_without_a_tag(tmp_path: Path) -> None:
    path = written(tmp_path, "a.conll", "a B\n\nalone\n")
    with refused("line 3 must be a token and its tag. Found 'alone'", path):
        list(read_conll(path))


# -- images ---------------------------------------------------------------------------------------


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (4, 3)) -> Path:
    Image.new(mode, size, 1 if mode == "1" else 200 if mode == "L" else None).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("1", (1, 3, 4)),
        ("L", (1, 3, 4)),
        ("LA", (1, 3, 4)),
        ("P", (1, 3, 4, 3)),
        ("RGB", (1, 3, 4, 3)),
        ("RGBA", (1, 3, 4, 3)),
    ],
)
def test_reads_images_of_any_mode(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    found = read_images(picture(tmp_path / "a.png", mode))
    assert found.dtype == np.uint8
    assert found.shape == shape


def test_brings_sixteen_bits_to_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256], [32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_images(tmp_path / "a.png").tolist() == [[[0, 1], [128, 255]]]


def test_rejects_images_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.new("F", (2, 2), 0.5).save(path)
    with refused("32 bits per pixel", path):
        read_images(path)


def test_reads_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for number, name in enumerate(("c.png", "a.png", "b.bmp", ".hidden.png")):
        Image.new("L", (2, 2), number).save(tmp_path / name)
    written(tmp_path, "notes.txt", "not an image")
    assert read_images(tmp_path)[:, 0, 0].tolist() == [1, 2, 0]


def test_rejects_images_of_unequal_sizes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = picture(tmp_path / "b.png", size=(5, 3))
    with refused(r"must have the size of a.png, \[3, 4\]. Found \[3, 5\]", path):
        read_images(tmp_path)


def test_rejects_files_that_are_no_images(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", "RGB", (64, 64)).read_bytes()
    defects = {
        "empty": (b"", "is empty"),
        "cut": (whole[: len(whole) // 2], "is not a whole image"),
        "cut in its header": (whole[:20], "is not a whole image"),
        "noise": (bytes(range(256)), "is not a whole image"),
        "text": (b"not an image", "is not a whole image"),
    }
    for name, (content, words) in defects.items():
        path = written(tmp_path, f"{name}.png", content)
        with refused(words, path):
            read_images(path)
    with refused("does not exist", tmp_path / "none.png"):
        read_images(tmp_path / "none.png")


@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.booleans())
@reproducible
def test_damaged_images_are_refused_or_pixels(place: int, byte: int, cut: bool) -> None:
    for suffix in (".png", ".gif", ".bmp", ".tiff"):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / f"a{suffix}"
            Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
            content = bytearray(path.read_bytes())
            place %= len(content)
            content[place] = byte
            path.write_bytes(bytes(content[: place + 1] if cut else content))
            try:
                assert read_images(path).dtype == np.uint8
            except FileFormatError as error:
                assert str(path) in str(error)  # noqa: PT017 -- either outcome is right


def test_rejects_a_folder_without_images(tmp_path: Path) -> None:
    with refused("holds no images", tmp_path):
        read_images(tmp_path)


# -- writing: whole or not at all -----------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "old")

    def lines() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(path, lines())
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text(f"new {1 / 0}")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


_SLOW_WRITER = textwrap.dedent("""
    import signal
    import sys
    from pathlib import Path
    from kexue.core.files import write_lines

    def lines():
        for number in range(200_000):
            yield "x" * 50
        print("half way", flush=True)
        sys.stdin.read()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    write_lines(Path(sys.argv[1]), lines())
""")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path, number: int) -> None:
    path = written(tmp_path, "a.txt", "old")
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW_WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        assert len(names(tmp_path)) == 2
        process.send_signal(number)
        process.wait()
    assert path.read_text() == "old"
    if number != signal.SIGKILL:
        assert names(tmp_path) == ["a.txt"]
    write_lines(path, ["new"])  # what a killed writer left behind is in nobody's way
    assert path.read_text() == "new\n"


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = valid(tmp_path, suffix)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with refused("could not be written: .*What was there before is unchanged", path, WorkError):
            write_arrays(path, {"scores": np.ones((100, 100))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert names(tmp_path) == [path.name]


def test_rejects_places_where_no_file_can_be(tmp_path: Path) -> None:
    for suffix in ARRAY_SUFFIXES:
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        with refused("is a folder. Name a file in it", folder):
            write_arrays(folder, {"scores": FLOATS})
        missing = tmp_path / "missing" / f"a{suffix}"
        with refused("there is no folder .*missing", missing):
            write_arrays(missing, {"scores": FLOATS})
    with refused("no place to write to.*standard output", "-"):
        write_lines("-", ["a"])
    with refused("must end in one of", tmp_path / "a.xlsx"):
        write_arrays(tmp_path / "a.xlsx", {"scores": FLOATS})
    with refused("cannot be written", tmp_path / "a\0.txt"):
        atomic_write(tmp_path / "a\0.txt", "")
    assert len(names(tmp_path)) == len(ARRAY_SUFFIXES)


def test_rejects_a_place_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a.txt", "old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing is forbidden to root
    with refused("cannot be written: Permission denied", path):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_never_replaces_a_device_or_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path(os.devnull)):
        with refused("is not a regular file and is left as it is", path):
            atomic_write(path, "new")
        assert not path.is_file()


def test_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = written(tmp_path / "elsewhere", "a.txt", "old")
    (tmp_path / "link.txt").symlink_to(target)
    atomic_write(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert target.read_text() == "new"


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = written(tmp_path, "private.txt", "old")
    path.chmod(0o600)
    atomic_write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new.txt", "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o640


def test_writes_names_as_long_as_a_folder_allows(tmp_path: Path) -> None:
    path = tmp_path / ("语" * 80 + ".txt")
    atomic_write(path, "new")
    assert path.read_text() == "new"


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "old")
    with path.open() as reader:
        atomic_write(path, "new")
        assert reader.read() == "old"


def test_a_file_can_be_read_and_replaced_in_one_go(tmp_path: Path) -> None:
    for suffix in ARRAY_SUFFIXES:
        path = valid(tmp_path, suffix)
        write_arrays(path, {"scores": only(read_arrays(path)) * 2})
        np.testing.assert_array_equal(only(read_arrays(path)), FLOATS * 2)
