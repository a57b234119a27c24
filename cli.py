"""The command line: words and tables; the work is done in kexue.core."""

from __future__ import annotations

import gc

gc.disable()  # what is imported below is no garbage; looking for it is a tenth of a start

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.core.console.commands import SETTINGS, VERBS, Group, Verb, verb
from kexue.core.console.completion import (
    complete_catalogue,
    complete_components,
    complete_kinds,
    complete_names,
    complete_plugins,
)
from kexue.core.console.listing import (
    component_rows,
    in_catalogue,
    print_components,
    show_component,
    show_plugin,
)
from kexue.core.console.output import (
    note,
    only_json,
    print_facts,
    print_json,
    print_table,
    progress,
)
from kexue.core.console.running import component_command
from kexue.core.errors import KexueError, UsageError, did_you_mean
from kexue.core.registry import registry

__all__ = ["app", "main"]


# -- the commands ---------------------------------------------------------------------------------


_LISTS = {
    "components": ("--kind", "--tag", "--plugin", "--all"),
    "kinds": (),
    "experiments": ("--plugin",),
    "datasets": (),
}
"""What ``kexue list`` lists, each with the options that choose among it."""


def _complete_lists(incomplete: str) -> list[str]:
    return [name for name in _LISTS if name.startswith(incomplete)]


def _print_version(value: bool) -> None:
    if value:
        from importlib import metadata

        print(metadata.version("kexue"))
        raise typer.Exit


_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

app = typer.Typer(
    name="kexue",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


@app.callback()
def _root(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load no plugin.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """The methods of kexue.fm as PyTorch components."""


@verb("list", plain=True)
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="components, kinds, experiments or datasets.", autocompletion=_complete_lists
        ),
    ] = "components",
    *,
    kind: Annotated[
        str | None, typer.Option(help="Only this kind.", autocompletion=complete_kinds)
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    plugin: Annotated[
        str | None, typer.Option(help="Only of this plugin.", autocompletion=complete_plugins)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what is not installed.")] = False,
    json_: _JSON = False,
) -> None:
    """List what is installed."""
    given = {"--kind": kind, "--tag": tag, "--plugin": plugin, "--all": all_}
    if what not in _LISTS:
        raise UsageError(
            f"`kexue list` lists {', '.join(_LISTS)}. Found {what!r}.{did_you_mean(what, _LISTS)}"
        )
    for option in (o for o, value in given.items() if value and o not in _LISTS[what]):
        raise UsageError(f"`{option}` has no use for `kexue list {what}`; leave it out.")
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "components": lambda: component_rows(kind, tag, plugin, everything=all_),
        "kinds": lambda: [
            {"kind": i.kind, "plugin": i.plugin or "kexue", "summary": i.summary}
            for i in registry.interfaces()
        ],
        "experiments": lambda: [
            {"experiment": e.id, "summary": e.summary} for e in registry.experiments(plugin)
        ],
        "datasets": lambda: [
            {"dataset": d.name, "plugin": d.plugin or "kexue", "summary": d.summary}
            for d in registry.datasets()
        ],
    }
    rows = tables[what]()
    broken = [p.slug for p in registry.plugins if p.state == "broken"]
    if json_:
        print_json({"schema": 1, what: rows, "broken": broken})
        return
    if not rows:
        filtered = any(given[option] for option in _LISTS[what])
        hint = "" if all_ else " `kexue list --all` shows what there is."
        print(f"No {what} {'match' if filtered else 'are installed'}.{hint}")
    elif what == "components":
        print_components(rows)
    else:
        print_table(list(rows[0]), [list(row.values()) for row in rows])
    if broken:
        note(f"Broken: {', '.join(broken)}. `kexue plugins` says why.")


@verb("show", plain=True)
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component, a plugin, or a post.",
            autocompletion=complete_components,
        ),
    ],
    *,
    json_: _JSON = False,
) -> None:
    """Say what a component, a plugin or a post is."""
    installed = any(name in {p.slug, p.owner} for p in registry.plugins)
    is_id = bool({"/", ":"} & set(name)) and "/archives/" not in name
    if installed or (not is_id and in_catalogue(name)):
        show_plugin(name, json_=json_)
    else:
        show_component(registry.get(name), json_=json_)


for _name, _text in (("run", "Run a component on files."), ("fit", "Train a component on data.")):
    VERBS[_name] = Verb(
        _name,
        f"{_text}\n\n`kexue {_name} COMPONENT --help` says what it takes.",
        partial(component_command, _name),
    )


# -- the other commands ----------------------------------------------------------------------------


