"""Nyström attention, against dense matrices, one row and one head at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kexue.core import ArgumentError
from kexue_nystromformer import blocks, nystrom_attention, pseudo_inverse

LENGTHS = (13, 7, 4, 3, 1, 0)


@pytest.fixture(autouse=True, scope="module", params=["blocks", "kernel"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let short sequences be computed in blocks, too, as only long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "blocks":
            patch.setattr(blocks, "_WORTH", 1)
            patch.setattr(blocks, "_BLOCK", 3 * 512)
        yield request.param


def sequences(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(3))
    return q, k, v


def ragged(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def attention_mask(mask: Tensor) -> Tensor:
    return mask[:, None, None, :]


def dense(
    q: Tensor, k: Tensor, v: Tensor, m: int, *, iterations: int = 6, middle: bool = True
) -> Tensor:
    """One sequence of one head, ``[time, feature]``, with all matrices written out."""
    n, d = q.shape
    scores = d**-0.5 * q @ k.T
    if n <= m:
        return torch.softmax(scores, -1) @ v
    cuts = [i * (n // m) + max(0, i - (m - n % m)) for i in range(m + 1)]
    pool = torch.zeros(m, n, dtype=q.dtype)
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        pool[i, start:end] = 1 / (end - start)
    left = (d**-0.5 * q @ (pool @ k).T).softmax(-1)
    centre = (d**-0.5 * (pool @ q) @ (pool @ k).T).softmax(-1)
    right = (d**-0.5 * (pool @ q) @ k.T).softmax(-1)
    inverse = pseudo_inverse(centre, iterations) if middle else torch.eye(m, dtype=q.dtype)
    product: Tensor = left @ inverse @ right @ v
    return product


def dense_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, m: int, **how: Any) -> Tensor:
    out = torch.zeros_like(v)
    for b in range(len(q)):
        real = mask[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            out[b, h, real] = dense(q[b, h, real], k[b, h, real], v[b, h, real], m, **how)
    return out


@pytest.mark.parametrize("num_landmarks", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("how", [{}, {"iterations": 2}, {"iterations": 0}, {"middle": False}])
def test_is_the_product_of_dense_matrices(num_landmarks: int, how: dict[str, Any]) -> None:
    q, k, v = sequences(len(LENGTHS), 2, max(LENGTHS), 3)
    settings_ = {"num_landmarks": num_landmarks, "iterations": how.get("iterations", 6)}
    settings_["middle_matrix"] = how.get("middle", True)
    every = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, **settings_), dense_batch(q, k, v, every, num_landmarks, **how)
    )
    mask = ragged()
    torch.testing.assert_close(
        nystrom_attention(q, k, v, attention_mask(mask), **settings_),
        dense_batch(q, k, v, mask, num_landmarks, **how),
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_masks_of_any_pattern(time: int, num_landmarks: int, data: st.DataObject) -> None:
    rows = st.lists(st.booleans(), min_size=time, max_size=time)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    q, k, v = sequences(len(mask), 2, time, 3, seed=time)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, attention_mask(mask), num_landmarks=num_landmarks),
        dense_batch(q, k, v, mask, num_landmarks),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_landmarks", [13, 64])
def test_is_exact_where_landmarks_cover_the_sequence(
    dtype: torch.dtype, num_landmarks: int
) -> None:
    q, k, v = sequences(6, 4, 13, 8, dtype=dtype)
    mask = ragged()
    found = nystrom_attention(q, k, v, attention_mask(mask), num_landmarks=num_landmarks)
    for b, n in enumerate(LENGTHS):
        wanted = F.scaled_dot_product_attention(
            q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        )
        torch.testing.assert_close(found[b : b + 1, :, :n], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, num_landmarks=num_landmarks),
        F.scaled_dot_product_attention(q, k, v),
    )


def test_a_short_row_beside_a_long_one_is_exact() -> None:
    """The fall-back is decided row by row, also where the batch is longer than the landmarks."""
    q, k, v = sequences(2, 2, 40, 8, dtype=torch.float32)
    mask = ragged((40, 16))
    found = nystrom_attention(q, k, v, attention_mask(mask), num_landmarks=16)
    wanted = F.scaled_dot_product_attention(q[1:, :, :16], k[1:, :, :16], v[1:, :, :16])
    torch.testing.assert_close(found[1:, :, :16], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_padding_is_not_seen_whatever_it_holds(garbage: float) -> None:
    mask = ragged()
    clean = sequences(len(LENGTHS), 2, max(LENGTHS), 3)
    hidden = ~mask[:, None, :, None]
    q, k, v = dirty = [x.masked_fill(hidden, garbage).requires_grad_() for x in clean]
    q_, k_, v_ = clean
    wanted = nystrom_attention(q_, k_, v_, attention_mask(mask), num_landmarks=4)
    found = nystrom_attention(q, k, v, attention_mask(mask), num_landmarks=4)
    assert torch.equal(found, wanted)
    assert not found.masked_select(hidden).any()
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    for x in dirty:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert not x.grad.masked_select(hidden).any()


def test_rows_do_not_see_each_other() -> None:
    q, k, v = sequences(3, 2, 50, 8, dtype=torch.float32)
    q[0] *= 30  # a peaked row, whose norms are far from those of the others
    together = nystrom_attention(q, k, v, num_landmarks=8)
    for b in range(3):
        alone = nystrom_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], num_landmarks=8)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_landmarks", [3, 9])
def test_gradient(masked: bool, num_landmarks: int) -> None:
    inputs = [x.requires_grad_() for x in sequences(2, 1, 7, 2)]
    mask = attention_mask(ragged((7, 4))) if masked else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: nystrom_attention(q, k, v, mask, num_landmarks=num_landmarks), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_finite(dtype: torch.dtype) -> None:
    q, k, v = (2 * x for x in sequences(2, 2, 100, 16, dtype=torch.float32))
    mask = attention_mask(ragged((100, 33)))
    for given_mask in (None, mask):
        exact = nystrom_attention(q, k, v, given_mask, num_landmarks=16)
        a, b, c = half = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        found = nystrom_attention(a, b, c, given_mask, num_landmarks=16)
        assert found.dtype == dtype
        assert float((found.detach().float() - exact).norm() / exact.norm()) < 0.03
        found.float().square().sum().backward()  # type: ignore[no-untyped-call]
        assert all(x.grad is not None and x.grad.isfinite().all() for x in half)


@pytest.mark.parametrize("scale", [None, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_a_segment_may_be_beyond_float16(masked: bool, scale: float | None) -> None:
    q, k, v = sequences(1, 2, 1200, 8, dtype=torch.float32)
    q, k = 1000 + q, k / 100
    mask = torch.ones(1, 1, 1, 1200, dtype=torch.bool) if masked else None
    exact = nystrom_attention(q, k, v, mask, num_landmarks=4, scale=scale)
    q, k, v = q.half(), k.half(), v.half()
    found = nystrom_attention(q, k, v, mask, num_landmarks=4, scale=scale)
    assert found.isfinite().all()
    if scale is None:
        assert float((found.float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_scores_are_finite(dtype: torch.dtype) -> None:
    q, k, v = sequences(2, 2, 60, 8, dtype=torch.float32)
    same = torch.ones_like(q)
    for a, b in ((100 * q, 100 * k), (same, same), (0 * q, 0 * k)):
        found = nystrom_attention(a.to(dtype), b.to(dtype), v.to(dtype), num_landmarks=8)
        assert found.isfinite().all()


def test_equal_positions_give_the_mean() -> None:
    _, _, v = sequences(1, 2, 60, 8)
    same = torch.ones_like(v)
    found = nystrom_attention(same, same, v, num_landmarks=8)
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(v))


def test_without_the_middle_matrix_weights_are_a_distribution() -> None:
    q, k, _ = sequences(1, 2, 30, 8)
    identity = torch.eye(30, dtype=torch.float64).expand(1, 2, 30, 30)
    weights = nystrom_attention(q, k, identity, num_landmarks=4, middle_matrix=False)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 30, dtype=torch.float64))


def test_scale() -> None:
    q, k, v = sequences(1, 2, 30, 8)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, scale=0.7, num_landmarks=4),
        nystrom_attention(q * 0.7 * 8**0.5, k, v, num_landmarks=4),
    )


def test_values_may_have_another_width() -> None:
    q, k, v = sequences(2, 2, 30, 8)
    for width in (1, 3, 20):
        wide = torch.cat([v, v, v], -1)[..., :width]
        found = nystrom_attention(q, k, wide, num_landmarks=4)
        whole = nystrom_attention(q, k, torch.cat([v, v, v], -1), num_landmarks=4)
        torch.testing.assert_close(found, whole[..., :width])


def test_one_mask_serves_all_rows() -> None:
    q, k, v = sequences(3, 2, 20, 4)
    mask = attention_mask(torch.arange(20)[None] < 15)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, mask, num_landmarks=4),
        nystrom_attention(q, k, v, mask.expand(3, -1, -1, -1), num_landmarks=4),
    )


@pytest.mark.parametrize("shape", [(0, 2, 20, 4), (2, 0, 20, 4), (2, 2, 0, 4), (2, 2, 1, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_and_one_position(shape: tuple[int, ...], masked: bool) -> None:
    q, k, v = sequences(*shape)
    mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool) if masked else None
    found = nystrom_attention(q, k, v, mask, num_landmarks=4)
    assert found.shape == shape
    if shape[2] == 1:
        torch.testing.assert_close(found, v)


def test_views_and_meta_tensors() -> None:
    q, k, v = (x.transpose(1, 2) for x in sequences(2, 30, 4, 8))
    wanted = nystrom_attention(q.contiguous(), k.contiguous(), v.contiguous(), num_landmarks=7)
    torch.testing.assert_close(nystrom_attention(q, k, v, num_landmarks=7), wanted)
    a, b, c = (x.to("meta") for x in (q, k, v))
    assert nystrom_attention(a, b, c, num_landmarks=7).shape == wanted.shape


def test_autocast_keeps_the_inverse_in_float32() -> None:
    q, k, v = sequences(2, 2, 100, 16, dtype=torch.float32)
    exact = nystrom_attention(q, k, v, num_landmarks=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nystrom_attention(q, k, v, num_landmarks=16)
    assert float((found.float() - exact).norm() / exact.norm()) < 0.02


def test_compiles_without_graph_breaks() -> None:
    q, k, v = sequences(2, 2, 30, 4)
    mask = attention_mask(ragged((30, 9)))
    torch.compiler.reset()
    compiled: Any = torch.compile(nystrom_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, mask, num_landmarks=4),
        nystrom_attention(q, k, v, mask, num_landmarks=4),
    )


Q, K, V = sequences(2, 3, 5, 4, dtype=torch.float32)
MASK = torch.ones(2, 1, 1, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, K, V), {"is_causal": True}, "`is_causal` of nystrom_attention must be False: landm"),
        ((Q, K, V), {"dropout_p": 0.1}, "`dropout_p` of nystrom_attention must be 0: .* Found 0.1"),
        ((Q, K[:, :, :3], V[:, :, :3]), {}, "`key` .* as many positions as `query`, 5. Found 3; f"),
        ((Q, K[..., :2], V), {}, r"`key` .* the shape of `query`, \[2, 3, 5, 4\]. Found"),
        ((Q, K[0], V), {}, r"`key` .* the shape of `query`, \[2, 3, 5, 4\]. Found \[3, 5, 4\]"),
        ((Q, K, V[:1]), {}, r"`value` .* must have shape .* Found \[1, 3, 5, 4\]"),
        ((Q, K, V.double()), {}, "`value` .* the dtype of `query`, torch.float32. Found torch.fl"),
        ((Q[0], K[0], V[0]), {}, r"`query` .* \[batch, head, time, feature\] .* Found .*\[3, 5, 4"),
        ((Q.int(), K, V), {}, "`query` .* must be floating-point .* Found torch.int32"),
        ((Q[..., :0], K[..., :0], V), {}, "`query` .* at least one feature"),
        ((Q, K, V, MASK.float()), {}, "`attn_mask` .* must be bool, .* Found torch.float32; sco"),
        (
            (Q, K, V, MASK[:, 0, 0]),
            {},
            r"`attn_mask` .* Found \[2, 5\]; `mask\[:, None, None, :\]`",
        ),
        ((Q, K, V, MASK.expand(2, 1, 5, 5)), {}, "`attn_mask` .* the same for all heads and quer"),
        ((Q, K, V, MASK[..., :4]), {}, "`attn_mask` .* must have shape"),
        ((Q, K, V), {"num_landmarks": 0}, "`num_landmarks` .* at least 1. Found 0"),
        ((Q, K, V), {"num_landmarks": 2.5}, "`num_landmarks` .* whole number .* Found 2.5"),
        ((Q, K, V), {"iterations": -1}, "`iterations` .* at least 0. Found -1"),
    ],
)
def test_rejects(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    call: Any = nystrom_attention
    with pytest.raises(ArgumentError, match=message) as caught:
        call(*arguments, **options)
    assert f"`{caught.value.argument}`" in str(caught.value)


@pytest.mark.parametrize("length", [65, 511, 512, 513, 1300])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_give_what_the_fused_kernel_gives(batch: int, length: int) -> None:
    q, k, v = sequences(batch, 3, length, 8)
    q, k = 30 * q, k - 2  # sharp: the greatest score moves from block to block
    every = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    found, wanted = (nystrom_attention(q, k, v, mask) for mask in (None, every))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def check_beside_a_mask(
    q: Tensor, k: Tensor, v: Tensor, *, loose: float, scale: float | None = None
) -> None:
    """Compare with and without gradient; a mask of what is all real takes known operations."""
    every = torch.ones(len(q), 1, 1, q.shape[2], dtype=torch.bool)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        found = nystrom_attention(q, k, v, scale=scale)
    recorded, wanted = (nystrom_attention(q, k, v, mask, scale=scale) for mask in (None, every))
    torch.testing.assert_close(found, wanted, rtol=loose, atol=loose)
    torch.testing.assert_close(recorded, wanted, rtol=loose, atol=loose)
    gradients = [torch.autograd.grad(x.sum(), leaves) for x in (recorded, wanted)]
    norms = [[g.norm() for g in row] for row in gradients]
    torch.testing.assert_close(*norms, rtol=10 * loose, atol=10 * loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [-1000.0, -60.0, 60.0, 1000.0])
@pytest.mark.parametrize("where", [slice(None), slice(300, 310)])
def test_sums_of_exponentials_beyond_every_number_are_those_of_shifted_scores(
    where: slice, score: float, dtype: torch.dtype
) -> None:
    """All scores of some queries, or of all, are near ``score``; the others are near 0."""
    q, k, v = sequences(1, 3, 1100, 8, dtype=dtype)
    q[..., -1], k[..., -1] = 0.0, 1.0
    q[:, :, where, -1] = score
    check_beside_a_mask(q, k, v, loose=1e-9 if dtype == torch.float64 else 2e-3, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beyond", [1.0, 30.0, 1000.0])
def test_a_later_key_may_be_far_above_those_of_the_first_block(
    beyond: float, dtype: torch.dtype
) -> None:
    q, k, v = sequences(2, 3, 1300, 8, dtype=dtype)
    k[:, :, 900:950] *= beyond
    check_beside_a_mask(q, k, v, loose=1e-9 if dtype == torch.float64 else 2e-4)


def test_blocks_leave_values_of_another_width_and_views_alone() -> None:
    joined = sequences(2, 700, 48)[0]
    q, k, v = (
        torch.unflatten(x, 2, (4, -1)).transpose(1, 2) for x in torch.split(joined, [12, 12, 24], 2)
    )
    before = joined.clone()
    alone = torch.cat([nystrom_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(nystrom_attention(q, k, v), alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined, before, rtol=0, atol=0)


@pytest.mark.parametrize("length", [70, 1024, 1300])
def test_gradients_in_blocks_are_those_of_the_fused_kernel(length: int) -> None:
    """A mask of what is all real takes the way of known operations."""
    inputs = list(sequences(2, 3, length, 8))
    inputs[0], inputs[2] = 3 * inputs[0], inputs[2][..., :5]  # sharp, and of another width
    upstream = sequences(2, 3, length, 5, seed=1)[0]
    every = torch.ones(2, 1, 1, length, dtype=torch.bool)
    found = []
    for mask in (None, every):
        leaves = [x.clone().requires_grad_() for x in inputs]
        q, k, v = leaves
        out = nystrom_attention(q, k, v, mask, num_landmarks=64, scale=0.4)
        found.append(torch.autograd.grad(out, leaves, upstream))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_gradients_under_autocast_are_in_the_precision_of_the_attention(way: str) -> None:
    inputs = [x.requires_grad_() for x in sequences(1, 2, 600, 8, dtype=torch.float32)]
    q, k, v = inputs
    out = nystrom_attention(q, k, v).square().sum()
    outside = torch.autograd.grad(out, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, inputs)
    # the gradients of torch's own operations are autocast
    loose = 0.0 if way == "blocks" else 0.05
    torch.testing.assert_close(inside, outside, rtol=loose, atol=loose)


def test_the_gradient_keeps_no_weights() -> None:
    """What is kept grows by queries, keys and values, with the kernel by what it returns, too."""

    def kept(length: int) -> int:
        seen: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            seen[x.data_ptr()] = x.numel()
            return x

        leaves = [x.requires_grad_() for x in sequences(1, 2, length, 4)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            q, k, v = leaves
            nystrom_attention(q, k, v, num_landmarks=16)
        return sum(seen.values())

    assert kept(1200) - kept(600) <= 600 * 2 * 4 * 5  # one matrix of weights alone has 4 more


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_one_sample_at_a_time() -> None:
    q, k, v = sequences(3, 2, 9, 4)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q[None], k[None], v[None], num_landmarks=4).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    q.requires_grad_()
    whole = nystrom_attention(q, k, v, num_landmarks=4).square().sum()
    torch.testing.assert_close(each, torch.autograd.grad(whole, q)[0], rtol=1e-9, atol=1e-9)
