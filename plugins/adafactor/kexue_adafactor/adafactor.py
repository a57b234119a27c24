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
1 / C, and all scalars of the step go into the factor of the rows. Parameters of equal shape are
stacked, so that the number of kernels follows the number of different shapes, and what is stacked
at once is bounded. No value is read back from the device.

Deviations: means where the post writes sums (the same V̂); see the README for other libraries.

References: Su 2020, https://kexue.fm/archives/7302; Shazeer and Stern 2018, algorithms 4 to 6,
https://arxiv.org/abs/1804.04235.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from kexue.core import (
    ArgumentError,
    Example,
    Optimizer,
    check_settings,
    different_parameters,
    restore_state,
    some_parameters,
    state_dtype,
    with_gradient,
)
from kexue_adafactor.rounding import stochastic_round
from kexue_adafactor.tiny import are_tiny, means, scaled

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Adafactor"]

_RELATIVE_LR = 1e-2  # the cap of the relative step when no `lr` is given
_WARMUP = 1e-6  # per step, with `warmup_init`
_UNSCALED = 0.05  # what the relative step is multiplied by without the scale of the parameters
_LEAST_EPS1 = 1e-37  # below, it is no normal number in float32
_STACKED = {"cpu": 2**17}  # numbers stacked at once: what stays in a cache,
_STACKED_ELSEWHERE = 2**24  # or fills a device


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
        eps1: ε₁, added to squared gradients; at least 1e-37.
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
        stochastic_rounding: Round float16 and bfloat16 parameters up or down at random, so that
            steps below their resolution count on average.
        generator: Source of that randomness, on the device of the parameters; the global one by
            default. Not part of the ``state_dict``. Replicas (DDP) stay equal only if theirs have
            the same seed.
        maximize: Whether to go uphill.
        foreach: Whether parameters of equal shape are stacked. None for yes.

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
        eps1: float = 1e-30,
        eps2: float = 1e-3,
        clip: float | None = 1.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        weight_decay: float = 0.0,
        factor_dims: str = "last",
        min_dim_to_factor: int = 1,
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
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "foreach": foreach,
        }
        _check(defaults)
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
        _check(settings)
        # Schedulers and checkpoints want a number: None is kept as a flag beside it.
        group["default_lr"] = settings["lr"] is None
        if settings["relative_step"] is None:
            group["relative_step"] = settings["lr"] is None
        if settings["lr"] is None:
            group["lr"] = _RELATIVE_LR
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and parameter.is_complex():
                raise ArgumentError(
                    f"`params` of Adafactor must be real. Found {parameter.dtype} of shape "
                    f"{list(parameter.shape)}. Optimise torch.view_as_real(parameter) instead.",
                    argument="params",
                )
        super().add_param_group(group)

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
            _check_schedule(group)
        moved = [(group, with_gradient(group["params"])) for group in self.param_groups]
        for group, parameters in moved:
            for buckets in self._buckets(group, parameters):
                scaled = _scaled(group, buckets, self.state[buckets[0][0]]["step"])
                for bucket, steps in zip(buckets, scaled, strict=True):
                    self._update(group, bucket, steps)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of whatever device and ``foreach``.

        Args:
            state_dict: The state. Not modified, and not shared afterwards.
        """
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    # -- which parameters go together ------------------------------------------------------------

    def _buckets(self, group: dict[str, Any], parameters: list[Tensor]) -> list[list[list[Tensor]]]:
        """Count the step, and return lists of lists of parameters.

        The inner ones have one shape, and are computed as one tensor; the outer ones have one
        device, type and step, and find their rates together.
        """
        alone: list[list[list[Tensor]]] = []
        alike: dict[Any, dict[torch.Size, list[Tensor]]] = {}
        for p in parameters:
            state = self.state[p]
            state["step"] = step = int(state.get("step", 0)) + 1
            if group["foreach"] is False or _distributed(p):
                alone.append([[p]])
            else:
                of_type = alike.setdefault((p.device, p.dtype, step), {})
                of_type.setdefault(p.shape, []).append(p)
        for (device, *_), shapes in alike.items():
            limit = _STACKED.get(device.type, _STACKED_ELSEWHERE)
            buckets = []
            for shape, same in shapes.items():
                most = max(1, limit // shape.numel())
                buckets += [same[i : i + most] for i in range(0, len(same), most)]
            alone.append(buckets)
        return alone

    # -- the step --------------------------------------------------------------------------------

    def _update(self, group: dict[str, Any], parameters: list[Tensor], steps: Tensor) -> None:
        """Step parameters of one shape; ``same`` is the axis that they are stacked on."""
        first = parameters[0]
        step = self.state[first]["step"]
        dims = _factored(first.shape, group["factor_dims"], group["min_dim_to_factor"])
        dtype = state_dtype(first)
        grads = [p.grad for p in parameters if p.grad is not None]
        gradient = _stack(_moved(grads, dims)).to(dtype)  # [same, …]
        weights = _stack(parameters).to(dtype) if first.dtype != dtype else None  # [same, *shape]

        if group["weight_decay"]:
            kept = 1 - _rate(group, step) * group["weight_decay"]
            if weights is None:
                torch._foreach_mul_(parameters, kept)  # as torch.optim itself
            else:
                weights.mul_(kept)

        states = [self.state[p] for p in parameters]
        share = step ** -group["decay"]  # 1 − β̂_t
        parts = (
            _whole(gradient, states, share, steps, group)
            if dims is None
            else _tiny_factors(gradient, states, share, steps, group)
            if dims == (first.ndim - 2, first.ndim - 1) and are_tiny(gradient)
            else _factors(gradient, states, share, steps, group)
        )
        self._apply(group, parameters, weights, parts, dims)

    def _apply(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        weights: Tensor | None,
        parts: tuple[Tensor, Tensor | None],
        dims: tuple[int, int] | None,
    ) -> None:
        """Add the product of the parts, or its first moment, to the parameters."""
        change, factor = parts
        if len(parameters) == 1 and weights is None and group["beta1"] is None:
            if factor is None:
                parameters[0].add_(change[0])
            else:  # the last product and the sum in one pass
                _moved(parameters, dims)[0].addcmul_(change[0], factor[0])
            return
        if factor is not None:
            change.mul_(factor)
        changes = _moved(list(change.unbind(0)), dims, back=True)
        if group["beta1"] is not None:
            pairs = zip(parameters, changes, strict=True)
            moments = [_kept(self.state[p], "momentum", c) for p, c in pairs]
            torch._foreach_lerp_(moments, changes, 1 - group["beta1"])
            changes = moments
        if weights is None:
            torch._foreach_add_(parameters, changes)
            return
        weights.add_(_stack(changes))
        if group["stochastic_rounding"]:
            rounded = _locally(weights, parameters[0].dtype, self.generator)
        else:
            rounded = weights.to(parameters[0].dtype)
        if len(parameters) == 1:
            parameters[0].copy_(rounded[0])
        else:
            torch._foreach_copy_(parameters, list(rounded.unbind(0)))

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


# -- settings --------------------------------------------------------------------------------------


def _check(settings: dict[str, Any]) -> None:
    """Raise ArgumentError at the first setting that is out of range."""
    lr, beta1, clip = settings["lr"], settings["beta1"], settings["clip"]
    one = not isinstance(lr, Tensor) or lr.numel() == 1
    least = settings["min_dim_to_factor"]
    conditions = {
        "lr": (one and (lr is None or 0 <= lr < math.inf), "None, or finite and not negative"),
        "beta1": (beta1 is None or 0 < beta1 < 1, "None, or in (0, 1)"),
        "decay": (0 < settings["decay"] < 1, "in (0, 1)"),
        "eps1": (_LEAST_EPS1 <= settings["eps1"] < math.inf, f"finite, at least {_LEAST_EPS1:g}"),
        "eps2": (0 <= settings["eps2"] < math.inf, "finite and not negative"),
        "clip": (clip is None or clip > 0, "None, or positive"),
        "weight_decay": (0 <= settings["weight_decay"] < math.inf, "finite and not negative"),
        "factor_dims": (settings["factor_dims"] in {"last", "largest"}, "'last' or 'largest'"),
        "min_dim_to_factor": (isinstance(least, int) and least >= 1, "an int of at least 1"),
    }
    check_settings("Adafactor", settings, conditions)
    if settings["relative_step"] is False and lr is None:
        raise ArgumentError(
            "`lr` of Adafactor must be given with relative_step=False. Found None. "
            "Set it, for example to 1e-3.",
            argument="lr",
        )
    if settings["warmup_init"] and not (settings["relative_step"] or lr is None):
        raise ArgumentError(
            "`warmup_init` of Adafactor is about relative steps. Found it with "
            f"relative_step={settings['relative_step']} and lr={lr!r}. Set relative_step=True.",
            argument="warmup_init",
        )


def _check_schedule(group: dict[str, Any]) -> None:
    if group.get("default_lr") and "initial_lr" in group:
        raise ArgumentError(
            "`lr` of Adafactor must be a number under a learning-rate scheduler. Found None, whose "
            "steps follow 1/√t. Give lr, for example 1e-3, or remove the scheduler.",
            argument="lr",
        )


def _rate(group: dict[str, Any], step: int) -> float:
    """Return α_t, without the scale of the parameter."""
    rate = float(group["lr"])
    if group["relative_step"]:
        rate = min(rate, 1 / math.sqrt(step))
        if group["warmup_init"]:
            rate = min(rate, _WARMUP * step)
        if group["default_lr"] and not group["scale_parameter"]:
            rate *= _UNSCALED
    return rate


def _scaled(group: dict[str, Any], buckets: list[list[Tensor]], step: int) -> Sequence[Tensor]:
    """Return ∓α_t max(ε₂, RMS(θ)) before any decay: for each bucket, shape ``[same]``."""
    parameters = [p for bucket in buckets for p in bucket]
    first = parameters[0]
    dtype = state_dtype(first)
    rate = _rate(group, step) if group["maximize"] else -_rate(group, step)
    if group["scale_parameter"]:
        norms = torch._foreach_norm(parameters, 2, dtype=dtype)  # noqa: SLF001
        roots: Any = [math.sqrt(p.numel()) for p in parameters]
        if len(roots) == 1:
            roots = roots[0]
        else:
            roots = torch.tensor(roots, dtype=dtype).to(first.device, non_blocking=True)
        scale = _stack([_settled(norm) for norm in norms]).div(roots)
        scale = scale.clamp_min_(group["eps2"]).mul_(rate)
    else:
        scale = torch.full((len(parameters),), rate, dtype=dtype, device=first.device)
    return torch.split(scale, [len(bucket) for bucket in buckets]) if buckets[1:] else [scale]


def _factored(shape: torch.Size, which: str, least: int) -> tuple[int, int] | None:
    """Return the dimensions of rows and columns; None if V̂ is kept whole."""
    if len(shape) < 2:
        return None
    row, column = len(shape) - 2, len(shape) - 1
    if which == "largest":
        row, column = sorted(sorted(range(len(shape)), key=lambda i: (shape[i], i))[-2:])
    return (row, column) if min(shape[row], shape[column]) >= least else None


# -- tensors ---------------------------------------------------------------------------------------


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors on a new first axis; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _moved(
    tensors: list[Tensor], dims: tuple[int, int] | None, *, back: bool = False
) -> list[Tensor]:
    """Return views with rows and columns as the last two axes, or back from there."""
    if dims is None or dims == (tensors[0].ndim - 2, tensors[0].ndim - 1):
        return tensors
    last = (-2, -1)
    places = (last, dims) if back else (dims, last)
    return [t.movedim(*places) for t in tensors]


def _distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, also where torch is built without them."""
    return hasattr(tensor, "placements")


