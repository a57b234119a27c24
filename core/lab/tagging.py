"""Taggers: an encoder of characters and a decoder with a loss, fitted to labelled text.

This is what ``kexue fit decoder/…`` trains and ``kexue run decoder/… --model`` applies.
"""

from __future__ import annotations

import select
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.files import read_conll, read_lines
from kexue.core.job import Job, Result
from kexue.core.lab.data import Sentence, looks_like_conll, segmentation, sentences
from kexue.core.lab.emissions import (
    EmissionModel,
    are_arrays,
    decode_emissions,
    read_labelled,
)
from kexue.core.lab.models import CharacterEncoder, integers, pad_spellings
from kexue.core.training import Examples, Trainable, claim_folder, read_config

__all__ = ["Tagger", "apply", "fit", "span_f1", "spans", "tag_names"]

Spans = set[tuple[int, int, str]]

_UNKNOWN = 1
_BATCH = 256  # sentences read ahead
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")


def spans(tags: Sequence[str]) -> Spans:
    """Return the spans that tags mark, as (start, end, type), ends exclusive.

    Reads BIO, BIOES, BILOU and BMES, typed (``B-PER``) or not, and makes sense of illegal
    sequences as conlleval does: a span also begins where its type changes or nothing was open.

    Example:
        >>> sorted(spans(["B", "E", "S"]))
        [(0, 2, ''), (2, 3, '')]
        >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC"]))
        [(0, 2, 'PER'), (3, 4, 'LOC')]
    """
    found: Spans = set()
    start, open_type = 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        outside = prefix == "O"
        continues = open_type == kind and prefix not in _BEGINS and not outside
        if open_type is not None and not continues:
            found.add((start, i, open_type))
            open_type = None
        if not outside and open_type is None:
            start, open_type = i, kind
        if prefix in _ENDS and open_type is not None:
            found.add((start, i + 1, open_type))
            open_type = None
    return found


def span_f1(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> dict[str, float]:
    """Compare tag sequences by their spans, and token by token.

    Returns:
        ``precision``, ``recall`` and ``f1`` over spans, ``accuracy`` over tokens; each is 1 when
        there is nothing to find and nothing was found.
    """
    hits = found = wanted = right = tokens = 0
    for ours, theirs in zip(predicted, gold, strict=True):
        a, b = spans(ours), spans(theirs)
        hits, found, wanted = hits + len(a & b), found + len(a), wanted + len(b)
        right += sum(x == y for x, y in zip(ours, theirs, strict=True))
        tokens += len(theirs)
    precision = hits / found if found else float(not wanted)
    recall = hits / wanted if wanted else float(not found)
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "accuracy": right / tokens if tokens else 1.0,
    }


class _Ids(dict[str, int]):
    """A dict that has a number for what it does not hold, so that reading it needs no call."""

    def __init__(self, known: Iterable[tuple[str, int]], *, unknown: int = _UNKNOWN) -> None:
        super().__init__(known)
        self.unknown = unknown

    def __missing__(self, key: str) -> int:
        return self.unknown


