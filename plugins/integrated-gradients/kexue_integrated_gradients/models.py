"""Models from files: TorchScript, exported programs, and objects of Python files.

A model is a program. TorchScript's own interpreter reads TorchScript, without Python's unpickler.
``torch.export.load`` unpickles parts of an archive; here it does so in torch's restricted mode,
and archives with compiled libraries or pickled objects are refused. Even so torch promises neither
to be safe with models from strangers, and a Python file is executed.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Job
from kexue.core.lines import check_file, detail
from kexue.core.loading import load_target

__all__ = ["FixedBatch", "load_model"]

_TARGET = re.compile(r".+\.py:[\w.]+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_REMEDY = (
    "Save the model with `torch.export.save`, or its weights as safetensors and name "
    "`file.py:model` with `--weights`."
)
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_model(job: Job, given: str, *, by_layer: bool = False) -> Callable[..., Any]:
    """Return the model that was named, on the job's device and in its dtype.

    Args:
        job: The call; its weights are loaded into the model.
        given: A TorchScript file, an exported program, or ``file.py:model``: a module, a class of
            modules, a function of tensors, or a function without arguments that returns a model.
        by_layer: Whether layers of the model are asked for.

    Raises:
        ArgumentError: If what was named is no model.
        FileFormatError: If the file is no model, or one that could run code when it is loaded.
    """
    if _TARGET.fullmatch(given) and not Path(given).exists():
        model = _from_python(given)
    else:
        model = _from_file(Path(given), job.device, by_layer=by_layer)
    if job.weights is not None:
        job.load_weights(model)
    return model.to(job.device, job.dtype) if isinstance(model, nn.Module) else model


def _from_python(given: str) -> Callable[..., Any]:
    found = load_target(given)
    if not isinstance(found, nn.Module) and callable(found) and _needs_nothing(found):
        found = found()
    if not callable(found):
        raise ArgumentError(
            f"{given} must be a module, or a function of tensors. Found {type(found).__name__}.",
            argument="model",
        )
    model: Callable[..., Any] = found
    return model


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments, as one that makes a model is."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _from_file(path: Path, device: torch.device, *, by_layer: bool) -> nn.Module:
    check_file(path)
    if path.suffix.lower() == ".py":
        raise ArgumentError(
            f"{path} must be followed by the name of the model in it, as in {path}:model.",
            argument="model",
        )
    if path.suffix.lower() == ".safetensors":
        raise FileFormatError(
            f"{path} holds weights without a model. Name `file.py:model --weights {path}`.",
            path=path,
        )
    names = _members(path)
    parts = {tuple(Path(name).parts[1:]) for name in names}
    if ("constants.pkl",) in parts and any(part[:1] == ("code",) for part in parts):
        return _torchscript(path, device)
    if any(part[:1] == ("models",) for part in parts):
        return _exported(path, names, by_layer=by_layer)
    raise FileFormatError(
        f"{path} is neither TorchScript nor an exported program"
        + (
            f" but a pickle of `torch.save`, which could run code and is never loaded. {_REMEDY}"
            if ("data.pkl",) in parts
            else f". {_REMEDY}"
        ),
        path=path,
    )


def _members(path: Path) -> list[str]:
    """Return the names in an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        with path.open("rb") as stream:
            pickled = stream.read(1) == b"\x80"
        what = "a pickle, which could run code and is never loaded" if pickled else "no model file"
        raise FileFormatError(f"{path} is {what}. {_REMEDY}", path=path) from error


def _torchscript(path: Path, device: torch.device) -> nn.Module:
    try:
        with _without_deprecations():
            model: nn.Module = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location=device
            )
    except (RuntimeError, ValueError) as error:
        raise _not_whole(path, "TorchScript", error) from error
    return model


def _exported(path: Path, names: list[str], *, by_layer: bool) -> nn.Module:
    for name in names:
        if "aotinductor" in name or Path(name).name.startswith(("custom_obj", "opaque_obj")):
            raise FileFormatError(
                f"{path} holds {Path(name).name}, an object or library that could run code when "
                f"it is loaded. {_REMEDY}",
                path=path,
            )
    try:
        with _without_deprecations(), _restricted_unpickler():
            program = torch.export.load(path)
            module = torch.export.unflatten(program) if by_layer else program.module()
    except Exception as error:  # broken archives fail in any way
        raise _not_whole(path, "exported program", error) from error
    size = _fixed_size(program)
    if size is not None and by_layer:
        raise ArgumentError(
            f"`--layer` needs a program for batches of any size. {path} was exported for {size}; "
            f"give `torch.export.export` a `dynamic_shapes`.",
            argument="layer",
        )
    return module if size is None else FixedBatch(module, size)


def _not_whole(path: Path, what: str, error: BaseException) -> FileFormatError:
    if isinstance(error, pickle.UnpicklingError):
        return FileFormatError(
            f"{path} holds pickled objects, which could run code and are never loaded. {_REMEDY}",
            path=path,
        )
    first = str(error).strip().partition("\n")[0]
    return FileFormatError(
        f"{path} is not a whole {what}: {first[:200] or detail(error)}.", path=path
    )


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Keep torch from telling that TorchScript is deprecated; that is for who saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def _restricted_unpickler() -> Iterator[None]:
    """Let torch unpickle tensors only, wherever it would unpickle anything."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _fixed_size(program: torch.export.ExportedProgram) -> int | None:
    """Return the size of the batch that a program is made for; None if it takes any."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor):
            return value.shape[0] if value.ndim and isinstance(value.shape[0], int) else None
    return None


class FixedBatch(nn.Module):
    """A model that takes one size of batch only, for batches of any size.

    Args:
        model: The model.
        size: The size that it takes.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, *arguments: Any) -> Tensor:
        """Return the outputs of all rows; the last batch is filled up with its last row.

        Args:
            arguments: Tensors ``[batch, ...]``, and others, which each batch gets.
        """
        rows = len(arguments[0])
        parts = [
            self.model(*(self._part(a, first, rows) for a in arguments))
            for first in range(0, rows, self.size)
        ]
        return torch.cat(parts)[:rows]

    def _part(self, argument: Any, first: int, rows: int) -> Any:
        if not isinstance(argument, Tensor) or not argument.ndim or len(argument) != rows:
            return argument
        index = torch.arange(first, first + self.size, device=argument.device)
        return argument[index.clamp(max=rows - 1)]
