"""The chains: exact laws on texts that can be counted, reproducibility, what never changes."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor, nn

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue.core.errors import WorkError
from kexue.core.language import FunctionMaskedScorer, MaskedScorer
from kexue_bert_sampling import JointScorer, MLMGibbs

SCANS = ["random", "systematic", "permutation"]
TOKENS, LENGTH = 3, 3
MASK = TOKENS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joint(seed: int = 0) -> Tensor:
    """A joint distribution of three places, far from independent."""
    return 1.5 * torch.randn([TOKENS] * LENGTH, generator=seeded(seed), dtype=torch.float64)


def agrees(values: Tensor, law: Tensor) -> bool:
    """Whether draws ``[sample, place]`` pass a χ² test of a law ``[token, ...]``."""
    codes = torch.zeros(len(values), dtype=torch.long)
    for place, size in enumerate(law.shape):
        codes = codes * size + values[:, place]
    counts = codes.bincount(minlength=law.numel())
    inside = law.flatten() > 0
    assert not counts[~inside].any()
    expected = law.flatten()[inside] * len(values)
    return bool(chisquare(counts[inside], expected).pvalue > 1e-3)


class Inconsistent(MaskedScorer):
    """Conditionals that no joint distribution has, of a few tokens; the mask is a token to it."""

    def __init__(self, length: int = LENGTH, tokens: int = TOKENS, seed: int = 1) -> None:
        self.mask_id = tokens
        shape = (length, *[tokens + 1] * length, tokens)
        self.table = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        assert mask is None
        self.calls.append(tuple(positions.shape))
        rows = [self.table[(positions[:, k], *ids.T)] for k in range(positions.shape[1])]
        return torch.stack(rows, 1)


# -- oracles --------------------------------------------------------------------------------------


def kernel(scorer: MaskedScorer, places: tuple[int, ...]) -> Tensor:
    """The transition matrix that draws some places, masked together, one state at a time."""
    states = list(product(range(TOKENS), repeat=LENGTH))
    found = torch.zeros(len(states), len(states), dtype=torch.float64)
    for i, state in enumerate(states):
        ids = torch.tensor([state])
        ids[0, list(places)] = scorer.mask_id
        law = scorer(ids, None, torch.tensor([places]))[0].softmax(-1)
        for tokens in product(range(TOKENS), repeat=len(places)):
            new = list(state)
            probability = 1.0
            for place, token, row in zip(places, tokens, law, strict=True):
                new[place] = token
                probability *= float(row[token])
            found[i, states.index(tuple(new))] += probability
    return found


def uniform_start(num: int) -> Tensor:
    return torch.randint(TOKENS, (num, LENGTH), generator=seeded(9))


def average(kernels: list[Tensor]) -> Tensor:
    return torch.stack(kernels).mean(0)


def after(scan: str, block: int, steps: int, scorer: MaskedScorer) -> Tensor:
    """The exact law after some steps from uniform tokens."""
    law = torch.full((TOKENS**LENGTH,), 1 / TOKENS**LENGTH, dtype=torch.float64)
    if scan == "random":
        subsets = [p for p in product(range(LENGTH), repeat=block) if list(p) == sorted(set(p))]
        one = average([kernel(scorer, places) for places in subsets])
        found: Tensor = law @ torch.linalg.matrix_power(one, steps)
        return found
    groups = -(-LENGTH // block)
    assert steps % groups == 0
    orders = [tuple(range(LENGTH))] if scan == "systematic" else list(permutations(range(LENGTH)))
    sweeps = []
    for order in orders:
        sweep = torch.eye(len(law), dtype=torch.float64)
        for start in range(0, LENGTH, block):
            sweep = sweep @ kernel(scorer, tuple(sorted(order[start : start + block])))
        sweeps.append(sweep)
    swept: Tensor = law @ torch.linalg.matrix_power(average(sweeps), steps // groups)
    return swept


# -- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
def test_true_conditionals_lead_from_any_start_to_the_joint(scan: str) -> None:
    start = torch.tensor([2, 0, 1])
    sampler = MLMGibbs(scan=scan, init=start, num_chains=5000, warmup=60, thin=1)  # type: ignore[arg-type]
    values = sampler.sample(joint(), 5000, generator=seeded()).values
    assert agrees(values, joint().flatten().softmax(0).view_as(joint()))


@pytest.mark.parametrize(("block", "steps"), [(1, 3), (1, 6), (2, 2), (3, 1)])
@pytest.mark.parametrize("scan", SCANS)
def test_has_the_law_of_its_transition_matrix(scan: str, block: int, steps: int) -> None:
    """Also where conditionals have no joint, after few steps, and for several places at once."""
    scorer = Inconsistent()
    num = 20_000
    sampler = MLMGibbs(
        scan=scan,  # type: ignore[arg-type]
        block=block,
        init=uniform_start(num),
        warmup=0,
        thin=steps,
        batch_size=num,
    )
    values = sampler.sample(scorer, num, generator=seeded(4)).values
    assert agrees(values, after(scan, block, steps, scorer).view([TOKENS] * LENGTH))


def test_one_pass_over_masks_draws_the_joint_itself() -> None:
    sampler = MLMGibbs(scan="systematic", num_chains=20_000, warmup=0, thin=LENGTH)
    values = sampler.sample(joint(), 20_000, generator=seeded()).values
    assert agrees(values, joint().flatten().softmax(0).view_as(joint()))


def test_kept_tokens_condition_the_rest() -> None:
    sampler = MLMGibbs(
        init=torch.tensor([MASK, 2, MASK]),
        frozen=torch.tensor([False, True, False]),
        num_chains=10_000,
        warmup=40,
        thin=1,
    )
    values = sampler.sample(joint(), 10_000, generator=seeded()).values
    assert (values[:, 1] == 2).all()
    given = joint()[:, 2]
    assert agrees(values[:, [0, 2]], given.flatten().softmax(0).view_as(given))


def test_the_stationary_law_of_a_learned_model_depends_on_the_scan() -> None:
    """The oracle itself: what the post says of Markov random fields, on exact matrices."""
    true, learned = JointScorer(joint()), Inconsistent()
    apart = {}
    for name, scorer in (("true", true), ("learned", learned)):
        laws = [after(scan, 1, 600, scorer) for scan in ("random", "systematic")]
        apart[name] = float((laws[0] - laws[1]).abs().sum() / 2)
    assert apart["true"] < 1e-9
    assert apart["learned"] > 1e-2


# -- the same chain, whatever is beside it --------------------------------------------------------


def sampled(target: Any, num: int = 40, seed: int = 3, **params: Any) -> Tensor:
    given = {"warmup": 20, "thin": 5, "num_chains": num, **params}
    return MLMGibbs(**given).sample(target, num, generator=seeded(seed)).values


@pytest.mark.parametrize("params", [{}, {"block": 2}, {"scan": "permutation"}])
def test_a_chain_is_the_same_however_many_there_are(params: dict[str, Any]) -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.sin(3.0 * ids.double().cumsum(1)[..., None] + torch.arange(6))

    common = {"mask_id": 5, "min_length": 3, "max_length": 7, **params}
    many, few = sampled(model, 40, **common), sampled(model, 7, **common)
    width = few.shape[1]
    assert torch.equal(many[:7, :width], few)
    assert (many[:7, width:] == PAD).all()
    assert torch.equal(sampled(model, 40, batch_size=3, **common), many)


def test_a_text_with_fewer_free_tokens_than_a_block_is_drawn_as_if_alone() -> None:
    init = torch.tensor([[1, 1, 1], [1, PAD, PAD]])

    def drawn(block: int) -> Tensor:
        sampler = MLMGibbs(scan="systematic", block=block, init=init, warmup=0, thin=1, mask_id=50)
        flat = sampler.sample(lambda ids: torch.zeros(*ids.shape, 50), 20, generator=seeded())
        assert flat.chains is not None
        return flat.chains[1, :, 0]

    assert torch.equal(drawn(3), drawn(1))


def test_chains_may_begin_in_several_calls() -> None:
    sampler = MLMGibbs(num_chains=4, warmup=7, thin=2)
    whole = MLMGibbs(num_chains=8, warmup=7, thin=2).sample(joint(), 8, generator=seeded()).values
    late = sampler.begin(joint(), 4, generator=seeded(), first=4)
    assert torch.equal(next(sampler.draw(late, 1)), whole[4:])


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    assert torch.equal(sampled(joint()), sampled(joint()))
    assert not torch.equal(sampled(joint()), sampled(joint(), seed=4))


def test_draws_come_as_they_are_drawn() -> None:
    sampler = MLMGibbs(num_chains=3, warmup=5, thin=2)
    found = sampler.sample(joint(), 7, generator=seeded())
    assert found.values.shape == (7, LENGTH)
    assert found.chains is not None
    assert found.chains.shape == (3, 3, LENGTH)
    steps: list[int] = []
    chains = sampler.begin(joint(), 7, generator=seeded())
    streamed = list(sampler.draw(chains, 3, on_steps=steps.append))
    assert torch.equal(torch.cat(streamed)[:7], found.values)
    assert sum(steps) == chains.steps == found.diagnostics["steps"] == 5 + 3 * 2


# -- tokens that never come, or never go ----------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    scan=st.sampled_from(SCANS),
    block=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    around=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_draws_only_what_it_may(
    scan: Any, block: int, lengths: list[int], seed: int, around: tuple[int, int]
) -> None:
    tokens = 8
    seen: list[Tensor] = []

    def model(ids: Tensor) -> Tensor:
        seen.append(ids)
        return torch.zeros(*ids.shape, tokens)

    init = torch.full((len(lengths), 6), PAD)
    for row, length in enumerate(lengths):
        init[row, :length] = torch.randint(tokens, (length,), generator=seeded(seed + row))
    frozen = (torch.rand(6, generator=seeded(seed)) < 0.4) & (init != 7).all(0)
    sampler = MLMGibbs(
        scan=scan, block=block, init=init, frozen=frozen, forbidden=[0, 3], mask_id=7, warmup=0,
        thin=2, prefix=[5] * around[0], suffix=[6] * around[1],
    )  # fmt: skip
    chains = sampler.sample(model, 2 * len(init), generator=seeded(seed)).chains
    assert chains is not None
    assert torch.equal(chains == PAD, (init == PAD)[:, None].expand_as(chains))
    kept = frozen & (init != PAD)
    assert (chains == init[:, None])[kept[:, None].expand_as(chains)].all()
    assert not (chains == 7).any()
    changed = chains != init[:, None]
    assert not torch.isin(chains[changed], torch.tensor([0, 3])).any()
    for ids in seen:  # what stands around a text is there, and no padding
        assert (ids[:, : around[0]] == 5).all()
        assert (ids[:, ids.shape[1] - around[1] :] == 6).all()
        assert (ids >= 0).all()


def test_masks_that_no_step_has_reached_are_drawn_before_the_first_draw() -> None:
    init = torch.full((50, 12), 2)
    sampler = MLMGibbs(init=init, warmup=1, thin=1, mask_id=2)
    values = sampler.sample(lambda ids: torch.zeros(*ids.shape, 2), 50, generator=seeded()).values
    assert not (values == 2).any()
    assert 0.3 < float(values.double().mean()) < 0.7


def test_lengths_are_equally_likely() -> None:
    values = sampled(lambda ids: torch.zeros(*ids.shape, 4), 3000, mask_id=3, min_length=2,
                     max_length=5, warmup=0, thin=1, batch_size=3000)  # fmt: skip
    counts = (values != PAD).sum(1).bincount(minlength=6)[2:]
    assert int(counts.sum()) == 3000
    assert chisquare(counts).pvalue > 1e-3


# -- how tokens are drawn -------------------------------------------------------------------------


def test_temperature_zero_takes_the_best_token_and_top_k_one_of_the_best() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, 1.0, -1.0])

    def model(ids: Tensor) -> Tensor:
        return logits.expand(*ids.shape, -1)

    common: dict[str, Any] = {"mask_id": 4, "min_length": 5, "max_length": 5}
    assert (sampled(model, temperature=0.0, **common) == 1).all()
    assert set(sampled(model, top_k=2, **common).flatten().tolist()) == {1, 2}
    assert set(sampled(model, top_p=0.5, **common).flatten().tolist()) == {1, 2}
    hot = sampled(model, 400, temperature=2.0, **common).flatten()
    law = (logits[:4] / 2).softmax(0)
    assert chisquare(hot.bincount(minlength=4), law * len(hot)).pvalue > 1e-3


def test_annealing_falls_to_the_temperature() -> None:
    sampler = MLMGibbs(temperature=0.5, start_temperature=2.5, warmup=4, num_chains=1)
    chains = sampler.begin(joint(), 1, generator=seeded())
    assert [chains.rule.temperature_at(step) for step in range(6)] == [2.5, 2.0, 1.5, 1.0, 0.5, 0.5]


def test_statistics_are_of_the_model_and_of_what_follows_the_warm_up() -> None:
    logits = torch.tensor([1.0, 0.0, 5.0])

    def model(ids: Tensor) -> Tensor:
        return logits.expand(*ids.shape, -1)

    sampler = MLMGibbs(temperature=0.0, mask_id=2, min_length=4, max_length=4, num_chains=2)
    found = sampler.sample(model, 2, generator=seeded()).diagnostics
    assert found["token_log_prob"] == pytest.approx(float(logits[:2].log_softmax(0)[0]))
    assert found["changed"] == 0  # it had changed before
    assert found["distinct"] == 0.5


def test_asks_for_the_masked_places_alone() -> None:
    scorer = Inconsistent(length=5)
    MLMGibbs(init=torch.zeros(6, 5, dtype=torch.long), block=2, warmup=3, thin=1).sample(scorer, 6)
    assert scorer.calls == [(6, 2)] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_takes_scores_of_every_type(dtype: torch.dtype) -> None:
    scorer = Inconsistent()
    scorer.table = scorer.table.to(dtype)
    found = MLMGibbs(init=uniform_start(20), warmup=5).sample(scorer, 20, generator=seeded())
    assert math.isfinite(found.diagnostics["token_log_prob"])


# -- edges ----------------------------------------------------------------------------------------


def test_texts_without_free_tokens_stay() -> None:
    init = torch.tensor([[1, 2, PAD], [0, PAD, PAD], [PAD, PAD, PAD]])
    sampler = MLMGibbs(init=init, frozen=torch.tensor([True, True, True]), mask_id=3)

    def model(ids: Tensor) -> Tensor:
        raise AssertionError("there is nothing to ask")

    assert torch.equal(sampler.sample(model, 3).values, init)
    empty = MLMGibbs(min_length=0, max_length=0, mask_id=3, num_chains=2).sample(model, 2)
    assert empty.values.shape == (2, 0)


def test_no_draws_and_views_and_copies() -> None:
    assert MLMGibbs().sample(joint(), 0).values.shape == (0, LENGTH)
    wide = torch.stack([uniform_start(4)] * 2, -1)
    view = MLMGibbs(init=wide[..., 0], warmup=3).sample(joint(), 4, generator=seeded()).values
    plain = MLMGibbs(init=uniform_start(4), warmup=3)
    assert torch.equal(view, plain.sample(joint(), 4, generator=seeded()).values)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):  # noqa: S301
        assert torch.equal(view, twin.sample(joint(), 4, generator=seeded()).values)


def test_leaves_the_model_and_its_mode_alone() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.dropout = nn.Dropout(0.5)

        def forward(self, ids: Tensor) -> Tensor:
            hidden: Tensor = self.dropout(self.embedding(ids))
            return hidden

    torch.manual_seed(0)
    model = Dropping().train()
    model.dropout.eval()
    sampler = MLMGibbs(mask_id=4, min_length=6, max_length=6, num_chains=5, warmup=10)
    off = sampler.sample(model, 5, generator=seeded()).values
    model.dropout.train()
    assert torch.equal(sampler.sample(model, 5, generator=seeded()).values, off)
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize(
    ("params", "argument"),
    [
        ({"scan": "sideways"}, "scan"),
        ({"block": 0}, "block"),
        ({"warmup": -1}, "warmup"),
        ({"thin": True}, "thin"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"start_temperature": 0.5}, "start_temperature"),
        ({"forbidden": [-1]}, "forbidden"),
        ({"forbidden": [7]}, "forbidden"),
        ({"min_length": 4, "max_length": 3}, "min_length"),
        ({"max_length": 4}, "max_length"),
        ({"init": torch.zeros(2, 3)}, "init"),
        ({"init": torch.zeros(2, 3).long(), "num_chains": 3}, "init"),
        ({"init": torch.tensor([PAD, 1, 1])}, "init"),
        ({"init": torch.zeros(4).long()}, "init"),
        ({"init": torch.zeros(3).long(), "max_length": 3}, "max_length"),
        ({"frozen": torch.ones(3).bool()}, "frozen"),
        ({"init": torch.zeros(3).long(), "frozen": torch.ones(2).bool()}, "frozen"),
        ({"init": torch.tensor([3, 1, 1]), "frozen": torch.ones(3).bool()}, "frozen"),
    ],
)
def test_says_which_argument_is_wrong(params: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`") as caught:
        MLMGibbs(**params).sample(joint(), 2)
    assert caught.value.argument == argument


def test_says_what_is_wrong_with_a_model() -> None:
    def flat(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 2)

    with pytest.raises(ArgumentError, match="`num_samples`"):
        MLMGibbs().sample(joint(), -1)
    with pytest.raises(ArgumentError, match="`mask_id`"):
        MLMGibbs().sample(flat, 1)
    with pytest.raises(ArgumentError, match=r"`target` of MLMGibbs must score"):
        MLMGibbs().sample(_Wrong(), 1)
    for bad in (torch.zeros(2, 2).long(), torch.tensor([math.nan, 1.0]), torch.zeros(0)):
        with pytest.raises(ArgumentError, match="`target`"):
            MLMGibbs().sample(bad, 1)


class _Wrong(MaskedScorer):
    mask_id = 1

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        del mask, positions
        return torch.zeros(*ids.shape, 2)


def test_scores_without_a_token_are_refused_by_step_and_chain() -> None:
    def breaks(value: float) -> FunctionMaskedScorer:
        calls = []

        def model(ids: Tensor) -> Tensor:
            calls.append(ids)
            logits = torch.zeros(*ids.shape, 3)
            if len(calls) == 6:
                logits[1] = value
            return logits

        return FunctionMaskedScorer(model, mask_id=2)

    sampler = MLMGibbs(num_chains=3, min_length=4, max_length=4, warmup=20)
    for value, found in ((math.nan, "NaN"), (-math.inf, "no token"), (math.inf, "NaN")):
        with pytest.raises(WorkError, match=f"Found {found}.* in step 5 of chain 1"):
            sampler.sample(breaks(value), 3)


# -- the joint as a scorer ------------------------------------------------------------------------


def test_a_joint_scores_by_summing_out_the_masks() -> None:
    table = torch.tensor([[0.1, 0.4, 0.0], [0.3, 0.15, 0.05]], dtype=torch.float64)
    scorer = JointScorer(table.log())
    mask = scorer.mask_id
    ids = torch.tensor([[mask, 1], [mask, mask], [1, mask]])
    first = scorer(ids[:2], None, torch.zeros(2, 1, dtype=torch.long)).softmax(-1)[:, 0]
    torch.testing.assert_close(first[0, :2], table[:, 1] / table[:, 1].sum())
    torch.testing.assert_close(first[1, :2], table.sum(1))
    assert first[:, 2].tolist() == [0, 0]  # the first place has two tokens
    second = scorer(ids[2:], None, torch.ones(1, 1, dtype=torch.long)).softmax(-1)[0, 0]
    torch.testing.assert_close(second, table[1] / table[1].sum())
    with pytest.raises(ArgumentError, match="`ids`"):
        scorer(ids[:, :1], None, torch.zeros(3, 1, dtype=torch.long))
