"""Fitting: the start from the data, what is measured, resuming, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.device import make_generator
from kexue.core.training import Interrupted
from kexue_nice import NICE


def banana(rows: int = 600) -> Tensor:
    """Rows of three features, the second bent around the first; far from the origin."""
    x = torch.randn(rows, 3, generator=make_generator(0))
    return torch.stack([10 + x[:, 0], x[:, 0] ** 2 + 0.1 * x[:, 1], 50 * x[:, 2]], 1)


def made(**given: Any) -> NICE:
    torch.manual_seed(0)
    return NICE(3, **{"hidden": [32, 32], **given})


@pytest.mark.parametrize("prior", ["gaussian", "logistic"])
def test_starts_from_the_data(prior: str) -> None:
    model, data = made(prior=prior), banana()
    model.prepare(data)
    z = model.encode(data)
    wanted = 1.0 if prior == "gaussian" else math.pi / math.sqrt(3)
    assert torch.allclose(z.std(0, correction=0), torch.tensor(wanted), rtol=1e-4)
    assert torch.allclose(model.center, data.mean(0), rtol=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare(data + 7)  # fitting on does not begin anew
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_learns_what_a_gaussian_cannot() -> None:
    data = banana(1200)
    model = made()
    model.fit(data[:1000], epochs=30, batch_size=50, lr=5e-3)
    test = data[1000:]
    gaussian: Any = torch.distributions.MultivariateNormal(data[:1000].mean(0), data[:1000].T.cov())
    gain = model.log_prob(test).mean() - gaussian.log_prob(test).mean()
    assert gain > 1.0
    drawn = model.generate(2000, generator=make_generator(0))
    assert (drawn[:, 1] - (drawn[:, 0] - 10) ** 2).abs().median() < 0.3


def test_repeated_values_are_warned_of_unless_there_is_noise() -> None:
    data = torch.randint(4, (60, 3), generator=make_generator(0)) / 3
    with pytest.warns(UserWarning, match="3 of 3 features mostly repeat their values.*`levels`"):
        made().prepare(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(levels=4).prepare(data)
        made(noise=[-0.01, 0.0]).prepare(data)
        made().prepare(banana())


def test_constant_features_of_images_stay_finite() -> None:
    data = torch.randint(17, (100, 3), generator=make_generator(0)) / 16
    data[:, 1] = 0
    model = made(levels=17)
    history = model.fit(data, data[:20], epochs=3, batch_size=20, lr=1e-2)
    assert all(math.isfinite(value) for row in history.epochs for value in row.values())
    drawn = model.generate(500, generator=make_generator(0))[:, 1]
    assert (drawn == 0).double().mean() > 0.8  # a bell curve has tails beyond the cell
    assert drawn.max() <= 1 / 8


def test_measures_bits_per_dim() -> None:
    data = torch.randint(9, (200, 3), generator=make_generator(0)) / 8
    model = made(levels=9)
    history = model.fit(data, data, epochs=2, batch_size=50)
    row = history.best
    nats = (row["valid_bits_per_dim"] - math.log2(8)) * 3 * math.log(2)
    assert row["valid_loss"] == pytest.approx(nats, rel=1e-5)
    assert row["valid_bits_per_dim"] > math.log2(9) - 0.1  # the levels are uniform
    mean = model.bits_per_dim(data, generator=make_generator(0)).mean().item()
    assert mean == pytest.approx(row["valid_bits_per_dim"], abs=0.05)
    for other in (made(), made(levels=9, noise=[-0.01, 0.0])):
        assert set(other.evaluate(data)) == {"loss"}


def test_noise_of_the_users_own() -> None:
    model = made(levels=256, noise=[-0.01, 0.0])
    x = torch.rand(1000, 3, generator=make_generator(0))
    added = model.dequantize(x, generator=make_generator(1)) - x
    assert added.min() >= -0.01 - 1e-6
    assert added.max() <= 1e-6
    assert added.mean().item() == pytest.approx(-0.005, abs=3e-4)
    assert made().dequantize(x) is x


@pytest.mark.parametrize("step", [3, 10, 14])
@pytest.mark.parametrize("mixing", ["swap", "shuffle"])
def test_resumed_equals_uninterrupted(tmp_path: Path, step: int, mixing: str) -> None:
    data = torch.randint(17, (200, 3), generator=make_generator(0)) / 16

    class Stops(NICE):
        left = -1

        def loss(self, batch: Tensor) -> Tensor:
            if self.training:
                self.left -= 1
                if self.left == 0:
                    raise Interrupted
            return super().loss(batch)

    def fitted(left: int = -1, seed: int = 0, **given: Any) -> tuple[NICE, Any]:
        torch.manual_seed(seed)
        model = Stops(3, hidden=[8], levels=17, mixing=mixing)  # type: ignore[arg-type]
        model.left = left
        options = {"epochs": 3, "batch_size": 40, "lr": 1e-2, "ema": 0.9, **given}
        return model, model.fit(data, data[:50], **options)

    whole, wanted = fitted()
    with pytest.raises(Interrupted):
        fitted(left=step, folder=tmp_path, checkpoint_seconds=0.0)
    resumed, found = fitted(seed=1, folder=tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for row, other in zip(found.epochs, wanted.epochs, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_a_saved_model_is_the_same_once_loaded(tmp_path: Path) -> None:
    model = made(mixing="shuffle", prior="logistic", temperature=0.5)
    model.fit(banana(100), epochs=1)
    model.save(tmp_path)
    torch.manual_seed(5)
    loaded = NICE.load(tmp_path)
    assert loaded.config() == model.config()
    assert torch.equal(loaded.log_prob(banana(9)), model.log_prob(banana(9)))
    assert loaded.initialised
    again = loaded.fit(banana(100), epochs=1)
    assert math.isfinite(again.best["loss"])


@pytest.mark.parametrize(
    ("data", "given", "words"),
    [
        (torch.full((30, 3), math.nan), {}, "`examples` of NICE must be finite"),
        (torch.full((30, 3), math.inf), {}, "`examples` of NICE must be finite"),
        (torch.full((30, 3), 7.0), {"levels": 8}, r"must be in \[0, 1\], since `levels` is 8"),
        (torch.zeros(30, 4), {}, r"`examples` of NICE must .* \[batch, 3\]. Found \[30, 4\]"),
        (torch.zeros(0, 3), {}, "`examples` of fit must not be empty"),
    ],
)
def test_rejects_data(data: Tensor, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        made(**given).fit(data)


def test_one_row_is_enough() -> None:
    model = made(levels=3)
    history = model.fit(torch.tensor([[0.0, 0.5, 1.0]]), epochs=2)
    assert math.isfinite(history.best["loss"])
