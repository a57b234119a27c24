"""Small language models: alone as in a batch, with a cache as without, on disk as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.core.component import Component
from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Job, Result
from kexue.core.lab.language import CharacterMaskedModel, CharacterModel, CharacterSeq2Seq
from kexue.core.lab.texts import load_text_model, prompts
from kexue.core.lab.transformer import Transformer
from kexue.core.language import Characters, beam_search, generate, pad_ids
from kexue.core.registry import Registry
from kexue.core.run import Request, execute

ALPHABET = "abcdefgh"
ROWS = [[6, 7, 8, 9, 5, 6], [], [9, 9, 10], [12]]
CELLS = ("gru", "rnn", "transformer")


def causal(cell: str, **sizes: Any) -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(ALPHABET, cell=cell, width=16, layers=2, **sizes).double().eval()


@pytest.mark.parametrize("cell", CELLS)
def test_a_cache_changes_nothing(cell: str) -> None:
    model = causal(cell)
    prompt, mask = pad_ids(ROWS, pad_id=3)
    logits, cache = model.begin(prompt, mask)
    tokens = torch.tensor([5, 6, 7, 8])
    bos = model.vocabulary.bos_id
    for i, row in enumerate(ROWS):
        whole = model(torch.tensor([[bos, *row]]))[0, -1]
        torch.testing.assert_close(logits[i], whole)
    logits, cache = model.advance(cache, tokens)
    for i, row in enumerate(ROWS):
        whole = model(torch.tensor([[bos, *row, int(tokens[i])]]))[0, -1]
        torch.testing.assert_close(logits[i], whole)
    chosen = torch.tensor([2, 2, 0])
    later, _ = model.advance(model.select(cache, chosen), tokens[:3])
    for i, row in enumerate(chosen.tolist()):
        whole = model(torch.tensor([[bos, *ROWS[row], int(tokens[row]), int(tokens[i])]]))[0, -1]
        torch.testing.assert_close(later[i], whole)


def test_a_source_has_the_same_answer_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = CharacterSeq2Seq(ALPHABET, width=16).double().eval()
    rows = [row for row in ROWS if row]
    source, mask = pad_ids(rows, pad_id=3)
    inputs = torch.tensor([[model.vocabulary.bos_id, 6, 7]]).expand(3, -1)
    together = model(source, mask, inputs)
    logits, cache = model.begin(source, mask)
    torch.testing.assert_close(logits, together[:, 0])
    for step in (1, 2):
        logits, cache = model.advance(cache, inputs[:, step])
        torch.testing.assert_close(logits, together[:, step])
    found = beam_search(model, source, mask=mask, width=3, max_new_tokens=6)
    for i, row in enumerate(rows):
        ids = torch.tensor([row])
        alone = model(ids, torch.ones_like(ids, dtype=torch.bool), inputs[:1])
        torch.testing.assert_close(alone[0], together[i])
        one = beam_search(model, ids, width=3, max_new_tokens=6)
        assert one.tolist() == [found.tolist()[i]]
    with pytest.raises(ArgumentError, match=r"hold a character in every row.*row 1"):
        model.begin(*pad_ids(ROWS))


def test_a_masked_model_sees_both_sides_and_no_padding() -> None:
    torch.manual_seed(0)
    model = CharacterMaskedModel(ALPHABET, width=16).double().eval()
    rows = [row for row in ROWS if row]
    ids, mask = pad_ids(rows)
    positions = torch.tensor([[5, 0], [1, 2], [0, 0]])
    found = model(ids, mask, positions)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]))[0, positions[i]]
        torch.testing.assert_close(found[i], alone)
    changed = ids.clone()
    changed[0, 5] = 11
    assert not torch.allclose(model(changed, mask)[0, 0], model(ids, mask)[0, 0])


def test_a_causal_model_does_not_see_what_follows() -> None:
    model = causal("transformer")
    ids = torch.tensor([[1, 6, 7, 8]])
    torch.testing.assert_close(model(ids)[:, :2], model(ids[:, :2]))


def test_refuses_sizes() -> None:
    with pytest.raises(ArgumentError, match="`cell` must be 'gru', 'rnn' or 'transformer'"):
        CharacterModel(ALPHABET, cell="lstm")
    with pytest.raises(ArgumentError, match=r"`width` must be even. Found 5"):
        CharacterSeq2Seq(ALPHABET, width=5)
    with pytest.raises(ArgumentError, match=r"`width` must be a multiple of 4. Found 6"):
        Transformer(6, 1)
    with pytest.raises(ArgumentError, match=r"`ids` must have at most 5 tokens. Found 6"):
        Transformer(8, 1, max_length=5)(torch.zeros(1, 6, 8))
    with pytest.raises(ArgumentError, match="reads 8 tokens"):
        generate(causal("transformer", max_length=8), torch.tensor([[6] * 5]), max_new_tokens=4)


# -- fitting and loading --------------------------------------------------------------------------

LINES = ["abab", "ababab", "ab", "cdcd", "cdcdcd", "cd"] * 6


class Text:
    """A component that is run on a language model."""

    def __call__(self, text: str) -> str:
        """Return the text."""
        return text


def run_text(job: Job, *, length: int = 6) -> Result:
    """Continue every line.

    Args:
        job: The call.
        length: Characters to add at most.
    """
    model = load_text_model(job.model or Path(), device=job.device, dtype=job.dtype)
    lines = list(prompts(job))
    ids, mask = pad_ids([model.vocabulary.encode(line) for line in lines])
    found = generate(model.scorer(), ids, mask=mask, max_new_tokens=length)
    return Result(lines=[model.vocabulary.decode(row) for row in found.tolist()])


@pytest.fixture
def registry() -> Registry:
    registry = Registry(discover=False)
    texts, here = "kexue.core.lab.texts", f"{__name__}:run_text"
    components = [
        Component(
            "loss", form, f"{__name__}:Text", "Text to text.", fit=f"{texts}:fit_{form}", apply=here
        )
        for form in ("causal", "seq2seq", "masked")
    ]
    registry.register(components, slug="texts", owner="texts")
    return registry


def fitted(registry: Registry, form: str, lines: list[str], folder: Path, **options: Any) -> Path:
    """Fit a model to lines, and return its folder."""
    path = folder / "lines.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    where = folder / "model"
    given = {"epochs": 25, "batch_size": 8, "lr": 0.02, "width": 16, **options}
    _, result = execute(
        registry, Request(form, "fit", [str(path)], options=given, out=where, device="cpu")
    )
    assert result.summary["best_loss"] < 1.5
    return where


def continued(registry: Registry, form: str, folder: Path, lines: list[str]) -> list[str]:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    request = Request(form, files=[str(path)], model=folder / "model", device="cpu")
    return list(execute(registry, request)[1].lines or ())


@pytest.mark.parametrize("cell", CELLS)
def test_a_causal_model_learns_a_text(registry: Registry, tmp_path: Path, cell: str) -> None:
    fitted(registry, "causal", LINES, tmp_path, cell=cell)
    found = continued(registry, "causal", tmp_path, ["aba", "cdc"])
    assert [line[:1] for line in found] == ["b", "d"]
    model = load_text_model(tmp_path / "model")
    assert model.form == "causal"
    assert model.vocabulary.size == len(Characters.special_ids) + 4
    assert not model.model.training


def test_a_seq2seq_model_learns_pairs(registry: Registry, tmp_path: Path) -> None:
    pairs = [f"{line}\t{line.upper()}" for line in LINES]
    fitted(registry, "seq2seq", pairs, tmp_path, epochs=40, dropout=0.0, patience=10)
    assert continued(registry, "seq2seq", tmp_path, ["ab", "cdcd"]) == ["AB", "CDCD"]


def test_a_masked_model_learns_a_text(registry: Registry, tmp_path: Path) -> None:
    where = fitted(registry, "masked", LINES, tmp_path, epochs=60, patience=20, lr=0.01)
    found = load_text_model(where, forms=("masked",))
    scorer = found.masked_scorer()
    ids = torch.tensor([found.vocabulary.encode("abab")])
    ids[0, 2] = scorer.mask_id
    best = scorer(ids, None, torch.tensor([[2]])).argmax(-1)
    assert found.vocabulary.decode(best[0].tolist()) == "a"
    with pytest.raises(ArgumentError, match=r"must be a causal or seq2seq.*Found a masked one"):
        load_text_model(where)


def test_refuses_files(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("eins\nzwei\n")
    for form, words in (("causal", "has 2 examples, too few"), ("seq2seq", "Line 1 of .* a tab")):
        with pytest.raises(FileFormatError, match=words):
            execute(registry, Request(form, "fit", [str(path)], out=tmp_path / "model"))
    path.write_text("eins\tone\nzwei\ttwo\n")
    with pytest.raises(FileFormatError, match=r"few\.txt has 2 examples, too few"):
        execute(registry, Request("seq2seq", "fit", [str(path)], out=tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_refuses_folders(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no fitted model"):
        load_text_model(tmp_path)
    (tmp_path / "config.yaml").write_text("{component: a, model: {form: other}, weights: w}")
    with pytest.raises(FileFormatError, match="holds no language model: it was fitted with a"):
        load_text_model(tmp_path)


def test_reads_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "</s>": 1, "[MASK]": 2, "科": 3, "学": 4}
    special = {"eos_token": "</s>", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, special["unk_token"]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=5, intermediate_size=16, **small)
    gpt = transformers.GPT2Config(vocab_size=5, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    for name, model in (
        ("masked", transformers.BertForMaskedLM(bert)),
        ("causal", transformers.GPT2LMHeadModel(gpt)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        found = load_text_model(tmp_path / name, forms=(name,), dtype=torch.float64)
        assert found.form == name
        assert next(found.model.parameters()).dtype is torch.float64
        assert found.vocabulary.encode("学科") == [4, 3]
    assert found.scorer().eos_id == 1
    masked = load_text_model(tmp_path / "masked", forms=("masked",)).masked_scorer()
    assert masked.mask_id == 2
    with pytest.raises(ArgumentError, match=r"must be a masked language model. Found a causal one"):
        load_text_model(tmp_path / "causal", forms=("masked",))
    (tmp_path / "causal" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(FileFormatError, match="holds no model and tokenizer of transformers"):
        load_text_model(tmp_path / "causal")
