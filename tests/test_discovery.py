"""Discovery: whatever a plugin does when it is found, it does to itself alone."""

from __future__ import annotations

import re
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from kexue.core.errors import ManifestError
from kexue.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from tests.conftest import Site

HOOK = "@hookimpl\ndef kexue_components(): "
KIND = """
@hookimpl
def kexue_interfaces():
    return [Interface('probe', 'a:B', 'One.', 'go', 'a:run')]

"""


def found(slug: str) -> Plugin:
    """Return a plugin as a fresh registry finds it, after a sound one beside it was found."""
    registry = Registry()
    assert registry.plugin("sound").state == "ok"
    assert registry.get("loss/sound").owner == "kexue-sound"
    return registry.plugin(slug)


BROKEN = {
    "missing-import": ("import no_such_package", "ModuleNotFoundError: No module named"),
    "mismatched": (
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "RuntimeError: operator torchvision::nms does not exist.",
    ),
    "exits": ("raise SystemExit(3)", "SystemExit: 3."),
    "exits-silently": ("import sys; sys.exit()", "SystemExit."),
    "no-python": ("def (", "SyntaxError: invalid syntax"),
    "raises": (f"{HOOK}raise ValueError('two\\nlines')", "ValueError: two lines."),
    "raises-late": (
        f"{HOOK}\n    yield Component('loss', 'x', 'a:b', 'One.')\n    raise ValueError('late')",
        "ValueError: late.",
    ),
    "returns-text": (f"{HOOK}return 'abc'", "must return Component records. Found 'abc'."),
    "returns-nothing": (f"{HOOK}return None", "must return Component records. Found None."),
    "returns-number": (f"{HOOK}return 5", "must return Component records. Found 5."),
    "returns-others": (
        f"{HOOK}return [Dataset('d', 'a:b', 'One.')]",
        r"must return Component records. Found Dataset\(name='d', ",
    ),
    "twice": (
        f"{HOOK}return [Component('loss', 'x', t, 'One.') for t in ('a:b', 'a:c')]",
        "Component 'loss/x' is registered twice.",
    ),
    "ill-named": (
        f"{HOOK}return [Component('loss', 'Dice', 'a:b', 'One.')]",
        "`name` of component loss/Dice must be lower-case words .*'am-softmax'. Found 'Dice'.",
    ),
    "ill-aimed": (
        f"{HOOK}return [Component('loss', 'dice', 'a.b', 'One.')]",
        "`target` of component loss/dice must be 'package.module:attribute' .* Found 'a.b'.",
    ),
    "incomplete": (
        f"{HOOK}return [Component('loss', 'dice')]",
        "TypeError: Component.__init__.. missing 2 required .* 'target' and 'summary'.",
    ),
    "misspelt-hook": (
        "@hookimpl\ndef kexue_component(): return []",
        "kexue_component is not a hook of kexue. Did you mean 'kexue_components'.",
    ),
    "takes-arguments": (
        "@hookimpl\ndef kexue_components(registry): return []",
        r"its hooks do not fit: .* kexue_components\(registry\)",
    ),
    "without-hooks": ("", "implements none of the hooks kexue_components, .*`@hookimpl`"),
    "unmarked": (
        "def kexue_components(): return []",
        "kexue_unmarked implements none of the hooks .* mark them with `@hookimpl`",
    ),
    "unknown-kind": (
        f"{HOOK}return [Component('los', 'dice', 'a:b', 'One.')]",
        r"los/dice is of the kind 'los', which no installed plugin provides. Did you mean 'loss'\?",
    ),
    "takes-a-kind": (
        KIND.replace("probe", "loss"),
        "the kind 'loss' is already provided by kexue.",
    ),
    "looks-around": (
        "import kexue.core.registry as module\nmodule.CURRENT.plugins",
        "a manifest must not look anything up in the registry",
    ),
}


