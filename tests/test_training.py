"""Fitting: resumable at any moment, saved whole, on one process or two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.training import History, Interrupted, Trainable, adam


class Line(Trainable):
    """Fits a line, with dropout so that randomness matters."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.features = features
        self.drop = nn.Dropout(0.2)
        self.layer = nn.Linear(features, 1)

    def loss(self, batch: Tensor) -> Tensor:
        found: Tensor = self.layer(self.drop(batch))
        return (found - batch.sum(-1, keepdim=True)).square().mean()

    def config(self) -> dict[str, Any]:
        return {"features": self.features}


class Stops(Line):
    """Interrupts itself as Ctrl-C would, before a given step."""

    def __init__(self, features: int = 3, *, at: int = -1, times: int = 1) -> None:
        super().__init__(features)
        self.left, self.times = at, times

    def loss(self, batch: Tensor) -> Tensor:
        if self.training:
            self.left -= 1
            if self.left == 0:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
        return super().loss(batch)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**config)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(100, 3, generator=torch.Generator().manual_seed(0))


def fitted(model: Line, data: Tensor, **options: Any) -> History:
    return model.fit(data, data[:20], epochs=4, batch_size=10, lr=0.05, **options)


def fresh(cls: type[Line] = Line, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(**options)


def test_lowers_the_loss_and_keeps_the_best_epoch(data: Tensor) -> None:
    model = fresh()
    history = fitted(model, data)
    losses = [row["valid_loss"] for row in history.epochs]
    assert losses[-1] < losses[0]
    assert history.best["valid_loss"] == min(losses)
    assert model.evaluate(data[:20], batch_size=10)["loss"] == pytest.approx(min(losses))


def test_same_seed_gives_the_same_weights_and_another_seed_others(data: Tensor) -> None:
    models = [fresh() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        fitted(model, data, seed=seed)
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)
    assert not torch.equal(models[0].layer.weight, models[2].layer.weight)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in the foreground; background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Noisy(Stops):
    """Has random numbers in its evaluation too, and starts from the data."""

    def prepare(self, examples: Any) -> None:
        with torch.no_grad():
            self.layer.bias.copy_(examples.mean() + 0.01 * torch.randn(()))

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch + 0.1 * torch.randn_like(batch))


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [1, 7, 10, 23])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_interrupted_and_resumed_equals_uninterrupted(
    data: Tensor, tmp_path: Path, step: int, ema: float | None
) -> None:
    whole = fresh(Noisy)
    wanted = fitted(whole, data, ema=ema)
    stopped = fresh(Noisy, at=step)
    with pytest.raises(Interrupted, match="Stopped in epoch"):
        fitted(stopped, data, folder=tmp_path, ema=ema)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    resumed = fresh(Noisy)
    history = fitted(resumed, data, folder=tmp_path, resume=True, ema=ema)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    for name in ("loss", "valid_loss"):
        assert [row[name] for row in history.epochs] == [row[name] for row in wanted.epochs]
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_interrupt_does_not_wait_for_the_step(data: Tensor, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        fitted(fresh(Stops, at=2, times=2), data, folder=tmp_path)
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time, torch
        from torch import nn
        from kexue.core.training import Trainable

        class Slow(Trainable):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 1)
            def loss(self, batch):
                if "slow" in sys.argv:
                    time.sleep(0.05)
                return (self.layer(batch) - batch.sum(-1, keepdim=True)).square().mean()
            def config(self):
                return {}

        torch.manual_seed(0)
        model = Slow()
        data = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        model.fit(data, data[:20], epochs=4, batch_size=10, lr=0.05, folder=sys.argv[1],
                  resume=True, checkpoint_seconds=0.0)
        print(model.layer.weight.tolist())
        """
    )
    path = tmp_path / "fit.py"
    path.write_text(script)
    wanted = subprocess.run(
        [sys.executable, path, tmp_path / "whole"], capture_output=True, text=True, check=True
    ).stdout
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, path, killed, "slow"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (killed / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert (killed / "checkpoint.safetensors").exists()
    assert not (killed / "history.json").exists(), "it finished before it was killed"
    found = subprocess.run(
        [sys.executable, path, killed], capture_output=True, text=True, check=True
    ).stdout
    assert found == wanted


def test_resuming_a_finished_run_only_loads_it(data: Tensor, tmp_path: Path) -> None:
    first = fresh()
    wanted = fitted(first, data, folder=tmp_path)
    again = fresh(features=3)
    history = fitted(again, data, folder=tmp_path, resume=True)
    assert torch.equal(again.layer.weight, first.layer.weight)
    assert history.epochs == wanted.epochs


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 20}, "`batch_size` must be 10"),
        ({"seed": 3}, "`seed` must be 0"),
        ({"ema": 0.9}, "`ema` must be None"),
    ],
)
def test_rejects_a_checkpoint_of_another_run(
    data: Tensor, tmp_path: Path, change: dict[str, int], words: str
) -> None:
    stopped = fresh(Stops, at=3)
    with pytest.raises(Interrupted):
        fitted(stopped, data, folder=tmp_path)
    options: dict[str, Any] = {"batch_size": 10, "seed": 0, **change}
    with pytest.raises(ArgumentError, match=words):
        fresh(Stops).fit(data, data[:20], folder=tmp_path, resume=True, **options)
    with pytest.raises(ArgumentError, match="data differ"):
        fresh(Stops).fit(data + 1, folder=tmp_path, resume=True, batch_size=10)


def test_rejects_a_broken_checkpoint(data: Tensor, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00garbage")
    with pytest.raises(FileFormatError, match="not a whole checkpoint"):
        fitted(fresh(), data, folder=tmp_path, resume=True)


def test_patience_stops_early(data: Tensor) -> None:
    model = fresh()
    history = model.fit(data, data[:20], epochs=50, batch_size=10, lr=0.0, patience=2)
    assert history.early
    assert len(history.epochs) == 3
    assert history.best_epoch == 1


def test_keeps_the_average_of_the_weights(data: Tensor) -> None:
    seen: list[Tensor] = []

    class Watched(Line):
        def loss(self, batch: Tensor) -> Tensor:
            if self.training:
                seen.append(self.layer.weight.detach().clone())
            return super().loss(batch)

    model, shown = fresh(Watched), []
    model.fit(
        data,
        epochs=2,
        batch_size=10,
        lr=0.05,
        ema=0.6,
        after_epoch=lambda epoch: shown.append((epoch, model.layer.weight.detach().clone())),
    )
    average = seen[0]
    for step, weight in enumerate(seen[1:11], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert [epoch for epoch, _ in shown] == [1, 2]
    assert torch.allclose(shown[0][1], average)
    assert not torch.allclose(shown[0][1], seen[10])
    assert torch.equal(model.layer.weight, shown[1][1])


def test_evaluating_draws_the_same_and_leaves_the_global_numbers_alone(data: Tensor) -> None:
    model = fresh(Noisy)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = model.evaluate(data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert model.evaluate(data) == first


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5, float("nan")])
def test_rejects_an_average_of_nothing(data: Tensor, ema: float) -> None:
    with pytest.raises(ArgumentError, match="`ema` of fit must be between 0 and 1"):
        fresh().fit(data, ema=ema)


@pytest.mark.parametrize("examples", [[], torch.zeros(0, 3)])
def test_rejects_no_examples(examples: Any) -> None:
    with pytest.raises(ArgumentError, match="must not be empty"):
        fresh().fit(examples)


def test_rejects_resume_without_a_folder(data: Tensor) -> None:
    with pytest.raises(ArgumentError, match="`resume` of fit needs `folder`"):
        fresh().fit(data, resume=True)


# -- saving ---------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = fresh(features=5)
    model.component = "generator/line"
    model.save(tmp_path / "model")
    loaded = Line.load(tmp_path / "model")
    assert loaded.features == 5
    assert loaded.component == "generator/line"
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_saving_again_leaves_one_whole_model(tmp_path: Path) -> None:
    model = fresh()
    model.save(tmp_path)
    with torch.no_grad():
        model.layer.weight.add_(1)
    model.save(tmp_path)
    assert len(list(tmp_path.glob("weights-*"))) == 1
    assert torch.equal(Line.load(tmp_path).layer.weight, model.layer.weight)


def test_an_interrupted_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    model.save(tmp_path)
    before = model.layer.weight.detach().clone()
    with torch.no_grad():
        model.layer.weight.add_(1)

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("yaml.safe_dump", fail)  # after the new weights, before the new config
    with pytest.raises(OSError, match="no space"):
        model.save(tmp_path)
    assert torch.equal(Line.load(tmp_path).layer.weight, before)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda f: (f / "config.yaml").write_text("[1, 2"), "not valid YAML"),
        (lambda f: (f / "config.yaml").write_text("a: 1"), "not the configuration"),
        (lambda f: next(f.glob("weights-*")).write_bytes(b"\x01" * 9), "does not hold this model"),
        (lambda f: next(f.glob("weights-*")).unlink(), "does not hold this model"),
        (
            lambda f: (f / "config.yaml").write_text(
                (f / "config.yaml").read_text().replace("features", "colour")
            ),
            "does not describe a Line",
        ),
        (
            lambda f: (f / "config.yaml").write_text(
                (f / "config.yaml").read_text().replace("features: 3", "features: 4")
            ),
            "does not hold this model",
        ),
    ],
    ids=["no config", "bad yaml", "other config", "garbage", "no weights", "parameter", "shape"],
)
def test_load_rejects_a_broken_model(tmp_path: Path, spoil: Any, words: str) -> None:
    fresh().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(FileFormatError, match=words):
        Line.load(tmp_path)


# -- processes ------------------------------------------------------------------------------------


def test_two_processes_fit_like_one(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import json, sys, torch
        from torch import nn
        from kexue.core.training import Trainable

        class Flat(Trainable):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 1)
            def loss(self, batch):
                return (self.layer(batch) - batch.sum(-1, keepdim=True)).square().mean()
            def config(self):
                return {}

        torch.manual_seed(0)
        model = Flat()
        data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        history = model.fit(data, data[:16], epochs=3, batch_size=int(sys.argv[2]), lr=0.1,
                            folder=sys.argv[1])
        if sys.argv[1].endswith("two"):
            assert torch.distributed.get_world_size() == 2
            torch.distributed.destroy_process_group()
        """
    )
    path = tmp_path / "fit.py"
    path.write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, path, tmp_path / "two", "8"], check=True, env=environment, capture_output=True
    )
    subprocess.run([sys.executable, path, tmp_path / "one", "8"], check=True, capture_output=True)
    two = json.loads((tmp_path / "two" / "history.json").read_text())
    one = json.loads((tmp_path / "one" / "history.json").read_text())
    assert len(two["epochs"]) == len(one["epochs"]) == 3
    assert two["epochs"][-1]["valid_loss"] < two["epochs"][0]["valid_loss"]
    assert len(list((tmp_path / "two").glob("weights-*"))) == 1


@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.complex64, None)]
)
def test_adam_is_fused_where_the_kernel_takes_the_numbers(
    dtype: torch.dtype, fused: bool | None
) -> None:
    ours, plain = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    optimizers = adam([ours], lr=0.1), torch.optim.Adam([plain], lr=0.1)
    for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
        parameter.grad = torch.arange(3.0).to(dtype)
        optimizer.step()
    assert optimizers[0].defaults["fused"] is fused
    torch.testing.assert_close(ours, plain)
