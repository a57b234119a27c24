"""What the loss is given: masks and padding, dtypes, layouts, wrong arguments, large tag sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.core.errors import ArgumentError
from kexue_memm import MEMM

INF = float("inf")

HOLES = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 0, 0, 1]]).bool()
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]).bool()
EMPTY = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def problem(
    *,
    batch: int = 4,
    time: int = 5,
    num_tags: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **params: Any,
) -> tuple[MEMM, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    memm = MEMM(num_tags, **params).to(dtype)
    with torch.no_grad():
        for parameter in memm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    emissions = 2 * torch.randn(batch, time, num_tags, generator=generator, dtype=dtype)
    return memm, emissions, torch.randint(num_tags, (batch, time), generator=generator)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_masked_positions_are_never_read(scale: float) -> None:
    memm, emissions, tags = problem(scale=scale)
    mask = HOLES
    spoilt = emissions.clone()
    for value in (float("nan"), INF, -INF):
        spoilt[~mask] = value
        other = spoilt.clone().requires_grad_()
        garbage = tags.masked_fill(~mask, -100)
        loss = memm(other, garbage, mask)
        torch.testing.assert_close(loss, memm(emissions, tags, mask))
        (gradient,) = torch.autograd.grad(loss, [other])
        assert gradient[~mask].eq(0).all()
        assert gradient.isfinite().all()


def test_nan_emissions_give_nan_and_not_an_error() -> None:
    memm, emissions, tags = problem()
    emissions[0, 0, 0] = float("nan")
    assert memm(emissions, tags).isnan()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("tag", [-100, -1, 3, 2**40])
def test_rejects_unknown_tags(scale: float, tag: int) -> None:
    memm, emissions, tags = problem(scale=scale)
    tags[1, 3] = tag
    with pytest.raises(
        ArgumentError, match=rf"from 0 to 2.*Found {tag} in row 1 at time 3"
    ) as error:
        memm(emissions, tags, LEFT)
    assert error.value.argument == "tags"
    with pytest.raises(ArgumentError, match="row 1 at time 3"):
        memm.log_prob(emissions, tags)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("forbidden", ["tag", "transition", "all tags"])
def test_rejects_impossible_tags(scale: float, forbidden: str) -> None:
    memm, emissions, _ = problem(scale=scale, direction="forward")
    tags = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]] * 2)
    with torch.no_grad():
        if forbidden == "tag":
            emissions[1, 2, 1] = -INF
        elif forbidden == "transition":
            memm.transitions[0, 1] = -INF
        else:
            emissions[1, 2] = -INF
    with pytest.raises(ArgumentError, match=r"possible.*Found 1 in row 1 at time 2"):
        memm(emissions, tags)


def test_rejects_wrong_shapes_and_dtypes() -> None:
    memm, emissions, tags = problem()
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((emissions[0], tags), r"`emissions` of MEMM must have shape .* Found \[5, 3\]"),
        ((emissions[..., :2], tags), r"num_tags = 3 tags. Found \[4, 5, 2\]"),
        ((emissions.long(), tags), r"floating-point scores. Found torch.int64"),
        ((emissions.to("meta"), tags), r"`emissions` .* device of its transitions"),
        ((emissions, tags[:, :3]), r"`tags` of MEMM must have shape .*\[4, 5\].* Found \[4, 3\]"),
        ((emissions, tags.double()), r"`tags` of MEMM must be integers. Found torch.float64"),
        ((emissions, tags.bool()), r"`tags` of MEMM must be integers. Found torch.bool"),
        ((emissions, tags.to("meta")), r"`tags` of MEMM must be on the device of `emissions`"),
        ((emissions, tags, tags[:2].bool()), r"`mask` of MEMM must have shape"),
        ((emissions, tags, tags), r"`mask` of MEMM must be bool.*mask.bool"),
    ]
    for arguments, message in cases:
        with pytest.raises(ArgumentError, match=message):
            memm(*arguments)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "token_mean"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("rank", [None, 2])
def test_handles_no_tokens(reduction: Any, shape: tuple[int, int], rank: int | None) -> None:
    memm, emissions, tags = problem(batch=shape[0], time=shape[1], rank=rank, reduction=reduction)
    loss = memm(emissions.requires_grad_(), tags)
    assert loss.shape == ((shape[0],) if reduction == "none" else ())
    assert loss.eq(0).all()
    loss.sum().backward()
    for x in (emissions, *memm.parameters()):
        assert x.grad is not None
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype, rank: int | None) -> None:
    memm, emissions, tags = problem(dtype=torch.float32, rank=rank)
    half = emissions.to(dtype).requires_grad_()
    loss = memm(half, tags)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, memm(half.detach().float(), tags))
    (gradient,) = torch.autograd.grad(loss, [half])
    assert gradient.dtype == dtype
    assert memm.to(dtype)(half, tags).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 6], ids=["more tags than tokens", "fewer"])
def test_autocast_changes_nothing(batch: int) -> None:
    memm, emissions, tags = problem(batch=batch, num_tags=7, dtype=torch.float32, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = memm(emissions, tags)
    torch.testing.assert_close(inside, memm(emissions, tags), rtol=0, atol=0)


def test_float64_emissions_meet_float32_transitions() -> None:
    memm, emissions, tags = problem()
    memm.float()
    assert memm(emissions, tags).dtype == torch.float64


def test_integer_tags_of_any_width() -> None:
    memm, emissions, tags = problem()
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(memm(emissions, tags.to(dtype)), memm(emissions, tags))


def test_layout_of_the_inputs_does_not_matter() -> None:
    memm, emissions, tags = problem()
    strided = emissions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(memm(strided, tags.T.contiguous().T), memm(emissions, tags))
    expanded = emissions[:1].expand(4, -1, -1).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool).expand(4, 5)
    torch.testing.assert_close(
        memm(expanded, tags, mask), memm(expanded.detach().clone(), tags.clone())
    )


def test_batch_equals_rows_one_by_one() -> None:
    memm, emissions, tags = problem(reduction="none")
    mask = EMPTY
    rows = [memm(emissions[b : b + 1], tags[b : b + 1], mask[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(torch.cat(rows), memm(emissions, tags, mask))


def test_does_not_modify_inputs() -> None:
    memm, emissions, tags = problem()
    mask = HOLES
    tags = tags.masked_fill(~mask, -100)
    before = [x.clone() for x in (emissions, tags, mask, memm.transitions)]
    memm(emissions, tags, mask)
    memm(emissions.requires_grad_(), tags, mask).backward()
    for x, y in zip((emissions, tags, mask, memm.transitions), before, strict=True):
        assert torch.equal(x, y)


# Behind a graph break, the compiler itself looks at `.grad` of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("rank", [None, 2])
def test_runs_compiled(rank: int | None) -> None:
    memm, emissions, tags = problem(rank=rank)
    compiled = torch.compile(memm, backend="aot_eager")
    inside = emissions.clone().requires_grad_()
    loss, expected = compiled(inside, tags, HOLES), memm(emissions.requires_grad_(), tags, HOLES)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *torch.autograd.grad(loss, [inside]), *torch.autograd.grad(expected, [emissions])
    )


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_low_rank_never_forms_the_matrix_of_a_large_tag_set() -> None:
    memm, emissions, tags = problem(batch=2, time=3, num_tags=500, rank=4)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        memm(emissions.requires_grad_(), tags).backward()
    assert 0 < largest.numel <= 2 * emissions.numel() < 500 * 500
