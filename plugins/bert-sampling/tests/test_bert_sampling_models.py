"""Models of transformers and of the lab, text, and the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kexue_bert_sampling
from kexue.core import ArgumentError, Context
from kexue.core.conformance import conformance
from kexue.core.errors import KexueError
from kexue.core.lab.language import CharacterMaskedModel
from kexue.core.lab.texts import load_text_model
from kexue.core.loading import load_target
from kexue.core.registry import registry
from kexue.core.run import Request, execute, write_result
from kexue_bert_sampling import MLMGibbs, commands

CHINESE = "科学空间是一个博客采样文本的"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@conformance("bert-sampling")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_the_manifest_names_what_exists() -> None:
    (component,) = kexue_bert_sampling.kexue_components()
    assert load_target(component.target).__name__ in kexue_bert_sampling.__all__
    for target in (component.run, component.fit, component.apply):
        assert callable(load_target(target))
    assert all(callable(load_target(e.target)) for e in kexue_bert_sampling.kexue_experiments())


def test_experiments_hold() -> None:
    target = "kexue_bert_sampling.experiments:stationary"
    report = load_target(target)(Context(torch.device("cpu"), quick=True))
    assert [c.statement for c in report.claims if not c.holds] == []
    assert report.figures


# -- models ---------------------------------------------------------------------------------------


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().eval()


def script(model: Any, sampler: MLMGibbs, steps: int) -> list[list[int]]:
    """One chain after the other, as the post's script: the whole vocabulary at every place."""
    found = []
    chains = sampler.begin(model, 3, generator=seeded(5))
    prefix = len(sampler.prefix)
    lengths = chains.start.inside.sum(1).tolist()
    for number, length in enumerate(lengths):
        ids = [*sampler.prefix, *[3] * length, *sampler.suffix]
        for step in range(steps):
            uniforms = [
                float(
                    chains.randomness.uniform(
                        purpose, torch.tensor(step), torch.tensor(number), torch.tensor(0)
                    )
                )
                for purpose in (1, 2)
            ]
            place = prefix + int(uniforms[0] * length)
            ids[place] = 3
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, place]
            logits[[*sampler.forbidden, 3]] = -torch.inf
            law = logits.softmax(-1).cumsum(-1)
            ids[place] = int((law <= uniforms[1] * law[-1]).sum())
        found.append(ids[prefix : prefix + length])
    return found


def test_many_chains_are_those_of_a_script_that_draws_one_by_one() -> None:
    model = bert()
    sampler = MLMGibbs(
        min_length=3, max_length=9, warmup=60, thin=20, prefix=[1], suffix=[2],
        forbidden=[0, 1, 2], mask_id=3, num_chains=3,
    )  # fmt: skip
    values = sampler.sample(model, 3, generator=seeded(5)).values.tolist()
    assert [[i for i in row if i >= 0] for row in values] == script(model, sampler, 80)


def test_a_model_of_transformers_scores_the_masked_places_alone() -> None:
    model, shapes = bert(), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: shapes.append(tuple(out.shape))
    )
    MLMGibbs(num_chains=5, block=2, warmup=4, thin=1, mask_id=3, max_length=9).sample(
        model, 5, generator=seeded()
    )
    assert shapes[0] == (5, 2, 40)
    assert {shape[1] for shape in shapes} <= {1, 2}


def test_a_model_that_is_sure_fills_the_gaps_of_chinese_text() -> None:
    model = CharacterMaskedModel(CHINESE, width=16, layers=1, max_length=20)
    text = "科学空间是博客"
    ids = model.vocabulary.encode(text)
    with torch.no_grad():  # a model that knows one text: the token is that of the place
        model.body = _Places(len(ids))  # type: ignore[assignment]
        model.output = torch.nn.Linear(len(ids), model.vocabulary.size, bias=False)
        model.output.weight.zero_()
        model.output.weight[ids, torch.arange(len(ids))] = 50.0
    init = torch.tensor(ids)
    frozen = torch.tensor([True, True, False, False, True, False, False])
    init[~frozen] = model.mask_id
    sampler = MLMGibbs(
        init=init, frozen=frozen, warmup=30, thin=1, forbidden=model.vocabulary.special_ids
    )
    values = sampler.sample(model, 4, generator=seeded()).values
    assert [model.vocabulary.decode(row) for row in values.tolist()] == [text] * 4


