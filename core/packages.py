"""Installing and removing plugins with the running interpreter's pip."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from kexue.core.catalogue import Entry, catalogue
from kexue.core.errors import ComponentNotFoundError, WorkError
from kexue.core.registry import Registry

__all__ = ["install_command", "run_command", "uninstall_command"]


def install_command(slugs: Sequence[str], *, editable: bool = False) -> list[str]:
    """Return the command that installs plugins and what they import and is not there yet.

    From a checkout where there is one (the one kexue runs from, or the one around the working
    folder), else by distribution.

    Args:
        slugs: Plugins of the catalogue.
        editable: Whether changes in the checkout take effect without another install.

    Raises:
        ComponentNotFoundError: If a plugin is unknown or not yet written.
    """
    asked = {catalogue().entry(slug).slug for slug in slugs}
    entries = [e for e in catalogue().closure(slugs) if e.slug in asked or not _installed(e)]
    for entry in entries:
        if entry.planned:
            raise ComponentNotFoundError(
                f"The plugin {entry.slug!r} is planned and not yet written; the post is "
                f"{entry.url}.",
                name=entry.slug,
            )
    words: list[str] = []
    for entry in entries:
        folder = _folder(entry)
        if folder is None:
            words.append(entry.distribution)
        else:
            words += ["--editable", str(folder)] if editable else [str(folder)]
    return [*_pip("install"), *words]


def uninstall_command(slugs: Sequence[str], registry: Registry) -> list[str]:
    """Return the command that removes plugins, broken ones included.

    Args:
        slugs: Installed plugins, by slug or distribution.
        registry: What is installed.

    Raises:
        ComponentNotFoundError: If one is not installed, or is not a distribution.
    """
    owners = []
    for slug in slugs:
        plugin = registry.plugin(slug)
        if plugin.source != "installed":
            raise ComponentNotFoundError(
                f"{slug!r} is registered by {plugin.owner}; remove it there.", name=slug
            )
        owners.append(plugin.owner)
    command = [*_pip("uninstall"), *owners]
    return command if command[0] == "uv" else [*command, "--yes"]


def run_command(command: Sequence[str]) -> None:
    """Run a command, its output on this process's standard error.

    Raises:
        WorkError: If it fails.
    """
    done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603 -- built above
    if done.returncode:
        raise WorkError(f"`{' '.join(command)}` failed with status {done.returncode}.")


def _pip(verb: str) -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", verb]
    if shutil.which("uv"):
        return ["uv", "pip", verb, "--python", sys.executable]
    raise WorkError(
        f"{sys.executable} has no pip. Run `{sys.executable} -m ensurepip`, or install uv."
    )


def _installed(entry: Entry) -> bool:
    try:
        metadata.distribution(entry.distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _folder(entry: Entry) -> Path | None:
    """Return the plugin's folder in the checkout kexue runs from or is called in."""
    if entry.folder is not None:
        return entry.folder
    here = Path.cwd()
    for root in (here, *here.parents):
        if (root / "registry.yaml").is_file() and (root / entry.path / "pyproject.toml").is_file():
            return root / entry.path
    return None
