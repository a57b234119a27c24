"""How each kind runs on files: what comes out, what is drawn, what is refused."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from kexue.core.component import PAD, Component, Example
from kexue.core.errors import ArgumentError, FileFormatError, UsageError, WorkError
from kexue.core.files import read_arrays, write_arrays
from kexue.core.interfaces.decoder import Decoder, DecodeResult
from kexue.core.interfaces.generator import Generator
from kexue.core.interfaces.layer import Layer
from kexue.core.interfaces.loss import Loss, reduce
from kexue.core.interfaces.optimizer import Optimizer, state_bytes
from kexue.core.interfaces.sampler import Sampler, Samples
from kexue.core.interfaces.similarity import Similarity
from kexue.core.plots import are_images, curves, draw, histogram, images, write_plot
from kexue.core.problems import PROBLEMS, Problem, make_problem
from kexue.core.registry import Registry
from kexue.core.run import Request, execute, write_example, write_result

# -- a component of every kind --------------------------------------------------------------------


class Squares(Loss):
    """Squared distance of scores from the one-hot target, or nothing that has a gradient.

    Args:
        num_classes: How many.
        flat: Cut the gradient.
        reduction: As everywhere.
    """

    def __init__(self, num_classes: int, *, flat: bool = False, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.num_classes = num_classes
        self.flat = flat

    def forward(self, scores: Float[Tensor, "batch class"], target: Int[Tensor, batch]) -> Tensor:
        """Return the loss.

        Args:
            scores: Scores.
            target: Targets.
        """
        wanted = nn.functional.one_hot(target, self.num_classes)
        values = ((scores.detach() if self.flat else scores) - wanted).square().sum(-1)
        return reduce(values, self.reduction)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three rows."""
        scores = torch.randn(3, 4, generator=generator)
        return Example({"num_classes": 4}, {"scores": scores, "target": torch.tensor([0, 3, 1])})


class Descent(Optimizer):
    """Gradient descent.

    Args:
        params: What to move.
        lr: Step.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step."""
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["last"] = parameter.grad.clone()
                    parameter.sub_(group["lr"] * parameter.grad)
        return loss

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return a problem."""
        del generator
        return Example({"lr": 1e-3}, {"problem": "quadratic"})


class Halving(Descent):
    """Gradient descent with half the step.

    Args:
        params: What to move.
        lr: Twice the step.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr / 2)


class Silent(Descent):
    """Gradient descent that forgets to return the loss.

    Args:
        params: What to move.
        lr: Step.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step."""
        super().step(closure)


class Greedy(nn.Module, Decoder):
    """The best tag at each position."""

    def decode(
        self,
        scores: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return tags.

        Args:
            scores: Scores.
            mask: Real positions.
        """
        mask = torch.ones(scores.shape[:2], dtype=torch.bool) if mask is None else mask
        best = scores.max(-1)
        total = torch.where(mask, best.values, 0).sum(1)
        return DecodeResult(torch.where(mask, best.indices, PAD), total)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three ragged sequences."""
        mask = torch.arange(3) < torch.tensor([3, 1, 2])[:, None]
        return Example({}, {"scores": torch.randn(3, 3, 2, generator=generator), "mask": mask})


class Draws(Sampler):
    """Draws from logits, or normal draws for a density."""

    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits or a density.
            num_samples: How many.
            generator: Randomness.
        """
        if isinstance(target, Tensor):
            probabilities = target.softmax(-1)
            values = torch.multinomial(probabilities, num_samples, True, generator=generator)
            return Samples(values)
        values = torch.randn(num_samples, 2, generator=generator)
        return Samples(values, {"mean_density": float(target(values).mean())})

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return logits."""
        return Example({}, {"target": torch.randn(4, generator=generator)})


class Walks(Draws):
    """Three chains of two features, the second of which stays where it is."""

    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits.
            num_samples: How many.
            generator: Randomness.
        """
        draws = torch.randint(3, (num_samples // 3, 3, 2), generator=generator)
        draws[..., 1] = len(target)
        return Samples(draws.flatten(0, 1), chains=draws.transpose(0, 1))


class Weighs(Draws):
    """Draws that count alike, and say so."""

    def sample(
        self, target: Any, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Samples:
        """Draw.

        Args:
            target: Logits.
            num_samples: How many.
            generator: Randomness.
        """
        values = super().sample(target, num_samples, generator=generator).values
        return Samples(values, weights=torch.full((num_samples,), 1 / num_samples))


class Gaussian(Generator):
    """A mean per feature.

    Args:
        num_features: Numbers per row.
        shape: Of a row.
    """

    def __init__(self, num_features: int, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_features = num_features
        self.shape = list(shape)
        self.mean = nn.Parameter(torch.zeros(num_features))

    def loss(self, batch: Tensor) -> Tensor:
        """Return the squared distance from the mean."""
        return (batch.flatten(1) - self.mean).square().mean()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"num_features": self.num_features, "shape": self.shape}

    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw.

        Args:
            num_samples: How many.
            generator: Randomness.
        """
        noise = torch.randn(num_samples, self.num_features, generator=generator)
        return (self.mean + 0.01 * noise).detach().view(num_samples, *self.shape)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return two features."""
        return Example({"num_features": 2}, {"x": torch.randn(3, 2, generator=generator)})


class Grey(Gaussian):
    """One that asks how many grey levels there are.

    Args:
        num_features: Numbers per row.
        shape: Of a row.
        levels: Grey levels, if any.
        spread: How far to draw from the mean.
    """

    def __init__(
        self,
        num_features: int,
        shape: Sequence[int] = (),
        levels: int | None = None,
        spread: float = 1.0,
    ) -> None:
        super().__init__(num_features, shape)
        self.levels, self.spread = levels, spread

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().config(), "levels": self.levels, "spread": self.spread}

    def generate(
        self,
        num_samples: int,
        *,
        spread: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw.

        Args:
            num_samples: How many.
            spread: Another one.
            generator: Randomness.
        """
        factor = self.spread if spread is None else spread
        mean = self.mean.detach().view(-1, *self.shape)
        return mean + factor * (super().generate(num_samples, generator=generator) - mean)


class Dot(Similarity):
    """The scalar product of vectors."""

    def __call__(self, a: Float[Tensor, "row feature"], b: Float[Tensor, "row feature"]) -> Tensor:
        """Return one number per row.

        Args:
            a: Vectors.
            b: Vectors.
        """
        return (a * b).sum(-1)

    def matrix(self, a: Any, b: Any) -> Tensor:
        """Return one number per pair."""
        product: Tensor = a @ b.T
        return product

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three pairs."""
        a, b = torch.randn(2, 3, 2, generator=generator)
        return Example({}, {"a": a, "b": b})


class Overlap(Similarity):
    """The share of common characters of lines."""

    reads: ClassVar[str] = "text"

    def __call__(self, a: list[str], b: list[str]) -> Tensor:
        """Return one number per row.

        Args:
            a: Lines.
            b: Lines.
        """
        pairs = zip(a, b, strict=True)
        return torch.tensor([len({*x} & {*y}) / len({*x, *y}) for x, y in pairs])

    def matrix(self, a: Any, b: Any) -> Tensor:
        """Return one number per pair."""
        self.statistics = {"texts": len(a) + len(b)}
        return torch.stack([self([x] * len(b), b) for x in a])

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return two pairs."""
        del generator
        return Example({}, {"a": ["ab", "cd"], "b": ["abc", "xy"]})


class Half(Layer):
    """Half of every feature in use, nothing in training."""

    def forward(self, features: Float[Tensor, "batch time feature"]) -> Tensor:
        """Return features.

        Args:
            features: Features.
        """
        return features * (0.0 if self.training else 0.5)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return features."""
        return Example({}, {"features": torch.randn(2, 3, 4, generator=generator)})


class Chance(Layer):
    """Features times a random weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(()))

    def forward(self, features: Float[Tensor, "batch time feature"]) -> Tensor:
        """Return features.

        Args:
            features: Features.
        """
        return features * self.weight

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return features."""
        return Example({}, {"features": torch.randn(2, 3, 4, generator=generator)})


def distance(scores: Tensor, target: Tensor, power: float = 1.0) -> Tensor:
    """Return a distance."""
    found: Tensor = (scores - target).abs() ** power
    return found


def double(features: Tensor) -> Tensor:
    """Return twice the features."""
    return 2 * features


def negative_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return how near vectors are."""
    found: Tensor = -(a - b).norm(dim=-1)
    return found


