"""The flow against autograd's Jacobian, its inverse, its integral and the post's formulation."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.device import make_generator
from kexue_nice import NICE

JACOBIAN: Any = torch.autograd.functional.jacobian
NORMAL: Any = torch.distributions.Normal
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {"split": "half"},
    "shuffle": {"mixing": "shuffle", "split": "half"},
    "unmixed": {"mixing": "none"},
    "relu": {"relu_output": True},
    "logistic": {"prior": "logistic"},
    "linear": {"hidden": []},
    "one": {"num_couplings": 1},
}


def flow(num_features: int = 6, *, seed: int = 0, gain: float = 2, **given: Any) -> NICE:
    """Return a flow whose every parameter and buffer matters."""
    torch.manual_seed(seed)
    model = NICE(num_features, **{"hidden": [16, 16], **given})
    with torch.no_grad():
        for parameter in model.couplings.parameters():
            parameter.mul_(gain)
        model.scale.log_scale.normal_(std=0.5)
        model.center.normal_()
    return model.double().eval()


def log_det(model: NICE, x: Tensor) -> Tensor:
    """Return log |det ∂z/∂x| by autograd."""
    jacobian = JACOBIAN(lambda row: model.encode(row[None])[0], x)
    found: Tensor = torch.linalg.slogdet(jacobian).logabsdet
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("num_features", [2, 5, 6])
def test_log_prob_matches_autograd_jacobian(name: str, num_features: int) -> None:
    model = flow(num_features, **SETTINGS[name])
    x = torch.randn(3, num_features, dtype=torch.float64)
    z = model.encode(x)
    if name == "logistic":
        prior = (-z - 2 * torch.log1p(torch.exp(-z))).sum(-1)
    else:
        prior = NORMAL(0.0, 1.0).log_prob(z).sum(-1)
    wanted = prior + torch.stack([log_det(model, row) for row in x])
    assert torch.allclose(model.log_prob(x), wanted, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_couplings_preserve_volume(name: str) -> None:
    model = flow(7, **SETTINGS[name])
    nn.init.zeros_(model.scale.log_scale)
    assert log_det(model, torch.randn(7, dtype=torch.float64)).abs() < 1e-12


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["32", "64"]
)
@pytest.mark.parametrize("num_couplings", [4, 10])
def test_decode_undoes_encode(
    name: str, dtype: torch.dtype, tolerance: float, num_couplings: int
) -> None:
    model = flow(33, gain=1, **{"num_couplings": num_couplings, **SETTINGS[name]}).to(dtype)
    x = torch.randn(50, 33, dtype=dtype, generator=make_generator(1))
    assert (model.decode(model.encode(x)) - x).abs().max() < tolerance
    z = torch.randn(50, 33, dtype=dtype, generator=make_generator(2))
    assert (model.encode(model.decode(z)) - z).abs().max() < 10 * tolerance  # s is up to 5


@settings(max_examples=30, deadline=None)
@given(
    num_features=st.integers(2, 9),
    num_couplings=st.integers(1, 6),
    hidden=st.lists(st.integers(1, 8), max_size=3),
    name=st.sampled_from(["plain", "half", "shuffle", "unmixed", "relu"]),
    rows=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_every_flow_is_invertible(  # noqa: PLR0917 -- named by hypothesis
    num_features: int, num_couplings: int, hidden: list[int], name: str, rows: int, seed: int
) -> None:
    given_ = {**SETTINGS[name], "num_couplings": num_couplings, "hidden": hidden}
    model = flow(num_features, seed=seed, **given_)
    x = torch.randn(rows, num_features, dtype=torch.float64, generator=make_generator(seed))
    assert torch.allclose(model.decode(model.encode(x)), x, atol=1e-10)
    assert model.log_prob(x).shape == (rows,)


@pytest.mark.parametrize("prior", ["gaussian", "logistic"])
def test_density_integrates_to_one(prior: str) -> None:
    model = flow(2, prior=prior)
    nn.init.constant_(model.scale.log_scale, 1.0)
    axis = torch.linspace(-10, 10, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_reduces_to_independent_gaussians_without_shifts() -> None:
    model = flow(4)
    for parameter in model.couplings.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(5, 4, dtype=torch.float64)
    scale = torch.exp(-model.scale.log_scale[model.orders[0].argsort()])
    wanted = NORMAL(model.center, scale).log_prob(x).sum(-1)
    assert torch.allclose(model.log_prob(x), wanted)


# -- the post's formulation -----------------------------------------------------------------------


def as_in_the_post(model: NICE, x: Tensor) -> Tensor:
    """Reverse, split by even and odd, subtract m, interleave; four times. Then scale."""
    h = x - model.center
    for k, coupling in enumerate(model.couplings):
        h = h.flip(1)
        first, second = h[:, 0::2], h[:, 1::2]
        # m sees and gives a part reversed as often as the rows were
        turned = first.flip(1) if k % 2 == 0 else first
        shift = coupling.shift(turned)  # type: ignore[operator]
        second = second - (shift.flip(1) if k % 2 == 0 else shift)
        h = torch.stack([first, second], 2).flatten(1)
    return h * model.scale.log_scale.exp()


def test_swapping_the_parts_is_the_reversal_of_the_post() -> None:
    """For an even D, up to the order of the units that m begins and ends with."""
    model = flow(8, relu_output=True, split="interleave")
    with torch.no_grad():  # the post's first coupling keeps what is odd before the reversal
        model.orders.copy_(torch.tensor([[1, 3, 5, 7, 0, 2, 4, 6]]))
        model.scale.log_scale.fill_(0.3)
    x = torch.randn(5, 8, dtype=torch.float64)
    found, wanted = model.encode(x), as_in_the_post(model, x)
    kept, changed = found.chunk(2, 1)  # x's odd and even places
    assert torch.allclose(wanted, torch.stack([changed, kept], 2).flatten(1), atol=1e-12)


def test_relu_output_makes_the_decoder_only_add() -> None:
    model = flow(6, relu_output=True)
    nn.init.zeros_(model.center)
    nn.init.zeros_(model.scale.log_scale)
    z = torch.randn(50, 6, dtype=torch.float64)
    assert (model.decode(z)[:, model.orders[0]] >= z).all()
    assert (model.decode(z)[:, model.orders[0]] > z + 1e-6).any()


def test_without_mixing_the_first_part_stays() -> None:
    """Eq. 12 of the post."""
    x = torch.randn(5, 6, dtype=torch.float64)
    model = flow(6, mixing="none")
    nn.init.zeros_(model.center)
    h = model.scale.inverse(model.encode(x))
    assert torch.allclose(h[:, :3], x[:, 0::2])
    assert not torch.isclose(h[:, 3:], x[:, 1::2]).any()


@pytest.mark.parametrize("num_features", [6, 7])
@pytest.mark.parametrize("mixing", ["swap", "shuffle"])
def test_with_mixing_every_feature_depends_on_every_other(num_features: int, mixing: str) -> None:
    model = flow(num_features, mixing=mixing, num_couplings=6)
    x = torch.randn(num_features, dtype=torch.float64)
    jacobian = JACOBIAN(lambda row: model.encode(row[None])[0], x)
    assert (jacobian != 0).all()


# -- tensors --------------------------------------------------------------------------------------


class LogProb(nn.Module):
    def __init__(self, model: NICE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.log_prob(x)


def test_gradient() -> None:
    module = LogProb(flow(4, hidden=[5], num_couplings=2))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*module.named_parameters(), strict=True)

    def value(x: Tensor, *given: Tensor) -> Tensor:
        changed = dict(zip(names, given, strict=True))
        return torch.func.functional_call(module, changed, x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(value, (x, *weights))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(name: str, dtype: torch.dtype) -> None:
    model = flow(6, gain=1, **SETTINGS[name]).to(dtype)
    x = torch.randn(9, 6).to(dtype)
    log_prob = model.log_prob(x)
    assert log_prob.dtype == torch.float32
    assert torch.isfinite(log_prob).all()
    drawn = model.generate(1000, generator=make_generator(0))
    assert drawn.dtype == dtype
    assert torch.isfinite(drawn).all()
    assert (model.decode(model.encode(x)) - x).abs().max() < 0.2


def test_float32_is_near_float64() -> None:
    exact = flow(20)
    x = torch.randn(9, 20, dtype=torch.float64)
    single = copy.deepcopy(exact).float().log_prob(x.float())
    assert torch.allclose(single.double(), exact.log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "shuffle"])
def test_rows_do_not_see_each_other_and_may_be_views(name: str) -> None:
    model = flow(6, **SETTINGS[name])
    x = torch.randn(4, 6, dtype=torch.float64)
    before = x.clone()
    whole = model.log_prob(x)
    assert torch.allclose(torch.cat([model.log_prob(row[None]) for row in x]), whole)
    assert torch.allclose(model.log_prob(torch.stack([x, x], -1)[..., 0]), whole)
    assert torch.allclose(model.log_prob(x.t().contiguous().t()), whole)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [[2, 3], [1, 2, 3], [6]])
def test_rows_have_a_shape(shape: list[int]) -> None:
    model = flow(6, shape=shape)
    x = torch.randn(4, *shape, dtype=torch.float64)
    z = model.encode(x)
    assert z.shape == (4, 6)
    assert torch.equal(z, model.encode(x.flatten(1)))
    assert torch.allclose(model.decode(z), x)
    assert model.generate(3).shape == (3, *shape)
    assert model.generate(0).shape == (0, *shape)
    assert model.interpolate(x, x, 5).shape == (5, 4, *shape)


@pytest.mark.parametrize("name", ["plain", "shuffle"])
def test_compiles(name: str) -> None:
    """Without a graph break; what the backends do with the graph is theirs."""
    model = flow(6, num_couplings=3, **SETTINGS[name])
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.compiler.reset()
    for method in (model.log_prob, model.decode):
        compiled: Any = torch.compile(method, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), method(x))


@pytest.mark.parametrize("name", ["plain", "shuffle"])
def test_copies_give_the_same(name: str) -> None:
    model = flow(6, **SETTINGS[name])
    x = torch.randn(4, 6, dtype=torch.float64)
    other = flow(6, seed=1, **SETTINGS[name])
    assert not torch.allclose(other.log_prob(x), model.log_prob(x))
    other.load_state_dict(model.state_dict())
    built = NICE.from_config(model.config()).double()
    built.load_state_dict(model.state_dict())
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301 -- our own bytes
    for twin in (other, built, copy.deepcopy(model), pickled):
        assert torch.equal(twin.log_prob(x), model.log_prob(x))
        assert torch.equal(
            twin.generate(2, generator=make_generator(0)),
            model.generate(2, generator=make_generator(0)),
        )


# -- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["gaussian", "logistic"])
def test_draws_are_of_its_density(prior: str) -> None:
    """The mean of log p over draws is minus the entropy, which volume preservation makes known."""
    model = flow(4, prior=prior)
    drawn = model.generate(20_000, generator=make_generator(0))
    found = model.log_prob(drawn)
    per_feature = 0.5 * math.log(2 * math.pi * math.e) if prior == "gaussian" else 2.0
    wanted = -4 * per_feature + model.scale.log_det
    assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(len(drawn))


def test_temperature_is_a_factor_of_z() -> None:
    model = flow(6)
    z = model.encode(model.generate(50, generator=make_generator(0)))
    cool = model.encode(model.generate(50, temperature=0.5, generator=make_generator(0)))
    assert torch.allclose(cool, 0.5 * z, atol=1e-10)
    frozen = model.generate(3, temperature=0.0)
    assert torch.allclose(frozen, model.decode(torch.zeros(3, 6, dtype=torch.float64)))
    fixed = flow(6, temperature=0.5).generate(50, generator=make_generator(0))
    assert torch.allclose(model.encode(fixed), cool)


def test_levels_round_what_is_drawn() -> None:
    drawn = flow(6, levels=5).generate(50)
    assert set((4 * drawn).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert len(torch.unique(drawn)) == 5


def test_interpolation_is_linear_in_z() -> None:
    model = flow(6)
    start, end = torch.randn(2, 3, 6, dtype=torch.float64)
    rows = model.interpolate(start, end, 5)
    assert torch.allclose(rows[0], start)
    assert torch.allclose(rows[-1], end)
    middle = 0.5 * (model.encode(start) + model.encode(end))
    assert torch.allclose(model.encode(rows[2]), middle)


def test_bits_per_dim_are_those_of_log_prob() -> None:
    model = flow(6, levels=9)
    x = torch.randint(9, (5, 6)).double() / 8
    found = model.bits_per_dim(x, generator=make_generator(1))
    noisy = model.dequantize(x, generator=make_generator(1))
    wanted = (-model.log_prob(noisy) + 6 * math.log(8)) / (6 * math.log(2))
    assert torch.allclose(found, wanted)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_features": 1}, "`num_features` of NICE must be at least 2"),
        ({"shape": [2, 4]}, r"`shape` of NICE must hold num_features = 6 .* Found \[2, 4\]"),
        ({"num_couplings": 0}, "`num_couplings` of NICE must be at least 1. Found 0"),
        ({"hidden": [3, 0]}, r"`hidden` of NICE must be widths .* Found \[3, 0\]"),
        ({"levels": 1}, "`levels` of NICE must be at least 2, or None"),
        ({"split": "third"}, "`split` of NICE must be one of interleave, half. Found 'third'"),
        ({"mixing": "stir"}, "`mixing` of NICE must be one of swap, shuffle, none"),
        ({"prior": "cauchy"}, "`prior` of NICE must be one of gaussian, logistic"),
        ({"noise": [0.1]}, r"`noise` of NICE must be a range of two numbers.* Found \[0.1\]"),
        ({"noise": [0.1, 0.0]}, "`noise` of NICE must be a range"),
        ({"noise": [0.0, math.inf]}, "`noise` of NICE must be a range"),
        ({"temperature": -1.0}, "`temperature` of NICE must be a finite number of at least 0"),
        ({"temperature": math.nan}, "`temperature` of NICE must be a finite number"),
    ],
)
def test_rejects_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        NICE(**{"num_features": 6, **given})
    assert caught.value.argument == next(iter(given))


def test_rejects_rows() -> None:
    model = NICE(6, [2, 3], hidden=[4])
    shapes = [(6,), (4, 5), (4, 3, 2), (), (4, 2, 3, 1)]
    for shape in shapes:
        with pytest.raises(ArgumentError, match=r"`x` of NICE .* \[batch, 2, 3\] or \[batch, 6\]"):
            model.log_prob(torch.zeros(shape))
    with pytest.raises(ArgumentError, match=r"floating-point rows .* Found torch\.int64"):
        model.encode(torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"`z` of NICE .* Found \[4, 2, 3\]"):
        model.decode(torch.zeros(4, 2, 3))
    with pytest.raises(ArgumentError, match="`num_samples` of NICE must be at least 0"):
        model.generate(-1)
    with pytest.raises(ArgumentError, match="`temperature` of NICE"):
        model.generate(1, temperature=-0.5)
    with pytest.raises(ArgumentError, match=r"`end` must have the shape of `start`, \[2, 6\]"):
        model.interpolate(torch.zeros(2, 6), torch.zeros(3, 6))
    with pytest.raises(ArgumentError, match=r"`steps` be at least 2.* and 1"):
        model.interpolate(torch.zeros(2, 6), torch.zeros(2, 6), 1)
    with pytest.raises(ArgumentError, match="`levels` of NICE must be set"):
        model.bits_per_dim(torch.zeros(2, 6))
