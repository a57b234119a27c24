"""What ``kexue run`` and ``kexue fit`` do: from names and files to a result."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue.core.catalogue import load_yaml
from kexue.core.component import Component, Interface
from kexue.core.describe import Description, Parameter, documented_parameters, parse_value
from kexue.core.docstrings import parse_docstring
from kexue.core.errors import ArgumentError, FileFormatError, ManifestError, did_you_mean
from kexue.core.job import Job, Progress, Quiet, Result
from kexue.core.loading import load_target
from kexue.core.registry import Registry
from kexue.core.source import find_definition

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Request",
    "execute",
    "interface_of",
    "options",
    "purpose",
    "result_json",
    "write_example",
    "write_result",
]

_CONFIG_KEYS = ("use", "with", "files", "options")


@dataclass
class Request:
    """One call of ``kexue run`` or ``kexue fit``.

    Args:
        name: The component.
        verb: ``"run"`` or ``"fit"``.
        files: What the user named.
        params: ``--set``: ``key=value`` texts.
        config: A YAML file ``{use: id, with: {…}, files: […], options: {…}}`` that the other
            arguments take precedence over.
        options: Options of the kind, by name.
        device: Name of a device.
        dtype: Name of a dtype.
        seed: Seed of everything random.
        model: Folder of a fitted model.
        weights: Weights for the component.
        out: Where results go.
        progress: Where to report.
    """

    name: str
    verb: str = "run"
    files: Sequence[str] = ()
    params: Sequence[str] = ()
    config: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    model: Path | None = None
    weights: Path | None = None
    out: Path | None = None
    progress: Progress = field(default_factory=Quiet)


def interface_of(registry: Registry, component: Component) -> Interface:
    """Return a component's kind, with the commands that the component has of its own.

    Args:
        registry: Where kinds come from.
        component: The component.
    """
    own = {verb: getattr(component, verb) for verb in ("run", "fit", "apply")}
    kind = registry.interface(component.kind)
    return replace(kind, **{verb: target for verb, target in own.items() if target})


def target_of(interface: Interface, verb: str, *, fitted: bool) -> str:
    """Return what runs a kind for a verb; empty if the kind has none."""
    if verb == "fit":
        return interface.fit
    return interface.apply if fitted else interface.run


def options(interface: Interface, verb: str) -> tuple[Parameter, ...]:
    """Return the options that a kind adds to a verb, read from source.

    Args:
        interface: The kind.
        verb: ``"run"`` or ``"fit"``.
    """
    found: dict[str, Parameter] = {}
    for fitted in (False, True) if verb == "run" else (False,):
        definition = find_definition(target_of(interface, verb, fitted=fitted) or "")
        if definition is not None and isinstance(definition.node, ast.FunctionDef):
            keywords = {arg.arg for arg in definition.node.args.kwonlyargs}
            for parameter in documented_parameters(definition.node):
                if parameter.name in keywords:
                    found.setdefault(parameter.name, parameter)
    return tuple(found.values())


def purpose(interface: Interface, verb: str) -> str:
    """Return what a kind does for a verb, in prose, read from source."""
    definition = find_definition(target_of(interface, verb, fitted=False) or "")
    return parse_docstring(definition.doc).prose if definition is not None else ""


def execute(registry: Registry, request: Request) -> tuple[Job, Result]:
    """Do what a request says.

    Args:
        registry: Where components come from.
        request: What to do.

    Raises:
        KexueError: With one sentence that says what is wrong and what to do.
    """
    component = registry.get(request.name)
    interface = interface_of(registry, component)
    config = _read_config(request.config, component)
    target = target_of(interface, request.verb, fitted=request.model is not None)
    if not target:
        what = "fitted" if request.verb == "fit" else "run with a fitted model"
        able = sorted({i.kind for i in registry.interfaces() if i.fit})
        raise ArgumentError(
            f"{component.id} cannot be {what}: components of kind {component.kind!r} are not "
            f"trained. Kinds that are: {', '.join(able)}.",
            argument="component",
        )
    if request.verb == "run" and request.out is not None and not request.out.is_dir():
        from kexue.core.writing import check_place

        check_place(request.out)  # before the work; some kinds may write into a folder
    description = registry.describe(component)
    trainable = "trainable" in description.capabilities or component.fit
    if request.verb == "fit" and not trainable:
        raise ArgumentError(
            f"{component.id} is not trainable. `kexue run {component.id}` runs it on files.",
            argument="component",
        )
    named = request.files or config.get("files") or ()
    others, files = _split(registry, interface, component, named)
    components = [description, *others]
    settings = {p.name: p for p in options(interface, request.verb)}
    _refuse_options(request, description, settings)
    params = _params(request.params, components, config)
    job, *job.others = [
        _job(registry, request, each, files, params_of)
        for each, params_of in zip(components, params, strict=True)
    ]
    given = {
        name: _from_yaml(value, settings.get(name), "`options`")
        for name, value in (config.get("options") or {}).items()
    }
    return job, _call(target, job, {**given, **request.options})


def _split(
    registry: Registry, interface: Interface, first: Component, given: Sequence[str]
) -> tuple[list[Description], tuple[str, ...]]:
    """Split what follows the component into further components of the kind, and files.

    Raises:
        ArgumentError: If a component is named twice.
    """
    component_id = re.compile(rf"{interface.kind}/[a-z0-9-]+")
    names = [name for name in given if interface.several and component_id.fullmatch(name)]
    others = [registry.get(name) for name in names]
    seen = {first.id}
    for other in others:
        if other.id in seen:
            raise ArgumentError(
                f"{other.id} is named twice. Register it under another name in a registry file to "
                f"run it beside itself.",
                argument="component",
            )
        seen.add(other.id)
    files = tuple(name for name in given if name not in names)
    return [registry.describe(other) for other in others], files


def _job(
    registry: Registry,
    request: Request,
    description: Description,
    files: Sequence[str],
    params: Mapping[str, Any],
) -> Job:
    from kexue.core.device import check_seed, resolve_device, resolve_dtype

    check_seed(request.seed)
    return Job(
        description=description,
        factory=lambda **given: registry.create(description.component, **given),
        device=resolve_device(request.device),
        dtype=resolve_dtype(request.dtype),
        params={name: registry.build(value, where=name) for name, value in params.items()},
        files=files,
        seed=request.seed,
        model=request.model,
        weights=request.weights,
        out=request.out,
        progress=request.progress,
    )


def _refuse_options(request: Request, description: Description, known: Collection[str]) -> None:
    """Refuse ``--set`` of what is an option of the command.

    Raises:
        ArgumentError: With the option to give.
    """
    own = {parameter.name for parameter in description.parameters}
    for text in request.params:
        name = text.partition("=")[0].strip()
        if name in known and name not in own and not description.accepts_any:
            raise ArgumentError(
                f"`{name}` is no parameter of {description.component.id}, but an option of "
                f"`kexue {request.verb}`. Give it as `--{name.replace('_', '-')}`, not with "
                f"`--set`.",
                argument=name,
            )


def _params(
    texts: Sequence[str], components: Sequence[Description], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the parameters that were set, for each component.

    ``NAME=VALUE`` is for the first, and for others that take it; ``COMPONENT.NAME=VALUE`` for one.
    """
    first = components[0]
    known = {p.name: p for p in first.parameters}
    found: list[dict[str, Any]] = [{} for _ in components]
    for name, value in (config.get("with") or {}).items():
        found[0][name] = _from_yaml(value, known.get(name), first.component.id)
    for text in texts:
        left, separator, value = text.partition("=")
        if not separator:
            raise ArgumentError(f"`--set` must be NAME=VALUE. Found {text!r}.", argument="set")
        owner, scoped, name = left.strip().rpartition(".")
        if scoped and owner not in {c.component.name for c in components}:
            raise ArgumentError(
                f"`--set {text}` is for no component that was named. Found {owner!r}; named: "
                f"{', '.join(c.component.name for c in components)}.",
                argument="set",
            )
        for component, params in zip(components, found, strict=True):
            takes = component is first or name in {p.name for p in component.parameters}
            if component.component.name == owner if scoped else takes:
                params[name] = component.parse(name, value)
    for component, params in zip(components, found, strict=True):
        component.check_names(params)
    return found


