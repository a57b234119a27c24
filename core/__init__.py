"""kexue.core: contracts, registry, running components on files, experiments.

Names are imported when they are first used, so that ``import kexue.core`` imports neither torch
nor numpy.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from kexue.core.component import (
        Component as Component,
    )
    from kexue.core.component import (
        Dataset as Dataset,
    )
    from kexue.core.component import (
        Example as Example,
    )
    from kexue.core.component import (
        Experiment as Experiment,
    )
    from kexue.core.component import (
        Interface as Interface,
    )
    from kexue.core.describe import (
        Description as Description,
    )
    from kexue.core.describe import (
        Input as Input,
    )
    from kexue.core.describe import (
        Parameter as Parameter,
    )
    from kexue.core.eager import eagerly as eagerly
    from kexue.core.errors import (
        ArgumentError as ArgumentError,
    )
    from kexue.core.errors import (
        ComponentConflictError as ComponentConflictError,
    )
    from kexue.core.errors import (
        ComponentNotFoundError as ComponentNotFoundError,
    )
    from kexue.core.errors import (
        FileFormatError as FileFormatError,
    )
    from kexue.core.errors import (
        KexueError as KexueError,
    )
    from kexue.core.errors import (
        ManifestError as ManifestError,
    )
    from kexue.core.errors import (
        MissingDependencyError as MissingDependencyError,
    )
    from kexue.core.errors import (
        PluginBrokenError as PluginBrokenError,
    )
    from kexue.core.errors import (
        UsageError as UsageError,
    )
    from kexue.core.errors import (
        WorkError as WorkError,
    )
    from kexue.core.experiments import (
        Claim as Claim,
    )
    from kexue.core.experiments import (
        Context as Context,
    )
    from kexue.core.experiments import (
        Figure as Figure,
    )
    from kexue.core.experiments import (
        Report as Report,
    )
    from kexue.core.experiments import (
        Table as Table,
    )
    from kexue.core.hooks import hookimpl as hookimpl
    from kexue.core.interfaces.base import Contract as Contract
    from kexue.core.interfaces.decoder import (
        Decoder as Decoder,
    )
    from kexue.core.interfaces.decoder import (
        DecodeResult as DecodeResult,
    )
    from kexue.core.interfaces.generator import Generator as Generator
    from kexue.core.interfaces.layer import Layer as Layer
    from kexue.core.interfaces.loss import Loss as Loss
    from kexue.core.interfaces.optimizer import Optimizer as Optimizer
    from kexue.core.interfaces.sampler import (
        Sampler as Sampler,
    )
    from kexue.core.interfaces.sampler import (
        Samples as Samples,
    )
    from kexue.core.interfaces.similarity import Similarity as Similarity
    from kexue.core.job import (
        Job as Job,
    )
    from kexue.core.job import (
        Result as Result,
    )
    from kexue.core.registry import (
        Registry as Registry,
    )
    from kexue.core.registry import (
        build as build,
    )
    from kexue.core.registry import (
        components as components,
    )
    from kexue.core.registry import (
        create as create,
    )
    from kexue.core.registry import (
        describe as describe,
    )
    from kexue.core.registry import (
        registry as registry,
    )
    from kexue.core.stepping import (
        check_settings as check_settings,
    )
    from kexue.core.stepping import (
        different_parameters as different_parameters,
    )
    from kexue.core.stepping import (
        restore_state as restore_state,
    )
    from kexue.core.stepping import (
        saved_state as saved_state,
    )
    from kexue.core.stepping import (
        some_parameters as some_parameters,
    )
    from kexue.core.stepping import (
        state_dtype as state_dtype,
    )
    from kexue.core.stepping import (
        with_gradient as with_gradient,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "component": ["Component", "Dataset", "Example", "Experiment", "Interface"],
        "describe": ["Description", "Input", "Parameter"],
        "eager": ["eagerly"],
        "errors": [
            "ArgumentError",
            "ComponentConflictError",
            "ComponentNotFoundError",
            "FileFormatError",
            "KexueError",
            "ManifestError",
            "MissingDependencyError",
            "PluginBrokenError",
            "UsageError",
            "WorkError",
        ],
        "experiments": ["Claim", "Context", "Figure", "Report", "Table"],
        "hooks": ["hookimpl"],
        "interfaces.base": ["Contract"],
        "interfaces.decoder": ["DecodeResult", "Decoder"],
        "interfaces.generator": ["Generator"],
        "interfaces.layer": ["Layer"],
        "interfaces.loss": ["Loss"],
        "interfaces.optimizer": ["Optimizer"],
        "interfaces.sampler": ["Sampler", "Samples"],
        "interfaces.similarity": ["Similarity"],
        "job": ["Job", "Result"],
        "registry": ["Registry", "build", "components", "create", "describe", "registry"],
        "stepping": [
            "check_settings",
            "different_parameters",
            "restore_state",
            "saved_state",
            "some_parameters",
            "state_dtype",
            "with_gradient",
        ],
    },
)


class _Package(ModuleType):
    """Keeps ``describe`` and ``registry`` the function and the object.

    Importing the submodules of these names would otherwise put the modules in their place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in {"describe", "registry"} and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
