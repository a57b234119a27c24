"""Generators: data to new data like it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.files import IMAGE_SUFFIXES, read_images
from kexue.core.inputs import read_array, to_floats
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.loading import load_target
from kexue.core.plots import are_images, histogram, images, write_plot
from kexue.core.training import Trainable, read_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Generator", "apply", "fit", "run"]

_SAMPLES = "samples"
_WHILE_TRAINING = 64  # rows that are drawn


class Generator(Trainable, Contract):
    """A generator maps data to a model of it, and the model to new data.

    Where it exists, ``log_prob(x)`` is the log-density of rows in nats. ``kexue fit`` builds it
    with those of ``num_features``, ``shape`` (of a row) and ``levels`` that its constructor takes;
    ``levels`` is given for images, whose values are k / (levels - 1), k = 0, ..., levels - 1.
    """

    trainable: ClassVar[bool] = True
    needs_fitting: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    @abstractmethod
    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw new rows.

        Further keywords that are the constructor's too, which holds their defaults, can be given by
        ``kexue run --model … --set``.

        Args:
            num_samples: How many.
            generator: Source of randomness; the global one by default.
        """


def fit(
    job: Job,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 1e-3,
    patience: int | None = None,
    ema: float | None = None,
    sample_every: int = 5,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit a generator to rows of data.

    The file is an array, an image, a folder of images, or ``digits`` for the embedded set. Images
    and arrays of uint8 are scaled to [0, 1].

    Args:
        job: The call.
        epochs: Passes over the data, at most.
        batch_size: Rows per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement; never by default.
        ema: Keep the exponential moving average of the weights with this decay, such as 0.999.
        sample_every: Draw samples into the folder ``samples`` of the output after every so many
            epochs; 0 for never.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    from kexue.core.training import claim_folder

    if sample_every < 0:
        raise ArgumentError(
            f"`--sample-every` must be at least 0. Found {sample_every}.", argument="sample_every"
        )
    data, levels = _data(job)
    valid = data[9::10]
    train = data[[i for i in range(len(data)) if i % 10 != 9 or not len(valid)]]
    features: dict[str, Any] = {"num_features": data[0].numel(), "shape": tuple(data.shape[1:])}
    if levels is not None:
        features["levels"] = levels
    params = job.fitting(**features)
    model: Generator = job.build(**features)
    model.component = job.id
    folder = claim_folder(job, resume=resume, overwrite=overwrite)  # bad input has claimed nothing
    if not resume:
        for old in (folder / _SAMPLES).glob("epoch-*.png"):
            old.unlink()

    def show(epoch: int) -> None:
        if sample_every and epoch % sample_every == 0:
            drawn = model.generate(_WHILE_TRAINING, generator=job.generator())
            (folder / _SAMPLES).mkdir(parents=True, exist_ok=True)
            write_plot(folder / _SAMPLES / f"epoch-{epoch:04}.png", _picture(drawn))

    history = model.fit(
        train,
        valid,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        ema=ema,
        seed=job.seed,
        folder=folder,
        resume=resume,
        after_epoch=show,
        progress=job.progress,
    )
    best = {f"best_{k}": v for k, v in history.best.items() if k not in {"epoch", "seconds"}}
    summary = {"rows": len(train), "parameters": params, "epochs": len(history.epochs), **best}
    return Result(summary, files=(folder,))


def _picture(drawn: Tensor) -> Callable[[Figure], None]:
    if are_images(drawn.shape):
        return partial(images, pixels=drawn)
    return partial(histogram, values=drawn, label="value")


def _data(job: Job) -> tuple[Tensor, int | None]:
    """Return the rows to fit to, shape ``[row, ...]``, and the grey levels if they are pixels."""
    given = job.one_file("an array, an image folder, or 'digits' for the embedded set")
    if given == "digits" and not Path(given).exists():
        from kexue.core.lab.data import digits

        return torch.from_numpy(digits().images).to(job.device, job.dtype), 17
    path = Path(given)
    is_image = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
    array = read_images(path) if is_image else read_array(given, rows=True)
    are_pixels = array.dtype == np.uint8
    rows = to_floats(job, given, array / np.float64(255) if are_pixels else array, "data")
    if rows.ndim < 2 or not len(rows):
        raise ArgumentError(
            f"`data` in {given} must be rows, [row, feature] or [row, height, width]. "
            f"Found shape {list(rows.shape)}.",
            argument="data",
        )
    return rows, 256 if are_pixels else None


def run(job: Job) -> Result:
    """Say that a generator is fitted first."""
    raise ArgumentError(
        f"{job.id} generates from a fitted model: `kexue fit {job.id} DATA -o model/`, then "
        f"`kexue run {job.id} --model model/`.",
        argument="model",
    )


def apply(job: Job, *, num_samples: int = 64) -> Result:
    """Draw new data from a fitted model.

    Args:
        job: The call.
        num_samples: How many rows.
    """
    if num_samples < 1:
        raise ArgumentError(
            f"`--num-samples` must be at least 1. Found {num_samples}.", argument="num_samples"
        )
    component = load_target(job.description.component.target)
    settings = _settings(component, job)
    fixed = {name: value for name, value in job.params.items() if name not in settings}
    for what, given in (("files", job.files), ("set", fixed), ("weights", job.weights)):
        if given:
            raise ArgumentError(
                f"{job.id} with `--model` takes no {what}: all it needs is in the model's folder."
                + (f" What can be set: {', '.join(settings)}." if settings else ""),
                argument=what,
            )
    folder = job.model or Path()
    config = read_config(folder)
    if config["component"] != job.id:
        raise ArgumentError(
            f"{folder} was fitted with {config['component']}, not {job.id}. Run `kexue run "
            f"{config['component']} --model {folder}`.",
            argument="model",
        )
    model: Any = component.load(folder)
    model = model.to(job.device, job.dtype).eval()
    with torch.no_grad():
        drawn: Tensor = model.generate(num_samples, generator=job.generator(), **job.params)
    return Result(
        {"samples": len(drawn), "shape": list(drawn.shape)},
        {"samples": drawn},
        plot=_picture(drawn),
    )


def _settings(component: type[Generator], job: Job) -> list[str]:
    """Return the parameters of the component that ``generate`` takes as well."""
    taken = inspect.signature(component.generate).parameters
    return [p.name for p in job.description.parameters if p.name in taken]
