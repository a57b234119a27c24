"""The formats that word vectors come in."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue.core.errors import FileFormatError, MissingDependencyError
from kexue.core.files import read_arrays, read_lines
from kexue.core.lines import check_file, detail

__all__ = ["read_vectors"]

Floats = NDArray[np.float32]
Pieces = Callable[[str], list[str]]

_PICKLE = b"\x80"
_ZIP = b"PK\x03\x04"
_EMBEDDINGS = ("word_embeddings", "embed_tokens", "wte", "shared", "tok_embeddings", "embeddings")


def read_vectors(
    path: Path, vocabulary: str | Path | None, only: Collection[str] | None
) -> tuple[list[str], Tensor, Pieces | None]:
    """Return words, vectors, and what splits texts into the words of a language model."""
    if path.is_dir():
        return _read_model(path)
    if path.suffix.lower() == ".npy":
        return (*_read_npy(path, vocabulary), None)
    check_file(path)
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(_PICKLE) or start == _ZIP:
        raise FileFormatError(
            f"{path} is a pickle, as gensim's and torch's `save` write it, which could run code "
            f"and is never loaded. Write it with gensim's "
            f"`KeyedVectors.save_word2vec_format('vectors.bin', binary=True)`.",
            path=path,
        )
    read = _read_binary if path.suffix.lower() == ".bin" else _read_text
    words, vectors = read(path, only)
    if not words:
        raise FileFormatError(
            f"{path} holds no vectors" + (" of the words of these texts." if only else "."),
            path=path,
        )
    return words, torch.from_numpy(np.stack(vectors)), None


# -- word2vec and GloVe -------------------------------------------------------------------------


def _read_text(path: Path, only: Collection[str] | None) -> tuple[list[str], list[Floats]]:
    words: list[str] = []
    vectors: list[Floats] = []
    size = 0
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.rstrip().split(" ") if size == 0 else line.rstrip().rsplit(" ", size)
        if number == 1 and len(fields) == 2 and all(f.isdigit() for f in fields):
            size = int(fields[1])
            continue
        size = size or len(fields) - 1
        if not line.strip():
            continue
        if len(fields) != size + 1 or not size:
            raise FileFormatError(
                f"{path}, line {number} must be a word and {size or 'some'} numbers, separated by "
                f"spaces. Found {len(fields) - 1} numbers.",
                path=path,
            )
        if only is None or fields[0] in only:
            words.append(fields[0])
            vectors.append(_numbers(path, number, fields[1:]))
    return words, vectors


def _numbers(path: Path, line: int, fields: list[str]) -> Floats:
    try:
        return np.array(fields, dtype=np.float32)
    except ValueError as error:
        raise FileFormatError(f"{path}, line {line}: {detail(error)}.", path=path) from error


def _read_binary(path: Path, only: Collection[str] | None) -> tuple[list[str], list[Floats]]:
    words: list[str] = []
    vectors: list[Floats] = []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, size, at = _binary_header(path, data)
        for i in range(count):
            space = data.find(b" ", at)
            end = space + 1 + 4 * size
            if space < 0 or end > len(data):
                raise FileFormatError(
                    f"{path} ends within word {i + 1} of {count}: it is not whole.", path=path
                )
            word = data[at:space].lstrip(b"\n").decode("utf-8", errors="replace")
            if only is None or word in only:
                words.append(word)
                vectors.append(np.frombuffer(data[space + 1 : end], dtype="<f4"))
            at = end
    return words, vectors


def _binary_header(path: Path, data: mmap.mmap) -> tuple[int, int, int]:
    """Return how many words there are, how long the vectors are, and where they begin."""
    end = data.find(b"\n", 0, 64)
    fields = data[: max(end, 0)].split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or not int(fields[1]):
        raise FileFormatError(
            f"{path} is not in word2vec's binary format: its first line must say how many words "
            f"it holds and how long their vectors are.",
            path=path,
        )
    return int(fields[0]), int(fields[1]), end + 1


# -- arrays -------------------------------------------------------------------------------------


def _read_npy(path: Path, vocabulary: str | Path | None) -> tuple[list[str], Tensor]:
    (array,) = read_arrays(path).values()
    beside = [path.with_suffix(suffix) for suffix in (".txt", ".vocab")]
    file = vocabulary or next((p for p in beside if p.exists()), None)
    if file is None:
        raise FileFormatError(
            f"{path} needs the words of its rows, one a line, in {beside[0].name}, or in a file "
            f"named by `vocabulary`.",
            path=path,
        )
    words = [line.strip() for line in read_lines(file)]
    if array.ndim != 2 or len(words) != len(array):
        raise FileFormatError(
            f"{path} must have one row for each of the {len(words)} words in {file}. "
            f"Found shape {list(array.shape)}.",
            path=path,
        )
    return words, torch.from_numpy(np.array(array, dtype=np.float32))


# -- language models ----------------------------------------------------------------------------


def _read_model(folder: Path) -> tuple[list[str], Tensor, Pieces]:
    tokenizer = _tokenizer(folder)
    vectors = _embeddings(folder)
    by_id = {i: word for word, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    words = [by_id.get(i, f"<unused {i}>") for i in range(len(vectors))]
    return words, vectors, _Pieces(tokenizer)


class _Pieces:
    """What a language model makes of a text; a class, so that it can be pickled."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[str]:
        found: list[str] = self._tokenizer.encode(text, add_special_tokens=False).tokens
        return found


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    check_file(path)
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            f"The tokenizer of {folder}", "tokenizers", "pip install 'kexue-wrd[models]'"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the base class
        raise FileFormatError(f"{path} is not a tokenizer: {detail(error)}.", path=path) from error


def _embeddings(folder: Path) -> Tensor:
    """Return the input embeddings of a model, in float32."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= dict.fromkeys(weights.keys(), file)
        except SafetensorError as error:
            raise FileFormatError(f"{file} is not whole: {detail(error)}.", path=file) from error
    for ending in _EMBEDDINGS:
        for name, file in found.items():
            if name.split(".")[-2:] == [ending, "weight"]:
                with safe_open(file, framework="pt") as weights:
                    tensor: Tensor = weights.get_tensor(name)
                return tensor.float()
    raise FileFormatError(
        f"{folder} holds no embedding matrix of a known name ({', '.join(_EMBEDDINGS)}).",
        path=folder,
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / Path(name).name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{index} is no index of weights: {detail(error)}.", path=index
            ) from error
    path = folder / "model.safetensors"
    if not path.exists():
        raise FileFormatError(
            f"{folder} holds no model.safetensors. Pickled weights (pytorch_model.bin) are never "
            f"loaded; `save_pretrained` of transformers writes safetensors.",
            path=folder,
        )
    return [path]
