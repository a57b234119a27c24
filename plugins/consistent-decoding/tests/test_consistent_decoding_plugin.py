"""The contract, the manifest, the experiments, and text on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kexue_consistent_decoding
from kexue.core import ArgumentError, Context
from kexue.core.conformance import conformance
from kexue.core.errors import FileFormatError
from kexue.core.lab.language import CharacterModel
from kexue.core.loading import load_target
from kexue.core.registry import registry
from kexue.core.run import Request, execute
from kexue_consistent_decoding.experiments import self_termination, termination
from kexue_consistent_decoding.network import CONTEXT, Network


@conformance("consistent-decoding")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_the_manifest_names_what_exists() -> None:
    components = kexue_consistent_decoding.kexue_components()
    assert len(components) == 7
    for component in components:
        assert load_target(component.target).__name__ in kexue_consistent_decoding.__all__
        for command in filter(None, (component.run, component.fit, component.apply)):
            assert callable(load_target(command))
    found = kexue_consistent_decoding.kexue_experiments()
    assert all(callable(load_target(e.target)) for e in found)


# -- experiments, on networks that have learned nothing --------------------------------------------


def untrained() -> Context:
    context = Context(torch.device("cpu"), quick=True)
    for seed in context.seeds:
        torch.manual_seed(seed)
        model = CharacterModel("abcdefgh ", cell="rnn", width=16).eval()
        model.requires_grad_(requires_grad=False)
        letters = "".join("abcdefgh "[i] for i in torch.randint(9, (600,)).tolist())
        lines = [letters[i : i + 15 + i % 7] for i in range(0, 500, 5)]
        batch = dict(model.collate(lines))
        prompts = torch.tensor([model.vocabulary.encode(line[:CONTEXT]) for line in lines[:5]])
        context.cache["consistent-decoding", seed] = Network(model, batch, batch, prompts)
    return context


def test_the_theorems_hold_without_training() -> None:
    context = untrained()
    report = self_termination(context)
    *theorems, price = report.claims
    assert [c.statement for c in theorems if not c.holds] == []
    assert "costs little" in price.statement
    for figure in report.figures:
        figure.plot(canvas())


def test_termination_measures() -> None:
    report = termination(untrained())
    floor = next(c for c in report.claims if "lower bound" in c.statement)
    assert floor.holds
    assert len(report.tables[0].rows) == 8
    for figure in report.figures:
        figure.plot(canvas())


def canvas() -> Any:
    from matplotlib.figure import Figure

    return Figure()


# -- text ------------------------------------------------------------------------------------------

LINES = [
    "天地玄黄，宇宙洪荒。",
    "日月盈昃，辰宿列张。",
    "寒来暑往，秋收冬藏。",
    "闰余成岁，律吕调阳。",
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "corpus.txt").write_text("\n".join(LINES * 5), encoding="utf-8")
    (folder / "prompts.txt").write_text("天地\n\n寒来暑往\n", encoding="utf-8")
    run(
        "sampler/consistent-nucleus", folder / "corpus.txt", verb="fit", out=folder / "model",
        options={"epochs": 2, "width": 16},
    )  # fmt: skip
    return folder


def run(name: str, *files: object, **given: Any) -> tuple[list[str], dict[str, Any]]:
    request = Request(name, files=[str(f) for f in files], device="cpu", **given)
    _, result = execute(registry, request)
    lines = list(result.lines or ())
    return lines, result.summary


@pytest.mark.parametrize(
    "name",
    ["sampler/consistent-nucleus", "sampler/consistent-top-k", "sampler/ancestral",
     "decoder/greedy", "decoder/beam"],
)  # fmt: skip
def test_text_in_and_text_out(fitted: Path, name: str) -> None:
    given: dict[str, Any] = {"model": fitted / "model", "options": {"max_new_tokens": 15}}
    texts, summary = run(name, fitted / "prompts.txt", **given)
    assert len(texts) == summary["texts"] == 3
    assert texts[0].startswith("天地")
    assert texts[2].startswith("寒来暑往")
    assert all(len(text) <= 19 for text in texts)
    assert 0 <= summary["terminated"] <= 1
    assert summary["mean_new_tokens"] <= 15
    again, _ = run(name, fitted / "prompts.txt", **given)
    assert again == texts


def test_a_text_depends_on_seed_and_line_alone(fitted: Path) -> None:
    name, prompts = "sampler/consistent-top-k", fitted / "prompts.txt"
    base: dict[str, Any] = {"model": fitted / "model"}
    texts, summary = run(name, prompts, **base, options={"num_samples": 2, "max_new_tokens": 9})
    assert summary["texts"] == 6
    one, _ = run(
        name, prompts, **base, options={"num_samples": 2, "max_new_tokens": 9, "batch_size": 1}
    )
    assert one == texts
    other, _ = run(name, prompts, **base, seed=1, options={"num_samples": 2, "max_new_tokens": 9})
    assert other != texts


def test_a_transformers_folder_will_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<end>": 0, "a": 1, "b": 2, "c": 3}
    end = "<end>"
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=end))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)
    fast.save_pretrained(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=4, n_positions=32, n_embd=8, n_layer=1, n_head=1, eos_token_id=0, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("a b\nc\n", encoding="utf-8")
    options = {"max_new_tokens": 8}
    texts, summary = run(
        "sampler/consistent-top-k", tmp_path / "prompts.txt", model=tmp_path, options=options
    )
    assert texts[0].startswith("a b")
    assert summary["texts"] == 2
    with pytest.raises(ArgumentError, match=r"Line 1 and `--max-new-tokens` must fit .* 32 tokens"):
        run(
            "decoder/greedy",
            tmp_path / "prompts.txt",
            model=tmp_path,
            options={"max_new_tokens": 31},
        )


def test_what_is_wrong_is_said(fitted: Path) -> None:
    model: dict[str, Any] = {"model": fitted / "model"}
    strange = fitted / "strange.txt"
    strange.write_text("天地\n龙师火帝\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"Line 2: `text` .* Found '龙'"):
        run("decoder/beam", strange, **model)
    with pytest.raises(ArgumentError, match="`--num-samples` must be at least 1"):
        run("sampler/consistent-top-k", strange, **model, options={"num_samples": 0})
    binary = fitted / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="not UTF-8"):
        run("sampler/consistent-nucleus", binary, **model)
    with pytest.raises(ArgumentError, match=r"kexue fit decoder/greedy TEXT -o model/"):
        run("decoder/greedy", strange)


def test_ids_are_continued_by_a_function(tmp_path: Path) -> None:
    np.save(tmp_path / "prompt.npy", np.array([[1, 2], [3, -1]]))
    scores = "kexue_consistent_decoding.decoders:count_to_four"
    request = Request(
        "decoder/greedy", files=[scores, str(tmp_path / "prompt.npy")], params=["eos_id=0"],
        device="cpu", options={"max_new_tokens": 2},
    )  # fmt: skip
    _, result = execute(registry, request)
    assert result.arrays["sequences"].tolist() == [[3, 4], [4, 0]]
    assert result.summary["terminated"] == 0.5
    np.save(tmp_path / "prompt.npy", np.array([[0.5]]))
    with pytest.raises(ArgumentError, match=r"`prompt` in .* must be token ids"):
        execute(registry, request)
