"""Write the READMEs' tables: plugins from the catalogue, figures from ``results.json``.

``--report reports/report.json`` also writes the verdicts of a ``kexue reproduce`` into the READMEs
of the plugins that it is about.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kexue.core.catalogue import load_yaml

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results.json"

Row = Mapping[str, Any]


def main() -> None:
    """Replace what stands between the markers; with ``--check`` only say if it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; status 1 if it differs")
    parser.add_argument("--report", type=Path, help="report.json of a `kexue reproduce`")
    arguments = parser.parse_args()
    results = json.loads(_RESULTS.read_text(encoding="utf-8"))["benchmarks"]
    catalogue = load_yaml(_ROOT / "registry.yaml")["plugins"]
    sections = {_ROOT / "README.md": {"plugins": _plugins(catalogue), "benchmarks": _all(results)}}
    for slug, row in catalogue.items():
        if slug in results:
            readme = _ROOT / row["path"] / "README.md"
            sections[readme] = {"benchmarks": _timings(results[slug])}
    if arguments.report:
        report = json.loads(arguments.report.read_text(encoding="utf-8"))
        for slug, claims in _claims(report).items():
            readme = _ROOT / catalogue[slug]["path"] / "README.md"
            sections.setdefault(readme, {})["claims"] = claims
    for path, parts in sections.items():
        before = after = path.read_text(encoding="utf-8")
        for name, content in parts.items():
            after = _between(after, name, content)
        if arguments.check and after != before:
            sys.exit(f"{path} is not up to date: run `python benchmarks/readme.py`.")
        if not arguments.check:
            path.write_text(after, encoding="utf-8")


def _between(text: str, name: str, content: str) -> str:
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not found.search(text):
        sys.exit(f"no place for {name}: <!-- {name} --> … <!-- /{name} --> is missing.")
    return found.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plugins(catalogue: Mapping[str, Row]) -> str:
    return _table(
        ["plugin", "post", "components", "what it is"],
        (
            [
                f"[{slug}]({row['path']})",
                f"[{row['post']}](https://kexue.fm/archives/{row['post']})",
                " ".join(f"`{name}`" for name in row["components"]),
                row["summary"],
            ]
            for slug, row in catalogue.items()
            if row["status"] == "available"
        ),
    )


def _all(results: Mapping[str, Row]) -> str:
    """Return one line for each thing that is compared with each peer."""
    groups: dict[tuple[str, str], list[float]] = {}
    for name, benchmark in results.items():
        for row in benchmark["rows"]:
            task = row["task"] if name == "startup" else f"{name}: {row['task']}"
            groups.setdefault((task, row["peer"]), []).append(row["ratio"])
    return _table(
        ["", "beside", "cases", "median ratio", "least", "most"],
        (
            [task, peer, str(len(ratios))]
            + [_short(f(ratios)) for f in (statistics.median, min, max)]
            for (task, peer), ratios in groups.items()
        ),
    )


def _timings(benchmark: Row) -> str:
    where = benchmark["environment"]
    rows = (
        [
            row["task"],
            row["case"],
            _short(row["ours_ms"]),
            row["peer"],
            _short(row["peer_ms"]),
            _short(row["ratio"]),
        ]
        for row in benchmark["rows"]
    )
    table = _table(["", "sizes", "ours, ms", "beside", "its ms", "ratio"], rows)
    return (
        f"Medians on {where['threads']} threads of a CPU, torch {where['torch']}; the ratio is the "
        f"peer's time over ours, pair by pair (`make bench`).\n\n{table}"
    )


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _claims(report: Row) -> dict[str, str]:
    """Return the verdicts by plugin."""
    found: dict[str, list[Sequence[str]]] = {}
    for experiment in report["experiments"]:
        slug = experiment["experiment"].partition("/")[0]
        for claim in experiment["claims"]:
            verdict = "holds" if claim["holds"] else "**fails**"
            row = [claim["statement"], verdict, claim["measured"], claim["expected"]]
            found.setdefault(slug, []).append([cell.replace("|", "\\|") for cell in row])
    return {
        slug: f"`kexue reproduce {slug}`, mean ± standard deviation (least to greatest) over three "
        f"seeds:\n\n{_table(['claim', 'verdict', 'measured', 'expected'], iter(rows))}"
        for slug, rows in found.items()
    }


if __name__ == "__main__":
    main()
