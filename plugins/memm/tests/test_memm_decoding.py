"""Decoding is what enumeration finds; marginals are what enumeration adds up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.core.errors import ArgumentError
from kexue_memm import MEMM

INF = float("inf")
MODES = ["geometric", "forward", "backward", "raw"]

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [1, 0, 1, 0, 1],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]
).bool()


def score(f: Tensor, g: Tensor, tags: tuple[int, ...], mode: str, scale: float) -> float:
    """What a mode maximises, position by position; ``f`` are the real positions of one row."""
    if mode == "geometric":
        return sum(score(f, g, tags, way, scale) for way in ("forward", "backward")) / 2
    if mode == "backward":
        return score(f.flip(0), g.T, tags[::-1], "forward", scale)
    total = 0.0
    for k, tag in enumerate(tags):
        if mode == "raw":
            total += (f[k, tag] + (g[tags[k - 1], tag] if k else 0)).item()
        else:
            scores = scale * (f[k] + g[tags[k - 1]]) if k else f[k]
            if scores[tag] == -INF:
                return -INF
            total += (scores[tag] - scores.logsumexp(0)).item()
    return total


def best(f: Tensor, g: Tensor, mode: str, scale: float = 1.0) -> tuple[tuple[int, ...], float]:
    taggings = itertools.product(range(f.shape[1]), repeat=len(f))
    scored = ((tags, score(f, g, tags, mode, scale)) for tags in taggings)
    return max(scored, key=lambda pair: pair[1])


def problem(
    *,
    batch: int = 6,
    time: int = 5,
    num_tags: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **params: Any,
) -> tuple[MEMM, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    memm = MEMM(num_tags, **params).to(dtype)
    with torch.no_grad():
        for parameter in memm.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return memm, torch.randn(batch, time, num_tags, generator=generator, dtype=dtype)


def matrix_of(memm: MEMM) -> Tensor:
    matrix = memm.transitions if memm.rank is None else memm.left @ memm.right.T
    return matrix.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("num_candidates", [None, 3, 7])
def test_matches_enumeration(
    mode: Any, scale: float, rank: int | None, num_candidates: int | None
) -> None:
    memm, emissions = problem(mode=mode, scale=scale, rank=rank, num_candidates=num_candidates)
    result = memm.decode(emissions, mask=MASK)
    assert result.sequences.dtype == torch.int64
    for b, real in enumerate(MASK):
        tags, value = best(emissions[b][real], matrix_of(memm), mode, scale)
        assert tuple(result.sequences[b][real].tolist()) == tags
        assert result.scores[b].item() == pytest.approx(value, abs=1e-10)
    assert result.sequences[~MASK].eq(-1).all()
    assert result.tolist()[5] == []


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    time=st.integers(1, 4),
    num_tags=st.integers(1, 4),
    spread=st.sampled_from([0.1, 1.0, 100.0]),
    mode=st.sampled_from(MODES),
)
def test_score_in_float32_is_the_best_that_enumeration_finds(
    seed: int, time: int, num_tags: int, spread: float, mode: Any
) -> None:
    memm, emissions = problem(
        batch=2, time=time, num_tags=num_tags, dtype=torch.float32, seed=seed, mode=mode
    )
    emissions *= spread
    result = memm.decode(emissions)
    for b, found in enumerate(result.sequences.tolist()):
        exact = emissions[b].double(), matrix_of(memm).double(), mode
        _, value = best(*exact)
        tolerance = 1e-5 * max(1.0, spread * time)
        assert score(exact[0], exact[1], tuple(found), mode, 1.0) == pytest.approx(
            value, abs=tolerance
        )
        assert result.scores[b].item() == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize(
    ("direction", "mode"), [("both", "geometric"), ("forward", "forward"), ("backward", "backward")]
)
def test_by_default_it_maximises_what_is_trained(direction: Any, mode: str) -> None:
    memm, emissions = problem(direction=direction)
    assert memm.mode == mode
    result = memm.decode(emissions, mask=MASK)
    log_prob = memm.log_prob(emissions, result.sequences, MASK)
    torch.testing.assert_close(result.scores, log_prob.detach())


def test_modes_differ_and_can_be_chosen_per_call() -> None:
    memm, emissions = problem(batch=200, mode="raw")
    found = {mode: memm.decode(emissions, mode=mode) for mode in MODES}  # type: ignore[arg-type]
    assert torch.equal(memm.decode(emissions).sequences, found["raw"].sequences)
    for one, other in itertools.combinations(MODES, 2):
        assert not torch.equal(found[one].sequences, found[other].sequences)


@pytest.mark.parametrize("mode", MODES)
def test_ties_go_to_the_lowest_tag(mode: Any) -> None:
    memm, emissions = problem(mode=mode)
    torch.nn.init.zeros_(memm.transitions)
    assert memm.decode(torch.zeros_like(emissions)).sequences.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_candidates", [None, 2])
def test_forbidden_tags_and_dead_ends(mode: Any, num_candidates: int | None) -> None:
    memm, emissions = problem(batch=3, mode=mode, num_candidates=num_candidates)
    with torch.no_grad():
        memm.transitions[0] = torch.tensor([-INF, -INF, 0.0])  # 0 leads to 2 only
        memm.transitions[1] = -INF  # 1 leads nowhere
    emissions[0, 2, 2] = -INF
    emissions[1, :, 1] = -INF
    emissions[2, 3] = -INF  # no tag at all
    result = memm.decode(emissions)
    if num_candidates is None:
        for b in range(2):
            tags, value = best(emissions[b], matrix_of(memm), mode)
            assert result.sequences[b].tolist() == list(tags)
            assert result.scores[b].item() == pytest.approx(value, abs=1e-10)
    for b, tags in enumerate(result.sequences[:2].tolist()):
        for a, (left, right) in enumerate(itertools.pairwise(tags)):
            assert memm.transitions[left, right] > -INF, (b, a)
    assert result.sequences[2].eq(-1).all()
    assert result.scores[2] == -INF


def test_masked_positions_are_never_read() -> None:
    memm, emissions = problem()
    expected = memm.decode(emissions, mask=MASK)
    for value in (float("nan"), INF, -INF):
        spoilt = emissions.masked_fill(~MASK.unsqueeze(2), value)
        for num_candidates in (None, 2):
            memm.num_candidates = num_candidates
            result = memm.decode(spoilt, mask=MASK)
            if num_candidates is None:
                assert torch.equal(result.sequences, expected.sequences)
            assert result.scores.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [None, 3])
def test_candidates_give_a_real_sequence_with_its_real_score(mode: Any, rank: int | None) -> None:
    memm, emissions = problem(num_tags=12, rank=rank, num_candidates=4, mode=mode)
    result = memm.decode(emissions, mask=MASK)
    memm.num_candidates = None
    exact = memm.decode(emissions, mask=MASK)
    assert (result.scores <= exact.scores + 1e-10).all()
    for b, real in enumerate(MASK):
        tags = tuple(result.sequences[b][real].tolist())
        value = score(emissions[b][real], matrix_of(memm), tags, mode, 1.0)
        assert result.scores[b].item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("mode", ["geometric", "forward", "backward"])
def test_scores_of_candidates_are_exact_where_products_underflow(mode: Any) -> None:
    memm, emissions = problem(num_tags=12, rank=3, num_candidates=4, mode=mode, dtype=torch.float32)
    with torch.no_grad():
        memm.left.mul_(50)
    emissions *= 30
    result = memm.decode(emissions, mask=MASK)
    for b, real in enumerate(MASK):
        tags = tuple(result.sequences[b][real].tolist())
        exact = emissions[b][real].double(), matrix_of(memm).double()
        value = score(*exact, tags, mode, 1.0)
        assert result.scores[b].item() == pytest.approx(value, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_candidates", [None, 3])
def test_batch_equals_rows_one_by_one(mode: Any, num_candidates: int | None) -> None:
    memm, emissions = problem(num_tags=12, num_candidates=num_candidates, mode=mode)
    together = memm.decode(emissions, mask=MASK)
    for b in range(len(emissions)):
        alone = memm.decode(emissions[b : b + 1], mask=MASK[b : b + 1])
        assert torch.equal(alone.sequences[0], together.sequences[b])
        torch.testing.assert_close(alone.scores[0], together.scores[b])


@pytest.mark.parametrize("mode", MODES)
def test_candidates_are_chosen_by_emissions_and_transitions(mode: Any) -> None:
    memm, emissions = problem(batch=100, num_tags=100, rank=4, mode=mode, seed=1)
    with torch.no_grad():
        for parameter in memm.parameters():
            parameter.mul_(0.35)
    emissions *= 3
    exact = memm.decode(emissions).scores
    lowest = emissions.topk(8).values[..., -1:]
    memm.num_candidates = 8
    found = (memm.decode(emissions).scores > exact - 1e-9).double().mean().item()
    assert found > 0.85
    if mode == "raw":  # unnormalised, so that to forbid all others is to choose by emissions alone
        memm.num_candidates = None
        by_emissions = memm.decode(emissions.masked_fill(emissions < lowest, -INF)).scores
        assert (by_emissions > exact - 1e-9).double().mean().item() < found - 0.1


def test_is_exact_where_products_of_exponentials_underflow() -> None:
    memm, emissions = problem(dtype=torch.float32, seed=2)
    with torch.no_grad():
        memm.transitions.mul_(100)
    emissions *= 100
    for mode in ("forward", "backward", "geometric"):
        result = memm.decode(emissions, mode=mode)
        for b in range(len(emissions)):
            tags, value = best(emissions[b].double(), matrix_of(memm).double(), mode)
            assert result.sequences[b].tolist() == list(tags)
            assert result.scores[b].item() == pytest.approx(value, rel=1e-5, abs=1e-4)


def test_ties_of_candidates_go_to_the_lowest_tag() -> None:
    memm, _ = problem(num_tags=6, num_candidates=3, mode="raw")
    torch.nn.init.zeros_(memm.transitions)
    with torch.no_grad():
        memm.transitions[2] = -3  # tag 2 promises less than tag 5
        memm.transitions[2, 0] = 0.5  # and gives as much
    emissions = torch.full((1, 2, 6), -5.0, dtype=torch.float64)
    emissions[0, 0, [2, 5]] = torch.tensor([0.5, 1.0], dtype=torch.float64)
    emissions[0, 1, 0] = 8
    assert memm.decode(emissions).tolist() == [[2, 0]]


def keras_viterbi(nodes: Tensor, transitions: Tensor) -> list[int]:
    """The search of the released scripts: unnormalised sums, forward."""
    scores, paths = nodes[0], [[a] for a in range(len(nodes[0]))]
    for node in nodes[1:]:
        table = scores[:, None] + transitions + node
        back = table.argmax(0)
        paths = [[*paths[int(back[j])], j] for j in range(len(back))]
        scores = table.amax(0)
    return paths[int(scores.argmax())]


def test_raw_mode_is_the_search_of_the_released_scripts() -> None:
    memm, emissions = problem(mode="raw", scale=0.5, num_tags=6, time=20)
    expected = [keras_viterbi(row, matrix_of(memm)) for row in emissions]
    assert memm.decode(emissions).tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("num_candidates", [None, 2])
def test_handles_no_tokens(mode: Any, shape: tuple[int, int], num_candidates: int | None) -> None:
    memm, emissions = problem(batch=shape[0], time=shape[1], num_candidates=num_candidates)
    result = memm.decode(emissions, mode=mode)
    assert result.sequences.shape == shape
    assert result.scores.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_candidates", [None, 2])
def test_half_precision_and_autocast(dtype: torch.dtype, num_candidates: int | None) -> None:
    memm, emissions = problem(dtype=torch.float32, num_candidates=num_candidates)
    half = emissions.to(dtype)
    expected = memm.decode(half.float(), mask=MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = memm.decode(half, mask=MASK)
    assert result.scores.dtype == torch.float32
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.scores, expected.scores)


def test_result_has_no_gradient_and_inputs_stay() -> None:
    memm, emissions = problem(num_candidates=2)
    before = emissions.clone()
    strided = emissions.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    result = memm.decode(strided, mask=MASK)
    assert not result.scores.requires_grad
    assert torch.equal(emissions, before)
    assert torch.equal(result.scores, memm.decode(emissions, mask=MASK).scores)


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


@pytest.mark.parametrize("mode", MODES)
def test_candidates_never_need_the_matrix_of_a_large_tag_set(mode: Any) -> None:
    memm, emissions = problem(batch=2, time=3, num_tags=9000, rank=2, num_candidates=4, mode=mode)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        memm.decode(emissions)
    assert 0 < largest.numel < 2**22


def test_rejects_an_exact_search_over_a_huge_low_rank_tag_set() -> None:
    memm, emissions = problem(batch=1, time=2, num_tags=9000, rank=2)
    with pytest.raises(ArgumentError, match="`num_candidates` of MEMM must be given"):
        memm.decode(emissions)
    with pytest.raises(ArgumentError, match="direction"):
        memm.marginals(emissions)


def test_rejects_wrong_arguments() -> None:
    memm, emissions = problem()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"emissions": emissions[0]}, "`emissions` of MEMM must have shape"),
        ({"emissions": emissions.long()}, "`emissions` of MEMM must be floating-point"),
        ({"emissions": emissions, "mask": MASK[:2]}, "`mask` of MEMM must have shape"),
        ({"emissions": emissions, "mask": MASK.long()}, "`mask` of MEMM must be bool"),
        ({"emissions": emissions, "mode": "geometrik"}, "Did you mean 'geometric'"),
        ({"emissions": emissions * float("nan")}, "NaN"),
    ]
    for arguments, message in cases:
        with pytest.raises(ArgumentError, match=message):
            memm.decode(**arguments)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_marginals_match_enumeration(direction: Any, scale: float) -> None:
    memm, emissions = problem(scale=scale, direction=direction)
    result = memm.marginals(emissions, mask=MASK)
    for b, real in enumerate(MASK):
        length = int(real.sum())
        expected = torch.zeros(length, 3, dtype=torch.float64)
        for tags in itertools.product(range(3), repeat=length):
            value = math.exp(score(emissions[b][real], matrix_of(memm), tags, direction, scale))
            for k, tag in enumerate(tags):
                expected[k, tag] += value
        torch.testing.assert_close(result[b][real], expected, rtol=0, atol=1e-12)
    assert result[~MASK].eq(0).all()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_marginals_survive_dead_ends_and_garbage(direction: Any) -> None:
    memm, emissions = problem()
    with torch.no_grad():
        memm.transitions[1] = -INF
    emissions[..., 1] = -INF
    emissions[~MASK] = float("nan")
    emissions.requires_grad_()
    result = memm.marginals(emissions, mask=MASK, direction=direction)
    assert result.sum(2).sub(MASK.double()).abs().max() < 1e-12 or direction == "backward"
    (gradient,) = torch.autograd.grad(result[..., 0].sum(), [emissions])
    assert result.isfinite().all()
    assert gradient.isfinite().all()


def test_marginals_of_both_directions_must_be_named() -> None:
    memm, emissions = problem()
    with pytest.raises(ArgumentError, match="must be 'forward' or 'backward'"):
        memm.marginals(emissions)
    with pytest.raises(ArgumentError, match="'forward'"):
        memm.marginals(emissions, direction="forwards")  # type: ignore[arg-type]
    total = memm.marginals(emissions[:0], direction="forward")
    assert total.shape == (0, 5, 3)
    assert memm.marginals(emissions[:, :0], direction="forward").shape == (6, 0, 3)
