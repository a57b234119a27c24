"""Run all benchmarks, print medians and ratios, and write ``results.json`` beside this file."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

from harness import Row

from kexue.core.environment import environment
from kexue.core.files import write_json

__all__ = ["main"]

NAMES = (
    "startup",
    "adafactor",
    "adax",
    "bert-sampling",
    "bidirectional-decoding",
    "consistent-decoding",
    "crf",
    "derived-optimizers",
    "exposure-bias",
    "integrated-gradients",
    "lookahead",
    "memm",
    "momentum",
    "nice",
    "nystromformer",
    "repetition",
    "search-sampling",
    "trie-decoding",
    "wrd",
    "zlpr",
)
_RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Run what the command line asks for; without names, everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="all by default")
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and runs; writes nothing"
    )
    arguments = parser.parse_args()
    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {"benchmarks": {}}
    for name in arguments.names or NAMES:
        print(f"\n{name}")
        rows = []
        for row in importlib.import_module(name.replace("-", "_")).rows(quick=arguments.quick):
            rows.append(row)
            print(_line(row), flush=True)
        results["benchmarks"][name] = {
            "environment": environment(),
            "rows": [asdict(r) for r in rows],
        }
    if not arguments.quick:
        write_json(_RESULTS, results)
        print(f"\nwrote {_RESULTS.name}")


def _line(row: Row) -> str:
    return (
        f"{row.task:26} {row.case:30} {row.ours_ms:9.2f} ms  {row.peer_ms:9.2f} ms  "
        f"× {row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
    )


if __name__ == "__main__":
    main()
