"""Experiments, their verdicts and the page."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path

import pytest
import torch

from kexue.core import Claim, Component, Context, Experiment, Figure, Registry, Report, Table
from kexue.core.errors import ComponentNotFoundError
from kexue.core.experiments import Outcome, find_experiments, run_experiment, to_json
from kexue.core.job import Quiet
from kexue.core.report import write_report
from kexue.core.text import format_cell, spread
from kexue.core.workers import run_experiments, units

HERE = Path(__file__)


def good(context: Context) -> Report:
    value = context.pick(2.0, 1.0)
    return Report(
        [
            Claim(
                "Two is more than one & <one>.",
                "https://kexue.fm/archives/1",
                f"{value}",
                "> 1",
                value > 1,
            ),
            Claim("Two is zero.", "nowhere", f"{value}", "0", value == 0),
        ],
        [Table("Numbers", ["name", "value"], [["a", 0.123456], ["b", float("nan")], ["c", 3]])],
        [Figure("A line", lambda canvas: canvas.subplots().plot([0, 1], [0, value]), "It rises.")],
        ["Nothing to note."],
    )


def failing(context: Context) -> Report:
    raise ZeroDivisionError(f"on {context.device}")


def wrong(context: Context) -> int:
    return len(context.seeds)


def dying(context: Context) -> Report:
    os._exit(7 if context.quick else 8)


class UnsendableError(Exception):
    """Cannot be pickled: it is made from two things and keeps one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


def unsendable(context: Context) -> Report:
    context.progress.say("about to fail")
    raise UnsendableError(1, 2)


def context(*, quick: bool = False) -> Context:
    return Context(torch.device("cpu"), quick=quick)


def experiment(name: str) -> Experiment:
    return Experiment(name, f"{HERE}:{name}", f"Runs {name}.")


@pytest.fixture
def registry() -> Registry:
    made = Registry(discover=False)
    made.register([experiment("good"), experiment("failing")], slug="mine", owner="kexue-mine")
    made.register(
        [Component("loss", "none", "mine:None", "Nothing.")], slug="bare", owner="kexue-bare"
    )
    return made


def test_verdicts_follow_what_was_measured() -> None:
    full = run_experiment(experiment("good"), context()).report
    quick = run_experiment(experiment("good"), context(quick=True)).report
    assert full is not None
    assert quick is not None
    assert [c.holds for c in full.claims] == [True, False]
    assert [c.holds for c in quick.claims] == [False, False]


def test_an_experiment_that_fails_is_an_outcome() -> None:
    outcome = run_experiment(experiment("failing"), context())
    assert outcome.report is None
    assert isinstance(outcome.error, ZeroDivisionError)
    assert to_json(outcome)["error"] == "ZeroDivisionError: on cpu"
    assert isinstance(run_experiment(experiment("wrong"), context()).error, TypeError)


def test_context_has_three_seeds_and_makes_things_once() -> None:
    made = context()
    assert len(made.seeds) >= 3
    assert made.once("key", object) is made.once("key", object)


def test_find_experiments_by_plugin_and_by_name(registry: Registry) -> None:
    assert [e.id for e in find_experiments(registry, ["mine"])] == ["mine/good", "mine/failing"]
    assert [e.id for e in find_experiments(registry, ["mine/good", "mine"])] == [
        "mine/good",
        "mine/failing",
    ]
    assert len(find_experiments(registry, [])) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine/god", "No experiment named 'mine/god'.*mine/good"),
        ("bare", "No experiment named 'bare'"),
        ("mime", "Did you mean 'mine'"),
        ("vae-density", "planned"),
    ],
)
def test_find_experiments_rejects_unknown_ones(registry: Registry, name: str, words: str) -> None:
    with pytest.raises(ComponentNotFoundError, match=words):
        find_experiments(registry, [name])


