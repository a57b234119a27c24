"""Every code block of the README and the guides does what it says.

``console`` blocks hold commands after ``$`` and what they print, where ``…`` stands for anything;
``python`` blocks share one namespace per document; a block after ``<!-- file: name -->`` is written
to that file. Commands run in an environment of their own on top of the one that runs the tests, in
an empty folder; ``make`` only says what it would do, and what takes minutes takes ``--quick``.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(ROOT.glob("plugins/*/README.md"))
SLOW = ("kexue reproduce memm crf zlpr",)

_BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# no network: what is to be installed is here, or below
_PIP = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class Block(NamedTuple):
    """A fenced block."""

    line: int
    file: str
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(text[: m.start("text")].count("\n"), m["file"] or "", m["language"], m["text"])
        for m in _BLOCK.finditer(text)
    ]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block and what it is to print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output.strip("\n")


def pattern(output: str) -> str:
    """Return a regular expression for output in which ``…`` stands for anything."""
    lines = [
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line).replace("…", ".*") + r"[ \t]*\n"
        for line in output.splitlines()
    ]
    return "".join(lines)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment on top of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    below = [path for path in site.getsitepackages() if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in below]
    (packages / "below.pth").write_text("\n".join(lines), encoding="utf-8")
    programs = {
        "kexue": 'python -m kexue.cli "$@"',
        "pip": 'python -m pip "$@"',
        "make": f'{shutil.which("make")} --dry-run --directory {ROOT} "$@" > /dev/null',
    }
    for name, line in programs.items():
        program = folder / "bin" / name
        program.write_text(
            f"#!/bin/sh\nexec {line}\n" if name != "make" else f"#!/bin/sh\n{line}\n"
        )
        program.chmod(0o755)
    return folder / "bin"


class Reader:
    """Someone who follows a document from its beginning.

    Args:
        folder: Where they work.
        binaries: Their programs.
    """

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder = folder
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.environment = {**os.environ, **_PIP}
        self.environment["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"

    def follow(self, block: Block) -> None:
        if block.file:
            place = self.folder / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"line {block.line}", "exec"), self.namespace)  # noqa: S102
        else:
            for command, output in commands(block.text):
                self.type(command, output)

    def type(self, command: str, wanted: str) -> None:
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self.environment[name] = value
            return
        if command.startswith(SLOW):
            command += " --quick"
        done = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=900,
            cwd=self.folder,
            env=self.environment,
        )
        as_told = not wanted or re.fullmatch(pattern(wanted), done.stdout.rstrip("\n") + "\n")
        if (done.returncode != 0) != ("Error:" in wanted) or not as_told:
            pytest.fail(f"status {done.returncode}\n$ {command}\n{done.stdout}", pytrace=False)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_does_what_it_says(
    path: Path, tmp_path: Path, binaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("pip install . " in block.text for block in blocks(path)):
        _copy_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, binaries)
    for block in blocks(path):
        reader.follow(block)


def _copy_sources(folder: Path) -> None:
    """Copy what is packaged, so that building leaves nothing behind in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("core", "plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_every_block_is_one_that_is_executed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = blocks(path)
    assert text.count("\n```") == 2 * len(found)
    for block in found:
        executed = block.language in {"python", "console"} or block.file
        assert executed, f"line {block.line}: a block of {block.language!r} is not executed"
        if block.language == "console":
            assert block.text.startswith("$ ")


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_lead_somewhere(path: Path) -> None:
    prose = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", prose):
        assert (path.parent / target).exists(), target


def test_the_first_python_example_is_short() -> None:
    first = next(b for b in blocks(ROOT / "README.md") if b.language == "python")
    assert len(first.text.splitlines()) <= 10


def test_tables_of_the_readme_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
