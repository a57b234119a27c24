"""Texts in, similarities out; the manifest; the peers."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kexue_wrd
from kexue.core.errors import ArgumentError, WorkError
from kexue_wrd import WordMoverSimilarity, WordRotatorSimilarity, WordVectors, wmd, wrd
from kexue_wrd.similarity import TransportSimilarity
from kexue_wrd.tokens import tokenizer

WORDS = ["obama", "speaks", "media", "illinois", "president", "greets", "press", "chicago", "nil"]
VECTORS = WordVectors(
    WORDS,
    torch.cat([torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 5)]),
)
CLASSES: list[type[TransportSimilarity]] = [WordMoverSimilarity, WordRotatorSimilarity]
classes = pytest.mark.parametrize("cls", CLASSES)


def rows(text: str) -> torch.Tensor:
    return VECTORS.vectors[[WORDS.index(word) for word in text.split()]]


def test_similarities_are_of_the_distances() -> None:
    a, b = "obama speaks media illinois", "president greets press chicago chicago"
    mover, rotator = WordMoverSimilarity(VECTORS), WordRotatorSimilarity(VECTORS)
    assert mover([a], [b]).item() == pytest.approx(-wmd(rows(a), rows(b)).item(), abs=1e-6)
    assert rotator([a], [b]).item() == pytest.approx(1 - wrd(rows(a), rows(b)).item(), abs=1e-6)
    torch.testing.assert_close(mover.distance([a], [b]), -mover([a], [b]))
    torch.testing.assert_close(rotator.distances([a], [b]), 1 - rotator.matrix([a], [b]))


@classes
@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    a=st.lists(st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=6), min_size=1, max_size=5),
    b=st.lists(st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=6), min_size=1, max_size=9),
    k=st.integers(1, 9),
)
def test_pairs_table_and_search_agree(
    cls: type[TransportSimilarity], a: list[list[str]], b: list[list[str]], k: int
) -> None:
    similarity = cls(VECTORS)
    table = similarity.matrix(a, b)
    pairs = [similarity([x], [y]).item() for x in a for y in b]
    assert table.flatten().tolist() == pytest.approx(pairs, abs=1e-12)
    values, indices = similarity.search(a, b, k)
    wanted = table.sort(dim=1, descending=True, stable=True).values[:, :k]
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(table.gather(1, indices), values, rtol=0, atol=1e-12)


@classes
def test_texts_that_are_empty_unknown_or_equal(cls: type[TransportSimilarity]) -> None:
    similarity = cls(VECTORS)
    inf = math.inf
    a = ["", "xyz", "xyz qrs", "Obama speaks", "press", "obama xyz"]
    b = ["", "abc", "qrs xyz", "speaks obama", "press", "obama abc"]
    assert similarity.distance(a, b).tolist() == [0, inf, 0, 0, 0, 0]
    table = similarity.distances(a, b)
    assert table[0].tolist() == [0, inf, inf, inf, inf, inf]
    assert table[2].tolist() == [inf, inf, 0, inf, inf, inf]
    assert table[4, 3].isfinite()
    values, indices = similarity.nearest(a, b, 2)
    assert indices[:3].tolist() == [[0, 1], [0, 1], [2, 0]]
    assert values[:3].tolist() == [[0, inf], [inf, inf], [0, inf]]
    assert similarity.statistics["unknown_words"] == 8
    assert similarity.statistics["pairs"] == 36


def test_a_zero_vector_is_unknown_to_wrd_only() -> None:
    assert WordRotatorSimilarity(VECTORS).distance(["nil"], ["press"]).tolist() == [math.inf]
    found = WordMoverSimilarity(VECTORS).distance(["nil"], ["press"]).item()
    assert found == pytest.approx(rows("press").norm().item())


@classes
def test_normalize(cls: type[TransportSimilarity]) -> None:
    a, b = "obama speaks speaks", "press chicago"
    unit = [rows(t) / rows(t).norm(dim=1, keepdim=True) for t in (a, b)]
    expected = (wmd if cls is WordMoverSimilarity else wrd)(*unit)
    found = cls(VECTORS, normalize=True).distance([a], [b])[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


@classes
def test_sinkhorn_is_as_near_as_it_says(cls: type[TransportSimilarity]) -> None:
    a = ["obama speaks media illinois", "press", "", "xyz"]
    b = ["president greets press chicago chicago", "media press", "", "xyz"]
    near = cls(VECTORS, solver="sinkhorn")
    for ask in ("distance", "distances"):
        exact = getattr(cls(VECTORS), ask)(a, b)
        found = getattr(near, ask)(a, b)
        error = near.statistics["largest_error"]
        assert 0 < error < 0.1
        finite = exact.isfinite()
        assert torch.equal(finite, found.isfinite())
        assert (found >= exact - 1e-9)[finite].all()
        assert (found <= exact + error + 1e-9)[finite].all()
    values, indices = near.nearest(a, b, 2)
    torch.testing.assert_close(near.distances(a, b).gather(1, indices), values)


def test_stop_words_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "stop.txt").write_text("Media\n\nillinois\n")
    for given_words in (["media", "ILLINOIS"], str(tmp_path / "stop.txt")):
        similarity = WordMoverSimilarity(VECTORS, stop_words=given_words)
        assert similarity(["Obama speaks media"], ["Illinois obama speaks"]).tolist() == [0]
        assert similarity.statistics["unknown_words"] == 0
    assert WordMoverSimilarity(VECTORS, stop_words="english")(["the press"], ["press"]).item() == 0
    with pytest.raises(ArgumentError, match=r"'english' or a file.* Found 'nowhere.txt'"):
        WordMoverSimilarity(stop_words="nowhere.txt")


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("words", "It's 3 o’clock, Émile_2!", ["It's", "3", "o’clock", "Émile_2"]),
        ("words", "深度learning模型", ["深", "度", "learning", "模", "型"]),
        ("words", "", []),
        ("spaces", " a,b  c\t", ["a,b", "c"]),
        ("characters", "ab 你\n", ["a", "b", "你"]),
    ],
)
def test_tokens(name: str, text: str, tokens: list[str]) -> None:
    assert list(tokenizer(name)(text)) == tokens


def test_tokens_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def split(text):\n    return text.split('|')\n\nNUMBER = 3\n")
    for given_tokens in (f"{path}:split", lambda text: text.split("|")):
        found = WordMoverSimilarity(VECTORS, tokens=given_tokens)
        assert found.distance(["obama|press"], ["press|obama"]).tolist() == [0]
    with pytest.raises(ArgumentError, match="must name a function"):
        tokenizer(f"{path}:NUMBER")
    with pytest.raises(ArgumentError, match="Did you mean 'words'"):
        tokenizer("word")
    with pytest.raises(WorkError, match="nowhere could not be imported"):
        tokenizer("nowhere:split")


@classes
def test_without_vectors_they_are_made_from_the_texts(
    cls: type[TransportSimilarity], tmp_path: Path
) -> None:
    a = ["the cat sat on the mat", "stocks fell in May"]
    b = ["the cat lay on the mat", "shares fell in May"]
    similarity = cls(dimensions=8)
    table = similarity.matrix(a, b)
    assert (table.diagonal() > table.flip(0).diagonal()).all()
    torch.testing.assert_close(table.diagonal(), similarity(a, b))
    (tmp_path / "corpus.txt").write_text("one two three\ntwo three four\n")
    found = cls(corpus=str(tmp_path / "corpus.txt"), dimensions=4)
    assert found.distance(["one"], ["two"]).isfinite().all()
    with pytest.raises(ArgumentError, match="Give word vectors, or more text"):
        cls()(["one"], ["two"])


@classes
def test_copies(cls: type[TransportSimilarity]) -> None:
    similarity = cls(VECTORS, stop_words="english")
    a, b = ["obama speaks"], ["press chicago"]
    thawed = pickle.loads(pickle.dumps(similarity))  # noqa: S301  # what was just dumped
    for twin in (copy.deepcopy(similarity), thawed):
        assert torch.equal(twin(a, b), similarity(a, b))


@classes
def test_many_lengths_at_once(cls: type[TransportSimilarity]) -> None:
    rng = np.random.default_rng(0)
    texts = [[WORDS[i] for i in rng.integers(0, 8, n)] for n in (1, 40, 2, 300, 3)]
    similarity = cls(VECTORS)
    torch.testing.assert_close(similarity.matrix(texts, texts).diagonal(), similarity(texts, texts))


@pytest.mark.parametrize(
    ("params", "argument", "message"),
    [
        ({"solver": "fast"}, "solver", "'exact' or 'sinkhorn'. Found 'fast'"),
        ({"tokens": "letters"}, "tokens", "Found 'letters'"),
    ],
)
def test_rejects_arguments(params: dict[str, str], argument: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        WordMoverSimilarity(**params)  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_rejects_inputs() -> None:
    similarity = WordMoverSimilarity(VECTORS)
    with pytest.raises(ArgumentError, match=r"as many texts as `a`, 1\. Found 2"):
        similarity(["a"], ["a", "b"])
    with pytest.raises(ArgumentError, match=r"`a` must be a list of texts\. Found one text"):
        similarity("obama", "media")
    with pytest.raises(ArgumentError, match=r"`k` must be at least 1\. Found 0"):
        similarity.search(["obama"], ["media"], 0)


# -- beside gensim --------------------------------------------------------------------------------


def test_agrees_with_gensim_where_gensim_has_an_answer() -> None:
    keyed = pytest.importorskip("gensim.models").KeyedVectors(5)
    keyed.add_vectors(WORDS[:8], VECTORS.vectors[:8].numpy())
    rng = np.random.default_rng(0)
    texts = [[WORDS[i] for i in rng.integers(0, 8, n)] for n in (1, 1, 2, 3, 5, 8, 13)]
    ours = WordMoverSimilarity(VECTORS).distances(texts, texts)
    unit = WordMoverSimilarity(VECTORS, normalize=True).distances(texts, texts)
    for i, x in enumerate(texts):
        for j, y in enumerate(texts):
            if i == j:  # gensim gives infinity, or a remainder, where nothing is to be moved
                assert ours[i, j] == unit[i, j] == 0
            else:
                assert ours[i, j] == pytest.approx(keyed.wmdistance(x, y, norm=False), abs=1e-6)
                assert unit[i, j] == pytest.approx(keyed.wmdistance(x, y), abs=1e-6)


def test_gensim_says_infinity_for_equal_vectors_and_we_do_not() -> None:
    keyed = pytest.importorskip("gensim.models").KeyedVectors(2)
    keyed.add_vectors(["car", "auto"], np.ones((2, 2), dtype=np.float32))
    assert keyed.wmdistance(["car"], ["auto"]) == math.inf
    vectors = WordVectors(["car", "auto"], torch.ones(2, 2))
    assert WordMoverSimilarity(vectors).distance(["car"], ["auto"]).tolist() == [0]


# -- the package ----------------------------------------------------------------------------------


def test_manifest_names_what_exists() -> None:
    components = kexue_wrd.kexue_components()
    assert {component.id for component in components} == {"similarity/wmd", "similarity/wrd"}
    assert {component.target.rpartition(":")[2] for component in components} == {
        "WordMoverSimilarity",
        "WordRotatorSimilarity",
    }
    assert all(hasattr(kexue_wrd, name) for name in kexue_wrd.__all__)


def test_manifest_is_light() -> None:
    code = "import sys, kexue_wrd; print(sorted({'torch', 'numpy', 'ot'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
