"""The catalogue: what it must hold, and that manifests and packages say the same."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path

import pytest

import kexue.core.catalogue
from kexue.core.catalogue import Catalogue, Entry, catalogue, load_yaml
from kexue.core.errors import ComponentNotFoundError, ManifestError
from kexue.core.registry import Registry

ROOT = Path(__file__).parent.parent
ENTRIES = list(catalogue().entries.values())
AVAILABLE = [entry for entry in ENTRIES if not entry.planned]

in_checkout = pytest.mark.skipif(
    not (ROOT / "registry.yaml").is_file(), reason="not a checkout of the repository"
)


def entry(slug: str, *, requires: tuple[str, ...] = (), status: str = "available") -> Entry:
    return Entry(
        slug, slug, slug, "2020-01-01", 1, f"kexue-{slug}", f"plugins/{slug}", status,
        (f"loss/{slug}",), "One.", requires,
    )  # fmt: skip


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ENTRIES, ids=lambda e: e.slug)
def test_every_entry_is_complete(plugin: Entry) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", plugin.slug)
    assert plugin.distribution == f"kexue-{plugin.slug}"
    assert plugin.path == f"plugins/{plugin.slug}"
    assert plugin.status in {"available", "planned"}
    assert dt.date.fromisoformat(plugin.date) >= dt.date(2009, 1, 1)
    assert plugin.url == f"https://kexue.fm/archives/{plugin.post}"
    assert plugin.title
    assert plugin.english
    assert plugin.summary.endswith(".")
    assert "\n" not in plugin.summary
    assert plugin.components
    for name in plugin.components:
        assert re.fullmatch(r"[a-z-]+/([a-z0-9-]+|\*)", name)
        assert plugin.planned or not name.endswith("*")
    assert set(plugin.requires) <= set(catalogue().entries)


def test_nothing_has_two_owners() -> None:
    posts = [e.post for e in ENTRIES]
    assert len(set(posts)) == len(posts)
    names = [c for e in ENTRIES for c in e.components if not c.endswith("*")]
    assert len(set(names)) == len(names)


def test_the_file_has_no_key_twice() -> None:
    text = (Path(kexue.core.catalogue.__file__).parents[1] / "registry.yaml").read_text("utf-8")
    slugs = re.findall(r"^  ([a-z0-9-]+):$", text, re.MULTILINE)
    assert slugs == sorted(set(slugs))
    assert set(slugs) == set(catalogue().entries)


# -- agreement ------------------------------------------------------------------------------------


@in_checkout
def test_every_folder_is_an_available_plugin() -> None:
    folders = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    assert folders == {e.slug for e in AVAILABLE}


@in_checkout
@pytest.mark.parametrize("plugin", AVAILABLE, ids=lambda e: e.slug)
def test_packages_say_what_the_catalogue_says(plugin: Entry) -> None:
    text = (ROOT / plugin.path / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    package = f"kexue_{plugin.slug.replace('-', '_')}"
    assert project["name"] == plugin.distribution
    assert project["entry-points"]["kexue"] == {plugin.slug: package}
    assert project["requires-python"] == ">=3.11"
    needs = {re.split(r"[ <>=!~\[;]", d, maxsplit=1)[0] for d in project["dependencies"]}
    assert "kexue" in needs
    first_party = {e.distribution for e in ENTRIES}
    assert needs & first_party == {f"kexue-{slug}" for slug in plugin.requires}
    for name in ("__init__.py", "py.typed"):
        assert (ROOT / plugin.path / package / name).is_file()
    assert (ROOT / plugin.path / "README.md").is_file()


@pytest.mark.parametrize("plugin", AVAILABLE, ids=lambda e: e.slug)
def test_manifests_say_what_the_catalogue_says(plugin: Entry) -> None:
    registry = Registry()
    if plugin.slug not in {p.slug for p in registry.plugins}:
        pytest.skip(f"{plugin.distribution} is not installed")
    installed = registry.plugin(plugin.slug)
    assert installed.state == "ok", installed.reason
    assert installed.owner == plugin.distribution
    assert {c.id for c in installed.components} == set(plugin.components)
    for component in installed.components:
        assert any(plugin.url in reference for reference in component.references)


@in_checkout
@pytest.mark.parametrize("plugin", AVAILABLE, ids=lambda e: e.slug)
def test_plugins_import_only_what_they_require(plugin: Entry) -> None:
    package = ROOT / plugin.path / f"kexue_{plugin.slug.replace('-', '_')}"
    text = "\n".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) kexue_(\w+)", text, re.MULTILINE))
    own = plugin.slug.replace("-", "_")
    assert imported - {own} <= {slug.replace("-", "_") for slug in plugin.requires}


# -- look-ups -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["crf", "kexue-crf", "5542", "https://kexue.fm/archives/5542",
     "https://spaces.ac.cn/archives/5542/", "kexue.fm/archives/5542"],
)  # fmt: skip
def test_finds_a_plugin_by_whatever_it_is_called(name: str) -> None:
    assert catalogue().entry(name).slug == "crf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cfr",
            r"No plugin named 'cfr' is in the catalogue. Did you mean 'crf'\? `kexue list --all`",
        ),
        ("loss/crf", "in the catalogue. It is in 'crf'."),
        ("9999", "No plugin named '9999' is in the catalogue."),
        ("", "No plugin named ''"),
    ],
)
def test_says_that_there_is_no_such_plugin(name: str, message: str) -> None:
    with pytest.raises(ComponentNotFoundError, match=message) as caught:
        catalogue().entry(name)
    assert caught.value.name == name


def test_finds_the_owners_of_a_component() -> None:
    assert [e.slug for e in catalogue().owners("loss/crf")] == ["crf"]
    assert [e.slug for e in catalogue().owners("crf")] == ["crf"]
    assert catalogue().owners("loss/nothing") == []


def test_puts_what_is_imported_first() -> None:
    rows = Catalogue([entry("a", requires=("b", "c")), entry("b", requires=("c",)), entry("c")])
    assert [e.slug for e in rows.closure(["a", "c"])] == ["c", "b", "a"]
    assert [e.slug for e in catalogue().closure(["memm"])] == ["crf", "memm"]
    with pytest.raises(ComponentNotFoundError, match="No plugin named 'd'"):
        rows.closure(["a", "d"])


def test_no_plugin_imports_itself_in_a_circle() -> None:
    catalogue().closure(catalogue().entries)
    circle = Catalogue([entry("a", requires=("b",)), entry("b", requires=("a",))])
    with pytest.raises(ManifestError, match="plugins import each other: a → b → a"):
        circle.closure(["a"])


def test_a_folder_counts_only_if_it_is_there() -> None:
    assert entry("nothing-of-tests").folder is None
    if (ROOT / "plugins" / "crf").is_dir():
        assert catalogue().entry("crf").folder == ROOT / "plugins" / "crf"


# -- files that are wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plugins: [a]", r"catalogue.yaml must hold a mapping `plugins`. Found list."),
        ("", r"must hold a mapping `plugins`. Found NoneType."),
        ("- a", r"must hold a mapping `plugins`. Found list."),
        ("plugins: {a: {title: x}}", r"the entry of 'a' is not of its form: 'components'"),
        ("plugins: {a: x}", r"the entry of 'a' is not of its form"),
        ("plugins: {a: {components: [x], colour: red}}", r"'a' is not of its form: .*colour"),
        ("plugins: {", r"catalogue.yaml is not valid YAML: "),
    ],
)
def test_rejects_a_catalogue(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "catalogue.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        Catalogue.read(file)


def test_reads_yaml_without_building_objects(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text("!!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(ManifestError, match="is not valid YAML: could not determine a constructor"):
        load_yaml(file)
