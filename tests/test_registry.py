"""The registry: how a name becomes an object, and what is said when it does not."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kexue.core
from kexue.core import Component, Dataset, Experiment, Interface, hookimpl
from kexue.core.component import Example
from kexue.core.errors import (
    ArgumentError,
    ComponentConflictError,
    ComponentNotFoundError,
    KexueError,
    ManifestError,
    MissingDependencyError,
    PluginBrokenError,
)
from kexue.core.registry import Registry

if TYPE_CHECKING:
    from tests.conftest import Site

METHODS = '''
"""Methods without torch."""


class Sum:
    """Adds.

    Args:
        scale: What to multiply by.
        inner: What comes before.
    """

    def __init__(self, scale: float = 1.0, inner: object = None) -> None:
        self.scale, self.inner = scale, inner

    def forward(self, input, target):
        """Add.

        Args:
            input: One.
            target: Another.
        """
        return self.scale * (input + target)


class Needs:
    """Needs a size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def forward(self, input): ...


def difference(input, target, *, margin: float = 0.0):
    """Subtract.

    Args:
        input: One.
        target: Another.
        margin: What to add.
    """
    return input - target + margin


class Extra:
    """Needs what is not there."""

    def __init__(self):
        from kexue.core.errors import MissingDependencyError
        raise MissingDependencyError("Extra", "cvxpy", "pip install cvxpy")

    def forward(self, input): ...


