"""Installing and removing: the command that is run, for whatever state a plugin is in."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kexue.core import Component, packages
from kexue.core.catalogue import Entry
from kexue.core.errors import ComponentConflictError, ComponentNotFoundError, WorkError
from kexue.core.packages import install_command, run_command, uninstall_command
from kexue.core.registry import Registry

if TYPE_CHECKING:
    from tests.conftest import Ran, Site

PIP = [sys.executable, "-m", "pip"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder outside any checkout, for a kexue that was installed from a wheel."""
    monkeypatch.setattr(Entry, "folder", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)


def checkout(folder: Path, *slugs: str) -> None:
    (folder / "registry.yaml").write_text("", encoding="utf-8")
    for slug in slugs:
        (folder / "plugins" / slug).mkdir(parents=True)
        (folder / "plugins" / slug / "pyproject.toml").write_text("", encoding="utf-8")


@pytest.mark.usefixtures("elsewhere", "nothing_installed")
def test_installs_by_distribution_with_what_is_imported() -> None:
    assert install_command(["memm"]) == [*PIP, "install", "kexue-crf", "kexue-memm"]
    assert install_command(["7213"]) == install_command(["kexue-memm"])
    assert install_command(["zlpr", "crf"]) == [*PIP, "install", "kexue-zlpr", "kexue-crf"]


@pytest.mark.usefixtures("elsewhere")
def test_leaves_what_is_imported_and_installed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: name)
    assert install_command(["memm"]) == [*PIP, "install", "kexue-memm"]
    assert install_command(["memm", "crf"]) == [*PIP, "install", "kexue-crf", "kexue-memm"]


@pytest.mark.usefixtures("nothing_installed")
def test_installs_from_the_checkout_around_the_working_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(elsewhere, "crf")
    crf = str(elsewhere / "plugins" / "crf")
    monkeypatch.chdir(crf)
    assert install_command(["memm"]) == [*PIP, "install", crf, "kexue-memm"]
    assert install_command(["crf"], editable=True) == [*PIP, "install", "--editable", crf]


@pytest.mark.usefixtures("nothing_installed")
def test_installs_from_the_checkout_that_kexue_runs_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path, "crf")
    monkeypatch.setattr("kexue.core.catalogue._ROOT", tmp_path)
    assert install_command(["crf"])[-1] == str(tmp_path / "plugins" / "crf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cfr", r"No plugin named 'cfr' is in the catalogue. Did you mean 'crf'\?"),
        (
            "vae-density",
            "The plugin 'vae-density' is planned and not yet written; .*kexue.fm/archives/8791.",
        ),
    ],
)
def test_refuses_what_cannot_be_installed(name: str, message: str) -> None:
    with pytest.raises(ComponentNotFoundError, match=message):
        install_command([name])


def test_removes_plugins_in_whatever_state(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("kexue-sound")
    site.add("kexue-broken", "raise RuntimeError")
    site.add("kexue-off")
    monkeypatch.setenv("KEXUE_DISABLE", "off")
    registry = Registry()
    for slug in ("sound", "broken", "off"):
        wanted = [*PIP, "uninstall", f"kexue-{slug}", "--yes"]
        assert uninstall_command([slug], registry) == wanted
        assert uninstall_command([f"kexue-{slug}"], registry) == wanted


def test_removes_nothing_by_a_name_of_two(site: Site) -> None:
    site.add("kexue-twin")
    site.add("other-twin", slug="twin")
    with pytest.raises(ComponentConflictError, match="kexue-twin and of other-twin"):
        uninstall_command(["twin"], Registry())
    assert uninstall_command(["other-twin"], Registry())[-2] == "other-twin"


def test_removes_only_distributions() -> None:
    registry = Registry(discover=False)
    registry.register(Component("loss", "x", "a:b", "One."), slug="mine", owner="a notebook")
    with pytest.raises(
        ComponentNotFoundError, match="is registered by a notebook; remove it there"
    ):
        uninstall_command(["mine"], registry)
    with pytest.raises(ComponentNotFoundError, match="The plugin 'crf' is not installed"):
        uninstall_command(["crf"], registry)


def test_works_without_pip(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("kexue-sound")
    registry = Registry()
    assert registry.plugin("sound").state == "ok"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/uv")
    uv = ["uv", "pip", "uninstall", "--python", sys.executable]
    assert uninstall_command(["sound"], registry) == [*uv, "kexue-sound"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(WorkError, match=r"has no pip. Run `.* -m ensurepip`, or install uv."):
        install_command(["crf"])


def test_runs_a_command_with_its_words_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    run_command([sys.executable, "-c", "print('working')"])
    assert capfd.readouterr() == ("", "working\n")
    with pytest.raises(WorkError, match=r"-c raise SystemExit\(3\)` failed with status 3"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"])


# -- the commands ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere", "nothing_installed")
def test_shows_what_it_would_do(kexue: Callable[..., Ran]) -> None:
    command = f"{sys.executable} -m pip install kexue-crf kexue-memm"
    assert kexue("install", "memm", "--dry-run") == (0, f"{command}\n", "")


def test_says_what_it_has_done(
    kexue: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    site.add("kexue-sound")
    ran: list[list[str]] = []
    monkeypatch.setattr(packages, "run_command", ran.append)
    assert kexue("uninstall", "sound") == (0, "sound removed.\n", "")
    assert kexue("install", "crf").out == "crf installed.\n"
    assert [command[3] for command in ran] == ["uninstall", "install"]


def test_a_command_that_fails_is_an_error(
    kexue: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str]) -> None:
        raise WorkError(f"`{command[-1]}` failed with status 1.")

    monkeypatch.setattr(packages, "run_command", fail)
    ran = kexue("install", "crf", "--json")
    assert (ran.status, ran.out) == (1, "")
    assert "failed with status 1" in ran.err
