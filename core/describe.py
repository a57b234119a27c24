"""What a component is, read from its source: parameters, inputs, results, documentation."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from kexue.core.component import Component, Interface
from kexue.core.docstrings import parse_docstring
from kexue.core.errors import ArgumentError, did_you_mean
from kexue.core.signatures import (
    Argument,
    Signature,
    constructor_of,
    documented,
    signature_of_node,
    signature_of_object,
)
from kexue.core.source import Definition, find_definition

__all__ = [
    "Description",
    "Input",
    "Parameter",
    "describe_component",
    "documented_parameters",
    "parse_value",
]

_TENSOR = re.compile(
    r"\b(Float|Float32|Float64|Int|Int64|Integer|Bool|Num|Real|Shaped|Inexact)"
    r"\[(?:\w+\.)?(\w+), *[\"']([^\"']*)[\"']\]"
)
_DTYPES = {
    "Float": "float",
    "Float32": "float",
    "Float64": "float",
    "Inexact": "float",
    "Real": "float",
    "Int": "int",
    "Int64": "int",
    "Integer": "int",
    "Bool": "bool",
    "Num": "number",
    "Shaped": "any",
}
_LISTS = ("list", "tuple", "set", "Sequence", "Iterable", "Collection")
_TYPES: Mapping[str, Any] = {
    "int": int,
    "float": int | float,
    "bool": bool,
    "str": str,
    "None": type(None),
    **dict.fromkeys(_LISTS, list),
}
_CAPABILITIES = ("differentiable", "stochastic", "trainable", "needs_fitting", "needs_mask")


class Parameter(NamedTuple):
    """One argument of a constructor or function.

    Args:
        name: Its name.
        annotation: Its type as written; empty if there is none.
        default: Its default as written; None if it is required.
        doc: What its docstring says.
    """

    name: str
    annotation: str
    default: str | None
    doc: str

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a ``Literal`` of strings, else empty."""
        found = re.search(r"Literal\[([^\]]*)\]", self.annotation)
        return tuple(re.findall(r"[\"']([^\"']*)[\"']", found[1])) if found else ()


class Input(NamedTuple):
    """One argument of the method that a kind runs.

    Args:
        name: Its name.
        annotation: Its type as written.
        dtype: ``"float"``, ``"int"``, ``"bool"``, ``"any"`` for tensors with jaxtyping, else empty.
        axes: The words of its shape, for example ``("batch", "time", "tag")``.
        optional: Whether it may be left out.
        doc: What its docstring says.
    """

    name: str
    annotation: str
    dtype: str
    axes: tuple[str, ...]
    optional: bool
    doc: str

    @property
    def shape(self) -> str:
        """``[batch, time, tag]``, or empty if it is not known."""
        return f"[{', '.join(self.axes)}]" if self.axes else ""


@dataclass(frozen=True)
class Description:
    """What a component is.

    Args:
        component: The component's record.
        doc: Its docstring up to the first section.
        parameters: What ``create`` takes.
        inputs: What its method takes.
        method: The method that its kind runs.
        returns: What the method returns.
        example: The ``>>>`` lines of its docstring.
        capabilities: The capabilities that are true.
        accepts_any: Whether ``create`` takes keywords beyond ``parameters``.
    """

    component: Component
    doc: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]
    method: str
    returns: str
    example: str
    capabilities: tuple[str, ...]
    accepts_any: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return {
            **vars(self),
            "component": {"id": self.component.id, **asdict(self.component)},
            "parameters": [{**p._asdict(), "required": p.required} for p in self.parameters],
            "inputs": [row._asdict() for row in self.inputs],
        }

    def check_params(self, params: Mapping[str, Any]) -> None:
        """Refuse arguments that ``create`` does not take, and missing ones.

        Raises:
            ArgumentError: With the nearest name, or the name that is missing.
        """
        self.check_names(params)
        for parameter in self.parameters:
            if parameter.required and parameter.name not in params:
                raise ArgumentError(
                    f"{self.component.id} needs `{parameter.name}`"
                    f"{f' ({parameter.annotation})' if parameter.annotation else ''}. "
                    f"Give it with `--set {parameter.name}=…`, or as a keyword of `create`.",
                    argument=parameter.name,
                )

    def check_names(self, params: Iterable[str]) -> None:
        """Refuse arguments that ``create`` does not take.

        Raises:
            ArgumentError: With the nearest name.
        """
        known = [parameter.name for parameter in self.parameters]
        for name in params:
            if name not in known and not self.accepts_any:
                takes = f" It takes: {', '.join(known)}." if known else " It takes none."
                raise ArgumentError(
                    f"{self.component.id} has no parameter {name!r}."
                    f"{did_you_mean(name, known)}{takes}",
                    argument=name,
                )

    def parse(self, name: str, text: str) -> Any:
        """Return a parameter's value from what was typed.

        Args:
            name: The parameter.
            text: Its value as YAML; taken as it stands where the parameter is a string.

        Raises:
            ArgumentError: If the value is not of the parameter's type.
        """
        parameter = next((p for p in self.parameters if p.name == name), None)
        return parse_value(text, parameter, self.component.id)