@pytest.fixture
def registry() -> Registry:
    registry = Registry(discover=False)
    targets = {
        ("loss", "squares"): "Squares",
        ("loss", "distance"): "distance",
        ("optimizer", "descent"): "Descent",
        ("optimizer", "halving"): "Halving",
        ("decoder", "greedy"): "Greedy",
        ("sampler", "draws"): "Draws",
        ("sampler", "walks"): "Walks",
        ("sampler", "weighs"): "Weighs",
        ("generator", "gaussian"): "Gaussian",
        ("generator", "grey"): "Grey",
        ("similarity", "dot"): "Dot",
        ("similarity", "overlap"): "Overlap",
        ("similarity", "near"): "negative_distance",
        ("layer", "half"): "Half",
        ("layer", "double"): "double",
        ("layer", "chance"): "Chance",
    }
    components = [
        Component(kind, name, f"{__name__}:{target}", f"{target}.")
        for (kind, name), target in targets.items()
    ]
    registry.register(components, slug="tiny", owner="tiny")
    return registry


@dataclass
class Runner:
    """Writes files and runs components on them."""

    registry: Registry
    folder: Path

    def file(self, name: str, content: Any) -> str:
        path = self.folder / name
        if isinstance(content, str):
            path.write_text(textwrap.dedent(content))
        else:
            write_arrays(path, {"": np.asarray(content)})
        return str(path)

    def __call__(self, name: str, *files: str, verb: str = "run", **given: Any) -> Any:
        """Run a component; what is not a field of a request is an option of its kind."""
        fields = {k: given.pop(k) for k in list(given) if k in Request.__dataclass_fields__}
        request = Request(name, verb, files, options=given, device="cpu", **fields)
        return execute(self.registry, request)[1]

    def plot(self, result: Any) -> bytes:
        path = self.folder / "plot.png"
        write_result(result, None, path)
        return path.read_bytes()


@pytest.fixture
def run(registry: Registry, tmp_path: Path) -> Runner:
    return Runner(registry, tmp_path)


@contextmanager
def refused(
    words: str, error: type[UsageError] = ArgumentError, **culprit: object
) -> Iterator[None]:
    """Assert a refusal in one line that names the culprit, in the text and as an attribute."""
    with pytest.raises(error, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)
    for name, value in culprit.items():
        assert str(getattr(caught.value, name)) == str(value)