@pytest.mark.parametrize("slug", BROKEN)
def test_survives_and_names_a_broken_plugin(
    site: Site, monkeypatch: pytest.MonkeyPatch, slug: str
) -> None:
    import kexue.core.registry as module

    source, reason = BROKEN[slug]
    site.add("kexue-sound")
    site.add(f"kexue-{slug}", source, version="0.3")
    registry = Registry()
    monkeypatch.setattr(module, "CURRENT", registry, raising=False)
    plugin = registry.plugin(slug)
    assert registry.plugin("sound").state == "ok"
    assert registry.get("loss/sound").owner == "kexue-sound"
    assert (plugin.state, plugin.owner, plugin.version) == ("broken", f"kexue-{slug}", "0.3")
    assert re.search(reason, plugin.reason), plugin.reason
    assert plugin.error is not None
    assert not [*plugin.components, *plugin.interfaces, *plugin.experiments, *plugin.datasets]
    assert "\n" not in plugin.reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no such module!", "its entry point must name a module, .*Found 'no such module!'"),
        ("no_such_module", "No module named 'no_such_module'"),
        ("kexue_sound:nothing", "has no attribute 'nothing'"),
    ],
)
def test_survives_an_entry_point_that_leads_nowhere(site: Site, value: str, reason: str) -> None:
    site.add("kexue-sound")
    site.add("kexue-astray", value=value)
    assert re.search(reason, found("astray").reason)


