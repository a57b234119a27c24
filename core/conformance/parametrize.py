"""The kit as pytest tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kexue.core.conformance.asking import check_plugin, checks_of, run_check, selected
from kexue.core.conformance.kit import Check, Finding, Subject
from kexue.core.registry import Registry
from kexue.core.registry import registry as default

__all__ = ["conformance"]


def conformance(plugin: str | None = None, *, registry: Registry = default) -> Callable[..., Any]:
    """Parametrise a test over every check of every component, and of the plugin itself.

    The test takes ``check`` and calls it.

    Args:
        plugin: Only of this plugin: its slug or distribution.
        registry: What is installed.
    """
    import pytest

    def ask(find: Callable[[], list[Finding]]) -> Callable[[], None]:
        def asked() -> None:
            found = find()
            failed = [f"{f.subject}: {f.name}: {f.reason}" for f in found if f.state == "failed"]
            if failed:
                pytest.fail("\n".join(failed), pytrace=False)
            if all(f.state == "skipped" for f in found):
                pytest.skip(found[0].reason or "does not apply")

        return asked

    plugins, components = selected(registry, [plugin] if plugin else [])
    cases = [pytest.param(ask(partial(check_plugin, p)), id=f"{p.slug}-is-sound") for p in plugins]
    for subject in (Subject(registry, component) for component in components):
        cases += [
            pytest.param(
                ask(partial(_asked, subject, check)),
                id=f"{subject.component.id}-{check.name.replace(' ', '-')}",
            )
            for check in checks_of(subject)
        ]
    return pytest.mark.parametrize("check", cases)


def _asked(subject: Subject, check: Check) -> list[Finding]:
    return [run_check(subject, check)]