def _read_config(path: Path | None, component: Component) -> dict[str, Any]:
    if path is None:
        return {}
    from kexue.core.lines import check_file

    check_file(path, may_be_empty=True)
    try:
        config = load_yaml(path)
    except ManifestError as error:
        raise FileFormatError(str(error), path=path) from error
    if not isinstance(config, dict):
        raise FileFormatError(
            f"{path} must hold a mapping. Found {type(config).__name__}.", path=path
        )
    for key in config:
        if key not in _CONFIG_KEYS:
            raise FileFormatError(
                f"{path} has no use for {key!r}.{did_you_mean(str(key), _CONFIG_KEYS)} "
                f"It may hold: {', '.join(_CONFIG_KEYS)}.",
                path=path,
            )
    if config.get("use") not in (None, component.id, component.name):
        raise FileFormatError(
            f"{path} is for {config['use']}, and {component.id} was asked for.", path=path
        )
    _check_values(path, config)
    return config


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose values are not of their form."""
    for key in ("with", "options"):
        names = config.get(key) or {}
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names):
            raise FileFormatError(
                f"`{key}` in {path} must be a mapping of names to values. Found {names!r}.",
                path=path,
            )
    files = config.get("files") or []
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise FileFormatError(
            f"`files` in {path} must be a list of file names. Found {files!r}.", path=path
        )


def _from_yaml(value: Any, parameter: Parameter | None, owner: str) -> Any:
    """Return a value of a configuration, checked as if it had been typed after ``--set``."""
    if parameter is None or not isinstance(value, str | bool | int | float | None):
        return value
    import yaml

    text = value if isinstance(value, str) else yaml.safe_dump(value).splitlines()[0]
    parsed = parse_value(text, parameter, owner)
    if isinstance(parsed, str) and not isinstance(value, str):
        raise ArgumentError(
            f"`{parameter.name}` of {owner} must be {parameter.annotation}. Found {value!r}; text "
            f"that YAML reads as something else needs quotes.",
            argument=parameter.name,
        )
    return parsed


def _call(target: str, job: Job, given: Mapping[str, Any]) -> Result:
    """Call a kind's function with the options that it takes.

    Raises:
        ArgumentError: If it does not take one of them.
    """
    function = load_target(target)
    known = function.__kwdefaults__ or {}
    for name in given:
        if name not in known:
            flag = name.replace("_", "-")
            takes = ", ".join(f"--{n.replace('_', '-')}" for n in known) or "no options of its own"
            raise ArgumentError(
                f"`--{flag}` has no use here: {job.id} takes {takes} "
                f"{'with' if job.model else 'without'} `--model`.",
                argument=name,
            )
    result: Result = function(job, **given)
    return result


# -- results ------------------------------------------------------------------------------------


def to_array(value: Any) -> NDArray[np.generic]:
    """Return a tensor or array as a numpy array that files can hold."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(value)


