"""Made-up distributions, the command line in this process and in another."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from kexue.core.registry import registry

# before any test module is imported: nobody's own registry files and switches matter here
NOWHERE = str(Path(tempfile.gettempdir()) / "kexue-tests-have-no-configuration")
os.environ["XDG_CONFIG_HOME"] = NOWHERE
for name in ("KEXUE_REGISTRY", "KEXUE_DISABLE"):
    os.environ.pop(name, None)

HEADER = "from kexue.core import Component, Dataset, Experiment, Interface, hookimpl\n"


class Ran(NamedTuple):
    """What became of a command."""

    status: int
    out: str
    err: str


class Site:
    """A folder on ``sys.path`` with made-up distributions.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        name: str,
        source: str | None = None,
        *,
        slug: str | None = None,
        value: str | None = None,
        version: str = "1.0",
        requires: Iterable[str] = (),
        entry_points: str | None = None,
    ) -> str:
        """Make a distribution up and return its slug.

        Args:
            name: The distribution, such as ``kexue-good``.
            source: Its module; by default one with a component ``loss/<slug>``.
            slug: The name of its entry point.
            value: The value of its entry point.
            version: Its version.
            requires: What it requires.
            entry_points: The text of its entry_points.txt.
        """
        slug = slug or name.removeprefix("kexue-")
        module = f"{name.replace('-', '_')}"
        text = f"[kexue]\n{slug} = {value or module}\n" if entry_points is None else entry_points
        header = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        header += [f"Requires-Dist: {requirement}" for requirement in requires]
        info = f"{module}-{version}.dist-info"
        self.write(f"{info}/METADATA", "\n".join(header) + "\n\nA description.\n")
        self.write(f"{info}/entry_points.txt", text)
        if source is None:
            source = self.components(f"loss/{slug}", target=f"{module}_method:Method")
        self.write(f"{module}.py", HEADER + textwrap.dedent(source))
        return slug

    @staticmethod
    def components(*ids: str, target: str = "kexue_method:Method") -> str:
        """Return the source of a hook that returns components."""
        rows = [f"Component({i.partition('/')[0]!r}, {i.partition('/')[2]!r}, {target!r}, 'One.')"
                for i in ids]  # fmt: skip
        return f"@hookimpl\ndef kexue_components():\n    return [{', '.join(rows)}]\n"

    def write(self, path: str, text: str | bytes) -> Path:
        """Write a file."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        importlib.invalidate_caches()
        return file

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that sees the distributions."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}


@pytest.fixture(autouse=True)
def _switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what ``--no-plugins`` sets, and let nothing say how wide a terminal is."""
    monkeypatch.setenv("KEXUE_DISABLE", "")
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder on ``sys.path`` in which distributions can be made up."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def kexue(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """The command line in this process, as if it had just started."""
    from kexue.cli import main

    def run(*args: str) -> Ran:
        registry.refresh()
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(args)
        code = exit_.value.code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    yield run
    registry.refresh()


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Ran]:
    """The command line, or Python, in another process."""

    def run(
        *args: str,
        module: str = "kexue.cli",
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> Ran:
        how = [] if args[0] == "-c" else ["-m", module]
        done = subprocess.run(
            [python, *how, *args],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=tmp_path,
            env=environment,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