@pytest.mark.parametrize(
    "name",
    [
        "loss/squares",
        "optimizer/descent",
        "decoder/greedy",
        "sampler/draws",
        "similarity/dot",
        "similarity/overlap",
        "layer/half",
    ],
)
def test_the_example_of_every_kind_runs_and_is_written(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    words = shlex.split(write_example(registry, name, tmp_path / "try"))
    end = words.index("--set") if "--set" in words else len(words)
    params = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    out = tmp_path / "out.npz"
    request = Request(name, files=words[3:end], params=params, device="cpu")
    _, result = execute(registry, request)
    write_result(result, out, tmp_path / "plot.png")
    assert set(read_arrays(out)) == set(result.arrays)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# -- losses ---------------------------------------------------------------------------------------


def test_a_loss_gives_one_value_per_row_and_its_gradient(run: Runner) -> None:
    files = run.file("scores.csv", "a,b\n1,2\n0.5,0\n"), run.file("target.json", "[1, 0]")
    result = run("squares", *files, grad=True)
    assert result.arrays["values"].tolist() == [2.0, 0.25]
    assert result.arrays["gradient"].tolist() == [[2.0, 2.0], [-1.0, 0.0]]
    assert result.summary == {"rows": 2, "mean": 1.125, "sum": 2.25}
    assert set(run("squares", *files).arrays) == {"values"}


def test_sizes_of_the_inputs_become_parameters(run: Runner) -> None:
    files = run.file("scores.npy", np.zeros((2, 5))), run.file("target.npy", [4, 0])
    assert run("squares", *files).summary["sum"] == 2.0
    with refused("num_classes", UsageError):
        run("squares", *files, params=["num_classes=many"])


def test_a_loss_may_have_no_rows(run: Runner) -> None:
    result = run("distance", run.file("a.npy", np.zeros(0)), run.file("b.npy", np.zeros(0)))
    assert result.summary["rows"] == 0
    assert math.isnan(result.summary["mean"])
    assert run.plot(result)


def test_a_function_is_a_loss(run: Runner) -> None:
    files = run.file("a.npy", [1.0, 3.0]), run.file("b.npy", [0.0, 0.0])
    assert run("distance", *files, params=["power=2"]).arrays["values"].tolist() == [1.0, 9.0]


def test_rejects_a_gradient_that_is_not_there(run: Runner) -> None:
    whole = run.file("a.npy", [1, 3]), run.file("b.npy", [0, 0])
    with refused(
        "`--grad` of loss/distance needs `scores` of floating.* Found int64", argument="grad"
    ):
        run("distance", *whole, grad=True)
    files = run.file("scores.npy", [[0.5, 1.0]]), run.file("target.npy", [1])
    with refused("`--grad` has no use here: loss/squares is not differentiable", argument="grad"):
        run("squares", *files, params=["flat=true"], grad=True)


# -- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_an_optimizer_lowers_the_loss(run: Runner, problem: str) -> None:
    result = run("descent", problem, steps=20, params=["lr=1e-4"])
    assert result.summary["last_loss"] < result.summary["first_loss"]
    assert result.summary["best_loss"] == result.summary["last_loss"]
    assert result.summary["state_bytes_per_parameter"] == 4.0
    assert result.arrays["loss"].shape == (21,)
    assert result.arrays["path"].shape == (21, 2)
    assert run.plot(result)


def test_a_diverging_optimizer_is_told_and_drawn(run: Runner) -> None:
    result = run("descent", "rosenbrock", steps=20, params=["lr=10"])
    assert math.isnan(result.summary["last_loss"])
    assert math.isfinite(result.summary["best_loss"])
    assert run.plot(result)


def test_the_best_loss_is_a_number_where_there_is_one(run: Runner) -> None:
    result = run("descent", f"{run.file('mine.py', PROBLEM_FILE)}:begins_undefined", steps=2)
    assert result.summary["best_loss"] == 2.0


def test_a_problem_is_of_the_dtype(run: Runner) -> None:
    result = run("descent", "quadratic", steps=1, dtype="float64")
    assert result.summary["state_bytes_per_parameter"] == 8.0
    assert result.arrays["path"].dtype == torch.float64


def test_several_optimizers_start_at_one_point_and_are_drawn_together(run: Runner) -> None:
    path = run.file("mine.py", PROBLEM_FILE)
    names = ("descent", "optimizer/halving", f"{path}:random")
    result = run(*names, steps=5, params=["lr=0.01", "descent.lr=0.02"])
    assert set(result.summary) == {"descent", "halving"}
    descent, halving = result.arrays["descent"], result.arrays["halving"]
    assert descent.shape == halving.shape == (6,)
    assert descent[0] == halving[0]
    assert descent[-1] < halving[-1] < halving[0]  # twice the learning rate; half of it
    assert result.arrays["halving-path"].shape == (6, 2)
    assert run.plot(result)


def test_the_problem_may_be_an_option(run: Runner) -> None:
    as_file, as_option = run("descent", "beale", steps=3), run("descent", problem="beale", steps=3)
    assert as_option.summary["problem"] == "beale"
    assert torch.equal(as_file.arrays["path"], as_option.arrays["path"])
    several = run("descent", "optimizer/halving", problem="ravine", steps=3, params=["lr=1e-3"])
    assert set(several.summary) == {"descent", "halving"}
    with refused("takes one problem. Found `--problem beale` and ravine", argument="problem"):
        run("descent", "ravine", problem="beale")
    with refused("must be one of .*ravine, .* Found 'ravin'", argument="problem"):
        run("descent", problem="ravin")


def test_says_when_each_optimizer_was_at_the_target(run: Runner) -> None:
    names = ("descent", "optimizer/halving", "quadratic")
    found = run(*names, steps=30, target=5.0, params=["lr=0.01"])
    for name, row in found.summary.items():
        reached = [i for i, loss in enumerate(found.arrays[name].tolist()) if loss <= 5.0]
        if reached:
            assert row["steps_to_target"] == reached[0] > 0
            assert 0 < row["seconds_to_target"] <= 30 / row["steps_per_second"]
    assert found.summary["descent"]["steps_to_target"] == 1  # the steep direction is gone at once
    assert run("descent", "quadratic", target=100.0).summary["steps_to_target"] == 0
    never = run("descent", "quadratic", steps=2, target=-1.0)
    assert never.summary["steps_to_target"] == never.summary["seconds_to_target"] == "not reached"
    assert run.plot(never)
    with refused("`--target` must be finite. Found nan", argument="target"):
        run("descent", "quadratic", target=math.nan)


def test_targets_come_from_the_problem(run: Runner) -> None:
    assert run("descent", "quadratic", steps=1).summary["target"] == pytest.approx(0.52)
    path = run.file("mine.py", PROBLEM_FILE)
    falling = run("descent", f"{path}:falls", steps=5).summary
    assert falling["best_loss"] == 1.0  # minus infinity is none, nor does it reach anything
    assert falling["target"] == pytest.approx(1.07)
    assert falling["steps_to_target"] == 3
    undefined = run("descent", f"{path}:begins_undefined", steps=2).summary
    assert math.isnan(undefined["target"])
    assert undefined["steps_to_target"] == "not reached"


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan"])
def test_rejects_learning_rates_that_are_none(run: Runner, rate: str) -> None:
    with refused("`lr` of optimizer/descent must be positive and finite. Found ", argument="lr"):
        run("descent", "beale", params=[f"lr=.{rate}" if rate in {"inf", "nan"} else f"lr={rate}"])


def test_passes_on_what_an_optimizer_says_of_its_settings(run: Runner) -> None:
    run.registry.register(
        [Component("optimizer", "sgd", "torch.optim:SGD", "Of torch.")], slug="t", owner="t"
    )
    with refused(r"optimizer/sgd takes no such settings \(lr=-1\): Invalid learning rate: -1"):
        run("optimizer/sgd", "beale", params=["lr=-1"])


def test_an_optimizer_returns_the_loss(run: Runner) -> None:
    name = f"{__name__}:Silent"
    component = Component("optimizer", "silent", name, "Returns nothing.")
    run.registry.register([component], slug="s", owner="s")
    with pytest.raises(WorkError, match=r"`step\(closure\)` of optimizer/silent must return"):
        run("silent", "beale", steps=1)


def test_what_is_set_for_one_of_several_names_it(run: Runner) -> None:
    with refused("`--set other.lr=1` is for no component that was named. Found 'other'"):
        run("descent", "optimizer/halving", "beale", params=["other.lr=1"])
    with refused("optimizer/halving has no parameter 'slope'"):
        run("descent", "optimizer/halving", "beale", params=["halving.slope=1"])
    with refused("optimizer/descent is named twice", argument="component"):
        run("descent", "optimizer/descent", "beale")
    with refused("No component named 'optimizer/halvin'", error=UsageError):
        run("descent", "optimizer/halvin", "beale")


PROBLEM_FILE = """
    import torch
    from kexue.core.problems import Problem

    weight = torch.ones(3, requires_grad=True)

    def tensor():
        return weight, lambda: weight.square().sum()

    def module():
        layer = torch.nn.Linear(20, 1)
        return layer, lambda: layer(torch.ones(20)).square().sum()

    def problem():
        return Problem("mine", [torch.nn.Parameter(torch.ones(1))], lambda: weight.sum())

    def random():
        point = torch.nn.Parameter(torch.randn(2))
        return point, lambda: (point - 3).square().sum()

    def begins_undefined():
        losses = iter([float("nan"), 3.0, 2.0])
        return weight, lambda: weight.sum() * 0 + next(losses)

    def falls():
        losses = iter([8.0, 4.0, 2.0, 1.0, float("-inf"), 3.0])
        return weight, lambda: weight.sum() * 0 + next(losses)

    def nothing():
        return [], lambda: weight.sum()

    def twice():
        return [weight, weight], lambda: weight.sum()

    def twice_in_a_problem():
        return Problem("mine", [weight, weight], lambda: weight.sum())

    def many_losses():
        return weight, lambda: weight * 2

    def no_loss():
        return weight, lambda: None

    def unrelated():
        return weight, lambda: torch.ones(())

    def number():
        return 3

    def constants():
        return [torch.ones(2)], lambda: 0

    def names():
        return ["a"], lambda: 0

    def of_a_point(x):
        return x.sum()

    def loss_of_a_point():
        return weight, lambda x: x.sum()

    def loss_of_a_point_in_a_problem():
        return Problem("mine", [weight], lambda x: x.sum())

    text = "no function"
"""


def test_runs_problems_of_the_user(run: Runner) -> None:
    path = run.file("mine.py", PROBLEM_FILE)
    result = run("descent", f"{path}:tensor", steps=5, params=["lr=0.1"])
    assert result.summary["parameters"] == 3
    assert result.summary["last_loss"] < 1
    result = run("descent", f"{path}:module", steps=5, params=["lr=0.001"])
    assert result.summary["parameters"] == 21
    assert "path" not in result.arrays  # too many to look at
    assert make_problem(f"{path}:problem").name == "mine"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("number", "must return a Problem, or parameters and a loss function. Found int"),
        ("text", "must return a Problem, or parameters and a loss function. Found str"),
        ("of_a_point", "of_a_point must take no arguments: .* Found: missing .*'x'"),
        ("loss_of_a_point", "The loss of .* must take no arguments: .* Found: missing .*'x'"),
        ("loss_of_a_point_in_a_problem", "The loss of .* must take no arguments: .*'x'"),
        ("constants", "must be tensors that require gradients.* Found Tensor"),
        ("names", "must be tensors that require gradients.* Found str"),
        ("nothing", "must return at least one parameter. Found none"),
        ("twice", "must be different from each other. Found 2, of which 1 are"),
        ("twice_in_a_problem", "must be different from each other. Found 2, of which 1 are"),
    ],
)
def test_rejects_problems_of_another_form(run: Runner, function: str, words: str) -> None:
    with refused(words, argument="problem"):
        make_problem(f"{run.file('mine.py', PROBLEM_FILE)}:{function}")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("many_losses", r"Found torch.float32 of shape \[3\]"),
        ("no_loss", "Found NoneType"),
        ("unrelated", "Found one that depends on no parameter"),
    ],
)
def test_rejects_losses_that_are_not_one_number(run: Runner, function: str, words: str) -> None:
    with refused(f"The loss of .*{function} must be a tensor of one .*{words}", argument="problem"):
        run("descent", f"{run.file('mine.py', PROBLEM_FILE)}:{function}", steps=1)