def test_page_is_one_file_that_shows_everything(tmp_path: Path) -> None:
    outcomes = [run_experiment(experiment(name), context()) for name in ("good", "failing")]
    page = write_report(outcomes, tmp_path / "out", command="kexue reproduce mine", quick=False)
    html = page.read_text(encoding="utf-8")
    assert "1 of 2 claims hold" in html
    assert "more than one &amp; &lt;one&gt;" in html
    assert "does not hold" in html
    assert "ZeroDivisionError" in html or "on cpu" in html
    assert "0.1235" in html
    assert 'href="https://kexue.fm/archives/1"' in html
    assert not re.search(r'(src|href)="(?!data:|#|https://kexue)', html), "needs another file"
    picture = re.search(r"data:image/svg\+xml;base64,([^\"]+)", html)
    assert picture is not None
    assert b"<svg" in base64.b64decode(picture[1])
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (document["held"], document["total"]) == (1, 2)
    assert document["experiments"][0]["claims"][0]["holds"] is True
    assert document["experiments"][1]["error"].startswith("ZeroDivisionError")
    assert document["environment"]["torch"] == str(torch.__version__)


def test_a_failing_picture_leaves_the_old_page(tmp_path: Path) -> None:
    outcome = run_experiment(experiment("good"), context())
    write_report([outcome], tmp_path, command="kexue reproduce mine", quick=False)
    before = (tmp_path / "report.html").read_text()

    def broken(canvas: object) -> None:
        raise RuntimeError(f"cannot draw on {canvas}")

    bad = Outcome(outcome.experiment, Report([], figures=[Figure("Bad", broken)]), None, 0.0)
    with pytest.raises(RuntimeError, match="cannot draw"):
        write_report([bad], tmp_path, command="kexue reproduce mine", quick=False)
    assert (tmp_path / "report.html").read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.json"}


def test_spread_and_cells() -> None:
    assert spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100 (0.500 to 0.700)"
    assert spread([]) == "nothing measured"
    assert format_cell(0.123456) == "0.1235"
    assert format_cell(float("nan")) == "–"
    assert format_cell("x") == "x"


# -- side by side --------------------------------------------------------------------------------


class Said(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_side_by_side_finds_the_same_and_survives_a_process(tmp_path: Path) -> None:
    registry = Registry(discover=False)
    for slug, names in {
        "a": ["good", "dying", "failing"],
        "b": ["unsendable"],
        "c": ["good"],
    }.items():
        registry.register([experiment(name) for name in names], slug=slug, owner=f"kexue-{slug}")
    experiments, progress = registry.experiments(), Said()
    outcomes = run_experiments(
        experiments, registry, device=torch.device("cpu"), quick=True, jobs=2, progress=progress
    )
    alone = run_experiment(experiment("good"), context(quick=True)).report
    assert alone is not None
    assert [o.experiment.id for o in outcomes] == [e.id for e in experiments]
    good_ones = [o.report for o in (outcomes[0], outcomes[4])]
    assert all(r is not None and list(r.claims) == list(alone.claims) for r in good_ones)
    assert [str(o.error) for o in outcomes[1:4]] == [
        "Its process ended with exit code 7.",
        "Its process ended with exit code 7.",
        "UnsendableError: 3",
    ]
    assert {"about to fail", "c/good: Runs good."} <= {*progress.lines}
    page = write_report(outcomes, tmp_path, command="kexue reproduce", quick=True, jobs=2)
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/svg+xml") == 2
    assert "2 processes side by side" in html


def test_units_keep_together_what_may_share_results() -> None:
    installed = Registry()
    names = [p.slug for p in installed.plugins if p.experiments and p.state == "ok"]
    found = [{e.plugin for e in unit} for unit in units(installed.experiments(), installed)]
    assert sorted(slug for unit in found for slug in unit) == sorted(names)
    for unit in found:
        if "memm" in unit:
            assert unit == {"crf", "memm"}
        if "zlpr" in unit:
            assert unit == {"zlpr"}
