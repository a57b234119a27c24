"""The user's registry files: components without packaging, switches and preferences.

::

    # <user config folder>/kexue/registry.yaml, or any file named by KEXUE_REGISTRY
    components:
      - {id: loss/focal, target: focal.py:Focal, summary: Focal loss.}
    plugins:
      zlpr: {enabled: false}
    prefer:
      loss/crf: kexue-crf
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from kexue.core.component import Component, Dataset, Experiment, Interface
from kexue.core.errors import ManifestError, did_you_mean

__all__ = ["Settings", "config_path", "read_settings", "records_of"]

_OURS = ("plugin", "owner")  # fields that the registry sets
_TARGETS = ("target", "run", "fit", "apply", "checks")
_KEYS: Mapping[str, type] = {
    "components": Component,
    "interfaces": Interface,
    "experiments": Experiment,
    "datasets": Dataset,
}


@dataclass(frozen=True)
class Settings:
    """What the user's files and environment say.

    Args:
        documents: The files, first to last, each as parsed or with its ``error``.
        enabled: Switches by plugin; the first file that names one decides.
        prefer: Owners by component id; the first file that names one decides.
        off: Plugins that ``KEXUE_DISABLE`` names; ``*`` for all.
    """

    documents: tuple[Mapping[str, Any], ...] = ()
    enabled: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    prefer: Mapping[str, str] = field(default_factory=dict)
    off: frozenset[str] = frozenset()

    @property
    def path(self) -> Path:
        """The user's own registry file, whether it exists or not."""
        return config_path()

    def disabled(self, slug: str, owner: str) -> bool:
        """Whether the plugin is switched off."""
        return bool(self.why_disabled(slug, owner))

    def why_disabled(self, slug: str, owner: str) -> str:
        """Say what switches the plugin off; empty if nothing does."""
        if "*" in self.off:
            return "`--no-plugins` or KEXUE_DISABLE=*."
        if self.off & {slug, owner}:
            return f"KEXUE_DISABLE={','.join(sorted(self.off))}."
        for name in (slug, owner):
            on, path = self.enabled.get(name, (True, ""))
            if not on:
                return f"`enabled: false` in {path}."
        return ""


def config_path() -> Path:
    """Return the path of the user's own registry file."""
    from platformdirs import user_config_path

    return user_config_path("kexue", appauthor=False) / "registry.yaml"


def read_settings() -> Settings:
    """Read the files that ``KEXUE_REGISTRY`` names, the user's own, and ``KEXUE_DISABLE``.

    A file that cannot be read is kept with its error, so that it is listed as broken.
    """
    named = filter(None, os.environ.get("KEXUE_REGISTRY", "").split(os.pathsep))
    paths = [Path(path).expanduser().absolute() for path in named]
    own = config_path()
    with contextlib.suppress(OSError):  # a folder that this user must not look into
        paths += [own] if own.is_file() else []
    documents = [_read(path) for path in dict.fromkeys(paths)]
    enabled: dict[str, tuple[bool, str]] = {}
    prefer: dict[str, str] = {}
    for document in documents:
        for slug, switches in (document.get("plugins") or {}).items():
            enabled.setdefault(slug, (bool(switches.get("enabled", True)), str(document["path"])))
        for name, owner in (document.get("prefer") or {}).items():
            prefer.setdefault(name, owner)
    off = frozenset(filter(None, os.environ.get("KEXUE_DISABLE", "").replace(" ", "").split(",")))
    return Settings(tuple(documents), enabled, prefer, off)


def _read(path: Path) -> dict[str, Any]:
    try:
        return {**_validated(path), "path": path}
    except (OSError, ManifestError) as error:
        detail = (
            error if isinstance(error, ManifestError) else ManifestError(_unreadable(path, error))
        )
        return {"path": path, "error": detail}


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist; KEXUE_REGISTRY names it"
    return f"{path} cannot be read: {error.strerror}"


def _validated(path: Path) -> dict[str, Any]:
    from kexue.core.catalogue import load_yaml

    document = load_yaml(path)
    if not isinstance(document, dict):
        raise ManifestError(f"{path} must hold a mapping. Found {type(document).__name__}")
    allowed = [*_KEYS, "plugins", "prefer"]
    for key, value in document.items():
        if key not in allowed:
            raise ManifestError(f"{path} has no use for {key!r}.{did_you_mean(str(key), allowed)}")
        wanted: type = list if key in _KEYS else dict
        if value is not None and not isinstance(value, wanted):
            raise ManifestError(f"`{key}` in {path} must be a {wanted.__name__}. Found {value!r}")
    for slug, switches in (document.get("plugins") or {}).items():
        if not isinstance(switches, dict) or not isinstance(switches.get("enabled", True), bool):
            raise ManifestError(
                f"`plugins: {slug}` in {path} must be {{enabled: true}} or {{enabled: false}}. "
                f"Found {switches!r}"
            )
    for name, owner in (document.get("prefer") or {}).items():
        if not isinstance(owner, str):
            raise ManifestError(
                f"`prefer: {name}` in {path} must name a plugin, a distribution or a file. "
                f"Found {owner!r}"
            )
    return document


def records_of(document: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the records of a registry file.

    Raises:
        ManifestError: If the file could not be read or an entry is not of its form.
    """
    if "error" in document:
        raise document["error"]
    folder = Path(document["path"]).resolve().parent
    for key, record in _KEYS.items():
        for number, row in enumerate(document.get(key) or ()):
            yield _record(record, row, folder, f"{key}[{number}] in {document['path']}")


def _record(record: type, row: Any, folder: Path, where: str) -> Any:
    if not isinstance(row, dict):
        raise ManifestError(f"{where} must be a mapping. Found {row!r}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
    values |= {k: _absolute(v, folder) for k, v in values.items() if k in _TARGETS}
    if record is Component and isinstance(values.get("id"), str):
        values["kind"], _, values["name"] = str(values.pop("id")).partition("/")
    values.setdefault("summary", f"From {row.get('target')}.")
    known = {f.name: f.default is MISSING for f in fields(record) if f.name not in _OURS}
    for key in values:
        if key not in known:
            raise ManifestError(f"{where} has no use for {key!r}.{did_you_mean(str(key), known)}")
    missing = [repr(name) for name, required in known.items() if required and name not in values]
    if missing:
        raise ManifestError(f"{where} needs {' and '.join(missing)}")
    return record(**values)


def _absolute(target: Any, folder: Path) -> Any:
    """Return a target in a file with the file's path, which is relative to the folder."""
    if not isinstance(target, str) or ".py:" not in target:
        return target
    file, _, attribute = target.rpartition(":")
    return f"{folder / Path(file).expanduser()}:{attribute}"
