"""The registry: what is installed, what is broken and why, and how a name becomes an object.

Discovery reads entry points and the user's registry files, imports light manifests one by one
under guard, validates what they return, and only then registers it: what goes wrong in one plugin
reaches neither another plugin nor the command line.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue.core.component import Component, Dataset, Experiment, Interface
from kexue.core.discovery import Plugin, discover, from_python, new_manager, without_unknown_kinds
from kexue.core.errors import (
    ArgumentError,
    ComponentConflictError,
    ComponentNotFoundError,
    KexueError,
    ManifestError,
    PluginBrokenError,
    WorkError,
    did_you_mean,
    nearest,
)
from kexue.core.interfaces import INTERFACES
from kexue.core.settings import Settings, read_settings

if TYPE_CHECKING:
    from kexue.core.catalogue import Catalogue, Entry
    from kexue.core.describe import Description

__all__ = ["Plugin", "Registry", "build", "components", "create", "describe", "registry"]


class Registry:
    """Components by name.

    Sources, first to last: what :meth:`register` was given, the user's registry files
    (``KEXUE_REGISTRY``, then the user's configuration folder), installed entry points. The same
    component from several sources counts once; different components under one id are in conflict,
    and using them is an error until the user prefers an owner.

    Args:
        discover: Whether to look for installed plugins and the user's files; tests build
            registries without.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self.manager = new_manager()
        self._discover = discover
        self._registered: list[Plugin] = []
        self._found: list[Plugin] | None = None
        self._plugins: tuple[Plugin, ...] | None = None
        self._discovering = False
        self._lock = threading.RLock()

    # -- what there is ------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Settings:
        """The user's settings."""
        return read_settings() if self._discover else Settings()

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """All plugins, broken and disabled ones included, in order of precedence."""
        with self._lock:
            if self._plugins is None:
                self._plugins = self._find()
            return self._plugins

    def _find(self) -> tuple[Plugin, ...]:
        if self._discovering:
            raise ManifestError(
                "a manifest must not look anything up in the registry: plugins are being found"
            )
        if self._found is None:
            self._discovering = True
            try:
                self._found = discover(self.settings, self.manager) if self._discover else []
            finally:
                self._discovering = False
        return tuple(without_unknown_kinds([*self._registered, *self._found]))

    def refresh(self) -> None:
        """Forget what was discovered and read; the next look-up discovers anew."""
        from kexue.core import source

        with self._lock:
            self._found = self._plugins = None
            self.__dict__.pop("settings", None)
            self.manager = new_manager()
            importlib.invalidate_caches()
            source.forget()

    def interfaces(self) -> tuple[Interface, ...]:
        """Return the kinds: kexue's own, then those of plugins."""
        return (*INTERFACES, *(i for plugin in self.plugins for i in plugin.interfaces))

    def components(
        self, kind: str | None = None, tag: str | None = None, plugin: str | None = None
    ) -> list[Component]:
        """Return the components that can be used, sorted by id.

        Args:
            kind: Only of this kind.
            tag: Only with this tag.
            plugin: Only of this plugin: its slug or its distribution.

        Raises:
            ComponentNotFoundError: If there is no such kind or plugin.
        """
        if kind is not None:
            self.interface(kind)
        if plugin is not None:
            self._plugins_named(plugin)
        return _once(
            c
            for p in self.plugins
            for c in p.components
            if kind in {None, c.kind}
            and (tag is None or tag in c.tags)
            and plugin in {None, c.plugin, c.owner}
        )

    def experiments(self, plugin: str | None = None) -> list[Experiment]:
        """Return the experiments, of one plugin or of all.

        Raises:
            ComponentNotFoundError: If there is no such plugin.
        """
        plugins = self.plugins if plugin is None else self._plugins_named(plugin)
        return [experiment for p in plugins for experiment in p.experiments]

    def datasets(self) -> list[Dataset]:
        """Return the data that needs no download: kexue's own, then that of plugins."""
        from kexue.core.lab import DATASETS

        return [*DATASETS, *(d for p in self.plugins for d in p.datasets)]

    def conflicts(self) -> dict[str, tuple[str, ...]]:
        """Return the ids with several owners and no preference, with the owners."""
        found: dict[str, list[Component]] = {}
        for component in self.components():
            found.setdefault(component.id, []).append(component)
        return {
            name: tuple(c.owner for c in several)
            for name, several in found.items()
            if len(several) > 1 and self._preferred(several) is None
        }

    # -- look-ups -----------------------------------------------------------------------------

    def plugin(self, name: str) -> Plugin:
        """Return a plugin by slug or distribution.

        Raises:
            ComponentNotFoundError: If it is not installed; says how to install it where known.
            ComponentConflictError: If several plugins have the name.
        """
        found = self._plugins_named(name)
        if len(found) > 1:
            owners = tuple(p.owner for p in found)
            raise ComponentConflictError(
                f"{name!r} is a plugin of {' and of '.join(owners)}. Write the one that you mean.",
                name=name,
                owners=owners,
            )
        return found[0]

    def interface(self, kind: str) -> Interface:
        """Return the contract of a kind.

        Raises:
            ComponentNotFoundError: If no plugin provides it.
        """
        found = [i for i in self.interfaces() if i.kind == kind]
        if not found:
            known = sorted({i.kind for i in self.interfaces()})
            raise ComponentNotFoundError(
                f"No kind named {kind!r} is installed.{did_you_mean(kind, known)} "
                f"Installed: {', '.join(known)}.",
                name=kind,
            )
        return found[0]

    def get(self, name: str) -> Component:
        """Return the component of an id, of a name that only one kind has, or of ``owner:id``.

        Raises:
            ComponentNotFoundError: If there is none, or several kinds have the name.
            ComponentConflictError: If it has several owners and the user prefers none.
            PluginBrokenError: If the plugin that has it is broken.
        """
        owner, _, wanted = name.rpartition(":")
        found = _once(
            c
            for p in self.plugins
            for c in p.components
            if wanted in {c.id, c.name} and owner in {"", c.owner, c.plugin}
        )
        ids = sorted({c.id for c in found})
        if not ids:
            raise self._missing(name, owner, wanted)
        if len(ids) > 1:
            raise ComponentNotFoundError(
                f"{wanted!r} is the name of several components. Write one of: {', '.join(ids)}.",
                name=name,
            )
        return found[0] if len(found) == 1 else self._chosen(found)

    def load(self, name: str | Component) -> Any:
        """Import a component and return its class or callable.

        Raises:
            PluginBrokenError: If the import fails, naming the plugin and the reason.
        """
        component = name if isinstance(name, Component) else self.get(name)
        from kexue.core.loading import load_target

        named = component.plugin
        whose = f" of plugin {named!r} ({component.owner})" if named else ""
        try:
            loaded = load_target(component.target)
        except (WorkError, ArgumentError) as error:
            raise PluginBrokenError(
                f"{component.id}{whose} could not be loaded: {error} Other components are "
                f"unaffected.",
                plugin=component.plugin,
            ) from error
        if not callable(loaded):
            raise PluginBrokenError(
                f"{component.id}{whose} must be a class or a function. "
                f"Found {type(loaded).__name__} at {component.target}.",
                plugin=component.plugin,
            )
        return loaded

    def describe(self, name: str | Component) -> Description:
        """Return what a component is: parameters, inputs, documentation.

        Read from its source; it is imported only where its source does not say all.

        Raises:
            PluginBrokenError: If it must be imported and that fails.
        """
        from kexue.core.describe import describe_component

        component = name if isinstance(name, Component) else self.get(name)
        return describe_component(component, self.interface(component.kind), self.load)

    def create(self, name: str | Component, /, **params: Any) -> Any:
        """Build a component.

        Args:
            name: Its id, or its name where only one kind has it.
            params: Arguments of its constructor.

        Raises:
            ArgumentError: If a parameter is unknown or missing.
        """
        component = name if isinstance(name, Component) else self.get(name)
        self.describe(component).check_params(params)
        loaded = self.load(component)
        if isinstance(loaded, type):
            return loaded(**params)
        from kexue.core.loading import FunctionComponent

        return FunctionComponent(loaded, self.interface(component.kind).method, params)

    def build(self, config: Any, *, where: str = "config") -> Any:
        """Turn nested mappings ``{use: id, with: {…}}`` into objects.

        Args:
            config: Such a mapping, or lists and mappings that hold some; anything else is
                returned as it is. A path is read as YAML.
            where: How errors call the place.

        Raises:
            ArgumentError: If a mapping with ``use`` has other keys than ``with``, or a component
                refuses its parameters; the message names the place.
        """
        if isinstance(config, Path):
            from kexue.core.catalogue import load_yaml

            return self.build(load_yaml(config), where=str(config))
        if isinstance(config, list | tuple):
            return [self.build(item, where=f"{where}[{i}]") for i, item in enumerate(config)]
        if not isinstance(config, Mapping):
            return config
        if "use" not in config:
            return {key: self.build(item, where=f"{where}.{key}") for key, item in config.items()}
        params = {} if config.get("with") is None else config["with"]
        extra = [key for key in config if key not in {"use", "with"}]
        named = isinstance(params, Mapping) and all(isinstance(key, str) for key in params)
        if extra or not named or not isinstance(config["use"], str):
            found = f"also {', '.join(map(repr, extra))}" if extra else repr(dict(config))
            raise ArgumentError(
                f"{where} must be {{use: component, with: {{parameter: value}}}}. Found {found}.",
                argument=where,
            )
        built = {key: self.build(item, where=f"{where}.with.{key}") for key, item in params.items()}
        try:
            return self.create(config["use"], **built)
        except KexueError as error:
            error.args = (f"{where}: {error}",)
            raise

    # -- registering --------------------------------------------------------------------------

    def register(self, plugin: Any, *, slug: str = "", owner: str = "") -> Plugin:
        """Register a plugin from Python.

        Args:
            plugin: A module or object with hook implementations, a record, or several records.
            slug: Its short name; the module's name by default.
            owner: Who answers for it; the module's name by default.

        Raises:
            ManifestError: If it is not valid; nothing is registered then.
        """
        filled = from_python(plugin, slug, owner)
        with self._lock:
            others = self.plugins[len(self._registered) :]
            checked = without_unknown_kinds([*self._registered, filled, *others])
            error = checked[len(self._registered)].error
            if error is not None:
                raise error
            self._registered.append(filled)
            self._plugins = None
        return filled

    # -- inside -------------------------------------------------------------------------------

    def _plugins_named(self, name: str) -> list[Plugin]:
        """Return the plugins of this slug or distribution, at least one."""
        found = [p for p in self.plugins if name in {p.slug, p.owner}]
        if found:
            return found
        entries = catalogue().entries
        if name in entries:
            raise ComponentNotFoundError(_not_installed(f"The plugin {name!r}", name), name=name)
        known = [*(p.slug for p in self.plugins), *entries]
        raise ComponentNotFoundError(
            f"No plugin named {name!r} is installed.{did_you_mean(name, known)} "
            f"`kexue plugins` shows what is.",
            name=name,
        )

    def _preferred(self, several: Sequence[Component]) -> Component | None:
        """Return the one of several components of one id whose owner the user prefers."""
        wanted = self.settings.prefer.get(several[0].id)
        return next((c for c in several if wanted in {c.owner, c.plugin}), None)

    def _chosen(self, several: Sequence[Component]) -> Component:
        preferred = self._preferred(several)
        if preferred is not None:
            return preferred
        name, owners = several[0].id, tuple(c.owner for c in several)
        raise ComponentConflictError(
            f"{name} is registered by {' and by '.join(owners)}. Choose with "
            f"`prefer: {{{name}: {owners[0]}}}` in {self.settings.path}, or write "
            f"{owners[0]}:{name}.",
            name=name,
            owners=owners,
        )

    def _missing(self, name: str, owner: str, wanted: str) -> KexueError:
        """Return the error for a name that nothing has: why, and what to do."""
        others = sorted({c.owner for c in self.components() if wanted in {c.id, c.name}})
        if others:
            return ComponentNotFoundError(
                f"{owner!r} has no component {wanted!r}; it is in {' and in '.join(others)}.",
                name=name,
            )
        for entry in catalogue().owners(wanted):
            return self._missing_of(entry, name, wanted)
        ids = [c.id for c in self.components()]
        named = [c for e in catalogue().entries.values() for c in e.components if "*" not in c]
        meant = _suggestion(wanted, ids) or _suggestion(wanted, named)
        hint = "".join(
            f" {word} and not searched: {', '.join(slugs)}; `kexue plugins` says why."
            for word, state in (("Broken", "broken"), ("Switched off", "disabled"))
            if (slugs := [p.slug for p in self.plugins if p.state == state])
        )
        return ComponentNotFoundError(
            f"No component named {name!r} is installed.{meant} `kexue list` shows what is.{hint}",
            name=name,
        )

    def _missing_of(self, entry: Entry, name: str, wanted: str) -> KexueError:
        """Return the error for a component that a plugin of the catalogue has."""
        plugin = next((p for p in self.plugins if p.slug == entry.slug), None)
        what = f"{wanted!r} is in the plugin"
        if plugin is None:
            return ComponentNotFoundError(
                _not_installed(f"{what} {entry.slug!r}, which", entry.slug), name=name
            )
        if plugin.state == "broken":
            return PluginBrokenError(
                f"{what} {plugin.label}, which could not be loaded: {plugin.reason} "
                f"Other plugins are unaffected.",
                plugin=plugin.slug,
            )
        if plugin.state == "disabled":
            text = f"{what} {entry.slug!r}, which is switched off by {plugin.reason}"
        else:
            text = (
                f"{what} {plugin.label} by the catalogue, and this version of it lacks it. "
                f"Run `pip install --upgrade {plugin.owner}`."
            )
        return ComponentNotFoundError(text, name=name)


def _once(components: Iterable[Component]) -> list[Component]:
    """Return components sorted by id, the same target under the same id once."""
    found: dict[tuple[str, str], Component] = {}
    for component in components:
        found.setdefault((component.id, component.target), component)
    return [component for _, component in sorted(found.items())]


def _suggestion(wanted: str, ids: Sequence[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest name, of the same kind if there is one."""
    kind, slash, name = wanted.partition("/")
    if not slash:
        return did_you_mean(wanted, [i.partition("/")[2] for i in ids])
    of_kind = [i.partition("/")[2] for i in ids if i.startswith(f"{kind}/")]
    if not of_kind:
        return did_you_mean(wanted, ids)
    found = nearest(name, of_kind)
    return f" Did you mean '{kind}/{found}'?" if found else ""


def _not_installed(what: str, slug: str) -> str:
    entry = catalogue().entry(slug)
    if entry.planned:
        return f"{what} is planned and not yet written; the post is {entry.url}."
    return f"{what} is not installed. Run `kexue install {slug}`."


def catalogue() -> Catalogue:
    """Return the catalogue, importing what reads it only now."""
    from kexue.core import catalogue as module

    return module.catalogue()


registry = Registry()
"""The default registry, which the command line and the functions below use."""


def components(
    kind: str | None = None, tag: str | None = None, plugin: str | None = None
) -> list[Component]:
    """Return the installed components; see :meth:`Registry.components`."""
    return registry.components(kind, tag, plugin)


def create(name: str | Component, /, **params: Any) -> Any:
    """Build a component; see :meth:`Registry.create`.

    Example:
        >>> from kexue.core import create
        >>> loss = create("loss/zlpr", reduction="sum")  # doctest: +SKIP
    """
    return registry.create(name, **params)


def describe(name: str | Component) -> Description:
    """Say what a component is; see :meth:`Registry.describe`."""
    return registry.describe(name)


def build(config: Any) -> Any:
    """Turn ``{use: id, with: {…}}`` into objects; see :meth:`Registry.build`."""
    return registry.build(config)