number = 5
'''


@pytest.fixture
def registry(site: Site) -> Registry:
    """A registry of two losses, a function and a layer, and nothing else."""
    site.write("methods_of_tests.py", METHODS)
    made = Registry(discover=False)
    made.register(
        [
            Component("loss", "sum", "methods_of_tests:Sum", "Adds.", tags=("simple", "real")),
            Component("loss", "needs", "methods_of_tests:Needs", "Needs a size."),
            Component("loss", "difference", "methods_of_tests:difference", "Subtracts."),
            Component("loss", "extra", "methods_of_tests:Extra", "Lacks something."),
            Component("layer", "sum", "methods_of_tests:Sum", "Adds.", tags=("simple",)),
            Component("loss", "number", "methods_of_tests:number", "Is none."),
            Component("loss", "nowhere", "methods_of_tests:Smu", "Is not there."),
            Component("loss", "nothing", "no_such_module:Sum", "Is not there."),
        ],
        slug="toys",
        owner="kexue-toys",
    )
    return made


# -- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: Component("Loss", "x", "a:b", "One."), "`kind` of component Loss/x must be"),
        (lambda: Component("loss", "x_y", "a:b", "One."), "`name` of component loss/x_y must be"),
        (lambda: Component("loss", "-x", "a:b", "One."), "Found '-x'"),
        (lambda: Component("loss", "x", "a", "One."), "`target` .*'package.module:attribute'"),
        (lambda: Component("loss", "x", "a.py:", "One."), "`target`"),
        (lambda: Component("loss", "x", "a:b", ""), "`summary` .* one line of text. Found ''"),
        (lambda: Component("loss", "x", "a:b", "One.\nTwo."), "`summary`"),
        (lambda: Component("loss", "x", "a:b", "One.", ["post"]), "`references` .* tuple"),  # type: ignore[arg-type]
        (lambda: Component("loss", "x", "a:b", "One.", (), "tag"), "`tags` .*Found 'tag'"),  # type: ignore[arg-type]
        (lambda: Experiment("Bad", "a:b", "One."), "`name` of experiment Bad"),
        (lambda: Dataset("d", "a", "One."), "`target` of dataset d"),
        (lambda: Interface("k", "a:b", "One.", "a b", "a:c"), "`method` of interface k"),
        (lambda: Interface("k", "a:b", "One.", "go", "c"), "`target` of interface k"),
        (lambda: Interface("k", "a:b", "One.", "go", "a:c", fit="d"), "`target` of interface k"),
        (lambda: Interface("k", "a:b", "One.", "go", "a:c", template="d"), "`template`"),
    ],
)
def test_rejects_a_record(record: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        record()


def thawed(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 -- of our own making


def test_records_are_plain_values() -> None:
    component = Component("loss", "x", "a:b", "One.")
    assert component == Component("loss", "x", "a:b", "One.", plugin="p", owner="o")
    assert thawed(component) == component
    assert len({component, copy.copy(component)}) == 1


# -- look-ups -------------------------------------------------------------------------------------


def test_finds_by_id_by_name_and_by_owner(registry: Registry) -> None:
    assert registry.get("loss/needs").id == "loss/needs"
    assert registry.get("needs").id == "loss/needs"
    for owner in ("toys", "kexue-toys"):
        assert registry.get(f"{owner}:loss/needs").owner == "kexue-toys"


def test_lists_sorted_and_filtered(registry: Registry) -> None:
    ids = [c.id for c in registry.components()]
    assert ids == sorted(ids)
    assert [c.id for c in registry.components(tag="simple")] == ["layer/sum", "loss/sum"]
    assert [c.id for c in registry.components("layer")] == ["layer/sum"]
    assert [c.id for c in registry.components("loss", tag="real")] == ["loss/sum"]
    assert registry.components("sampler") == []
    assert registry.components(plugin="toys") == registry.components(plugin="kexue-toys")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss/neds", r"No component named 'loss/neds' is installed. Did you mean 'loss/needs'\?"),
        ("neds", r"Did you mean 'needs'\?"),
        ("los/needs", r"Did you mean 'loss/needs'\?"),
        ("loss/zzz", "No component named 'loss/zzz' is installed. `kexue list` shows what is."),
        ("sum", "'sum' is the name of several components. Write one of: layer/sum, loss/sum."),
        ("nobody:loss/needs", "'nobody' has no component 'loss/needs'; it is in kexue-toys."),
        ("loss/crf", r"is in the plugin 'crf', which is not installed. Run `kexue install crf`."),
        ("generator/vae-density", r"'vae-density', which is planned and .*/archives/8791"),
        ("optimizer/adafactr", r"Did you mean 'optimizer/adafactor'\?"),
    ],
)  # fmt: skip
def test_says_why_there_is_no_component(registry: Registry, name: str, message: str) -> None:
    with pytest.raises(ComponentNotFoundError, match=message) as caught:
        registry.get(name)
    assert caught.value.name == name
    assert caught.value.exit_status == 2
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy", r"No plugin named 'toy' is installed. Did you mean 'toys'\?"),
        ("crf", "The plugin 'crf' is not installed. Run `kexue install crf`."),
        ("vae-density", "The plugin 'vae-density' is planned and not yet written"),
    ],
)
def test_says_why_there_is_no_plugin(registry: Registry, name: str, message: str) -> None:
    for look in (registry.plugin, registry.experiments):
        with pytest.raises(ComponentNotFoundError, match=message):
            look(name)
    with pytest.raises(ComponentNotFoundError, match=message):
        registry.components(plugin=name)


def test_says_that_there_is_no_kind(registry: Registry) -> None:
    message = r"No kind named 'los' is installed. Did you mean 'loss'\? Installed: decoder, .*loss"
    with pytest.raises(ComponentNotFoundError, match=message):
        registry.components("los")


def test_says_that_the_plugin_is_broken(site: Site) -> None:
    site.add("kexue-other", "raise RuntimeError('out of order')", slug="vae-density", version="2.0")
    site.add("kexue-gone", "import no_such_package")
    registry = Registry()
    message = (
        r"'generator/vae-density' is in the plugin 'vae-density' \(kexue-other 2.0\), which could "
        r"not be loaded: RuntimeError: out of order. Other plugins are unaffected."
    )
    with pytest.raises(PluginBrokenError, match=message) as caught:
        registry.get("generator/vae-density")
    assert caught.value.plugin == "vae-density"
    message = "Broken and not searched: gone, vae-density; `kexue plugins` says why."
    with pytest.raises(ComponentNotFoundError, match=message):
        registry.get("loss/something-else")


def test_says_that_the_plugin_is_switched_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("kexue-other", slug="vae-density")
    site.add("kexue-more")
    monkeypatch.setenv("KEXUE_DISABLE", "vae-density,more")
    message = (
        "in the plugin 'vae-density', which is switched off by KEXUE_DISABLE=more,vae-density."
    )
    with pytest.raises(ComponentNotFoundError, match=message):
        Registry().get("generator/vae-density")
    message = "Switched off and not searched: more, vae-density; `kexue plugins` says why."
    with pytest.raises(ComponentNotFoundError, match=message):
        Registry().get("loss/more")


def test_says_that_the_plugin_is_another_version(site: Site) -> None:
    site.add("kexue-vae-density")
    message = (
        r"'generator/vae-density' is in the plugin 'vae-density' \(kexue-vae-density 1.0\) by the "
        r"catalogue, and this version of it lacks it. "
        r"Run `pip install --upgrade kexue-vae-density`."
    )
    with pytest.raises(ComponentNotFoundError, match=message):
        Registry().get("generator/vae-density")


# -- two owners -----------------------------------------------------------------------------------


@pytest.fixture
def clashing(site: Site) -> Site:
    """Two distributions that have ``loss/dice``."""
    site.add("kexue-first", site.components("loss/dice", target="kexue_first_method:Dice"))
    source = site.components("loss/dice", target="other_second_method:Dice")
    site.add("other-second", source, slug="second")
    return site


def test_two_owners_are_an_error_on_use_that_says_how_to_choose(
    clashing: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    assert registry.conflicts() == {"loss/dice": ("kexue-first", "other-second")}
    message = (
        r"loss/dice is registered by kexue-first and by other-second. Choose with "
        r"`prefer: \{loss/dice: kexue-first\}` in .*registry.yaml, or write kexue-first:loss/dice."
    )
    for use in (registry.get, registry.load, registry.create, registry.describe):
        with pytest.raises(ComponentConflictError, match=message) as caught:
            use("dice")
    assert caught.value.owners == ("kexue-first", "other-second")
    assert registry.get("other-second:loss/dice").target == "other_second_method:Dice"
    assert registry.get("first:dice").target == "kexue_first_method:Dice"


@pytest.mark.parametrize("owner", ["other-second", "second"])
def test_the_user_prefers_an_owner(
    clashing: Site, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    file = clashing.write("mine.yaml", f"prefer: {{loss/dice: {owner}}}")
    monkeypatch.setenv("KEXUE_REGISTRY", str(file))
    registry = Registry()
    assert registry.conflicts() == {}
    assert registry.get("loss/dice").owner == "other-second"


def test_the_user_prefers_a_file(clashing: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clashing.folder / "mine.yaml"
    text = f"components: [{{id: loss/dice, target: dice.py:Dice}}]\nprefer: {{loss/dice: {path}}}"
    clashing.write("mine.yaml", text)
    monkeypatch.setenv("KEXUE_REGISTRY", str(path))
    assert Registry().get("dice").target == f"{clashing.folder}/dice.py:Dice"


def test_preferring_nobody_leaves_the_conflict(
    clashing: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "KEXUE_REGISTRY", str(clashing.write("mine.yaml", "prefer: {loss/dice: nobody}"))
    )
    with pytest.raises(ComponentConflictError, match="kexue-first and by other-second"):
        Registry().get("dice")


def test_the_same_target_from_two_sources_counts_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("kexue-first", site.components("loss/dice", target="dice_method:Dice"))
    text = "components: [{id: loss/dice, target: 'dice_method:Dice', tags: [mine]}]"
    monkeypatch.setenv("KEXUE_REGISTRY", str(site.write("mine.yaml", text)))
    registry = Registry()
    assert registry.conflicts() == {}
    assert registry.get("loss/dice").tags == ("mine",)
    assert registry.get("kexue-first:loss/dice").tags == ()
    assert [c.id for c in registry.components(plugin="first")] == ["loss/dice"]


def test_two_plugins_of_one_name(site: Site) -> None:
    site.add("kexue-twin")
    site.add("other-twin", slug="twin")
    registry = Registry()
    with pytest.raises(ComponentConflictError, match="plugin of kexue-twin and of other-twin"):
        registry.plugin("twin")
    assert registry.plugin("other-twin").owner == "other-twin"
    assert {c.owner for c in registry.components(plugin="twin")} == {"kexue-twin", "other-twin"}


# -- objects --------------------------------------------------------------------------------------


def test_creates(registry: Registry) -> None:
    made = registry.create("loss/sum", scale=2.0)
    assert made.forward(1, 2) == 6.0
    assert type(made) is registry.load("loss/sum")
    assert registry.create(registry.get("needs"), size=3).size == 3


def test_creates_functions(registry: Registry) -> None:
    made = registry.create("difference", margin=0.5)
    assert made(3, 1) == made.forward(3, 1) == 2.5
    assert made.forward(input=3, target=1, margin=0.0) == 2
    assert repr(made) == "FunctionComponent(difference, margin=0.5)"
    with pytest.raises(AttributeError, match="decode"):
        _ = made.decode


def test_what_was_created_can_be_pickled_and_copied(registry: Registry) -> None:
    for made in (registry.create("loss/sum", scale=2.0), registry.create("difference", margin=1.0)):
        for twin in (thawed(made), copy.deepcopy(made)):
            assert vars(twin) == vars(made)
            assert twin.forward(3, 1) == made.forward(3, 1)


@pytest.mark.parametrize(
    ("name", "params", "message", "argument"),
    [
        ("loss/sum", {"scal": 1}, r"'scal'. Did you mean 'scale'\? It takes: scale, inner", "scal"),
        ("loss/needs", {}, r"loss/needs needs `size` \(int\). Give it with `--set size=…`", "size"),
        ("difference", {"input": 1}, "no parameter 'input'.* It takes: margin.", "input"),
        ("extra", {"x": 1}, "loss/extra has no parameter 'x'. It takes none.", "x"),
    ],
)  # fmt: skip
def test_rejects_parameters(
    registry: Registry, name: str, params: dict[str, Any], message: str, argument: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        registry.create(name, **params)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"must be a class or a function. Found int at methods_of_tests:number."),
        ("nowhere", r"has no 'Smu'. Did you mean 'Sum'\? Other components are unaffected."),
        ("nothing", r"no_such_module could not be imported: ModuleNotFoundError: No module named"),
    ],
)  # fmt: skip
def test_names_what_cannot_be_loaded(registry: Registry, name: str, message: str) -> None:
    whose = rf"loss/{name} of plugin 'toys' \(kexue-toys\) .*"
    for use in (registry.load, registry.create, registry.describe):
        with pytest.raises(PluginBrokenError, match=whose + message) as caught:
            use(name)
        assert caught.value.plugin == "toys"


@pytest.mark.parametrize(
    "line", ["raise RuntimeError('bad torch')", "raise SystemExit('bad torch')"]
)
def test_a_lazy_module_that_fails_late_is_named(site: Site, line: str) -> None:
    source = f"def __getattr__(name):\n    if name == 'Lazy':\n        {line}\n"
    source += "    raise AttributeError(name)\n"
    site.write("lazy_of_tests.py", source)
    registry = Registry(discover=False)
    registry.register(Component("loss", "lazy", "lazy_of_tests:Lazy", "One."), slug="toys")
    message = "lazy_of_tests could not import 'Lazy': (RuntimeError|SystemExit): bad torch."
    with pytest.raises(PluginBrokenError, match=message):
        registry.load("lazy")


def test_a_single_file_is_a_component(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write("my focal.py", METHODS.replace("class Sum", "class Focal"))
    text = "components: [{id: loss/focal, target: 'my focal.py:Focal', summary: Focal loss.}]"
    monkeypatch.setenv("KEXUE_REGISTRY", str(site.write("mine.yaml", text)))
    registry = Registry()
    made = registry.create("focal", scale=3.0)
    assert made.forward(1, 1) == 6.0
    assert registry.load("focal") is registry.load("focal")
    assert thawed(made).scale == 3.0
    assert registry.describe("focal").parameters[0].doc == "What to multiply by."
    assert registry.plugin("mine").source == "file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (", r"failed: SyntaxError: invalid syntax"),
        ("raise SystemExit", r"failed: SystemExit\."),
        (None, r"bad.py does not exist"),
    ],
)
def test_a_single_file_that_fails(
    site: Site, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    if text is not None:
        site.write("bad.py", text)
    listed = "components: [{id: loss/bad, target: bad.py:Bad}]"
    monkeypatch.setenv("KEXUE_REGISTRY", str(site.write("mine.yaml", listed)))
    registry = Registry()
    before = set(sys.modules)
    with pytest.raises(PluginBrokenError, match=message):
        registry.load("bad")
    assert not [name for name in set(sys.modules) - before if "bad" in name]


# -- configuration --------------------------------------------------------------------------------


def test_builds_nested_configurations(registry: Registry, tmp_path: Path) -> None:
    config = {
        "use": "loss/sum",
        "with": {"scale": 2, "inner": [{"use": "loss/needs", "with": {"size": 1}}, 7]},
    }
    made = registry.build(config)
    assert made.scale == 2
    assert [getattr(part, "size", part) for part in made.inner] == [1, 7]
    assert registry.build({"a": config, "b": 1})["a"].scale == 2
    assert registry.build({"use": "loss/sum"}).scale == 1.0
    assert registry.build({"use": "loss/sum", "with": None}).scale == 1.0
    assert registry.build("text") == "text"
    file = tmp_path / "config.yaml"
    file.write_text("use: loss/sum\nwith: {scale: 3}\n")
    assert registry.build(file).scale == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use": "loss/needs"}, "config: loss/needs needs `size`"),
        ({"a": [1, {"use": "loss/sum", "with": {"inner": {"use": "loss/neds"}}}]},
         r"config.a\[1\].with.inner: No component named 'loss/neds'.* Did you mean 'loss/needs'"),
        ({"use": "loss/sum", "params": {}}, r"config must be \{use: component, with: .*'params'"),
        ({"use": "loss/sum", "with": [1]}, r"config must be .* Found \{'use'"),
        ({"use": "loss/sum", "with": {1: 2}}, "config must be "),
        ({"use": 5}, r"config must be .* Found \{'use': 5\}."),
        ({"b": {"use": "loss/nowhere"}}, "config.b: loss/nowhere of plugin 'toys'"),
        ({"b": {"use": "loss/extra"}}, "config.b: Extra needs cvxpy, which is not installed"),
    ],
)  # fmt: skip
def test_errors_in_configurations_name_the_place(
    registry: Registry, config: Any, message: str
) -> None:
    with pytest.raises(KexueError, match=message):
        registry.build(config)


def test_a_file_that_is_not_yaml(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("use: [")
    with pytest.raises(ManifestError, match=r"config.yaml is not valid YAML"):
        registry.build(file)


# -- registering ----------------------------------------------------------------------------------


def test_registers_modules_objects_records_and_several_records() -> None:
    component = Component("loss", "one", "a:b", "One.")

    class Hooks:
        @hookimpl
        def kexue_components(self) -> list[Component]:
            return [component]

    module = types.ModuleType("made_up")
    module.kexue_components = hookimpl(lambda: iter([component]))  # type: ignore[attr-defined]
    given: list[Any] = [component, [component], (component,), iter([component]), Hooks(), module]
    for plugin in given:
        registry = Registry(discover=False)
        registered = registry.register(plugin)
        assert registered.components == (component,)
        assert registry.get("one").plugin == registered.slug
    assert registered.slug == "made_up"
    assert registry.register(Dataset("d", "a:b", "One."), slug="more").slug == "more"
    assert "d" in {d.name for d in registry.datasets()}
    registry.register(Experiment("e", "a:b", "One."), slug="claims")
    assert [e.id for e in registry.experiments()] == ["claims/e"]
    assert [e.id for e in registry.experiments("claims")] == ["claims/e"]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (5, "5 implements none of the hooks"),
        ("loss", "'loss' implements none of the hooks"),
        ([5], "a plugin consists of records of kexue.core. Found 5"),
        ([Example({}, {})], r"a plugin consists of records of kexue.core. Found Example"),
        ([Component("loss", "x", "a:b", "."), Component("loss", "x", "a:b", ".")],
         "Component 'loss/x' is registered twice"),
        (Component("los", "x", "a:b", "One."), "los/x is of the kind 'los', .* you mean 'loss'"),
        (Interface("loss", "a:b", "One.", "go", "a:c"), "'loss' is already provided by kexue"),
    ],
)  # fmt: skip
def test_registers_all_or_nothing(registry: Registry, plugin: Any, message: str) -> None:
    before = registry.plugins
    with pytest.raises(ManifestError, match=message):
        registry.register(plugin, slug="refused")
    assert registry.plugins == before


def test_a_second_provider_of_a_kind_is_refused() -> None:
    registry = Registry(discover=False)
    kind = Interface("probe", "a:b", "One.", "go", "a:c")
    first = registry.register(kind, slug="first")
    with pytest.raises(ManifestError, match="the kind 'probe' is already provided by first"):
        registry.register(kind, slug="second")
    assert registry.plugins == (first,)
    registry.register(Component("probe", "one", "a:b", "One."), slug="user")
    assert registry.get("one").kind == "probe"


def test_what_is_registered_provides_kinds_to_what_is_installed(site: Site) -> None:
    site.add("kexue-user", site.components("probe/one"))
    registry = Registry()
    assert registry.plugin("user").state == "broken"
    registry.register(Interface("probe", "a:b", "One.", "go", "a:c"), slug="provider")
    assert registry.plugin("user").state == "ok"
    assert registry.get("probe/one").plugin == "user"


# -- the default registry -------------------------------------------------------------------------


def test_the_package_offers_the_same_on_the_default_registry() -> None:
    assert isinstance(kexue.core.registry, Registry)
    assert kexue.core.components("loss") == kexue.core.registry.components("loss")
    assert kexue.core.describe("loss/zlpr") == kexue.core.registry.describe("loss/zlpr")
    made = kexue.core.create("loss/zlpr", reduction="sum")
    assert made.reduction == "sum"
    assert type(kexue.core.build({"use": "loss/zlpr"})) is type(made)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KexueError(),
        ArgumentError("`x` of y.", argument="x"),
        ComponentNotFoundError("No.", name="x"),
        ComponentConflictError("Two.", name="x", owners=("a", "b")),
        MissingDependencyError("Extra", "cvxpy", "pip install cvxpy"),
        PluginBrokenError("Broken.", plugin="p"),
    ],
)
def test_errors_cross_processes(error: KexueError) -> None:
    twin = thawed(error)
    assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))
