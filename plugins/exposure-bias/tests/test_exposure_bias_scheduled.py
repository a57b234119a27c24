"""Scheduled sampling: schedules, two passes, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue_exposure_bias import (
    exponential_decay,
    inverse_sigmoid_decay,
    linear_decay,
    mix_predictions,
    step_by_step,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Decoder(nn.Module):
    """A recurrent decoder whose state can be read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.output = nn.Linear(6, 9)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.output(self.gru(self.embedding(ids.clamp(min=0)))[0])
        return logits

    def advance(self, cache: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cache = self.gru(self.embedding(ids)[:, None], cache)
        return self.output(hidden[:, 0]), cache


STATE = torch.zeros(1, 4, 6, dtype=torch.float64)
TOKENS = torch.tensor([[0, 3, 4, 5, 6], [0, 7, 8, 2, 1], [0, 5, -1, -1, -1], [0, 1, 2, -1, -1]])


def test_schedules_fall_from_one_to_their_floor() -> None:
    steps = range(0, 200, 5)
    for values in (
        [linear_decay(s, slope=0.01, floor=0.2) for s in steps],
        [exponential_decay(s, base=0.98) for s in steps],
        [inverse_sigmoid_decay(s, scale=12) for s in steps],
    ):
        assert values == sorted(values, reverse=True)
        assert 0.9 < values[0] <= 1
        assert 0 <= values[-1] < 0.21
    assert linear_decay(1000, slope=0.01, floor=0.2) == 0.2
    assert inverse_sigmoid_decay(12 * torch.tensor(12.0).log().item(), scale=12) == pytest.approx(
        0.5
    )
    assert inverse_sigmoid_decay(10**9, scale=1) == pytest.approx(0, abs=1e-9)


def test_share_one_is_teacher_forcing() -> None:
    decoder = Decoder()
    logits = decoder(TOKENS)
    assert torch.equal(mix_predictions(TOKENS, logits, 1.0), TOKENS)
    assert torch.allclose(step_by_step(decoder.advance, STATE, TOKENS, 1.0)[:2], logits[:2])


def test_share_zero_runs_free() -> None:
    """Beside a loop that feeds each prediction back."""
    decoder = Decoder()
    found = step_by_step(decoder.advance, STATE, TOKENS[:, :1].expand(4, 6), 0.0)
    read = [torch.zeros(4, dtype=torch.long)]
    for _ in range(6):
        read.append(decoder(torch.stack(read, 1))[:, -1].argmax(-1))
    assert torch.equal(found.argmax(-1), torch.stack(read[1:], 1))


def test_two_passes_read_what_the_first_predicted() -> None:
    decoder = Decoder()
    logits = decoder(TOKENS)
    found = mix_predictions(TOKENS, logits, 0.0)
    wanted = torch.cat([TOKENS[:, :1], logits.argmax(-1)[:, :-1]], 1)
    assert torch.equal(found, torch.where(TOKENS >= 0, wanted, TOKENS))


def test_the_share_is_kept() -> None:
    tokens = torch.zeros(500, 101, dtype=torch.long)
    logits = torch.tensor([0.0, 1.0]).expand(500, 101, 2)
    found = mix_predictions(tokens, logits, 0.7, generator=seeded())
    assert not found[:, 0].any()
    assert float(found[:, 1:].double().mean()) == pytest.approx(0.3, abs=0.01)


def test_draws_follow_the_softmax() -> None:
    tokens = torch.zeros(500, 101, dtype=torch.long)
    law = torch.tensor([0.1, 0.0, 0.6, 0.3])
    logits = law.log().expand(500, 101, 4)
    found = mix_predictions(tokens, logits, 0.0, choose="sample", generator=seeded())[:, 1:]
    shares = found.flatten().bincount(minlength=4) / found.numel()
    assert torch.allclose(shares, law, atol=0.01)
    assert shares[1] == 0

    seen: list[Tensor] = []
    stepped = step_by_step(
        lambda cache, ids: (law.log().expand(500, 4), [*cache, ids]),
        seen,
        tokens,
        0.0,
        choose="sample",
        generator=seeded(),
    )
    assert stepped.shape == (500, 101, 4)
    assert not seen


def test_steps_and_passes_draw_alike() -> None:
    """A decoder that looks at nothing: both ways read the same tokens, from the same draws."""
    logits = torch.randn(7, generator=seeded())
    tokens = torch.randint(7, (5, 9), generator=seeded())
    read: list[Tensor] = []

    def advance(cache: Any, ids: Tensor) -> tuple[Tensor, Any]:
        read.append(ids)
        return logits.expand(5, 7), cache

    step_by_step(advance, None, tokens, 0.4, choose="sample", generator=seeded(1))
    wide = logits.expand(5, 9, 7)
    mixed = mix_predictions(tokens, wide, 0.4, choose="sample", generator=seeded(1))
    assert torch.equal(torch.stack(read, 1), mixed)


@pytest.mark.parametrize("choose", ["greedy", "sample"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_nothing(choose: Any, left: bool) -> None:
    tokens = TOKENS[:2]
    logits = torch.randn(2, 5, 9, generator=seeded())
    wanted = mix_predictions(tokens, logits, 0.5, choose=choose, generator=seeded(1))
    pad = (3, 0) if left else (0, 3)
    wide = torch.nn.functional.pad(tokens, pad, value=4)
    mask = torch.nn.functional.pad(torch.ones_like(tokens, dtype=torch.bool), pad)
    scores = torch.nn.functional.pad(logits, (0, 0, *pad), value=7.0)
    found = mix_predictions(wide, scores, 0.5, mask=mask, choose=choose, generator=seeded(1))
    assert torch.equal(found[mask].view(2, 5), wanted)
    assert (found[~mask] == 4).all()


def test_a_row_is_drawn_as_if_it_were_alone() -> None:
    logits = torch.randn(4, 5, 9, generator=seeded())
    generators = [seeded(i) for i in range(4)]
    together = mix_predictions(TOKENS, logits, 0.5, choose="sample", generator=generators)
    for i in range(4):
        alone = mix_predictions(
            TOKENS[i : i + 1], logits[i : i + 1], 0.5, choose="sample", generator=seeded(i)
        )
        assert torch.equal(together[i : i + 1], alone)


def test_gradients_flow_through_the_states() -> None:
    decoder = Decoder()
    logits = step_by_step(decoder.advance, STATE, TOKENS, 0.5, generator=seeded())
    torch.autograd.backward(logits.square().sum())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_takes_what_is_empty_or_short() -> None:
    none = torch.zeros(0, 3, dtype=torch.long)
    assert mix_predictions(none, torch.zeros(0, 3, 9), 0.5).shape == (0, 3)
    no_time = torch.zeros(3, 0, dtype=torch.long)
    assert mix_predictions(no_time, torch.zeros(3, 0, 9), 0.5).shape == (3, 0)
    one = torch.tensor([[6]])
    assert mix_predictions(one, torch.zeros(1, 1, 9), 0.0).tolist() == [[6]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"true_share": 1.1}, "`true_share`"),
        ({"choose": "best"}, "`choose` .* Found 'best'"),
        ({"logits": torch.zeros(4, 5)}, r"`logits` .* Found \[4, 5\]"),
        ({"tokens": TOKENS[0]}, "`tokens`"),
        ({"mask": TOKENS}, "`mask`"),
        ({"generator": [seeded()]}, "`generator`"),
    ],
)
def test_rejects_inputs(arguments: dict[str, Any], message: str) -> None:
    given = {"tokens": TOKENS, "logits": torch.zeros(4, 5, 9), "true_share": 0.5, **arguments}
    with pytest.raises(ArgumentError, match=message):
        mix_predictions(**given)
    if "logits" not in arguments:
        given.pop("logits")
        with pytest.raises(ArgumentError, match=message):
            step_by_step(Decoder().advance, STATE, **given)


def test_rejects_no_time_and_bad_schedules() -> None:
    with pytest.raises(ArgumentError, match=r"`tokens` .* at least one time"):
        step_by_step(Decoder().advance, STATE, torch.zeros(4, 0, dtype=torch.long), 0.5)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: linear_decay(1, slope=-1), "`slope`"),
        (lambda: linear_decay(1, slope=1, floor=2), "`floor`"),
        (lambda: exponential_decay(1, base=1.5), "`base`"),
        (lambda: exponential_decay(-1, base=0.5), "`step`"),
        (lambda: inverse_sigmoid_decay(1, scale=0.5), "`scale`"),
    ]
    for call, message in cases:
        with pytest.raises(ArgumentError, match=message):
            call()
