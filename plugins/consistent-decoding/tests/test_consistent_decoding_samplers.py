"""Candidates, draws, and texts of the samplers; parity with transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue.core import ArgumentError
from kexue_consistent_decoding import (
    Ancestral,
    ConsistentNucleus,
    ConsistentTopK,
    consistent,
    non_termination_ratio,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best(scores: list[float], k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda v: -scores[v])[:k])


def nucleus(scores: list[float], p: float) -> set[int]:
    """The smallest set whose probability is at least p, by trying all."""
    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    for size in range(1, len(scores) + 1):
        sets = itertools.combinations(range(len(scores)), size)
        reached = [s for s in sets if sum(probabilities[v] for v in s) >= p]
        if reached:
            return set(max(reached, key=lambda s: sum(probabilities[v] for v in s)))
    return set(range(len(scores)))


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(-40, 40), min_size=3, max_size=7, unique=True),
    k=st.integers(1, 8),
    p=st.sampled_from([0.1, 0.31, 0.77, 0.97]),
    data=st.data(),
)
def test_candidates_are_the_best_and_the_ends(
    scores: list[int], k: int, p: float, data: st.DataObject
) -> None:
    values = [s / 10 for s in scores]
    tokens = range(len(values))
    ends = data.draw(st.sets(st.sampled_from(tokens), min_size=1, max_size=len(values) - 1))
    logits = torch.tensor([values], dtype=torch.float64)
    index = sorted(ends)
    for found, wanted in (
        (ConsistentTopK(k, eos_id=index).candidates(logits), best(values, k) | ends),
        (ConsistentNucleus(p, eos_id=index).candidates(logits), nucleus(values, p) | ends),
        (Ancestral(top_k=k).candidates(logits), best(values, k)),
        (Ancestral(top_p=p).candidates(logits), nucleus(values, p)),
    ):
        assert {v for v in tokens if float(found[0, v]) > -torch.inf} == wanted
        for v in wanted:
            assert float(found[0, v]) == float(logits[0, v])


def test_rows_and_views_do_not_see_each_other() -> None:
    logits = torch.randn(5, 2, 6, generator=seeded())[:, 1]
    together = consistent(logits, [0, 5], top_k=2, temperature=0.7)
    for row in range(5):
        alone = consistent(logits[row : row + 1].contiguous(), [0, 5], top_k=2, temperature=0.7)
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[:, 0], logits[:, 0] / 0.7)


def test_nothing_is_truncated_at_the_limits() -> None:
    logits = torch.randn(2, 4, generator=seeded())
    for sampler in (ConsistentTopK(4, eos_id=0), ConsistentTopK(99, eos_id=0)):
        assert torch.equal(sampler.candidates(logits), logits)
    assert torch.equal(ConsistentNucleus(1.0, eos_id=0).candidates(logits), logits)


def test_a_forbidden_end_stays_forbidden() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf]])
    assert consistent(logits, 2, top_k=1).tolist() == [[2.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 100, generator=seeded()).to(dtype)
    drawn = ConsistentNucleus(0.5, eos_id=99)(logits, seeded(1))
    assert drawn.shape == (8,)
    assert ConsistentTopK(3, eos_id=99).candidates(logits).isfinite().sum(1).le(4).all()


def test_draws_are_as_frequent_as_renormalised() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    drawn = ConsistentTopK(2, eos_id=3).sample(scores, 40_000, generator=seeded())
    wanted = torch.tensor([3.0, 2.0, -torch.inf, 0.0]).softmax(0)
    found = drawn.values.bincount(minlength=4) / 40_000
    assert float((found - wanted).abs().max()) < 0.01
    assert drawn.diagnostics["candidates"] == 3
    share = scores.softmax(0)[[0, 1, 3]].sum()
    assert drawn.diagnostics["probability"] == pytest.approx(float(share))


# -- texts -----------------------------------------------------------------------------------------


def reluctant(ids: Tensor) -> Tensor:
    """A model of four tokens for which the end, 0, is always the worst, at 1 in 20 or so."""
    scores = torch.tensor([[0.0, 1.0, 2.0, 1.5]] * 4)
    return scores[ids[:, -1]]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_truncated_never_ends_and_what_is_consistent_does(seed: int) -> None:
    prompt = torch.ones(50, 1, dtype=torch.long)
    given: dict[str, Any] = {"max_new_tokens": 400}
    for plain, kept in (
        (Ancestral(top_k=2, eos_id=0), ConsistentTopK(2, eos_id=0)),
        (Ancestral(top_p=0.6, eos_id=0), ConsistentNucleus(0.6, eos_id=0)),
    ):
        lost = plain.generate(reluctant, prompt, generator=seeded(seed), **given)
        found = kept.generate(reluctant, prompt, generator=seeded(seed), **given)
        assert non_termination_ratio(lost) == 1
        assert non_termination_ratio(found) == 0
        assert all(text[-1] == 0 and 0 not in text[:-1] for text in found.tolist())


def test_a_row_alone_and_padded_is_as_in_a_batch() -> None:
    prompt = torch.tensor([[1, 2, 3], [3, 0, 0], [2, 1, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    sampler = ConsistentNucleus(0.7, eos_id=0)
    together = sampler.generate(
        reluctant, prompt, mask=mask, num_samples=2, generator=[seeded(i) for i in range(6)]
    ).tolist()
    for row in range(3):
        alone = sampler.generate(
            reluctant,
            prompt[row : row + 1, : int(mask[row].sum())],
            num_samples=2,
            generator=[seeded(2 * row), seeded(2 * row + 1)],
        )
        assert alone.tolist() == together[2 * row : 2 * row + 2]


def test_the_same_seed_is_the_same_text() -> None:
    prompt = torch.ones(3, 1, dtype=torch.long)
    texts = [
        Ancestral(eos_id=0).generate(reluctant, prompt, generator=seeded(s)).tolist()
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_models_own_end_is_taken() -> None:
    from kexue.core.language import FunctionScorer

    scorer = FunctionScorer(reluctant, eos_id=2)
    found = ConsistentTopK(1).generate(scorer, torch.tensor([[1]]), generator=seeded())
    assert found.tolist() == [[2]]
    other = ConsistentTopK(1, eos_id=[0, 3]).generate(
        scorer, torch.tensor([[1]]), generator=seeded(), max_new_tokens=300
    )
    assert other.tolist()[0][-1] in {0, 3}


# -- transformers ----------------------------------------------------------------------------------


def test_matches_transformers_warpers_where_the_end_is_inside() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 12, generator=seeded())
    logits[:, 5] = 4  # the end is among the best anyway
    ids = torch.zeros(20, 1, dtype=torch.long)
    for ours, theirs in (
        (ConsistentTopK(3, eos_id=5), process.TopKLogitsWarper(3)),
        (ConsistentNucleus(0.8, eos_id=5), process.TopPLogitsWarper(0.8)),
    ):
        assert torch.equal(ours.candidates(logits), theirs(ids, logits))


def test_a_processor_keeps_the_end_in_transformers_generate() -> None:
    transformers = pytest.importorskip("transformers")
    from kexue_consistent_decoding import CandidatesLogitsProcessor

    model = tiny_gpt2(transformers)
    ids = torch.tensor([[1, 2, 3]] * 8)
    given = {"do_sample": True, "max_new_tokens": 50, "pad_token_id": 0, "temperature": 1.0}
    plain = model.generate(ids, top_k=2, **given)
    assert not bool((plain[:, 3:] == 0).any())
    processor = CandidatesLogitsProcessor(ConsistentTopK(2, eos_id=0))
    torch.manual_seed(0)
    kept = model.generate(ids, top_k=0, logits_processor=[processor], **given)
    assert bool((kept == 0).any(1).all())
    with pytest.raises(ArgumentError, match="`sampler`"):
        CandidatesLogitsProcessor(3)  # type: ignore[arg-type]


def tiny_gpt2(transformers: Any) -> Any:
    """A model of 13 tokens whose end, 0, is never among its two best, but not improbable."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=128, n_embd=16, n_layer=1, n_head=2,
        eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits[..., 0] = out.logits[..., 1:].topk(3, -1).values[..., 2] - 1e-3
        return out

    forward.__signature__ = __import__("inspect").signature(inner)  # type: ignore[attr-defined]
    model.forward = forward
    return model