def test_rejects_problems_that_are_not_there(run: Runner) -> None:
    with refused(
        "must be one of .*Found 'rosenbrok'. Did you mean 'rosenbrock'", argument="problem"
    ):
        run("descent", "rosenbrok")
    with refused("has no 'tensr'. Did you mean 'tensor'"):
        run("descent", f"{run.file('mine.py', PROBLEM_FILE)}:tensr")
    with refused("nowhere.py does not exist"):
        run("descent", "nowhere.py:tensor")
    with refused("takes one file here, a problem: .* Found 0", argument="files"):
        run("descent")
    with refused("`--steps` must be at least 1. Found 0", argument="steps"):
        run("descent", "beale", steps=0)


def test_problems_have_the_minimum_that_they_claim() -> None:
    places = {
        "rosenbrock": (1.0, 1.0), "quadratic": (0.0, 0.0), "ravine": (0.0, 0.0),
        "beale": (3.0, 0.5),
    }  # fmt: skip
    assert places.keys() == PROBLEMS.keys()
    for name, place in places.items():
        problem = make_problem(name, dtype=torch.float64)
        assert isinstance(problem, Problem)
        with torch.no_grad():
            problem.parameters[0].copy_(torch.tensor(place))
        assert problem.loss().item() == problem.minimum == 0.0


