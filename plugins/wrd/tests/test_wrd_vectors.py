"""Vectors from files, and made from text."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kexue.core.errors import ArgumentError, FileFormatError
from kexue_wrd import WordRotatorSimilarity, WordVectors, fit_vectors

ROWS = {"cat": [1.0, 0.5, -2.0], "Dog": [0.25, 3.0, 0.0], "犬": [1e-3, 4.0, 5.5]}


def as_text(header: bool = False) -> str:
    lines = [f"{word} {' '.join(map(str, row))}" for word, row in ROWS.items()]
    return "\n".join([*(["3 3"] if header else []), *lines]) + "\n"


def as_binary(newlines: bool = True) -> bytes:
    rows = [
        word.encode() + b" " + struct.pack("<3f", *row) + (b"\n" if newlines else b"")
        for word, row in ROWS.items()
    ]
    return b"3 3\n" + b"".join(rows)


def check(found: WordVectors) -> None:
    assert found.words == list(ROWS)
    torch.testing.assert_close(found.vectors, torch.tensor(list(ROWS.values())))


@pytest.mark.parametrize("header", [True, False])
def test_text_with_and_without_a_header(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(as_text(header), encoding="utf-8")
    check(WordVectors.load(path))


@pytest.mark.parametrize("newlines", [True, False])
def test_binary(tmp_path: Path, newlines: bool) -> None:
    path = tmp_path / "vectors.bin"
    path.write_bytes(as_binary(newlines))
    check(WordVectors.load(path))


@pytest.mark.parametrize("binary", [True, False])
def test_what_gensim_writes(tmp_path: Path, binary: bool) -> None:
    keyed = pytest.importorskip("gensim.models").KeyedVectors(3)
    keyed.add_vectors(list(ROWS), np.array(list(ROWS.values()), dtype=np.float32))
    path = tmp_path / ("v.bin" if binary else "v.vec")
    keyed.save_word2vec_format(str(path), binary=binary)
    check(WordVectors.load(path))
    keyed.save(str(tmp_path / "v.kv"))
    with pytest.raises(FileFormatError, match=r"v\.kv is a pickle.*save_word2vec_format"):
        WordVectors.load(tmp_path / "v.kv")


def test_a_word_may_hold_spaces(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("a 1 2\n. . . 3 4\n\n", encoding="utf-8")
    assert WordVectors.load(path).words == ["a", ". . ."]


@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_only_the_words_that_are_wanted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(as_binary() if name == "v.bin" else as_text().encode())
    assert WordVectors.load(path, only={"CAT", "Dog", "bird"}).words == ["cat", "Dog"]
    with pytest.raises(FileFormatError, match="no vectors of the words of these texts"):
        WordVectors.load(path, only={"bird"})


@pytest.mark.parametrize("named", [True, False])
def test_an_array_with_its_words(tmp_path: Path, named: bool) -> None:
    np.save(tmp_path / "v.npy", np.array(list(ROWS.values()), dtype=np.float32))
    words = tmp_path / ("words.list" if named else "v.txt")
    words.write_text("\n".join(ROWS), encoding="utf-8")
    check(WordVectors.load(tmp_path / "v.npy", vocabulary=words if named else None))
    words.write_text("one\ntwo\n")
    with pytest.raises(FileFormatError, match=r"each of the 2 words.* Found shape \[3, 3\]"):
        WordVectors.load(tmp_path / "v.npy", vocabulary=words)
    words.unlink()
    with pytest.raises(FileFormatError, match=r"v\.npy needs the words|does not exist"):
        WordVectors.load(tmp_path / "v.npy", vocabulary=words if named else None)


def language_model(folder: Path, *, shards: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A folder such as transformers' ``save_pretrained`` writes it, with four word pieces."""
    folder.mkdir()
    vocabulary = {"[UNK]": 0, "un": 1, "##happy": 2, "cat": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
    defaults = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({**defaults, **tokenizer}))
    weights = {
        "bert.embeddings.word_embeddings.weight": torch.eye(4, 5).to(dtype),
        "bert.embeddings.position_embeddings.weight": torch.ones(9, 5),
    }
    name = "model-00001-of-00001.safetensors" if shards else "model.safetensors"
    save_file(weights, folder / name)
    if shards:
        index = {"weight_map": dict.fromkeys(weights, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model(tmp_path: Path, shards: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("tokenizers")
    folder = language_model(tmp_path / "model", shards=shards, dtype=dtype)
    found = WordVectors.load(folder)
    assert found.words == ["[UNK]", "un", "##happy", "cat"]
    assert torch.equal(found.vectors, torch.eye(4, 5))
    assert found.pieces is not None
    assert found.pieces("Unhappy cat") == ["un", "##happy", "cat"]
    for given in (str(folder), found):
        similarity = WordRotatorSimilarity(given)
        assert similarity(["unhappy CAT"], ["happy cat"]).item() == pytest.approx(1 / 3)
        assert similarity.matrix(["cat"], ["un", "cat"]).tolist() == [[0, 1]]


def test_a_language_model_that_is_not_whole(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    folder = language_model(tmp_path / "model", shards=False)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(FileFormatError, match="no embedding matrix of a known name"):
        WordVectors.load(folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(FileFormatError, match=r"model\.safetensors is not whole"):
        WordVectors.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"holds no model\.safetensors\. Pickled weights"):
        WordVectors.load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FileFormatError, match="is no index of weights"):
        WordVectors.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"tokenizer\.json is not a tokenizer"):
        WordVectors.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileFormatError, match=r"tokenizer\.json does not exist"):
        WordVectors.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", b"", "v.txt is empty"),
        ("v.txt", b"cat 1 2\ndog 1\n", "line 2 must be a word and 2 numbers.* Found 1"),
        ("v.txt", b"cat 1 2\ndog 1 two\n", "line 2: could not convert string to float: 'two'"),
        ("v.txt", b"cat 1 nan\n", "must be finite. That of 'cat' is not"),
        ("v.txt", b"cat\n", "line 1 must be a word and some numbers"),
        ("v.txt", b"caf\xe9 1 2\n", "line 1 is not UTF-8"),
        ("v.txt", b"3 3\n", "holds no vectors"),
        ("v.txt", b"\x80\x04K\x01.", "is a pickle.*never loaded"),
        ("v.bin", b"PK\x03\x04....", "is a pickle.*never loaded"),
        ("v.bin", as_binary()[:-10], "ends within word 3 of 3"),
        ("v.bin", b"cat 1 2 3\n", "not in word2vec's binary format"),
        ("v.bin", b"no line at all", "not in word2vec's binary format"),
        ("v.npy", b"\x93NUMPY garbage", "not a whole .npy file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        WordVectors.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text("a 1\n")
    with pytest.raises(FileFormatError, match=r"does not exist\. Did you mean 'vectors\.txt'"):
        WordVectors.load(tmp_path / "vector.txt")


def test_look_up() -> None:
    found = WordVectors(["the", "The", "cat", "cat"], torch.eye(4))
    assert [found.place(word) for word in ("the", "The", "THE", "cat", "dog")] == [0, 1, 0, 2, None]


@pytest.mark.parametrize("vectors", [torch.ones(3, 2), torch.ones(2), torch.ones(2, 0)])
def test_rejects_shapes(vectors: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="one row for each of 2 words"):
        WordVectors(["a", "b"], vectors)


# -- made from text -------------------------------------------------------------------------------

TEXTS = [
    text.split()
    for text in ("the cat sat down", "the dog sat down", "a bird flew up high", "a kite flew up")
]


def test_words_of_like_company_are_near() -> None:
    found = fit_vectors(TEXTS, dimensions=6)
    cat, dog, bird = (found.vectors[found.words.index(w)] for w in ("cat", "dog", "bird"))
    assert torch.cosine_similarity(cat, dog, dim=0) > 0.9
    assert torch.cosine_similarity(cat, bird, dim=0).abs() < 0.1


def test_the_vectors_factorise_the_mutual_information() -> None:
    texts = [["a", "b", "c"], ["a", "b"], ["c", "d"]]
    found = fit_vectors(texts, dimensions=4, window=1, norms="factors")
    counts = np.array([[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=float)
    margins = counts.sum(0)
    with np.errstate(divide="ignore"):
        wanted = np.log(counts * counts.sum() / np.outer(margins, margins)).clip(min=0)
    squares = wanted @ wanted.T  # U S U' squared: what is known of U sqrt(S), whatever its signs
    gram = (found.vectors @ found.vectors.T).numpy()
    np.testing.assert_allclose(gram @ gram, squares, atol=1e-12)
    informed = fit_vectors(texts, dimensions=4, window=1).vectors
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(informed), unit(found.vectors))
    shares = np.array([2, 2, 2, 1]) / 7
    np.testing.assert_allclose(informed.norm(dim=1).numpy(), -np.log(shares))


def test_texts_do_not_run_into_each_other() -> None:
    found = fit_vectors([["a", "b"], ["c", "d"]], dimensions=4)
    gram = found.vectors @ found.vectors.T
    assert gram[:2, 2:].abs().max() < 1e-12


def test_sparse_and_dense_factors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [[f"w{i}" for i in rng.integers(0, 60, 12)] for _ in range(80)]
    dense = fit_vectors(texts, dimensions=10).vectors
    monkeypatch.setattr("kexue_wrd.cooccurrence._DENSE", 10)
    sparse = fit_vectors(texts, dimensions=10).vectors
    torch.testing.assert_close(dense @ dense.T, sparse @ sparse.T)
    torch.testing.assert_close(sparse, fit_vectors(texts, dimensions=10).vectors, rtol=0, atol=0)


def test_case_is_folded() -> None:
    assert fit_vectors([["The", "cat"], ["the", "Cat"]]).words == ["cat", "the"]


@pytest.mark.parametrize("texts", [[], [[]], [["one"], ["two"]]])
def test_nothing_to_learn_from(texts: list[list[str]]) -> None:
    with pytest.raises(ArgumentError, match="Give word vectors, or more text"):
        fit_vectors(texts)


@pytest.mark.parametrize("name", ["dimensions", "window"])
def test_rejects_sizes(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{name}` must be at least 1. Found 0"):
        fit_vectors(TEXTS, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"'information' or 'factors'\. Found 'l2'"):
        fit_vectors(TEXTS, norms="l2")  # type: ignore[arg-type]
