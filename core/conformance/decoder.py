"""What decoders are asked."""

from __future__ import annotations

import tempfile

import torch

from kexue.core.component import PAD
from kexue.core.conformance.kit import Check, Subject, require
from kexue.core.errors import ArgumentError
from kexue.core.interfaces.decoder import DecodeResult

__all__ = ["checks"]


def result_form(subject: Subject) -> None:
    """Return a DecodeResult of whole numbers, padded behind the mask."""
    inputs = subject.inputs()
    found = subject.make().decode(**inputs)
    require(
        isinstance(found, DecodeResult), f"must be a DecodeResult. Found {type(found).__name__}"
    )
    require(
        found.sequences.dtype == torch.int64,
        f"sequences must be int64. Found {found.sequences.dtype}",
    )
    require(found.sequences.shape[0] == found.scores.shape[0], "one score per sequence")
    mask = inputs.get("mask")
    if mask is not None and mask.shape == found.sequences.shape and subject.axes("time"):
        require((found.sequences[~mask] == PAD).all(), f"masked positions must hold {PAD}")


def trains_a_tagger(subject: Subject) -> None:
    """Learn, be saved and be loaded as the head of a tagger."""
    from kexue.core.job import Job
    from kexue.core.lab.data import segmented
    from kexue.core.lab.tagging import Tagger, tag_names

    corpus = [segmented(line) for line in ("ab abc a", "abc a ab", "a ab abc", "ab ab a abc") * 4]
    names = tag_names(corpus)
    job = Job(subject.description, subject.target, torch.get_default_device(), torch.float32)
    params = job.fitting(num_tags=len(names), tag_names=names, reduction="token_mean")
    torch.manual_seed(0)
    tagger = Tagger.for_corpus(
        corpus,
        lambda _: subject.registry.create(subject.component, **params),
        width=16,
        layers=1,
        head_config={"use": f"{subject.component.owner}:{subject.component.id}", "with": params},
    )
    before = tagger.evaluate(corpus)["f1"]
    tagger.fit(corpus, corpus, epochs=15, batch_size=4, lr=2e-2)
    after = tagger.evaluate(corpus)["f1"]
    require(
        after > max(before, 0.9),
        f"F1 was {before:.3f} and is {after:.3f} on 16 lines it was fitted to",
    )
    with tempfile.TemporaryDirectory() as folder:
        tagger.save(folder)
        lines = ["ababca", "aab"]
        require(
            Tagger.load(folder).segment(lines) == tagger.segment(lines),
            "another result once loaded",
        )


def rejects_unknown_keyword(subject: Subject) -> None:
    """Refuse a parameter that it does not have."""
    try:
        subject.registry.create(subject.component, no_such_parameter=1)
    except ArgumentError:
        return
    raise AssertionError("create takes any keyword")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [
        Check("result form", result_form),
        Check("trains a tagger", trains_a_tagger, lambda s: bool(s.capability("trainable"))),
        Check("rejects unknown parameters", rejects_unknown_keyword),
    ]
