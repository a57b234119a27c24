"""What optimizers refuse and restore: parameters, settings, gradients, states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.core import (
    ArgumentError,
    check_settings,
    different_parameters,
    restore_state,
    saved_state,
    some_parameters,
    state_dtype,
    with_gradient,
)


class Mine(torch.optim.Optimizer):
    """Has all of it, and keeps a sum and a count."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(some_parameters("Mine", params), {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = {**self.defaults, **param_group}
        check_settings("Mine", settings, {"lr": (settings["lr"] > 0, "positive")})
        super().add_param_group(different_parameters("Mine", self, param_group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for p in [p for group in self.param_groups for p in with_gradient(group["params"])]:
            state = self.state[p]
            if not state:
                state["sum"] = torch.zeros_like(p, dtype=state_dtype(p))
                state["count"] = torch.zeros(len(p), dtype=torch.int32)
                state["step"] = 0
            state["step"] += 1
            state["count"] += 1
            state["sum"] += p.grad

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


# -- what is refused -------------------------------------------------------------------------------


def test_parameters_are_given_in_any_way() -> None:
    a, b = parameter(), parameter()
    for given in ([a, b], (a, b), iter([a, b]), [("a", a), ("b", b)], [{"params": iter([a, b])}]):
        assert [p for g in Mine(given).param_groups for p in g["params"]] == [a, b]
    for single in (a, [{"params": a}]):
        assert Mine(single).param_groups[0]["params"][0] is a
    group = {"params": a, "lr": 0.5}
    made = different_parameters("Mine", Mine(b), group)
    assert made == {"params": [a], "lr": 0.5}
    assert group["params"] is a


@pytest.mark.parametrize("given", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_rejects_no_parameters(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`params` of Mine .* Found none\. Give") as caught:
        Mine(given)
    assert caught.value.argument == "params"


def test_rejects_a_parameter_that_comes_twice() -> None:
    p = parameter()
    message = r"`params` of Mine must be different .* shape \[3\] twice"
    for given in ([p, p], [("a", p), ("b", p)], [{"params": [p, p]}]):
        with pytest.raises(ArgumentError, match=message + r"\. Leave it out once") as caught:
            Mine(given)
        assert caught.value.argument == "params"
    optimizer = Mine([p])
    with pytest.raises(ArgumentError, match=message + ", in two groups"):
        optimizer.add_param_group({"params": p})
    assert len(optimizer.param_groups) == 1


def test_leaves_what_is_no_parameter_to_torch() -> None:
    for given in (["a", "a"], [1, 1]):
        with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
            Mine(given)


def test_rejects_the_first_setting_that_does_not_hold() -> None:
    conditions = {"a": (True, "small"), "b": (False, "large"), "c": (False, "huge")}
    with pytest.raises(ArgumentError, match=r"^`b` of Mine must be large\. Found 'x'\.$") as caught:
        check_settings("Mine", {"a": 1, "b": "x", "c": 2}, conditions)
    assert caught.value.argument == "b"
    check_settings("Mine", {"a": 1}, {"a": (torch.tensor(True), "small")})


def test_gradients_are_dense_and_there() -> None:
    moved, still, empty = parameter(), parameter(), nn.Parameter(torch.ones(0, 2))
    moved.grad, empty.grad = torch.zeros(3), torch.zeros(0, 2)
    assert with_gradient(iter([still, moved, empty])) == [moved]
    table = nn.Parameter(torch.ones(5, 3))
    table.grad = torch.ones(5, 3).to_sparse()
    words = r"dense\. Found layout torch.sparse_coo .* \[5, 3\]\. .* sparse=False, .* by "
    with pytest.raises(ArgumentError, match=words + r"torch\.optim\.SparseAdam\.$") as caught:
        with_gradient([moved, table])
    assert caught.value.argument == "params"
    with pytest.raises(ArgumentError, match=words + r"SGD\.$"):
        with_gradient([table], instead="SGD")


# -- the state -------------------------------------------------------------------------------------

TYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.complex64,
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_state_keeps_its_type_and_its_memory(dtype: torch.dtype) -> None:
    p, q = parameter(dtype), parameter(dtype)
    one, other = Mine([p]), Mine([q])
    p.grad = torch.full_like(p, 1 / 3)
    for _ in range(2):
        one.step()
    assert one.state[p]["sum"].dtype == state_dtype(p) == TYPES[dtype]
    one.state[p]["sum"] += 1e-6  # which 16 bits cannot tell
    saved = one.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    for name, value in one.state[p].items():
        twin = other.state[q][name]
        if isinstance(value, Tensor):
            assert twin.dtype == value.dtype
            assert torch.equal(twin, value)
            assert twin.data_ptr() != value.data_ptr()
            assert torch.equal(saved["state"][0][name], kept["state"][0][name])
        else:
            assert twin == value


def test_the_state_goes_with_the_type_of_another_parameter() -> None:
    p, q = parameter(torch.float32), parameter(torch.float64)
    p.grad = torch.ones(3)
    one, other = Mine([p]), Mine([q])
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.state[q]["sum"].dtype == torch.float64
    assert other.state[q]["count"].dtype == torch.int32


def test_saved_state_is_that_of_its_parameters() -> None:
    own = [parameter(), parameter(), parameter()]
    for p in own[::2]:
        p.grad = torch.ones(3)
    one = Mine([{"params": own[:1]}, {"params": own[1:]}])
    one.step()
    found = [(p, name) for p, name, _ in saved_state(one, one.state_dict())]
    assert [name for _, name in found] == ["sum", "count", "step"] * 2
    assert [id(p) for p, _ in found] == [id(own[0])] * 3 + [id(own[2])] * 3
    with pytest.raises(ValueError, match="shorter"):
        list(saved_state(Mine(own[:1]), one.state_dict()))
