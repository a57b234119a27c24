"""Problems that an optimizer is run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, did_you_mean
from kexue.core.loading import load_target

__all__ = ["PROBLEMS", "Problem", "loss_of", "make_problem"]


@dataclass(frozen=True)
class Problem:
    """Something to minimise.

    Args:
        name: What to call it.
        parameters: What the optimizer moves, at its starting point.
        loss: Computes the scalar loss from them; it takes no arguments.
        minimum: The least value of the loss, if it is known.
    """

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[], Tensor]
    minimum: float | None = None


def _plane(
    name: str,
    start: tuple[float, float],
    loss: Callable[[Tensor, Tensor], Tensor],
    where: Mapping[str, Any],
) -> Problem:
    point = nn.Parameter(torch.tensor(start, **where))
    return Problem(name, [point], lambda: loss(point[0], point[1]), 0.0)


def rosenbrock(**where: Any) -> Problem:
    """A curved valley: (1 − x)² + 100 (y − x²)², from (−1.5, 2)."""
    return _plane(
        "rosenbrock", (-1.5, 2.0), lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2, where
    )


def quadratic(**where: Any) -> Problem:
    """An ill-conditioned bowl: ½ (x² + 100 y²), from (2, 1)."""
    return _plane("quadratic", (2.0, 1.0), lambda x, y: 0.5 * (x**2 + 100 * y**2), where)


def ravine(**where: Any) -> Problem:
    """A narrow valley that lies askew: ½ (u² + 400 v²), axes at 30°, from (−3, −1)."""
    long, short = 3**0.5 / 2, 0.5
    return _plane(
        "ravine",
        (-3.0, -1.0),
        lambda x, y: 0.5 * ((long * x + short * y) ** 2 + 400 * (long * y - short * x) ** 2),
        where,
    )


def beale(**where: Any) -> Problem:
    """Beale's function with its flat regions, from (1, 1)."""
    return _plane(
        "beale",
        (1.0, 1.0),
        lambda x, y: (
            (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
        ),
        where,
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "rosenbrock": rosenbrock,
    "quadratic": quadratic,
    "ravine": ravine,
    "beale": beale,
}


def loss_of(problem: Problem) -> Tensor:
    """Return the loss where the parameters are.

    Raises:
        ArgumentError: If it is not one number that depends on them.
    """
    loss: Any = problem.loss()
    found = None
    if not isinstance(loss, Tensor):
        found = type(loss).__name__
    elif loss.numel() != 1 or loss.is_complex():
        found = f"{loss.dtype} of shape {list(loss.shape)}"
    elif torch.is_grad_enabled() and not loss.requires_grad:
        found = "one that depends on no parameter"
    if found is not None:
        raise ArgumentError(
            f"The loss of {problem.name} must be a tensor of one real number, computed from the "
            f"parameters by torch. Found {found}.",
            argument="problem",
        )
    value: Tensor = loss.reshape(())
    return value


def make_problem(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Problem:
    """Return a built-in problem, or what ``file.py:function`` returns.

    The function takes nothing and returns a :class:`Problem`, or a pair of a tensor, a list of
    tensors or a module, and a function of no arguments that computes the loss from them. There must
    be a parameter, and none may be there twice.

    Args:
        name: One of :data:`PROBLEMS`, or ``file.py:function``.
        device: Where a built-in problem is; a function decides for itself.
        dtype: Its floating-point type, likewise.

    Raises:
        ArgumentError: If there is no such problem, or the function or its loss takes arguments, or
            it returns something else.
    """
    if ":" not in name:
        if name not in PROBLEMS:
            raise ArgumentError(
                f"`problem` must be one of {', '.join(PROBLEMS)}, or file.py:function. "
                f"Found {name!r}.{did_you_mean(name, PROBLEMS)}",
                argument="problem",
            )
        return PROBLEMS[name](device=device, dtype=dtype)
    function: Any = load_target(name)
    if callable(function):
        _check_takes_nothing(name, function)
    made = function() if callable(function) else function
    if isinstance(made, Problem):
        _check_takes_nothing(f"The loss of {name}", made.loss)
        _parameters(name, made.parameters)
        return made
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[1])):
        raise ArgumentError(
            f"{name} must return a Problem, or parameters and a loss function. "
            f"Found {type(made).__name__}.",
            argument="problem",
        )
    _check_takes_nothing(f"The loss of {name}", made[1])
    return Problem(name, _parameters(name, made[0]), made[1])


def _check_takes_nothing(what: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ArgumentError(
            f"{what} must take no arguments: a problem is a function that returns parameters and a "
            f"loss, which is a function that knows them. Found: {error}.",
            argument="problem",
        ) from error
    except ValueError:  # what is not written in Python may not tell
        return


def _parameters(name: str, given: Any) -> list[nn.Parameter]:
    if isinstance(given, Tensor):
        given = [given]
    parameters = list(given.parameters() if isinstance(given, nn.Module) else given)
    for parameter in parameters:
        if not (isinstance(parameter, Tensor) and parameter.requires_grad and parameter.is_leaf):
            raise ArgumentError(
                f"The parameters of {name} must be tensors that require gradients, such as "
                f"torch.nn.Parameter. Found {type(parameter).__name__}.",
                argument="problem",
            )
    different = len({id(parameter) for parameter in parameters})
    if not different:
        raise ArgumentError(
            f"{name} must return at least one parameter. Found none.", argument="problem"
        )
    if different < len(parameters):
        raise ArgumentError(
            f"The parameters of {name} must be different from each other. Found "
            f"{len(parameters)}, of which {different} are. Leave out what is there twice.",
            argument="problem",
        )
    return parameters
