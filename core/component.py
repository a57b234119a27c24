"""What a plugin says of itself: small frozen records, defined without torch.

A manifest is read by every command, so nothing here may import anything heavy, and a record
names code as ``"module:attribute"``, to be imported when it is first used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kexue.core.errors import ManifestError

__all__ = ["PAD", "Component", "Dataset", "Example", "Experiment", "Interface"]

PAD = -1
"""Fills a row of indices behind its end."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TEMPLATE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[^:]+")
_FILE_TARGET = re.compile(r".+\.py:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _check_name(record: str, label: str, value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ManifestError(
            f"`{label}` of {record} must be lower-case words joined by hyphens, "
            f"like 'am-softmax'. Found {value!r}."
        )


def _check_target(record: str, value: object) -> None:
    if not isinstance(value, str) or not (
        _TARGET.fullmatch(value) or _FILE_TARGET.fullmatch(value)
    ):
        raise ManifestError(
            f"`target` of {record} must be 'package.module:attribute' or 'file.py:attribute'. "
            f"Found {value!r}."
        )


def _check_summary(record: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise ManifestError(f"`summary` of {record} must be one line of text. Found {value!r}.")


def _check_strings(record: str, label: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ManifestError(f"`{label}` of {record} must be a tuple of strings. Found {value!r}.")


@dataclass(frozen=True, slots=True)
class Component:
    """One method under one contract.

    Args:
        kind: The contract, for example ``"loss"``.
        name: The method, for example ``"zlpr"``; ``kind/name`` is the component's id.
        target: Where the class or callable is, ``"module:attribute"``.
        summary: One line.
        references: The post and the papers, each as text with its address.
        tags: Words to filter by.
        run: ``"module:function"``, what ``kexue run`` calls in place of its kind's; see
            :class:`Interface`. Empty for the kind's.
        fit: The same for ``kexue fit``.
        apply: The same for ``kexue run --model``.
        plugin: The plugin that registered it; set by the registry.
        owner: The distribution or file that registered it; set by the registry.

    Raises:
        ManifestError: If a field is not of its form.
    """

    kind: str
    name: str
    target: str
    summary: str
    references: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    run: str = field(default="", compare=False)
    fit: str = field(default="", compare=False)
    apply: str = field(default="", compare=False)
    plugin: str = field(default="", compare=False)
    owner: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        record = f"component {self.kind}/{self.name}"
        _check_name(record, "kind", self.kind)
        _check_name(record, "name", self.name)
        _check_target(record, self.target)
        _check_summary(record, self.summary)
        _check_strings(record, "references", self.references)
        _check_strings(record, "tags", self.tags)
        for optional in (self.run, self.fit, self.apply):
            if optional:
                _check_target(record, optional)

    @property
    def id(self) -> str:
        """``kind/name``."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Interface:
    """A kind of component: its contract and how the command line runs it on files.

    Args:
        kind: The name of the kind, for example ``"loss"``.
        target: The abstract class, ``"module:attribute"``.
        summary: One line that says what such a component maps to what.
        method: The method whose signature names the inputs, for example ``"forward"``.
        run: ``"module:function"``, called with a :class:`~kexue.core.job.Job`; its keyword-only
            arguments become options of ``kexue run`` for this kind.
        fit: The same for ``kexue fit``; empty where components of the kind are not trained.
        apply: The same for ``kexue run --model``, on a fitted model; empty likewise.
        checks: ``"module:function"`` that returns this kind's conformance checks; may be empty.
        template: ``"package:file"``, the module that ``kexue new`` starts a component from; may
            be empty.
        several: Whether further components of the kind may be named before the files, to be run
            beside the first; they come as ``job.others``.
        plugin: The plugin that registered it; set by the registry, empty for kexue's own.

    Raises:
        ManifestError: If a field is not of its form.
    """

    kind: str
    target: str
    summary: str
    method: str
    run: str
    fit: str = ""
    apply: str = ""
    checks: str = ""
    template: str = ""
    several: bool = False
    plugin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        record = f"interface {self.kind}"
        _check_name(record, "kind", self.kind)
        _check_target(record, self.target)
        _check_summary(record, self.summary)
        _check_target(record, self.run)
        for optional in (self.fit, self.apply, self.checks):
            if optional:
                _check_target(record, optional)
        if not isinstance(self.method, str) or not self.method.isidentifier():
            raise ManifestError(f"`method` of {record} must be a name. Found {self.method!r}.")
        if self.template and not _TEMPLATE.fullmatch(self.template):
            raise ManifestError(
                f"`template` of {record} must be 'package:file'. Found {self.template!r}."
            )


@dataclass(frozen=True, slots=True)
class Experiment:
    """A function that measures what a post claims and returns a Report.

    Args:
        name: Short name, unique within the plugin.
        target: ``"module:function"``; the function takes an
            :class:`~kexue.core.experiments.Context` and returns a
            :class:`~kexue.core.experiments.Report`.
        summary: One line.
        references: Where the claims are made.
        plugin: The plugin that registered it; set by the registry.

    Raises:
        ManifestError: If a field is not of its form.
    """

    name: str
    target: str
    summary: str
    references: tuple[str, ...] = ()
    plugin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        record = f"experiment {self.name}"
        _check_name(record, "name", self.name)
        _check_target(record, self.target)
        _check_summary(record, self.summary)
        _check_strings(record, "references", self.references)

    @property
    def id(self) -> str:
        """``plugin/name``."""
        return f"{self.plugin}/{self.name}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Data that needs no download.

    Args:
        name: The name by which experiments and ``kexue fit`` ask for it.
        target: ``"module:function"`` that loads it.
        summary: One line.
        plugin: The plugin that registered it; set by the registry, empty for kexue's own.

    Raises:
        ManifestError: If a field is not of its form.
    """

    name: str
    target: str
    summary: str
    plugin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        record = f"dataset {self.name}"
        _check_name(record, "name", self.name)
        _check_target(record, self.target)
        _check_summary(record, self.summary)


class Example(NamedTuple):
    """Small valid arguments of a component.

    The conformance kit measures with them, ``kexue run … --example`` writes them as files, and
    whoever meets the component can start from them.

    Args:
        params: Arguments of the constructor.
        inputs: Arguments of the method that the kind runs, by name; tensors where it takes tensors.
    """

    params: Mapping[str, Any]
    inputs: Mapping[str, Any]
