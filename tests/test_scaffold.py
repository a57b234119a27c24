"""``kexue new``: a plugin that installs and passes the kit, for every kind."""

from __future__ import annotations

import os
import re
import site as sites
import sys
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kexue.core.component import Interface
from kexue.core.errors import ArgumentError
from kexue.core.interfaces import INTERFACES
from kexue.core.registry import Registry
from kexue.core.scaffold import new_plugin

if TYPE_CHECKING:
    from tests.conftest import Ran, Site

KINDS = {interface.kind: interface for interface in INTERFACES}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is written ------------------------------------------------------------------------------


def test_writes_a_whole_plugin(tmp_path: Path) -> None:
    folder, files = new_plugin("focal-loss", KINDS["loss"], tmp_path / "new")
    assert folder == tmp_path / "new" / "focal-loss"
    assert sorted(str(file.relative_to(folder)) for file in files) == [
        "README.md",
        "kexue_focal_loss/__init__.py",
        "kexue_focal_loss/loss.py",
        "kexue_focal_loss/py.typed",
        "pyproject.toml",
        "tests/test_focal_loss.py",
    ]
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(files)
    assert names_in(tmp_path / "new") == ["focal-loss"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\$[a-zA-Z]", text), file
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert 'focal-loss = "kexue_focal_loss"' in project
    assert 'dependencies = ["kexue>=0.1.0"]' in project
    assert "class FocalLoss(Loss):" in (folder / "kexue_focal_loss/loss.py").read_text("utf-8")


@pytest.mark.parametrize("name", ["example", "tensor", "any", "true", "none", "import", "a-1b"])
def test_names_clash_with_nothing(tmp_path: Path, name: str) -> None:
    for kind, interface in KINDS.items():
        folder, files = new_plugin(name, interface, tmp_path / kind)
        for file in files:
            if file.suffix == ".py":
                compile(file.read_text(encoding="utf-8"), str(file), "exec")
        (module,) = folder.glob(f"kexue_*/{kind}.py")
        text = module.read_text(encoding="utf-8")
        (class_name,) = re.findall(r"^class (\w+)\(", text, re.MULTILINE)
        assert class_name.isidentifier()
        assert not re.search(rf"^from .* import .*\b{class_name}\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Focal_Loss", r"`name` must be lower-case .*Found 'Focal_Loss'. Perhaps 'focal-loss'."),
        ("../up", r"Found '../up'. Perhaps 'up'."),
        ("1st", r"Found '1st'\.$"),
        ("", r"Found ''\.$"),
        ("crf", r"`name` 'crf' is a plugin of the catalogue, kexue-crf; name another."),
    ],
)  # fmt: skip
def test_rejects_a_name(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        new_plugin(name, KINDS["loss"], tmp_path)
    assert caught.value.argument == "name"
    assert names_in(tmp_path) == []


def test_writes_nothing_over_anything(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ArgumentError, match="mine exists already; name another or move it away"):
        new_plugin("mine", KINDS["loss"], tmp_path)
    assert names_in(tmp_path / "mine") == []


def test_starts_what_the_catalogue_plans(tmp_path: Path) -> None:
    assert new_plugin("vae-density", KINDS["generator"], tmp_path)[0].is_dir()


def test_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        new_plugin("mine", KINDS["loss"], tmp_path)
    assert names_in(tmp_path) == []


def test_a_kind_may_bring_no_template(tmp_path: Path) -> None:
    kind = Interface("probe", "a:B", "One.", "go", "a:c", plugin="probing")
    message = "The kind 'probe' of probing brings no template .* copy one of its plugin's"
    with pytest.raises(ArgumentError, match=message):
        new_plugin("mine", kind, tmp_path)


def test_a_kind_of_a_plugin_brings_its_template(site: Site, tmp_path: Path) -> None:
    site.write("kexue_probe/__init__.py", "raise RuntimeError('imported')")
    site.write("kexue_probe/component.txt", "class $Class: '''A $kind.'''\n")
    kind = Interface("class", "a:B", "One.", "go", "a:c", template="kexue_probe:component.txt")
    folder, _ = new_plugin("lens", kind, tmp_path)
    text = (folder / "kexue_lens" / "class_.py").read_text(encoding="utf-8")
    assert text == "class Lens: '''A class.'''\n"
    assert "kexue_lens.class_:Lens" in (folder / "kexue_lens" / "__init__.py").read_text("utf-8")


# -- in an environment of its own -----------------------------------------------------------------

PROBE = {
    "pyproject.toml": """
[build-system]
requires = ["flit_core>=3.9"]
build-backend = "flit_core.buildapi"

[project]
name = "kexue-probing"
version = "0.2.0"
description = "A kind of its own."
dependencies = ["kexue>=0.1"]

[project.entry-points.kexue]
probing = "kexue_probing"
""",
    "kexue_probing/__init__.py": """
from kexue.core import Component, Interface, hookimpl


@hookimpl
def kexue_interfaces():
    return [
        Interface(
            "probe",
            "kexue_probing.kind:Probe",
            "A tensor to a number.",
            "probe",
            "kexue_probing.kind:run",
            checks="kexue_probing.kind:checks",
            template="kexue_probing:component.txt",
        )
    ]


@hookimpl
def kexue_components():
    source = ("A post, https://example.org",)
    return [Component("probe", "mean", "kexue_probing.mean:Mean", "The mean.", source)]
""",
    "kexue_probing/kind.py": '''
"""The kind."""

from abc import abstractmethod

from kexue.core import Contract, Job, Result
from kexue.core.conformance import Check


class Probe(Contract):
    """A probe maps a tensor to a number."""

    @abstractmethod
    def probe(self, x):
        """Probe."""


def run(job: Job, *, times: int = 1) -> Result:
    """Probe a file.

    Args:
        job: The call.
        times: What to multiply by.
    """
    (x,) = job.tensors().values()
    return Result({"probed": times * float(job.build().probe(x))})


def scales(subject) -> None:
    """Be linear."""
    x = subject.inputs()["x"]
    built = subject.make()
    if abs(built.probe(2 * x) - 2 * built.probe(x)) > 1e-4:
        raise AssertionError("it is not linear")


def checks() -> list[Check]:
    """Return the checks of the kind."""
    return [Check("is linear", scales)]
''',
    "kexue_probing/component.txt": '''
"""A probe: replace the formula by yours."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core import ArgumentError, Example
from kexue_probing.kind import Probe

__all__ = ["$Class"]


class $Class(Probe):
    """The sum.

    Example:
        >>> $Class().probe(torch.ones(2, 2)).item()
        4.0
    """

    def probe(self, x: Float[Tensor, "row column"]) -> Tensor:
        """Return the sum.

        Args:
            x: Any numbers.
        """
        if x.ndim != 2:
            raise ArgumentError(f"`x` of $Class must have two axes. Found {x.ndim}.")
        return x.double().sum().to(x.dtype)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return a matrix."""
        return Example({}, {"x": torch.randn(3, 2, generator=generator)})
''',
}
PROBE["kexue_probing/mean.py"] = (
    PROBE["kexue_probing/component.txt"]
    .replace("$Class", "Mean")
    .replace(".sum()", ".mean()")
    .replace("4.0", "1.0")
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment on top of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (packages,) = [
        *folder.glob("lib/python*/site-packages"),
        *folder.glob("Lib/site-packages"),
    ]
    below = [path for path in sites.getsitepackages() if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in below]
    (packages / "below.pth").write_text("\n".join(lines), encoding="utf-8")
    return next(path for path in folder.glob("*/python*") if path.stem == "python")


def test_new_plugins_of_every_kind_install_and_pass(
    environment: Path, tmp_path: Path, shell: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flit_core", reason="what builds the plugins is not installed")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    run = partial(shell, python=environment)
    for path, text in PROBE.items():
        (tmp_path / "probing" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "probing" / path).write_text(text.lstrip(), encoding="utf-8")
    pip = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    assert run(*pip, "./probing", module="pip").status == 0
    kinds = [*KINDS, "probe"]
    for kind in kinds:
        ran = run("new", f"demo-{kind}", "--kind", kind, "--out", "plugins")
        assert ran.status == 0, ran.err
        assert f"kexue check demo-{kind}" in ran.out
    folders = [f"./plugins/demo-{kind}" for kind in kinds]
    ran = run(*pip, *folders, module="pip")
    assert ran.status == 0, ran.err

    ran = run("check", "--verbose", "probing", *(f"demo-{kind}" for kind in kinds))
    assert ran.status == 0, ran.out + ran.err
    assert re.search(r"^\d+ passed, 0 failed, \d+ do not apply.$", ran.out, re.MULTILINE)
    for kind in kinds:
        row = rf"^{kind}/demo-{kind} +its example runs +passed$"
        assert re.search(row, ran.out, re.MULTILINE), kind
    assert re.search(r"^probe/demo-probe +is linear +passed$", ran.out, re.MULTILINE)

    own = [f"./plugins/demo-{kind}/tests" for kind in ("loss", "probe")]
    ran = run("-q", "--import-mode=importlib", *own, module="pytest")
    assert ran.status == 0, ran.out
    _a_kind_of_a_plugin_is_like_any_other(run)


def _a_kind_of_a_plugin_is_like_any_other(run: Callable[..., Ran]) -> None:
    shown = run("show", "probe/demo-probe").out
    assert "Inputs of probe" in shown
    assert "float [row, column]" in shown
    assert "A tensor to a number." in run("list", "kinds").out
    assert "--times" in run("run", "probe/demo-probe", "--help").out
    command = run("run", "probe/demo-probe", "--example", "try").out
    assert command == "kexue run probe/demo-probe try/x.npy\n"
    ran = run("run", "probe/demo-probe", "try/x.npy", "--times", "0")
    assert (ran.status, ran.out.replace("-0", "0")) == (0, "probed: 0\n")
    ran = run("fit", "probe/demo-probe", "try/x.npy")
    assert ran.status == 2
    assert "components of kind 'probe' are not trained" in ran.err


# -- the command ----------------------------------------------------------------------------------


def test_says_what_comes_next(kexue: Callable[..., Ran], tmp_path: Path) -> None:
    ran = kexue("new", "demo", "-o", str(tmp_path))
    assert ran.status == 0
    assert f"pip install -e {tmp_path / 'demo'}" in ran.out
    assert str(tmp_path / "demo" / "kexue_demo" / "loss.py") in ran.out.splitlines()


def test_an_unknown_kind_is_a_wrong_call(kexue: Callable[..., Ran], tmp_path: Path) -> None:
    ran = kexue("new", "demo", "--kind", "los", "-o", str(tmp_path))
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("Error: No kind named 'los' is installed. Did you mean 'loss'?")
    assert names_in(tmp_path) == []


def test_registry_knows_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = new_plugin("made", KINDS["loss"], tmp_path)
    monkeypatch.syspath_prepend(folder)
    registry = Registry(discover=False)
    import kexue_made  # type: ignore[import-not-found]

    registry.register(kexue_made)
    assert registry.describe("loss/made").capabilities == ("differentiable",)
    assert "kexue_made.loss" not in sys.modules
