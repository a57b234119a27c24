"""Fitting: one loop for everything that is trained, on ``accelerate``, resumable at any moment.

The state of a run is (weights, their average, optimizer, epoch, step): the order of the batches
and all random numbers follow from the seed, the epoch and the step, so a run that was interrupted
anywhere and resumed ends with the very weights of one that was not.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kexue.core.averaging import WeightAverage
from kexue.core.catalogue import load_yaml
from kexue.core.device import seed_everywhere
from kexue.core.errors import ArgumentError, FileFormatError, ManifestError
from kexue.core.files import atomic_path, atomic_write, write_json
from kexue.core.job import Job, Progress, Quiet

__all__ = ["History", "Interrupted", "Trainable", "adam", "claim_folder", "read_config"]

Examples = Sequence[Any] | Tensor
"""What a module is fitted to: anything that has a length and can be indexed."""

CONFIG = "config.yaml"
CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.json"
_BUCKET = 50  # batches sorted by size together, so that little is padded


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a fit, after its checkpoint was written."""


@dataclass
class History:
    """What happened in a fit.

    Args:
        epochs: One row per epoch: its number, the mean training loss, the seconds it took, and
            what the model's ``evaluate`` measured.
        best_epoch: The epoch whose weights were kept.
        early: Whether it stopped before its last epoch because nothing improved any more.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    early: bool = False

    @property
    def best(self) -> dict[str, float]:
        """The row of the best epoch; empty before the first."""
        return next((row for row in self.epochs if row["epoch"] == self.best_epoch), {})


@dataclass
class _State:
    """Where a run stands."""

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    updates: int = 0  # steps of all epochs
    bad_epochs: int = 0
    best_score: float | None = None
    history: History = field(default_factory=History)


class Trainable(nn.Module, ABC):
    """A module that can be fitted, saved and loaded.

    A subclass says what the loss of a batch is, and what it takes to build itself again.
    """

    objective: ClassVar[tuple[str, str]] = ("loss", "min")
    """The figure of :meth:`evaluate` that decides which epoch is best, and its direction."""

    component: str = ""
    """Id of the component that the module was built as; kept in what :meth:`save` writes."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Return the scalar loss of a batch that :meth:`collate` made."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return plain data from which :meth:`from_config` builds the same module."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the module with fresh weights; the configuration is the constructor's arguments."""
        return cls(**config)

    def collate(self, examples: Sequence[Any]) -> Any:
        """Make a batch of examples; stacks tensors by default."""
        return torch.stack(list(examples))

    def size(self, example: Any) -> int:
        """Return what an example costs, so that batches hold examples of like size."""
        del example
        return 1

    def prepare(self, examples: Examples) -> None:
        """Look at the examples before a run's first step; does nothing by default.

        For initialisation from data. Random numbers follow from the seed of the run.
        """
        del examples

    def evaluate(self, examples: Examples, *, batch_size: int = 64) -> dict[str, float]:
        """Measure the module on held-out examples; the mean loss by default.

        Random numbers are the same in every call, and the global ones are left alone.
        """
        total = 0.0
        with _evaluating(self):
            for batch, count in self._batches(examples, batch_size):
                total += float(self.loss(batch)) * count
        return {"loss": total / max(len(examples), 1)}

    def _batches(self, examples: Examples, batch_size: int) -> Iterator[tuple[Any, int]]:
        device = _device_of(self)
        for start in range(0, len(examples), batch_size):
            rows = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
            yield _to(self.collate(rows), device), len(rows)

    # -- fitting ------------------------------------------------------------------------------

    def fit(
        self,
        examples: Examples,
        valid: Examples | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        lr: float = 1e-3,
        patience: int | None = None,
        ema: float | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 30.0,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        after_epoch: Callable[[int], object] | None = None,
        progress: Progress | None = None,
    ) -> History:
        """Fit the module and leave it with the weights of the best epoch.

        Args:
            examples: What to fit to; anything that :meth:`collate` takes.
            valid: Held-out examples, evaluated after each epoch; the training loss decides
                without them.
            epochs: Passes over the examples, at most.
            batch_size: Examples per step and process.
            lr: Learning rate of Adam.
            patience: Stop after this many epochs without improvement; never by default.
            ema: Evaluate and keep the exponential moving average of the weights with this decay,
                such as 0.999; off by default.
            seed: Decides the order of the examples and all random numbers.
            folder: Where the best weights, the history and, until the end, a checkpoint go.
            resume: Go on from the checkpoint in ``folder`` if there is one.
            checkpoint_seconds: Seconds between checkpoints within an epoch.
            make_optimizer: Builds another optimizer than Adam from the parameters.
            after_epoch: Called with the number of each epoch when it is done, while the module has
                the weights that were evaluated; in the first process only, and not under FSDP,
                where no process has them all.
            progress: Where to report; nowhere by default.

        Returns:
            The history.

        Raises:
            ArgumentError: If there are no examples, a number is out of range, or the checkpoint is
                of another run.
            Interrupted: On Ctrl-C or SIGTERM, after a checkpoint was written.
        """
        if not len(examples):
            raise ArgumentError("`examples` of fit must not be empty.", argument="examples")
        _check_numbers(epochs=epochs, batch_size=batch_size, patience=patience, lr=lr, ema=ema)
        if resume and folder is None:
            raise ArgumentError("`resume` of fit needs `folder`.", argument="resume")
        with _seeded(_device_of(self), seed):
            self.prepare(examples)
        optimizer = (
            make_optimizer(list(self.parameters()))
            if make_optimizer is not None
            else adam(self.parameters(), lr=lr)
        )
        plan = {"batch_size": batch_size, "seed": seed, "ema": ema, "data": _fingerprint(examples)}
        run = _Run(self, optimizer, Path(folder) if folder else None, plan, progress or Quiet())
        return run.execute(
            examples,
            valid,
            epochs=epochs,
            patience=patience,
            resume=resume,
            every=checkpoint_seconds,
            after_epoch=after_epoch,
        )

    # -- saving -------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write configuration (YAML) and weights (safetensors).

        The configuration names the weights' file and is renamed into place last, so that the
        folder holds a whole model at every moment, the old one or the new one.
        """
        self._save_weights(Path(folder), self.state_dict())

    def _save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        import yaml
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        content = save({name: t.detach().cpu().contiguous() for name, t in state.items()})
        weights = f"weights-{zlib.crc32(content):08x}.safetensors"
        atomic_write(folder / weights, content)
        document = {"component": self.component, "model": self.config(), "weights": weights}
        atomic_write(folder / CONFIG, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
        for old in folder.glob("weights-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote, without executing anything.

        Raises:
            FileFormatError: If the folder holds no whole model.
        """
        config = read_config(folder)
        try:
            model = cls.from_config(config["model"])
        except (TypeError, KeyError, ValueError) as error:
            raise FileFormatError(
                f"{Path(folder) / CONFIG} does not describe a {cls.__name__}: {error}.", path=folder
            ) from error
        model.component = config["component"]
        model._load_weights(Path(folder), config)  # noqa: SLF001 -- a classmethod's own class
        return model

    def _load_weights(self, folder: Path, config: Mapping[str, Any]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / str(config.get("weights"))
        try:
            self.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise FileFormatError(
                f"{path} does not hold this model's weights: {detail}.", path=path
            ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of a saved model.

    Raises:
        FileFormatError: If there is none.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileFormatError(f"{folder} holds no fitted model: {CONFIG} is missing.", path=folder)
    try:
        config = load_yaml(path)
    except ManifestError as error:
        raise FileFormatError(str(error), path=path) from error
    if not isinstance(config, dict) or not {"component", "model", "weights"} <= set(config):
        raise FileFormatError(f"{path} is not the configuration of a fitted model.", path=path)
    return config


def claim_folder(job: Job, *, resume: bool, overwrite: bool) -> Path:
    """Return the folder that ``-o`` names, fit for a new run or for going on with one.

    Raises:
        ArgumentError: If there is none, or it already holds something.
    """
    folder = job.out
    if folder is None:
        raise ArgumentError(
            f"`kexue fit {job.id}` needs a folder for the model: `-o model/`.", argument="out"
        )
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} must be a folder. Found a file.", argument="out")
    if resume:
        return folder
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        state = "an unfinished run" if (folder / CHECKPOINT).exists() else "files"
        raise ArgumentError(
            f"{folder} already holds {state}. Add `--resume` to go on, `--overwrite` to replace "
            f"it, or name another folder.",
            argument="out",
        )
    for name in (CHECKPOINT, HISTORY):
        (folder / name).unlink(missing_ok=True)
    return folder


class _LossOf(nn.Module):
    """A module whose forward is the loss: what data-parallel wrappers know how to call."""

    def __init__(self, model: Trainable) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model.loss(batch)


class _Run:
    """One fit: the loop and its checkpoints."""

    def __init__(
        self,
        model: Trainable,
        optimizer: torch.optim.Optimizer,
        folder: Path | None,
        plan: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=_device_of(model).type == "cpu")
        self.model = model
        self.wrapped, prepared = self.accelerator.prepare(_LossOf(model), optimizer)
        self.optimizer = prepared.optimizer
        # The prepared one does no more on a CPU, but asks the disk at every step what is there.
        self.stepper = self.optimizer if self.accelerator.device.type == "cpu" else prepared
        decay = plan["ema"]
        self.average = None if decay is None else WeightAverage(self.wrapped, decay)
        self.folder = folder
        self.plan = dict(plan)
        self.progress = progress if self.accelerator.is_main_process else Quiet()
        self.state = _State()
        self.best_weights: dict[str, Tensor] | None = None

    def execute(
        self,
        examples: Examples,
        valid: Examples | None,
        *,
        epochs: int,
        patience: int | None,
        resume: bool,
        every: float,
        after_epoch: Callable[[int], object] | None,
    ) -> History:
        if resume:
            self._restore()
        state = self.state
        with _interruptible() as stop:
            while state.epoch <= epochs and not state.history.early:
                self._epoch(examples, epochs, every, stop)
                with self._averaged():
                    self._judge(valid, patience)
                    self._tell(after_epoch)
                self._close_epoch()
        self._finish()
        return state.history

    def _epoch(self, examples: Examples, epochs: int, every: float, stop: _Stop) -> None:
        state = self.state
        batches = self._order(examples)
        self.wrapped.train()
        clock = saved = time.monotonic()
        with self.progress.task(f"epoch {state.epoch}/{epochs}", len(batches)) as task:
            task.advance(state.step)
            for indices in batches[state.step :]:
                seed = zlib.crc32(f"{self.plan['seed']} {state.epoch} {state.step}".encode())
                seed_everywhere(seed, self.accelerator.device)
                batch = self.model.collate([examples[i] for i in indices])
                loss = self._step(_to(batch, self.accelerator.device))
                state.step += 1
                state.loss_sum += float(loss)
                now = time.monotonic()
                state.seconds, clock = state.seconds + now - clock, now
                task.advance(1, loss=state.loss_sum / state.step)
                if stop.asked:
                    self._checkpoint()
                    where = f"epoch {state.epoch}, step {state.step} of {len(batches)}"
                    kept = "" if self.folder is None else f" `--resume` goes on from {self.folder}."
                    raise Interrupted(f"Stopped in {where}.{kept}")
                if now - saved > every:
                    self._checkpoint()
                    saved = time.monotonic()

    def _step(self, batch: Any) -> Tensor:
        loss: Tensor = self.wrapped(batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 5.0)
        self.stepper.step()
        self.stepper.zero_grad()
        self.state.updates += 1
        if self.average is not None:
            self.average.update(self.state.updates)
        return loss.detach()

    def _order(self, examples: Examples) -> list[list[int]]:
        """Return this process's batches of this epoch: like sizes together, in random order."""
        size = self.plan["batch_size"]
        generator = torch.Generator().manual_seed(self.plan["seed"] * 1_000_003 + self.state.epoch)
        shuffled = torch.randperm(len(examples), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), size * _BUCKET):
            bucket = sorted(
                shuffled[start : start + size * _BUCKET], key=lambda i: self.model.size(examples[i])
            )
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        missing = -len(batches) % world  # every process takes the same number of steps
        return (batches + batches[:missing])[rank::world]

    def _averaged(self) -> AbstractContextManager[None]:
        """Give the module the weights that are evaluated and kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def _judge(self, valid: Examples | None, patience: int | None) -> None:
        """Measure the epoch, and keep its weights if they are the best so far."""
        state, history = self.state, self.state.history
        row = {
            "epoch": float(state.epoch),
            "loss": state.loss_sum / max(state.step, 1),
            "seconds": state.seconds,
        }
        if valid is not None and len(valid):
            row |= {
                f"valid_{k}": v
                for k, v in self.model.evaluate(valid, batch_size=self.plan["batch_size"]).items()
            }
        row = self._agree(row)
        history.epochs.append(row)
        name, direction = self.model.objective
        score = row.get(f"valid_{name}", row["loss"])
        better = (
            score > (state.best_score or 0.0)
            if direction == "max" and f"valid_{name}" in row
            else score < (state.best_score or 0.0)
        )
        if state.best_score is None or better:
            state.best_score, state.bad_epochs, history.best_epoch = score, 0, state.epoch
            self._keep_best()
        else:
            state.bad_epochs += 1
            history.early = patience is not None and state.bad_epochs >= patience
        self.progress.say(_epoch_line(row, best=history.best_epoch == state.epoch))

    def _tell(self, after_epoch: Callable[[int], object] | None) -> None:
        whole = self.accelerator.distributed_type.value != "FSDP"
        if after_epoch is not None and whole and self.accelerator.is_main_process:
            with _evaluating(self.model):
                after_epoch(self.state.epoch)

    def _close_epoch(self) -> None:
        state = self.state
        state.epoch, state.step, state.loss_sum, state.seconds = state.epoch + 1, 0, 0.0, 0.0
        self._checkpoint()

    def _agree(self, row: dict[str, float]) -> dict[str, float]:
        """Let every process go on with the figures of the first."""
        from accelerate.utils import broadcast_object_list

        rows = [row]
        broadcast_object_list(rows)
        return rows[0]

    def _weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True)
        state: dict[str, Any] = get_model_state_dict(self.wrapped, options=whole)
        return {name.removeprefix("model."): t.detach().cpu().clone() for name, t in state.items()}

    def _keep_best(self) -> None:
        self.best_weights = self._weights()
        if self.folder is not None and self.accelerator.is_main_process:
            self.model._save_weights(self.folder, self.best_weights)  # noqa: SLF001 -- one module

    def _finish(self) -> None:
        """Leave the model with its best weights, and the folder without a checkpoint."""
        self.accelerator.wait_for_everyone()
        weights = self.best_weights
        if weights is None and self.folder is not None:
            self.model._load_weights(self.folder, read_config(self.folder))  # noqa: SLF001
        elif weights is not None and self.accelerator.distributed_type.value != "FSDP":
            self.model.load_state_dict(weights)
        if self.folder is not None and self.accelerator.is_main_process:
            write_json(self.folder / HISTORY, asdict(self.state.history))
            (self.folder / CHECKPOINT).unlink(missing_ok=True)

    # -- checkpoints: one file, renamed into place ----------------------------------------------

    def _checkpoint(self) -> None:
        if self.folder is None:
            return
        from safetensors.torch import save_file

        tensors = {f"model.{name}": t for name, t in self._weights().items()}
        if self.average is not None:
            with self.average.applied():
                tensors |= {f"average.{name}": t for name, t in self._weights().items()}
        optimizer = self._optimizer_state()
        if not self.accelerator.is_main_process:
            return
        moments, scalars = _split(optimizer)
        tensors |= {f"optimizer.{name}": t for name, t in moments.items()}
        document = {"plan": self.plan, "state": asdict(self.state), "optimizer": scalars}
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / CHECKPOINT) as temporary:
            save_file(tensors, temporary, metadata={"run": json.dumps(document)})

    def _optimizer_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.wrapped, self.optimizer, options=options)

    def _restore(self) -> None:
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            self._restore_finished()
            return
        from safetensors import SafetensorError, safe_open

        path = self.folder / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{path} is not a whole checkpoint: {error}.", path=path
            ) from error
        for name, value in document["plan"].items():
            if self.plan.get(name) != value:
                begun = f"`{name}` must be {value!r}, as when the run began"
                what = (
                    "The data differ" if name == "data" else f"{begun}; it is {self.plan[name]!r}"
                )
                raise ArgumentError(
                    f"{what}. The run in {self.folder} cannot be resumed so: start anew in another "
                    f"folder, or with `--overwrite`.",
                    argument=name,
                )
        self._load_checkpoint(document, tensors)

    def _restore_finished(self) -> None:
        """Take over a run that came to its end: there is nothing left to do but to load it."""
        if self.folder is not None and (self.folder / HISTORY).is_file():
            history = History(**json.loads((self.folder / HISTORY).read_text(encoding="utf-8")))
            self.state = _State(epoch=len(history.epochs) + 1, history=history)
            history.early = True

    def _load_checkpoint(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_state_dict,
        )

        parts: dict[str, dict[str, Any]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name if part == "optimizer" else f"model.{name}"] = tensor
        whole = StateDictOptions(full_state_dict=True)
        if self.average is not None:
            set_model_state_dict(self.wrapped, parts["average"], options=whole)
            self.average.capture()
        set_state_dict(
            self.wrapped,
            self.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=_join(parts["optimizer"], document["optimizer"]),
            options=whole,
        )
        plain = document["state"]
        self.state = _State(**{**plain, "history": History(**plain["history"])})


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate the tensors of an optimizer's state from its plain values."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for parameter, values in state["state"].items():
        scalars["state"][parameter] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}|{name}"] = value.detach().cpu().contiguous()
            else:
                scalars["state"][parameter][name] = value
    return tensors, scalars


def _join(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {p: dict(values) for p, values in scalars["state"].items()}
    for key, tensor in tensors.items():
        parameter, _, name = key.rpartition("|")
        state[parameter][name] = tensor
    return {"state": state, "param_groups": scalars["param_groups"]}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _seeded(_device_of(model), 0):
            yield
    finally:
        model.train(training)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from a seed for a while, and then go on as before."""
    devices = [] if device.type == "cpu" else [device.index or 0]
    kind = {"device_type": device.type} if devices else {}
    with torch.random.fork_rng(devices, **kind):
        torch.manual_seed(seed)
        yield


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


_STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends before it kills


@dataclass
class _Stop:
    """Whether a signal asked to stop. No Event: a second signal within its lock would deadlock."""

    asked: bool = False


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a wish that is looked at between steps.

    A second one interrupts at once. Signals that are ignored, as Ctrl-C is in background jobs, stay
    so. Only the main thread may set signal handlers.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in _STOPS}
    previous = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: Any) -> None:
        del number, frame
        stop.asked = True
        restore()

    for number in previous:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        restore()


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _check_numbers(*, lr: float, ema: float | None, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ArgumentError(
                f"`{name}` of fit must be at least 1. Found {count}.", argument=name
            )
    if not 0 <= lr < float("inf"):
        raise ArgumentError(
            f"`lr` of fit must be a finite number of at least 0. Found {lr}.", argument="lr"
        )
    if ema is not None and not 0 < ema < 1:
        raise ArgumentError(
            f"`ema` of fit must be between 0 and 1, such as 0.999. Found {ema}.", argument="ema"
        )


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Return Adam by the fused kernel, or as torch does it by default where there is none.

    On a CPU and with models of a few dozen small tensors the default takes ten times as long.

    Args:
        parameters: What to step.
        lr: Learning rate.
    """
    chosen = list(parameters)
    return torch.optim.Adam(chosen, lr=lr, fused=_has_fused_kernel(chosen) or None)


def _has_fused_kernel(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the kernel takes these devices and types, which torch tells in the first step."""
    kinds = {(p.device, p.dtype) for p in parameters}
    probes = [nn.Parameter(torch.zeros(1, device=on, dtype=of)) for on, of in kinds]
    for probe in probes:
        probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.Adam(probes, fused=True).step()
    except (RuntimeError, ValueError):
        return False
    return True


def _fingerprint(examples: Examples) -> int:
    """Return a number that tells one data set from another."""
    if isinstance(examples, Tensor):
        return zlib.crc32(examples.detach().cpu().contiguous().numpy().tobytes())
    return zlib.crc32("".join(map(repr, examples)).encode())


def _epoch_line(row: Mapping[str, float], *, best: bool) -> str:
    figures = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in {"epoch", "seconds"})
    return (
        f"epoch {int(row['epoch'])}  {figures}  {row['seconds']:.1f} s{'  (best)' if best else ''}"
    )
