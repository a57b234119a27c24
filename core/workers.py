"""Many experiments: one after the other, or side by side in processes of their own.

Side by side, a unit of work is what may share results in :attr:`Context.cache`: the experiments of
a plugin, and of the plugins that it requires. A process gets its next unit when it is through with
one. Pictures are drawn there, because what draws them cannot always be sent. Where a process dies,
the rest of its unit has failed, and another process goes on with the next.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

from kexue.core.component import Experiment
from kexue.core.errors import KexueError
from kexue.core.experiments import Context, Outcome, run_experiment
from kexue.core.job import Progress, Quiet
from kexue.core.registry import Registry

if TYPE_CHECKING:
    import torch

__all__ = ["WorkerError", "run_experiments", "units"]

Unit = Sequence[Experiment]


class WorkerError(KexueError):
    """A process ended before its experiments did."""


def run_experiments(
    experiments: Sequence[Experiment],
    registry: Registry,
    *,
    device: torch.device,
    quick: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run experiments; what goes wrong in one becomes part of its outcome.

    Args:
        experiments: Which, each once.
        registry: Where they come from.
        device: Where to work.
        quick: Whether to run the smaller versions.
        jobs: How many processes work side by side, each with its share of torch's threads. With
            more than one, times that experiments measure are those of a busy machine. A script
            that asks for them needs ``if __name__ == "__main__"``, as multiprocessing does.
        progress: Where to report; nowhere by default.

    Returns:
        An outcome per experiment, in their order.
    """
    told = progress or Quiet()
    with told.task("experiments", len(experiments)) as bar:
        if jobs > 1:
            found = _side_by_side(units(experiments, registry), device, quick, jobs, told)
        else:
            found = _one_by_one(experiments, Context(device, quick=quick, progress=told))
        outcomes = {}
        for outcome in found:
            outcomes[outcome.experiment.id] = outcome
            bar.advance()
    return [outcomes[experiment.id] for experiment in experiments]


def _one_by_one(experiments: Sequence[Experiment], context: Context) -> Iterator[Outcome]:
    for experiment in experiments:
        context.progress.say(f"{experiment.id}: {experiment.summary}")
        yield run_experiment(experiment, context)


def units(experiments: Sequence[Experiment], registry: Registry) -> list[list[Experiment]]:
    """Divide experiments into those that may share results.

    Args:
        experiments: Some experiments.
        registry: Where they come from; it knows the plugins' distributions.
    """
    owners = {e.plugin: _normal(registry.plugin(e.plugin).owner) for e in experiments}
    together = {slug: {slug} for slug in owners}
    for slug, owner in owners.items():
        needed = _requirements(owner)
        for other in (o for o, name in owners.items() if name in needed):
            joined = together[slug] | together[other]
            together.update(dict.fromkeys(joined, joined))
    found: dict[frozenset[str], list[Experiment]] = {}
    for experiment in experiments:
        found.setdefault(frozenset(together[experiment.plugin]), []).append(experiment)
    return list(found.values())


def _requirements(distribution: str) -> set[str]:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(distribution) or ()
    except metadata.PackageNotFoundError:  # it is a file
        return set()
    needed = map(Requirement, lines)
    return {_normal(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _side_by_side(
    work: Sequence[Unit],
    device: torch.device,
    quick: bool,
    jobs: int,
    progress: Progress,
) -> Iterator[Outcome]:
    import torch

    settings = str(device), quick, max(1, torch.get_num_threads() // jobs)
    waiting = list(reversed(work))
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker.start(settings))
                workers[-1].give(waiting.pop())
            for worker in _ready(workers):
                yield from worker.hear(progress)
                if worker.rest:
                    continue
                if waiting and worker.alive:
                    worker.give(waiting.pop())
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    found = wait([worker.pipe for worker in workers])
    return [worker for worker in workers if worker.pipe in found]


@dataclass(eq=False)
class _Worker:
    """A process, seen from the one that started it.

    Args:
        process: The process.
        pipe: This end of what connects the two.
        rest: What it has been given and has not finished.
        alive: Whether it has not died.
    """

    process: SpawnProcess
    pipe: Connection
    rest: list[Experiment] = field(default_factory=list)
    alive: bool = True

    @classmethod
    def start(cls, settings: tuple[str, bool, int]) -> _Worker:
        spawning = multiprocessing.get_context("spawn")  # a forked torch may hang
        ours, theirs = spawning.Pipe()
        process = spawning.Process(target=_serve, args=(theirs, *settings), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, unit: Unit) -> None:
        self.rest = list(unit)
        self.pipe.send(self.rest)

    def hear(self, progress: Progress) -> Iterator[Outcome]:
        """Take one message; yield the outcomes that it tells of."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            self.alive, lost, self.rest = False, self.rest, []
            for experiment in lost:
                why = f"Its process ended with exit code {self.process.exitcode}."
                yield Outcome(experiment, None, WorkerError(why), 0.0)
            return
        if isinstance(message, str):
            progress.say(message)
        else:
            self.rest.pop(0)
            yield message

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


class _Telling(Quiet):
    """Progress that sends its lines to the first process, and shows no bars."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def say(self, text: str) -> None:
        self.pipe.send(text)


def _serve(pipe: Connection, device: str, quick: bool, threads: int) -> None:
    """Run units until there is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    import torch

    torch.set_num_threads(threads)
    while True:
        context = Context(torch.device(device), quick=quick, progress=_Telling(pipe))
        for outcome in _one_by_one(pipe.recv(), context):
            pipe.send(_sendable(outcome))


def _sendable(outcome: Outcome) -> Outcome:
    """Return the outcome with its pictures drawn, and with an error that can be sent."""
    from kexue.core.report import drawn

    try:
        if outcome.report is not None:
            figures = [drawn(figure) for figure in outcome.report.figures]
            outcome = replace(outcome, report=replace(outcome.report, figures=figures))
        elif outcome.error is not None:
            outcome.error.add_note("".join(traceback.format_exception(outcome.error)))
        pickle.loads(pickle.dumps(outcome))  # noqa: S301 -- what was dumped here
    except Exception as error:  # noqa: BLE001 -- it is told, as an experiment's own error is
        cause = outcome.error or error
        told = WorkerError(f"{type(cause).__name__}: {cause}")
        told.add_note("".join(traceback.format_exception(cause)))
        return Outcome(outcome.experiment, None, told, outcome.seconds)
    return outcome
