"""What every component is asked."""

from __future__ import annotations

import contextlib
import copy
import doctest
import io
import json
import logging
import pickle
import re
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from kexue.core.component import PAD
from kexue.core.conformance.kit import (
    Check,
    GlobalState,
    Subject,
    is_class,
    require,
    tensors_of,
)
from kexue.core.device import resolve_device
from kexue.core.errors import KexueError

__all__ = ["CHECKS", "assert_close", "without_graph_break_reports"]

_GARBAGE = {False: -100, True: 13.0}
"""What stands behind the mask: what users pad tags with, and scores that any sum would show."""


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, tolerance: float
) -> None:
    """Assert that two results are equal, floating-point ones within a tolerance.

    Raises:
        AssertionError: With the greatest difference.
    """
    require(
        found.keys() == wanted.keys(), f"{what}: other results: {list(found)} and {list(wanted)}"
    )
    for name, tensor in found.items():
        other = wanted[name]
        require(
            tensor.shape == other.shape,
            f"{what}: `{name}` has shape {list(tensor.shape)} and {list(other.shape)}",
        )
        a, b = tensor.detach().double(), other.detach().double()
        same = torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not same.all():
            raise AssertionError(
                f"{what}: `{name}` differs by {float((a - b).abs().nan_to_num().max()):.3g}"
            )


def _finite(results: dict[str, Tensor]) -> None:
    for name, tensor in results.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AssertionError(f"`{name}` is not finite")


def _tensor_inputs(subject: Subject) -> bool:
    return is_class(subject) and any(isinstance(v, Tensor) for v in subject.inputs().values())


def _has(axis: str, *, mask: bool = False) -> Any:
    def applies(subject: Subject) -> bool:
        names = [row.name for row in subject.description.inputs]
        return (
            _tensor_inputs(subject) and axis in _all_axes(subject) and (not mask or "mask" in names)
        )

    return applies


def _all_axes(subject: Subject) -> set[str]:
    given = subject.inputs()
    return {
        word.lstrip("*")
        for row in subject.description.inputs
        if isinstance(given.get(row.name), Tensor)
        for word in row.axes
    }


# -- documentation ------------------------------------------------------------------------------


def documented(subject: Subject) -> None:
    """Say what it computes, where it is from, and what each argument is."""
    description = subject.description
    require(subject.component.references, "`references` of the component must name the source")
    require(
        any("://" in r for r in subject.component.references), "a reference must give an address"
    )
    rows = [(p.name, p.doc) for p in description.parameters]
    rows += [(row.name, row.doc) for row in description.inputs]
    missing = [name for name, doc in rows if not doc]
    require(not missing, f"the docstring must describe {', '.join(missing)}")
    require(subject.target.__doc__, "it must have a docstring")


def shapes_said(subject: Subject) -> None:
    """Give the shape of each tensor, by jaxtyping or as ``[batch, time]`` in words."""
    given = subject.inputs()
    silent = [
        row.name
        for row in subject.description.inputs
        if isinstance(given.get(row.name), Tensor)
        and not row.axes
        and not re.search(r"\[.*\]", row.doc)
    ]
    require(not silent, f"the shape of {', '.join(silent)} is not said")


def example_runs(subject: Subject) -> None:
    """Have an example in the docstring that gives what it says."""
    finder = doctest.DocTestFinder(recurse=False)
    tests = [t for t in finder.find(subject.target, subject.target.__name__) if t.examples]
    require(tests, "the docstring must hold an example (`>>> …`)")
    report = io.StringIO()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
    for test in tests:
        runner.run(test, out=report.write)
    require(not runner.failures, report.getvalue())


# -- results --------------------------------------------------------------------------------------


def builds(subject: Subject) -> None:
    """Build from its example and give finite results."""
    _finite(subject.call(subject.make(), subject.inputs()))


def dtypes(subject: Subject) -> None:
    """Compute alike in float32 and float64, and finitely in half precision where it says so."""
    exact = subject.call(subject.make(torch.float64), subject.inputs(dtype=torch.float64))
    single = subject.call(subject.make(), subject.inputs())
    assert_close(single, exact, "float32 against float64", 1e-4)
    for dtype in (torch.bfloat16, torch.float16) if subject.capability("half_precision") else ():
        _finite(subject.call(subject.make(dtype), subject.inputs(dtype=dtype)))


def devices(subject: Subject) -> None:
    """Compute alike on the accelerator, where there is one."""
    device = resolve_device()
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in subject.inputs().items()}
    built = subject.make()
    wanted = subject.call(built, subject.inputs())
    moved = built.to(device) if isinstance(built, nn.Module) else built
    found = {n: t.cpu() for n, t in subject.call(moved, inputs).items()}
    if not subject.capability("stochastic"):
        assert_close(found, wanted, f"{device} against {torch.get_default_device()}", 1e-3)