@verb("reproduce")
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAMES", help="Plugins or experiments.", autocompletion=complete_plugins
        ),
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="All installed experiments.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller version of the same.")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the page.")] = Path(
        "reports"
    ),
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Processes side by side.", metavar="N")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, xpu.")] = "auto",
    json_: _JSON = False,
) -> None:
    """Measure what posts claim; write a page of verdicts and plots."""
    from kexue.core.experiments import find_experiments, to_json

    if not names and not all_:
        raise UsageError(
            "`kexue reproduce` needs plugins, such as `kexue reproduce memm`, or `--all`."
        )
    experiments = find_experiments(registry, [] if all_ else names or [])
    if not experiments:
        raise UsageError("No experiments are installed. `kexue list --all` shows the plugins.")
    from kexue.core.device import resolve_device
    from kexue.core.report import write_report
    from kexue.core.workers import run_experiments

    where, bars = resolve_device(device), progress(quiet=json_)
    outcomes = run_experiments(
        experiments, registry, device=where, quick=quick, jobs=jobs, progress=bars
    )
    command = " ".join(["kexue reproduce", *(names or ["--all"]), *(["--quick"] if quick else [])])
    page = write_report(outcomes, out, command=command, quick=quick, jobs=jobs)
    if json_:
        print_json({"schema": 1, "page": str(page), "experiments": [to_json(o) for o in outcomes]})
    else:
        _print_outcomes(outcomes)
        print(f"\n{page.resolve()}")
    failed = [o for o in outcomes if o.error is not None]
    if failed:
        for outcome in failed:
            note(f"{outcome.experiment.id} failed: {type(outcome.error).__name__}: {outcome.error}")
        if _DEBUG:
            raise failed[0].error or RuntimeError
        raise typer.Exit(1)


def _print_outcomes(outcomes: Sequence[Any]) -> None:
    rows = [
        [o.experiment.id, "✔ holds" if c.holds else "✘ fails", c.statement, c.measured]
        for o in outcomes
        for c in (o.report.claims if o.report else ())
    ]
    print_table(["experiment", "verdict", "claim", "measured"], rows)


@verb("plugins", plain=True)
def plugins(*, json_: _JSON = False) -> None:
    """List the plugins: state, and why one is broken."""
    rows = [
        {
            "plugin": p.slug,
            "version": p.version,
            "distribution": p.owner,
            "state": p.state,
            "components": len(p.components),
            "seconds": round(p.seconds, 4),
            "imports": list(p.heavy),
            "reason": p.reason,
        }
        for p in registry.plugins
    ]
    if json_:
        print_json({"schema": 1, "plugins": rows})
        return
    if not rows:
        print("No plugins are installed. `kexue list --all` shows what there is.")
        return
    shown = ["plugin", "version", "distribution", "state", "note"]
    print_table(shown, [[*(row[c] for c in shown[:4]), _plugin_note(row)] for row in rows])


def _plugin_note(row: Mapping[str, Any]) -> str:
    count = row["components"]
    notes = [row["reason"] or f"{count} component{'' if count == 1 else 's'}"]
    if row["imports"]:
        notes.append(f"its manifest imports {', '.join(row['imports'])}: every command pays for it")
    if row["seconds"] > 0.5:
        notes.append(f"importing it takes {row['seconds']:.1f} s")
    return "; ".join(notes)


@verb("install")
def install(
    slugs: Annotated[
        list[str],
        typer.Argument(metavar="PLUGINS", help="Plugins.", autocompletion=complete_catalogue),
    ],
    *,
    editable: Annotated[
        bool, typer.Option("--editable", help="Follow changes in the checkout.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the command.")] = False,
    json_: _JSON = False,
) -> None:
    """Install plugins of the catalogue, and what they import."""
    from kexue.core.packages import install_command

    _run_or_show(
        install_command(slugs, editable=editable), slugs, "installed", dry_run=dry_run, json_=json_
    )


@verb("uninstall")
def uninstall(
    slugs: Annotated[
        list[str],
        typer.Argument(metavar="PLUGINS", help="Plugins.", autocompletion=complete_plugins),
    ],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the command.")] = False,
    json_: _JSON = False,
) -> None:
    """Remove plugins, broken ones too."""
    from kexue.core.packages import uninstall_command

    _run_or_show(uninstall_command(slugs, registry), slugs, "removed", dry_run=dry_run, json_=json_)


def _run_or_show(
    command: list[str], slugs: list[str], done: str, *, dry_run: bool, json_: bool
) -> None:
    from kexue.core.packages import run_command

    if not dry_run:
        run_command(command)
    if json_:
        print_json({"schema": 1, "command": command, "plugins": slugs, "done": not dry_run})
    else:
        print(" ".join(command) if dry_run else f"{', '.join(slugs)} {done}.")


