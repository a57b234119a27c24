"""The manifest, the kind, the experiments, and what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kexue_integrated_gradients
from kexue.core import Context, Report
from kexue.core.conformance import Subject, check_component, conformance
from kexue.core.registry import Registry, registry
from kexue.core.scaffold import new_plugin
from kexue_integrated_gradients import Attributions, IntegratedGradients
from kexue_integrated_gradients.attribution import Attribution
from kexue_integrated_gradients.conformance import checks

README = Path(__file__).parents[1] / "README.md"
NAME = "attribution/integrated-gradients"


@conformance("integrated-gradients")
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_manifest_names_what_exists() -> None:
    (component,) = kexue_integrated_gradients.kexue_components()
    assert component.id == NAME
    assert component.target == f"{IntegratedGradients.__module__}:{IntegratedGradients.__name__}"
    (kind,) = kexue_integrated_gradients.kexue_interfaces()
    assert kind.target == f"{Attribution.__module__}:{Attribution.__name__}"
    assert registry.interface("attribution") == kind
    for experiment in kexue_integrated_gradients.kexue_experiments():
        module, _, name = experiment.target.partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_manifest_is_light() -> None:
    code = (
        "import sys, kexue_integrated_gradients; "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# -- the kind's checks find what is wrong ---------------------------------------------------------


class Halved(IntegratedGradients):
    def attribute(self, *args: Any, **kwargs: Any) -> Attributions:
        found = super().attribute(*args, **kwargs)
        return found._replace(values=found.values / 2)


class Shifted(IntegratedGradients):
    def attribute(self, *args: Any, **kwargs: Any) -> Attributions:
        found = super().attribute(*args, **kwargs)
        return found._replace(values=found.values + 0.1)


class Squared(IntegratedGradients):
    def attribute(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Attributions:
        found = super().attribute(model, inputs, *args, **kwargs)
        extra = (model(inputs + 1) - model(inputs)).detach().reshape(len(inputs), -1)[:, :1]
        return found._replace(values=found.values * extra, outputs=found.outputs + 1)


class Training(IntegratedGradients):
    def attribute(self, model: Any, *args: Any, **kwargs: Any) -> Attributions:
        found = super().attribute(model, *args, **kwargs)
        if isinstance(model, torch.nn.Module):
            model.eval()
        return found


class Guessing(IntegratedGradients):
    def attribute(self, *args: Any, target: Any = None, **kwargs: Any) -> Attributions:
        return super().attribute(*args, target=0 if target is None else target, **kwargs)


class Flat(IntegratedGradients):
    def attribute(self, *args: Any, **kwargs: Any) -> Attributions:
        found = super().attribute(*args, **kwargs)
        return found._replace(values=found.values.sum(-1))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (Halved, "complete"),
        (Shifted, "ignored features get nothing"),
        (Squared, "says the outputs"),
        (Training, "the model is not changed"),
        (Guessing, "needs a target"),
        (Flat, "same shape"),
    ],
)
def test_the_checks_find(
    wrong: type[IntegratedGradients], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(registry, registry.get(NAME))
    monkeypatch.setitem(vars(subject), "target", wrong)
    monkeypatch.setattr(registry, "create", lambda _, **params: wrong(**params))
    (check,) = [check for check in checks() if check.name == name]
    assert check.applies(subject)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check.run(subject)


def test_the_template_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = new_plugin("times", registry.interface("attribution"), tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    from kexue.core.loading import load_target

    manifest = load_target("kexue_times:kexue_components")
    mine = Registry(discover=False)
    mine.register(kexue_integrated_gradients.kexue_interfaces(), slug="kind")
    mine.register(manifest(), slug="times", owner="times")
    findings = check_component(mine, mine.get("attribution/times"))
    assert [f for f in findings if f.state == "failed"] == []
    assert len([f for f in findings if f.state == "passed"]) > 15


# -- the experiments and the README ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["axioms", "deletion", "sentences"])
def test_experiments_measure_their_claims(name: str) -> None:
    pytest.importorskip("sklearn", reason="carries the digits")
    from kexue.core.loading import load_target

    run = load_target(f"kexue_integrated_gradients.experiments.{name}:{name}")
    report: Report = run(Context(torch.device("cpu"), quick=True))
    assert len(report.claims) >= 3
    assert report.claims[0].holds
    assert report.figures


def test_readme_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102 -- our own README
