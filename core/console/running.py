"""``kexue run`` and ``kexue fit``: commands built for the component that they are given."""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kexue.core.component import Component
from kexue.core.console.commands import VERBS, built
from kexue.core.console.completion import complete_components
from kexue.core.console.listing import readable, sections, usage
from kexue.core.console.output import note, print_json, print_table, progress
from kexue.core.errors import ManifestError
from kexue.core.registry import registry

if TYPE_CHECKING:
    from kexue.core.describe import Parameter

__all__ = ["component_command"]


_COMMON: dict[str, tuple[Any, Any, Any]] = {
    "files": (
        list[str] | None,
        typer.Argument(metavar="FILES", help="Inputs; - is standard input, NAME=FILE names one."),
        None,
    ),
    "set_": (
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the component."),
        None,
    ),
    "config": (
        Path | None,
        typer.Option("--config", help="YAML with the component's `with` and `files`."),
        None,
    ),
    "device": (str, typer.Option("--device", help="auto, cpu, cuda, mps, xpu."), "auto"),
    "dtype": (
        str | None,
        typer.Option("--dtype", help="float32, float64, bfloat16, float16."),
        None,
    ),
    "seed": (int, typer.Option("--seed", help="Of everything random."), 0),
    "json_": (bool, typer.Option("--json", help="Print one JSON document."), False),
}
_RUN: dict[str, tuple[Any, Any, Any]] = {
    "model": (Path | None, typer.Option("--model", help="Folder of a fitted model."), None),
    "weights": (Path | None, typer.Option("--weights", help="A state_dict in safetensors."), None),
    "out": (Path | None, typer.Option("-o", "--out", help="Where results go, by suffix."), None),
    "plot": (Path | None, typer.Option("--plot", help="Where a picture goes."), None),
    "example": (
        Path | None,
        typer.Option("--example", help="Write files to try into this folder, and say how."),
        None,
    ),
}
_FIT: dict[str, tuple[Any, Any, Any]] = {
    "out": (Path | None, typer.Option("-o", "--out", help="Folder for the model."), None),
}
_SHORT = {"num_samples": "-n"}
"""Short forms of the options that kinds have in common."""

_TYPES: Mapping[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "Path": Path}


def component_command(verb: str, args: Sequence[str]) -> Any:
    """Return the command ``run`` or ``fit`` for the component that the arguments name.

    Args:
        verb: Which.
        args: What follows it.
    """
    common = {**_COMMON, **(_RUN if verb == "run" else _FIT)}
    name = _first_word(args, common)
    extra: tuple[Parameter, ...] = ()
    text = VERBS[verb].help
    if name is not None and "_KEXUE_COMPLETE" not in os.environ:
        from kexue.core.run import interface_of, options

        component = registry.get(name)
        interface = interface_of(registry, component)
        extra = options(interface, verb)
        for taken in (p.name for p in extra if p.name in {"component", *common}):
            raise ManifestError(
                f"The option `{taken}` of kind {interface.kind!r} is one of kexue's own; "
                f"rename it in {interface.plugin or 'kexue'}."
            )
        text = _component_help(component, verb)
    argument = typer.Argument(
        metavar=name or "COMPONENT", help="Component.", autocompletion=complete_components
    )
    parameters = [_signature("component", (str, argument, inspect.Parameter.empty))]
    parameters += [_signature(key, given) for key, given in common.items()]
    parameters += [_signature(p.name, _kind_option(p)) for p in extra]

    def command(**values: Any) -> None:
        given = {p.name: values.pop(p.name) for p in extra}
        _execute(verb, {key: v for key, v in given.items() if v is not None}, **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return built(command, verb, text)


def _first_word(args: Sequence[str], common: Mapping[str, tuple[Any, Any, Any]]) -> str | None:
    """Return the first argument that is neither an option nor the value of one."""
    with_value = {
        flag
        for kind, option, _ in common.values()
        if kind is not bool
        for flag in getattr(option, "param_decls", None) or ()
    }
    skip = False
    for word in args:
        if skip:
            skip = False
        elif word.startswith("-") and word != "-":
            skip = word in with_value
        else:
            return word
    return None


def _signature(name: str, given: tuple[Any, Any, Any]) -> Any:
    kind, option, default = given
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default
    )


def _kind_option(parameter: Parameter) -> tuple[Any, Any, Any]:
    """Return an option of a kind; None means that it was not given."""
    plain = parameter.annotation.removesuffix(" | None")
    kind = _TYPES.get(plain, str)
    flag = f"--{parameter.name.replace('_', '-')}"
    default = (parameter.default or "None").strip("'")
    shown = "" if default in {"None", "False"} else f" [default: {default}]"
    option = typer.Option(
        *filter(None, (_SHORT.get(parameter.name), flag)), help=f"{readable(parameter.doc)}{shown}"
    )
    if kind is bool:
        flags = f"{flag}/--no-{flag[2:]}" if parameter.default == "True" else flag
        return (
            bool | None,
            typer.Option(flags, help=readable(parameter.doc), show_default=False),
            None,
        )
    return kind | None, option, None


