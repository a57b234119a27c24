"""Asking: which checks a component gets, and what becomes of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from kexue.core.component import Component
from kexue.core.conformance.common import CHECKS
from kexue.core.conformance.kit import Check, Finding, GlobalState, Subject, is_class, require
from kexue.core.discovery import HEAVY
from kexue.core.errors import ComponentNotFoundError
from kexue.core.job import Progress, Quiet
from kexue.core.loading import load_target
from kexue.core.registry import Plugin, Registry

__all__ = [
    "check_all",
    "check_component",
    "check_plugin",
    "checks_of",
    "heavy_imports",
    "run_check",
    "selected",
]


def checks_of(subject: Subject) -> list[Check]:
    """Return all checks of a component: the common ones, then those of its kind.

    Those of a kind are about classes: they build the component.
    """
    interface = subject.registry.interface(subject.component.kind)
    own: Iterable[Check] = load_target(interface.checks)() if interface.checks else ()
    kind = [check._replace(applies=_and_is_class(check.applies)) for check in own]
    names = [check.name for check in (*CHECKS, *kind)]

    def declared(_: Subject) -> None:
        """Declare no failure of a check that there is not."""
        unknown = sorted(set(subject.capability("known_failures") or ()) - set(names))
        require(not unknown, f"no check is named {', '.join(map(repr, unknown))}")

    has_declared = Check(
        "its known failures are checks", declared, lambda s: bool(s.capability("known_failures"))
    )
    return [*CHECKS, *kind, has_declared]


def _and_is_class(applies: Callable[[Subject], bool]) -> Callable[[Subject], bool]:
    return lambda subject: is_class(subject) and applies(subject)


def run_check(subject: Subject, check: Check) -> Finding:
    """Ask one question.

    A component may declare ``known_failures = {check: reason}``; a declared failure that passes
    counts as failed, so that declarations do not outlive their reason.
    """
    component = subject.component.id
    declared: Mapping[str, str] = {}
    try:
        declared = subject.capability("known_failures") or {}
        with GlobalState.kept():
            if not check.applies(subject):
                return Finding(component, check.name, "skipped")
            check.run(subject)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- a finding, whatever it is
        if check.name in declared:
            return Finding(component, check.name, "skipped", declared[check.name])
        text = " ".join(str(error).split())
        reason = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
        return Finding(component, check.name, "failed", reason)
    if check.name in declared:
        return Finding(component, check.name, "failed", "declared as failing, but passes")
    return Finding(component, check.name, "passed")


def check_component(registry: Registry, component: Component) -> list[Finding]:
    """Ask a component everything."""
    subject = Subject(registry, component)
    return [run_check(subject, check) for check in checks_of(subject)]


def check_plugin(plugin: Plugin) -> list[Finding]:
    """Ask a plugin whether it loads, and whether its manifest is light."""
    if plugin.state != "ok":
        return [Finding(plugin.slug, "loads", "failed", plugin.reason)]
    heavy = ", ".join(heavy_imports(plugin))
    state, reason = ("failed", f"importing it imports {heavy}") if heavy else ("passed", "")
    return [
        Finding(plugin.slug, "loads", "passed"),
        Finding(plugin.slug, "its manifest is light", state, reason),
    ]


def heavy_imports(plugin: Plugin) -> tuple[str, ...]:
    """Return the heavy packages that a fresh process imports with a plugin's manifest.

    Args:
        plugin: An installed one; of others, what was seen when it was loaded.
    """
    if not plugin.module:
        return plugin.heavy
    code = (
        f"import contextlib, importlib, sys\nsys.path[:] = {sys.path!r}\n"
        f"with contextlib.redirect_stdout(sys.stderr): importlib.import_module({plugin.module!r})\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603 -- the module is one that this process has imported
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    return tuple(done.stdout.split()) if done.returncode == 0 else plugin.heavy


def check_all(
    registry: Registry, names: Sequence[str] = (), *, progress: Progress | None = None
) -> list[Finding]:
    """Check plugins and components.

    Args:
        registry: What is installed.
        names: Plugins or components; everything if empty.
        progress: Where to report.
    """
    plugins, components = selected(registry, names)
    found = [finding for plugin in plugins for finding in check_plugin(plugin)]
    with (progress or Quiet()).task("checking", len(components)) as task:
        for component in components:
            found += check_component(registry, component)
            task.advance()
    return found


def selected(registry: Registry, names: Sequence[str]) -> tuple[list[Plugin], list[Component]]:
    """Return the plugins and components of some names; all that are not switched off if empty."""
    if not names:
        return [p for p in registry.plugins if p.state != "disabled"], registry.components()
    plugins: list[Plugin] = []
    components: list[Component] = []
    for name in names:
        try:
            plugins.append(registry.plugin(name))
            components += registry.components(plugin=name)
        except ComponentNotFoundError:
            components.append(registry.get(name))
    return plugins, components
