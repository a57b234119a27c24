"""The structure: imports go down and in no circle, and a few rules that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import kexue.core

CORE = Path(kexue.core.__path__[0])
FILES = {
    ".".join(["core", *path.relative_to(CORE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in CORE.rglob("*.py")
    if "templates" not in path.parts
} | {"cli": CORE.parent / "cli.py"}
TREES = {module: ast.parse(path.read_bytes(), str(path)) for module, path in FILES.items()}
NODES = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree)]

FLOORS = {
    "ground": "eager errors component hooks docstrings source signatures text lab interfaces "
    "interfaces.base",
    "files": "catalogue settings device loading lines tables writing files plots stepping",
    "registry": "discovery describe registry packages scaffold environment",
    "work": "averaging inputs job problems densities training experiments lab.data",
    "contracts": "interfaces.*",
    "language": "language language.*",
    "lab": "lab.*",
    "verbs": "run report workers",
    "kit": "conformance conformance.*",
    "terminal": "console console.*",
}
"""What stands on what: a module imports from its own floor and from those before it.

A new module is named here, on the lowest floor that it fits; the first pattern that fits counts.
"""


def floor_of(module: str) -> int:
    """Return the number of a module's floor; -1 if it has none."""
    if module in {"core", "cli"}:
        return 0 if module == "core" else len(FLOORS)
    name = module.removeprefix("core.")
    exact = [n for n, names in enumerate(FLOORS.values()) if name in names.split()]
    fitting = [n for n, names in enumerate(FLOORS.values()) if any_fits(name, names)]
    return (exact or fitting or [-1])[0]


def any_fits(name: str, names: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in names.split())


def imports(module: str) -> Iterator[str]:
    """Yield the modules of kexue that a module imports, within functions too, types aside."""
    types = {
        node
        for block in ast.walk(TREES[module])
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(TREES[module]):
        if node in types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name.removeprefix("kexue.")
            yield from [m for m in (found, found.rpartition(".")[0]) if m in FILES][:1]


GRAPH = {module: set(imports(module)) for module in FILES}


def test_finds_the_imports() -> None:
    assert GRAPH["core.registry"] >= {"core.errors", "core.discovery", "core.lab", "core.loading"}
    assert "core.registry" in GRAPH["cli"]
    assert len(FILES) > 50


def test_every_module_has_a_floor() -> None:
    assert [module for module in FILES if floor_of(module) < 0] == []


def test_imports_go_down() -> None:
    upward = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if floor_of(name) > floor_of(module)
    ]
    assert upward == []


def test_imports_go_in_no_circle() -> None:
    left = set(FILES)
    while True:
        importing = {name for name in left if GRAPH[name] & left - {name}}
        imported = {name for module in left for name in GRAPH[module] - {module}}
        if left == importing & imported:
            break
        left &= importing & imported
    assert left == set()


def test_the_floors_name_nothing_that_is_gone() -> None:
    for names in FLOORS.values():
        for pattern in names.split():
            assert any(fnmatch(m.removeprefix("core."), pattern) for m in FILES), pattern


def test_the_core_imports_no_plugin() -> None:
    imported = [
        name
        for node in NODES
        if isinstance(node[1], ast.Import | ast.ImportFrom)
        for name in (getattr(node[1], "module", None), *(alias.name for alias in node[1].names))
    ]
    assert len(imported) > 500
    assert [name for name in imported if name and name.startswith("kexue_")] == []


def test_every_module_says_what_it_offers() -> None:
    silent = []
    for module, tree in TREES.items():
        bound = {
            name.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
        code = [node for node in tree.body if not isinstance(node, ast.Expr)]
        if not ast.get_docstring(tree) or (code and "__all__" not in bound):
            silent.append(module)
    assert silent == []


def test_only_the_terminal_prints() -> None:
    calls = [
        f"{module}:{node.lineno}"
        for module, node in NODES
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert [place for place in calls if not place.startswith(("cli:", "core.console."))] == []
    assert calls


def test_nothing_depends_on_assert_statements() -> None:
    found = [f"{module}:{node.lineno}" for module, node in NODES if isinstance(node, ast.Assert)]
    assert found == []


DEVICES = ("cpu", "cuda", "mps", "xpu")
NAME_A_DEVICE = {
    "core.conformance.distributed": "where gloo's processes are",
    "core.device": "the place that does",
    "core.problems": "a default: where a problem's parameters are unless the caller says",
    "core.training": "where a module without parameters is",
}


def test_nothing_else_names_a_device() -> None:
    named = {
        module: node.lineno
        for module, node in NODES
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.partition(":")[0] in DEVICES
    }
    assert named.keys() <= NAME_A_DEVICE.keys(), named
    assert "core.device" in named
