"""Search from both ends beside the post's, which reads every prefix of every pair anew.

Peer: the search of the post's script, written plainly in torch: at every step the k² pairs of
prefixes, all of their tokens, go through both decoders in one batch, with the source. The model is
the plugin's, with random weights; marks are made unlikely, so that all 64 steps are taken. Texts
and scores are compared before the clock starts.

Floor: per step 2k hypotheses pass a decoder cell, and k² pairs their attention and the output. The
pairs' output layer is the largest product, 4 k² · width · vocabulary operations a step for both
sides: at k = 3, 64 steps, width 96 and 2000 tokens 0.44 GFLOP in all, some 20 ms on one core, which
no cache can save. Both sides are computed by one operation each, some hundred small ones a step; at
k = 1 and of a small vocabulary they are all that it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from harness import Row, compare
from torch import Tensor

from kexue_bidirectional_decoding import BidirectionalSeq2Seq, bidirectional_beam_search

__all__ = ["rows"]

STEPS = 64


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Fewer pairs, and the post's beam only.
    """
    for beam in (3,) if quick else (1, 3, 8):
        for vocabulary in (100, 2000):
            yield _search(beam, vocabulary, pairs=5 if quick else 15)


def _model(vocabulary: int) -> BidirectionalSeq2Seq:
    torch.manual_seed(0)
    alphabet = "".join(chr(0x4E00 + i) for i in range(vocabulary - 5))
    model = BidirectionalSeq2Seq(alphabet, width=96, heads=8, interaction="post").eval()
    with torch.no_grad():
        model.output.weight.mul_(5.0)  # so that hypotheses differ
        model.output.bias[[model.start_id, model.end_id]] = -100.0
    return model


def _search(beam: int, vocabulary: int, *, pairs: int) -> Row:
    model = _model(vocabulary)
    source = torch.randint(5, vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))

    def ours() -> tuple[list[int], float]:
        found = bidirectional_beam_search(model, source, width=beam, max_new_tokens=STEPS)
        return found.tolist()[0], float(found.scores[0])

    def theirs() -> tuple[list[int], float]:
        return _plain(model, source, beam)

    (text, score), (other, their_score) = ours(), theirs()
    if text != other or not math.isclose(score, their_score, rel_tol=1e-4):
        raise AssertionError
    case = f"beam {beam}, {STEPS} steps, {vocabulary} tokens"
    name = "all pairs of prefixes anew"
    return compare("search from both ends", case, ours, theirs, peer_name=name, pairs=pairs)


@torch.no_grad()
def _plain(model: BidirectionalSeq2Seq, source: Tensor, beam: int) -> tuple[list[int], float]:
    """The post's search for texts that do not end."""
    sides = [torch.tensor([[mark]]) for mark in (model.start_id, model.end_id)]
    scores = [torch.zeros(1), torch.zeros(1)]
    sources = source.expand(beam**2, -1)
    mask = torch.ones_like(sources, dtype=torch.bool)
    for _ in range(STEPS):
        k = len(sides[0])
        each = torch.cartesian_prod(torch.arange(k), torch.arange(k))
        logits = model(sources[: k * k], mask[: k * k], sides[0][each[:, 0]], sides[1][each[:, 1]])
        for i, axis in ((0, 1), (1, 0)):
            probable = logits[i][:, -1].softmax(-1).view(k, k, -1).mean(axis)
            probable[:, (model.start_id, model.end_id)[i]] = 0.0
            total = scores[i][:, None] + probable.log()
            scores[i], flat = total.flatten().topk(beam)
            parents, tokens = flat // total.shape[1], flat % total.shape[1]
            sides[i] = torch.cat([sides[i][parents], tokens[:, None]], 1)
    left, right = float(scores[0][0]), float(scores[1][0])
    if left >= right:
        return sides[0][0, 1:].tolist(), left
    return sides[1][0, 1:].flip(0).tolist(), right
