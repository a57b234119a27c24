"""Files in, answers out: the command line form, and the claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kexue.core import ArgumentError, Context, FileFormatError, registry
from kexue.core.lab.language import CharacterSeq2Seq
from kexue.core.run import Request, execute
from kexue_trie_decoding import TrieIndex
from kexue_trie_decoding.experiments import knowledge as knowledge_module
from kexue_trie_decoding.experiments.names import names

NAMES = "明月几时有\t苏轼\n明天会更好\n\n明天下雨\t天气\n明天下雨\t预报\n"
ID = "decoder/trie-beam"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text(NAMES, encoding="utf-8")
    (tmp_path / "questions.txt").write_text("明月时有\n明 雨？\n", encoding="utf-8")
    model = CharacterSeq2Seq("".join(sorted(set(NAMES) - {"\n", "\t"})), width=16)
    model.component = ID
    model.save(tmp_path / "model")
    return tmp_path


def ask(folder: Path, *files: str, params: tuple[str, ...] = (), **options: Any) -> Any:
    request = Request(
        ID,
        files=[str(folder / name) for name in files],
        model=folder / "model",
        params=params,
        options={name: str(value) for name, value in options.items()},
        device="cpu",
    )
    _, result = execute(registry, request)
    return result, list(result.lines or ())


def test_each_question_is_answered_with_what_is_known(folder: Path) -> None:
    result, lines = ask(
        folder,
        "questions.txt",
        database=folder / "names.txt",
        params=("width=4", "num_return=4"),
    )
    rows = [line.split("\t") for line in lines]
    known = {"明月几时有": ["苏轼"], "明天会更好": [], "明天下雨": ["天气 | 预报"]}
    assert len(rows) == 2 * 3
    for question, begin in (("明月时有", 0), ("明 雨？", 3)):
        answers = rows[begin : begin + 3]
        assert {row[0] for row in answers} == {question}
        assert sum(float(row[1]) for row in answers) == pytest.approx(1, abs=1e-3)
        assert {row[2]: row[3:] for row in answers} == known
    assert result.summary == {
        "entries": 3, "rows": 4, "nodes": 15, "rows_with_unknown_tokens": 0, "questions": 2,
    }  # fmt: skip


def test_an_index_takes_the_place_of_its_text(folder: Path) -> None:
    place = folder / "names.safetensors"
    _, lines = ask(folder, "questions.txt", database=folder / "names.txt", save_index=place)
    assert len(TrieIndex.load(place)) == 3
    _, again = ask(folder, "questions.txt", database=place)
    assert [line.split("\t")[:3] for line in lines] == [line.split("\t") for line in again]


def test_unknown_characters_are_counted_and_told_apart_no_more(folder: Path) -> None:
    (folder / "odd.txt").write_text("甲月\n乙月\n明月\n", encoding="utf-8")
    result, lines = ask(
        folder, "questions.txt", database=folder / "odd.txt", params=("num_return=2",)
    )
    assert result.summary["rows_with_unknown_tokens"] == 2
    assert result.summary["entries"] == 2
    assert {line.split("\t")[2] for line in lines} == {"甲月 | 乙月", "明月"}


def test_look_ahead_is_set_like_any_parameter(folder: Path) -> None:
    fields = NAMES.replace("明天", "明|天")
    (folder / "fields.txt").write_text(fields, encoding="utf-8")
    with pytest.raises(ArgumentError, match="`--separator` must be one token"):
        ask(folder, "questions.txt", database=folder / "fields.txt", separator="|")
    _, lines = ask(
        folder,
        "questions.txt",
        database=folder / "names.txt",
        separator="天",
        params=("lookahead=true", "after=1"),
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["questions.txt"], {}, "`--database` must name the entries"),
        (["questions.txt"], {"database": "missing.txt"}, "does not exist"),
        (["questions.txt"], {"database": "empty.txt"}, "holds no entries"),
        (["gap.txt"], {"database": "names.txt"}, "Line 2 of .* must be a question"),
        (["questions.txt"], {"database": "other.safetensors"}, "index of another vocabulary"),
    ],
)
def test_what_cannot_be_answered_is_said(
    folder: Path, files: list[str], options: dict[str, Any], message: str
) -> None:
    (folder / "empty.txt").write_text("\n\n")
    (folder / "gap.txt").write_text("明\n\n天\n", encoding="utf-8")
    TrieIndex.build([[5]], 3).save(folder / "other.safetensors")
    placed = {name: folder / value for name, value in options.items()}
    with pytest.raises((ArgumentError, FileFormatError), match=message):
        ask(folder, *files, **placed)


def test_without_a_model_it_says_how_to_make_one() -> None:
    with pytest.raises(ArgumentError, match=r"kexue fit decoder/trie-beam pairs\.tsv -o model/"):
        execute(registry, Request(ID, files=["questions.txt"]))


def test_a_fitted_model_answers(folder: Path) -> None:
    lines = [line.split("\t")[0] for line in NAMES.splitlines() if line]
    pairs = [f"{line[:-1]}\t{line}" for line in lines] * 12
    (folder / "pairs.tsv").write_text("\n".join(pairs), encoding="utf-8")
    request = Request(
        ID,
        "fit",
        files=[str(folder / "pairs.tsv")],
        options={"epochs": 8, "batch_size": 8, "width": 24, "lr": 0.02},
        out=folder / "fitted",
        device="cpu",
    )
    _, result = execute(registry, request)
    json.dumps(result.summary)
    (folder / "model").rename(folder / "old")
    (folder / "fitted").rename(folder / "model")
    (folder / "cut.txt").write_text("\n".join(line[:-1] for line in lines), encoding="utf-8")
    _, answers = ask(folder, "cut.txt", database=folder / "names.txt")
    assert [line.split("\t")[2] for line in answers] == lines


# -- claims ----------------------------------------------------------------------------------------


def test_what_is_certain_holds_in_the_quick_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(Context, "seeds", (0,))
    report = names(Context(torch.get_default_device(), quick=True))
    holds = {claim.statement: claim.holds for claim in report.claims}
    assert holds["Decoding in the tree, all results are in the database."]
    assert holds["The tree takes far less memory than a vector for each entry."]
    assert len(holds) == 4


def test_the_generated_base_is_what_its_description_says() -> None:
    from random import Random

    subjects, facts = knowledge_module._base(Random(0))
    assert len(set(subjects)) == 400
    assert {fact.subject for fact in facts} == set(subjects)
    assert len(set(facts)) == len(facts)
    fact = facts[0]
    assert fact.entry("S, P, M") == f"{fact.subject}|{fact.property}|{fact.meaning}"
    assert fact.entry("S, M, P") == f"{fact.subject}|{fact.meaning}|{fact.property}"
