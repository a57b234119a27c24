"""Adafactor: adaptive steps with second moments of O(rows + columns) numbers per matrix.

Choose it where the moments of Adam do not fit. Give it large batches and a learning rate near 1e-3,
fine-tuning included. With ample memory, Adam needs less care.

Symbols: θ parameter, g gradient, t step, R and C decayed row and column means of g² + ε₁,
α_t step size, c decay, d clipping threshold, RMS(x) = √mean(x²).

::

    β̂_t = 1 − t^−c
    R ← β̂_t R + (1 − β̂_t) mean_j(g²_ij + ε₁)        C ← β̂_t C + (1 − β̂_t) mean_i(g²_ij + ε₁)
    V̂_ij = R_i C_j / mean(R)                          (vectors and scalars keep all of V̂)
    u = g / √V̂
    θ ← θ − α_t max(ε₂, RMS(θ)) u / max(1, RMS(u) / d)

R Cᵀ / mean(R) is the rank-1 matrix of least I-divergence from the decayed g².

V̂ and u are never formed for their own sake. RMS(u)² is the bilinear form of g² in mean(R) / R and
1 / C, and all scalars of the step go into the factor of the rows. Each operation is called for a
list of parameters of any shapes, small ones of equal shape are stacked, and what is in one list is
bounded (:mod:`kexue_adafactor.stacks`). No value is read back from the device.

Deviations: means where the post writes sums (the same V̂); see the README for other libraries.

References: Su 2020, https://kexue.fm/archives/7302; Shazeer and Stern 2018, algorithms 4 to 6,
https://arxiv.org/abs/1804.04235.
"""

# ruff: noqa: SLF001  # torch has functions of lists under such names only

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.core import (
    ArgumentError,
    Example,
    Optimizer,
    different_parameters,
    eagerly,
    restore_state,
    some_parameters,
    state_dtype,
    with_gradient,
)
from kexue_adafactor.moments import changes, kept
from kexue_adafactor.settings import RELATIVE_LR, TYPES, check, check_schedule, rate
from kexue_adafactor.stacks import Stack, batches
from kexue_adafactor.tensors import Tensors, assign, joined, moved, numbers, rounded, settled

__all__ = ["Adafactor"]