def test_survives_a_slow_plugin_and_says_how_slow(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-slow", "import time; time.sleep(0.3)\n" + site.components("loss/slow"))
    assert found("slow").seconds >= 0.3


def test_keeps_standard_output_clean(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.add("kexue-sound")
    site.add("kexue-chatty", "print('hello')\n" + site.components("loss/chatty"))
    assert found("chatty").state == "ok"
    assert capsys.readouterr() == ("", "hello\n")


def test_keyboard_interrupt_is_not_a_broken_plugin(site: Site) -> None:
    site.add("kexue-interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        _ = Registry().plugins


# -- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kexue-unreadable", "somebody-elses"])
@pytest.mark.parametrize("text", ["[kexue]\nno equals sign\n", b"\xff\xfe[kexue]\nx = y\n"])
def test_survives_entry_points_that_cannot_be_read(
    site: Site, name: str, text: str | bytes
) -> None:
    site.add("kexue-sound")
    site.add(name)
    site.write(f"{name.replace('-', '_')}-1.0.dist-info/entry_points.txt", text)
    states = {p.slug: p for p in Registry().plugins}
    assert states["sound"].state == "ok"
    assert {"crf", "memm", "zlpr"} <= set(states)
    assert ("unreadable" in states) == (name == "kexue-unreadable")
    if name == "kexue-unreadable":
        assert states["unreadable"].state == "broken"
        assert "its entry_points.txt cannot be read" in states["unreadable"].reason


def test_survives_metadata_that_cannot_be_read(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-odd")
    site.write("kexue_odd-1.0.dist-info/METADATA", b"Name: \xff\xfe\n")
    assert found("odd").owner == "kexue_odd"
    (site.folder / "kexue_odd-1.0.dist-info" / "METADATA").unlink()
    assert found("odd").state == "ok"


def test_reads_the_metadata_of_old_installations(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-old")
    (site.folder / "kexue_old-1.0.dist-info").rename(site.folder / "kexue_old.egg-info")
    info = site.folder / "kexue_old.egg-info"
    (info / "METADATA").rename(info / "PKG-INFO")
    assert (found("old").owner, found("old").version) == ("kexue-old", "1.0")


@pytest.mark.parametrize(
    "requirement",
    [
        "kexue",
        "kexue>=0.1",
        "kexue>=0.1.0",
        "kexue (>=0.1)",
        "kexue<99,>=0.0.1",
        "kexue~=0.1",
        "kexue[lab]>=0.1",
        "kexue>=99; extra == 'later'",
        "kexue>=99; python_version < '3'",
        "kexue-crf>=99",
        "kexuex>=99",
        "torch>=99",
    ],
)
def test_accepts_a_plugin_for_this_core(site: Site, requirement: str) -> None:
    site.add("kexue-sound", requires=["torch>=2", requirement, "kexue-memm"])
    assert found("sound").state == "ok"


@pytest.mark.parametrize(
    "requirement",
    [
        "kexue>=99",
        "kexue (>=99)",
        "kexue[lab]>=99",
        "Kexue>=99",
        "kexue==0.0.1",
        "kexue<0.1",
        "kexue>=0.1,<0.1.0",
        "kexue>=99; python_version > '3'",
    ],
)
def test_does_not_import_a_plugin_for_another_core(site: Site, requirement: str) -> None:
    site.add("kexue-sound")
    site.add("kexue-newer", requires=[requirement])
    plugin = found("newer")
    assert plugin.state == "broken"
    needs = requirement.partition(";")[0]
    assert plugin.reason == (
        f"kexue-newer 1.0 needs {needs}, and 0.1.0 is installed. "
        f"Run `pip install --upgrade kexue kexue-newer`."
    )
    assert "kexue_newer" not in sys.modules


def test_a_requirement_that_nobody_understands_breaks_its_plugin_alone(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-muddled", requires=["kexue>=abc"])
    assert "InvalidRequirement" in found("muddled").reason


def test_finds_a_distribution_once_although_it_is_there_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("kexue-sound")
    monkeypatch.setattr(sys, "path", [str(site.folder), *sys.path])
    assert [p.owner for p in Registry().plugins].count("kexue-sound") == 1


def test_two_plugins_of_one_distribution(site: Site) -> None:
    site.add("kexue-sound")
    site.add(
        "kexue-pair",
        site.components("loss/left") + "class Right:\n    @hookimpl\n    def kexue_components(self)"
        ":\n        return [Component('loss', 'right', 'a:b', 'One.')]\nright = Right()\n",
        entry_points="[kexue]\nleft = kexue_pair\nright = kexue_pair:right\n",
    )
    assert [found(slug).state for slug in ("left", "right")] == ["ok", "ok"]


def test_order_does_not_depend_on_the_file_system(site: Site) -> None:
    for name in ("kexue-b", "kexue-a", "kexue-c"):
        site.add(name)
    slugs = [p.slug for p in Registry().plugins]
    assert slugs == sorted(slugs)


def test_a_hook_of_a_later_core_may_be_optional(site: Site) -> None:
    site.add("kexue-sound")
    site.add(
        "kexue-early",
        site.components("loss/early")
        + "from kexue.core import hookimpl as h\n@h(optionalhook=True)\ndef kexue_later(x): ...\n",
    )
    assert found("early").state == "ok"


# -- kinds ----------------------------------------------------------------------------------------


def test_a_plugin_brings_a_kind_that_others_use(site: Site) -> None:
    site.add("kexue-a-user", site.components("probe/one"))
    site.add("kexue-provider", KIND + site.components("probe/two"))
    registry = Registry()
    assert [c.id for c in registry.components("probe")] == ["probe/one", "probe/two"]
    assert registry.interface("probe").plugin == "provider"


def test_two_providers_of_one_kind(site: Site) -> None:
    site.add("kexue-first", KIND + site.components("probe/one"))
    site.add("kexue-second", KIND + site.components("probe/two"))
    registry = Registry()
    assert registry.plugin("second").reason == (
        "the kind 'probe' is already provided by kexue-first."
    )
    assert [c.id for c in registry.components("probe")] == ["probe/one"]


def test_a_broken_provider_takes_the_users_of_its_kind_along(site: Site) -> None:
    site.add("kexue-a-user", site.components("probe/one"))
    site.add("kexue-provider", KIND + site.components("lens/two"))
    registry = Registry()
    assert "lens/two is of the kind 'lens'" in registry.plugin("provider").reason
    assert "probe/one is of the kind 'probe'" in registry.plugin("a-user").reason


# -- switches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["sound", "kexue-sound", "other, sound", "*", "a,,sound,"])
def test_disabled_plugins_are_not_imported(
    site: Site, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    site.add("kexue-sound")
    monkeypatch.setenv("KEXUE_DISABLE", names)
    registry = Registry()
    plugin = registry.plugin("sound")
    assert plugin.state == "disabled"
    assert "KEXUE_DISABLE=" in plugin.reason
    assert "kexue_sound" not in sys.modules
    assert "loss/sound" not in {c.id for c in registry.components()}


def test_disabling_names_nobody_has(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEXUE_DISABLE", "nobody,no-one")
    site.add("kexue-sound")
    assert found("sound").state == "ok"


def test_a_failure_is_not_remembered(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-mended", "raise RuntimeError('not yet')")
    registry = Registry()
    assert registry.plugin("mended").state == "broken"
    site.add("kexue-mended")
    assert registry.plugin("mended").state == "broken"
    registry.refresh()
    assert registry.plugin("mended").state == "ok"
    assert registry.plugin("sound").state == "ok"


def test_refresh_sees_what_came_and_what_went(site: Site) -> None:
    registry = Registry()
    assert registry.plugins is registry.plugins
    site.add("kexue-late")
    assert "late" not in {p.slug for p in registry.plugins}
    registry.refresh()
    assert "late" in {p.slug for p in registry.plugins}
    (site.folder / "kexue_late-1.0.dist-info" / "entry_points.txt").unlink()
    registry.refresh()
    assert "late" not in {p.slug for p in registry.plugins}


# -- cost -----------------------------------------------------------------------------------------


def test_names_what_a_manifest_pulls_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # where it is installed
    site.write("jax.py", "")
    site.add("kexue-sound")
    site.add("kexue-heavy", "import jax\n" + site.components("loss/heavy"))
    assert found("heavy").heavy == ("jax",)
    assert found("sound").heavy == ()


def test_threads_discover_once(site: Site) -> None:
    site.write("counted.py", "count = 0\n")
    site.add(
        "kexue-sound",
        "import time, counted\ntime.sleep(0.05)\n"
        "@hookimpl\ndef kexue_components():\n    counted.count += 1\n"
        "    return [Component('loss', 'sound', 'a:b', 'One.')]\n",
    )
    registry = Registry()
    start = threading.Barrier(8)
    seen: list[tuple[Plugin, ...]] = []

    def look() -> None:
        start.wait()
        seen.append(registry.plugins)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(plugins) for plugins in seen}) == 1
    assert {p.slug: p.state for p in seen[0]}["sound"] == "ok"
    assert sys.modules["counted"].count == 1


# -- from Python ----------------------------------------------------------------------------------


def test_registering_after_discovery_leaves_installed_plugins_alone(site: Site) -> None:
    from kexue.core import Component

    site.add("kexue-sound")
    registry = Registry()
    before = registry.plugins
    registry.register(Component("loss", "mine", "a:b", "One."))
    assert registry.plugins[1:] == before
    assert registry.get("loss/mine").plugin == "registered"


def test_the_manager_holds_the_hooks_of_sound_plugins(site: Site) -> None:
    site.add("kexue-sound")
    site.add("kexue-twice", BROKEN["twice"][0])
    site.add("kexue-args", BROKEN["takes-arguments"][0])
    registry = Registry()
    assert registry.plugins
    names = {name for name, _ in registry.manager.list_name_plugin()}
    assert "kexue-sound:sound" in names
    assert not names & {"kexue-twice:twice", "kexue-args:args"}
    registry.refresh()
    assert not registry.manager.get_plugins()


def test_rejects_a_name_in_place_of_a_plugin() -> None:
    with pytest.raises(ManifestError, match="'loss' implements none of the hooks"):
        Registry(discover=False).register("loss")