def write_result(result: Result, out: Path | None, plot: Path | None) -> list[Path]:
    """Write what a result holds, and return the files.

    Args:
        result: What came out.
        out: Where arrays or lines go; nowhere if None. Of a result that has both, the arrays go
            into files of arrays, the lines into any other. The picture goes there if its suffix
            is a picture's and ``plot`` is None.
        plot: Where the picture goes; nowhere if None.

    Raises:
        ArgumentError: If there is nothing to write, or no picture of the result.
    """
    from kexue.core.files import ARRAY_SUFFIXES, write_arrays, write_lines
    from kexue.core.plots import PLOT_SUFFIXES

    written = list(result.files)
    if plot is None and out is not None and out.suffix.lower() in PLOT_SUFFIXES:
        out, plot = None, out
    draw = _drawing(result, plot) if plot is not None else None
    if out is not None and not result.files:
        as_array = result.arrays and out.suffix.lower() in set(ARRAY_SUFFIXES) - {".txt"}
        if result.lines is not None and not as_array:
            write_lines(out, result.lines)
        elif result.arrays:
            write_arrays(out, {name: to_array(a) for name, a in result.arrays.items()})
        else:
            raise ArgumentError("There is nothing to write of this result.", argument="out")
        result.lines = None
        written.append(out)
    if plot is not None and draw is not None:
        draw()
        written.append(plot)
    return written


