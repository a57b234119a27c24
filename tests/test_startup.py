"""Start-up: what must answer at once imports nothing heavy, however many plugins there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Ran, Site

HEAVY = ("torch", "numpy", "matplotlib", "accelerate", "sklearn", "jaxtyping", "PIL", "safetensors")
LIGHT = (*HEAVY, "yaml", "pydantic", "rich", "jinja2", "packaging")

CODE = """
import contextlib, io, json, sys
from kexue.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main({args!r})
loaded = [name for name in {names!r} if name in sys.modules]
print(json.dumps([loaded, out.getvalue()]))
"""


def loaded(shell: Callable[..., Ran], *args: str, site: Site | None = None) -> tuple[set[str], str]:
    """Return the heavy packages that a command loads, and what it says."""
    code = CODE.format(args=list(args), names=list(LIGHT))
    ran = shell("-c", code, environment=site.environment if site else None, timeout=30)
    assert ran.status == 0, ran.err
    names, out = json.loads(ran.out)
    return set(names), out


@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("--help",),
        ("show", "loss/zlpr"),
        ("show", "loss/zlpr", "--json"),
        ("run", "loss/zlpr", "--help"),
        ("plugins",),
        ("list", "kinds"),
        ("list", "datasets", "--json"),
    ],
    ids=" ".join,
)
def test_answers_at_once(shell: Callable[..., Ran], args: tuple[str, ...]) -> None:
    names, out = loaded(shell, *args)
    assert out
    assert not names & set(HEAVY)


@pytest.mark.parametrize("args", [("list",), ("--help",), ("plugins",)], ids=" ".join)
def test_loads_no_more_than_it_needs(shell: Callable[..., Ran], args: tuple[str, ...]) -> None:
    assert loaded(shell, *args)[0] == set()


@pytest.mark.parametrize("args", [("list", "--all"), ("show", "crf"), ("list", "--all", "--json")])
def test_reads_the_catalogue_without_anything_else(
    shell: Callable[..., Ran], args: tuple[str, ...]
) -> None:
    assert loaded(shell, *args)[0] == {"yaml"}


def test_answers_at_once_with_forty_plugins(shell: Callable[..., Ran], site: Site) -> None:
    for number in range(40):
        kinds = ("loss", "layer", "decoder")
        ids = [f"{kind}/dummy-{number}" for kind in kinds]
        site.add(
            f"kexue-dummy-{number}",
            site.components(*ids, target=f"kexue_dummy_{number}_method:Method"),
            requires=["kexue>=0.1", "torch>=2"],
        )
        site.write(f"kexue_dummy_{number}_method.py", "raise RuntimeError('imported')")
    names, out = loaded(shell, "list", site=site)
    assert names == set()
    assert out.count("dummy-") >= 3 * 40
    names, out = loaded(shell, "plugins", "--json", site=site)
    states = [row["state"] for row in json.loads(out)["plugins"]]
    assert states.count("ok") >= 40
    assert names == set()


def test_importing_the_package_imports_nothing_heavy(shell: Callable[..., Ran]) -> None:
    names = {*HEAVY, "yaml", "typer", "rich", "pluggy"}
    code = (
        f"import sys, kexue.core, kexue.core.conformance, kexue.core.lab, kexue.core.interfaces\n"
        f"print([name for name in {sorted(names)!r} if name in sys.modules])"
    )
    assert shell("-c", code).out == "[]\n"


def test_no_plugin_is_imported_before_it_is_used(shell: Callable[..., Ran], site: Site) -> None:
    site.add("kexue-noted", "import sys\nprint('NOTED', file=sys.stderr)")
    for args in (("--help",), ("--version",), ("install", "--help"), ("run", "--help"), ()):
        assert "NOTED" not in shell(*(args or ("-h",)), environment=site.environment).err
    assert "NOTED" not in shell("--no-plugins", "list", environment=site.environment).err
    assert "NOTED" in shell("list", environment=site.environment).err
