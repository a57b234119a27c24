"""The search: beside a literal port of the post's, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.errors import WorkError
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language import beam_search
from kexue_bidirectional_decoding import (
    BidirectionalBeam,
    BidirectionalSeq2Seq,
    FunctionPairScorer,
    bidirectional_beam_search,
)

ALPHABET = "科学空间ab"
START, END = 1, 2


def random_model(seed: int, interaction: str = "post", width: int = 16) -> BidirectionalSeq2Seq:
    torch.manual_seed(seed)
    model = BidirectionalSeq2Seq(ALPHABET, width=width, heads=4, interaction=interaction)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)  # so that hypotheses differ
        model.output.bias[[START, END]] -= 1.0  # and texts have some length
    return model.double().eval()


def whole(model: BidirectionalSeq2Seq, lengths: int | None = None) -> Callable[..., Any]:
    """A model as a function of whole prefixes, computed anew for each pair."""

    def function(source: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        time = max(left.shape[1], right.shape[1])
        logits = []
        for own, side in ((left, 0), (right, 1)):
            inputs = [torch.nn.functional.pad(x, (0, time - x.shape[1])) for x in (left, right)]
            memory, state = model._encode(source, torch.ones_like(source).bool())
            hidden = [
                gru(model.embedding(x), state[None].contiguous())[0]
                for gru, x in zip(model.decoders, inputs, strict=True)
            ]
            mask = torch.ones_like(source).bool()
            mixed = model._mixed(hidden[side], memory, mask, right=bool(side))
            if model.between is not None:
                q, _, _ = model.between.project(hidden[side], right=bool(side))
                _, k, v = model.between.project(hidden[1 - side], right=not side)
                read = (right if side == 0 else left).shape[1]
                seen = torch.arange(time) < min(read, own.shape[1])
                if lengths is not None:
                    seen = seen & (torch.arange(time) <= max(lengths - own.shape[1], 0))
                scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
                asked = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
                mixed = mixed + model.crosses[side](asked)
            logits.append(model.output(mixed.tanh())[:, own.shape[1] - 1])
        return logits[0], logits[1]

    return function


def literal(
    function: Callable[..., Any],
    source: list[int],
    beam: int,
    longest: int,
    *,
    penalty: float = 0.0,
) -> tuple[list[int], float, bool, bool]:
    """The post's search in lists: every prefix computed anew, one pair after the other.

    What has ended is not extended; otherwise as in the post.
    """
    ids = torch.tensor([source])
    sides: list[list[tuple[list[int], float]]] = [[([START], 0.0)], [([END], 0.0)]]
    marks = (START, END)

    def over(side: int, text: list[int]) -> bool:
        return len(text) > 1 and text[-1] == marks[1 - side]

    def good(text: list[int], score: float) -> float:
        return score / math.pow(len(text) - 1, penalty)

    for _ in range(longest):
        probability: list[dict[tuple[int, int], Tensor]] = [{}, {}]
        for i, (left, _) in enumerate(sides[0]):
            for j, (right, _) in enumerate(sides[1]):
                read = [x[:-1] if over(s, x) else x for s, x in enumerate((left, right))]
                both = function(ids, torch.tensor([read[0]]), torch.tensor([read[1]]))
                probability[0][i, j] = both[0][0].softmax(-1)
                probability[1][j, i] = both[1][0].softmax(-1)
        grown: list[list[tuple[list[int], float]]] = []
        for s, side in enumerate(sides):
            candidates = []
            for i, (text, score) in enumerate(side):
                if over(s, text):
                    candidates.append((text, score))
                    continue
                others = [probability[s][i, j] for j in range(len(sides[1 - s]))]
                mean = torch.stack(others).mean(0)
                for token, p in enumerate(mean.tolist()):
                    if token != marks[s] and p > 0:
                        candidates.append(([*text, token], score + math.log(p)))
            candidates.sort(key=lambda c: -good(*c))
            grown.append(candidates[:beam])
        sides = grown
        (left, l_score), (right, r_score) = sides[0][0], sides[1][0]
        l_good, r_good = good(left, l_score), good(right, r_score)
        if (over(0, left) and l_good >= r_good) or (over(1, right) and r_good >= l_good):
            break
    if l_good >= r_good:
        return left[1:], l_score, over(0, left), False
    turned = right[:0:-1]
    whole_text = over(1, right)
    return ([*turned[1:], END] if whole_text else turned), r_score, whole_text, True


def ended(found: DecodeResult) -> Tensor:
    assert found.ended is not None
    return found.ended


SOURCES = [[5, 6, 7, 8], [9], [10, 6, 6, 5, 5, 8, 9]]


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    time = max(map(len, rows))
    ids = torch.tensor([row + [-100] * (time - len(row)) for row in rows])
    return ids, torch.arange(time) < torch.tensor([[len(row)] for row in rows])


@pytest.mark.parametrize(
    ("beam", "interaction", "penalty"),
    [
        (1, "post", 0.0),
        (2, "post", 0.0),
        (2, "mask", 0.0),
        (2, "none", 0.0),
        (2, "post", 0.7),
        (3, "post", 0.0),
    ],
)
def test_is_the_literal_search(beam: int, interaction: str, penalty: float) -> None:
    ids, mask = batch(SOURCES)
    ways = set()
    for seed in range(3):
        model = random_model(seed, interaction)
        decoder = BidirectionalBeam(beam, max_new_tokens=6, length_penalty=penalty)
        found = decoder.decode(model, prompt=ids, mask=mask)
        for row, source in enumerate(SOURCES):
            text, score, over, from_right = literal(whole(model), source, beam, 6, penalty=penalty)
            assert found.tolist()[row] == text
            assert float(found.scores[row]) == pytest.approx(score, abs=1e-9)
            assert bool(ended(found)[row]) == over
            assert bool(found.from_right[row]) == from_right
            ways.add((over, from_right))
    assert len(ways) > 1


def test_known_lengths_hide_the_same_states_as_in_training() -> None:
    ids, mask = batch(SOURCES)
    different = 0
    for seed in range(2):
        model = random_model(seed, "mask")
        known = mask.sum(1)
        found = bidirectional_beam_search(
            model, ids, mask=mask, lengths=known, width=2, max_new_tokens=6
        )
        free = bidirectional_beam_search(model, ids, mask=mask, width=2, max_new_tokens=6)
        for row, source in enumerate(SOURCES):
            text, score, *_ = literal(whole(model, len(source)), source, 2, 6)
            assert found.tolist()[row] == text
            assert float(found.scores[row]) == pytest.approx(score, abs=1e-9)
        different += not torch.allclose(found.scores, free.scores)
    assert different


def test_a_function_is_searched_like_the_model() -> None:
    ids, mask = batch(SOURCES)
    model = random_model(5)
    scorer = FunctionPairScorer(whole(model), start_id=START, end_id=END)
    for both in (False, True):
        options: dict[str, Any] = {"mask": mask, "width": 3, "max_new_tokens": 8, "both": both}
        slow = bidirectional_beam_search(scorer, ids, **options)
        fast = bidirectional_beam_search(model, ids, **options)
        assert slow.tolist() == fast.tolist()
        torch.testing.assert_close(slow.scores, fast.scores)


def test_going_on_to_both_ends_gives_the_same_answer_and_two_whole_texts() -> None:
    ids, mask = batch(SOURCES)
    longer = 0
    for seed in range(6):
        model = random_model(seed)
        with torch.no_grad():
            model.output.bias[[START, END]] += 3.0  # all end
        one = BidirectionalBeam(max_new_tokens=40).decode(model, prompt=ids, mask=mask)
        two = BidirectionalBeam(max_new_tokens=40, both=True).decode(model, prompt=ids, mask=mask)
        whole_rows = ended(two.left) & ended(two.right)
        assert [r for r, w in zip(one.tolist(), whole_rows, strict=True) if w] == [
            r for r, w in zip(two.tolist(), whole_rows, strict=True) if w
        ]
        best = torch.maximum(two.left.scores, two.right.scores)
        torch.testing.assert_close(two.scores, best)
        longer += int(whole_rows.sum()) - int((ended(one.left) & ended(one.right)).sum())
    assert longer > 0


def test_greedy_without_a_partner_is_greedy_search_from_each_end() -> None:
    ids, mask = batch(SOURCES)
    model = random_model(3, "none")
    function = whole(model)
    found = BidirectionalBeam(1, max_new_tokens=12, both=True).decode(model, prompt=ids, mask=mask)
    for row, source in enumerate(SOURCES):
        for side, (mark, last) in enumerate(((START, END), (END, START))):

            def score(
                prefix: Tensor, source: list[int] = source, side: int = side, mark: int = mark
            ) -> Tensor:
                prompt = torch.tensor([source]).expand(len(prefix), -1)
                logits: Tensor = function(prompt, prefix, prefix)[side].clone()
                total = logits.logsumexp(-1, keepdim=True)
                logits = logits - total
                logits[:, mark] = -math.inf
                return logits

            wanted = beam_search(
                score, torch.tensor([[mark]]), width=1, max_new_tokens=12, eos_id=last
            )
            got = (found.left, found.right)[side]
            text = wanted.tolist()[0]
            if side:
                text = [*text[-2::-1], END] if bool(ended(wanted)[0]) else text[::-1]
            assert got.tolist()[row] == text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_rows_do_not_see_each_other(seed: int, beam: int, longest: int, both: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(5, 11, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 7, (4,), generator=generator)
    ]
    model = random_model(seed % 7, ("post", "mask", "none")[seed % 3])
    ids, mask = batch(rows)
    options: dict[str, Any] = {"width": beam, "max_new_tokens": longest, "both": both}
    found = bidirectional_beam_search(model, ids, mask=mask, lengths=mask.sum(1), **options)
    for i, row in enumerate(rows):
        alone = bidirectional_beam_search(
            model, torch.tensor([row]), lengths=torch.tensor([len(row)]), **options
        )
        assert alone.tolist() == [found.tolist()[i]]
        torch.testing.assert_close(alone.scores[0], found.scores[i])
        assert alone.from_right.tolist() == [found.from_right.tolist()[i]]
        assert alone.left.tolist() == [found.left.tolist()[i]]
        assert alone.right.tolist() == [found.right.tolist()[i]]
    turned = torch.cat([ids.flip(1), torch.full_like(ids, 7)], 1)  # padding on the left
    elsewhere = torch.cat([mask.flip(1), torch.zeros_like(mask)], 1)
    back = [row[::-1] for row in rows]
    there = bidirectional_beam_search(model, turned, mask=elsewhere, **options)
    again = bidirectional_beam_search(model, batch(back)[0], mask=batch(back)[1], **options)
    assert there.tolist() == again.tolist()


def test_one_side_may_end_first_and_the_other_goes_on() -> None:
    """From the left 4 ends soon and is not sure; from the right 5 4 is written, and is."""
    left_rows = {2: {4: 0.6, 5: 0.4}, 4: {3: 0.9, 4: 0.1}, 5: {3: 0.9, 4: 0.1}}
    right_rows = {3: {4: 0.99, 5: 0.01}, 4: {5: 0.99, 2: 0.01}, 5: {2: 0.99, 4: 0.01}}

    def logits(rows: dict[int, dict[int, float]], ids: Tensor) -> Tensor:
        table = torch.full((6, 6), -math.inf)
        for last, following in rows.items():
            for token, probability in following.items():
                table[last, token] = math.log(probability)
        return table[ids[:, -1]]

    def function(source: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        del source
        return logits(left_rows, left), logits(right_rows, right)

    prompt = torch.zeros(1, 0, dtype=torch.long)  # nothing is given
    found = BidirectionalBeam(2).decode(function, prompt=prompt)
    assert found.tolist() == [[5, 4, 3]]
    assert found.from_right.tolist() == [True]
    assert ended(found).tolist() == [True]
    assert float(found.scores) == pytest.approx(3 * math.log(0.99), abs=1e-6)
    assert found.left.tolist() == [[4, 3]]
    assert ended(found.left).tolist() == [True]


def constant(logits: list[float]) -> Callable[..., Any]:
    def function(source: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        del source, right
        row = torch.tensor(logits).expand(len(left), -1)
        return row, row

    return function


def test_texts_that_do_not_end_are_cut_off() -> None:
    prompt = torch.tensor([[7], [8]])
    found = BidirectionalBeam(2, max_new_tokens=3).decode(
        constant([0.0, 0.0, -math.inf, -math.inf, 5.0]), prompt=prompt
    )
    assert found.tolist() == [[4, 4, 4]] * 2
    assert ended(found).tolist() == [False, False]
    nothing = BidirectionalBeam(max_new_tokens=0).decode(constant([0.0] * 5), prompt=prompt)
    assert nothing.tolist() == [[], []]
    rows = BidirectionalBeam().decode(constant([0.0] * 5), prompt=prompt[:0])
    assert rows.sequences.shape == (0, 0)
    assert rows.from_right.shape == (0,)


def test_a_beam_may_be_wider_than_there_are_tokens() -> None:
    logits = [-math.inf, -math.inf, 0.3, 0.1, 0.7]
    found = BidirectionalBeam(50, max_new_tokens=4).decode(
        constant(logits), prompt=torch.tensor([[7]])
    )
    p = torch.tensor(logits).softmax(0)
    # From the left 3 ends and from the right 2, which is likelier than any other whole text.
    assert found.tolist() == [[3]]
    assert found.from_right.tolist() == [True]
    assert float(found.scores) == pytest.approx(math.log(p[2]), abs=1e-6)


def test_no_token_at_all() -> None:
    found = BidirectionalBeam(2, max_new_tokens=3).decode(
        constant([-math.inf] * 5), prompt=torch.tensor([[7]])
    )
    assert found.tolist() == [[]]
    assert found.scores.tolist() == [-math.inf]
    assert ended(found).tolist() == [False]


def test_half_precision_is_finite() -> None:
    ids, mask = batch(SOURCES)
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(0, "mask").to(dtype)
        found = BidirectionalBeam(max_new_tokens=5).decode(model, prompt=ids, mask=mask)
        assert found.scores.dtype is torch.float32
        assert found.scores.isfinite().all()


def test_refuses_arguments() -> None:
    prompt = torch.tensor([[7]])
    function = constant([0.0] * 5)
    with pytest.raises(ArgumentError, match=r"`end_id` must be another token than `start_id`"):
        BidirectionalBeam(start_id=3)
    with pytest.raises(ArgumentError, match=r"`width` must be at least 1. Found 0"):
        BidirectionalBeam(0).decode(function, prompt=prompt)
    with pytest.raises(ArgumentError, match=r"`max_new_tokens` must be at least 0. Found -1"):
        BidirectionalBeam(max_new_tokens=-1).decode(function, prompt=prompt)
    with pytest.raises(ArgumentError, match=r"`length_penalty` must be .* Found -0.5"):
        BidirectionalBeam(length_penalty=-0.5).decode(function, prompt=prompt)
    with pytest.raises(ArgumentError, match=r"`lengths` must be whole numbers"):
        BidirectionalBeam().decode(function, prompt=prompt, lengths=torch.tensor([1, 2]))
    with pytest.raises(ArgumentError, match=r"`end_id` must be one of the model's 5 tokens"):
        BidirectionalBeam(end_id=9).decode(function, prompt=prompt)
    with pytest.raises(ArgumentError, match=r"`scores` must be a BidirectionalScorer.*Found int"):
        BidirectionalBeam().decode(3, prompt=prompt)
    short = FunctionPairScorer(function, max_length=4)
    with pytest.raises(ArgumentError, match=r"`max_new_tokens` must be at most 5"):
        BidirectionalBeam(max_new_tokens=6).decode(short, prompt=prompt)
    with pytest.raises(WorkError, match="scores are NaN"):
        BidirectionalBeam().decode(constant([math.nan] * 5), prompt=prompt)
    with pytest.raises(ArgumentError, match=r"hold a character in every row.*row 0"):
        BidirectionalBeam().decode(random_model(0), prompt=torch.zeros(1, 0, dtype=torch.long))
