"""Finding plugins and loading what they say of themselves, each under guard."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from kexue.core import hooks
from kexue.core.component import Component, Dataset, Experiment, Interface
from kexue.core.errors import ManifestError, did_you_mean
from kexue.core.interfaces import INTERFACES
from kexue.core.settings import Settings, records_of

__all__ = [
    "GROUP",
    "HEAVY",
    "Plugin",
    "discover",
    "from_python",
    "new_manager",
    "without_unknown_kinds",
]

GROUP = "kexue"
_SHOWN = 80  # characters of a wrong value that an error shows
_NEEDS = re.compile(r"kexue *(\[[^\]]*\] *)?\(?[<>=!~][^;]*(;.*)?", re.IGNORECASE)
HEAVY = ("torch", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "transformers", "jax")
_RECORDS: Mapping[str, type] = {
    "kexue_components": Component,
    "kexue_interfaces": Interface,
    "kexue_experiments": Experiment,
    "kexue_datasets": Dataset,
}


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin, whatever its state.

    Args:
        slug: Its short name.
        owner: Its distribution, or the file that registers it.
        version: Version of the distribution; empty for files.
        source: ``"installed"``, ``"file"`` or ``"registered"`` (from Python).
        state: ``"ok"``, ``"disabled"`` or ``"broken"``.
        reason: Why it is not ok.
        error: The exception that broke it.
        seconds: What importing its manifest took.
        heavy: Heavy packages that its manifest pulled in, as far as nothing had before.
        module: The module of its manifest; empty for files.
        components: Its components.
        interfaces: Kinds that it adds.
        experiments: Its experiments.
        datasets: Its data.
    """

    slug: str
    owner: str
    version: str = ""
    source: str = "installed"
    state: str = "ok"
    reason: str = ""
    error: BaseException | None = None
    seconds: float = 0.0
    heavy: tuple[str, ...] = ()
    module: str = ""
    components: tuple[Component, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    datasets: tuple[Dataset, ...] = ()

    @property
    def label(self) -> str:
        """Slug and version, as an error names it."""
        return (
            f"{self.slug!r} ({self.owner} {self.version})"
            if self.version
            else f"{self.slug!r} ({self.owner})"
        )

    @property
    def owner_slug(self) -> str:
        """``owner:slug``, which only this plugin has."""
        return f"{self.owner}:{self.slug}"

    def broken(self, error: BaseException) -> Plugin:
        """Return the plugin as broken by ``error``, without its records."""
        text = " ".join(str(error).split())
        named = [] if isinstance(error, ManifestError) else [type(error).__name__]
        reason = ": ".join(filter(None, [*named, text]))
        return replace(
            self,
            state="broken",
            reason=reason if reason.endswith((".", "?")) else f"{reason}.",
            error=error,
            components=(),
            interfaces=(),
            experiments=(),
            datasets=(),
        )


def new_manager() -> pluggy.PluginManager:
    """Return a manager that knows the hooks."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hooks)
    return manager


def discover(settings: Settings, manager: pluggy.PluginManager) -> list[Plugin]:
    """Return the plugins of the user's files, then the installed ones.

    Args:
        settings: What the user switched off, and the files.
        manager: Where the hooks of sound installed plugins are registered.
    """
    points, unreadable = _entry_points()
    found = [_from_file(document, settings) for document in settings.documents]
    return found + [_from_entry_point(point, settings, manager) for point in points] + unreadable


def from_python(plugin: Any, slug: str, owner: str) -> Plugin:
    """Return a module with hooks, a record, or several records as a plugin.

    Raises:
        ManifestError: If it is not valid.
    """
    name = str(slug or getattr(plugin, "__name__", None) or "registered")
    entry = Plugin(name, owner or name, source="registered")
    records = (plugin,) if isinstance(plugin, tuple(_RECORDS.values())) else plugin
    plain = isinstance(records, Iterable) and not isinstance(records, str)
    if plain and not hasattr(records, "__dict__"):
        return _fill(entry, records)
    return _with_hooks(entry, plugin, new_manager())


def _from_entry_point(
    point: metadata.EntryPoint, settings: Settings, manager: pluggy.PluginManager
) -> Plugin:
    """Load the plugin of an entry point, unless it is switched off or needs another kexue."""
    owner, version, needs = _distribution_of(point)
    plugin = Plugin(point.name, owner, version, module=point.value.partition(":")[0])
    if settings.disabled(point.name, owner):
        return replace(plugin, state="disabled", reason=settings.why_disabled(point.name, owner))

    def load() -> Plugin:
        for requirement in needs:
            _check_core(requirement, plugin)
        if not point.pattern.match(point.value):
            raise ManifestError(
                f"its entry point must name a module, such as {plugin.slug} = "
                f'"kexue_{plugin.slug}". Found {point.value!r}'
            )
        return _with_hooks(plugin, point.load(), manager)

    return _guarded(plugin, load)


def _entry_points() -> tuple[list[metadata.EntryPoint], list[Plugin]]:
    """Return the entry points of the group, sorted, each distribution once.

    Also what may be a plugin but says so in a file that cannot be read.
    """
    unreadable: list[Plugin] = []
    try:
        points = [*metadata.entry_points(group=GROUP)]
    except Exception:  # noqa: BLE001 -- one malformed file, of any package, stops the search
        points, unreadable = _entry_points_one_by_one()
    return sorted(points, key=lambda p: (p.name, p.value)), unreadable


def _entry_points_one_by_one() -> tuple[list[metadata.EntryPoint], list[Plugin]]:
    points: list[metadata.EntryPoint] = []
    unreadable: dict[str, Plugin] = {}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name, version = _header(distribution, "Name", "Version")
        if name in seen:
            continue
        seen.add(name)
        try:
            points += [p for p in distribution.entry_points if p.group == GROUP]
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with it
            if name.startswith(GROUP):
                broken = Plugin(name.removeprefix(f"{GROUP}-"), name, version)
                reason = f"its entry_points.txt cannot be read: {error}"
                unreadable[name] = broken.broken(ManifestError(reason))
    return points, [plugin for _, plugin in sorted(unreadable.items())]


def _header(distribution: metadata.Distribution | None, *keys: str) -> list[str]:
    """Return the values of some keys of a distribution's metadata, several joined by newlines.

    The header is scanned as text: parsing all metadata costs a millisecond per plugin.
    """
    found: dict[str, list[str]] = {key: [] for key in keys}
    text = None
    with contextlib.suppress(OSError, UnicodeError):
        if distribution is not None:
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    for line in (text or "").splitlines():
        key, _, value = line.partition(": ")
        if not key:
            break
        if key in found:
            found[key].append(value)
    return ["\n".join(values) for values in found.values()]


def _distribution_of(point: metadata.EntryPoint) -> tuple[str, str, list[str]]:
    """Return name, version and the requirements on kexue of the distribution of an entry point."""
    name, version, requirements = _header(point.dist, "Name", "Version", "Requires-Dist")
    needs = [found[0] for line in requirements.splitlines() if (found := _NEEDS.fullmatch(line))]
    return name or point.value, version, needs


@cache
def _core_version() -> str:
    return _header(metadata.distribution(GROUP), "Version")[0]


def _check_core(requirement: str, plugin: Plugin) -> None:
    """Refuse a plugin that needs another kexue, before it is imported."""
    if not _core_satisfies(requirement):
        needs = requirement.partition(";")[0].strip()
        raise ManifestError(
            f"{plugin.owner} {plugin.version} needs {needs}, and {_core_version()} is installed. "
            f"Run `pip install --upgrade {GROUP} {plugin.owner}`"
        )


def _core_satisfies(requirement: str) -> bool:
    """Whether this kexue meets a requirement such as ``kexue>=0.1``."""
    least = re.fullmatch(r"kexue *\(?>=([0-9.]+)\)?", requirement)
    have = re.match(r"[0-9.]+", _core_version())
    if least and have:  # the common case, without the 20 ms that importing packaging takes
        return _numbers(have[0]) >= _numbers(least[1])
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate({"extra": ""}):
        return True
    return parsed.specifier.contains(_core_version(), prereleases=True)


def _numbers(version: str) -> list[int]:
    numbers = [int(part) for part in version.split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _guarded(plugin: Plugin, load: Callable[[], Plugin]) -> Plugin:
    """Load a plugin; whatever goes wrong becomes part of the plugin's record."""
    heavy = [name for name in HEAVY if name not in sys.modules]
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what was asked for
            filled = load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- torch extensions raise anything
        filled = plugin.broken(error)
    return replace(
        filled,
        seconds=time.perf_counter() - start,
        heavy=tuple(name for name in heavy if name in sys.modules),
    )


def _from_file(document: Mapping[str, Any], settings: Settings) -> Plugin:
    path = str(document["path"])
    plugin = Plugin(Path(path).stem, path, source="file")
    if settings.disabled(plugin.slug, path):
        return replace(plugin, state="disabled", reason=settings.why_disabled(plugin.slug, path))
    return _guarded(plugin, lambda: _fill(plugin, records_of(document)))


def _with_hooks(plugin: Plugin, module: Any, manager: pluggy.PluginManager) -> Plugin:
    """Register the hooks of a module with a manager and return the plugin with their records.

    Raises:
        ManifestError: If it has none, one of them has a wrong signature or name, or one does not
            return records; nothing is registered then.
    """
    implementations = _hooks_of(module)
    try:
        manager.register(implementations, name=plugin.owner_slug)
        return _fill(plugin, _called(implementations, manager))
    except BaseException as error:
        if manager.is_registered(implementations):
            manager.unregister(implementations)
        if isinstance(error, pluggy.PluginValidationError):
            raise ManifestError(f"its hooks do not fit: {error}") from error
        raise


def _called(implementations: Any, manager: pluggy.PluginManager) -> Iterator[Any]:
    callers = manager.get_hookcallers(implementations) or []
    if not callers:
        raise ManifestError(
            f"{implementations!r} implements none of the hooks {', '.join(_RECORDS)}; mark them "
            f"with `@hookimpl` from kexue.core"
        )
    for caller in callers:
        for own in (i for i in caller.get_hookimpls() if i.plugin is implementations):
            if caller.name in _RECORDS:
                yield from _checked(own.function(), caller.name)
            elif not own.optionalhook:
                raise ManifestError(
                    f"{caller.name} is not a hook of kexue.{did_you_mean(caller.name, _RECORDS)} "
                    f"The hooks are {', '.join(_RECORDS)}"
                )


def _checked(returned: Any, hook: str) -> Iterator[Any]:
    wanted = _RECORDS[hook]
    rows = returned if isinstance(returned, Iterable) and not isinstance(returned, str) else None
    for row in [returned] if rows is None else rows:
        if rows is None or not isinstance(row, wanted):
            raise ManifestError(
                f"{hook} must return {wanted.__name__} records. Found {_shown(row)}"
            )
        yield row


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _Namespace:
    """What a module binds, under the name of the module."""

    def __init__(self, module: ModuleType) -> None:
        self.__dict__.update(vars(module))

    def __repr__(self) -> str:
        return str(self.__dict__["__name__"])


def _hooks_of(plugin: Any) -> Any:
    """Return what pluggy looks for hooks in.

    Of a module that is its namespace: a lazy module lists only the names that it re-exports.
    """
    return _Namespace(plugin) if isinstance(plugin, ModuleType) else plugin


def _fill(plugin: Plugin, records: Iterable[Any]) -> Plugin:
    """Return the plugin with its records, which must be unique."""
    rows: dict[type, dict[str, Any]] = {kind: {} for kind in _RECORDS.values()}
    for record in records:
        if type(record) not in rows:
            raise ManifestError(
                f"a plugin consists of records of kexue.core. Found {_shown(record)}"
            )
        key = getattr(record, "id", None) or getattr(record, "kind", None) or record.name
        named = {"plugin": plugin.slug, "owner": plugin.owner}
        owned = replace(record, **{k: v for k, v in named.items() if hasattr(record, k)})
        if key in rows[type(record)]:
            raise ManifestError(f"{type(record).__name__} {key!r} is registered twice")
        rows[type(record)][key] = owned
    return replace(
        plugin,
        components=tuple(rows[Component].values()),
        interfaces=tuple(rows[Interface].values()),
        experiments=tuple(rows[Experiment].values()),
        datasets=tuple(rows[Dataset].values()),
    )


def without_unknown_kinds(plugins: Iterable[Plugin]) -> list[Plugin]:
    """Break the plugins whose components have a kind that nobody provides, or two provide.

    Breaking one takes away the kinds that it provides, so this repeats until nothing changes.
    """
    checked = list(plugins)
    while True:
        providers = {i.kind: "kexue" for i in INTERFACES}
        changed = False
        for n, plugin in enumerate(checked):
            clash = next((i.kind for i in plugin.interfaces if i.kind in providers), None)
            if clash is not None:
                reason = f"the kind {clash!r} is already provided by {providers[clash]}"
                checked[n], changed = plugin.broken(ManifestError(reason)), True
            else:
                providers |= {i.kind: plugin.owner for i in plugin.interfaces}
        for n, plugin in enumerate(checked):
            unknown = next((c for c in plugin.components if c.kind not in providers), None)
            if unknown is not None:
                reason = (
                    f"{unknown.id} is of the kind {unknown.kind!r}, which no installed plugin "
                    f"provides.{did_you_mean(unknown.kind, providers)}"
                )
                checked[n], changed = plugin.broken(ManifestError(reason)), True
        if not changed:
            return checked
