"""The command line: what it says, where it says it, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.cells import cell_len

import kexue.cli
from kexue.core.component import Component
from kexue.core.console.listing import usage
from kexue.core.console.output import print_json
from kexue.core.describe import Description, Input
from kexue.core.registry import registry

if TYPE_CHECKING:
    from tests.conftest import Ran, Site

    Kexue = Callable[..., Ran]

METHOD = '''
"""A method."""

import torch
from jaxtyping import Float
from torch import Tensor

from kexue.core import Example, Layer


class Method(Layer):
    """Scale.

    With ``factor`` f and :math:`x`, see :class:`~torch.nn.Module` and :func:`abs`:

    .. math::
        y = f x

    Args:
        factor: What to multiply by.

    Example:
        >>> 1
        1
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Float[Tensor, "batch time feature"]) -> Tensor:
        """Return it.

        Args:
            features: Any.
        """
        print("working")
        if self.factor == 0:
            raise KeyboardInterrupt("stopped; go on with `--resume`")
        if self.factor < 0:
            raise OverflowError("too\\nsmall")
        return features * self.factor

    @classmethod
    def example(cls, *, generator=None):
        return Example({}, {"features": torch.randn(3, 2, 2, generator=generator)})
'''


@pytest.fixture
def bad_company(site: Site) -> Site:
    """A sound plugin beside a broken, a malformed, two clashing and a slow one."""
    site.add("kexue-sound", site.components("layer/sound", target="kexue_sound_method:Method"))
    site.write("kexue_sound_method.py", METHOD)
    site.add("kexue-broken", "raise RuntimeError('operator torchvision::nms does not exist')")
    site.add("kexue-malformed", "@hookimpl\ndef kexue_components(): return 'loss/malformed'")
    for name in ("kexue-clash", "other-clash"):
        target = f"{name.replace('-', '_')}_method:Method"
        site.add(name, site.components("loss/clash", target=target), slug=name)
    site.add("kexue-slow", "import time; time.sleep(0.02)\nprint('slow')\n" + site.components())
    return site


# -- everything works beside a broken plugin ------------------------------------------------------


@pytest.mark.usefixtures("bad_company")
def test_lists_beside_broken_plugins(kexue: Kexue) -> None:
    ran = kexue("list", "--plugin", "sound")
    assert ran.status == 0
    assert ran.out == (
        "component    plugin  summary\nlayer/sound  sound   One.\n"
    )  # fmt: skip
    assert ran.err.endswith("Broken: broken, malformed. `kexue plugins` says why.\n")


@pytest.mark.usefixtures("bad_company")
def test_says_of_each_plugin_what_is_wrong(kexue: Kexue) -> None:
    ran = kexue("plugins")
    assert ran.status == 0
    rows = {line.split()[0]: line for line in ran.out.splitlines()}
    for slug, words in {
        "sound": "ok      1 component",
        "broken": "broken  RuntimeError: operator torchvision::nms does not exist.",
        "malformed": "broken  kexue_components must return Component records. Found 'loss/malf",
        "slow": "ok      0 components",
        "kexue-clash": "ok      1 component",
    }.items():
        assert words in rows[slug]
    listed = json.loads(kexue("plugins", "--json").out)["plugins"]
    assert {row["plugin"]: row["state"] for row in listed}["broken"] == "broken"


def test_says_what_is_slow_or_heavy(
    kexue: Kexue, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # where it is installed
    site.write("jax.py", "")
    site.add("kexue-slow", "import jax, time; time.sleep(0.51)\n" + site.components())
    row = next(row for row in kexue("plugins").out.splitlines() if row.startswith("slow"))
    assert "its manifest imports jax: every command pays for it; importing it takes 0." in row


@pytest.mark.usefixtures("bad_company")
def test_says_who_is_in_conflict(kexue: Kexue) -> None:
    ran = kexue("list", "--kind", "loss", "--plugin", "other-clash")
    assert ran.out.splitlines()[1].split() == [
        "loss/clash", "other-clash", "other-clash", "conflict", "One."
    ]  # fmt: skip
    for command in ("show", "run"):
        ran = kexue(command, "loss/clash")
        assert (ran.status, ran.out) == (2, "")
        assert "Error: loss/clash is registered by kexue-clash and by other-clash." in ran.err
        assert "write kexue-clash:loss/clash." in ran.err


@pytest.mark.usefixtures("bad_company")
@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("--version",),
        ("list", "--all"),
        ("list", "kinds"),
        ("show", "layer/sound"),
        ("show", "sound"),
        ("show", "broken"),
        ("show", "crf"),
        ("run", "layer/sound", "--help"),
        ("install", "crf", "--dry-run"),
        ("uninstall", "broken", "--dry-run"),
        ("check", "sound", "--json"),
    ],
    ids=" ".join,
)
def test_works_beside_broken_plugins(kexue: Kexue, args: tuple[str, ...]) -> None:
    ran = kexue(*args)
    assert ran.status == (1 if args[0] == "check" else 0)
    assert ran.out
    assert "slow" not in ran.out.splitlines()


@pytest.mark.usefixtures("bad_company")
def test_shows_what_is_known_of_a_broken_plugin(kexue: Kexue) -> None:
    out = kexue("show", "broken").out
    assert re.search(r"^state +broken$", out, re.MULTILINE)
    assert re.search(r"^reason +RuntimeError: operator torchvision", out, re.MULTILINE)
    assert "kexue-broken" in out


@pytest.mark.usefixtures("bad_company")
@pytest.mark.parametrize("shell_", ["bash", "zsh", "fish"])
def test_completes_beside_broken_plugins(complete: Callable[..., list[str]], shell_: str) -> None:
    assert complete("show layer/so", shell=shell_) == ["layer/sound"]


@pytest.mark.usefixtures("bad_company")
@pytest.mark.parametrize("place", [0, 1])
def test_loads_no_plugin_if_told_so(kexue: Kexue, place: int) -> None:
    words = ["plugins", "--json"]
    words.insert(place, "--no-plugins")
    states = {row["state"] for row in json.loads(kexue(*words).out)["plugins"]}
    assert states == {"disabled"}
    assert "kexue_sound" not in sys.modules
    ran = kexue("--no-plugins", "show", "loss/crf")
    assert ran.err.endswith("is switched off by `--no-plugins` or KEXUE_DISABLE=*.\n")


# -- what is said ---------------------------------------------------------------------------------


def test_lists_with_filters(kexue: Kexue) -> None:
    def ids(*args: str) -> set[str]:
        return {row["component"] for row in json.loads(kexue("list", *args, "--json").out)[
            "components"]}  # fmt: skip

    assert ids() >= {"loss/crf", "decoder/crf", "loss/memm", "loss/zlpr", "decoder/zlpr"}
    assert ids("--plugin", "crf") == ids("--plugin", "kexue-crf") == {"loss/crf", "decoder/crf"}
    assert all(name.startswith("loss/") for name in ids("--kind", "loss"))
    assert ids("--kind", "loss", "--plugin", "memm") == {"loss/memm"}
    assert ids("--tag", "multi-label") <= ids("--plugin", "zlpr")
    assert ids("--tag", "multi-label")
    assert "generator/vae-density" in ids("--all")
    assert "generator/vae-density" not in ids()
    assert ids("--all", "--kind", "attribution") == {"attribution/integrated-gradients"}
    assert ids("--all", "--plugin", "vae-density") == {"generator/vae-density"}
    assert ids("components", "--tag", "nothing-has-this") == set()


def test_lists_other_things(kexue: Kexue) -> None:
    assert "Scores to discrete sequences." in kexue("list", "kinds").out
    assert "digits" in kexue("list", "datasets").out
    assert json.loads(kexue("list", "experiments", "--json").out)["schema"] == 1


@pytest.mark.usefixtures("site")
def test_lists_nothing_in_words(kexue: Kexue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEXUE_DISABLE", "*")
    hint = "`kexue list --all` shows what there is.\n"
    assert kexue("list").out == f"No components are installed. {hint}"
    assert kexue("list", "--tag", "x").out == f"No components match. {hint}"
    assert kexue("list", "experiments").out == f"No experiments are installed. {hint}"
    assert kexue("list", "--all", "--tag", "x").out == "No components match.\n"
    assert json.loads(kexue("list", "--json").out) == {"schema": 1, "components": [], "broken": []}


def test_usage_names_what_is_no_tensor_in_capitals() -> None:
    rows = [
        Input("model", "Callable[..., Tensor]", "", (), False, ""),
        Input("x", "Float[Tensor, 'batch']", "float", ("batch",), False, ""),
        Input("mask", "Bool[Tensor, 'batch']", "bool", ("batch",), True, ""),
        Input("count", "int", "", (), False, ""),
        Input("extra", "Any", "", (), True, ""),
    ]
    component = Component("probe", "x", "a:B", "One.")

    def shown(*inputs: Input) -> str:
        return usage(Description(component, "", (), inputs, "go", "", "", ()))

    assert shown(*rows) == "kexue run probe/x MODEL x.npy [mask=mask.npy]"
    assert shown(rows[0]) == "kexue run probe/x FILE"
    component = Component("probe", "x", "a:B", "One.", apply="a:apply")
    assert shown(*rows) == "kexue run probe/x --model model/ FILE"


def test_shows_a_component(kexue: Kexue) -> None:
    out = kexue("show", "loss/zlpr").out
    for words in (
        "plugin zlpr (kexue-zlpr), kexue_zlpr.zlpr:ZLPR",
        "capabilities: differentiable",
        "Inputs of forward",
        "Parameters (--set NAME=VALUE)",
        "kexue run loss/zlpr logits.npy target.npy",
        "https://kexue.fm/archives/7359",
        ">>> ",
    ):
        assert words in out
    document = json.loads(kexue("show", "kexue-zlpr:loss/zlpr", "--json").out)
    assert document["component"]["id"] == "loss/zlpr"
    assert {"reduction", "threshold"} <= {p["name"] for p in document["parameters"]}


@pytest.mark.usefixtures("bad_company")
def test_shows_no_marks_of_documentation_tools(kexue: Kexue) -> None:
    out = kexue("show", "layer/sound").out
    assert "With `factor` f and x, see Module and abs:\n\n    y = f x\n" in out


@pytest.mark.parametrize(
    "name", ["crf", "kexue-crf", "5542", "https://kexue.fm/archives/5542", "http://kexue.fm/archives/5542/"]
)  # fmt: skip
def test_shows_a_plugin_or_post(kexue: Kexue, name: str) -> None:
    facts = json.loads(kexue("show", name, "--json").out)
    assert facts["plugin"] == "crf"
    assert facts["url"] == "https://kexue.fm/archives/5542"
    assert set(facts["components"]) == {"loss/crf", "decoder/crf"}
    assert facts["state"] == "ok"
    assert "简明条件随机场CRF介绍" in kexue("show", name).out


def test_shows_what_is_planned(kexue: Kexue) -> None:
    out = kexue("show", "vae-density").out
    assert re.search(r"^state +planned$", out, re.MULTILINE)
    assert "generator/vae-density" in out
    assert "kexue install" not in out


@pytest.mark.usefixtures("site")
def test_says_how_to_install(kexue: Kexue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.core.discovery.metadata.entry_points", lambda group: [])
    assert "Install it with `kexue install crf`." in kexue("show", "crf").out
    ran = kexue("run", "loss/crf", "x.npy")
    assert ran.status == 2
    assert ran.err == (
        "Error: 'loss/crf' is in the plugin 'crf', which is not installed. "
        "Run `kexue install crf`.\n"
    )
    rows = json.loads(kexue("list", "--all", "--plugin", "crf", "--json").out)["components"]
    assert {row["state"] for row in rows} == {"available"}


def test_shows_the_environment(kexue: Kexue) -> None:
    facts = json.loads(kexue("env", "--json").out)
    assert {"kexue", "python", "torch", "system", "accelerator", "packages"} <= set(facts)
    assert {row["plugin"] for row in facts["plugins"]} >= {"crf", "memm", "zlpr"}
    out = kexue("env").out
    assert re.search(r"^registry +no registry files$", out, re.MULTILINE)


def test_shows_the_environment_even_without_torch(
    kexue: Kexue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    out = kexue("env").out
    assert re.search(r"^torch +cannot be imported: ModuleNotFoundError", out, re.MULTILINE)


def test_checks(kexue: Kexue, bad_company: Site) -> None:
    bad_company.write("kexue_sound_method.py", METHOD.replace('print("working")', "pass"))
    ran = kexue("check", "layer/sound")
    assert ran.status == 1
    lines = ran.out.splitlines()
    assert lines[0].split() == ["component", "check", "state", "why"]
    assert re.search(r"layer/sound +is documented +failed +`references` of the comp", ran.out)
    assert re.fullmatch(r"\d+ passed, 2 failed, \d+ do not apply.", lines[-1])
    assert len(kexue("check", "layer/sound", "--verbose").out.splitlines()) > len(lines)
    ran = kexue("check", "broken", "--json")
    document = json.loads(ran.out)
    assert (ran.status, document["passed"]) == (1, False)
    assert document["checks"][0]["reason"].startswith("RuntimeError: operator torchvision")


def test_prints_the_version(kexue: Kexue) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", kexue("--version").out)


def test_says_how_to_begin(kexue: Kexue) -> None:
    ran = kexue()
    assert ran.status == 2
    for name in ("list", "show", "run", "fit", "reproduce", "plugins", "install", "check"):
        assert re.search(rf"^  {name} +\w", ran.out + ran.err, re.MULTILINE)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "loss/zlpt"), "Error: No component named 'loss/zlpt' is installed. Did you mean"),
        (("show", "9999"), "Error: No component named '9999' is installed."),
        (("show", "crf:loss/zlpr"), "Error: 'crf' has no component 'loss/zlpr'; it is in kexue-"),
        (("list", "kindz"), "Error: `kexue list` lists components, kinds, .*Did you mean 'kinds'"),
        (("list", "--kind", "los"), "Error: No kind named 'los' is installed. Did you mean 'loss'"),
        (("list", "--all", "--kind", "los"), "Error: No kind named 'los' is installed."),
        (("list", "--plugin", "zlp"), "Error: No plugin named 'zlp' is installed. Did you mean"),
        (("list", "experiments", "--plugin", "no"), "Error: No plugin named 'no' is installed."),
        (("list", "kinds", "--tag", "x"), "Error: `--tag` has no use for `kexue list kinds`"),
        (("list", "datasets", "--all"), "Error: `--all` has no use for `kexue list datasets`"),
        (("install", "crff"), "Error: No plugin named 'crff' is in the catalogue. Did you mean"),
        (("install", "loss/crf"), "Error: No plugin named 'loss/crf' .*It is in 'crf'."),
        (
            ("install", "vae-density"),
            "Error: The plugin 'vae-density' is planned and not yet written",
        ),
        (
            ("uninstall", "vae-density"),
            "Error: The plugin 'vae-density' is planned and not yet written",
        ),
        (("uninstall", "nobody"), "Error: No plugin named 'nobody' is installed."),
        (("check", "nobody"), "Error: No component named 'nobody' is installed."),
        (("new", "Bad"), "Error: `name` must be lower-case words .*Perhaps 'bad'."),
        (("run", "crf"), "Error: 'crf' is the name of several components. Write one of: decoder/"),
        (("run", "loss/zlpr", "--set", "x"), "Error: `--set` must be NAME=VALUE. Found 'x'."),
        (("show", "--", "--debug"), "Error: No component named '--debug' is installed."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_sentence_with_its_remedy(
    kexue: Kexue, args: tuple[str, ...], message: str
) -> None:
    ran = kexue(*args)
    assert ran.status == 2
    assert ran.out == ""
    assert re.match(message, ran.err), ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("lst",), "No such command 'lst'. Did you mean 'list'"),
        (("list", "--nope"), "No such option: --nope"),
        (("show",), "Missing argument 'NAME'"),
        (("run",), "Missing argument 'COMPONENT'"),
        (("install",), "Missing argument 'PLUGINS'"),
        (("list", "kinds", "more"), "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_call_says_how_to_call(kexue: Kexue, args: tuple[str, ...], message: str) -> None:
    ran = kexue(*args)
    assert ran.status == 2
    assert ran.out == ""
    assert "Usage: kexue" in ran.err
    assert message in ran.err


@pytest.fixture
def features(bad_company: Site, tmp_path: Path) -> str:
    """A file that ``layer/sound`` runs on."""
    file = tmp_path / "features.csv"
    file.write_text("1,2\n3,4\n", encoding="utf-8")
    source = METHOD.replace('"batch time feature"', '"time feature"')
    bad_company.write("kexue_sound_method.py", source)
    return str(file)


def test_work_that_fails_is_no_wrong_call(kexue: Kexue, features: str) -> None:
    ran = kexue("run", "layer/sound", features, "--set", "factor=-1")
    assert (ran.status, ran.out.strip()) == (1, "working")
    assert ran.err.endswith("Error: OverflowError: too small. `--debug` shows the traceback.\n")
    ran = kexue("run", "layer/sound", features, "--set", "factor=-1", "--debug")
    assert ran.status == 1
    assert "Traceback (most recent call last)" in ran.err
    assert ran.err.endswith("Error: OverflowError: too small.\n")


def test_tracebacks_are_for_those_who_ask(kexue: Kexue) -> None:
    assert "Traceback" not in kexue("show", "loss/zlpt").err
    ran = kexue("show", "loss/zlpt", "--debug")
    assert "Traceback (most recent call last)" in ran.err
    assert ran.status == 2


def test_ctrl_c_ends_with_what_there_is_to_say(kexue: Kexue, features: str) -> None:
    ran = kexue("run", "layer/sound", features, "--set", "factor=0")
    assert ran.status == 130
    assert ran.err.endswith("stopped; go on with `--resume`\n")


# -- one JSON document ----------------------------------------------------------------------------


@pytest.mark.usefixtures("bad_company")
@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("list", "--all"),
        ("list", "kinds"),
        ("list", "experiments"),
        ("list", "datasets"),
        ("show", "loss/zlpr"),
        ("show", "layer/sound"),
        ("show", "crf"),
        ("show", "vae-density"),
        ("plugins",),
        ("env",),
        ("install", "crf", "--dry-run"),
        ("uninstall", "broken", "--dry-run"),
        ("run", "layer/sound", "--example", "try"),
        ("new", "demo"),
    ],
    ids=" ".join,
)
def test_prints_one_document(
    kexue: Kexue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ((*args, "--json"), (args[0], "--json", *args[1:])):
        ran = kexue(*words)
        if args[0] == "new":
            (tmp_path / "demo").rename(tmp_path / f"demo-{len(list(tmp_path.iterdir()))}")
        assert ran.status == 0
        assert json.loads(ran.out)["schema"] == 1


def test_keeps_what_is_printed_meanwhile_out_of_the_document(kexue: Kexue, features: str) -> None:
    ran = kexue("run", "layer/sound", features, "--set", "factor=2", "--json")
    assert json.loads(ran.out)["features"] == [[2.0, 4.0], [6.0, 8.0]]
    assert "working" in ran.err


def test_an_error_leaves_the_document_out(kexue: Kexue) -> None:
    ran = kexue("show", "loss/nothing", "--json")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("Error: ")


def test_help_is_where_it_is_looked_for(kexue: Kexue) -> None:
    assert kexue("list", "--json", "--help").out.startswith("Usage: kexue list")


def test_writes_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    inf = float("inf")
    print_json({"a": [1.5, inf, (-inf,)], "b": {"c": float("nan")}, "d": Path("x")})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [1.5, "Infinity", ["-Infinity"]], "b": {"c": "NaN"}, "d": "x"}


# -- terminals and pipes --------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("list", "--all"),
        ("list", "kinds"),
        ("plugins",),
        ("show", "memm"),
        ("show", "layer/sound"),
        ("run", "loss/zlpr", "--help"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_fits_eighty_columns(bad_company: Site, args: tuple[str, ...]) -> None:
    shown = in_a_terminal(*args, environment=bad_company.environment)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in shown.splitlines()]
    assert len(lines) > 5
    assert [line for line in lines if cell_len(line) > 80] == []
    assert [line for line in lines if re.search(r"\w-$", line.rstrip())] == []


def in_a_terminal(*args: str, environment: dict[str, str], columns: int = 80) -> str:
    """Return what a command shows on a terminal."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**environment, "TERM": "xterm"}
    command = [sys.executable, "-m", "kexue.cli", *args]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment) as run:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            if not piece:
                break
            shown += piece
    os.close(master)
    assert run.returncode == 0
    return shown.decode()


@pytest.mark.parametrize("args", [("list", "--all"), ("show", "loss/zlpr"), ("plugins",)])
def test_is_plain_in_a_pipe(kexue: Kexue, args: tuple[str, ...]) -> None:
    out = kexue(*args).out
    assert "\x1b" not in out
    assert not set("─│┃━╭╮") & set(out)
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_pipe_may_close_early() -> None:
    command = [sys.executable, "-m", "kexue.cli", "list", "--all", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.read(1)
        run.stdout.close()
        assert run.stderr.read() == b""


def test_writes_to_what_knows_no_chinese(shell: Callable[..., Ran]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert shell("show", "crf", environment=environment).status == 0
    ran = shell("show", "crf", "--json", environment=environment)
    assert json.loads(ran.out)["post"] == "简明条件随机场CRF介绍"


# -- completion -----------------------------------------------------------------------------------


@pytest.fixture
def complete(kexue: Kexue, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a shell offers at the end of a line."""

    def offered(line: str, *, shell: str = "bash") -> list[str]:
        words = ["kexue", *line.split(" ")]
        monkeypatch.setenv("_KEXUE_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        out = kexue().out
        monkeypatch.delenv("_KEXUE_COMPLETE")
        if shell == "zsh":
            return re.findall(r'^_arguments .*?"([\w/-]+)":', out) or re.findall(
                r'"([\w/-]+)"', out
            )
        return [row.split("\t")[0] for row in out.splitlines() if row]

    return offered


@pytest.mark.parametrize("shell_", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("verb", ["show", "run", "fit", "check"])
def test_completes_components(complete: Callable[..., list[str]], verb: str, shell_: str) -> None:
    assert complete(f"{verb} decoder/c", shell=shell_) == ["decoder/crf"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sho", ["show"]),
        ("uninstall me", ["memm"]),
        ("install zl", ["zlpr"]),
        ("install vae-d", []),
        ("list --kind lo", ["loss"]),
        ("list --plugin cr", ["crf"]),
        ("list ki", ["kinds"]),
        ("new --kind sam", ["sampler"]),
        ("check cr", ["crf"]),
        ("run loss/zlpr --dev", ["--device"]),
    ],
)
def test_completes_everything_else(
    complete: Callable[..., list[str]], line: str, offered: list[str]
) -> None:
    assert complete(line) == offered


# -- options of kinds -----------------------------------------------------------------------------


KIND = """
def run(job, *, {option}):
    '''Do it.

    Args:
        job: The call.
        {name}: An option.
    '''
    from kexue.core import Result
    return Result({{"given": {name}}})
"""
HOOKS = """
@hookimpl
def kexue_interfaces():
    return [Interface("probe", "kexue_sound_method:Method", "One.", "forward", "probing:run")]

@hookimpl
def kexue_components():
    return [Component("probe", "x", "kexue_sound_method:Method", "One.")]
"""


@pytest.mark.parametrize(
    ("option", "words", "given"),
    [
        ("times: int = 2", ["--times", "3"], "3"),
        ("times: int = 2", [], "2"),
        ("num_samples: int = 2", ["-n", "3"], "3"),
        ("num_samples: int = 2", ["--num-samples", "3"], "3"),
        ("rate: float = 0.5", ["--rate", "1e-3"], "0.001"),
        ("loud: bool = False", ["--loud"], "True"),
        ("loud: bool = True", ["--no-loud"], "False"),
        ("loud: bool = True", [], "True"),
        ("name: str | None = None", ["--name", "a b"], "a b"),
        ("long_name: str = 'x'", ["--long-name", "y"], "y"),
    ],
)
def test_a_kind_brings_options(
    kexue: Kexue, bad_company: Site, option: str, words: list[str], given: str
) -> None:
    name = option.partition(":")[0]
    bad_company.write("probing.py", KIND.format(option=option, name=name))
    bad_company.add("kexue-probing", HOOKS)
    ran = kexue("run", "probe/x", *words)
    assert ran == (0, f"given: {given}\n", ran.err)
    assert "An option." in kexue("run", "probe/x", "--help").out


def test_a_kind_must_not_take_options_of_the_command(kexue: Kexue, bad_company: Site) -> None:
    bad_company.write("probing.py", KIND.format(option="seed: int = 0", name="seed"))
    bad_company.add("kexue-probing", HOOKS)
    ran = kexue("run", "probe/x")
    assert ran.err.endswith(
        "The option `seed` of kind 'probe' is one of kexue's own; rename it in probing.\n"
    )


# -- the way in -----------------------------------------------------------------------------------


def test_is_a_script_and_a_module(shell: Callable[..., Ran]) -> None:
    version = shell("--version").out
    script = Path(sys.executable).with_name("kexue")
    if script.exists():
        done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == version
    assert kexue.cli.main.__module__ == "kexue.cli"


def test_uses_the_default_registry() -> None:
    commands: Any = kexue.cli
    assert commands.registry is registry


def test_leaves_the_signals_of_a_program_that_calls_it(kexue: Kexue) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert kexue("list").status == 0
    assert signal.getsignal(signal.SIGTERM) is before
