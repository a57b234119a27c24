"""Importing what a target names, with errors that say whose it is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kexue.core.errors import ArgumentError, WorkError, did_you_mean
from kexue.core.source import split_target

__all__ = ["FunctionComponent", "load_file", "load_target"]


def load_target(target: str) -> Any:
    """Import ``"module:attribute"`` or ``"file.py:attribute"``.

    A file is executed: it is for code that the user named, never for data.

    Raises:
        WorkError: If the module cannot be imported.
        ArgumentError: If it has no such attribute.
    """
    module_name, attribute = split_target(target)
    if module_name.endswith(".py"):
        module: ModuleType = load_file(Path(module_name).expanduser())
    else:
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise WorkError(f"{module_name} could not be imported: {_reason(error)}.") from error
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ArgumentError(
                f"{module_name} has no {attribute!r}.{did_you_mean(attribute, dir(module))}"
            ) from error
        except (Exception, SystemExit) as error:  # a lazy module imports what it is asked for
            raise WorkError(
                f"{module_name} could not import {attribute!r}: {_reason(error)}."
            ) from error
    return found


def _reason(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


def load_file(path: Path) -> ModuleType:
    """Execute a Python file as a module of its own; the same file gives the same module.

    Raises:
        ArgumentError: If there is no such file.
        WorkError: If it fails.
    """
    path = path.resolve()
    if not path.is_file():
        raise ArgumentError(f"{path} does not exist.", argument="target")
    name = f"kexue_file_{path.stem}_{zlib.crc32(str(path).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{path} must be a Python file.", argument="target")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise WorkError(f"{path} failed: {_reason(error)}.") from error
        raise
    return module


class FunctionComponent:
    """A plain function under a contract.

    Its arguments without defaults are the inputs, those with defaults the parameters.

    Args:
        function: The function.
        method: The method of the kind, under whose name it can be called too.
        params: Values for arguments that have defaults.
    """

    def __init__(
        self, function: Callable[..., Any], method: str, params: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.method = method
        self.params = dict(params)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **{**self.params, **kwargs})

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("method"):
            return self
        raise AttributeError(name)

    def __repr__(self) -> str:
        params = "".join(f", {key}={value!r}" for key, value in self.params.items())
        return f"{type(self).__name__}({self.function.__qualname__}{params})"
