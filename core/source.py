"""Definitions read from source, without importing it.

Importing a method's module costs seconds of torch; its signature and docstring are text. A
definition is found by following, as Python would, module → name → re-export or base class.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Definition", "find_definition", "forget", "module_file", "split_target"]

_OPAQUE = {"nn.Module", "torch.nn.Module", "Module", "ABC", "object", "Protocol", "Generic"}
_HARMLESS = {"dataclass", "final", "runtime_checkable", "total_ordering"}
_MAX_HOPS = 20  # re-exports and base classes followed before giving up


def split_target(target: str) -> tuple[str, str]:
    """Split ``"module:attribute"`` or ``"file.py:attribute"`` at its last colon."""
    module, _, attribute = target.rpartition(":")
    return module, attribute


@cache
def module_file(module: str) -> Path | None:
    """Return the source file of a module, importing at most its top-level package's finder.

    Args:
        module: Dotted name, or the path of a ``.py`` file.
    """
    if module.endswith(".py"):
        path = Path(module).expanduser()
        return path if path.is_file() else None
    parts = module.split(".")
    for known in range(len(parts), 0, -1):
        package = sys.modules.get(".".join(parts[:known]))
        locations = list(getattr(package, "__path__", ()))
        if locations:
            return _descend(locations, parts[known:])
        if known == len(parts) and getattr(package, "__file__", None):
            return Path(str(package.__file__))  # type: ignore[union-attr]
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return _descend(list(spec.submodule_search_locations), parts[1:])
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _descend(locations: Sequence[str], parts: Sequence[str]) -> Path | None:
    for location in locations:
        path = Path(location, *parts)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


@dataclass(frozen=True)
class Definition:
    """A class or function as it stands in its file.

    Args:
        node: The definition.
        module: Dotted name of its module, or the path of its file.
        path: Its file.
    """

    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    module: str
    path: Path

    @property
    def doc(self) -> str:
        """The docstring, dedented; empty without one."""
        return ast.get_docstring(self.node) or ""

    def bases(self) -> Iterator[Definition]:
        """Yield the base classes whose source can be found, nearest first."""
        if isinstance(self.node, ast.ClassDef):
            for name in _base_names(self.node):
                found = None if name in _OPAQUE else _resolve(self.module, name, _MAX_HOPS)
                if found is not None and isinstance(found.node, ast.ClassDef):
                    yield found

    def lineage(self) -> Iterator[Definition]:
        """Yield the class and all base classes whose source can be found, depth first, once."""
        seen: set[ast.AST] = set()
        left = [self]
        while left:
            definition = left.pop(0)
            if definition.node not in seen:
                seen.add(definition.node)
                yield definition
                left = [*definition.bases(), *left]

    def complete(self) -> bool:
        """Whether the source says all: every base class is found, and nothing rewrites the class.

        Those bases of torch and abc that add nothing are left aside.
        """
        return all(
            _is_complete(definition, definition.node)
            for definition in self.lineage()
            if isinstance(definition.node, ast.ClassDef)
        )

    def decorators(self) -> set[str]:
        """Return the names of the decorators, without arguments and packages."""
        called = [d.func if isinstance(d, ast.Call) else d for d in self.node.decorator_list]
        return {ast.unparse(d).rpartition(".")[2] for d in called}

    def literal(self, name: str) -> str:
        """Return what a module-level name stands for if that is a ``Literal``, else the name."""
        text = _assigned(self.module, name, _MAX_HOPS)
        return text if text.startswith("Literal[") else name

    def member(self, name: str) -> ast.FunctionDef | None:
        """Return the method ``name``, looked up through the base classes.

        None too where a class binds the name to something that is not a function of its own.
        """
        for definition in self.lineage():
            if name in definition.bound():
                return definition.own(name)
        return None

    def own(self, name: str) -> ast.FunctionDef | None:
        """Return the method ``name`` that the class itself defines, also under another name."""
        node = self.bound().get(name)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name):
            return self.own(node.value.id) if node.value.id != name else None
        return node if isinstance(node, ast.FunctionDef) else None

    def bound(self) -> dict[str, ast.stmt]:
        """Return what the body of the class binds, by name: the last, as in Python."""
        return {
            name: node
            for node in self.node.body
            for name in _bound(node, 0)
            if getattr(node, "value", node) is not None
        }

    def constants(self) -> dict[str, object]:
        """Return the literal class attributes, base classes first."""
        values: dict[str, object] = {}
        for definition in reversed(list(self.lineage())):
            for node in definition.node.body:
                target = (
                    node.targets[0]
                    if isinstance(node, ast.Assign)
                    else getattr(node, "target", None)
                )
                value = getattr(node, "value", None)
                if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                    values[target.id] = value.value
        return values


def _is_complete(definition: Definition, node: ast.ClassDef) -> bool:
    named = set(_base_names(node)) - _OPAQUE
    found = {base.node for base in definition.bases()} - {node}
    metaclasses = {ast.unparse(keyword.value) for keyword in node.keywords}
    return (
        len(found) == len(named)
        and metaclasses <= {"ABCMeta", "abc.ABCMeta"}
        and definition.decorators() <= _HARMLESS
        and definition.own("__new__") is None
    )


def _base_names(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases]


def find_definition(target: str) -> Definition | None:
    """Return the definition that ``"module:attribute"`` names, or None if it is not in source."""
    module, attribute = split_target(target)
    return _resolve(module, attribute, _MAX_HOPS)


@cache
def _names(path: Path) -> dict[str, ast.stmt] | None:
    """Return what a file binds at its top level, by name; None if it is not readable source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    found: dict[str, ast.stmt] = {}
    certain = set(tree.body)
    for number, node in enumerate(_statements(tree.body)):
        for name in _bound(node, number):
            if node in certain or name not in found:  # the last, but of alternatives the first
                found[name] = node
    return found


