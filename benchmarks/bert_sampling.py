"""Steps of Gibbs sampling from a BERT, beside the script that the post shows and its batched form.

Peers: no package does this today. The script draws one chain: it scores the vocabulary at all
places, and draws by ``numpy.random.choice`` from a row of probabilities. Its batched form moves all
chains at once, still scores the vocabulary at all places, and draws by ``torch.multinomial``. The
models have random weights, which cost the same. Before the clock starts, our scores at the masked
places must be the model's own.

Floor: one forward pass of the encoder per step and batch. Ours adds the head at one place of each
text, some passes over its scores in place of the head's product at all places, and random numbers
by address; that is a few per cent of the encoder's time from four layers upwards. What is left of
the ratio to the script is that a batch uses the processor better than one text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Row, compare
from torch import Tensor

from kexue.core.language import masked_scorer
from kexue_bert_sampling import MLMGibbs

__all__ = ["rows"]

_MASK = 103
_LENGTH = 16
_TOKENS = 21128  # of the Chinese BERT that the post samples from


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Smaller models and fewer pairs.
    """
    sizes = [(128, 2, 64, 4)] if quick else [(128, 2, 64, 4), (768, 12, 16, 1)]
    for width, layers, chains, steps in sizes:
        yield from _of_size(width, layers, chains, steps, pairs=5 if quick else 9)


def _of_size(width: int, layers: int, chains: int, steps: int, pairs: int) -> Iterator[Row]:
    model = _bert(width, layers)
    sampler = MLMGibbs(
        num_chains=chains, min_length=_LENGTH, max_length=_LENGTH, warmup=0, mask_id=_MASK
    )
    ours = sampler.begin(model, chains, generator=torch.Generator().manual_seed(0))
    ours.run(2)
    _agree(model, ours.ids)
    case = f"width {width}, {layers} layers, {chains} chains of {_LENGTH}, {steps} steps"
    ids = ours.ids.clone()
    peers: dict[str, Callable[[], object]] = {
        "the post's script, chain by chain": partial(_script, model, ids, steps),
        "all chains at once, all places scored": partial(_batched, model, ids, steps),
    }
    for name, peer in peers.items():
        call = partial(_ours, ours, steps)
        yield compare("Gibbs from a BERT", case, call, peer, peer_name=name, pairs=pairs)


def _bert(width: int, layers: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=_TOKENS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    model: Any = transformers.BertForMaskedLM(config)
    return model.eval()


@torch.no_grad()
def _agree(model: Any, ids: Tensor) -> None:
    places = torch.arange(len(ids))[:, None] % ids.shape[1]
    masked = ids.scatter(1, places, _MASK)
    found = masked_scorer(model, mask_id=_MASK)(masked, None, places)[:, 0]
    wanted = model(masked).logits[torch.arange(len(ids)), places[:, 0]]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _ours(chains: Any, steps: int) -> None:
    chains.run(steps)


@torch.no_grad()
def _script(model: Any, ids: Tensor, steps: int) -> None:
    random = np.random.default_rng(0)
    for text in ids:
        row = text[None].clone()
        for _ in range(steps):
            place = int(random.integers(_LENGTH))
            row[0, place] = _MASK
            law = model(row).logits.softmax(-1)[0, place].double().numpy()
            law[_MASK] = 0
            row[0, place] = int(random.choice(len(law), p=law / law.sum()))


@torch.no_grad()
def _batched(model: Any, ids: Tensor, steps: int) -> None:
    texts, chain = ids.clone(), torch.arange(len(ids))
    for _ in range(steps):
        places = torch.randint(_LENGTH, (len(ids),))
        texts[chain, places] = _MASK
        law = model(texts).logits[chain, places].softmax(-1)
        law[:, _MASK] = 0
        texts[chain, places] = torch.multinomial(law, 1)[:, 0]


if __name__ == "__main__":
    for row in rows(quick="--quick" in sys.argv):
        print(
            f"{row.task:18} {row.case:48} {row.ours_ms:9.1f} ms  {row.peer_ms:9.1f} ms  "
            f"x{row.ratio:6.2f} [{row.low:.2f}, {row.high:.2f}]  {row.peer}"
        )