class Adafactor(Optimizer):
    r"""Adafactor: û = g / √V̂ clipped to RMS d, times max(ε₂, RMS(θ)), with V̂ of rank 1.

    Matrices keep one number per row and one per column, vectors and scalars one per entry; there is
    no first moment unless ``beta1`` is given. The state of float16 and bfloat16 parameters is
    float32, and so is the arithmetic.

    A learning-rate scheduler works on ``lr``; with ``lr=None`` there is nothing for it to work on,
    and ``step`` says so. DTensor parameters (FSDP2, tensor parallelism) are stepped one by one.

    Args:
        params: Parameters of shape ``[*any]``, real, or groups of them.
        lr: Step size α, relative to the RMS of the parameter. With ``relative_step``, the greatest
            one. None stands for ``relative_step`` with 1e-2.
        beta1: Decay of the optional first moment, of the steps; in (0, 1). None for none.
        decay: Exponent c of β̂_t = 1 − t^−c, in (0, 1).
        eps1: ε₁, at least 1e-37, or 1e-18 with ``eps_mode="clamp"``. None for 1e-30, or for the
            resolution of the type of the arithmetic (1.2e-7 in float32) with ``"clamp"``.
        eps2: ε₂, the least RMS that a parameter is taken to have.
        clip: Threshold d of RMS(u), positive. None for no clipping.
        scale_parameter: Whether the step is multiplied by max(ε₂, RMS(θ)).
        relative_step: Whether α_t = min(lr, 1/√t). By default only if ``lr`` is None; then α_t is
            multiplied by 0.05 if ``scale_parameter`` is off.
        warmup_init: Whether a relative step starts as min(1e-6 t, lr, 1/√t).
        weight_decay: λ of θ ← (1 − α_t λ) θ, apart from the gradient; without the parameter scale.
        factor_dims: Which two dimensions are rows and columns where there are more:
            ``"last"`` two, or the ``"largest"`` two, as in the post's code.
        min_dim_to_factor: Keep all of V̂ if one of the two is smaller. The post's code has 128.
        eps_mode: ``"add"``: ε₁ is added to squared gradients, as in the paper. ``"clamp"``: it is
            the least value of √V̂ and of mean(R), as in ``torch.optim.Adafactor``; V̂ is formed then.
        state_dtype: Type of the first moment, the only state as large as the parameters:
            ``torch.bfloat16``, ``torch.float32``, ``torch.float64``, or their names. None for that
            of the parameters, float32 if they have 16 bits. The second moments, a few numbers,
            always have the latter, and so has the arithmetic.
        stochastic_rounding: Round float16 and bfloat16 parameters up or down at random, so that
            steps below their resolution count on average.
        generator: Source of that randomness, on the device of the parameters; the global one by
            default. Not part of the ``state_dict``. Replicas (DDP) stay equal only if theirs have
            the same seed.
        maximize: Whether to go uphill.
        foreach: Whether parameters are stepped in lists, and small ones of equal shape stacked.
            None for yes.

    Raises:
        ArgumentError: If an argument is out of range, there are no parameters, one is complex or
            there twice, or, on ``step``, a gradient is sparse or a scheduler is attached to
            ``lr=None``.

    Example:
        >>> import torch
        >>> from kexue_adafactor import Adafactor
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight[0].tolist()
        [0.8999999761581421, 0.8999999761581421, 0.8999999761581421]
        >>> {name: list(x.shape) for name, x in optimizer.state[weight].items() if name != "step"}
        {'row': [2], 'column': [3]}
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = 1e-3,
        *,
        beta1: float | None = None,
        decay: float = 0.8,
        eps1: float | None = None,
        eps2: float = 1e-3,
        clip: float | None = 1.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        weight_decay: float = 0.0,
        factor_dims: str = "last",
        min_dim_to_factor: int = 1,
        eps_mode: str = "add",
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self.generator = generator
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "decay": decay,
            "eps1": eps1,
            "eps2": eps2,
            "clip": clip,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "weight_decay": weight_decay,
            "factor_dims": factor_dims,
            "min_dim_to_factor": min_dim_to_factor,
            "eps_mode": eps_mode,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "foreach": foreach,
        }
        check(defaults)
        super().__init__(some_parameters("Adafactor", params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Args:
            param_group: ``params``, and whatever differs from the defaults.

        Raises:
            ArgumentError: As the constructor.
        """
        group = different_parameters("Adafactor", self, param_group)
        settings = {**self.defaults, **group}
        check(settings)
        # Schedulers and checkpoints want a number: None is kept as a flag beside it.
        group["default_lr"] = settings["lr"] is None
        if settings["relative_step"] is None:
            group["relative_step"] = settings["lr"] is None
        if settings["lr"] is None:
            group["lr"] = RELATIVE_LR
        if isinstance(settings["state_dtype"], torch.dtype):  # which some checkpoints cannot hold
            group["state_dtype"] = str(settings["state_dtype"]).rpartition(".")[2]
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and parameter.is_complex():
                raise ArgumentError(
                    f"`params` of Adafactor must be real. Found {parameter.dtype} of shape "
                    f"{list(parameter.shape)}. Optimise torch.view_as_real(parameter) instead.",
                    argument="params",
                )
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
            ArgumentError: If a gradient is sparse, or a scheduler is attached to ``lr=None``;
                no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_schedule(group)
        moved = [(group, with_gradient(group["params"])) for group in self.param_groups]
        for group, parameters in moved:
            for stacks in batches(group, parameters, self.state):
                _step(group, stacks, self.generator)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of whatever device and ``foreach``.

        Args:
            state_dict: The state. Not modified, and not shared afterwards.
        """
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a checkpoint from before there were these
            group.setdefault("eps_mode", "add")
            group.setdefault("state_dtype", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    @staticmethod
    def reads_parameters(group: dict[str, Any]) -> bool:
        """Return whether the steps of a group depend on its parameters but by their gradients.

        Args:
            group: One of ``param_groups``.
        """
        return bool(group["weight_decay"] or group["scale_parameter"])

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2}, {"problem": "rosenbrock"})


# -- the step --------------------------------------------------------------------------------------


def _step(
    group: dict[str, Any], stacks: Sequence[Stack], generator: torch.Generator | None
) -> None:
    """Step parameters of one device, type, step and kind."""
    parameters = [p for stack in stacks for p in stack.parameters]
    step = stacks[0].states[0]["step"]
    steps = _scaled(group, parameters, step)
    weights = None  # in float32, if the parameters are not
    targets = parameters
    if parameters[0].dtype != state_dtype(parameters[0]):
        weights = [joined(stack.parameters).to(steps.dtype) for stack in stacks]
        targets = [w for stack, own in zip(stacks, weights, strict=True) for w in stack.split(own)]
    if group["weight_decay"]:
        torch._foreach_mul_(targets, 1 - rate(group, step) * group["weight_decay"])

    share = step ** -group["decay"]  # 1 − β̂_t
    grads = [stack.gradient() for stack in stacks]
    _add(group, stacks, targets, *changes(group, stacks, grads, share, steps))

    if weights is None:
        return
    dtype = parameters[0].dtype
    for stack, own in zip(stacks, weights, strict=True):
        low = rounded(own, dtype, generator) if group["stochastic_rounding"] else own.to(dtype)
        assign(stack.parameters, stack.split(low))


def _add(
    group: dict[str, Any],
    stacks: Sequence[Stack],
    targets: Sequence[Tensor],
    left: Tensors,
    right: Tensors,
) -> None:
    """Add the products of two lists, or their first moments, to parameters."""
    rest = iter(targets)
    owns = [[next(rest) for _ in stack.parameters] for stack in stacks]
    fused: list[tuple[Tensor, Tensor, Tensor]] = []  # the product and the sum in one pass
    apart: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    for stack, own, change, factor in zip(stacks, owns, left, right, strict=True):
        if group["beta1"] is None and not stack.lead:
            fused.append((moved(own[0], stack.dims), change, factor))
            continue
        parts = stack.split(change.mul_(factor))
        steps = [moved(part, stack.dims, back=True) for part in parts]
        apart += zip(own, steps, stack.states, strict=True)
    if fused:
        torch._foreach_addcmul_(*map(list, zip(*fused, strict=True)))
    if apart:
        own, steps, states = map(list, zip(*apart, strict=True))
        if group["beta1"] is not None:
            steps = _averaged(states, steps, 1 - group["beta1"], group["state_dtype"])
        torch._foreach_add_(own, steps)


def _averaged(
    states: list[dict[str, Any]], steps: list[Tensor], share: float, dtype: Any
) -> list[Tensor]:
    """Mix steps into their first moments, and return these, before they are rounded."""
    for state, step in zip(states, steps, strict=True):
        wanted = step.dtype if dtype is None else TYPES.get(dtype, dtype)
        moment = kept(state, "momentum", step)
        if moment.dtype != wanted:  # it is new, or was loaded, or the setting has changed
            state["momentum"] = moment.to(wanted)
    stored = [state["momentum"] for state in states]
    moments = [m.to(step.dtype) for m, step in zip(stored, steps, strict=True)]
    torch._foreach_lerp_(moments, steps, share)
    if stored[0].dtype != steps[0].dtype:
        assign(stored, moments)
    return moments


def _scaled(group: dict[str, Any], parameters: list[Tensor], step: int) -> Tensor:
    """Return ∓α_t max(ε₂, RMS(θ)) before any decay, ``[parameters]``."""
    first = parameters[0]
    dtype = state_dtype(first)
    signed = rate(group, step) if group["maximize"] else -rate(group, step)
    if not group["scale_parameter"]:
        return torch.full((len(parameters),), signed, dtype=dtype, device=first.device)
    norms = list(torch._foreach_norm(parameters, 2, dtype=dtype))
    scale = settled(norms[0]).reshape(1) if len(norms) == 1 else torch.stack(norms)
    scale = scale.div(numbers(parameters, scale) ** 0.5)
    return scale.clamp_min_(group["eps2"]).mul_(signed)
