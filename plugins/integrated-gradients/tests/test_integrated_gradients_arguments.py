"""What is refused, what is warned about, and what is left as it was."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, WorkError
from kexue_integrated_gradients import IntegratedGradients, integrated_gradients
from kexue_integrated_gradients.integrated_gradients import CompletenessWarning
from kexue_integrated_gradients.quadrature import RULES, Rule, nodes

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def two(p: Tensor) -> Tensor:
    return torch.stack([p.sum(1), p.prod(1)], 1)


@pytest.mark.parametrize(
    ("changed", "argument", "words"),
    [
        ({"inputs": X.long()}, "inputs", "floating point.*Found int64.*`layer=`"),
        ({"inputs": X.bool()}, "inputs", "Found bool"),
        ({"inputs": X.to(torch.complex64)}, "inputs", "Found complex64"),
        ({"inputs": X / 0}, "inputs", "finite"),
        ({"inputs": torch.tensor(1.0)}, "inputs", r"\[batch, ...\].*shape \[\]"),
        ({"inputs": X.numpy()}, "inputs", "Found ndarray"),
        ({"inputs": ()}, "inputs", "Found nothing"),
        ({"inputs": (X, X[:2])}, "inputs", "as many rows each. Found 3, 2"),
        ({"model": 3}, "model", "Found int"),
        ({"model": lambda p: p[:, :2].argmax(1)}, "model", "floating-point scores.*int64"),
        ({"model": lambda p: p.detach()[:, :2]}, "model", "differentiable"),
        ({"model": lambda p: (two(p),)}, "model", "must return a tensor. Found tuple"),
        ({"model": lambda p: p.sum()}, "model", r"one output per row, 3 here. .*\[\]"),
        ({"model": lambda p: two(p)[:2]}, "model", r"Found shape \[2, 2\]"),
        ({"target": None}, "target", r"which of the outputs \[2\]"),
        ({"target": 2}, "target", r"below the sizes \[2\].*Found \[2\]"),
        ({"target": -1}, "target", "not negative"),
        ({"target": [0, 1]}, "target", "each of the 3 rows.*Found 2"),
        ({"target": [0, 1, 5]}, "target", r"Found \[5\]"),
        ({"target": (0, 1)}, "target", r"each of the 1 axes of a row's output, \[2\]. Found 2"),
        ({"target": 0.5}, "target", "whole number.*Found 0.5"),
        ({"target": True}, "target", "Found True"),
        ({"target": "cat"}, "target", "Found 'cat'"),
        ({"target": torch.tensor([0.0, 1, 1])}, "target", "a tensor of float32 with shape"),
        ({"target": torch.tensor(1)}, "target", "one per row"),
        ({"baselines": X[:2]}, "baselines", r"broadcast to the shape \[3, 4\]. Found \[2, 4\]"),
        ({"baselines": []}, "baselines", "at least one"),
        ({"baselines": "zero"}, "baselines", "Found str"),
        ({"baselines": True}, "baselines", "Found bool"),
        ({"baselines": math.nan}, "baselines", "finite"),
        ({"baselines": (0.0, 0.0)}, "baselines", "each of the 1 inputs.*Found tuple of 2"),
        ({"inputs": (X, X), "baselines": X}, "baselines", "each of the 2 inputs"),
        ({"steps": 0}, "steps", "at least 1.*Found 0"),
        ({"steps": 2.0}, "steps", "whole number"),
        ({"steps": True}, "steps", "whole number"),
        ({"steps": 1, "rule": "trapezoid"}, "steps", "at least 2 for 'trapezoid'"),
        ({"rule": "gauss"}, "rule", "Found 'gauss'"),
        ({"max_rows": 0}, "max_rows", "at least 1"),
        ({"max_rows": 1.5}, "max_rows", "whole number"),
        ({"tolerance": -1.0}, "tolerance", "at least 0"),
        ({"tolerance": math.nan}, "tolerance", "at least 0"),
        ({"layer": "first"}, "layer", "no named layers"),
    ],
)
def test_refuses(changed: dict[str, Any], argument: str, words: str) -> None:
    integrated_gradients(two, X, target=0, steps=1)  # what was accepted before changes nothing
    call: dict[str, Any] = {"model": two, "inputs": X, "target": 0, **changed}
    with pytest.raises(ArgumentError, match=words) as caught:
        integrated_gradients(call.pop("model"), call.pop("inputs"), **call)
    assert caught.value.argument == argument
    assert f"`{argument}`" in str(caught.value)


def test_the_class_refuses_its_settings() -> None:
    wrong: list[dict[str, Any]] = [{"steps": 0}, {"rule": "x"}, {"max_rows": 0}]
    for changed in [*wrong, {"tolerance": -1}]:
        with pytest.raises(ArgumentError, match=f"`{next(iter(changed))}`"):
            IntegratedGradients(**changed)


def test_targets_may_be_of_numpy() -> None:
    wanted = integrated_gradients(two, X, target=[0, 1, 1]).values
    several: list[Any] = [np.array([0, 1, 1]), torch.tensor([0, 1, 1], dtype=torch.uint8)]
    for target in several:
        found = integrated_gradients(two, X, target=target)
        torch.testing.assert_close(found.values, wanted)
    single: Any = np.int64(1)
    torch.testing.assert_close(
        integrated_gradients(two, X, target=single).values,
        integrated_gradients(two, X, target=1).values,
    )


def test_says_where_the_gradient_is_not_finite() -> None:
    x = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    with pytest.raises(WorkError, match=r"row 0, 0 of the way.*`rule='gauss-legendre'`"):
        integrated_gradients(lambda p: p.sqrt().sum(1), x, rule="left", tolerance=9)
    inside = integrated_gradients(lambda p: p.sqrt().sum(1), x, steps=200)
    torch.testing.assert_close(inside.values, x.sqrt(), rtol=0.01, atol=0)
    with pytest.raises(WorkError, match=r"not finite in row 1, 0\.5 of the way"):
        integrated_gradients(lambda p: (p - 2).abs().sqrt().sum(1), x, rule="midpoint", steps=1)
    with pytest.raises(WorkError, match=r"at the baseline of row 0\. Choose another"):
        integrated_gradients(lambda p: p.log().sum(1), x)
    with pytest.raises(WorkError, match=r"at the input of row 1\. Leave it out"):
        integrated_gradients(lambda p: (4 - p).reciprocal().sum(1), x)
    huge = torch.full((1, 2), 1e30)
    with pytest.raises(WorkError, match="overflows in row 0"):
        integrated_gradients(lambda p: 1e20 * (p[:, 0] - p[:, 1]), huge)


def test_warns_of_incompleteness_with_a_remedy() -> None:
    def step(p: Tensor) -> Tensor:
        return (50 * (p - 0.5)).sigmoid().sum(1)

    x = torch.ones(2, 1)
    with pytest.warns(CompletenessWarning, match=r"by \d+\.\d%.*steps` than 3, or `rule='gauss"):
        integrated_gradients(step, x, steps=3, rule="left")
    with pytest.warns(CompletenessWarning, match=r"steps` than 3\.$"):
        found = integrated_gradients(step, x, steps=3)
    assert found.relative_error > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integrated_gradients(step, x, steps=100)
        integrated_gradients(step, x, steps=3, tolerance=9)


def test_equal_outputs_bring_no_warning() -> None:
    """F(x) = F(x̄): nothing but rounding is left, which no number of steps would lower."""
    x = torch.tensor([[1.0, 1.0]])
    found = integrated_gradients(lambda p: (p[:, 0] - p[:, 1]) * 1e3, x)
    assert found.relative_error == 0
    torch.testing.assert_close(found.values, torch.tensor([[1000.0, -1000.0]]))


# -- what is left as it was -----------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.norm.running_mean = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.norm(x)).tanh())
        return out


def test_training_mode_is_evaluated_and_left() -> None:
    model = Trained()
    model.drop.eval()
    wanted = integrated_gradients(copy.deepcopy(model).eval(), X.float(), target=0).values
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    torch.testing.assert_close(integrated_gradients(model, X.float(), target=0).values, wanted)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_training_mode_comes_back_after_an_error() -> None:
    model = Trained()
    with pytest.raises(ArgumentError):
        integrated_gradients(model, X.float())
    assert all(m.training for m in model.modules())
    with pytest.raises(RuntimeError, match="running_mean should contain 3"):
        integrated_gradients(model, X.float()[:, :3], target=0)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_stay_as_they_are(frozen: bool) -> None:
    model = Trained().requires_grad_(not frozen)
    x = X.float().requires_grad_()
    found = integrated_gradients(model, x, target=0)
    assert not found.values.requires_grad
    assert not found.outputs.requires_grad
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context: Any) -> None:
    model = Trained()
    wanted = integrated_gradients(model, X.float(), X[0].float(), target=0, additional=())
    with context():
        x = X.float() * 1
        scale = torch.ones(3, 1)
        found = integrated_gradients(
            lambda p, s: model.eval()(p * s), x, x[0], target=0, additional=(scale,)
        )
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_networks_in_evaluation(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(4, 5, batch_first=True).eval()
    x = torch.randn(3, 6, 4)
    found = integrated_gradients(lambda p: model(p)[0][:, -1], x, target=0)
    assert found.relative_error < 1e-3


# -- the component --------------------------------------------------------------------------------


def test_the_class_is_the_function_with_settings() -> None:
    settings: dict[str, Any] = {"steps": 7, "rule": "right", "max_rows": 5, "tolerance": 9.0}
    component = IntegratedGradients(**settings)
    found = component.attribute(two, X, 0.5, target=1)
    wanted = integrated_gradients(two, X, 0.5, target=1, **settings)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    twin = pickle.loads(pickle.dumps(component))  # noqa: S301 -- our own bytes
    assert vars(twin) == vars(component)
    assert repr(component) == (
        "IntegratedGradients(steps=7, rule='right', max_rows=5, tolerance=9.0)"
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 10, 101])
def test_nodes_are_in_order_and_weights_add_up(rule: Rule, steps: int) -> None:
    points, weights = nodes(rule, steps)
    assert points.shape == weights.shape == (steps,)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(points) > 0).all()
    assert points.min() >= 0
    assert points.max() <= 1
    ends = {"left": (0, None), "right": (None, 1), "trapezoid": (0, 1)}.get(rule, (None, None))
    assert [float(points[0]) == 0, float(points[-1]) == 1] == [end is not None for end in ends]
    if rule in {"gauss-legendre", "midpoint", "trapezoid"}:
        np.testing.assert_allclose(points, 1 - points[::-1], atol=1e-14)
        assert (weights * points).sum() == pytest.approx(0.5)


def test_an_unknown_rule_is_guessed() -> None:
    with pytest.raises(ArgumentError, match=re.escape("Did you mean 'midpoint'?")):
        nodes(cast(Rule, "midpiont"), 3)
