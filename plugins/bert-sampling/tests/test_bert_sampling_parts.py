"""Random numbers, scans, and measures of quality."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest  # type: ignore[import-untyped]

from kexue.core import ArgumentError
from kexue_bert_sampling import Trigrams, overlap, self_bleu
from kexue_bert_sampling.chains import draw_at
from kexue_bert_sampling.randomness import Randomness, philox
from kexue_bert_sampling.scans import SCANS, Scan, choose

CPU = torch.device("cpu")


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # known answers of Random123
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_is_that_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], wanted: str
) -> None:
    found = philox(words(*counter), key)  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in found) == wanted


def test_numbers_are_uniform_and_know_nothing_of_each_other() -> None:
    source = Randomness((1, 2), CPU)
    step, chain = torch.arange(200)[:, None], torch.arange(200)
    found = source.uniform(0, step, chain, torch.zeros_like(chain))
    assert found.dtype == torch.float64
    assert kstest(found.flatten().numpy(), "uniform").pvalue > 1e-3
    moved = source.uniform(1, step, chain, torch.zeros_like(chain))
    for other in (found.roll(1, 0), found.roll(1, 1), found.T, moved):
        correlation = torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / 200


def test_a_token_is_drawn_at_its_share_of_the_uniform_numbers() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert draw_at(logits.expand(6, -1), uniform).tolist() == [0, 0, 2, 2, 3, 3]
    impossible_end = torch.tensor([[0.0, -math.inf]]).expand(1, -1)
    assert draw_at(impossible_end, uniform[-1:]).tolist() == [0]


def test_systematic_and_permuted_sweeps_visit_every_place_once() -> None:
    counts = torch.tensor([5, 3, 1, 0])
    scans: list[Scan] = ["systematic", "permutation"]
    for scan in scans:
        for block in (1, 2):
            slots, exists = choose(scan, counts, block, range(60), Randomness((0, 0), CPU))
            orders = set()
            for chain, count in enumerate(counts.tolist()):
                sweep = max(1, -(-count // block))
                for start in range(0, 60, sweep):
                    here = slots[start : start + sweep, chain]
                    seen = here[exists[start : start + sweep, chain]].tolist()
                    if start + sweep <= 60:
                        assert sorted(seen) == list(range(count))
                    orders.add((count, tuple(seen)))
            several = sum(count == 3 and len(order) == 3 for count, order in orders)
            assert several == 1 if scan == "systematic" else several > 1


def test_scans_do_not_depend_on_where_they_were_cut() -> None:
    counts, source = torch.tensor([4, 7]), Randomness((3, 4), CPU)
    for scan in SCANS:
        for block in (1, 3):
            whole = choose(scan, counts, block, range(30), source)[0]
            parts = [
                choose(scan, counts, block, some, source)[0]
                for some in (range(11), range(11, 12), range(12, 30))
            ]
            assert torch.equal(torch.cat(parts), whole)


def test_random_blocks_are_subsets_that_are_equally_likely() -> None:
    slots, exists = choose("random", torch.tensor([4]), 2, range(6000), Randomness((5, 6), CPU))
    assert exists.all()
    pairs = Counter(tuple(sorted(row)) for row in slots[:, 0].tolist())
    assert len(pairs) == 6
    assert all(len(set(pair)) == 2 for pair in pairs)
    assert chisquare(list(pairs.values())).pvalue > 1e-3


# -- quality --------------------------------------------------------------------------------------


def test_trigrams_sum_to_one_and_know_their_text() -> None:
    model = Trigrams(["abcabc", "abd", "科学空间"])
    alphabet = "abcd科学空间"
    for context in ("", "a", "ab", "zz", "科学"):
        known = [math.exp(model.log_prob(context + c) - model.log_prob(context)) for c in alphabet]
        unseen = math.exp(model.log_prob(context + "?") - model.log_prob(context))
        assert math.fsum(known) + unseen == pytest.approx(1.0)
    # by hand: 13 characters, 8 different; ab is followed by c twice and d once, b by c and d
    third = 0.1 * (2 + 1) / (13 + 9) + 0.3 * 2 / 3 + 0.6 * 2 / 3
    assert math.exp(model.log_prob("abc") - model.log_prob("ab")) == pytest.approx(third)
    assert model.perplexity(["abcabc"]) < model.perplexity(["cbacba"])
    assert math.isnan(model.perplexity([]))
    with pytest.raises(ArgumentError, match="`texts`"):
        Trigrams([""])


def test_overlap_counts_copied_n_grams() -> None:
    assert overlap(["abcd"], ["xabcx"], 3) == 0.5
    assert overlap(["科学空间"], ["科学空间"], 2) == 1
    assert math.isnan(overlap(["ab"], ["ab"], 3))


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["abcd", "abcd", "abcd"]) == pytest.approx(1.0)
    assert self_bleu(["abcd", "efgh"]) == 0
    assert math.isnan(self_bleu(["abcd"]))
    # "aab": 2 of 3 characters and 1 of 2 pairs are in "abab", which is longer by one
    first = math.sqrt(3 / 3 * 1 / 2) * math.exp(1 - 4 / 3)
    second = math.sqrt(3 / 4 * 1 / 3)
    assert self_bleu(["aab", "abab"], 2) == pytest.approx((first + second) / 2)
