"""``kexue run decoder/trie-beam --model … --database …``: questions to entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.files import read_lines
from kexue.core.job import Job, Result
from kexue.core.lab.texts import TextModel, load_text_model
from kexue.core.language import Vocabulary, pad_ids
from kexue_trie_decoding.index import TrieIndex
from kexue_trie_decoding.trie_beam import TrieBeam

__all__ = ["apply", "run"]

_AT_ONCE = 64  # questions


def run(job: Job) -> Result:
    """Answer questions with entries of a database: ``--model``, ``--database``, and the questions.

    A model is fitted to pairs of a question and its entry, a tab between them, or is a folder of
    transformers. Questions are lines of files or of standard input; for each are printed the
    question, the probability of the entry among all entries, the entry, and what the database says
    of it, with tabs between.

    Args:
        job: The call.
    """
    raise ArgumentError(
        f"{job.id} answers by a language model: `kexue fit {job.id} pairs.tsv -o model/` makes "
        f"one, then `kexue run {job.id} --model model/ --database names.txt questions.txt`.",
        argument="model",
    )


def apply(
    job: Job,
    *,
    database: str | None = None,
    separator: str | None = None,
    save_index: str | None = None,
) -> Result:
    """Answer questions with entries of a database.

    Args:
        job: The call.
        database: The entries: lines of text, what follows a tab is what is known of the entry; or
            the .safetensors file of an index.
        separator: The character between the fields of an entry, for the look-ahead.
        save_index: Write the tree of the database to this .safetensors file.
    """
    for name in ("database", "end_id", "separator_id"):
        if name in job.params:
            raise ArgumentError(
                f"`{name}` is not set here: `--database FILE` and `--separator CHARACTER` say it.",
                argument=name,
            )
    if database is None:
        raise ArgumentError(
            f"`--database` must name the entries that {job.id} may answer with, a line each. "
            f"Found none.",
            argument="database",
        )
    model = load_text_model(job.model or Path(), device=job.device, dtype=job.dtype)
    with job.progress.task("reading the database"):
        entries = _Entries.read(database, model.vocabulary)
    if save_index is not None:
        entries.index.save(save_index)
    decoder: Any = dataclasses.replace(job, weights=None).build(
        database=entries.index.to(job.device),
        separator_id=_separator_id(separator, model.vocabulary),
    )
    summary = {
        "entries": len(entries.index),
        "rows": entries.index.num_rows,
        "nodes": entries.index.num_nodes,
        "rows_with_unknown_tokens": entries.unknown,
        "questions": 0,
    }
    questions = _questions(job.files)
    at_once = _AT_ONCE if job.files and "-" not in job.files else 1  # who types wants an answer
    return Result(summary, lines=_answers(decoder, model, entries, questions, at_once, summary))


class _Entries:
    """The database as the model's tokens, and as its own text.

    Args:
        index: The tree.
        texts: The rows; None if they are in the index alone.
        known: What is known of each row.
        unknown: How many rows hold a token that the model does not know.
    """

    def __init__(
        self, index: TrieIndex, texts: list[str] | None, known: list[str], unknown: int
    ) -> None:
        self.index, self.texts, self.known, self.unknown = index, texts, known, unknown

    @classmethod
    def read(cls, path: str, vocabulary: Vocabulary) -> _Entries:
        end_id = vocabulary.eos_id
        if end_id is None:
            raise ArgumentError(
                "`model` must have an end token, by which an entry is whole. Found none in its "
                "vocabulary.",
                argument="model",
            )
        if Path(path).suffix == ".safetensors":
            index = TrieIndex.load(path)
            if index.end_id != end_id or index.num_tokens > vocabulary.size:
                raise FileFormatError(
                    f"{path} is the index of another vocabulary: its end token is "
                    f"{index.end_id} of {index.num_tokens} or more, the model's {end_id} of "
                    f"{vocabulary.size}. Give the database as text.",
                    path=path,
                )
            return cls(index, None, [], 0)
        lines = [line.partition("\t") for line in read_lines(path) if line.strip()]
        if not lines:
            raise FileFormatError(f"{path} holds no entries: nothing could be found.", path=path)
        texts = [text.strip() for text, _, _ in lines]
        ids = [vocabulary.encode(text) for text in texts]
        unknown = _unknown_id(vocabulary)
        with_unknown = sum(unknown in row for row in ids) if unknown is not None else 0
        known = [what for _, _, what in lines]
        return cls(TrieIndex.build(ids, end_id), texts, known, with_unknown)

    def say(self, entry: int, vocabulary: Vocabulary) -> tuple[str, str]:
        """Return the text of an entry, and what is known of it; of equal rows, all of it."""
        if self.texts is None:
            (ids,) = self.index.sequences(torch.tensor([entry], device=self.index.device)).tolist()
            return vocabulary.decode(ids), ""
        rows = self.index.rows_of(entry)
        texts = dict.fromkeys(self.texts[row] for row in rows)  # unknown tokens are all alike
        known = dict.fromkeys(self.known[row] for row in rows if self.known[row])
        return " | ".join(texts), " | ".join(known)


def _unknown_id(vocabulary: Any) -> int | None:
    tokenizer = getattr(vocabulary, "tokenizer", None)
    found = getattr(vocabulary, "unknown_id", getattr(tokenizer, "unk_token_id", None))
    return None if found is None else int(found)


def _separator_id(separator: str | None, vocabulary: Vocabulary) -> int | None:
    if separator is None:
        return None
    ids = vocabulary.encode(separator)
    if len(ids) != 1 or ids[0] == _unknown_id(vocabulary):
        raise ArgumentError(
            f"`--separator` must be one token that the model knows. Found {separator!r}.",
            argument="separator",
        )
    return ids[0]


def _questions(files: Iterable[str]) -> Iterator[str]:
    for path in files or ("-",):
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                raise FileFormatError(
                    f"Line {number} of {path} must be a question. It is empty.", path=path
                )
            yield line.strip()


def _answers(  # noqa: PLR0917
    decoder: TrieBeam,
    model: TextModel,
    entries: _Entries,
    questions: Iterator[str],
    at_once: int,
    summary: dict[str, Any],
) -> Iterator[str]:
    """Yield question, probability, entry and what is known of it, as they come; count them."""
    device = next(model.model.parameters()).device
    while batch := list(islice(questions, at_once)):
        prompt, mask = pad_ids([model.vocabulary.encode(line) for line in batch], device=device)
        found = decoder.decode(model.scorer(), prompt=prompt, mask=mask)
        places = decoder.index.find(found.sequences).tolist()
        chances = found.scores.exp().tolist()
        for i, (entry, chance) in enumerate(zip(places, chances, strict=True)):
            if chance > 0 or i % decoder.num_return == 0:
                text, known = entries.say(entry, model.vocabulary)
                line = f"{batch[i // decoder.num_return]}\t{chance:.4g}\t{text}"
                yield line + (f"\t{known}" if known else "")
        summary["questions"] += len(batch)