def one_by_one(subject: Subject) -> None:
    """Give each row what it gets alone."""
    built, inputs, places = subject.make(), subject.inputs(), subject.axes("batch")
    rows = max(v.shape[places[n]] for n, v in inputs.items() if n in places)
    together = subject.call(built, inputs)
    for name, tensor in together.items():
        require(
            tensor.ndim and len(tensor) == rows,
            f"{rows} rows give `{name}` of shape {list(tensor.shape)}, not one row each",
        )
    for i in range(rows):
        alone = subject.call(
            built, {n: v.narrow(places[n], i, 1) if n in places else v for n, v in inputs.items()}
        )
        _compare_rows({n: t[i : i + 1] for n, t in together.items()}, alone, f"row {i} alone")


def _compare_rows(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    for name, tensor in found.items():
        if name == "sequences":
            a, b = (
                [[x for x in r if x != PAD] for r in t.flatten(0, -2).tolist()]
                for t in (tensor, wanted[name])
            )
            require(a == b, f"{what}: sequences differ: {a} and {b}")
        else:
            assert_close({name: tensor}, {name: wanted[name]}, what, 1e-4)


def empty_batch(subject: Subject) -> None:
    """Take a batch of no rows."""
    places = subject.axes("batch")
    inputs = {
        n: v.narrow(places[n], 0, 0) if n in places else v for n, v in subject.inputs().items()
    }
    for name, tensor in subject.call(subject.make(), inputs).items():
        require(tensor.shape[:1] == (0,), f"`{name}` of no rows has shape {list(tensor.shape)}")


def padded(subject: Subject) -> None:
    """Not see what stands behind the mask."""
    built, inputs, places = subject.make(), subject.inputs(), subject.axes("time")
    longer = {
        n: _pad(v, places[n], False if n == "mask" else _GARBAGE[v.is_floating_point()])
        if n in places
        else v
        for n, v in inputs.items()
    }
    wanted, found = subject.call(built, inputs), subject.call(built, longer)
    time = next(inputs[n].shape[p] for n, p in places.items() if n in inputs)
    _compare_rows({n: t[:, :time] if t.ndim > 1 else t for n, t in found.items()}, wanted, "padded")


def _pad(tensor: Tensor, axis: int, fill: float) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = 2
    return torch.cat([tensor, torch.full(shape, fill, dtype=tensor.dtype)], dim=axis)


def non_contiguous(subject: Subject) -> None:
    """Take tensors that are views."""
    inputs = subject.inputs()
    views = {
        n: torch.stack([v, v], dim=-1)[..., 0] if isinstance(v, Tensor) else v
        for n, v in inputs.items()
    }
    assert_close(
        subject.call(subject.make(), views), subject.call(subject.make(), inputs), "views", 1e-6
    )


def inputs_unchanged(subject: Subject) -> None:
    """Leave its inputs as they are."""
    inputs = subject.inputs()
    before = {n: v.clone() for n, v in inputs.items() if isinstance(v, Tensor)}
    subject.call(subject.make(), inputs)
    for name, tensor in before.items():
        require(torch.equal(tensor, inputs[name]), f"`{name}` was modified")
        require(not inputs[name].requires_grad, f"`{name}` now requires a gradient")


def seeded(subject: Subject) -> None:
    """Give the same result for the same seed, and another for another."""
    built, inputs = subject.make(), subject.inputs()
    first, again = subject.call(built, inputs, seed=1), subject.call(built, inputs, seed=1)
    assert_close(again, first, "the same seed", 0.0)
    others = [subject.call(built, inputs, seed=s) for s in (2, 3, 4)]
    same = all(torch.equal(o[n], first[n]) for o in others for n in first)
    require(not same, "four seeds give the same result: `generator` is not used")


def gradients(subject: Subject) -> None:
    """Have the gradient of its value, by finite differences in float64."""
    built, inputs = subject.make(torch.float64), subject.inputs(dtype=torch.float64)
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    free = names[:1]  # further floating-point inputs are targets, which may be constants
    weights = {n: p for n, p in built.named_parameters() if p.requires_grad}

    def value(*tensors: Tensor) -> Tensor:
        given = dict(zip([*free, *weights], tensors, strict=True))
        changed = {n: t for n, t in given.items() if n in weights}
        out = torch.func.functional_call(
            built, changed, (), {**inputs, **{n: given[n] for n in free}}
        )
        return out if isinstance(out, Tensor) else next(iter(out))

    points = [inputs[n].detach().clone().requires_grad_() for n in free]
    points += [p.detach().clone().requires_grad_() for p in weights.values()]
    out = value(*points)
    require(out.requires_grad, f"no gradient flows to {', '.join([*free, *weights])}")
    try:
        torch.autograd.gradcheck(value, tuple(points), atol=1e-6)
    except GradcheckError as error:
        why = str(error).partition("\n")[0].rstrip(",")
        raise AssertionError(f"{why}, of {', '.join([*free, *weights])}") from error


def compiles(subject: Subject) -> None:
    """Give the same under ``torch.compile``."""
    built, inputs = subject.make(), subject.inputs()
    wanted = subject.call(built, inputs)
    torch.compiler.reset()
    function = (
        built if subject.method in {"forward", "__call__"} else getattr(built, subject.method)
    )
    compiled: Any = torch.compile(function, backend="aot_eager")
    with without_graph_break_reports():
        found = tensors_of(compiled(**inputs))
    assert_close(found, wanted, "compiled", 1e-5)


@contextlib.contextmanager
def without_graph_break_reports() -> Iterator[None]:
    """Keep the compiler from telling of graph breaks, which are allowed."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def copies(subject: Subject) -> None:
    """Survive pickle, deepcopy and, as a module, ``state_dict``."""
    built, inputs = subject.make(), subject.inputs()
    wanted = subject.call(built, inputs)
    for what, twin in (
        ("deepcopy", copy.deepcopy(built)),
        ("pickle", pickle.loads(pickle.dumps(built))),  # noqa: S301 -- our own bytes
    ):
        assert_close(subject.call(twin, inputs), wanted, what, 0.0)
    if isinstance(built, nn.Module):
        fresh = subject.make(seed=1)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.add_(1.0)
        fresh.load_state_dict(built.state_dict())
        assert_close(subject.call(fresh, inputs), wanted, "state_dict", 0.0)


def rejects_bad_input(subject: Subject) -> None:
    """Refuse a tensor that lacks its first axis, naming an argument."""
    built, inputs = subject.make(), subject.inputs()
    tensors = [n for n, v in inputs.items() if isinstance(v, Tensor)]
    for row in subject.description.inputs:
        value = inputs.get(row.name)
        any_axes = len(tensors) == 1 and any(axis.startswith(("*", "...")) for axis in row.axes)
        if not isinstance(value, Tensor) or not value.ndim or any_axes:
            continue
        try:
            subject.call(built, {**inputs, row.name: value[0]})
        except (KexueError, ValueError, TypeError) as error:
            named = any(f"`{name}`" in str(error) for name in inputs)
            require(named, f"the error for a bad `{row.name}` names no argument: {error}")
        except Exception as error:
            raise AssertionError(
                f"a bad `{row.name}` must raise an ArgumentError that names it. "
                f"Found {type(error).__name__}: {error}"
            ) from error
        else:
            raise AssertionError(f"`{row.name}` with a missing axis is accepted")


def global_state_unchanged(subject: Subject) -> None:
    """Leave torch's global state as it is."""
    built, inputs = subject.make(), subject.inputs()
    before, random = GlobalState.now(), torch.get_rng_state()
    subject.call(built, inputs)
    after = GlobalState.now()
    require(after == before, f"torch's global state was {before} and is {after}")
    require(torch.equal(random, torch.get_rng_state()), "it draws from the global generator")


def runs_on_files(subject: Subject) -> None:
    """Run from files, on its own example."""
    from kexue.core.run import Request, execute, result_json, write_example

    name = f"{subject.component.owner}:{subject.component.id}"
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(write_example(subject.registry, name, Path(folder)))[3:]
        params = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        files = words[: words.index("--set")] if "--set" in words else words
        here = str(torch.get_default_device())
        request = Request(name, files=files, params=params, device=here)
        job, result = execute(subject.registry, request)
        json.dumps(result_json(job, result, []))


def _gradable(subject: Subject) -> bool:
    return (
        bool(subject.capability("differentiable"))
        and subject.method == "forward"
        and _tensor_inputs(subject)
    )


def _runs_unfitted(subject: Subject) -> bool:
    """Whether the kind runs on files without being fitted first."""
    return is_class(subject) and not subject.capability("needs_fitting")


CHECKS: list[Check] = [
    Check("is documented", documented),
    Check("says its shapes", shapes_said, _tensor_inputs),
    Check("its example runs", example_runs, is_class),
    Check("builds and runs", builds, _tensor_inputs),
    Check("all dtypes", dtypes, lambda s: _tensor_inputs(s) and not s.capability("stochastic")),
    Check("all devices", devices, _tensor_inputs),
    Check(
        "rows do not see each other",
        one_by_one,
        lambda s: _has("batch")(s) and not s.capability("stochastic"),
    ),
    Check("empty batch", empty_batch, _has("batch")),
    Check(
        "padding is not seen",
        padded,
        lambda s: _has("time", mask=True)(s) and not s.capability("stochastic"),
    ),
    Check("views", non_contiguous, lambda s: _tensor_inputs(s) and not s.capability("stochastic")),
    Check("inputs are not modified", inputs_unchanged, _tensor_inputs),
    Check("seeded", seeded, lambda s: bool(s.capability("stochastic")) and _tensor_inputs(s)),
    Check("gradients", gradients, _gradable),
    Check(
        "compiles",
        compiles,
        lambda s: (
            bool(s.capability("compilable"))
            and _tensor_inputs(s)
            and not s.capability("stochastic")
        ),
    ),
    Check("copies", copies, _tensor_inputs),
    Check("rejects bad input", rejects_bad_input, _tensor_inputs),
    Check("global state is not changed", global_state_unchanged, _tensor_inputs),
    Check("runs on files", runs_on_files, _runs_unfitted),
]
"""The questions, in the order they are asked."""