def test_counts_the_bytes_of_a_state() -> None:
    parameter = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    assert state_bytes(optimizer) == 0
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert state_bytes(optimizer) == 40


# -- decoders -------------------------------------------------------------------------------------


def test_a_decoder_gives_sequences_and_their_scores(run: Runner) -> None:
    scores = run.file("scores.npy", [[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [9.0, 9.0]]])
    mask = run.file("mask.npy", [[True, True], [True, False]])
    result = run("greedy", scores, f"mask={mask}")
    assert result.arrays["sequences"].tolist() == [[1, 0], [1, PAD]]
    assert result.summary == {"sequences": 2, "mean_score": 3.0}
    write_result(result, run.folder / "out.jsonl", None)
    assert (run.folder / "out.jsonl").read_text() == "[1, 0]\n[1]\n"


def test_a_decoded_result_gives_lists_of_their_own_length() -> None:
    found = DecodeResult(torch.tensor([[1, 2], [0, PAD], [PAD, PAD]]), torch.zeros(3))
    assert found.tolist() == [[1, 2], [0], []]


# -- samplers -------------------------------------------------------------------------------------


def test_a_sampler_draws_from_logits(run: Runner) -> None:
    logits = run.file("logits.txt", "0 -inf 5")
    result = run("draws", f"{logits}", num_samples=500)
    counts = result.arrays["values"].flatten().bincount(minlength=3)
    assert result.summary == {"samples": 500}
    assert counts[1] == 0
    assert counts[2] > 450
    again = run("draws", logits, num_samples=500)
    assert torch.equal(result.arrays["values"], again.arrays["values"])
    other = run("draws", logits, num_samples=500, seed=1)
    assert not torch.equal(result.arrays["values"], other.arrays["values"])


def test_a_sampler_draws_from_a_function(run: Runner) -> None:
    path = run.file("density.py", "def normal(x):\n    return -x.square().sum(-1) / 2\nmean = 3\n")
    result = run("draws", f"{path}:normal", num_samples=50)
    assert result.summary["samples"] == 50
    assert result.summary["mean_density"] < 0
    with refused("must be a function from points to log-densities. Found int", argument="target"):
        run("draws", f"{path}:mean")


def test_a_sampler_draws_from_a_density_by_name_or_in_yaml(run: Runner) -> None:
    assert run("draws", "banana", num_samples=5).summary["mean_density"] < 0
    path = run.file("density.yaml", "density: funnel\nnum_features: 2\n")
    assert run("draws", path, num_samples=5).summary["mean_density"] < 0
    table = run.file("table.yml", "density: table\nprobabilities: [0, 1]\n")
    assert run("draws", table, num_samples=3).arrays["values"].tolist() == [1, 1, 1]
    with refused("Did you mean 'banana'", FileFormatError):
        run("draws", run.file("wrong.yaml", "density: bananna\n"))


def test_a_density_in_python_may_give_text(run: Runner) -> None:
    source = """\
        import torch
        from kexue.core.densities import Density

        def to_text(values):
            return [f"row {i}" for i in range(len(values))]

        words = Density(lambda x: x.sum(1).float(), to_text=to_text)
        logits = torch.tensor([0.0, 1.0])
        """
    path = run.file("words.py", source)
    assert list(run("draws", f"{path}:words", num_samples=2).lines) == ["row 0", "row 1"]
    as_array = run("draws", f"{path}:words", num_samples=2, out=run.folder / "words.npy")
    assert as_array.lines is None
    assert len(run("draws", f"{path}:logits", num_samples=7).arrays["values"]) == 7


def test_weights_and_chains_are_written_and_drawn(run: Runner) -> None:
    logits = run.file("logits.npy", [0.0, 1.0, 2.0])
    result = run("walks", logits, num_samples=60)
    assert {name: list(array.shape) for name, array in result.arrays.items()} == {
        "values": [60, 2], "chains": [3, 20, 2],
    }  # fmt: skip
    assert run.plot(result).startswith(b"\x89PNG")
    weighted = run("weighs", logits, num_samples=4)
    assert weighted.arrays["weights"].tolist() == [0.25] * 4
    assert run.plot(weighted).startswith(b"\x89PNG")