ONE = torch.ones(1, 1, dtype=torch.long)

# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ConsistentTopK(0, eos_id=1), "k"),
        (lambda: ConsistentTopK(2.5, eos_id=1), "k"),  # type: ignore[arg-type]
        (lambda: ConsistentTopK(2, eos_id=-1), "eos_id"),
        (lambda: ConsistentTopK(2, eos_id=1, temperature=0), "temperature"),
        (lambda: ConsistentNucleus(0, eos_id=1), "p"),
        (lambda: ConsistentNucleus(1.2, eos_id=1), "p"),
        (lambda: Ancestral(top_p=0), "top_p"),
        (lambda: Ancestral(top_k=-1), "top_k"),
        (lambda: ConsistentTopK(2)(torch.zeros(1, 3)), "eos_id"),
        (lambda: ConsistentTopK(2, eos_id=3)(torch.zeros(1, 3)), "eos_id"),
        (lambda: Ancestral().sample(torch.zeros(2, 3), 1), "target"),
        (lambda: ConsistentTopK(2).generate(reluctant, ONE), "eos_id"),
        (lambda: Ancestral().generate(reluctant, ONE, num_samples=0), "num_samples"),
        (lambda: Ancestral().generate(reluctant, torch.ones(1, 0).long()), "prompt"),
    ],
)  # fmt: skip
def test_rejects(make: Any, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument
    assert f"`{argument}`" in str(caught.value)


def test_repr() -> None:
    assert repr(ConsistentTopK(3, eos_id=1)) == "ConsistentTopK(eos_id=(1,), temperature=1.0, k=3)"
