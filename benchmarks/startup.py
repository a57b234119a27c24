"""What starting the command line costs, beside the bare imports of what it is made of.

The peer is a process that imports typer, rich, yaml and pluggy and nothing else; ours are whole
commands, with the plugins that are installed and with forty more. CPU time of whole processes,
interleaved. The floor is the peer: the aim is 1.5 times that, and 2 times with forty plugins more.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import Row

__all__ = ["rows"]

COMMANDS = (["list"], ["--help"], ["show", "loss/zlpr"])
_IMPORTS = [sys.executable, "-c", "import typer, rich, yaml, pluggy"]
_MAIN = "from kexue.cli import main; main()"  # what the script `kexue` does


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Fewer runs.
    """
    runs = 7 if quick else 25
    with tempfile.TemporaryDirectory() as folder:
        _write_dummies(Path(folder), 40)
        for case, path in (("installed plugins", ""), ("and 40 more", folder)):
            for command in COMMANDS:
                yield _compare(f"kexue {' '.join(command)}", case, command, path, runs)


def _compare(task: str, case: str, command: Sequence[str], path: str, runs: int) -> Row:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": path, "KEXUE_REGISTRY": ""}
    ours = [sys.executable, "-c", _MAIN, *command]
    for _ in range(2):  # writes the byte code
        _cpu_seconds(ours, environment)
        _cpu_seconds(_IMPORTS, environment)
    pairs = [
        (_cpu_seconds(ours, environment), _cpu_seconds(_IMPORTS, environment)) for _ in range(runs)
    ]
    ratios = [peer / mine for mine, peer in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(
        task,
        case,
        "import typer, rich, yaml, pluggy",
        1e3 * statistics.median(mine for mine, _ in pairs),
        1e3 * statistics.median(peer for _, peer in pairs),
        statistics.median(ratios),
        low,
        high,
    )


def _cpu_seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _write_dummies(folder: Path, count: int) -> None:
    """Write plugins as they are installed: a manifest and its metadata."""
    for i in range(count):
        name = f"kexue_dummy_{i:02}"
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "from kexue.core import Component, hookimpl\n\n\n"
            "@hookimpl\ndef kexue_components():\n"
            f'    return [Component("loss", "dummy-{i:02}", "{name}.loss:Dummy", "A dummy.")]\n'
        )
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kexue-dummy-{i:02}\nVersion: 1.0\n"
            "Requires-Dist: kexue>=0.1\n\nA dummy.\n"
        )
        (info / "entry_points.txt").write_text(f"[kexue]\ndummy-{i:02} = {name}\n")


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:22} {row.case:18} {row.ours_ms:7.1f} ms  imports {row.peer_ms:6.1f} ms  "
            f"{1 / row.ratio:.2f} times the imports"
        )
