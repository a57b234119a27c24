"""Targets, loss and the interactive layer, beside loops; and that the mask lets nothing leak."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.core import ArgumentError
from kexue_bidirectional_decoding import (
    BidirectionalSeq2Seq,
    InteractiveAttention,
    bidirectional_cross_entropy,
    make_bidirectional,
    reverse_rows,
    visible,
)

ROWS = st.lists(st.lists(st.integers(5, 30), max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.booleans())
def test_targets_are_those_of_each_row(rows: list[list[int]], padding_first: bool) -> None:
    time = max(map(len, rows)) + 1
    gaps = [[-100] * (time - len(row)) for row in rows]
    ids = torch.tensor([g + r if padding_first else r + g for r, g in zip(rows, gaps, strict=True)])
    mask = ids > 0
    found = make_bidirectional(ids, mask)
    longest = max(map(len, rows)) + 1

    def padded(row: list[int], fill: int) -> list[int]:
        return row + [fill] * (longest - len(row))

    assert found.left_in.tolist() == [padded([2, *row], 0) for row in rows]
    assert found.left_out.tolist() == [padded([*row, 3], -1) for row in rows]
    assert found.right_in.tolist() == [padded([3, *row[::-1]], 0) for row in rows]
    assert found.right_out.tolist() == [padded([*row[::-1], 2], -1) for row in rows]
    assert found.lengths.tolist() == [len(row) for row in rows]
    there = reverse_rows(found.left_in, found.lengths + 1)
    assert torch.equal(reverse_rows(there, found.lengths + 1), found.left_in)


def test_the_loss_is_the_mean_of_both_means_per_token() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[4, 5, 6], [7, 0, 0]])
    targets = make_bidirectional(ids, ids > 0)
    left, right = torch.randn(2, 2, 4, 9, dtype=torch.float64)
    wanted = 0.0
    for logits, rows in ((left, [[4, 5, 6, 3], [7, 3]]), (right, [[6, 5, 4, 2], [7, 2]])):
        each = [
            -logits[i, t].log_softmax(-1)[token]
            for i, row in enumerate(rows)
            for t, token in enumerate(row)
        ]
        wanted += float(sum(each)) / len(each) / 2
    found = bidirectional_cross_entropy(left, right, targets)
    assert float(found) == pytest.approx(wanted, abs=1e-12)
    behind = left.clone()
    behind[1, 2:] = 1e4
    assert torch.equal(bidirectional_cross_entropy(behind, right, targets), found)
    half = bidirectional_cross_entropy(left.half(), right.bfloat16(), targets)
    assert half.dtype is torch.float32
    assert float(half) == pytest.approx(wanted, abs=0.02)


def test_no_tokens_cost_nothing() -> None:
    none = make_bidirectional(torch.zeros(0, 3, dtype=torch.long))
    logits = torch.zeros(0, 1, 5, requires_grad=True)
    loss = bidirectional_cross_entropy(logits, logits, none)
    assert float(loss.detach()) == 0.0
    empty = make_bidirectional(torch.zeros(1, 0, dtype=torch.long))
    assert empty.left_out.tolist() == [[3]]
    assert empty.right_out.tolist() == [[2]]


def by_loop(
    layer: InteractiveAttention, left: torch.Tensor, right: torch.Tensor, n: int
) -> list[torch.Tensor]:
    """One row, one position, one head after the other."""
    width, heads = left.shape[1], layer.heads
    size = width // heads
    out = []
    for own, other, mine, theirs in (
        (left, right, layer.left, layer.right),
        (right, left, layer.right, layer.left),
    ):
        q = own @ mine.weight[:width].T
        k, v = (other @ theirs.weight[i * width : (i + 1) * width].T for i in (1, 2))
        rows = []
        for t in range(n + 1):
            seen = [j for j in range(t + 1) if layer.leak == "post" or j <= max(n - t - 1, 0)]
            parts = []
            for h in range(heads):
                s = slice(h * size, (h + 1) * size)
                weights = torch.stack([q[t, s] @ k[j, s] for j in seen]) / math.sqrt(size)
                parts.append(weights.softmax(0) @ v[seen][:, s])
            rows.append(torch.cat(parts))
        out.append(torch.stack(rows))
    return out


@pytest.mark.parametrize("leak", ["post", "mask"])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_layer_is_the_loop(leak: str, heads: int) -> None:
    torch.manual_seed(0)
    layer = InteractiveAttention(6, heads, leak=leak).double()
    lengths = torch.tensor([5, 2, 0, 1])
    left, right = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    found = layer(left, right, lengths)
    for i, n in enumerate(lengths.tolist()):
        wanted = by_loop(layer, left[i], right[i], n)
        for side in range(2):
            torch.testing.assert_close(found[side][i, : n + 1], wanted[side])
    assert all(part.isfinite().all() for part in found)
    twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 -- our own bytes
    views = layer(left.mT.contiguous().mT, right, lengths)
    assert torch.equal(twin(left, right, lengths)[0], found[0])
    torch.testing.assert_close(views[1], found[1])


def test_what_is_behind_the_end_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = InteractiveAttention(8, 2, leak="mask")
    left, right = torch.randn(2, 1, 7, 8)
    lengths = torch.tensor([3])
    found = layer(left, right, lengths)
    left[:, 4:], right[:, 4:] = 50.0, -50.0
    again = layer(left, right, lengths)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a[:, :4], b[:, :4])
    short = layer(left[:, :4], right[:, :4], lengths)
    torch.testing.assert_close(short[0], found[0][:, :4])


@pytest.mark.parametrize("interaction", ["mask", "post"])
def test_only_plain_teacher_forcing_sees_the_token_to_be_predicted(interaction: str) -> None:
    torch.manual_seed(0)
    model = BidirectionalSeq2Seq("abcdefgh", width=8, heads=2, interaction=interaction).double()
    source = torch.tensor([[5, 6, 7]])
    text = torch.tensor([[5, 6, 7, 8, 9, 10]])
    leaks = []
    for t in range(6):  # the token at t is changed, and the logits that predict it looked at
        other = text.clone()
        other[0, t] = 12
        for side in range(2):
            logits = []
            for ids in (text, other):
                made = make_bidirectional(ids, start_id=1, end_id=2)
                out = model(source, source > 0, made.left_in, made.right_in, made.lengths)
                logits.append(out[side][0, t if side == 0 else 5 - t])
            leaks.append(not torch.allclose(logits[0], logits[1], atol=1e-12, rtol=0.0))
    # Post: in the second half, where the partner has read it, in both directions.
    assert sum(leaks) == (0 if interaction == "mask" else 6)


def test_visible_states() -> None:
    assert visible(3).tolist() == [[[True, False, False], [True, True, False], [True] * 3]]
    seen = visible(5, torch.tensor([4, 1]), leak="mask")
    assert seen.sum(2).tolist() == [[1, 2, 2, 1, 1], [1, 1, 1, 1, 1]]
    assert seen[..., 0].all()


def test_refuses_arguments() -> None:
    states = torch.zeros(2, 3, 8)
    with pytest.raises(ArgumentError, match=r"`width` must be a multiple of `heads`, 3. Found 8"):
        InteractiveAttention(8, 3)
    with pytest.raises(ArgumentError, match=r"`leak` must be 'post' or 'mask'. Found 'none'"):
        InteractiveAttention(8, 2, leak="none")
    layer = InteractiveAttention(8, 2, leak="mask")
    with pytest.raises(ArgumentError, match=r"`lengths` must be given for leak='mask'"):
        layer(states, states)
    plain = InteractiveAttention(8, 2).eval()
    plain.load_state_dict(layer.state_dict())
    for a, b in zip(layer.eval()(states + 1, states), plain(states + 1, states), strict=True):
        assert torch.equal(a, b)  # in decoding, of unknown length, all states are asked
    with pytest.raises(ArgumentError, match=r"`right` must have the shape of `left`"):
        layer(states, states[:, :2])
    with pytest.raises(ArgumentError, match=r"`lengths` must have shape \[2\]"):
        layer(states, states, torch.tensor([1]))
    with pytest.raises(ArgumentError, match=r"`end_id` must be another token"):
        make_bidirectional(torch.tensor([[4]]), start_id=3)
    with pytest.raises(ArgumentError, match=r"`prompt` must be token ids"):
        make_bidirectional(torch.tensor([4]))
    targets = make_bidirectional(torch.tensor([[4, 5]]))
    with pytest.raises(ArgumentError, match=r"`right` must have shape"):
        bidirectional_cross_entropy(torch.zeros(1, 3, 9), torch.zeros(1, 2, 9), targets)