def test_a_sampler_rejects_bad_calls(run: Runner) -> None:
    logits = run.file("logits.npy", [0.5, float("nan")])
    with refused("`target` in .* must not hold NaN", argument="target"):
        run("draws", logits)
    with refused("`--num-samples` must be at least 1. Found -3", argument="num_samples"):
        run("draws", logits, num_samples=-3)
    with refused("takes one file here, logits, a density in YAML, .*. Found 2", argument="files"):
        run("draws", logits, logits)


# -- similarities ---------------------------------------------------------------------------------


def test_a_similarity_compares_rows_pairs_and_neighbours(run: Runner) -> None:
    a = run.file("a.csv", "1,0\n0,2\n")
    b = run.file("b.csv", "1,1\n3,4\n")
    assert run("dot", a, b).arrays["similarities"].tolist() == [1.0, 8.0]
    assert run("dot", a, b, matrix=True).arrays["similarities"].tolist() == [[1, 3], [2, 8]]
    found = run("dot", a, b, search=1)
    assert found.arrays["indices"].tolist() == [[1], [1]]
    assert found.summary == {"queries": 2, "corpus": 2}
    assert run("dot", a, b, search=9).arrays["indices"].shape == (2, 2)


def test_a_similarity_of_numbers_in_one_column(run: Runner) -> None:
    column = run.file("a.csv", "1\n2\n")
    assert run("dot", column, column).arrays["similarities"].tolist() == [1.0, 4.0]


def test_a_similarity_of_text_reads_lines(run: Runner) -> None:
    a, b = run.file("a.txt", "abc\n\u4e2d\u6587"), run.file("b.txt", "abd\n\u4e2d\n")
    assert run("overlap", a, b).arrays["similarities"].tolist() == [0.5, 0.5]
    with refused("empty.txt is empty", FileFormatError):
        run("overlap", a, run.file("empty.txt", ""))


def test_a_similarity_of_text_shows_the_texts_the_most_alike_first(run: Runner) -> None:
    a, b = run.file("a.txt", "abc\nx\n"), run.file("b.txt", "az\ncab\n")
    assert list(run("overlap", a, b).lines or ()) == [
        "abc",
        "        0.25       0  az",
        "x",
        "           0       1  cab",
    ]
    both = ["abc", "           1       1  cab", "        0.25       0  az"]
    for options in ({"matrix": True}, {"search": 2}):
        assert list(run("overlap", a, b, **options).lines or ())[:3] == both
    assert list(run("overlap", a, b, search=1).lines or ())[:2] == both[:2]
    assert run("dot", *[run.file("a.csv", "1,0\n")] * 2).lines is None


def test_a_similarity_shows_its_statistics(run: Runner) -> None:
    a = run.file("a.txt", "abc\nx\n")
    assert run("overlap", a, a, matrix=True).summary["texts"] == 4
    assert "texts" not in run("overlap", a, a).summary


@pytest.mark.parametrize("name", ["out.npy", "out.txt"])
def test_a_similarity_of_text_is_written_as_numbers_or_as_lines(run: Runner, name: str) -> None:
    a, out = run.file("a.txt", "abc\nx\n"), run.folder / name
    result = run("overlap", a, a, matrix=True)
    lines = list(result.lines or ())
    result.lines = iter(lines)
    write_result(result, out, None)
    assert result.lines is None
    if name == "out.npy":
        assert np.load(out).tolist() == [[1, 0], [0, 1]]
    else:
        assert out.read_text("utf-8").splitlines() == lines


def test_a_function_is_a_similarity_of_rows(run: Runner) -> None:
    a = run.file("a.npy", [[0.0, 3.0]])
    assert run("near", a, run.file("b.npy", [[4.0, 0.0]])).arrays["similarities"].tolist() == [-5.0]
    for option in ({"matrix": True}, {"search": 2}):
        with refused(
            "is a plain function and compares row by row only", argument=next(iter(option))
        ):
            run("near", a, a, **option)


def test_a_similarity_rejects_bad_calls(run: Runner) -> None:
    a, b = run.file("a.npy", [[1.0, 2.0]]), run.file("b.npy", [[1.0, 2.0], [3.0, 4.0]])
    with refused("compares two files. Found 1", argument="files"):
        run("dot", a)
    with refused("both files need as many rows. Found 1 and 2; `--matrix`", argument="files"):
        run("dot", a, b)
    with refused("`--search` must be how many rows to find.* Found -1", argument="search"):
        run("dot", a, b, search=-1)
    with refused("without `--matrix`. Found 1 and --matrix", argument="search"):
        run("dot", a, b, search=1, matrix=True)
    with refused("`vectors` in .* must not hold NaN", argument="vectors"):
        run("dot", a, run.file("c.npy", [[float("nan")]]))


# -- layers ---------------------------------------------------------------------------------------


def test_a_layer_is_applied_as_in_use(run: Runner) -> None:
    features = run.file("features.npy", np.full((1, 2, 1), 4.0))
    result = run("half", features)
    assert result.arrays["features"].tolist() == [[[2.0], [2.0]]]
    assert result.summary == {"shape": [1, 2, 1], "mean": 2.0, "std": 0.0}


def test_a_layer_takes_one_number_and_none(run: Runner) -> None:
    assert run("half", run.file("a.npy", [[[4.0]]])).summary["std"] == 0.0
    result = run("half", run.file("b.npy", np.zeros((0, 2, 1))))
    assert math.isnan(result.summary["std"])
    assert run.plot(result)


