"""Two implementations side by side in one process: interleaved, medians, the ratio pair by pair."""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

__all__ = ["Row", "compare", "peak_megabytes", "transformer_shapes"]


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Args:
        task: What is computed.
        case: The sizes.
        peer: What ours is compared with.
        ours_ms: Median milliseconds per call, ours.
        peer_ms: Median milliseconds per call, the peer's.
        ratio: Median over the pairs of peer / ours: above 1, ours is faster.
        low: Lower quartile of the ratio.
        high: Upper quartile of the ratio.
    """

    task: str
    case: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    low: float
    high: float


def compare(
    task: str,
    case: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    pairs: int = 15,
    warmup: int = 2,
    budget_s: float = 20.0,
) -> Row:
    """Time ``ours`` and ``peer`` in turn.

    A pair is one call of each, so that a change in the machine's speed meets both. Fast calls are
    repeated within a pair until they take at least 5 ms.

    Args:
        task: What is computed.
        case: The sizes.
        ours: Our implementation, called without arguments.
        peer: The peer's implementation of the same.
        peer_name: Who the peer is.
        pairs: How many pairs at most.
        warmup: Calls of each before the first pair.
        budget_s: Stop after this many seconds, with at least five pairs.
    """

    def seconds(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    repeats = []
    for call in (ours, peer):
        for _ in range(warmup):
            call()
        repeats.append(max(1, round(0.005 / max(seconds(call, 1), 1e-9))))
    gc.collect()
    gc.disable()
    measured: list[tuple[float, float]] = []
    deadline = time.perf_counter() + budget_s
    try:
        while len(measured) < pairs and (len(measured) < 5 or time.perf_counter() < deadline):
            measured.append((seconds(ours, repeats[0]), seconds(peer, repeats[1])))
    finally:
        gc.enable()
    ratios = [theirs / mine for mine, theirs in measured]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(
        task,
        case,
        peer_name,
        1e3 * statistics.median(mine for mine, _ in measured),
        1e3 * statistics.median(theirs for _, theirs in measured),
        statistics.median(ratios),
        low,
        high,
    )


def peak_megabytes(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Return by how much a call raises the peak of the memory of a fresh process.

    Args:
        prepare: Makes the call, of inputs that do not count; a function of a module.
        arguments: What it is given.
    """
    with get_context("spawn").Pool(1) as fresh:  # a process that has not held more before
        return fresh.apply(_raised, (prepare, arguments))


def _raised(prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> float:
    call = prepare(*arguments)
    with contextlib.suppress(OSError):  # Linux: the peak starts again from what is held now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_bytes()
    call()
    return (_peak_bytes() - before) / 1e6


def _peak_bytes() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held, too
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return 1024 * float(line.split()[1])
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(usage if sys.platform == "darwin" else 1024 * usage)


def transformer_shapes(
    width: int = 384, layers: int = 12, vocabulary: int = 9000
) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of a transformer: 25 M numbers in 147 tensors.

    Args:
        width: Of the residual stream; the inner one is four times as wide.
        layers: How many blocks.
        vocabulary: Rows of the embedding.
    """
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention: list[tuple[int, ...]] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    inner: list[tuple[int, ...]] = [
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(vocabulary, width), *(norm + attention + norm + inner) * layers, *norm]