class Tagger(Trainable):
    """Tokens to tags: a character encoder, a linear layer, and a head that knows about sequences.

    Args:
        head: A module that is both a Loss of (emissions, tags, mask) and a Decoder.
        tags: The tags, in the order of the head's indices.
        alphabet: The characters that the encoder knows.
        words: Whether tokens have several characters.
        width: Features per token.
        layers: Convolutions of the encoder.
        dropout: Probability of dropping a feature in training.
        head_config: What the head was built from, ``{use: id, with: {…}}``; needed to save.
    """

    objective: ClassVar[tuple[str, str]] = ("f1", "max")

    def __init__(
        self,
        head: nn.Module,
        *,
        tags: Sequence[str],
        alphabet: str,
        words: bool = False,
        width: int = 64,
        layers: int = 3,
        dropout: float = 0.1,
        head_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tags = list(tags)
        self.alphabet = alphabet
        self.words = words
        self._sizes = {"width": width, "layers": layers, "dropout": dropout}
        self._head_config = head_config
        # A tag that only held-out data has cannot be learnt or predicted; it stands as the first.
        self._tag_ids = _Ids(((tag, i) for i, tag in enumerate(self.tags)), unknown=0)
        self._ids = _Ids((character, i + 2) for i, character in enumerate(alphabet))
        self.encoder = CharacterEncoder(
            len(alphabet) + 2, width=width, layers=layers, words=words, dropout=dropout
        )
        self.projection = nn.Linear(width, len(self.tags))
        self.head = head

    @classmethod
    def for_corpus(
        cls, corpus: Sequence[Sentence], make_head: Callable[..., nn.Module], **options: Any
    ) -> Self:
        """Build a tagger whose tags and alphabet are those of a corpus.

        Characters that occur once count as unknown, so that the unknown one is trained too.

        Args:
            corpus: Tokens and tags per sentence.
            make_head: Called with the number of tags.
            options: Further arguments of the constructor.
        """
        tags = tag_names(corpus)
        counts = Counter(c for tokens, _ in corpus for token in tokens for c in token)
        alphabet = "".join(sorted(c for c, n in counts.items() if n > 1))
        words = any(len(token) > 1 for tokens, _ in corpus for token in tokens)
        return cls(make_head(len(tags)), tags=tags, alphabet=alphabet, words=words, **options)

    def config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` needs.

        Raises:
            ArgumentError: If the tagger was built without ``head_config``.
        """
        if self._head_config is None:
            raise ArgumentError(
                "`head_config` of Tagger must say how its head is built, {use: id, with: {…}}, "
                "before it can be saved.",
                argument="head_config",
            )
        return {
            "head": dict(self._head_config),
            "tags": self.tags,
            "alphabet": self.alphabet,
            "words": self.words,
            **self._sizes,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the tagger; its head comes from the registry."""
        from kexue.core.registry import build

        sizes = {k: v for k, v in config.items() if k != "head"}
        return cls(build(config["head"]), **sizes, head_config=config["head"])

    # -- batches ------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Sentence]) -> dict[str, Tensor]:
        """Return the characters, tags and mask of some sentences."""
        batch = self._encode([tokens for tokens, _ in examples])
        mask = batch["mask"]
        tags = torch.zeros(mask.shape, dtype=torch.long)
        flat = chain.from_iterable(row for _, row in examples)
        tags[mask] = integers(map(self._tag_ids.__getitem__, flat))
        return {**batch, "tags": tags}

    def _encode(self, rows: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        characters, mask = pad_spellings(rows, self._ids.__getitem__)
        return {"characters": characters, "mask": mask}

    def size(self, example: Sentence) -> int:
        """Return the number of tokens."""
        return len(example[0])

    def emissions(self, characters: Tensor, mask: Tensor) -> Tensor:
        """Return the scores ``[batch, time, tag]`` that the head reads."""
        scores: Tensor = self.projection(self.encoder(characters, mask))
        return scores

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the head's loss."""
        emissions = self.emissions(batch["characters"], batch["mask"])
        loss: Tensor = self.head(emissions, batch["tags"], batch["mask"])
        return loss

    # -- use ----------------------------------------------------------------------------------

    def predict(self, rows: Sequence[Sequence[str]], *, batch_size: int = 64) -> list[list[str]]:
        """Return the tags of each sentence's tokens.

        Args:
            rows: Tokens per sentence; may be empty.
            batch_size: Sentences at a time, like lengths together.
        """
        device = self.projection.weight.device
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
        found: list[list[str]] = [[] for _ in rows]
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    batch = self._encode([rows[i] for i in chosen])
                    mask = batch["mask"].to(device)
                    emissions = self.emissions(batch["characters"].to(device), mask)
                    decoded = self.head.decode(emissions, mask=mask)  # type: ignore[operator]
                    for i, path in zip(chosen, decoded.tolist(), strict=True):
                        found[i] = [self.tags[t] for t in path]
        finally:
            self.train(training)
        return found

    def segment(self, lines: Sequence[str]) -> list[str]:
        """Return lines with a space between words; spaces that they have are ignored."""
        rows = [list("".join(line.split())) for line in lines]
        return [_joined(row, tags) for row, tags in zip(rows, self.predict(rows), strict=True)]

    def evaluate(self, examples: Examples, *, batch_size: int = 64) -> dict[str, float]:
        """Return precision, recall and F1 of spans, and the accuracy of tags."""
        predicted = self.predict([tokens for tokens, _ in examples], batch_size=batch_size)
        return span_f1(predicted, [tags for _, tags in examples])


def _joined(characters: Sequence[str], tags: Sequence[str]) -> str:
    if not characters:
        return ""
    cuts = sorted({0, *(start for start, _, _ in spans(tags))})
    ends = [*cuts[1:], len(characters)]
    return " ".join("".join(characters[a:b]) for a, b in zip(cuts, ends, strict=True))


def tag_names(corpus: Iterable[Sentence]) -> list[str]:
    """Return the tags that occur, sorted."""
    return sorted({tag for _, row in corpus for tag in row})


# -- the command line ------------------------------------------------------------------------


def fit(
    job: Job,
    *,
    valid: Path | None = None,
    form: str = "auto",
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 2e-3,
    patience: int = 3,
    width: int = 64,
    layers: int = 3,
    dropout: float = 0.1,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train a tagger on labelled text, or a decoder on emissions.

    The file is CoNLL (a token and its tag a line), or text with spaces between words, from which
    words are learnt; ``segmentation`` is the embedded corpus. Array files are emissions [batch,
    time, tag], tags [batch, time] (below zero behind the end) and perhaps a mask.

    Args:
        job: The call.
        valid: Labelled text to validate on; every tenth sentence of the file by default.
        form: How to read the files: auto, conll or segmented.
        epochs: Passes over the text, at most.
        batch_size: Sentences per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without a better F1.
        width: Features per character.
        layers: Convolutions of the encoder.
        dropout: Probability of dropping a feature in training.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    folder = claim_folder(job, resume=resume, overwrite=overwrite)
    model: Trainable
    if are_arrays(job.files):
        train, held_out = _held_out(read_labelled(job), job.files[0])
        params = job.fitting(num_tags=train[0][0].shape[-1], reduction="token_mean")
        torch.manual_seed(job.seed)
        model = EmissionModel(job.factory(**params), {"use": job.id, "with": params})
    else:
        train, held_out = _corpora(job, valid, form)
        names = tag_names(train)
        params = job.fitting(num_tags=len(names), tag_names=names, reduction="token_mean")
        torch.manual_seed(job.seed)
        model = Tagger.for_corpus(
            train,
            lambda _: job.factory(**params),
            width=width,
            layers=layers,
            dropout=dropout,
            head_config={"use": job.id, "with": params},
        )
    model.component = job.id
    history = model.to(job.device, job.dtype).fit(
        train,
        held_out,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        seed=job.seed,
        folder=folder,
        resume=resume,
        progress=job.progress,
    )
    best = {k.removeprefix("valid_"): v for k, v in history.best.items()}
    summary = {
        "sequences": len(train),
        "validation_sequences": len(held_out),
        **({"tags": model.tags} if isinstance(model, Tagger) else {}),
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        **{f"best_{k}": v for k, v in best.items() if k not in {"epoch", "seconds"}},
    }
    return Result(summary, files=(folder,))


def _corpora(job: Job, valid: Path | None, form: str) -> tuple[list[Sentence], list[Sentence]]:
    if form not in {"auto", "conll", "segmented"}:
        raise ArgumentError(
            f"`form` must be 'auto', 'conll' or 'segmented'. Found {form!r}.", argument="form"
        )
    path = job.one_file("the text to learn from, or 'segmentation' for the embedded corpus")
    if path == "segmentation" and not Path(path).exists():
        embedded = segmentation()
        return embedded.train, embedded.valid if valid is None else sentences(valid, form)
    corpus = sentences(path, form)
    if valid is not None:
        return corpus, sentences(valid, form)
    return _held_out(corpus, path)


def _held_out(rows: list[Any], path: str) -> tuple[list[Any], list[Any]]:
    """Hold every tenth example out for validation."""
    if len(rows) < 10:
        raise FileFormatError(
            f"{path} has {len(rows)} sequences, too few to hold a tenth out. Give at least 10, "
            f"or `--valid FILE` for text.",
            path=path,
        )
    return [row for i, row in enumerate(rows) if i % 10 != 9], rows[9::10]


def apply(job: Job, *, gold: Path | None = None, tags: bool = False) -> Result:
    """Tag or segment text, or decode emissions, with a fitted model.

    Text goes line by line; array files are emissions [batch, time, tag].

    Args:
        job: The call.
        gold: Labelled text to compare with; the F1 is reported.
        tags: Write every token with its tag, in CoNLL form, instead of words.
    """
    if job.model is None:
        raise ArgumentError(
            f"`kexue run {job.id}` on text needs `--model FOLDER`.", argument="model"
        )
    config = read_config(job.model)
    if config.get("component") != job.id:
        raise ArgumentError(
            f"{job.model} was fitted with {config.get('component')}. Run `kexue run "
            f"{config.get('component')} --model {job.model} …`.",
            argument="model",
        )
    if "alphabet" not in config["model"]:
        head: Any = EmissionModel.load(job.model).to(job.device, job.dtype).head
        return decode_emissions(job, head)
    tagger = Tagger.load(job.model).to(job.device, job.dtype)
    if are_arrays(job.files):
        return decode_emissions(job, tagger.head, tagger.tags)
    path = job.one_file("the text, or `-` for standard input") if job.files else "-"
    rows = _sentences_of(tagger, path)
    tags = tags or tagger.words
    if gold is None:
        return Result(lines=_rendered(tagger, rows, path, tags=tags))
    known = [row for row in rows if row]
    predicted = tagger.predict(known)
    reference = [row for _, row in sentences(gold)]
    if [len(row) for row in predicted] != [len(row) for row in reference]:
        raise ArgumentError(
            f"`gold` {gold} must have the sentences of {path}, token by token. Found "
            f"{len(reference)} sentences and {sum(map(len, reference))} tokens against "
            f"{len(predicted)} and {sum(map(len, predicted))}.",
            argument="gold",
        )
    lines = [
        line
        for row, found in zip(known, predicted, strict=True)
        for line in _written(row, found, tags=tags)
    ]
    return Result(span_f1(predicted, reference), lines=lines)