def test_the_seed_decides_fresh_weights(run: Runner) -> None:
    ones = run.file("ones.npy", np.ones((1, 1, 1)))
    drawn = [run("chance", ones, seed=seed).summary["mean"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_function_is_a_layer(run: Runner) -> None:
    assert run("double", run.file("a.npy", [1.5])).arrays["features"].tolist() == [3.0]


# -- generators -----------------------------------------------------------------------------------


@pytest.fixture
def rows(run: Runner) -> str:
    generator = np.random.default_rng(0)
    return run.file("rows.npy", generator.normal([1.0, -1.0], 0.1, (60, 2)))


def fitted(run: Runner, data: str, **given: Any) -> Path:
    out = run.folder / "model"
    result = run("gaussian", data, verb="fit", out=out, epochs=20, lr=0.1, **given)
    assert result.files == (out,)
    return out


def test_a_generator_is_fitted_and_generates(run: Runner, rows: str) -> None:
    model = fitted(run, rows)
    result = run("gaussian", model=model, num_samples=500)
    assert result.summary == {"samples": 500, "shape": [500, 2]}
    mean = result.arrays["samples"].mean(0)
    assert torch.allclose(mean, torch.tensor([1.0, -1.0]), atol=0.05)
    again = run("gaussian", model=model, num_samples=500)
    assert torch.equal(again.arrays["samples"], result.arrays["samples"])
    assert run.plot(result)


def test_the_summary_of_a_fit_says_what_was_built(run: Runner, rows: str) -> None:
    result = run("gaussian", rows, verb="fit", out=run.folder / "m", epochs=1)
    assert result.summary["rows"] == 54
    assert result.summary["parameters"] == {"num_features": 2, "shape": (2,)}
    assert result.summary["epochs"] == 1
    assert write_result(result, run.folder / "m", None) == [run.folder / "m"]


def test_a_generator_is_fitted_to_images(run: Runner) -> None:
    folder = run.folder / "images"
    folder.mkdir()
    for number in range(12):
        Image.new("L", (3, 2), 255 if number % 2 else 0).save(folder / f"{number}.png")
    result = run("gaussian", model=fitted(run, str(folder)), num_samples=4)
    assert result.summary["shape"] == [4, 2, 3]
    assert 0 <= float(result.arrays["samples"].mean()) <= 1
    assert run.plot(result)


def test_a_generator_is_told_the_grey_levels(run: Runner) -> None:
    picture = run.folder / "a.png"
    Image.new("L", (3, 2), 51).save(picture)
    pixels = run.file("pixels.npy", np.full((12, 2, 3), 51, np.uint8))
    for number, given in enumerate([str(picture), pixels]):
        out = run.folder / f"grey{number}"
        summary = run("grey", given, verb="fit", out=out, epochs=40, lr=0.05).summary
        assert summary["parameters"]["levels"] == 256
        drawn = run("grey", model=out, num_samples=500).arrays["samples"]
        assert float(drawn.mean()) == pytest.approx(0.2, abs=0.02)
    numbers = run.file("numbers.npy", np.full((12, 2, 3), 51))
    summary = run("grey", numbers, verb="fit", out=run.folder / "m", epochs=1).summary
    assert "levels" not in summary["parameters"]


def test_a_generator_draws_samples_while_it_trains(run: Runner, rows: str) -> None:
    samples = fitted(run, rows) / "samples"
    names = [p.name for p in sorted(samples.iterdir())]
    assert names == [f"epoch-{epoch:04}.png" for epoch in (5, 10, 15, 20)]
    before = {p.name: p.read_bytes() for p in samples.iterdir()}
    fitted(run, rows, overwrite=True, sample_every=10)
    assert sorted(p.name for p in samples.iterdir()) == names[1::2]
    assert (samples / names[3]).read_bytes() == before[names[3]]
    fitted(run, rows, overwrite=True, sample_every=0)
    assert not any(samples.iterdir())
    with refused("`--sample-every` must be at least 0. Found -1", argument="sample_every"):
        fitted(run, rows, sample_every=-1)


def test_a_generator_keeps_the_average_of_its_weights(run: Runner, rows: str) -> None:
    model = fitted(run, rows, ema=0.9)
    average = run("gaussian", model=model, num_samples=50).arrays["samples"]
    fitted(run, rows, overwrite=True)
    plain = run("gaussian", model=model, num_samples=50).arrays["samples"]
    assert torch.allclose(average, plain, atol=0.1)
    assert not torch.equal(average, plain)


def test_a_generator_takes_settings_of_generate(run: Runner, rows: str) -> None:
    out = run.folder / "grey"
    run("grey", rows, verb="fit", out=out, epochs=1)
    narrow, wide = (
        run("grey", model=out, params=[f"spread={s}"], num_samples=500).arrays["samples"].std(0)
        for s in (0.5, 2.0)
    )
    assert torch.allclose(wide / narrow, torch.tensor(4.0))
    with refused("with `--model` takes no set: .* What can be set: spread", argument="set"):
        run("grey", model=out, params=["levels=3"])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_a_result_can_be_written_as_a_picture(run: Runner, rows: str, suffix: str) -> None:
    result = run("gaussian", model=fitted(run, rows, sample_every=0), num_samples=9)
    out = run.folder / f"samples.{suffix}"
    assert write_result(result, out, None) == [out]
    assert out.stat().st_size > 1000
    with refused("must end in one of .npy .* Found '.png'", FileFormatError):
        write_result(result, run.folder / "a.png", run.folder / "b.png")


def test_a_generator_is_fitted_to_one_column(run: Runner) -> None:
    model = fitted(run, run.file("rows.csv", "x\n" + "0.5\n" * 20))
    assert run("gaussian", model=model, num_samples=2).summary["shape"] == [2, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1.0, 2.0], r"`data` in .* must be rows.* Found shape \[2\]"),
        (3.0, r"must be rows.* Found shape \[\]"),
        (np.zeros((0, 2)), r"must be rows.* Found shape \[0, 2\]"),
        ([[1.0, float("nan")]], r"`data` in .* must not hold NaN"),
        ([[1e39]], "`data` in .* must be within float32"),
    ],
    ids=["one axis", "no axis", "no rows", "nan", "overflow"],
)
def test_a_generator_rejects_data(run: Runner, content: Any, words: str) -> None:
    with refused(words, argument="data"):
        run("gaussian", run.file("a.npy", content), verb="fit", out=run.folder / "m")
    assert not (run.folder / "m").exists()


