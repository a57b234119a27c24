"""The self-terminating head, consistent sampling, and the searches beside their peers.

Peers of the head at a vocabulary of 50 000: log-softmax alone, which is less work, and the form of
the paper's code, which concatenates over the vocabulary twice. Of consistent top-k and nucleus
sampling: the same truncation without the end kept. Of the searches: transformers' ``generate`` on a
GPT-2 of two layers that is built from a configuration, with its cache; tokens are compared first.

Floor of the head: log-softmax reads the logits and writes the result, a row at a time from the
cache; keeping the end's column out costs a copy before, and the product a pass behind, both over
the vocabulary: about one and a half times log-softmax, and half of what two concatenations cost.
Floor of a search: the model itself, most of a step on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, compare
from torch import Tensor

from kexue.core.language import truncate
from kexue_consistent_decoding import Beam, Greedy, SelfTerminatingLayer, consistent

__all__ = ["rows"]

TOKENS = 50_000
END = 50


def rows(*, quick: bool = False) -> Iterator[Row]:
    """Yield the rows of this benchmark.

    Args:
        quick: Fewer sizes and pairs.
    """
    pairs = 7 if quick else 15
    for count in (16,) if quick else (1, 16, 128):
        yield from _heads(count, pairs)
        yield from _samplers(count, pairs)
    yield from _searches(pairs, 40 if quick else 100)


def _heads(count: int, pairs: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 1, TOKENS, generator=generator)
    layer = SelfTerminatingLayer(END, epsilon=1e-3)
    torch.testing.assert_close(layer(logits), _two_concatenations(logits), rtol=1e-4, atol=1e-4)
    case = f"{count} x {TOKENS}"
    for name, peer in (
        ("log_softmax (less work)", partial(torch.log_softmax, logits, -1)),
        ("two concatenations", partial(_two_concatenations, logits)),
    ):
        yield compare(
            "self-terminating head", case, partial(layer, logits), peer,
            peer_name=name, pairs=pairs,
        )  # fmt: skip
    free = logits.clone().requires_grad_()
    yield compare(
        "self-terminating head, gradient", case, partial(_with_gradient, layer, free),
        partial(_with_gradient, _two_concatenations, free), peer_name="two concatenations",
        pairs=pairs,
    )  # fmt: skip


def _two_concatenations(logits: Tensor) -> Tensor:
    """The paper's layer, written as it is said: probabilities, parts of the vocabulary joined."""
    z = logits[..., END]
    others = torch.cat([logits[..., :END], logits[..., END + 1 :]], -1)
    log_continue = ((1 - 1e-3) * torch.sigmoid(z)).cumprod(1)
    others = others.softmax(-1) * log_continue[..., None]
    end = (1 - log_continue)[..., None]
    return torch.cat([others[..., :END], end, others[..., END:]], -1).log()


def _with_gradient(head: Any, logits: Tensor) -> None:
    logits.grad = None
    head(logits)[..., 7].sum().backward()


def _samplers(count: int, pairs: int) -> Iterator[Row]:
    logits = torch.randn(count, TOKENS, generator=torch.Generator().manual_seed(1))
    for what, given in (("top-k", {"top_k": 50}), ("nucleus", {"top_p": 0.9})):
        settings: dict[str, Any] = given
        yield compare(
            f"consistent {what}", f"{count} x {TOKENS}",
            partial(consistent, logits, END, **settings), partial(truncate, logits, **settings),
            peer_name="without the end kept", pairs=pairs,
        )  # fmt: skip


def _searches(pairs: int, new: int) -> Iterator[Row]:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=5000, n_positions=256, n_embd=128, n_layer=2, n_head=4,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(config)
    model.eval()
    prompt = torch.randint(1, 5000, (8, 10), generator=torch.Generator().manual_seed(2))
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new,
        "pad_token_id": 0,
        "do_sample": False,
    }
    for what, decoder, theirs in (
        ("greedy search", Greedy(), given),
        ("beam search, 4 beams", Beam(4), {**given, "num_beams": 4, "length_penalty": 0.0}),
    ):
        ours = partial(decoder.decode, model, prompt, max_new_tokens=new)
        peer = partial(model.generate, prompt, **theirs)
        same = torch.equal(ours().sequences, peer()[:, 10:])
        if not same:
            raise RuntimeError(f"{what}: other tokens than transformers'")
        yield compare(
            f"{what}, {8 * new} tokens", f"GPT-2 of 2 layers, 8 prompts, {new} tokens each", ours,
            peer, peer_name="transformers generate", pairs=pairs,
        )  # fmt: skip


if __name__ == "__main__":
    for row in rows(quick=True):
        print(row)
