"""What the command line asks of a kind, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kexue.core.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from kexue.core.describe import Description

__all__ = ["Job", "Progress", "Quiet", "Result", "Task"]

T = TypeVar("T")


class Task(Protocol):
    """A piece of long work."""

    def advance(self, steps: float = 1, **shown: Any) -> None:
        """Report progress.

        Args:
            steps: Steps done since the last call.
            shown: Figures to show beside the bar.
        """


class Progress(Protocol):
    """Where long work reports to; the command line shows bars, everybody else nothing."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Begin a piece of work.

        Args:
            description: A few words.
            total: Its steps, if they are known.
        """

    def say(self, text: str) -> None:
        """Report one line that stays."""


class _QuietTask:
    def advance(self, steps: float = 1, **shown: Any) -> None:
        del steps, shown


class Quiet:
    """Progress that nobody sees."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Begin a piece of work."""
        del description, total
        return nullcontext(_QuietTask())

    def say(self, text: str) -> None:
        """Drop a line."""
        del text


@dataclass
class Job:
    """One call of ``kexue run`` or ``kexue fit``.

    Args:
        description: The component.
        factory: Builds it from keyword arguments.
        params: What the user set with ``--set`` and ``--config``.
        files: What the user named, in order; ``-`` is standard input, ``name=path`` names an input.
        device: Where to work.
        dtype: Floating-point type of the inputs and parameters.
        seed: Seed of everything random.
        model: Folder of a fitted model, if one was named.
        weights: A ``state_dict`` in safetensors for the component, if one was named.
        out: Where results go, if the user said.
        progress: Where long work reports to.
        others: The same call of further components, where the kind runs several side by side.
    """

    description: Description
    factory: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    params: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[str] = ()
    seed: int = 0
    model: Path | None = None
    weights: Path | None = None
    out: Path | None = None
    progress: Progress = field(default_factory=Quiet)
    others: Sequence[Job] = ()

    @property
    def id(self) -> str:
        """Id of the component."""
        return self.description.component.id

    def fitting(self, **defaults: Any) -> dict[str, Any]:
        """Return the arguments to build the component with.

        Args:
            defaults: Arguments that the user's take precedence over; those that the component
                does not take are dropped.
        """
        known = {p.name for p in self.description.parameters}
        kept = {k: v for k, v in defaults.items() if k in known or self.description.accepts_any}
        return {**kept, **self.params}

    def build(self, **defaults: Any) -> Any:
        """Build the component on the job's device and in its dtype; see :meth:`fitting`."""
        import torch

        torch.manual_seed(self.seed)
        built = self.factory(**self.fitting(**defaults))
        if self.weights is not None:
            self.load_weights(built)
        return built.to(self.device, self.dtype) if isinstance(built, torch.nn.Module) else built

    def load_weights(self, module: Any) -> None:
        """Load the file of ``--weights`` into a module.

        Args:
            module: The component, or whatever else the kind builds from the call.

        Raises:
            ArgumentError: If it is no module.
            FileFormatError: If the file does not hold its weights.
        """
        import torch

        from kexue.core.errors import FileFormatError
        from kexue.core.files import read_arrays
        from kexue.core.lines import detail

        if not isinstance(module, torch.nn.Module):
            raise ArgumentError(f"{self.id} has no weights to load.", argument="weights")
        state = {k: torch.from_numpy(v.copy()) for k, v in read_arrays(str(self.weights)).items()}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise FileFormatError(
                f"{self.weights} does not hold the weights of {self.id}: {detail(error)}.",
                path=self.weights,
            ) from error

    def sizes(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return arguments such as ``num_tags`` that follow from the inputs' axes.

        Args:
            tensors: The inputs by name.
        """
        found: dict[str, int] = {}
        for row in self.description.inputs:
            if row.name in tensors and len(row.axes) == tensors[row.name].ndim:
                for axis, size in zip(row.axes, tensors[row.name].shape, strict=True):
                    found |= {f"num_{axis}s": size, f"num_{axis}es": size}
        return {p.name: found[p.name] for p in self.description.parameters if p.name in found}

    def generator(self) -> torch.Generator:
        """Return a source of randomness with the job's seed, on its device."""
        from kexue.core.device import make_generator

        return make_generator(self.seed, self.device)

    def one_file(self, what: str) -> str:
        """Return the only file.

        Raises:
            ArgumentError: If there is none, or there are several.
        """
        if len(self.files) != 1:
            raise ArgumentError(
                f"{self.id} takes one file here, {what}. Found {len(self.files)}.", argument="files"
            )
        return self.files[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the files as the inputs of the component's method, by name.

        Raises:
            ArgumentError: If an input is missing, or has the wrong type or shape.
            FileFormatError: If a file is not what its suffix says.
        """
        from kexue.core.inputs import read_inputs

        return read_inputs(self)


@dataclass
class Result:
    """What came out of a run.

    Args:
        summary: A few figures, plain data.
        arrays: Tensors or arrays by name, the most important first; what ``-o`` writes.
        lines: Text, one item a line; may be a generator, and is then written as it comes.
        plot: Draws the result into an empty figure.
        page: Returns the result as a self-contained HTML page, for pictures that are text; what
            ``--plot FILE.html`` writes.
        files: Files that the run has written itself.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    lines: Iterable[str] | Iterator[str] | None = None
    plot: Callable[[Figure], None] | None = None
    page: Callable[[], str] | None = None
    files: tuple[Path, ...] = ()
