"""Generators: data to new data like it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kexue.core.errors import ArgumentError
from kexue.core.files import IMAGE_SUFFIXES, read_images
from kexue.core.inputs import read_floats, to_floats
from kexue.core.interfaces.base import Contract
from kexue.core.job import Job, Result
from kexue.core.loading import load_target
from kexue.core.plots import are_images, histogram, images
from kexue.core.training import Trainable, read_config

__all__ = ["Generator", "apply", "fit", "run"]


class Generator(Trainable, Contract):
    """A generator maps data to a model of it, and the model to new data.

    Where it exists, ``log_prob(x)`` is the log-density of rows in nats.
    """

    trainable: ClassVar[bool] = True
    needs_fitting: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    @abstractmethod
    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw new rows.

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
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit a generator to rows of data.

    The file is an array, an image, a folder of images, or ``digits`` for the embedded set.

    Args:
        job: The call.
        epochs: Passes over the data, at most.
        batch_size: Rows per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement; never by default.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    from kexue.core.training import claim_folder

    data = _data(job)
    valid = data[9::10]
    train = data[[i for i in range(len(data)) if i % 10 != 9 or not len(valid)]]
    features = {"num_features": data[0].numel(), "shape": tuple(data.shape[1:])}
    params = job.fitting(**features)
    model: Generator = job.build(**features)
    model.component = job.id
    folder = claim_folder(job, resume=resume, overwrite=overwrite)  # bad input has claimed nothing
    history = model.fit(
        train,
        valid,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        seed=job.seed,
        folder=folder,
        resume=resume,
        progress=job.progress,
    )
    best = {f"best_{k}": v for k, v in history.best.items() if k not in {"epoch", "seconds"}}
    summary = {"rows": len(train), "parameters": params, "epochs": len(history.epochs), **best}
    return Result(summary, files=(folder,))


def _data(job: Job) -> Tensor:
    """Return the rows to fit to, shape ``[row, ...]``; images are scaled to [0, 1]."""
    given = job.one_file("an array, an image folder, or 'digits' for the embedded set")
    if given == "digits" and not Path(given).exists():
        from kexue.core.lab.data import digits

        return torch.from_numpy(digits().images).to(job.device, job.dtype)
    path = Path(given)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        rows = to_floats(job, given, read_images(path) / np.float64(255), "data")
    else:
        rows = read_floats(job, given, "data", rows=True)
    if rows.ndim < 2 or not len(rows):
        raise ArgumentError(
            f"`data` in {given} must be rows, [row, feature] or [row, height, width]. "
            f"Found shape {list(rows.shape)}.",
            argument="data",
        )
    return rows


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
    for what, given in (("files", job.files), ("set", job.params), ("weights", job.weights)):
        if given:
            raise ArgumentError(
                f"{job.id} with `--model` takes no {what}: all it needs is in the model's folder.",
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
    model: Any = load_target(job.description.component.target).load(folder)
    model = model.to(job.device, job.dtype).eval()
    with torch.no_grad():
        drawn: Tensor = model.generate(num_samples, generator=job.generator())
    pictures = are_images(drawn.shape)
    return Result(
        {"samples": len(drawn), "shape": list(drawn.shape)},
        {"samples": drawn},
        plot=lambda f: images(f, drawn) if pictures else histogram(f, drawn, "value"),
    )
