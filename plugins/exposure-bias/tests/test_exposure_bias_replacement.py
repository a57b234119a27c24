"""What token replacement replaces, by what, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue_exposure_bias import TokenReplacement

BOS, EOS = 1, 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(rows: list[list[int]], width: int | None = None, *, left: bool = False) -> Tensor:
    width = max(map(len, rows)) if width is None else width
    fill = [[-1] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])


ROWS = st.lists(st.lists(st.integers(0, 8), max_size=7), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, pool=st.sampled_from(["target", "source_target", "batch", "vocab"]))
def test_donors_come_from_the_pool(rows: list[list[int]], pool: Any) -> None:
    tokens = padded(rows, 8)
    source = tokens.flip(0) + 20 * (tokens.flip(0) >= 0)
    replace = TokenReplacement(1.0, 1.0, pool=pool, exclude=[0], num_tokens=12)
    found = replace(tokens, source=source, generator=seeded())
    everything = {t for row in rows for t in row}
    for row, read, out in zip(tokens.tolist(), source.tolist(), found.tolist(), strict=True):
        donors = {
            "target": set(row),
            "source_target": set(row) | set(read),
            "batch": everything,
            "vocab": set(range(12)),
        }[pool] - {0, -1}
        for before, after in zip(row, out, strict=True):
            assert after == before if before in {0, -1} else after in donors


def test_draws_are_those_of_the_post() -> None:
    rows, time = 4000, 25
    tokens = torch.randint(3, 15, (rows, time), generator=seeded())
    found = TokenReplacement()(tokens, generator=seeded(1))
    changed = found != tokens
    other = torch.stack([1 - (tokens == t[:, None]).double().mean(1) for t in tokens.T], 1)
    chosen = changed.any(1)
    missed = (1 - 0.3 * other).prod(1)  # a chosen row in which nothing happens to change
    assert float(chosen.double().mean()) == pytest.approx(
        0.5 * float((1 - missed).mean()), abs=0.03
    )
    share = float(changed.double().mean()) / 0.5
    assert share == pytest.approx(0.3 * float(other.mean()), abs=0.012)


@pytest.mark.parametrize("pool", ["target", "source_target", "batch", "vocab"])
def test_donors_are_uniform(pool: Any) -> None:
    """Frequencies beside those of an enumeration, within five standard errors."""
    row = [5, 5, 7, 9, BOS]
    tokens = torch.tensor([row] * 30_000)
    source = torch.full((30_000, 2), 6)
    replace = TokenReplacement(1.0, 1.0, pool=pool, exclude=[BOS, 4], num_tokens=10)
    found = replace(tokens, source=source, generator=seeded())[:, 0]
    donors = {
        "target": [5, 5, 7, 9],
        "source_target": [6, 6, 5, 5, 7, 9],
        "batch": [5, 5, 7, 9],
        "vocab": [0, 2, 3, 5, 6, 7, 8, 9],
    }[pool]
    counts = Counter(found.tolist())
    assert set(counts) == set(donors)
    for donor, many in Counter(donors).items():
        p = many / len(donors)
        error = (p * (1 - p) / 30_000) ** 0.5
        assert abs(counts[donor] / 30_000 - p) < 5 * error


def test_tokens_are_replaced_one_by_one() -> None:
    """Neighbouring tokens are replaced independently in a chosen row."""
    tokens = torch.arange(20).repeat(20_000, 1)
    replace = TokenReplacement(1.0, 0.3, pool="vocab", num_tokens=10**9)
    found = replace(tokens, generator=seeded())
    assert found[found > 20].double().mean().item() == pytest.approx(5e8, rel=0.01)
    changed = (found != tokens).double()
    together = torch.cov(changed.T) - torch.diag(torch.full((20,), 0.21))
    assert float(together.abs().max()) < 5 * 0.3 / 20_000**0.5


@pytest.mark.parametrize(
    ("prob", "rate"), [(0.0, 1.0), (1.0, 0.0)], ids=["no row is chosen", "no token is"]
)
def test_replaces_nothing_at_zero(prob: float, rate: float) -> None:
    tokens = torch.randint(50, (64, 20), generator=seeded())
    assert torch.equal(TokenReplacement(prob, rate)(tokens), tokens)


def test_is_the_identity_in_evaluation_but_draws_samples() -> None:
    tokens = torch.arange(40).view(2, 20)
    replace = TokenReplacement(1.0, 1.0).eval()
    assert torch.equal(replace(tokens, generator=seeded()), tokens)
    assert not torch.equal(replace.sample(tokens, 1, generator=seeded()).values[0], tokens)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("pool", ["target", "source_target", "batch", "vocab"])
def test_padding_changes_nothing(pool: Any, left: bool) -> None:
    rows = [[BOS, 3, 4, 5, 6, 7], [BOS, 8, 9], [BOS], []]
    replace = TokenReplacement(1.0, 0.7, pool=pool, exclude=[BOS], num_tokens=50)
    source = padded([[30, 31], [32], [33], [34]])
    wanted = replace(padded(rows), source=source, generator=seeded())
    wider = padded(rows, 11, left=left)
    mask = wider >= 0
    garbage = wider.where(mask, 4)
    found = replace(garbage, mask, source=source, generator=seeded())
    for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a[mask[row]].tolist() == b[b >= 0].tolist()
    assert torch.equal(found[~mask], garbage[~mask])


@pytest.mark.parametrize("pool", ["target", "source_target", "vocab"])
def test_a_row_is_drawn_as_if_it_were_alone(pool: Any) -> None:
    tokens = padded([[3, 4, 5, 6, 7], [8, 9], [5, 5, 5, 4]])
    source = torch.tensor([[30, 31], [32, 33], [34, -1]])
    replace = TokenReplacement(0.7, 0.7, pool=pool, num_tokens=50)
    together = replace(tokens, source=source, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = replace(tokens[i : i + 1], source=source[i : i + 1], generator=seeded(i))
        assert torch.equal(together[i : i + 1], alone)
        again = replace(tokens[i : i + 1], source=source[i : i + 1], generator=[seeded(i)])
        assert torch.equal(alone, again)


def test_same_seed_same_tokens() -> None:
    tokens = torch.randint(50, (8, 30), generator=seeded())
    replace = TokenReplacement()
    first = replace(tokens, generator=seeded(3))
    assert torch.equal(replace(tokens, generator=seeded(3)), first)
    assert not torch.equal(replace(tokens, generator=seeded(4)), first)
    torch.manual_seed(3)
    assert torch.equal(replace(tokens), first)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("pool", ["target", "source_target", "batch", "vocab"])
def test_keeps_the_integer_type(dtype: torch.dtype, pool: Any) -> None:
    tokens = torch.randint(50, (8, 30), generator=seeded())
    replace = TokenReplacement(1.0, 0.5, pool=pool, num_tokens=60)
    wanted = replace(tokens, source=tokens, generator=seeded())
    found = replace(tokens.to(dtype), source=tokens, generator=seeded())
    assert found.dtype == dtype
    assert torch.equal(found.long(), wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("pool", ["target", "source_target", "batch", "vocab"])
def test_takes_what_is_empty(shape: tuple[int, int], pool: Any) -> None:
    tokens = torch.zeros(shape, dtype=torch.long)
    replace = TokenReplacement(1.0, 1.0, pool=pool, num_tokens=9)
    source = torch.zeros(shape[0], 0, dtype=torch.long)
    assert replace(tokens, source=source).shape == shape
    assert replace(tokens, source=source, generator=[seeded()] * shape[0]).shape == shape
    assert replace.sample(tokens, 2, source=source).values.shape == (2, *shape)


def test_leaves_a_row_without_donors() -> None:
    tokens = torch.tensor([[BOS, EOS, -1], [-1, -1, -1], [BOS, 7, EOS]])
    replace = TokenReplacement(1.0, 1.0, exclude=[BOS, EOS])
    assert torch.equal(replace(tokens), tokens)


def test_a_single_token_is_its_only_donor() -> None:
    assert TokenReplacement(1.0, 1.0)(torch.tensor([[7]])).tolist() == [[7]]


def test_takes_views_and_leaves_its_input() -> None:
    table = torch.randint(50, (30, 8), generator=seeded())
    before = table.clone()
    replace = TokenReplacement(1.0, 0.5)
    found = replace(table.T, generator=seeded())
    assert torch.equal(found, replace(table.T.contiguous(), generator=seeded()))
    assert torch.equal(table, before)


def test_samples_come_with_their_shares() -> None:
    tokens = torch.arange(200).view(2, 100)
    drawn = TokenReplacement(1.0, 0.5).sample(tokens, 50, generator=seeded())
    assert drawn.values.shape == (50, 2, 100)
    assert drawn.diagnostics["changed_rows"] == 1.0
    assert drawn.diagnostics["changed_tokens"] == pytest.approx(0.5 * 0.99, abs=0.03)
    assert len({tuple(v.flatten().tolist()) for v in drawn.values}) == 50
    none = TokenReplacement(1.0, 0.5).sample(tokens, 0)
    assert none.values.shape == (0, 2, 100)
    assert none.diagnostics["changed_tokens"] == 0.0


def test_says_what_it_is() -> None:
    shown = repr(TokenReplacement(pool="vocab", exclude=[2, 1], num_tokens=9))
    assert "prob=0.5, rate=0.3, pool='vocab', exclude=[1, 2], num_tokens=9" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prob": 1.5}, r"`prob` of TokenReplacement must be in \[0, 1\]. Found 1.5"),
        ({"rate": -0.1}, "`rate`"),
        ({"rate": float("nan")}, "`rate`"),
        ({"pool": "targets"}, "`pool` .* Did you mean 'target'"),
        ({"pool": "vocab"}, "`num_tokens` .* Found None"),
        ({"pool": "vocab", "num_tokens": 2, "exclude": [0, 1]}, "`num_tokens`"),
        ({"exclude": [-1]}, "`exclude`"),
        ({"exclude": 0.5}, "`exclude`"),
    ],
)
def test_rejects_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        TokenReplacement(**arguments)
    assert caught.value.argument in arguments or caught.value.argument == "num_tokens"


IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": IDS.float()}, "`tokens` .* Found torch.float32"),
        ({"tokens": IDS[0]}, r"`tokens` .* shape \[3\]"),
        ({"tokens": [[1, 2]]}, "`tokens` .* Found list"),
        ({"tokens": IDS, "mask": IDS}, "`mask` .* must be boolean"),
        ({"tokens": IDS, "mask": torch.ones(2, 2, dtype=torch.bool)}, "`mask`"),
        ({"tokens": IDS}, "`source` .* Found None"),
        ({"tokens": IDS, "source": IDS[:1]}, "`source` .* Found 1"),
        ({"tokens": IDS, "source": IDS, "source_mask": IDS}, "`source_mask`"),
        ({"tokens": IDS, "source": IDS, "generator": [seeded()]}, "`generator` .* each of 2"),
        (
            {"tokens": IDS.to("meta"), "source": IDS.to("meta"), "generator": seeded()},
            "`generator` .* must be on the device of the tokens, meta",
        ),
    ],
)
def test_rejects_inputs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        TokenReplacement(pool="source_target")(**arguments)
    assert f"`{caught.value.argument}`" in str(caught.value)


def test_rejects_a_negative_number_of_samples() -> None:
    with pytest.raises(ArgumentError, match="`num_samples`"):
        TokenReplacement().sample(IDS, -1)
