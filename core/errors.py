"""Everything kexue raises on purpose.

::

    KexueError
    ├── UsageError                 the call was wrong (exit status 2)
    │   ├── ArgumentError          one argument; also a ValueError
    │   ├── ComponentNotFoundError no such component; also a LookupError
    │   ├── ComponentConflictError two owners of one id; also a LookupError
    │   ├── FileFormatError        a file that is not what it should be; also a ValueError
    │   └── MissingDependencyError an optional package; also an ImportError
    ├── ManifestError              what a plugin says of itself is not valid; also a ValueError
    ├── PluginBrokenError          a plugin that could not be loaded
    └── WorkError                  the work itself failed (exit status 1)

A message is one sentence with its remedy: which argument, the condition it must meet, what was
found, what to do. The culprit is an attribute too, so that callers need not parse the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "ArgumentError",
    "ComponentConflictError",
    "ComponentNotFoundError",
    "FileFormatError",
    "KexueError",
    "ManifestError",
    "MissingDependencyError",
    "PluginBrokenError",
    "UsageError",
    "WorkError",
    "did_you_mean",
    "nearest",
]


class KexueError(Exception):
    """Base of all errors of kexue."""

    exit_status: ClassVar[int] = 1

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    cls: type[KexueError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> KexueError:
    """Rebuild an error that another process raised, whatever its constructor takes."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class UsageError(KexueError):
    """The call was wrong."""

    exit_status = 2


class ArgumentError(UsageError, ValueError):
    """An argument that does not meet its condition.

    Args:
        message: One sentence: the argument in backticks, its condition, what was found.
        argument: The name of the argument.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class ComponentNotFoundError(UsageError, LookupError):
    """No component, plugin or kind of that name can be used.

    Args:
        message: One sentence, with the nearest name or the command that installs it.
        name: What was looked for.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class ComponentConflictError(UsageError, LookupError):
    """Several plugins own the same component id.

    Args:
        message: One sentence that names the owners and how to choose.
        name: The id.
        owners: The distributions or files that register it.
    """

    def __init__(self, message: str, *, name: str, owners: tuple[str, ...]) -> None:
        super().__init__(message)
        self.name = name
        self.owners = owners


class FileFormatError(UsageError, ValueError):
    """A file that is not what it should be.

    Args:
        message: One sentence that names the file and, where there is one, the line or field.
        path: The file.
    """

    def __init__(self, message: str, *, path: Any = None) -> None:
        super().__init__(message)
        self.path = path


class MissingDependencyError(UsageError, ImportError):
    """An optional package is needed and not installed.

    Args:
        needed_by: What needs it, as the user called it.
        package: The package.
        command: What installs it.
    """

    def __init__(self, needed_by: str, package: str, command: str) -> None:
        super().__init__(f"{needed_by} needs {package}, which is not installed. Run `{command}`.")
        self.package = package
        self.command = command


class ManifestError(KexueError, ValueError):
    """A plugin's manifest, or a user's registry file, that is not valid."""


class PluginBrokenError(KexueError):
    """A plugin that is installed and cannot be used.

    Args:
        message: One sentence with the plugin, its version and the reason.
        plugin: The slug of the plugin.
    """

    def __init__(self, message: str, *, plugin: str) -> None:
        super().__init__(message)
        self.plugin = plugin


class WorkError(KexueError):
    """The work failed although the call was right."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to ``name``; None if none is near.

    Args:
        name: What was typed.
        known: What could have been meant.
    """
    import difflib

    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, else ``""``.

    Args:
        name: What was typed.
        known: What could have been meant.
    """
    found = nearest(name, known)
    return f" Did you mean {found!r}?" if found is not None else ""
