"""Embedded data, the reference encoder, taggers and what they are measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.lab.data import (
    digits,
    looks_like_conll,
    segmentation,
    segmented,
    sentences,
    text,
)
from kexue.core.lab.models import CharacterEncoder, SoftmaxTagger
from kexue.core.lab.segmentation import illegal_pairs
from kexue.core.lab.tagging import Tagger, span_f1, spans, tag_names

words = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=8)


# -- data -----------------------------------------------------------------------------------------


def test_text_parts_share_no_line() -> None:
    lines = text()
    parts = [set(lines.train), set(lines.valid), set(lines.test)]
    assert min(map(len, parts)) > 100
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert all(len(line.split()) >= 3 for line in lines.train)


def test_segmentation_is_the_text_without_its_spaces() -> None:
    line = text().test[0]
    tokens, tags = segmentation().test[0]
    assert "".join(tokens) == line.replace(" ", "")
    assert len([tag for tag in tags if tag in "BS"]) == len(line.split())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(words)
def test_segmented_words_can_be_read_back_from_the_tags(row: list[str]) -> None:
    tokens, tags = segmented(" ".join(row))
    found = ["".join(tokens[a:b]) for a, b, _ in sorted(spans(tags))]
    assert found == row
    assert illegal_pairs(tags) == 0


def test_text_reads_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"line number {i}\n" for i in range(30)) + "short\n")
    lines = text(path)
    assert len(lines.train) == 24
    assert len(lines.valid) == len(lines.test) == 3
    assert "short" not in lines.train


def test_digits_are_images_with_labels() -> None:
    found = digits()
    assert found.images.shape == (1797, 8, 8)
    assert found.images.min() == 0
    assert found.images.max() == 1
    assert set(found.labels.tolist()) == set(range(10))


def test_digits_read_a_users_array(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.zeros((4, 5, 5)))
    found = digits(tmp_path / "mine.npy")
    assert found.images.shape == (4, 5, 5)
    assert found.labels.shape == (0,)


CONLL = "Jim\tB-PER\nHenson I-PER\nwas O\n\n# a comment\nin O\nParis B-LOC\n"


def test_sentences_read_conll(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(CONLL)
    assert looks_like_conll(path)
    assert sentences(path) == [
        (["Jim", "Henson", "was"], ["B-PER", "I-PER", "O"]),
        (["in", "Paris"], ["O", "B-LOC"]),
    ]


def test_sentences_read_segmented_text(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("to be\n\nor not\n")
    assert not looks_like_conll(path)
    assert sentences(path)[1] == (list("ornot"), ["B", "E", "B", "M", "E"])
    assert sentences(path, "segmented") == sentences(path)


@pytest.mark.parametrize(
    ("content", "form", "words_"),
    [
        (b"", "auto", "holds no sentences"),
        (b"\n\n", "auto", "holds no sentences"),
        (b"Jim B-PER\nHenson\n", "conll", "line 2 must be a token and its tag"),
        (b"\xff\xfe\x00\x01", "segmented", "line 1 is not UTF-8"),
        (b"abc\x00def\n", "segmented", "line 1 is binary"),
    ],
    ids=["empty", "blank", "no tag", "garbage", "nul"],
)
def test_sentences_reject_a_bad_file(
    tmp_path: Path, content: bytes, form: str, words_: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=words_):
        sentences(path, form)


# -- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("I-PER I-LOC", {(0, 1, "PER"), (1, 2, "LOC")}),  # illegal, as conlleval reads it
        ("B-X M-X E-X S-Y", {(0, 3, "X"), (3, 4, "Y")}),
        ("B-X I-X L-X U-Y O", {(0, 3, "X"), (3, 4, "Y")}),
        ("B M E S B E", {(0, 3, ""), (3, 4, ""), (4, 6, "")}),
        ("M E E", {(0, 2, ""), (2, 3, "")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_spans_of_every_scheme(tags: str, wanted: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == wanted


def test_span_f1_counts_spans_and_tokens() -> None:
    found = span_f1([["B", "E", "S"]], [["B", "E", "B"]])
    assert found["precision"] == found["recall"] == 1.0
    assert found["accuracy"] == pytest.approx(2 / 3)
    found = span_f1([["B-X", "O"]], [["B-X", "B-Y"]])
    assert (found["precision"], found["recall"]) == (1.0, 0.5)
    assert found["f1"] == pytest.approx(2 / 3)


def test_span_f1_of_nothing_to_find() -> None:
    assert span_f1([["O"]], [["O"]])["f1"] == 1.0
    assert span_f1([["B-X"]], [["O"]])["f1"] == 0.0
    assert span_f1([], [])["accuracy"] == 1.0


# -- encoder and softmax --------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", [False, True])
def test_encoder_does_not_see_padding(spelled: bool) -> None:
    torch.manual_seed(0)
    encoder = CharacterEncoder(9, width=8, layers=3, words=spelled).eval()
    characters = torch.randint(1, 9, (1, 4, 3 if spelled else 1))
    alone = encoder(characters, torch.ones(1, 4, dtype=torch.bool))
    longer = torch.cat([characters, torch.zeros(1, 3, characters.shape[2], dtype=torch.long)], 1)
    batch = encoder(longer, torch.arange(7)[None] < 4)
    torch.testing.assert_close(batch[:, :4], alone)
    assert not batch[:, 4:].any()


def test_softmax_tagger_is_cross_entropy_and_argmax() -> None:
    example = SoftmaxTagger.example(generator=torch.Generator().manual_seed(0))
    emissions, tags, mask = (example.inputs[n] for n in ("emissions", "tags", "mask"))
    wanted = torch.nn.functional.cross_entropy(emissions[mask], tags[mask])
    found = SoftmaxTagger(4, reduction="token_mean")(emissions, tags, mask)
    torch.testing.assert_close(found, wanted)
    decoded = SoftmaxTagger(4).decode(emissions, mask=mask).tolist()
    assert decoded == [row[m].argmax(-1).tolist() for row, m in zip(emissions, mask, strict=True)]


# -- taggers --------------------------------------------------------------------------------------


def softmax_tagger(corpus: list[Any], **options: Any) -> Tagger:
    torch.manual_seed(0)
    return Tagger.for_corpus(
        corpus, lambda n: SoftmaxTagger(n, reduction="token_mean"), width=16, layers=1, **options
    )


SMALL = [segmented(line) for line in ("ab abc a", "abc a ab", "a ab abc", "ab ab a abc") * 3]
NAMED = [
    (["Jim", "went", "to", "Rome"], ["B-PER", "O", "O", "B-LOC"]),
    (["Ann", "went", "to", "Paris"], ["B-PER", "O", "O", "B-LOC"]),
] * 6


@pytest.mark.parametrize("corpus", [SMALL, NAMED], ids=["characters", "words"])
def test_tagger_learns_what_it_is_shown(corpus: list[Any]) -> None:
    tagger = softmax_tagger(corpus)
    assert tagger.words == (corpus is NAMED)
    tagger.fit(corpus, corpus, epochs=30, batch_size=4, lr=2e-2)
    assert tagger.evaluate(corpus)["f1"] > 0.9
    rows = [tokens for tokens, _ in corpus]
    one_by_one = [tagger.predict([row])[0] for row in rows]
    assert tagger.predict(rows) == one_by_one


def test_tagger_keeps_the_text_it_segments() -> None:
    tagger = softmax_tagger(SMALL)
    lines = ["ab c", "", "  ", "xyz", "ünï", "a" * 300]
    found = tagger.segment(lines)
    assert [line.replace(" ", "") for line in found] == [line.replace(" ", "") for line in lines]


def test_tagger_without_a_recipe_for_its_head_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="head_config"):
        softmax_tagger(SMALL).save(tmp_path / "model")


def test_tag_names_are_those_that_occur() -> None:
    assert tag_names(NAMED) == ["B-LOC", "B-PER", "O"]
