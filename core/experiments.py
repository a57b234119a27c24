"""Experiments: what a post claims, measured, with the verdict computed from the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from kexue.core.component import Experiment
from kexue.core.errors import ComponentNotFoundError
from kexue.core.job import Progress, Quiet
from kexue.core.loading import load_target
from kexue.core.registry import Registry

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure as Canvas

__all__ = [
    "Claim",
    "Context",
    "Figure",
    "Outcome",
    "Report",
    "Table",
    "find_experiments",
    "run_experiment",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """One assertion of a post or paper and what became of it.

    Args:
        statement: What is claimed, in one sentence.
        source: Where, for example the post's address and section.
        measured: The figures, with their spread over seeds.
        expected: What they would have to be.
        holds: The verdict, computed from the measurement.
    """

    statement: str
    source: str
    measured: str
    expected: str
    holds: bool


@dataclass(frozen=True)
class Table:
    """Figures in rows.

    Args:
        title: What they are.
        columns: The header.
        rows: The cells; numbers are shown with sensible digits.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """A picture.

    Args:
        title: What it shows.
        plot: Draws it into an empty matplotlib figure.
        caption: What to see in it.
    """

    title: str
    plot: Callable[[Canvas], object]
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Args:
        claims: The verdicts.
        tables: The figures behind them.
        figures: Pictures.
        notes: What a reader should know: the data, the sizes, deviations.
    """

    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()


@dataclass
class Context:
    """What an experiment may use.

    Args:
        device: Where to work.
        quick: Whether to run the smaller version of the same code.
        progress: Where to report.
        cache: Shared by the experiments of one call, for what several of them need.
    """

    device: torch.device
    quick: bool = False
    progress: Progress = field(default_factory=Quiet)
    cache: dict[Any, Any] = field(default_factory=dict)

    def pick(self, full: T, quick: T) -> T:
        """Return ``quick`` in the smaller version, else ``full``."""
        return quick if self.quick else full

    @property
    def seeds(self) -> tuple[int, ...]:
        """Three seeds; never fewer, so that every figure has a spread."""
        return (0, 1, 2)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` returned when ``key`` was first asked for."""
        if key not in self.cache:
            self.cache[key] = make()
        found: T = self.cache[key]
        return found


@dataclass(frozen=True)
class Outcome:
    """An experiment that was run.

    Args:
        experiment: Which.
        report: What it found; None if it failed.
        error: Why it failed.
        seconds: How long it took.
    """

    experiment: Experiment
    report: Report | None
    error: BaseException | None
    seconds: float


def find_experiments(registry: Registry, names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of some plugins (``memm``), or single ones (``memm/segmentation``).

    Args:
        registry: Where to look.
        names: Plugins and experiments; all installed ones if empty.

    Raises:
        ComponentNotFoundError: If a plugin is not installed or has no such experiment.
    """
    if not names:
        return registry.experiments()
    found: dict[str, Experiment] = {}
    for name in names:
        slug, _, single = name.partition("/")
        plugin = registry.plugin(slug)
        rows = [e for e in registry.experiments(plugin.slug) if single in {"", e.name}]
        if not rows:
            why = f" It is {plugin.state}: {plugin.reason}" if plugin.state != "ok" else ""
            known = ", ".join(e.id for e in registry.experiments(plugin.slug))
            raise ComponentNotFoundError(
                f"No experiment named {name!r} is installed.{why}"
                + (f" The plugin has: {known}." if known else ""),
                name=name,
            )
        found.update({e.id: e for e in rows})
    return list(found.values())


def run_experiment(experiment: Experiment, context: Context) -> Outcome:
    """Run one experiment; what goes wrong becomes part of the outcome.

    Args:
        experiment: Which.
        context: What it may use.
    """
    import torch

    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        report = _checked(load_target(experiment.target)(context), experiment)
    except Exception as error:  # noqa: BLE001 -- one experiment must not take the others down
        return Outcome(experiment, None, error, time.perf_counter() - start)
    return Outcome(experiment, report, None, time.perf_counter() - start)


def _checked(found: Any, experiment: Experiment) -> Report:
    if not isinstance(found, Report):
        raise TypeError(f"{experiment.target} must return a Report. Found {type(found).__name__}.")
    return found


def to_json(outcome: Outcome) -> Mapping[str, Any]:
    """Return an outcome as plain data."""
    report = outcome.report
    return {
        "experiment": outcome.experiment.id,
        "summary": outcome.experiment.summary,
        "references": list(outcome.experiment.references),
        "seconds": round(outcome.seconds, 3),
        "error": None
        if outcome.error is None
        else f"{type(outcome.error).__name__}: {outcome.error}",
        "claims": [vars(c) for c in report.claims] if report else [],
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
            for t in (report.tables if report else ())
        ],
        "notes": list(report.notes) if report else [],
    }
