"""What the optimizers share: one step of v ← βv − αg, and of parameters that run ahead by hβv.

Symbols: θ parameter, g gradient, v velocity (the way of a step, so that it includes α), α learning
rate, β momentum, h look-ahead, Θ = θ + hβv what the optimizer holds and the gradient is taken at.

::

    v ← βv − αg(Θ)
    Θ ← Θ + (1 − h + hβ) v − hαg         (h = 0: θ ← θ + v; h = 1: Θ ← Θ + βv − αg)

The state is not v but the mean of the gradients that it is made of, and how much it counts: with
v = −c m,

::

    c ← βc + α        m ← m + (α/c) (g − m)

The second line is one pass (`lerp`) over memory where v ← βv − αg takes two. c is a number, the
same for all parameters that have stepped together. What becomes of v when α changes is a choice of
the unit in which c is counted: 1 (v stays), α (v goes with α) or the time step γ (v/γ stays).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kexue.core import (
    ArgumentError,
    Example,
    Optimizer,
    check_settings,
    different_parameters,
    eagerly,
    restore_state,
    some_parameters,
    state_dtype,
    with_gradient,
)
from kexue_momentum.dynamics import beta_for_lr, time_step

__all__ = ["Motion"]

_TOGETHER = {"cpu": 2**17}  # numbers in one call: what stays in a cache,
_TOGETHER_ELSEWHERE = 2**24  # or fills a device; scratch memory is as large
_UNITS = ("none", "lr", "dynamics")
_FRICTIONS = (None, "rule", "exact")


class Plan(NamedTuple):
    """What a step does, for parameters that have one history.

    Args:
        alpha: Learning rate.
        beta: Momentum.
        unit: What the gain is counted in.
        gain: c in that unit, after the step.
        weight: What the gradient weighs in the mean.
    """

    alpha: float
    beta: float
    unit: float
    gain: float
    weight: float


class Motion(Optimizer):
    """Base of the plugin's optimizers."""

    look_ahead: ClassVar[float] = 0.0
    """h: the gradient is taken at θ + hβv."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._check(defaults)
        super().__init__(some_parameters(type(self).__name__, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Args:
            param_group: ``params``, and whatever differs from the defaults.

        Raises:
            ArgumentError: As the constructor.
        """
        group = different_parameters(type(self).__name__, self, param_group)
        settings = {**self.defaults, **group}
        self._check(settings)
        group["reference_lr"] = float(settings["lr"])  # the momentum is meant for this one
        if settings["rescale_velocity"] is None:
            group["rescale_velocity"] = "dynamics" if settings["keep_friction"] else "none"
        super().add_param_group(group)

    @eagerly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, with gradients.

        Returns:
            What the closure returns; None without one.

        Raises:
            ArgumentError: If a gradient is sparse; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [
            (group, with_gradient(group["params"], instead="torch.optim.SGD"))
            for group in self.param_groups
        ]
        for group, parameters in ready:
            for plan, together in self._plans(group, parameters):
                self._move(group, plan, together)
        return loss

    def velocity(self, parameter: Tensor) -> Tensor:
        """Return v, of the parameter's shape: the way of the last step, look-ahead aside.

        Args:
            parameter: One that is optimised.

        Raises:
            ArgumentError: If it is not.
        """
        for group in self.param_groups:
            if any(parameter is p for p in group["params"]):
                state = self.state.get(parameter, {})
                if "mean" not in state:
                    return torch.zeros_like(parameter)
                alpha, beta = self._rates(group)
                scale = _unit(group["rescale_velocity"], alpha, beta)[0] * state["gain"]
                velocity: Tensor = state["mean"] * (scale if group["maximize"] else -scale)
                return velocity
        raise ArgumentError(
            f"`parameter` must be one that {type(self).__name__} optimises. Found another, of "
            f"shape {list(parameter.shape)}.",
            argument="parameter",
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of whatever device and ``foreach``.

        Args:
            state_dict: The state. Not modified, and not shared afterwards.
        """
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    # -- what a step will do ---------------------------------------------------------------------

    def _rates(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return α and β, which follows α if the friction is kept."""
        alpha, beta = float(group["lr"]), float(group["momentum"])
        if group["keep_friction"] is not None and alpha != group["reference_lr"]:
            exact = group["keep_friction"] == "exact"
            beta = beta_for_lr(beta, alpha / group["reference_lr"], exact=exact)
        return alpha, beta

    def _plans(
        self, group: dict[str, Any], parameters: list[Tensor]
    ) -> Iterator[tuple[Plan, list[Tensor]]]:
        """Yield lists of parameters of one device, type and history, of bounded size."""
        alpha, beta = self._rates(group)
        unit, rate = _unit(group["rescale_velocity"], alpha, beta)
        alike: dict[Any, list[Tensor]] = {}
        for p in parameters:
            gain = self.state[p].get("gain") if beta else None
            alike.setdefault((p.device, p.dtype, gain), []).append(p)
        for (device, _, before), same in alike.items():
            gain = rate if before is None else beta * before + rate
            if before is None and beta and group.get("half_step_start"):
                gain /= 1 + beta  # v = −γ²∇L/2, as if the ball had been let go half a step ago
            weight = 1.0 if before is None or not gain else rate / gain
            plan = Plan(alpha, beta, unit, gain, weight)
            most = _TOGETHER.get(device.type, _TOGETHER_ELSEWHERE)
            most = 0 if group["foreach"] is False else most
            for together in _chunks(same, most):
                yield plan, together

    # -- the step --------------------------------------------------------------------------------

    def _gradients(self, group: dict[str, Any], plan: Plan, parameters: list[Tensor]) -> list[Any]:
        """Return what the parameters move against, as local tensors of the state's type."""
        del plan
        dtype = state_dtype(parameters[0])
        found = [_local(p.grad, p).to(dtype) for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            sign = -1 if group["maximize"] else 1
            weights, decay = [_local(p) for p in parameters], sign * group["weight_decay"]
            found = list(torch._foreach_add(found, weights, alpha=decay))  # noqa: SLF001
        return found

    def _move(self, group: dict[str, Any], plan: Plan, parameters: list[Tensor]) -> None:
        gradients = self._gradients(group, plan, parameters)
        weights = [_local(p) for p in parameters]
        sign = 1 if group["maximize"] else -1
        if not plan.beta:  # gradient descent
            for p in parameters:
                self.state.pop(p, None)
            torch._foreach_add_(weights, gradients, alpha=sign * plan.alpha)
            return
        means = [_local(self._mean(p)) for p in parameters]
        torch._foreach_lerp_(means, gradients, plan.weight)
        for p in parameters:
            self.state[p]["gain"] = plan.gain
        ahead = self.look_ahead
        along = sign * plan.unit * plan.gain * (1 - ahead + ahead * plan.beta)
        if not ahead:
            torch._foreach_add_(weights, means, alpha=along)
        elif parameters[0].dtype != means[0].dtype:  # the sum first: it is rounded once
            change = torch._foreach_mul(means, along)  # noqa: SLF001
            torch._foreach_add_(change, gradients, alpha=sign * ahead * plan.alpha)
            torch._foreach_add_(weights, change)
        else:
            torch._foreach_add_(weights, means, alpha=along)
            torch._foreach_add_(weights, gradients, alpha=sign * ahead * plan.alpha)

    def _mean(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        mean: Tensor = state["mean"]
        return mean

    # -- what it refuses -------------------------------------------------------------------------

    def _conditions(self, settings: dict[str, Any]) -> dict[str, tuple[bool, str]]:
        """Return, for each setting, whether it is in range, and the range."""
        lr, momentum = settings["lr"], settings["momentum"]
        one = not isinstance(lr, Tensor) or lr.numel() == 1
        decay = settings["weight_decay"]
        return {
            "lr": (bool(one and 0 < lr < math.inf), "positive and finite"),
            "momentum": (0 <= momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= decay < math.inf, "finite and not negative"),
            "rescale_velocity": (
                settings["rescale_velocity"] in (None, *_UNITS),
                f"None or one of {', '.join(map(repr, _UNITS))}",
            ),
            "keep_friction": (settings["keep_friction"] in _FRICTIONS, "None, 'rule' or 'exact'"),
        }

    def _check(self, settings: dict[str, Any]) -> None:
        check_settings(type(self).__name__, settings, self._conditions(settings))

    @staticmethod
    def reads_parameters(group: dict[str, Any]) -> bool:
        """Return whether the steps of a group depend on its parameters but by their gradients.

        Each class says so itself: what asks does not take a base's word for its subclasses, whose
        steps may be others.

        Args:
            group: One of ``param_groups``.
        """
        return bool(group["weight_decay"])

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-3}, {"problem": "quadratic"})


def _unit(name: str | None, alpha: float, beta: float) -> tuple[float, float]:
    """Return the unit of the gain, and α in it."""
    if name == "lr":
        return alpha, 1.0
    if name == "dynamics":
        gamma = time_step(alpha, beta)
        return gamma, gamma * (1 + beta) / 2  # α = γ² (1 + β)/2
    return 1.0, alpha


def _local(tensor: Any, like: Any = None) -> Tensor:
    """Return this process's part of a DTensor: all that a step does is number by number.

    Args:
        tensor: Any tensor.
        like: What it must be distributed as; itself by default.
    """
    if not hasattr(tensor, "to_local"):
        found: Tensor = tensor
        return found
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    local: Tensor = tensor.to_local()
    return local


def _chunks(tensors: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists of at most so many numbers, or single ones."""
    chunk: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if chunk and count + tensor.numel() > most:
            yield chunk
            chunk, count = [], 0
        chunk.append(tensor)
        count += tensor.numel()
    if chunk:
        yield chunk