def test_bad_data_leave_an_unfinished_run_alone(run: Runner) -> None:
    folder = run.folder / "model"
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(b"precious")
    with refused("must not hold NaN"):
        run(
            "gaussian",
            run.file("a.npy", [[float("nan")]]),
            verb="fit",
            out=folder,
            overwrite=True,
        )
    with refused("already holds an unfinished run. Add `--resume`", argument="out"):
        run("gaussian", run.file("b.npy", np.ones((5, 2))), verb="fit", out=folder)
    assert (folder / "checkpoint.safetensors").read_bytes() == b"precious"


def test_a_generator_rejects_bad_calls(run: Runner, rows: str) -> None:
    with refused("generates from a fitted model: `kexue fit", argument="model"):
        run("gaussian")
    with refused("needs a folder for the model: `-o model/`", argument="out"):
        run("gaussian", rows, verb="fit")
    with refused("takes one file here, an array.* Found 0", argument="files"):
        run("gaussian", verb="fit", out=run.folder / "m")
    with refused("holds no fitted model", FileFormatError):
        run("gaussian", model=run.folder)
    model = fitted(run, rows)
    with refused("`--num-samples` must be at least 1. Found 0", argument="num_samples"):
        run("gaussian", model=model, num_samples=0)
    with refused("with `--model` takes no files", argument="files"):
        run("gaussian", rows, model=model)
    with refused("with `--model` takes no set", argument="set"):
        run("gaussian", model=model, params=["num_features=3"])
    with refused("with `--model` takes no weights", argument="weights"):
        run("gaussian", model=model, weights=Path(rows))


def test_a_generator_rejects_the_model_of_another(run: Runner, rows: str) -> None:
    config = fitted(run, rows) / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("generator/gaussian", "generator/other"))
    with refused("was fitted with generator/other, not .*Run `kexue run generator/other --model"):
        run("gaussian", model=config.parent)
    config.write_text(whole.replace("num_features: 2", "num_features: 3"))
    with refused("does not hold this model's weights", FileFormatError):
        run("gaussian", model=config.parent)
    config.write_text(whole.replace("num_features: 2", "features: 2"))
    with refused("does not describe a Gaussian", FileFormatError):
        run("gaussian", model=config.parent)


# -- plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (torch.tensor([0.5, math.nan, math.inf]), "value (2 not finite)"),
        (torch.tensor([math.nan]), "value (1 not finite)"),
        (torch.zeros(0), "value"),
        (torch.tensor([1, 2, 3]), "value"),
        (torch.tensor([True, False]), "value"),
        (torch.ones(3, dtype=torch.bfloat16, requires_grad=True), "value"),
        (np.ones((2, 2)), "value"),
        (torch.tensor(3.0), "value"),
    ],
)
def test_draws_a_histogram_of_anything(tmp_path: Path, values: Any, label: str) -> None:
    figure = draw(lambda f: histogram(f, values, "value"))
    assert figure.axes[0].get_xlabel() == label
    write_plot(tmp_path / "a.png", lambda f: histogram(f, values, "value"))


def test_draws_curves_with_gaps(tmp_path: Path) -> None:
    lines = {"a": [1.0, math.nan, 3.0], "b": [2.0, math.inf], "c": []}
    for log in (False, True):
        write_plot(tmp_path / "a.png", partial(curves, lines=lines, x="x", y="y", log=log))
    assert len(draw(lambda f: curves(f, lines, x="x", y="y")).axes[0].get_lines()) == 3


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ((3, 8, 8), True),
        ((3, 8, 8, 1), True),
        ((3, 8, 8, 3), True),
        ((3, 8, 8, 4), True),
        ((3, 8, 8, 2), False),
        ((3, 8), False),
        ((3, 2, 8, 8, 3), False),
    ],
)
def test_knows_what_are_images(shape: tuple[int, ...], drawn: bool) -> None:
    assert are_images(shape) is drawn
    if drawn:
        assert drawn_pixels(torch.rand(shape)).shape[:2] == (17, 17)


def drawn_pixels(pixels: Any, **options: Any) -> Any:
    (axes,) = draw(lambda f: images(f, pixels, **options)).axes
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def test_draws_images_side_by_side() -> None:
    pixels = np.arange(12).reshape(3, 2, 2) / 11
    found = drawn_pixels(pixels)
    assert found.shape == (5, 5)
    for number, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        assert np.array_equal(found[row : row + 2, column : column + 2], pixels[number])
    assert (found[3:, 3:] == 1).all()
    assert drawn_pixels(pixels, columns=3).shape == (2, 8)
    coloured = np.random.default_rng(0).random((2, 3, 4, 3))
    assert np.array_equal(drawn_pixels(coloured, columns=2)[:, 5:], coloured[1])


def test_images_beyond_black_and_white_are_scaled() -> None:
    found = drawn_pixels(np.array([[[-1.0, 0.0, 3.0], [math.nan, math.inf, -math.inf]]]))
    assert found.tolist() == [[0.0, 0.25, 1.0], [1.0, 1.0, 0.0]]


def test_draws_at_most_sixty_four_images_and_at_least_none() -> None:
    assert drawn_pixels(np.zeros((100, 2, 2))).shape == (23, 23)
    for nothing in (np.zeros((0, 2, 2)), np.full((2, 3, 3), math.nan)):
        (axes,) = draw(partial(images, pixels=nothing)).axes
        assert not axes.get_images()


def test_a_plot_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fails(figure: Any) -> None:
        raise ValueError(figure)

    with pytest.raises(ValueError, match="Figure"):
        write_plot(path, fails)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