def _bound(node: ast.stmt, number: int) -> list[str]:
    """Return the names that a statement binds; a star for all of another module."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [f"*{number}" if a.name == "*" else _bound_as(a) for a in node.names]
    return []


def _bound_as(alias: ast.alias) -> str:
    """Return the name that an import binds: ``import a.b`` binds ``a``."""
    return alias.asname or alias.name.partition(".")[0]


def _imported_as(node: ast.Import | ast.ImportFrom, name: str) -> str:
    """Return what an import binds to a name."""
    alias = next(a for a in node.names if _bound_as(a) == name)
    return alias.name if alias.asname or isinstance(node, ast.ImportFrom) else name


def _assigned(module: str, name: str, hops: int) -> str:
    """Return the expression that a module binds to a name, through imports; else nothing."""
    path = module_file(module)
    node = (_names(path) or {}).get(name) if path is not None and hops else None
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return ast.unparse(node.value)
    if path is not None and isinstance(node, ast.ImportFrom):
        source = _absolute(module, path, node)
        return _assigned(source, _imported_as(node, name), hops - 1)
    return ""


@cache
def _resolve(module: str, dotted: str, hops: int) -> Definition | None:
    path = module_file(module)
    names = _names(path) if path is not None else None
    if path is None or names is None or not hops:
        return None
    head, _, rest = dotted.partition(".")
    node = names.get(head)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return _nested(Definition(node, module, path), rest)
    if isinstance(node, ast.ImportFrom):
        source = _absolute(module, path, node)
        name = _imported_as(node, head)
        found = _resolve(source, f"{name}.{rest}" if rest else name, hops - 1)
        return found or (_resolve(f"{source}.{name}", rest, hops - 1) if rest else None)
    if isinstance(node, ast.Import) and rest:
        return _resolve(_imported_as(node, head), rest, hops - 1)
    if node is None and rest and path.name == "__init__.py":
        return _resolve(f"{module}.{head}", rest, hops - 1)
    stars = (n for key, n in names.items() if key.startswith("*") and isinstance(n, ast.ImportFrom))
    candidates = (_resolve(_absolute(module, path, star), dotted, hops - 1) for star in stars)
    return next((c for c in candidates if c is not None), None)


def forget() -> None:
    """Forget what was read, so that changed and newly installed files are seen."""
    for function in (module_file, _names, _resolve):
        function.cache_clear()


def _nested(definition: Definition, dotted: str) -> Definition | None:
    for part in filter(None, dotted.split(".")):
        for node in definition.node.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part:
                definition = Definition(node, definition.module, definition.path)
                break
        else:
            return None
    return definition


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those under ``if`` and ``try`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package