def _settled(tensor: Tensor) -> Tensor:
    """Finish the sums over processes that a DTensor still owes."""
    if _distributed(tensor) and any(p.is_partial() for p in tensor.placements):
        from torch.distributed.tensor import Replicate

        done = [Replicate() if p.is_partial() else p for p in tensor.placements]
        settled: Tensor = tensor.redistribute(placements=done)
        return settled
    return tensor


def _locally(weights: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round at random, each process its own part of a DTensor."""
    if not _distributed(weights):
        return stochastic_round(weights, dtype, generator=generator)
    from torch.distributed.tensor import DTensor

    rounded: Tensor = DTensor.from_local(
        stochastic_round(weights.to_local(), dtype, generator=generator),
        weights.device_mesh,
        weights.placements,
        shape=weights.shape,
        stride=weights.stride(),
        run_check=False,
    )
    return rounded


def _kept(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """Return a tensor of the state, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    kept: Tensor = state[name]
    return kept


def _decayed(states: list[dict[str, Any]], name: str, now: Tensor, share: float) -> Tensor:
    """Mix this step's statistics into the state, and return the state, ``[same, …]``."""
    news = list(now.unbind(0))
    kept = [_kept(s, name, n) for s, n in zip(states, news, strict=True)]
    torch._foreach_lerp_(kept, news, share)
    return _stack(kept)


def _sums(tensor: Tensor) -> Tensor:
    """Sum over all axes but the first."""
    return tensor if tensor.ndim == 1 else tensor.sum(dim=tuple(range(1, tensor.ndim)))


def _inner(square: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j square_ij weights_j; ``square`` may be spent on it."""
    alone = square.ndim == 3 and len(square) == 1 and not _distributed(square)
    if alone and not torch.is_autocast_enabled(square.device.type):
        # A matrix times a vector reads once; other products might be computed in TF32.
        return torch.mv(square[0], weights[0]).unsqueeze(0)
    return square.mul_(weights.unsqueeze(-2)).sum(-1)


def _along(scales: Tensor, like: Tensor) -> Tensor:
    """View ``[same]`` as ``[same, 1, …]``."""
    return scales.view(-1, *[1] * (like.ndim - 1))


def _clipped(steps: Tensor, sums: Tensor, count: int, clip: float) -> Tensor:
    """Divide steps by max(1, RMS(u) / d), given the sums of u² over so many numbers."""
    return sums.mul(1 / (count * clip**2)).clamp_min_(1.0).rsqrt_().mul_(steps)


def _whole(
    gradient: Tensor,
    states: list[dict[str, Any]],
    share: float,
    steps: Tensor,
    group: dict[str, Any],
) -> tuple[Tensor, None]:
    """Return the change where V̂ is kept whole."""
    second = _decayed(states, "variance", gradient.square().add_(group["eps1"]), share)  # V̂
    update = second.rsqrt().mul_(gradient)  # u
    if group["clip"] is not None:
        sums = _settled(_sums(update.square()))
        steps = _clipped(steps, sums, update.numel() // len(update), group["clip"])
    return update.mul_(_along(steps, update)), None


def _factors(
    gradient: Tensor,
    states: list[dict[str, Any]],
    share: float,
    steps: Tensor,
    group: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the change as a product: gradient and rows, ``[same, …, row, column]``, and columns.

    1/√V̂ is applied as √mean(R)/√R and 1/√C: the product R C of two ε₁ is 0 in float32.
    """
    square = gradient.square()
    rows = _decayed(states, "row", _settled(square.mean(-1)).add_(group["eps1"]), share)  # R
    columns = _decayed(states, "column", _settled(square.mean(-2)).add_(group["eps1"]), share)  # C
    by_row = rows.rsqrt() * _settled(rows.mean(-1, keepdim=True)).sqrt()
    by_column = columns.rsqrt()
    if group["clip"] is not None:
        # mean(u²) = Σ_i by_row_i² Σ_j g²_ij / C_j: one pass; twice by_row, whose square may be inf
        inner = _settled(_inner(square, by_column.square()))
        sums = _settled(_sums(inner.mul(by_row).mul_(by_row)))
        steps = _clipped(steps, sums, gradient.numel() // len(gradient), group["clip"])
    by_row = by_row * _along(steps, by_row)
    return torch.mul(gradient, by_row.unsqueeze(-1), out=square), by_column.unsqueeze(-2)


def _tiny_factors(
    gradient: Tensor,
    states: list[dict[str, Any]],
    share: float,
    steps: Tensor,
    group: dict[str, Any],
) -> tuple[Tensor, None]:
    """Return the change of matrices so small that u is formed: see :mod:`kexue_adafactor.tiny`."""
    now = means(gradient.square())
    rows, columns = (
        _decayed(states, name, statistics.add_(group["eps1"]), share)
        for name, statistics in zip(("row", "column"), now, strict=True)
    )
    update = scaled(gradient, rows.rsqrt() * rows.mean(-1, keepdim=True).sqrt(), columns.rsqrt())
    if group["clip"] is not None:
        sums = _sums(update.square())
        steps = _clipped(steps, sums, update.numel() // len(update), group["clip"])
    return update.mul_(_along(steps, update)), None