def _sentences_of(tagger: Tagger, path: str) -> Iterator[list[str]]:
    """Yield the tokens of each line, or of each sentence of a CoNLL file."""
    if path != "-" and looks_like_conll(path):
        yield from (tokens for tokens, _ in read_conll(path))
        return
    for line in read_lines(path):
        yield line.split() if tagger.words else list("".join(line.split()))


def _rendered(tagger: Tagger, rows: Iterable[list[str]], path: str, *, tags: bool) -> Iterator[str]:
    """Yield output lines; what standard input has ready is one batch, so it answers at once."""
    batch: list[list[str]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH or (path == "-" and not _more_is_ready()):
            yield from _tagged(tagger, batch, tags=tags)
            batch = []
    yield from _tagged(tagger, batch, tags=tags)


def _tagged(tagger: Tagger, batch: Sequence[list[str]], *, tags: bool) -> Iterator[str]:
    for row, found in zip(batch, tagger.predict(batch), strict=True):
        yield from _written(row, found, tags=tags)


def _written(row: Sequence[str], found: Sequence[str], *, tags: bool) -> Iterator[str]:
    if tags:
        yield from (f"{token}\t{tag}" for token, tag in zip(row, found, strict=True))
        yield ""
    else:
        yield _joined(row, found)


def _more_is_ready() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # Windows pipes, and what tests put in place of standard input
        return False
