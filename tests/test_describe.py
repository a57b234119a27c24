"""Descriptions: what a component takes, read from its source, whatever it is written like."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kexue.core.component import Component, Interface
from kexue.core.describe import Description, Parameter, describe_component, parse_value
from kexue.core.docstrings import parse_docstring
from kexue.core.errors import ArgumentError, PluginBrokenError
from kexue.core.registry import Registry
from kexue.core.source import find_definition, forget, module_file

if TYPE_CHECKING:
    from tests.conftest import Site

SHAPES = '''
from __future__ import annotations
import abc, dataclasses, functools
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import ClassVar, Literal, NamedTuple, Optional, overload

LOADED = True
Mode: type = Literal["a", "b"]
Other = Literal["c"]


class Plain:
    """What it is.

    More of it.

    Args:
        size: How large,
            in all.
        mode: Which way.

    Raises:
        ValueError: Never.

    Example:
        >>> Plain(1).forward(2)
        3

        >>> Plain(2)
    """

    differentiable: ClassVar[bool] = True
    stochastic = False
    trainable = True

    def __init__(self, size: int, /, mode: Mode | Other = "a", *, eps: float = 1e-6) -> None: ...

    def forward(
        self, input: Float[Tensor, "batch class"], target: Int[Tensor, "batch"] | None = None
    ) -> Tensor:
        """Do it.

        Args:
            input: Scores.
            target: Classes.

        Returns:
            The value,
            a scalar.
        """


class Inherits(Plain):
    """Inherits."""

    trainable = False


class OwnDoc(Plain):
    """Says more.

    Args:
        size: Own words.
    """


class NoConstructor:
    def forward(self, x, y=1): ...


@dataclass
class Base:
    """Fields.

    Args:
        x: The first.
    """

    shared: ClassVar[int] = 1
    x: int
    y: list = field(default_factory=list)
    z: int = field(init=False, default=3)
    w: float = field(default=2.0)

    def forward(self, a): ...


@dataclasses.dataclass(order=True)
class Derived(Base):
    _: KW_ONLY
    v: int = 5
    u: InitVar[int] = 6


class OfFields(Derived):
    """Of a dataclass, but none."""


def function(logits, target, *, margin: float = 0.5, **options):
    """Compare.

    Args:
        logits: Scores.
        target: Classes.
        margin: How far.
    """


def decorated(cls):
    return cls


def made():
    class Made:
        """Made."""

        def __init__(self, m: int = 1): ...

        def forward(self, x: int) -> int: ...

    return Made


@decorated
class Decorated:
    def __init__(self, k: Optional[int] = None): ...

    def forward(self, x): ...


alias = Plain
Made = made()
partial = functools.partial(function, margin=2.0)


class FromMade(made()):
    """Of a class that only exists at run time."""


class New:
    def __new__(cls, n: int = 2): ...

    def forward(self, x): ...


class Pair(NamedTuple):
    p: int
    q: int = 2

    def forward(self, x): ...


class Overloaded:
    @overload
    def __init__(self, a: int) -> None: ...
    @overload
    def __init__(self, a: str, b: int) -> None: ...
    def __init__(self, a, b=3): ...

    @staticmethod
    def forward(x, y): ...


class Outer:
    class Inner:
        def __init__(this, i=1, **more): ...

        def forward(self, x): ...


class Abstract(metaclass=abc.ABCMeta):
    def forward(self, x): ...


class Renamed(Abstract):
    def helper(self, x, z): ...

    forward = helper


class Twice:
    def __init__(self, old): ...


class Twice(Abstract):
    def __init__(self, new): ...


try:
    from fast_of_tests import Fast
except ImportError:
    class Fast(Abstract):
        def __init__(self, slow): ...

if not LOADED:
    class Fast(Abstract):
        def __init__(self, other): ...


Same = Abstract


class Same(Same):
    """Hides the class that it is of."""


C = type("C", (Exception,), {"forward": lambda self, x: x})
'''


@pytest.fixture
def shapes(site: Site) -> str:
    """A module of definitions of many shapes; its name."""
    site.write("shapes_of_tests.py", SHAPES)
    forget()
    return "shapes_of_tests"


def described(target: str, kind: str = "loss") -> Description:
    registry = Registry(discover=False)
    return registry.describe(Component(kind, "x", target, "Summary."))


def parameters(target: str) -> dict[str, str | None]:
    return {p.name: p.default for p in described(target).parameters}


# -- from source ----------------------------------------------------------------------------------


def test_describes_a_class_without_importing_it(shapes: str) -> None:
    description = described(f"{shapes}:Plain")
    assert shapes not in sys.modules
    assert description.doc == "What it is.\n\nMore of it."
    assert description.parameters == (
        Parameter("size", "int", None, "How large, in all."),
        Parameter("mode", "Literal['a', 'b'] | Literal['c']", "'a'", "Which way."),
        Parameter("eps", "float", "1e-06", ""),
    )
    first, second = description.inputs
    assert (first.name, first.dtype, first.axes, first.optional, first.doc) == (
        "input", "float", ("batch", "class"), False, "Scores."
    )  # fmt: skip
    assert (second.dtype, second.shape, second.optional) == ("int", "[batch]", True)
    assert (description.method, description.returns) == ("forward", "The value, a scalar.")
    assert description.example == ">>> Plain(1).forward(2)\n3\n>>> Plain(2)"
    assert description.capabilities == ("differentiable", "trainable")
    assert not description.accepts_any


FROM_SOURCE = {
    "Inherits": {"size": None, "mode": "'a'", "eps": "1e-06"},
    "NoConstructor": {},
    "Base": {"x": None, "y": "list()", "w": "2.0"},
    "Derived": {"x": None, "y": "list()", "w": "2.0", "v": "5", "u": "6"},
    "OfFields": {"x": None, "y": "list()", "w": "2.0", "v": "5", "u": "6"},
    "function": {"margin": "0.5"},
    "Overloaded": {"a": None, "b": "3"},
    "Outer.Inner": {"i": "1"},
    "Abstract": {},
    "Renamed": {},
    "Twice": {"new": None},
}


@pytest.mark.parametrize("name", FROM_SOURCE)
def test_reads_parameters_from_source(shapes: str, name: str) -> None:
    assert parameters(f"{shapes}:{name}") == FROM_SOURCE[name]
    assert shapes not in sys.modules


FROM_OBJECT = {
    "alias": {"size": None, "mode": "'a'", "eps": "1e-06"},
    "Decorated": {"k": "None"},
    "Made": {"m": "1"},
    "FromMade": {"m": "1"},
    "partial": {"margin": "2.0"},
    "New": {"n": "2"},
    "Pair": {"p": None, "q": "2"},
    "Same": {},
    "Fast": {"slow": None},
}


@pytest.mark.parametrize("name", FROM_OBJECT)
def test_imports_what_its_source_does_not_say(shapes: str, name: str) -> None:
    assert parameters(f"{shapes}:{name}") == FROM_OBJECT[name]
    assert shapes in sys.modules


def test_a_constructor_written_in_c_takes_anything(shapes: str) -> None:
    assert described(f"{shapes}:C").accepts_any
    assert described("collections:OrderedDict").accepts_any


def test_documents_inherited_parameters(shapes: str) -> None:
    docs = {p.name: p.doc for p in described(f"{shapes}:OwnDoc").parameters}
    assert docs == {"size": "Own words.", "mode": "Which way.", "eps": ""}
    assert described(f"{shapes}:Derived").parameters[0].doc == "The first."
    assert described(f"{shapes}:alias").parameters[0].doc == "How large, in all."


def test_capabilities_are_inherited_and_overridden(shapes: str) -> None:
    assert described(f"{shapes}:Inherits").capabilities == ("differentiable",)
    assert described(f"{shapes}:alias").capabilities == ("differentiable", "trainable")


def test_splits_a_function_into_inputs_and_parameters(shapes: str) -> None:
    for name in ("function", "partial"):
        description = described(f"{shapes}:{name}")
        assert [i.name for i in description.inputs] == ["logits", "target"]
        assert description.accepts_any
    assert described(f"{shapes}:function").inputs[0].doc == "Scores."
    assert described(f"{shapes}:function").doc == "Compare."


def test_leaves_out_what_a_method_is_called_on(shapes: str) -> None:
    for name, inputs in {"Overloaded": ["x", "y"], "Renamed": ["x", "z"], "Made": ["x"]}.items():
        assert [i.name for i in described(f"{shapes}:{name}").inputs] == inputs


def test_falls_back_on_the_summary(shapes: str) -> None:
    description = described(f"{shapes}:Abstract")
    assert (description.doc, description.example) == ("Summary.", "")


# -- finding the source ---------------------------------------------------------------------------


def test_follows_imports_without_running_them(shapes: str, site: Site) -> None:
    site.write(
        "names_of_tests/__init__.py",
        "from shapes_of_tests import Plain as Renamed\n"
        "from shapes_of_tests import *\n"
        "import shapes_of_tests, names_of_tests.deep.deeper\n"
        "from .deep import below\n"
        "raise RuntimeError('imported')\n",
    )
    site.write("names_of_tests/deep/__init__.py", "from . import deeper as below\n")
    site.write(
        "names_of_tests/deep/deeper.py",
        "import shapes_of_tests as s\nimport names_of_tests.deep\n"
        "class Here(s.Plain): ...\n"
        "class There(names_of_tests.deep.deeper.Here): ...\n",
    )
    wanted = FROM_SOURCE["Inherits"]
    for target in (
        "names_of_tests:Renamed",
        "names_of_tests:Plain",
        "names_of_tests:shapes_of_tests.Plain",
        "names_of_tests:below.Here",
        "names_of_tests.deep.deeper:Here",
        "names_of_tests.deep.deeper:There",
        "names_of_tests:names_of_tests.deep.deeper.There",
    ):
        assert parameters(target) == wanted, target
    assert "names_of_tests" not in sys.modules
    assert shapes not in sys.modules


def test_reads_single_files(site: Site) -> None:
    path = site.write("single.py", "class A:\n    def __init__(self, n=1): ...\n"
                                   "    def forward(self, x): ...\n")  # fmt: skip
    assert parameters(f"{path}:A") == {"n": "1"}


def test_reads_methods_that_torch_defines() -> None:
    linear = parameters("torch.nn:Linear")
    assert linear == {
        "in_features": None, "out_features": None, "bias": "True", "device": "None",
        "dtype": "None",
    }  # fmt: skip
    assert "params" in parameters("torch.optim:Adam")


@pytest.mark.parametrize(
    ("module", "name"), [("no_such_module", "X"), ("sys", "X"), ("shapes_of_tests", "x")]
)
def test_finds_nothing_where_nothing_is(shapes: str, module: str, name: str) -> None:
    assert find_definition(f"{module}:{name}") is None


def test_finds_modules_of_every_form(site: Site) -> None:
    site.write("space_of_tests/inner/part.py", "")
    forget()
    assert module_file("space_of_tests.inner.part") == site.folder / "space_of_tests/inner/part.py"
    assert module_file("json") == module_file("json.__init__")
    assert module_file("nothing_of_tests.part") is None
    assert module_file(str(site.folder / "nothing.py")) is None


def test_classes_in_a_circle_end(site: Site) -> None:
    site.write("circle_a.py", "from circle_b import B\nclass A(B):\n    def forward(self): ...\n")
    site.write("circle_b.py", "from circle_a import A\nclass B(A): ...\n")
    definition = find_definition("circle_a:A")
    assert definition is not None
    assert len(list(definition.lineage())) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Broken(:", r"broken_of_tests could not be imported: SyntaxError"),
        ("Other = 1", r"broken_of_tests has no 'Broken'"),
        (
            "import no_such\nBroken = no_such.Broken",
            r"ModuleNotFoundError: No module named 'no_such",
        ),
    ],
)
def test_says_whose_source_cannot_be_had(site: Site, source: str, message: str) -> None:
    site.write("broken_of_tests.py", source)
    forget()
    with pytest.raises(PluginBrokenError, match=message):
        described("broken_of_tests:Broken")


def test_describes_through_any_method(shapes: str) -> None:
    interface = Interface("probe", "a:B", "One.", "helper", "a:c")
    component = Component("probe", "x", f"{shapes}:Renamed", "Summary.")
    assert [i.name for i in describe_component(component, interface).inputs] == ["x", "z"]
    component = Component("probe", "x", f"{shapes}:Plain", "Summary.")
    assert describe_component(component, interface).inputs == ()


def test_forgets_what_changed(site: Site) -> None:
    source = "class A:\n    def __init__(self, {}=1): ...\n    def forward(self, x): ...\n"
    site.write("changing.py", source.format("old"))
    registry = Registry(discover=False)
    component = Component("loss", "x", "changing:A", "Summary.")
    assert registry.describe(component).parameters[0].name == "old"
    site.write("changing.py", source.format("new"))
    assert registry.describe(component).parameters[0].name == "old"
    registry.refresh()
    assert registry.describe(component).parameters[0].name == "new"


# -- as data --------------------------------------------------------------------------------------


def test_is_plain_data(shapes: str) -> None:
    data = json.loads(json.dumps(described(f"{shapes}:Plain").to_json()))
    assert data["component"]["id"] == "loss/x"
    assert data["parameters"][0] == {
        "name": "size", "annotation": "int", "default": None, "doc": "How large, in all.",
        "required": True,
    }  # fmt: skip
    assert data["inputs"][0]["axes"] == ["batch", "class"]


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "3", 3),
        ("float", "3", 3),
        ("float", "1e-3", 1e-3),
        ("float", ".5", 0.5),
        ("float | None", "None", None),
        ("float | None", "null", None),
        ("Optional[float]", "None", None),
        ("Union[int, None]", "2", 2),
        ("typing.Optional[int]", "2", 2),
        ("bool", "true", True),
        ("bool", "no", False),
        ("str", "3", "3"),
        ("str", "None", "None"),
        ("str | None", "None", None),
        ("str | None", "a: b", "a: b"),
        ("str | int", "3", 3),
        ("Literal['a', 'b']", "a", "a"),
        ("Literal['1', '2']", "1", "1"),
        ("Literal['a'] | None", "null", None),
        ("Literal['a'] | float", "0.5", 0.5),
        ("Literal[1, 2]", "2", 2),
        ("list[int]", "[1, 2]", [1, 2]),
        ("Sequence[str] | None", "[a, b]", ["a", "b"]),
        ("tuple[float, float]", "[0.9, 0.99]", [0.9, 0.99]),
        ("Module", "{use: loss/x}", {"use": "loss/x"}),
        ("Tensor | None", "None", None),
        ("", "[1, a]", [1, "a"]),
        ("", "[", "["),
        ("not a type", "1", 1),
    ],
)
def test_reads_a_value(annotation: str, text: str, value: Any) -> None:
    found = parse_value(text, Parameter("x", annotation, None, ""), "loss/x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        ("int", "3.5"),
        ("int", "a"),
        ("int", "None"),
        ("int", "true"),
        ("float", "true"),
        ("float", "a"),
        ("bool", "1"),
        ("Literal['a', 'b']", "c"),
        ("Literal[1, 2]", "3"),
        ("Literal[1, 2]", "true"),
        ("Optional[int]", "a"),
        ("Sequence[str] | None", "a"),
        ("list[int]", "3"),
    ],
)
def test_rejects_a_value(annotation: str, text: str) -> None:
    with pytest.raises(ArgumentError, match=r"`x` of loss/x must be .*\. Found '") as caught:
        parse_value(text, Parameter("x", annotation, None, ""), "loss/x")
    assert caught.value.argument == "x"


def test_names_the_choices(shapes: str) -> None:
    description = described(f"{shapes}:Plain")
    assert description.parse("size", "3") == 3
    assert description.parse("eps", "1e-9") == 1e-9
    assert description.parse("unknown", "[1]") == [1]
    with pytest.raises(ArgumentError, match=r"`mode` of loss/x must be 'a' or 'b'.* Found 'z'"):
        description.parse("mode", "z")


# -- docstrings -----------------------------------------------------------------------------------


def test_splits_a_docstring() -> None:
    doc = parse_docstring(
        "One line.\n\nArgs:\n    a: First\n        and more.\n    *args (int): Rest.\n"
        "    **kwargs: All:\n        of them.\n\nAfterwards.\n\nReturns:\n    A\n    value.\n\n"
        "Examples:\n    >>> 1\n    1\n"
    )
    assert doc.prose == "One line.\n\nAfterwards."
    assert doc.params == {"a": "First and more.", "args": "Rest.", "kwargs": "All: of them."}
    assert (doc.returns, doc.example) == ("A value.", ">>> 1\n1")
    assert parse_docstring("") == ("", {}, {})
