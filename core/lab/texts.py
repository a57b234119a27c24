"""Language models on disk, fitted to text and read again: what text components run on.

``fit_causal``, ``fit_seq2seq`` and ``fit_masked`` are what a component's ``fit`` may be, in its
manifest; ``load_text_model`` reads what they wrote, or a folder of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kexue.core.errors import ArgumentError, FileFormatError, MissingDependencyError
from kexue.core.files import read_lines
from kexue.core.job import Job, Result
from kexue.core.lab.data import text
from kexue.core.lab.language import CharacterMaskedModel, CharacterModel, CharacterSeq2Seq
from kexue.core.language import (
    MaskedScorer,
    NextTokenScorer,
    TokenizerVocabulary,
    Vocabulary,
    masked_scorer,
    next_token_scorer,
)
from kexue.core.lines import detail
from kexue.core.training import CONFIG, Trainable, claim_folder, read_config

__all__ = [
    "TextModel",
    "alphabet_of",
    "fit_causal",
    "fit_masked",
    "fit_seq2seq",
    "fit_text_model",
    "held_out_pairs",
    "load_text_model",
    "prompts",
]

_FORMS: dict[str, type[CharacterModel | CharacterSeq2Seq | CharacterMaskedModel]] = {
    model.form: model for model in (CharacterModel, CharacterSeq2Seq, CharacterMaskedModel)
}
_EMBEDDED = "topics"


@dataclass(frozen=True)
class TextModel:
    """A language model and what turns text into its tokens.

    Args:
        model: The model, in evaluation mode.
        vocabulary: Text as ids and back.
        form: ``"causal"``, ``"seq2seq"`` or ``"masked"``.
    """

    model: Any
    vocabulary: Vocabulary
    form: str

    def scorer(self) -> NextTokenScorer:
        """Return the scores of next tokens."""
        return next_token_scorer(self.model)

    def masked_scorer(self) -> MaskedScorer:
        """Return the scores of masked tokens."""
        return masked_scorer(self.model, mask_id=self.vocabulary.mask_id)


def load_text_model(
    folder: str | Path,
    *,
    forms: tuple[str, ...] = ("causal", "seq2seq"),
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> TextModel:
    """Read a language model, of ``kexue fit`` or of transformers, without executing anything.

    Args:
        folder: What ``kexue fit`` wrote, or ``save_pretrained`` of a model and its tokenizer.
        forms: What will do: ``"causal"``, ``"seq2seq"``, ``"masked"``.
        device: Where; the default device if None.
        dtype: Of its weights; float32 if None.

    Raises:
        FileFormatError: If the folder holds no whole model.
        ArgumentError: If it holds one of another form.
        MissingDependencyError: If it is one of transformers, which is not installed.
    """
    path = Path(folder)
    if (path / "config.json").is_file() and not (path / CONFIG).is_file():
        found = _of_transformers(path, forms)
    else:
        config = read_config(path)
        form = config["model"].get("form") if isinstance(config["model"], dict) else None
        if form not in _FORMS:
            raise FileFormatError(
                f"{path} holds no language model: it was fitted with {config['component']}.",
                path=path,
            )
        _check_form(path, form, forms)
        model = _FORMS[form].load(path)
        found = TextModel(model, model.vocabulary, form)
    found.model.to(device=device, dtype=dtype or torch.float32).eval()
    return found


def _check_form(path: Path, form: str, forms: tuple[str, ...]) -> None:
    if form not in forms:
        raise ArgumentError(
            f"`model` must be a {' or '.join(forms)} language model. Found a {form} one in {path}.",
            argument="model",
        )


def _of_transformers(path: Path, forms: tuple[str, ...]) -> TextModel:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"The model in {path}", "transformers", "pip install transformers"
        ) from error
    config = _pretrained(transformers.AutoConfig, path)
    names = " ".join(getattr(config, "architectures", None) or ())
    form = (
        "masked"
        if "MaskedLM" in names
        else "seq2seq"
        if getattr(config, "is_encoder_decoder", False)
        else "causal"
    )
    _check_form(path, form, forms)
    kinds = {"masked": "MaskedLM", "seq2seq": "Seq2SeqLM", "causal": "CausalLM"}
    auto = getattr(transformers, f"AutoModelFor{kinds[form]}")
    model = _pretrained(auto, path, use_safetensors=True)
    return TextModel(
        model, TokenizerVocabulary(_pretrained(transformers.AutoTokenizer, path)), form
    )


def _pretrained(auto: Any, path: Path, **options: Any) -> Any:
    """Read one part of a folder of transformers, without executing or downloading anything."""
    from safetensors import SafetensorError

    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise FileFormatError(
            f"{path} holds no model and tokenizer of transformers: {detail(error)}.", path=path
        ) from error


def prompts(job: Job) -> Iterator[str]:
    """Yield the lines of the files that were named; standard input if there are none."""
    for path in job.files or ("-",):
        yield from read_lines(path)


# -- fitting -------------------------------------------------------------------------------------


def fit_causal(
    job: Job,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 3e-3,
    patience: int = 2,
    cell: str = "gru",
    width: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit a language model of characters to a text, each line on its own.

    The file is text, or ``topics`` for the embedded one; every tenth line is held out.

    Args:
        job: The call.
        epochs: Passes over the text, at most.
        batch_size: Lines per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement.
        cell: gru, rnn or transformer.
        width: Features per character.
        layers: Layers.
        dropout: Probability of dropping a feature in training.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    train, valid = _lines(job)
    torch.manual_seed(job.seed)
    sizes: dict[str, Any] = {"cell": cell, "width": width, "layers": layers, "dropout": dropout}
    if cell == "transformer":
        sizes["max_length"] = max(512, *map(len, train))
    model = CharacterModel(alphabet_of(train), **sizes)
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "patience": patience}
    return fit_text_model(job, model, train, valid, options, resume=resume, overwrite=overwrite)


def fit_seq2seq(
    job: Job,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 3e-3,
    patience: int = 3,
    width: int = 96,
    dropout: float = 0.1,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit a model from one text to another to pairs of texts.

    The file has a pair a line, a tab between source and target; every tenth is held out.

    Args:
        job: The call.
        epochs: Passes over the pairs, at most.
        batch_size: Pairs per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement.
        width: Features per character, even.
        dropout: Probability of dropping a feature in training.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    train, valid = held_out_pairs(job)
    torch.manual_seed(job.seed)
    model = CharacterSeq2Seq(alphabet_of(chain(*train)), width=width, dropout=dropout)
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "patience": patience}
    return fit_text_model(job, model, train, valid, options, resume=resume, overwrite=overwrite)


def fit_masked(
    job: Job,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 3e-3,
    patience: int = 3,
    width: int = 64,
    layers: int = 2,
    dropout: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Fit a masked language model of characters to a text, each line on its own.

    The file is text, or ``topics`` for the embedded one; every tenth line is held out.

    Args:
        job: The call.
        epochs: Passes over the text, at most.
        batch_size: Lines per step.
        lr: Learning rate of Adam.
        patience: Stop after this many epochs without improvement.
        width: Features per character, a multiple of 4.
        layers: Layers.
        dropout: Probability of dropping a feature in training.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    train, valid = _lines(job)
    torch.manual_seed(job.seed)
    longest = max(128, *map(len, train))
    model = CharacterMaskedModel(
        alphabet_of(train), width=width, layers=layers, dropout=dropout, max_length=longest
    )
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "patience": patience}
    return fit_text_model(job, model, train, valid, options, resume=resume, overwrite=overwrite)


def fit_text_model(
    job: Job,
    model: Trainable,
    train: list[Any],
    valid: list[Any],
    options: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> Result:
    """Fit a model that was just built, and report on it: the end of every ``fit`` on text.

    Args:
        job: The call.
        model: The model, which ``job.seed`` has initialised.
        train: What to fit to.
        valid: What to validate on.
        options: Further arguments of :meth:`~kexue.core.training.Trainable.fit`.
        resume: Go on with an interrupted run in the output folder.
        overwrite: Replace what is in the output folder.
    """
    folder = claim_folder(job, resume=resume, overwrite=overwrite)  # bad input has claimed nothing
    model.component = job.id
    history = model.to(job.device, job.dtype).fit(
        train, valid, seed=job.seed, folder=folder, resume=resume, progress=job.progress, **options
    )
    best = {f"best_{k.removeprefix('valid_')}": v for k, v in history.best.items()}
    summary = {
        "examples": len(train),
        "validation_examples": len(valid),
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        **{k: v for k, v in best.items() if k not in {"best_epoch", "best_seconds"}},
    }
    return Result(summary, files=(folder,))


def _lines(job: Job) -> tuple[list[str], list[str]]:
    given = job.one_file(f"a text, or '{_EMBEDDED}' for the embedded one")
    if given == _EMBEDDED and not Path(given).exists():
        embedded = text()
        return embedded.train, embedded.valid
    return _held_out([line.strip() for line in read_lines(given) if line.strip()], given)


def held_out_pairs(job: Job) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read the file of pairs, a tab between source and target; every tenth is held out.

    Args:
        job: The call.

    Returns:
        The pairs to fit to, and those to validate on.

    Raises:
        FileFormatError: If a line is no pair, or there are too few.
    """
    given = job.one_file("pairs of texts, a tab between source and target")
    pairs = []
    for number, line in enumerate(read_lines(given), 1):
        source, tab, target = line.partition("\t")
        if not line.strip():
            continue
        if not (source.strip() and tab and target.strip()) or "\t" in target:
            raise FileFormatError(
                f"Line {number} of {given} must be a source, a tab, and a target. "
                f"Found {line[:60]!r}.",
                path=given,
            )
        pairs.append((source.strip(), target.strip()))
    return _held_out(pairs, given)


def _held_out(rows: list[Any], path: str) -> tuple[list[Any], list[Any]]:
    """Hold every tenth example out for validation."""
    if len(rows) < 10:
        raise FileFormatError(
            f"{path} has {len(rows)} examples, too few to hold a tenth out. Give at least 10.",
            path=path,
        )
    return [row for i, row in enumerate(rows) if i % 10 != 9], rows[9::10]


def alphabet_of(texts: Iterable[str]) -> str:
    """Return the characters of some texts, each once, sorted."""
    return "".join(sorted({c for line in texts for c in line}))