def parse_value(text: str, parameter: Parameter | None, owner: str) -> Any:
    """Return the value that ``text`` stands for, checked against the parameter's annotation.

    Args:
        text: A value as YAML; taken as it stands where the parameter is a string.
        parameter: What it is for; anything goes if None.
        owner: What has the parameter, as errors name it.

    Raises:
        ArgumentError: If the value is not of the parameter's type.
    """
    accepted = _alternatives(parameter.annotation) if parameter is not None else []
    if parameter is not None and text in parameter.choices:
        return text
    if accepted and set(accepted) <= {"str", "None"}:
        return None if text in {"None", "null"} and "None" in accepted else text
    value = _read(text)
    if isinstance(value, str) and "float" in accepted:
        value = _number(value)
    if parameter is None or not accepted or any(_fits(value, part) for part in accepted):
        return value
    wanted = " or ".join(map(repr, parameter.choices)) or parameter.annotation
    raise ArgumentError(
        f"`{parameter.name}` of {owner} must be {wanted}. Found {text!r}.",
        argument=parameter.name,
    )


def _read(text: str) -> Any:
    import yaml

    try:
        return None if text == "None" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(text: str) -> float | str:
    try:
        return float(text)  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return text


def _fits(value: Any, part: str) -> bool:
    """Whether a value is of a type; true for types that a text cannot be checked against."""
    name = part.partition("[")[0].rpartition(".")[2]
    if name == "Literal":
        return any(value == v and type(value) is type(v) for v in _literals(part))
    if isinstance(value, bool) and name in {"int", "float"}:
        return False
    return name not in _TYPES or isinstance(value, _TYPES[name])


def _literals(part: str) -> tuple[Any, ...]:
    values: tuple[Any, ...] = ast.literal_eval(f"({part.partition('[')[2].rpartition(']')[0]},)")
    return values


def _alternatives(annotation: str) -> list[str]:
    """Return the members of a union, however it is written."""
    try:
        stack = [ast.parse(annotation, mode="eval").body]
    except SyntaxError:
        return []
    parts: list[str] = []
    while stack:
        node = stack.pop()
        head = ast.unparse(node.value) if isinstance(node, ast.Subscript) else ""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            stack += [node.left, node.right]
        elif isinstance(node, ast.Subscript) and head.rpartition(".")[2] in {"Optional", "Union"}:
            stack += node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            parts += ["None"] if head.endswith("Optional") else []
        else:
            parts.append(ast.unparse(node))
    return parts


def _load(component: Component) -> Any:
    from kexue.core.loading import load_target

    return load_target(component.target)


