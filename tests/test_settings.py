"""The user's registry files: what they may say, and what is said when they say something else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kexue.core.component import Component, Interface
from kexue.core.registry import Registry
from kexue.core.settings import Settings, config_path, read_settings

if TYPE_CHECKING:
    from tests.conftest import Site

FOCAL = "components: [{id: loss/focal, target: focal.py:Focal}]\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own registry file, in a configuration folder for this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = config_path()
    path.parent.mkdir(parents=True)
    return path


def test_there_need_not_be_any_file() -> None:
    assert read_settings() == Settings()
    assert config_path().name == "registry.yaml"
    assert not config_path().exists()


def test_reads_the_users_own_file(own: Path) -> None:
    own.write_text(FOCAL, encoding="utf-8")
    registry = Registry()
    component = registry.get("loss/focal")
    assert component.target == f"{own.parent}/focal.py:Focal"
    assert component.owner == str(own)
    assert component.summary == "From focal.py:Focal."
    assert registry.plugin("registry").source == "file"


def test_files_come_in_order_each_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text("prefer: {a/b: own}\nplugins: {crf: {enabled: true}}", encoding="utf-8")
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("prefer: {a/b: first}", encoding="utf-8")
    second.write_text("prefer: {a/b: second, c/d: second}\nplugins: {crf: {enabled: false}}")
    named = os.pathsep.join(map(str, (first, second, first, own, "")))
    monkeypatch.setenv("KEXUE_REGISTRY", named)
    settings = read_settings()
    assert [Path(d["path"]).name for d in settings.documents] == [
        "first.yaml",
        "second.yaml",
        "registry.yaml",
    ]
    assert settings.prefer == {"a/b": "first", "c/d": "second"}
    assert settings.why_disabled("crf", "kexue-crf") == f"`enabled: false` in {second}."


def test_a_named_file_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(FOCAL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEXUE_REGISTRY", "mine.yaml")
    assert Registry().get("focal").owner == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["sound", "kexue-sound"])
def test_switches_plugins_off(site: Site, own: Path, name: str) -> None:
    site.add("kexue-sound")
    own.write_text(f"plugins: {{{name}: {{enabled: false}}, nobody: {{enabled: false}}}}")
    registry = Registry()
    assert registry.plugin("sound").state == "disabled"
    assert registry.plugin("sound").reason == f"`enabled: false` in {own}."
    own.write_text(f"plugins: {{{name}: {{enabled: true}}}}", encoding="utf-8")
    registry.refresh()
    assert registry.plugin("sound").state == "ok"


def test_switches_files_off(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_text(FOCAL, encoding="utf-8")
    monkeypatch.setenv("KEXUE_DISABLE", "registry")
    assert Registry().plugin("registry").state == "disabled"


def test_holds_every_kind_of_record(site: Site, own: Path) -> None:
    own.write_text(
        """
components:
  - {kind: probe, name: one, target: "there:One", summary: One., references: [a post],
     tags: [short]}
interfaces:
  - {kind: probe, target: "there:Probe", summary: Probes., method: probe, run: run.py:probe,
     checks: "there:checks"}
experiments:
  - {name: claim, target: "claims.py:measure", summary: Measures.}
datasets:
  - {name: rows, target: "~/rows.py:load"}
""",
        encoding="utf-8",
    )
    registry = Registry()
    assert registry.plugin("registry").reason == ""
    assert registry.get("probe/one") == Component(
        "probe", "one", "there:One", "One.", ("a post",), ("short",)
    )
    assert registry.interface("probe") == Interface(
        "probe",
        "there:Probe",
        "Probes.",
        "probe",
        f"{own.parent}/run.py:probe",
        checks="there:checks",
    )
    (experiment,) = registry.experiments("registry")
    assert experiment.target == f"{own.parent}/claims.py:measure"
    assert registry.datasets()[-1].target == f"{Path.home()}/rows.py:load"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "mine.yaml does not exist; KEXUE_REGISTRY names it."),
        (b"components: [", "mine.yaml is not valid YAML: while parsing a flow node"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "mine.yaml is not valid YAML"),
        (b"- a\n- b", "mine.yaml must hold a mapping. Found list."),
        (b"just text", "mine.yaml must hold a mapping. Found str."),
        (b"component: []", "has no use for 'component'. Did you mean 'components'?"),
        (b"1: []", "has no use for 1."),
        (b"components: {a: b}", "`components` in .*mine.yaml must be a list. Found {'a': 'b'}."),
        (b"plugins: [crf]", "`plugins` in .*mine.yaml must be a dict. Found .'crf'.."),
        (b"plugins: {crf: off}", "`plugins: crf` in .* must be {enabled: true} .* Found False."),
        (b"plugins: {crf: {enabled: maybe}}", "must be {enabled: true} or {enabled: false}."),
        (b"prefer: {loss/crf: [a]}", "`prefer: loss/crf` in .* must name a plugin, .*Found .'a'.."),
        (b"components: [loss/crf]", "components.0. in .*mine.yaml must be a mapping. Found 'loss"),
        (b"components: [{id: loss/x}]", "components.0. in .*mine.yaml needs 'target'."),
        (b"components: [{target: 'a:b'}]", "needs 'kind' and 'name'."),
        (b"interfaces: [{kind: k}]", "interfaces.0. in .* needs 'target' and 'method' and 'run'."),
        (
            b"components: [{id: loss/x, target: 'a:b', tag: [c]}]",
            "components.0. in .*mine.yaml has no use for 'tag'. Did you mean 'tags'?",
        ),
        (
            b"components: [{id: loss/x, target: 'a:b', owner: me}]",
            "components.0. in .*mine.yaml has no use for 'owner'.",
        ),
        (b"components: [{id: lossx, target: 'a:b'}]", "`name` of component lossx/ must be"),
        (b"components: [{id: loss/x, target: a}]", "`target` of component loss/x must be"),
        (b"components: [{id: los/x, target: 'a:b'}]", "kind 'los', .*Did you mean 'loss'?"),
        (
            b"components: [{id: loss/x, target: 'a:b'}, {id: loss/x, target: 'a:c'}]",
            "Component 'loss/x' is registered twice.",
        ),
    ],
)
def test_a_file_that_is_wrong_is_listed_as_broken(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None, reason: str
) -> None:
    site.add("kexue-sound")
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_bytes(text)
    monkeypatch.setenv("KEXUE_REGISTRY", str(file))
    registry = Registry()
    plugin = registry.plugin("mine")
    assert plugin.state == "broken"
    pattern = reason.replace("?", r"\?").replace("{", r"\{").replace("}", r"\}")
    assert re.search(pattern, plugin.reason), plugin.reason
    assert registry.get("loss/sound").plugin == "sound"


def test_a_folder_is_no_file(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEXUE_REGISTRY", str(tmp_path))
    plugin = Registry().plugin(tmp_path.name)
    assert plugin.reason == f"{tmp_path} cannot be read: Is a directory."


@pytest.mark.parametrize("text", ["", "# nothing\n", "components:\nplugins:\nprefer:\n"])
def test_a_file_may_be_empty(own: Path, text: str) -> None:
    own.write_text(text, encoding="utf-8")
    plugin = Registry().plugin("registry")
    assert (plugin.state, plugin.components) == ("ok", ())


def test_a_folder_that_may_not_be_looked_into_is_left_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    assert read_settings().documents == ()
