"""What ``kexue list`` and ``kexue show`` say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kexue.core.component import Component
from kexue.core.console.output import print_facts, print_json, print_table, print_text
from kexue.core.errors import ComponentNotFoundError
from kexue.core.registry import registry

if TYPE_CHECKING:
    from kexue.core.describe import Description

__all__ = [
    "component_rows",
    "in_catalogue",
    "print_components",
    "readable",
    "sections",
    "show_component",
    "show_plugin",
    "usage",
]


def in_catalogue(name: str) -> bool:
    """Whether a name is a plugin or post of the catalogue."""
    from kexue.core.catalogue import catalogue

    try:
        catalogue().entry(name)
    except ComponentNotFoundError:
        return False
    return True


def component_rows(
    kind: str | None, tag: str | None, plugin: str | None, *, everything: bool
) -> list[dict[str, Any]]:
    """Return the rows of ``kexue list``.

    Args:
        kind: Only of this kind.
        tag: Only with this tag.
        plugin: Only of this plugin: its slug or its distribution.
        everything: Also what is in the catalogue and not installed.

    Raises:
        ComponentNotFoundError: If there is no such kind or plugin.
    """
    rows = [*_installed_rows(), *(_catalogue_rows() if everything else ())]
    found = [
        row
        for row in rows
        if kind in {None, row["component"].partition("/")[0]}
        and (tag is None or tag in row["tags"])
        and plugin in {None, row["plugin"], row["distribution"]}
    ]
    if not found:  # for want of such components, or because there is no such kind or plugin?
        registry.components(kind, plugin=plugin)
    return sorted(found, key=lambda row: row["component"])


def _installed_rows() -> Iterator[dict[str, Any]]:
    conflicts = registry.conflicts()
    for component in registry.components():
        yield {
            "component": component.id,
            "plugin": component.plugin,
            "distribution": component.owner,
            "state": "conflict" if component.id in conflicts else "installed",
            "summary": component.summary,
            "tags": list(component.tags),
        }


def _catalogue_rows() -> Iterator[dict[str, Any]]:
    from kexue.core.catalogue import catalogue

    states = {p.slug: p.state for p in registry.plugins}
    for entry in catalogue().entries.values():
        state = states.get(entry.slug, "planned" if entry.planned else "available")
        for name in entry.components if state != "ok" else ():
            yield {
                "component": name,
                "plugin": entry.slug,
                "distribution": entry.distribution,
                "state": state,
                "summary": entry.summary,
                "tags": [],
            }


def print_components(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of ``kexue list``; states and distributions only where they matter."""
    states = {row["state"] for row in rows}
    columns = ["component", "plugin", *(["state"] if states != {"installed"} else []), "summary"]
    columns[1:1] = ["distribution"] if "conflict" in states else []
    print_table(columns, [[row[column] for column in columns] for row in rows])


def show_component(component: Component, *, json_: bool) -> None:
    """Print what a component is."""
    description = registry.describe(component)
    if json_:
        print_json({"schema": 1, **description.to_json()})
        return
    print_text(f"{component.id} — {component.summary}")
    print_text(f"plugin {component.plugin} ({component.owner}), {component.target}")
    if description.capabilities:
        print(f"capabilities: {', '.join(description.capabilities)}")
    if component.tags:
        print(f"tags: {', '.join(component.tags)}")
    print()
    print_text(readable(description.doc))
    print()
    for title, columns, rows in sections(description):
        print_table(columns, rows, title)
        print()
    if description.returns:
        print_facts({"Returns": readable(description.returns)})
        print()
    if description.example:
        print("Example\n" + "\n".join(f"  {line}" for line in description.example.splitlines()))
        print()
    fit = f"  kexue fit {component.id} FILE -o model/\n" if component.fit else ""
    print(f"On files\n{fit}  {usage(description)}\n  kexue run {component.id} --help\n")
    if component.references:
        print("References\n" + "\n".join(f"  {line}" for line in component.references))


