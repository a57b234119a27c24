"""Greedy and beam search, alone and over the self-terminating layer; parity with transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.lab.language import CharacterModel
from kexue.core.language import beam_search, generate
from kexue_consistent_decoding import (
    Ancestral,
    Beam,
    ConsistentTopK,
    Greedy,
    SelfTerminating,
    SelfTerminatingLayer,
    non_termination_ratio,
    steps_to_end,
)

PROMPT = torch.tensor([[1], [2]])


class Table:
    """A Markov model: logits ``[token, token]`` of what follows each."""

    def __init__(self, tokens: int, seed: int, scale: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = scale * torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits[ids[:, -1]]


def enumerated(table: Tensor, start: int, longest: int) -> list[tuple[float, tuple[int, ...]]]:
    """All texts that end with 0 within ``longest`` tokens, most probable first."""
    log_p = table.log_softmax(-1)
    found = []
    for length in range(1, longest + 1):
        for inner in itertools.product(range(1, len(table)), repeat=length - 1):
            path = (start, *inner, 0)
            found.append((sum(float(log_p[a, b]) for a, b in itertools.pairwise(path)), path[1:]))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_texts(seed: int) -> None:
    model = Table(4, seed)
    found = Beam(width=60, num_return=5, eos_id=0).decode(model, PROMPT, max_new_tokens=4)
    for row, start in enumerate((1, 2)):
        wanted = enumerated(model.logits, start, 4)[:5]
        texts = found.tolist()[5 * row : 5 * row + 5]
        assert [tuple(text) for text in texts] == [path for _, path in wanted]
        scores = torch.tensor([score for score, _ in wanted], dtype=torch.float64)
        torch.testing.assert_close(found.scores[5 * row : 5 * row + 5].double(), scores)


def test_one_beam_is_greedy_search() -> None:
    model = Table(6, 1)
    prompt = torch.tensor([[1], [2], [5]])
    one = Beam(width=1, eos_id=0).decode(model, prompt, max_new_tokens=9)
    greedy = Greedy(eos_id=0).decode(model, prompt, max_new_tokens=9)
    assert one.tolist() == greedy.tolist()
    torch.testing.assert_close(one.scores, greedy.scores)
    assert (
        one.tolist()
        == Ancestral(top_k=1, eos_id=0).generate(model, prompt, max_new_tokens=9).tolist()
    )


@settings(max_examples=25, deadline=None)
@given(
    epsilon=st.sampled_from([0.03, 0.1, 0.4]),
    width=st.integers(1, 5),
    ends=st.sampled_from([[0], [3], [1, 4]]),
    scale=st.sampled_from([1.0, 8.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_every_search_ends_within_the_bound(
    epsilon: float, width: int, ends: list[int], scale: float, seed: int
) -> None:
    model = Table(6, seed, scale)
    model.logits[:, ends] += 20  # the network never wants to end
    scorer = SelfTerminating(model, epsilon=epsilon, eos_id=ends)
    bound = steps_to_end(epsilon, width=width, num_ends=len(ends))
    prompt = torch.tensor([[1], [2], [5]])
    found = beam_search(scorer, prompt, width=width, num_return=width, max_new_tokens=5 * bound)
    assert found.sequences.shape[1] <= bound
    assert bool(found.ended.all()) if found.ended is not None else False
    greedy = generate(scorer, prompt, max_new_tokens=5 * bound)
    assert (
        greedy.sequences.shape[1]
        <= scorer.steps_to_end
        == steps_to_end(epsilon, num_ends=len(ends))
    )
    assert non_termination_ratio(greedy) == 0


def test_without_the_layer_the_same_network_never_ends() -> None:
    model = Table(6, 0)
    model.logits[:, 0] -= 20
    found = Greedy(eos_id=0).decode(model, PROMPT, max_new_tokens=300)
    assert non_termination_ratio(found) == 1
    assert found.sequences.shape == (2, 300)
    over = SelfTerminating(lambda ids: -model(ids), epsilon=0.1, eos_id=0)
    assert non_termination_ratio(Greedy().decode(over, PROMPT)) == 0


def recurrent() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel("字科学空间abc", cell="rnn", width=12).eval()


def test_the_scorer_is_the_layer_over_a_trained_model() -> None:
    model = recurrent()
    end = model.eos_id
    assert end is not None
    prompt = torch.tensor([model.vocabulary.encode("科学空")])
    found = generate(SelfTerminating(model, epsilon=0.05), prompt, max_new_tokens=40)
    text = torch.tensor([[model.vocabulary.bos_id, *prompt[0].tolist(), *found.tolist()[0]]])
    layer = SelfTerminatingLayer(end, epsilon=0.05, context_len=3)
    log_p = layer(model(text))[0, 3:-1]
    torch.testing.assert_close(log_p.argmax(-1), text[0, 4:])
    picked = log_p.gather(1, text[0, 4:, None]).sum()
    torch.testing.assert_close(found.scores[0], picked.detach())


def test_the_scorer_gives_a_row_the_same_alone_and_padded() -> None:
    scorer = SelfTerminating(recurrent(), epsilon=0.02)
    prompt = torch.tensor([[5, 6, 7], [0, 0, 9], [0, 8, 8]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]]).bool()
    decoder = Beam(width=3, num_return=3)
    together = decoder.decode(scorer, prompt, mask=mask, max_new_tokens=30)
    for row in range(3):
        alone = decoder.decode(scorer, prompt[row, mask[row]][None], max_new_tokens=30)
        assert alone.tolist() == together.tolist()[3 * row : 3 * row + 3]
        torch.testing.assert_close(alone.scores, together.scores[3 * row : 3 * row + 3])


def test_sampling_over_the_layer_ends_too() -> None:
    model = Table(5, 3)
    model.logits[:, 0] += 30
    scorer = SelfTerminating(model, epsilon=0.05, eos_id=0)
    found = Ancestral(top_k=2).generate(
        scorer, torch.ones(200, 1).long(), max_new_tokens=400,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert non_termination_ratio(found) == 0


# -- transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=96, n_embd=16, n_layer=2, n_head=2,
        eos_token_id=0, bos_token_id=1, initializer_range=0.8,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def texts_of(found: Tensor, start: int) -> list[list[int]]:
    """New tokens up to the first end; transformers pads with -1 here."""
    return [[t for t in row if t >= 0] for row in found[:, start:].tolist()]


def test_matches_transformers_greedy_and_beam_search(gpt2: Any) -> None:
    prompt = torch.tensor([[3, 4, 5], [7, 2, 9], [6, 6, 6]])
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": -1}
    ones = torch.ones_like(prompt)
    theirs = gpt2.generate(prompt, attention_mask=ones, **given)
    assert Greedy().decode(gpt2, prompt, max_new_tokens=12).tolist() == texts_of(theirs, 3)
    theirs = gpt2.generate(
        prompt, attention_mask=ones, num_beams=4, length_penalty=0.0, early_stopping="never",
        **given,
    )  # fmt: skip
    ours = Beam(width=4).decode(gpt2, prompt, max_new_tokens=12)
    assert ours.tolist() == texts_of(theirs, 3)


def test_the_processor_is_the_scorer(gpt2: Any) -> None:
    from kexue_consistent_decoding import SelfTerminatingLogitsProcessor

    prompt = torch.tensor([[3, 4, 5], [7, 2, 9], [7, 2, 9]])
    given = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": -1}
    theirs = gpt2.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=[SelfTerminatingLogitsProcessor(0, epsilon=0.05)],
        **given,
    )
    ours = Greedy().decode(SelfTerminating(gpt2, epsilon=0.05), prompt, max_new_tokens=60)
    assert ours.tolist() == texts_of(theirs, 3)
    assert ours.sequences.shape[1] <= steps_to_end(0.05)
    with pytest.raises(ArgumentError, match="beam search"):
        gpt2.generate(
            prompt, num_beams=2, logits_processor=[SelfTerminatingLogitsProcessor(0)], **given
        )


def test_the_processor_follows_rows_that_move() -> None:
    pytest.importorskip("transformers")
    from kexue_consistent_decoding import SelfTerminatingLogitsProcessor

    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    processor = SelfTerminatingLogitsProcessor(1, epsilon=0.1)
    first = torch.tensor([[1, 5], [2, 6], [3, 7]])
    processor(first, logits)
    moved = torch.tensor([[3, 7, 0], [1, 5, 2], [3, 7, 1]])  # rows 2, 0, 2
    found = processor(moved, logits)
    straight = SelfTerminatingLogitsProcessor(1, epsilon=0.1)
    straight(first[[2, 0, 2]], logits[[2, 0, 2]])
    torch.testing.assert_close(found, straight(moved, logits))
    fresh = processor(torch.tensor([[9, 9]]), logits[:1])  # another text: from the start
    torch.testing.assert_close(
        fresh, SelfTerminatingLogitsProcessor(1, epsilon=0.1)(torch.tensor([[9, 9]]), logits[:1])
    )


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: SelfTerminating(Table(4, 0)), "eos_id"),
        (lambda: SelfTerminating(Table(4, 0), epsilon=1.0, eos_id=0), "epsilon"),
        (lambda: SelfTerminating(3, eos_id=0), "model"),
        (lambda: Greedy().decode(SelfTerminating(Table(4, 0), eos_id=4), PROMPT), "eos_id"),
        (lambda: Greedy(eos_id=0).decode(Table(4, 0)), "prompt"),
        (lambda: Greedy(eos_id=9).decode(Table(4, 0), PROMPT), "eos_id"),
        (lambda: Beam(0), "width"),
        (lambda: Beam(2, num_return=3), "num_return"),
        (lambda: ConsistentTopK(2, eos_id=0).generate(Table(4, 0), PROMPT[0]), "prompt"),
    ],
)  # fmt: skip
def test_rejects(make: Any, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument


def test_no_room_is_said(gpt2: Any) -> None:
    with pytest.raises(ArgumentError, match="reads 96 tokens"):
        Greedy().decode(SelfTerminating(gpt2), torch.ones(1, 90).long(), max_new_tokens=20)