def describe_component(
    component: Component, interface: Interface, load: Callable[[Component], Any] = _load
) -> Description:
    """Describe a component from its source; import it only if that is not enough.

    Args:
        component: The component.
        interface: Its kind.
        load: Imports a component.
    """
    definition = find_definition(component.target)
    said = None
    if definition is not None and definition.complete():
        said = _from_source(definition, interface.method)
    if said is None:
        said = _from_object(load(component), interface.method)
    documentation = parse_docstring(said.doc)
    return Description(
        component=component,
        doc=documentation.prose or component.summary,
        parameters=_parameters(said.constructor),
        inputs=tuple(_input(a, said.method.docs.get(a.name, "")) for a in said.method.arguments),
        method=interface.method,
        returns=said.method.returns,
        example=documentation.example,
        capabilities=said.capabilities,
        accepts_any=said.constructor.accepts_any,
    )


class _Said(NamedTuple):
    """What a definition says of itself."""

    doc: str
    constructor: Signature
    method: Signature
    capabilities: tuple[str, ...] = ()


def _from_source(definition: Definition, name: str) -> _Said | None:
    """Read a definition; None if the method ``name`` is not in its source."""
    if isinstance(definition.node, ast.FunctionDef):
        function = _spelled(signature_of_node(definition.node), definition)
        return _Said(definition.doc, *_halves(function))
    method = definition.member(name)
    if method is None:
        return None
    docs = documented(base.doc for base in definition.lineage())
    constructor = _spelled(constructor_of(definition), definition)
    constants = definition.constants()
    return _Said(
        definition.doc,
        replace(constructor, docs={**constructor.docs, **docs}),
        signature_of_node(method, bound=True),
        tuple(capability for capability in _CAPABILITIES if constants.get(capability) is True),
    )


def _from_object(loaded: Any, name: str) -> _Said:
    """Ask a class or function that had to be imported."""
    if not inspect.isclass(loaded):
        doc = inspect.getdoc(loaded) if inspect.isroutine(loaded) else None
        return _Said(doc or "", *_halves(signature_of_object(loaded)))
    docs = documented(inspect.cleandoc(base.__doc__ or "") for base in loaded.__mro__)
    bound = not isinstance(inspect.getattr_static(loaded, name, None), staticmethod | classmethod)
    method = getattr(loaded, name, None)
    return _Said(
        inspect.getdoc(loaded) or "",
        replace(signature_of_object(loaded), docs=docs),
        signature_of_object(method, bound=bound) if callable(method) else Signature(),
        tuple(c for c in _CAPABILITIES if getattr(loaded, c, None) is True),
    )


def _halves(function: Signature) -> tuple[Signature, Signature]:
    """Split a plain function: what has a default is a parameter, the others are inputs."""
    required = tuple(a for a in function.arguments if a.default is None)
    optional = tuple(a for a in function.arguments if a.default is not None)
    return replace(function, arguments=optional), replace(function, arguments=required)


def documented_parameters(node: ast.FunctionDef) -> tuple[Parameter, ...]:
    """Return the arguments of a function with their documentation."""
    return _parameters(signature_of_node(node))


def _parameters(signature: Signature) -> tuple[Parameter, ...]:
    return tuple(Parameter(*a, signature.docs.get(a.name, "")) for a in signature.arguments)


def _spelled(signature: Signature, definition: Definition) -> Signature:
    """Return a signature with aliases of literals written out."""

    def spelled(annotation: str) -> str:
        if not annotation.partition(" ")[0].isidentifier():
            return annotation
        return re.sub(r"\b[A-Za-z_]\w*\b(?!\[)", lambda m: definition.literal(m[0]), annotation)

    rows = (a._replace(annotation=spelled(a.annotation)) for a in signature.arguments)
    return replace(signature, arguments=tuple(rows))


def _input(argument: Argument, doc: str) -> Input:
    tensors = _TENSOR.findall(argument.annotation)  # several where the annotation is a union
    dtypes = {_DTYPES[tensor[0]] for tensor in tensors}
    shapes = {tuple(tensor[2].split()) for tensor in tensors}
    return Input(
        name=argument.name,
        annotation=argument.annotation,
        dtype=dtypes.pop() if len(dtypes) == 1 else "any" if dtypes else "",
        axes=shapes.pop() if len(shapes) == 1 else (),
        optional=argument.default is not None,
        doc=doc,
    )