def readable(doc: str) -> str:
    """Return a docstring without the marks that are for documentation tools."""
    doc = re.sub(r"^ *\.\. math::\n", "", doc, flags=re.MULTILINE)
    doc = re.sub(r":\w+:`~(?:[^`]*\.)?([^`]*)`", r"\1", doc)
    return re.sub(r":\w+:`([^`]*)`", r"\1", doc).replace("``", "`")


def sections(description: Description) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables that describe a component: title, columns, rows."""
    parameters = [
        [
            p.name,
            p.annotation or "any",
            "required" if p.default is None else p.default,
            readable(p.doc),
        ]
        for p in description.parameters
    ]
    inputs = [
        [
            i.name + (" (optional)" if i.optional else ""),
            " ".join(filter(None, (i.dtype, i.shape))) or i.annotation or "any",
            readable(i.doc),
        ]
        for i in description.inputs
    ]
    found = []
    if inputs:
        found.append((f"Inputs of {description.method}", ["name", "type", "meaning"], inputs))
    if parameters:
        columns = ["name", "type", "default", "meaning"]
        found.append(("Parameters (--set NAME=VALUE)", columns, parameters))
    return found


def usage(description: Description) -> str:
    """Return the command that runs a component on files, or as it was fitted.

    What is needed beside tensors, and is no plain number or text, stands in capitals.
    """
    if "needs_fitting" in description.capabilities:
        return f"kexue run {description.component.id} --model model/"
    if description.component.apply:
        return f"kexue run {description.component.id} --model model/ FILE"
    files = " ".join(
        i.name.upper()
        if not i.dtype
        else f"[{i.name}={i.name}.npy]"
        if i.optional
        else f"{i.name}.npy"
        for i in description.inputs
        if i.dtype or not (i.optional or i.annotation in {"int", "float", "bool", "str"})
    )
    files = files if any(i.dtype for i in description.inputs) else ""
    needed = "".join(
        f" --set {p.name}=…"
        for p in description.parameters
        if p.required and not p.name.startswith(("num_", "params"))  # follow from the files
    )
    return f"kexue run {description.component.id} {files or 'FILE'}{needed}"


def show_plugin(name: str, *, json_: bool) -> None:
    """Print what a plugin, and the post behind it, is."""
    from kexue.core.catalogue import catalogue

    entry = catalogue().entry(name) if in_catalogue(name) else None
    slug = entry.slug if entry else name
    installed = any(slug in {p.slug, p.owner} for p in registry.plugins)
    plugin = registry.plugin(slug) if installed else None
    facts: dict[str, Any] = {"plugin": plugin.slug if plugin else slug}
    if entry:
        facts |= {
            "post": entry.title,
            "english": entry.english,
            "date": entry.date,
            "url": entry.url,
            "summary": entry.summary,
            "requires": list(entry.requires),
        }
    if plugin:
        facts |= {
            "distribution": plugin.owner,
            "state": plugin.state,
            "version": plugin.version,
            "reason": plugin.reason,
        }
    elif entry:
        facts["distribution"] = entry.distribution
        facts["state"] = "planned" if entry.planned else "not installed"
    components = (
        {c.id: c.summary for c in plugin.components}
        if plugin and plugin.components
        else dict.fromkeys(entry.components if entry else (), "")
    )
    experiments = {e.id: e.summary for e in plugin.experiments} if plugin else {}
    if json_:
        print_json({"schema": 1, **facts, "components": components, "experiments": experiments})
        return
    print_facts({k: ", ".join(v) if isinstance(v, list) else v for k, v in facts.items() if v})
    for title, rows in (("components", components), ("experiments", experiments)):
        if rows:
            print()
            print_table([title, "summary"], list(rows.items()))
    if plugin is None and entry and not entry.planned:
        print(f"\nInstall it with `kexue install {slug}`.")
    if plugin and plugin.experiments:
        print(f"\nMeasure its claims with `kexue reproduce {plugin.slug}`.")
