"""The catalogue of first-party plugins, installed or not: ``registry.yaml``.

Parsed only when somebody asks for what is not installed, and once per process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kexue.core.errors import ComponentNotFoundError, ManifestError, did_you_mean

__all__ = ["Catalogue", "Entry", "catalogue", "load_yaml"]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Entry:
    """One plugin of the catalogue.

    Args:
        slug: The plugin's short name.
        title: The title of the post, as written.
        english: The same in English.
        date: Day of publication, ``YYYY-MM-DD``.
        post: Archive id of the post.
        distribution: What pip calls the package.
        path: Its folder in a checkout, relative to the root.
        status: ``"available"`` or ``"planned"``.
        components: Ids; one that ends in ``*`` stands for several without a name yet.
        summary: One line.
        requires: Slugs of the plugins that it imports.
    """

    slug: str
    title: str
    english: str
    date: str
    post: int
    distribution: str
    path: str
    status: str
    components: tuple[str, ...]
    summary: str
    requires: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Address of the post."""
        return f"https://kexue.fm/archives/{self.post}"

    @property
    def planned(self) -> bool:
        """Whether the plugin is still to be written."""
        return self.status == "planned"

    @property
    def folder(self) -> Path | None:
        """The plugin's folder if this is a checkout that holds it."""
        folder = _ROOT / self.path
        return folder if (folder / "pyproject.toml").is_file() else None


class Catalogue:
    """Look-ups over the entries.

    Args:
        entries: The plugins, any order.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry.slug: entry for entry in sorted(entries, key=lambda e: e.slug)}

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """Read a ``registry.yaml``.

        Raises:
            ManifestError: If the file is not of its form.
        """
        document = load_yaml(path)
        plugins = document.get("plugins") if isinstance(document, Mapping) else document
        if not isinstance(plugins, Mapping):
            raise ManifestError(
                f"{path} must hold a mapping `plugins`. Found {type(plugins).__name__}."
            )
        return cls(_entry(path, slug, fields) for slug, fields in plugins.items())

    def entry(self, slug: str) -> Entry:
        """Return the entry of ``slug``, or of a distribution, or of a post's id or address.

        Raises:
            ComponentNotFoundError: If there is none.
        """
        post = re.fullmatch(r"(?:.*/archives/)?(\d+)/?", slug)
        for entry in self.entries.values():
            if slug in {entry.slug, entry.distribution} or (post and post[1] == str(entry.post)):
                return entry
        owners = " and ".join(repr(entry.slug) for entry in self.owners(slug))
        hint = f" It is in {owners}." if owners else did_you_mean(slug, self.entries)
        raise ComponentNotFoundError(
            f"No plugin named {slug!r} is in the catalogue.{hint} `kexue list --all` shows them.",
            name=slug,
        )

    def owners(self, name: str) -> list[Entry]:
        """Return the plugins that have a component of this id, or of this name in any kind."""
        return [
            entry
            for entry in self.entries.values()
            if any(name in {c, c.partition("/")[2]} for c in entry.components)
        ]

    def closure(self, slugs: Iterable[str]) -> list[Entry]:
        """Return the plugins and all that they import, the imported first.

        Raises:
            ComponentNotFoundError: If a slug is unknown.
        """
        found: dict[str, Entry] = {}

        def visit(slug: str, importing: tuple[str, ...]) -> None:
            entry = self.entry(slug)
            if entry.slug in importing:
                raise ManifestError(
                    f"plugins import each other: {' → '.join((*importing, entry.slug))}."
                )
            for needed in entry.requires:
                visit(needed, (*importing, entry.slug))
            found.setdefault(entry.slug, entry)

        for slug in slugs:
            visit(slug, ())
        return list(found.values())


def _entry(path: Path, slug: str, fields: Mapping[str, Any]) -> Entry:
    try:
        return Entry(
            slug=slug,
            **{
                **fields,
                "components": tuple(fields["components"]),
                "requires": tuple(fields.get("requires", ())),
            },
        )
    except (KeyError, TypeError) as error:
        raise ManifestError(
            f"{path}: the entry of {slug!r} is not of its form: {error}."
        ) from error


def load_yaml(path: Path) -> Any:
    """Read a YAML file with the safe C loader where there is one.

    Raises:
        ManifestError: If it is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_bytes(), loader) or {}  # noqa: S506 -- the safe loader, in C
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ManifestError(f"{path} is not valid YAML: {detail}.") from error


@cache
def catalogue() -> Catalogue:
    """Return the catalogue that ships with kexue."""
    return Catalogue.read(_ROOT / "registry.yaml")
