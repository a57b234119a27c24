"""The hooks of a plugin: all optional, all without arguments, all returning records.

A plugin is a module (the value of an entry point in the group ``kexue``) with functions of these
names marked by :data:`hookimpl`::

    from kexue.core import Component, hookimpl

    @hookimpl
    def kexue_components():
        return [Component("loss", "mine", "kexue_mine.loss:Mine", "What it computes.")]
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from kexue.core.component import Component, Dataset, Experiment, Interface

__all__ = [
    "hookimpl",
    "kexue_components",
    "kexue_datasets",
    "kexue_experiments",
    "kexue_interfaces",
]

_hookspec = pluggy.HookspecMarker("kexue")

hookimpl = pluggy.HookimplMarker("kexue")
"""Marks a function of a plugin as the implementation of the hook of its name."""


@_hookspec
def kexue_components() -> Iterable[Component]:
    """Return the components of the plugin."""
    raise NotImplementedError


@_hookspec
def kexue_interfaces() -> Iterable[Interface]:
    """Return kinds that the plugin adds to kexue's own."""
    raise NotImplementedError


@_hookspec
def kexue_experiments() -> Iterable[Experiment]:
    """Return the experiments that measure what the plugin's post claims."""
    raise NotImplementedError


@_hookspec
def kexue_datasets() -> Iterable[Dataset]:
    """Return data that the plugin brings."""
    raise NotImplementedError
