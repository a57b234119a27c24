"""Starting a plugin: a package that installs, and passes the conformance kit."""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from importlib import metadata
from pathlib import Path
from string import Template

from kexue.core.catalogue import catalogue
from kexue.core.component import Interface
from kexue.core.errors import ArgumentError

__all__ = ["new_plugin"]

_TEMPLATES = Path(__file__).parent / "templates"
_SUMMARY = "Say in one line what it computes."


def new_plugin(name: str, interface: Interface, parent: Path) -> tuple[Path, list[Path]]:
    """Write a plugin with one component.

    Args:
        name: Name of the component and slug of the plugin, like ``focal-loss``.
        interface: Its kind.
        parent: Folder to make it in.

    Returns:
        The plugin's folder ``parent/name`` and its files.

    Raises:
        ArgumentError: If the name is not of its form, the folder exists already, or the kind
            brings no template.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        fixed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        hint = f" Perhaps {fixed!r}." if fixed[:1].isalpha() else ""
        raise ArgumentError(
            f"`name` must be lower-case words joined by hyphens. Found {name!r}.{hint}",
            argument="name",
        )
    entry = catalogue().entries.get(name)
    if entry is not None and not entry.planned:
        raise ArgumentError(
            f"`name` {name!r} is a plugin of the catalogue, {entry.distribution}; name another.",
            argument="name",
        )
    folder = parent / name
    if folder.exists():
        raise ArgumentError(
            f"{folder} exists already; name another or move it away.", argument="name"
        )
    template = _method_template(interface)
    module = interface.kind.replace("-", "_")
    module += "_" if keyword.iskeyword(module) else ""
    words = {
        "name": name,
        "kind": interface.kind,
        "package": f"kexue_{name.replace('-', '_')}",
        "module": module,
        "variable": module,
        "Class": _class_name(name, interface.kind, template),
        "summary": _SUMMARY,
        "core": metadata.version("kexue").partition("+")[0],
    }
    method = Template(template).safe_substitute(words)
    files = {
        "pyproject.toml": _filled("pyproject.toml.txt", words),
        "README.md": _filled("README.md.txt", words),
        f"{words['package']}/__init__.py": _filled("init.py.txt", words),
        f"{words['package']}/{words['module']}.py": method,
        f"{words['package']}/py.typed": "",
        f"tests/test_{words['package'].removeprefix('kexue_')}.py": _filled("test.py.txt", words),
    }
    _write(folder, files)
    return folder, [folder / path for path in files]


def _class_name(name: str, kind: str, template: str) -> str:
    """Return the name in camel case; with the kind where the template uses that word already."""
    words = [part.capitalize() for part in name.split("-")]
    short = "".join(words)
    taken = keyword.iskeyword(short) or re.search(rf"\b{short}\b", template)
    return "".join([*words, *(part.capitalize() for part in kind.split("-"))]) if taken else short


def _filled(template: str, words: dict[str, str]) -> str:
    return Template((_TEMPLATES / template).read_text(encoding="utf-8")).safe_substitute(words)


def _method_template(interface: Interface) -> str:
    """Return the text of a kind's template, which may lie in a plugin."""
    package, _, file = interface.template.partition(":")
    if package == "kexue.core":
        return (_TEMPLATES.parent / file).read_text(encoding="utf-8")
    spec = importlib.util.find_spec(package) if package else None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / file).is_file():
            return (Path(location) / file).read_text(encoding="utf-8")
    raise ArgumentError(
        f"The kind {interface.kind!r} of {interface.plugin or 'kexue'} brings no template to start "
        f"from; copy one of its plugin's components.",
        argument="kind",
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write the whole folder beside its place, then rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        root = Path(temporary) / folder.name
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
        root.rename(folder)