class _Places(torch.nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        assert mask is None
        return torch.eye(self.length).expand(len(features), -1, -1), None


# -- the command line -----------------------------------------------------------------------------


Ran = tuple[dict[str, Any], list[str]]
"""The summary and the lines."""


def run(
    *files: str | Path, model: Path | None = None, out: Path | None = None, num: int = 8,
    params: Sequence[str] = ("warmup=8", "thin=2"), verb: str = "run", **options: Any,
) -> Ran:  # fmt: skip
    """Do what ``kexue run`` does, without starting a process."""
    if verb == "run":
        options["num_samples"] = num
    request = Request(
        "sampler/mlm-gibbs", verb, files=[str(f) for f in files], params=params, options=options,
        model=model, out=out,
    )  # fmt: skip
    _, result = execute(registry, request)
    lines = list(result.lines or ())
    if out is not None and verb == "run":
        write_result(result, out, None)
    return result.summary, lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of characters, as ``kexue fit`` writes it."""
    path = tmp_path_factory.mktemp("gibbs")
    torch.manual_seed(0)
    model = CharacterMaskedModel(CHINESE, width=8, layers=1, max_length=16)
    model.component = "sampler/mlm-gibbs"
    model.save(path / "model")
    (path / "one.txt").write_text("科学[MASK*2]\n", encoding="utf-8")
    (path / "prompts.txt").write_text(f"科学[MASK*2]是[MASK]\n{CHINESE[:5]}\n", encoding="utf-8")
    return path


def test_the_command_line_prints_texts(folder: Path) -> None:
    words = [sys.executable, "-m", "kexue.cli", "run", "sampler/mlm-gibbs", "--model", "model"]
    words += ["-", "-n", "3", "--set", "warmup=8", "--set", "thin=2"]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, check=False, input="科学[MASK*2]\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == run(folder / "one.txt", model=folder / "model", num=3)[1]
    assert len(lines) == 3
    assert "texts: 3" in done.stderr


def test_draws_texts_of_random_lengths(folder: Path) -> None:
    params = ["warmup=8", "thin=2", "min_length=4", "num_chains=2"]
    summary, lines = run(model=folder / "model", num=5, params=params)
    assert len(lines) == 5
    assert all(4 <= len(line) <= 16 and set(line) <= set(CHINESE) for line in lines)
    assert summary["texts"] == 5
    assert summary["steps"] == 8 + 3 * 2


def test_keeps_what_prompts_say(folder: Path) -> None:
    summary, lines = run(folder / "prompts.txt", model=folder / "model", num=4)
    assert len(lines) == 8
    assert all(len(t) == 6 and t.startswith("科学") and t[4] == "是" for t in lines[:4])
    assert all(len(t) == 5 for t in lines[4:])
    assert any(not t.startswith(CHINESE[:2]) for t in lines[4:])  # no masks: all is drawn
    assert summary["texts"] == 8
    out = folder / "ids.npy"
    run(folder / "prompts.txt", model=folder / "model", num=9, redraw=True, out=out)
    ids = np.load(out)
    assert ids.shape == (18, 6)
    assert len({tuple(row) for row in ids[:9, :2].tolist()}) > 1


def test_a_prompt_has_the_same_texts_whatever_is_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(folder / "prompts.txt", model=folder / "model", num=4)
    monkeypatch.setattr("kexue_bert_sampling.commands._ROWS", 4)
    assert run(folder / "prompts.txt", model=folder / "model", num=4)[1] == together[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("科学\n\n", "`prompt` in line 2 must hold a token"),
        ("科学[MASK]x\n", "`prompt` in line 1 must be of tokens that the model knows. Found 'x'"),
        ("[MASK*17]\n", "`prompt` in line 1 must have at most 16 tokens"),
        ("", "`prompt` must have a line"),
    ],
)
def test_says_what_is_wrong_with_prompts(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
    with pytest.raises(KexueError, match=re.escape(message)):
        run(tmp_path / "bad.txt", model=folder / "model")


def test_draws_of_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "[SEP]", *CHINESE, "blog", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("科学[MASK][MASK]\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    bert().float().save_pretrained(tmp_path / "bert")
    _, lines = run(tmp_path / "prompts.txt", model=tmp_path / "bert", num=30)
    assert len(lines) == 30
    assert all(line.startswith("科学") for line in lines)
    assert not any("[" in line or "科 学" in line for line in lines)
    model = load_text_model(tmp_path / "bert", forms=("masked",))
    assert commands._around(model) == {"prefix": (2,), "suffix": (4,)}
    shown: list[Tensor] = []
    model.model.bert.embeddings.register_forward_pre_hook(
        lambda module, given, kwargs: shown.append(kwargs["input_ids"]), with_kwargs=True
    )
    sampler = MLMGibbs(**commands._around(model), mask_id=3, min_length=2, max_length=5, warmup=2)
    sampler.sample(model.masked_scorer(), 4)
    assert all((ids[:, 0] == 2).all() and (ids == 4).sum() >= len(ids) for ids in shown)


def test_draws_of_logits_and_of_python(tmp_path: Path) -> None:
    np.save(tmp_path / "joint.npy", np.zeros((2, 3), dtype=np.float32))
    (tmp_path / "here.py").write_text(
        "import torch\nfrom kexue.core.language import masked_scorer\n"
        "model = masked_scorer(lambda ids: torch.zeros(*ids.shape, 5), mask_id=4)\n",
        encoding="utf-8",
    )
    out = tmp_path / "draws.npz"
    for given, width in (("joint.npy", 2), (f"{tmp_path}/here.py:model", 9)):
        params = ["warmup=5", "thin=2", *(["min_length=9", "max_length=9"] if width == 9 else [])]
        run(tmp_path / given if width == 2 else given, num=20, params=params, out=out)
        with np.load(out) as arrays:
            assert arrays["values"].shape == (20, width)
    with pytest.raises(ArgumentError, match="text needs `--model`"):
        run()
    with pytest.raises(ArgumentError, match="`--num-samples`"):
        run(tmp_path / "joint.npy", num=0)


def test_fits_and_draws_again(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("学习采样\n采样文本\n" * 20, encoding="utf-8")
    model = tmp_path / "model"
    run(tmp_path / "corpus.txt", out=model, verb="fit", params=(), epochs=1, width=8)
    params = ["warmup=4", "thin=1", "max_length=6"]
    _, lines = run(model=model, num=2, params=params)
    assert len(lines) == 2
    assert all(set(line) <= set("学习采样文本") for line in lines)
