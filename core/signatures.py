"""What a function takes and says of itself, read from its source or from the object."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kexue.core.docstrings import parse_docstring
from kexue.core.source import Definition

__all__ = [
    "Argument",
    "Signature",
    "constructor_of",
    "documented",
    "signature_of_node",
    "signature_of_object",
]


class Argument(NamedTuple):
    """One argument.

    Args:
        name: Its name.
        annotation: Its type as written; empty if there is none.
        default: Its default as written; None if it is required.
    """

    name: str
    annotation: str
    default: str | None


@dataclass(frozen=True)
class Signature:
    """A function without its code.

    Args:
        arguments: What it takes, ``self`` left out.
        accepts_any: Whether it takes keywords beyond these.
        docs: What its docstring says of each argument.
        returns: What its docstring says that it returns, else the annotation.
    """

    arguments: tuple[Argument, ...] = ()
    accepts_any: bool = False
    docs: Mapping[str, str] = field(default_factory=dict)
    returns: str = ""


def documented(docstrings: Iterable[str]) -> dict[str, str]:
    """Return what docstrings say of each argument; the first that says something counts.

    Args:
        docstrings: Those of a class and its bases, nearest first.
    """
    found: dict[str, str] = {}
    for text in docstrings:
        found = {**parse_docstring(text).params, **found}
    return found


def signature_of_node(node: ast.FunctionDef, *, bound: bool = False) -> Signature:
    """Return the signature of a function from its source.

    Args:
        node: The function.
        bound: Whether its first argument is filled in: a method's.
    """
    spec = node.args
    positional = spec.posonlyargs + spec.args
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    pairs = [*zip(positional, defaults, strict=True)]
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    pairs = pairs[1:] if bound and not static else pairs
    pairs += zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    doc = parse_docstring(ast.get_docstring(node) or "")
    return Signature(
        tuple(Argument(a.arg, _written(a.annotation) or "", _written(d)) for a, d in pairs),
        accepts_any=spec.kwarg is not None,
        docs=doc.params,
        returns=doc.returns or _written(node.returns) or "",
    )


def _written(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def signature_of_object(function: Callable[..., Any], *, bound: bool = False) -> Signature:
    """Return the signature of a function or class that was imported.

    Args:
        function: The function, or the class for its constructor.
        bound: Whether its first argument is filled in: a method's.
    """
    doc = parse_docstring(inspect.getdoc(function) or "")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # written in C
        return Signature(accepts_any=True, docs=doc.params, returns=doc.returns)

    def text(annotation: Any) -> str:
        if annotation is inspect.Signature.empty:
            return ""
        return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rows = list(signature.parameters.values())[bound:]
    return Signature(
        tuple(
            Argument(p.name, text(p.annotation), None if p.default is p.empty else repr(p.default))
            for p in rows
            if p.kind not in variable
        ),
        accepts_any=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in rows),
        docs=doc.params,
        returns=doc.returns or text(signature.return_annotation),
    )


def constructor_of(definition: Definition) -> Signature:
    """Return the signature of a class's constructor from its source."""
    for base in definition.lineage():
        node = base.own("__init__")
        if node is not None:
            return signature_of_node(node, bound=True)
        if "dataclass" in base.decorators():
            return Signature(tuple(_fields(base)))
    return Signature()


def _fields(definition: Definition) -> list[Argument]:
    """Return the fields of a dataclass that its constructor takes, those of its bases first."""
    found: dict[str, Argument] = {}
    for base in reversed(list(definition.lineage())):
        for node in base.node.body if "dataclass" in base.decorators() else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                row = _field(node.target.id, ast.unparse(node.annotation), node.value)
                if row is not None:
                    found[row.name] = row
    return list(found.values())


def _field(name: str, annotation: str, value: ast.expr | None) -> Argument | None:
    if annotation.endswith("KW_ONLY") or "ClassVar" in annotation:
        return None
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return Argument(name, annotation, _written(value))
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
    if given.get("init") == "False":
        return None
    factory = given.get("default_factory")
    return Argument(name, annotation, given.get("default", factory and f"{factory}()"))
