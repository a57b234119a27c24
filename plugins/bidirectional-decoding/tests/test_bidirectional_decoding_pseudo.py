"""Partners that read pseudo-targets: what they are, and that nothing leaks from them."""

from __future__ import annotations

import pytest
import torch

from kexue.core import ArgumentError
from kexue_bidirectional_decoding import (
    BidirectionalSeq2Seq,
    InteractiveAttention,
    Partners,
    bidirectional_beam_search,
    make_bidirectional,
    pseudo_targets,
)

START, END = 1, 2
SOURCE = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [8, 8, 5, 0]])


def model(seed: int, *, ends: float = 0.0) -> BidirectionalSeq2Seq:
    torch.manual_seed(seed)
    made = BidirectionalSeq2Seq("科学空间ab", width=16, heads=4, interaction="post")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.5)
        made.output.bias[[START, END]] += ends
    return made.double().eval()


@pytest.mark.parametrize("ends", [-99.0, 2.0])
def test_partners_read_what_the_search_writes(ends: float) -> None:
    time, whole, cut = 6, 0, 0
    for seed in range(3):
        writer = model(seed, ends=ends)
        found = bidirectional_beam_search(
            writer, SOURCE, mask=SOURCE > 0, width=2, max_new_tokens=time, both=True
        )
        partners = pseudo_targets(writer, SOURCE, SOURCE > 0, time=time, width=2)
        for i in range(len(SOURCE)):
            left, right = (
                [token for token in side.tolist()[i] if token not in {START, END}]
                for side in (found.left, found.right)
            )
            for ids, steps, line in (
                (partners.left_in, partners.left_steps, [START, *left]),
                (partners.right_in, partners.right_steps, [END, *right[::-1]]),
            ):
                kept = line[:time]
                assert ids[i].tolist() == kept + [0] * (time - len(kept))
                assert int(steps[i]) == len(kept)
                whole, cut = whole + (len(line) < time), cut + (len(line) > time)
    assert whole if ends > 0 else cut


def test_partners_that_read_the_target_are_plain_teacher_forcing() -> None:
    learner = model(3)
    targets = make_bidirectional(SOURCE, SOURCE > 0, start_id=START, end_id=END)
    inputs = (SOURCE, SOURCE > 0, targets.left_in, targets.right_in)
    plain = learner(*inputs)
    steps = targets.lengths + 1
    same = learner(*inputs, partners=Partners(targets.left_in, targets.right_in, steps, steps))
    for i, n in enumerate(targets.lengths.tolist()):
        for side in range(2):
            torch.testing.assert_close(same[side][i, : n + 1], plain[side][i, : n + 1])


def test_nothing_leaks_from_partners() -> None:
    learner = model(4)
    source = SOURCE[:1]
    partners = pseudo_targets(model(5), source, time=5)
    for with_partners in (True, False):
        leaks = []
        for t in range(4):
            logits = []
            for token in (5, 9):
                text = torch.tensor([[6, 7, 8, 10]])
                text[0, t] = token
                made = make_bidirectional(text, start_id=START, end_id=END)
                given = {"partners": partners} if with_partners else {}
                out = learner(source, source > 0, made.left_in, made.right_in, **given)
                logits.append(out[0][0, t])
            leaks.append(not torch.allclose(logits[0], logits[1], atol=1e-12, rtol=0.0))
        assert leaks == ([False] * 4 if with_partners else [False, False, True, True])


def test_the_layer_asks_partners_as_far_as_they_are_real() -> None:
    torch.manual_seed(0)
    layer = InteractiveAttention(8, 2).double()
    left, right, other, another = torch.randn(4, 2, 5, 8, dtype=torch.float64)
    steps = torch.tensor([5, 2]), torch.tensor([3, 5])
    found = layer(left, right, partners=(other, another), steps=steps)
    # Of one direction only the queries are its own, of the partner only keys and values.
    torch.testing.assert_close(found[0][1], layer(left, another)[0][1])
    torch.testing.assert_close(found[1][0], layer(other, right)[1][0])
    other[1, 2:], another[0, 3:] = 50.0, -50.0
    again = layer(left, right, partners=(other, another), steps=steps)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArgumentError, match=r"`partners` must have the shape of `left`"):
        layer(left, right, partners=(other[:, :2], another))
