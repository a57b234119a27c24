"""The arrays of an index in a file, which is mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kexue.core import FileFormatError
from kexue.core.lines import check_file, detail
from kexue.core.writing import atomic_path

__all__ = ["load", "save"]

_FORM = "kexue trie 1"
_ARRAYS = ("keys", "leaves", "firsts", "rows")


def save(path: str | Path, arrays: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write arrays and numbers to a safetensors file, which appears when it is whole.

    Args:
        path: The file.
        arrays: The tensors, on any device.
        numbers: What JSON can hold.
    """
    from safetensors.torch import save_file

    arrays = {name: array.cpu().contiguous() for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"form": _FORM, "numbers": json.dumps(numbers)})


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the arrays and numbers of a file.

    Args:
        path: The file.

    Raises:
        FileFormatError: If :func:`save` did not write it.
    """
    from safetensors import SafetensorError, safe_open

    check_file(Path(path))
    try:
        with safe_open(path, framework="pt") as opened:
            said = opened.metadata() or {}
            names = set(opened.keys())
            if said.get("form") != _FORM or names != set(_ARRAYS):
                raise FileFormatError(
                    f"{path} is no index of sequences. `TrieIndex.save` writes one.", path=path
                )
            arrays = {name: opened.get_tensor(name) for name in _ARRAYS}
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is no whole safetensors file: {detail(error)}. `TrieIndex.save` writes "
            f"an index.",
            path=path,
        ) from error
    return arrays, json.loads(said["numbers"])
