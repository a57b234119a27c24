"""What the shell completes, from the registry and the catalogue."""

from __future__ import annotations

from kexue.core.registry import registry

__all__ = [
    "complete_catalogue",
    "complete_components",
    "complete_kinds",
    "complete_names",
    "complete_plugins",
]


def complete_components(incomplete: str) -> list[tuple[str, str]]:
    """Return the component ids that begin so."""
    return [(c.id, c.summary) for c in registry.components() if c.id.startswith(incomplete)]


def complete_kinds(incomplete: str) -> list[tuple[str, str]]:
    """Return the kinds that begin so."""
    return [(i.kind, i.summary) for i in registry.interfaces() if i.kind.startswith(incomplete)]


def complete_plugins(incomplete: str) -> list[tuple[str, str]]:
    """Return the plugins that begin so, broken ones too."""
    return [(p.slug, p.owner) for p in registry.plugins if p.slug.startswith(incomplete)]


def complete_names(incomplete: str) -> list[tuple[str, str]]:
    """Return the plugins and component ids that begin so."""
    return [*complete_plugins(incomplete), *complete_components(incomplete)]


def complete_catalogue(incomplete: str) -> list[tuple[str, str]]:
    """Return the plugins that begin so and can be installed."""
    from kexue.core.catalogue import catalogue

    entries = catalogue().entries.values()
    return [(e.slug, e.summary) for e in entries if e.slug.startswith(incomplete) and not e.planned]