@verb("new")
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the component, like 'focal-loss'.")
    ],
    *,
    kind: Annotated[
        str,
        typer.Option(help="loss, optimizer, decoder, sampler, …", autocompletion=complete_kinds),
    ] = "loss",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make it in.")] = Path(),
    json_: _JSON = False,
) -> None:
    """Start a plugin that installs, and passes `kexue check`."""
    from kexue.core.scaffold import new_plugin

    folder, files = new_plugin(name, registry.interface(kind), out)
    if json_:
        print_json({"schema": 1, "folder": str(folder), "files": [str(f) for f in files]})
        return
    for file in files:
        print(file)
    print(f"\nNext:\n  pip install -e {folder}\n  kexue check {name}\n  kexue show {kind}/{name}")


@verb("check")
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAMES",
            help="Plugins or components; all by default.",
            autocompletion=complete_names,
        ),
    ] = None,
    *,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also what passed.")] = False,
    json_: _JSON = False,
) -> None:
    """Check that plugins keep the contracts."""
    from kexue.core.conformance import check_all

    bars = progress(quiet=json_)
    found = check_all(registry, names or [], progress=bars)
    failed = [c for c in found if c.state == "failed"]
    if json_:
        print_json({"schema": 1, "checks": [c._asdict() for c in found], "passed": not failed})
    else:
        shown = [c for c in found if verbose or c.state == "failed"]
        if shown:
            print_table(
                ["component", "check", "state", "why"],
                [[c.subject, c.name, c.state, c.reason] for c in shown],
            )
        passed = sum(c.state == "passed" for c in found)
        skipped = sum(c.state == "skipped" for c in found)
        print(f"{passed} passed, {len(failed)} failed, {skipped} do not apply.")
    if failed:
        raise typer.Exit(1)


@verb("env")
def env(*, json_: _JSON = False) -> None:
    """Show versions, devices, plugins: for bug reports."""
    from kexue.core.environment import full_environment

    facts = full_environment(registry)
    if json_:
        print_json({"schema": 1, **facts})
        return
    print_facts(
        {
            **{name: value for name, value in facts.items() if isinstance(value, str)},
            "packages": ", ".join(f"{k} {v}" for k, v in facts["packages"].items()),
            "registry": ", ".join(facts["registry_files"]) or "no registry files",
        }
    )
    if facts["plugins"]:
        print()
        rows = [
            [
                p["plugin"],
                p["version"],
                p["state"],
                p["milliseconds"],
                ", ".join(p["imports"]) or p["reason"],
            ]
            for p in facts["plugins"]
        ]
        print_table(["plugin", "version", "state", "import ms", "heavy imports"], rows)


# -- the way in -----------------------------------------------------------------------------------

_DEBUG = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0 done, 1 it failed, 2 the call was wrong."""
    global _DEBUG  # noqa: PLW0603 -- one process, one command line
    args = list(sys.argv[1:] if argv is None else argv)
    _DEBUG = _take(args, "--debug")
    if _take(args, "--no-plugins"):
        os.environ["KEXUE_DISABLE"] = "*"
        registry.refresh()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal cannot show must not end the work
            stream.reconfigure(errors="replace")
    if argv is None:  # this process is ours
        signal.signal(signal.SIGTERM, _terminate)
    quiet = "--json" in args and not {"-h", "--help"} & set(args)
    gc.disable()  # until a command that works for longer is built
    try:
        with only_json() if quiet else nullcontext():
            app(args, prog_name="kexue")
    except KexueError as error:
        _fail(error, error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 -- one sentence for the user, whatever it was
        _fail(error, 1, prefix=f"{type(error).__name__}: ", hint=" `--debug` shows the traceback.")
    finally:
        if argv is not None:  # else the process ends here, and need not look for garbage either
            gc.enable()


def _terminate(number: int, frame: Any) -> None:
    """Leave as an exception does, so that half-written files are removed."""
    del frame
    raise SystemExit(128 + number)


def _take(args: list[str], switch: str) -> bool:
    """Remove a global switch wherever it stands before ``--``."""
    end = args.index("--") if "--" in args else len(args)
    found = [i for i in range(end) if args[i] == switch]
    for i in reversed(found):
        del args[i]
    return bool(found)


def _fail(error: BaseException, status: int, *, prefix: str = "", hint: str = "") -> None:
    if _DEBUG:
        import traceback

        traceback.print_exception(error)
    text = " ".join(str(error).split()) or "no message"
    text += "" if text.endswith((".", "?", "!", "`")) else "."
    print(f"Error: {prefix}{text}{'' if _DEBUG else hint}", file=sys.stderr)
    sys.exit(status)


gc.enable()

if __name__ == "__main__":
    main()