def _drawing(result: Result, plot: Path) -> Callable[[], None]:
    """Return what writes the picture, once the place was found to be good."""
    from kexue.core.plots import check_plot, write_plot
    from kexue.core.writing import atomic_write, check_place

    draw, page = result.plot, result.page
    if page is not None and plot.suffix.lower() == ".html":
        check_place(plot)
        return lambda: atomic_write(plot, page())
    if draw is None:
        hint = " Name an .html file." if page is not None else ""
        raise ArgumentError(f"There is nothing to plot of this result.{hint}", argument="plot")
    check_plot(plot)
    return lambda: write_plot(plot, draw)


def result_json(job: Job, result: Result, written: Sequence[Path]) -> dict[str, Any]:
    """Return a run as plain data; arrays are left out once they are in a file.

    NaN and infinities, which JSON has no word for, become null.
    """
    in_file = job.out is not None
    document: dict[str, Any] = _finite(
        {
            "component": job.id,
            "params": {k: v if _plain(v) else repr(v) for k, v in job.params.items()},
            "device": str(job.device),
            "dtype": str(job.dtype).removeprefix("torch."),
            "seed": job.seed,
            "summary": result.summary,
            **({"lines": list(result.lines)} if result.lines is not None else {}),
            **({} if in_file else {n: to_array(a).tolist() for n, a in result.arrays.items()}),
            "files": [str(path) for path in written],
        }
    )
    return document


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | dict | type(None))


# -- examples -----------------------------------------------------------------------------------


def write_example(registry: Registry, name: str, folder: Path) -> str:
    """Write files that a component can be run on, and return the command that does.

    Args:
        registry: Where components come from.
        name: The component.
        folder: Where; made if it does not exist.

    Raises:
        ArgumentError: If the component gives no example, or runs on a fitted model alone.
        FileFormatError: If the folder cannot be made, or holds other files of these names.
    """
    from kexue.core.device import make_generator

    component = registry.get(name)
    loaded = registry.load(component)
    if not hasattr(loaded, "example"):
        raise ArgumentError(f"{component.id} gives no example.", argument="example")
    if getattr(loaded, "needs_fitting", False):
        raise ArgumentError(
            f"{component.id} gives no example of files, because it runs on a fitted model. Fit one "
            f"to data of yours: `kexue fit {component.id} --help` says what it takes.",
            argument="example",
        )
    example = loaded.example(generator=make_generator(0))
    optional = {row.name: row.optional for row in registry.describe(component).inputs}
    inputs = {key: value for key, value in example.inputs.items() if key in optional}
    files = _write_inputs(inputs, folder)
    words = ["kexue", "run", component.id]
    for key, value in example.inputs.items():
        if key in files:
            words.append(f"{key}={files[key]}" if optional[key] else str(files[key]))
        elif isinstance(value, str):
            words.append(value)
        elif inspect.isroutine(value):
            words.append(f"{value.__module__}:{value.__qualname__}")
    for key, value in example.params.items():
        words += ["--set", f"{key}={_as_text(value)}"]
    return shlex.join(words)


def _write_inputs(inputs: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write tensors and lists of lines into a folder, all of them or none."""
    import tempfile

    from kexue.core.lines import detail

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be made: {detail(error)}.", path=folder) from error
    with tempfile.TemporaryDirectory() as scratch:
        files = _write_plain(inputs, Path(scratch))
        for path in files.values():
            place = folder / path.name
            if place.exists() and place.read_bytes() != path.read_bytes():
                raise FileFormatError(
                    f"{place} exists and holds something else. Name another folder.", path=place
                )
        from kexue.core.writing import atomic_write

        for path in files.values():
            atomic_write(folder / path.name, path.read_bytes())
    return {key: folder / path.name for key, path in files.items()}


def _write_plain(inputs: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    import torch

    from kexue.core.files import write_arrays, write_lines

    files: dict[str, Path] = {}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            files[key] = folder / f"{key}.npy"
            write_arrays(files[key], {key: to_array(value)})
        elif isinstance(value, list):
            files[key] = folder / f"{key}.txt"
            write_lines(files[key], map(str, value))
    return files


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=repr)