def _component_help(component: Component, verb: str) -> str:
    """Return the help of ``kexue run COMPONENT``: what it is, what it takes, how to try it."""
    from kexue.core.run import interface_of, purpose

    description = registry.describe(component)
    interface = interface_of(registry, component)
    blocks = [f"{component.id}: {component.summary}", readable(purpose(interface, verb))]
    tables = sections(description)
    for title, _, rows in tables if verb == "run" else tables[1:]:
        blocks.append("\b\n" + "\n".join([title, *(_wrapped(row) for row in rows)]))
    if verb == "fit":
        example = [f"kexue fit {component.id} FILE -o model/"]
    else:
        example = [usage(description)]
        if "needs_fitting" not in description.capabilities:
            example.append(f"kexue run {component.id} --example try/   (writes files to try)")
    blocks.append("\b\n" + "\n".join(["Example", *(f"  {line}" for line in example)]))
    return "\n\n".join(filter(None, blocks))


def _wrapped(row: Sequence[str]) -> str:
    """Return a row of a table as an indented paragraph that fits 80 columns."""
    head = "  ".join(filter(None, row[:-1]))
    text = textwrap.fill(row[-1], 76, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {head}" + (f"\n{text}" if row[-1] else "")


def _execute(
    verb: str,
    kind_options: Mapping[str, Any],
    *,
    component: str,
    files: list[str] | None,
    set_: list[str] | None,
    config: Path | None,
    device: str,
    dtype: str | None,
    seed: int,
    json_: bool,
    out: Path | None,
    model: Path | None = None,
    weights: Path | None = None,
    plot: Path | None = None,
    example: Path | None = None,
) -> None:
    from kexue.core.run import Request, execute, result_json, write_example, write_result

    if example is not None:
        command = write_example(registry, component, example)
        if json_:
            print_json({"schema": 1, "command": command})
        else:
            print(command)
        return
    # Of the processes that `accelerate launch` or `torchrun` starts, the first one speaks.
    first = os.environ.get("RANK", "0") == "0"
    request = Request(
        component,
        verb,
        files=files or (),
        params=set_ or (),
        config=config,
        options=kind_options,
        device=device,
        dtype=dtype,
        seed=seed,
        model=model,
        weights=weights,
        out=out,
        progress=progress(quiet=json_ or not first),
    )
    job, result = execute(registry, request)
    if not first:
        return
    written = write_result(result, out, plot)
    if json_:
        print_json({"schema": 1, **result_json(job, result, written)})
        return
    if result.lines is not None:
        for line in result.lines:
            print(line, flush=True)
    elif result.arrays and out is None:
        _print_arrays(result.arrays)
    _print_summary(result.summary, to_stderr=result.lines is not None and out is None)
    for path in written:
        note(f"wrote {path}")


def _print_arrays(arrays: Mapping[str, Any], limit: int = 20) -> None:
    """Print the first rows of the arrays side by side."""
    from kexue.core.run import to_array

    plain = {name: to_array(a) for name, a in arrays.items()}
    length = max(len(a) if a.ndim else 1 for a in plain.values())
    columns = {n: a for n, a in plain.items() if (len(a) if a.ndim else 1) == length}
    rows = [
        [i, *(_cell(a[i] if a.ndim else a) for a in columns.values())]
        for i in range(min(length, limit))
    ]
    print_table(["row", *columns], rows)
    if length > limit:
        note(f"{length - limit} more rows; `-o FILE` writes all.")


def _cell(value: Any) -> Any:
    from kexue.core.component import PAD

    if value.ndim == 0:
        return value.item()
    if value.ndim == 1 and value.dtype.kind == "i":
        return " ".join(str(x) for x in value.tolist() if x != PAD)
    if value.ndim == 1 and len(value) <= 8:
        return " ".join(f"{x:.4g}" for x in value.tolist())
    return f"{list(value.shape)} numbers"


def _print_summary(summary: Mapping[str, Any], *, to_stderr: bool) -> None:
    from kexue.core.text import format_cell

    if summary and all(isinstance(value, Mapping) for value in summary.values()):
        columns = list(next(iter(summary.values())))
        rows = [[name, *(row[c] for c in columns)] for name, row in summary.items()]
        print_table(["", *(c.replace("_", " ") for c in columns)], rows)
        return
    stream = sys.stderr if to_stderr else sys.stdout
    for key, value in summary.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else format_cell(value)
        print(f"{key.replace('_', ' ')}: {text}", file=stream)
