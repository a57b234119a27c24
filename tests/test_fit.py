"""Taggers from the command line: fitted, interrupted, resumed, and run on a user's own files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from kexue.core.lab.data import segmented, text

DECODERS = ("decoder/crf", "decoder/memm")
SMALL = ("--epochs", "2", "--width", "16", "--layers", "1")

if TYPE_CHECKING:
    from tests.conftest import Ran

    Kexue = Callable[..., Ran]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(text().train[:80]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def conll(tmp_path: Path) -> Path:
    """Names in brackets, which no tagger can miss."""
    sentence = "( O\nAnna B-PER\nLee I-PER\n) O\nsaw O\nit O\n"
    path = tmp_path / "names.conll"
    path.write_text("\n".join([sentence] * 40), encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, bytes]:
    (path,) = folder.glob("weights-*.safetensors")
    return {name: array.tobytes() for name, array in load_file(path).items()}


@pytest.mark.parametrize("decoder", DECODERS)
def test_segments_text_as_it_was_shown(
    kexue: Kexue, corpus: Path, tmp_path: Path, decoder: str
) -> None:
    model = tmp_path / "model"
    ran = kexue("fit", decoder, str(corpus), "-o", str(model), *SMALL, "--json")
    assert ran.status == 0, ran.err
    summary = json.loads(ran.out)["summary"]
    assert summary["tags"] == ["B", "E", "M", "S"]
    assert (summary["sequences"], summary["validation_sequences"]) == (72, 8)
    assert 0 < summary["best_f1"] <= 1
    assert len(json.loads((model / "history.json").read_text())["epochs"]) == 2

    lines = text().test[:3]
    plain = tmp_path / "input.txt"
    plain.write_text("\n".join(line.replace(" ", "") for line in lines) + "\n", encoding="utf-8")
    gold = tmp_path / "gold.txt"
    gold.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ran = kexue("run", decoder, "--model", str(model), str(plain))
    assert ran.status == 0, ran.err
    assert [row.replace(" ", "") for row in ran.out.splitlines()] == plain.read_text().splitlines()

    out = tmp_path / "out.txt"
    scored = kexue(
        "run", decoder, "--model", str(model), str(plain), "--gold", str(gold), "-o", str(out)
    )
    assert out.read_text() == ran.out
    figures = dict(line.split(": ") for line in scored.out.splitlines())
    assert set(figures) == {"precision", "recall", "f1", "accuracy"}
    words = sum(len(line.split()) for line in ran.out.splitlines())
    wanted = sum(len(line.split()) for line in lines)
    hits = float(figures["precision"]) * words
    assert hits == pytest.approx(float(figures["recall"]) * wanted, abs=0.2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_tags_conll(kexue: Kexue, conll: Path, tmp_path: Path, decoder: str) -> None:
    model = tmp_path / "model"
    ran = kexue(
        "fit", decoder, str(conll), "-o", str(model), *SMALL[2:], "--epochs", "8", "--lr", "0.02"
    )
    assert ran.status == 0, ran.err
    ran = kexue("run", decoder, "--model", str(model), str(conll), "--gold", str(conll))
    assert ran.status == 0, ran.err
    assert "f1: 1" in ran.err.splitlines()  # standard output is the text
    assert ran.out.startswith("(\tO\nAnna\tB-PER\nLee\tI-PER\n)\tO\nsaw\tO\nit\tO\n\n")


def test_forbids_what_a_scheme_does(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    ran = kexue("fit", "decoder/crf", str(corpus), "-o", str(model), *SMALL, "--set", "scheme=BMES")
    assert ran.status == 0, ran.err
    (tmp_path / "a.txt").write_text("thetypeofanobject\n")
    ran = kexue("run", "decoder/crf", "--model", str(model), str(tmp_path / "a.txt"), "--tags")
    tags = "".join(line.split()[1] for line in ran.out.splitlines() if line)
    assert tags.replace("S", "").replace("M", "").replace("BE", "") == ""


def test_reads_standard_input_line_by_line(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert kexue("fit", "decoder/crf", str(corpus), "-o", str(model), *SMALL).status == 0
    command = [sys.executable, "-m", "kexue.cli", "run", "decoder/crf", "--model", str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in ("thetypeofanobject", "", "x"):  # each is answered before the next is written
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            assert process.stdout.readline().replace(" ", "") == f"{line}\n"
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize("decoder", DECODERS)
def test_fits_to_emissions_in_files(kexue: Kexue, tmp_path: Path, decoder: str) -> None:
    generator = np.random.default_rng(0)
    tags = np.arange(12).reshape(1, 12) % 3 + np.zeros((30, 1), dtype=np.int64)
    emissions = (generator.normal(size=(30, 12, 3)) + np.eye(3)[tags]).astype(np.float32)
    tags[:, 9:] = -1  # padding
    np.save(tmp_path / "emissions.npy", emissions)
    np.save(tmp_path / "tags.npy", tags)
    files = [str(tmp_path / "emissions.npy"), str(tmp_path / "tags.npy")]
    model = tmp_path / "model"
    options = ("--epochs", "10", "--batch-size", "4", "--lr", "0.2", "--json")
    ran = kexue("fit", decoder, *files, "-o", str(model), *options)
    assert ran.status == 0, ran.err
    alone = (emissions.argmax(-1) == tags)[:, :9].mean()
    assert alone < 0.8  # emissions say less than that 0 1 2 follow each other
    assert json.loads(ran.out)["summary"]["best_accuracy"] > 0.9
    ran = kexue("run", decoder, "--model", str(model), files[0], "-o", str(tmp_path / "p.npz"))
    assert ran.status == 0, ran.err
    with np.load(tmp_path / "p.npz") as found:
        sequences = found["sequences"]
    assert (sequences[:, :9] == tags[:, :9]).mean() > 0.9


def fit_in_another_process(corpus: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    code = (
        "import signal\n"
        "from kexue.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "fit", "decoder/crf", str(corpus), "-o", str(folder)]
    return subprocess.Popen(
        [*command, "--width", "16", "--layers", "1", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_goes_on_after_a_stop_as_if_there_had_been_none(
    kexue: Kexue, corpus: Path, tmp_path: Path, number: int
) -> None:
    epochs = ("--epochs", "200", "--patience", "200")
    stopped = tmp_path / "stopped"
    process = fit_in_another_process(corpus, stopped, *epochs)
    deadline = time.monotonic() + 120
    while not (stopped / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "`--resume` goes on from" in errors
        assert not [p for p in stopped.iterdir() if p.name.startswith(".")]
    assert not (stopped / "history.json").exists(), "it finished before it was stopped"
    done = _epochs_done(stopped)

    again = kexue("fit", "decoder/crf", str(corpus), "-o", str(stopped))
    assert again.status == 2
    assert "unfinished run" in again.err
    until = ("--epochs", str(done + 2), "--patience", "200", "--width", "16", "--layers", "1")
    resumed = kexue("fit", "decoder/crf", str(corpus), "-o", str(stopped), *until, "--resume")
    assert resumed.status == 0, resumed.err
    whole = tmp_path / "whole"
    assert kexue("fit", "decoder/crf", str(corpus), "-o", str(whole), *until).status == 0
    assert weights(stopped) == weights(whole)


def _epochs_done(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "checkpoint.safetensors", framework="np") as file:
        document = json.loads(file.metadata()["run"])
    return len(document["state"]["history"]["epochs"])


def test_fitting_needs_a_free_folder(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "mine.txt").write_text("mine")
    ran = kexue("fit", "decoder/crf", str(corpus), "-o", str(model))
    assert ran.status == 2
    assert "--overwrite" in ran.err
    assert [p.name for p in model.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--epochs", "0"), "`epochs` of fit must be at least 1. Found 0."),
        (("--batch-size", "0"), "`batch_size` of fit must be at least 1. Found 0."),
        (("--lr", "-1"), "`lr` of fit must be a finite number of at least 0. Found -1.0."),
        (("--form", "xml"), "`form` must be 'auto', 'conll' or 'segmented'. Found 'xml'."),
        (("--valid", "nowhere.txt"), "nowhere.txt"),
        (("--set", "scheme=BIO"), "BIO"),
        (("--set", "batch_size=8"), "an option of `kexue fit`. Give it as `--batch-size`"),
    ],
)
def test_refuses_options(
    kexue: Kexue, corpus: Path, tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    ran = kexue("fit", "decoder/crf", str(corpus), "-o", str(tmp_path / "m"), *given)
    assert ran.status == 2
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sentences"),
        (b"\n\n \n", "holds no sentences"),
        (b"one line\n", "too few"),
        (b"\x80\x81\xff\x00" * 40, "UTF-8"),
        (b"a B-X\nb\n\n" * 20, "line 2"),
    ],
)
def test_refuses_files(kexue: Kexue, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / ("a.conll" if b"B-X" in content else "a.txt")
    path.write_bytes(content)
    ran = kexue("fit", "decoder/crf", str(path), "-o", str(tmp_path / "m"))
    assert ran.status in {1, 2}
    assert message in ran.err
    assert str(path) in ran.err
    assert not (tmp_path / "m").exists()


def test_refuses_what_is_no_model(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    ran = kexue("run", "decoder/crf", "--model", str(tmp_path), str(corpus))
    assert ran.status != 0
    assert "holds no fitted model: config.yaml is missing" in ran.err
    model = tmp_path / "model"
    assert kexue("fit", "decoder/crf", str(corpus), "-o", str(model), *SMALL).status == 0
    other = kexue("run", "decoder/memm", "--model", str(model), str(corpus))
    assert other.status == 2
    assert f"was fitted with decoder/crf. Run `kexue run decoder/crf --model {model}" in other.err
    (file,) = model.glob("weights-*")
    file.write_bytes(file.read_bytes()[:100])
    ran = kexue("run", "decoder/crf", "--model", str(model), str(corpus))
    assert ran.status != 0
    assert "does not hold this model's weights" in ran.err


def test_a_model_is_read_without_executing_it(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    model, seen = tmp_path / "model", tmp_path / "seen"
    assert kexue("fit", "decoder/crf", str(corpus), "-o", str(model), *SMALL).status == 0
    config = model / "config.yaml"
    config.write_text(config.read_text() + f"evil: !!python/object/apply:os.mkdir ['{seen}']\n")
    ran = kexue("run", "decoder/crf", "--model", str(model), str(corpus))
    assert ran.status != 0
    assert not seen.exists()


def test_gold_must_be_the_same_text(kexue: Kexue, corpus: Path, tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other.txt"
    assert kexue("fit", "decoder/crf", str(corpus), "-o", str(model), *SMALL).status == 0
    other.write_text("another text\n")
    ran = kexue("run", "decoder/crf", "--model", str(model), str(corpus), "--gold", str(other))
    assert ran.status == 2
    assert "must have the sentences of" in ran.err


def test_a_saved_model_names_its_component_and_parameters(
    kexue: Kexue, corpus: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    assert kexue("fit", "decoder/memm", str(corpus), "-o", str(model), *SMALL).status == 0
    config = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
    assert config["component"] == "decoder/memm"
    assert set(config["model"]["tags"]) == set(segmented("to be a man")[1])


def test_of_several_processes_the_first_one_speaks(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "kexue.cli", "fit", "decoder/crf", str(corpus)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "m"), *SMALL],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best f1: ") == 1
    assert len(weights(tmp_path / "m")) > 3
