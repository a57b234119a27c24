"""Two language models as the two directions: beside the search of each alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.errors import FileFormatError
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language import beam_search, next_token_scorer
from kexue.core.registry import Registry
from kexue.core.run import Request, execute
from kexue_bidirectional_decoding import BidirectionalBeam, TwoModels, bidirectional_beam_search

ID = "decoder/bidirectional-beam"
END, SIZE = 2, 30
PROMPT = torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 0]])
MASK = PROMPT > 0


def model(seed: int, kind: str = "bart", *, ends: float = 0.0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    made: Any
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=SIZE, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=32, decoder_start_token_id=1,
            forced_eos_token_id=None, init_std=0.5, **ids,
        )  # fmt: skip
        made = transformers.BartForConditionalGeneration(config)
        made.final_logits_bias[0, END] = ends
    else:
        config = transformers.GPT2Config(
            vocab_size=SIZE, n_positions=32, n_embd=16, n_layer=1, n_head=2,
            initializer_range=0.5, **ids,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
    return made.eval()


def texts(found: DecodeResult) -> list[list[int]]:
    return found.tolist()


def turned(row: list[int]) -> list[int]:
    """A text as the model from the right writes it, from left to right."""
    return [*row[-2::-1], END] if row[-1] == END else row[::-1]


def generated(of: Any, **options: Any) -> list[list[int]]:
    """What transformers itself makes of each prompt alone, without start and prompt."""
    rows = []
    for ids, real in zip(PROMPT, MASK, strict=True):
        given = ids[real][None]
        out = of.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8,
            **options,
        )  # fmt: skip
        behind = 1 if of.config.is_encoder_decoder else given.shape[1]
        row = out[0, behind:].tolist()
        rows.append(row[: row.index(END) + 1] if END in row else row)
    return rows


@pytest.mark.parametrize(("kind", "ends"), [("bart", 6.0), ("gpt2", 0.0)])
def test_greedy_is_what_transformers_generates_from_either_end(kind: str, ends: float) -> None:
    left, right = (model(seed, kind, ends=ends) for seed in (0, 1))
    found = BidirectionalBeam(1, max_new_tokens=8, both=True).decode(
        (left, right), prompt=PROMPT, mask=MASK
    )
    assert texts(found.left) == generated(left)
    assert texts(found.right) == [turned(row) for row in generated(right)]
    better = found.right.scores > found.left.scores
    assert torch.equal(found.from_right, better)
    sides = [texts(found.left), texts(found.right)]
    assert texts(found) == [sides[int(b)][i] for i, b in enumerate(better)]
    if kind == "bart":  # some end, some are cut off
        assert found.ended is not None
        assert {len(row) for side in sides for row in side} != {8}


@pytest.mark.parametrize("width", [2, 4])
def test_either_direction_is_the_beam_search_of_its_model(width: int) -> None:
    left, right = (model(seed, ends=-math.inf) for seed in (0, 1))  # so that no text is set aside
    found = BidirectionalBeam(width, max_new_tokens=8).decode(
        (left, right), prompt=PROMPT, mask=MASK
    )
    for side, of, name in ((found.left, left, "left"), (found.right, right, "right")):
        alone = beam_search(of, PROMPT, mask=MASK, width=width, max_new_tokens=8)
        torch.testing.assert_close(side.scores, alone.scores)
        rows = texts(side) if name == "left" else [row[::-1] for row in texts(side)]
        assert rows == texts(alone)
        assert rows == generated(of, num_beams=width, length_penalty=0.0)


def test_all_kinds_of_models_can_be_paired() -> None:
    plain = model(3, "gpt2")

    def function(ids: Tensor) -> Tensor:
        logits: Tensor = plain(input_ids=ids).logits
        return logits

    options: dict[str, Any] = {"width": 3, "max_new_tokens": 8, "mask": MASK}
    pairs = [
        TwoModels(plain, plain),
        TwoModels(function, function, end_id=END),
        TwoModels(next_token_scorer(plain), function, end_id=END),
    ]
    with torch.no_grad():
        found = [bidirectional_beam_search(pair, PROMPT, **options) for pair in pairs]
    # Twins agree: which of the two is taken is left to the last bits of the models.
    for pair in found:
        assert texts(pair.left) == texts(found[0].left)
        assert texts(pair.right) == [turned(row) for row in texts(found[0].left)]
        for side in (pair, pair.left, pair.right):
            torch.testing.assert_close(side.scores, found[0].scores)


def test_of_equals_the_one_from_the_left_is_taken() -> None:
    table = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def bigram(ids: Tensor) -> Tensor:
        return table[ids]

    pair = TwoModels(bigram, bigram, end_id=END)
    found = bidirectional_beam_search(pair, PROMPT, mask=MASK, width=3, max_new_tokens=8)
    assert torch.equal(found.left.scores, found.right.scores)
    assert not found.from_right.any()
    assert texts(found) == texts(found.left) != texts(found.right)


def test_rows_do_not_see_each_other() -> None:
    pair = TwoModels(model(0, ends=4.0), model(1, ends=4.0))
    found = bidirectional_beam_search(pair, PROMPT, mask=MASK, width=3, max_new_tokens=10)
    for i, (ids, real) in enumerate(zip(PROMPT, MASK, strict=True)):
        alone = bidirectional_beam_search(pair, ids[real][None], width=3, max_new_tokens=10)
        assert alone.tolist() == [found.tolist()[i]]
        torch.testing.assert_close(alone.scores[0], found.scores[i])


def test_refuses_pairs() -> None:
    def function(ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), SIZE)

    with pytest.raises(ArgumentError, match=r"`end_id` must be given.*Found None and None"):
        TwoModels(function, function)
    with pytest.raises(ArgumentError, match="Found 2 and None"):
        TwoModels(model(0), function)
    with pytest.raises(ArgumentError, match=r"`right` must have the tokens of `left`. Found 3"):
        bidirectional_beam_search(
            TwoModels(function, lambda ids: torch.zeros(len(ids), 3), end_id=END), PROMPT
        )
    with pytest.raises(ArgumentError, match="`max_new_tokens` must be at most 31"):
        bidirectional_beam_search(TwoModels(model(0), model(1)), PROMPT, max_new_tokens=32)
    with pytest.raises(ArgumentError, match="`model` must be a NextTokenScorer"):
        BidirectionalBeam().decode((model(0), 3), prompt=PROMPT)


def saved(of: Any, folder: Path, words: list[str]) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    known = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    marks = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token=marks["unk_token"]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    of.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_line_takes_two_folders(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(4, SIZE)]
    pair = [model(seed, ends=3.0) for seed in (0, 1)]
    left, right = (
        saved(of, tmp_path / name, words) for of, name in zip(pair, ("l", "r"), strict=True)
    )
    sources = tmp_path / "sources.txt"
    sources.write_text("w5 w6 w7\nw9\n", encoding="utf-8")
    registry = Registry()

    def run(of: Path, **options: Any) -> Any:
        params = ["max_new_tokens=8"]
        request = Request(ID, files=[str(sources)], model=of, options=options, params=params)
        return execute(registry, request)[1]

    result = run(left, right=str(right))
    prompt = torch.tensor([[5, 6, 7], [9, 0, 0]])
    found = BidirectionalBeam(max_new_tokens=8).decode(pair, prompt=prompt, mask=prompt > 0)
    wanted = [" ".join(f"w{i}" for i in row if i > 3) for row in found.tolist()]
    assert list(result.lines or ()) == wanted
    assert result.summary["from the right"] == int(found.from_right.sum())
    with pytest.raises(ArgumentError, match="`--right` must name a second model"):
        run(left)
    with pytest.raises(ArgumentError, match="`--same-length` must be left out"):
        run(left, right=str(right), same_length=True)
    other = saved(model(2), tmp_path / "o", words[::-1])
    with pytest.raises(FileFormatError, match=r"must have the same tokens as .*l, in the same"):
        run(left, right=str(other))
