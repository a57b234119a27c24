"""The module around loss and decoder: construction, state, manifest, parameter groups."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import kexue_memm
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import Decoder
from kexue.core.interfaces.loss import Loss
from kexue_memm import MEMM, param_groups


@pytest.mark.parametrize(
    ("params", "argument", "message"),
    [
        ({"num_tags": 0}, "num_tags", "must be a positive whole number. Found 0"),
        ({"num_tags": 2.5}, "num_tags", "must be a positive whole number. Found 2.5"),
        ({"direction": "foward"}, "direction", "Did you mean 'forward'"),
        ({"mode": "viterbi"}, "mode", "'geometric', 'forward', 'backward', 'raw'"),
        ({"rank": 0}, "rank", "positive whole number. Found 0"),
        ({"scale": 0.0}, "scale", "positive and finite. Found 0.0"),
        ({"scale": float("inf")}, "scale", "positive and finite. Found inf"),
        ({"num_candidates": -1}, "num_candidates", "positive whole number. Found -1"),
        ({"reduction": "token-mean"}, "reduction", "Did you mean 'token_mean'"),
    ],
)
def test_rejects_bad_parameters(params: dict[str, Any], argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        MEMM(**{"num_tags": 4, **params})
    assert error.value.argument == argument
    assert f"`{argument}` of MEMM" in str(error.value)


def test_warns_of_a_rank_that_saves_nothing() -> None:
    with pytest.warns(UserWarning, match="`rank` of MEMM should be below num_tags = 4"):
        MEMM(4, rank=4)


def test_parameters() -> None:
    assert {name: tuple(p.shape) for name, p in MEMM(5).named_parameters()} == {
        "transitions": (5, 5)
    }
    thin = MEMM(5, rank=2)
    assert {name: tuple(p.shape) for name, p in thin.named_parameters()} == {
        "left": (5, 2),
        "right": (5, 2),
    }
    before = thin.left.clone()
    thin.reset_parameters()
    assert not torch.equal(thin.left, before)
    assert thin.left.abs().max() <= (6 / (5 + 2)) ** 0.5


def test_is_a_loss_and_a_decoder() -> None:
    assert issubclass(MEMM, Loss)
    assert issubclass(MEMM, Decoder)
    assert MEMM.trainable
    assert MEMM.differentiable


def test_components_lead_to_the_class() -> None:
    components = list(kexue_memm.kexue_components())
    assert [component.id for component in components] == ["loss/memm", "decoder/memm"]
    for component in components:
        module, _, name = component.target.partition(":")
        assert getattr(sys.modules[module], name) is MEMM
    assert set(kexue_memm.__all__) <= set(dir(kexue_memm))
    with pytest.raises(AttributeError):
        kexue_memm.no_such_name  # noqa: B018


def test_manifest_imports_nothing_heavy() -> None:
    code = "import sys, kexue_memm; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_example_runs() -> None:
    example = MEMM.example(generator=torch.Generator().manual_seed(0))
    again = MEMM.example(generator=torch.Generator().manual_seed(0))
    assert torch.equal(example.inputs["emissions"], again.inputs["emissions"])
    memm = MEMM(**example.params)
    assert memm(**example.inputs).isfinite()
    result = memm.decode(example.inputs["emissions"], mask=example.inputs["mask"])
    assert [len(row) for row in result.tolist()] == [5, 3, 1]


@pytest.mark.parametrize("rank", [None, 2])
def test_state_round_trips(rank: int | None) -> None:
    memm = MEMM(4, rank=rank, direction="backward", scale=0.5, num_candidates=3)
    inputs = MEMM.example(generator=torch.Generator().manual_seed(0)).inputs
    stream = io.BytesIO()
    torch.save(memm.state_dict(), stream)
    stream.seek(0)
    loaded = MEMM(4, rank=rank, direction="backward", scale=0.5, num_candidates=3)
    loaded.load_state_dict(torch.load(stream))
    for other in (loaded, copy.deepcopy(memm), pickle.loads(pickle.dumps(memm))):  # noqa: S301
        assert torch.equal(other(**inputs), memm(**inputs))
        assert repr(other) == repr(memm)


def test_repr_says_what_differs_from_the_defaults() -> None:
    assert repr(MEMM(4)) == "MEMM(4, direction='both', mode='geometric', reduction='mean')"
    text = repr(MEMM(9, rank=2, num_candidates=3, mode="raw"))
    assert text == (
        "MEMM(9, direction='both', mode='raw', rank=2, num_candidates=3, reduction='mean')"
    )


def test_param_groups_separate_the_transitions() -> None:
    model = nn.ModuleList([nn.Linear(3, 4), MEMM(4), MEMM(9, rank=2)])
    others, transitions = param_groups(model, 1e-3, multiplier=100)
    assert [tuple(p.shape) for p in transitions["params"]] == [(4, 4), (9, 2), (9, 2)]
    assert [tuple(p.shape) for p in others["params"]] == [(4, 3), (4,)]
    assert transitions["lr"] == pytest.approx(0.1)
    assert others["lr"] == pytest.approx(1e-3)
    torch.optim.Adam([others, transitions])


def test_learns_a_tag_order_that_emissions_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    tags = torch.arange(12).remainder(3).expand(8, -1)
    emissions = 0.1 * torch.randn(8, 12, 3, generator=generator)
    emissions[:, 0, 0] += 5
    memm = MEMM(3)
    optimizer = torch.optim.Adam(memm.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        memm(emissions, tags).backward()
        optimizer.step()
    assert torch.equal(memm.decode(emissions).sequences, tags)
