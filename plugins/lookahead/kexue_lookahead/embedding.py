"""Lazy Adam and SGD for embeddings, in time of the touched rows.

Choose it for tables of which a batch touches a small part. The result is that of
``with_lazy(torch.optim.Adam)``, but nothing is done to rows that are not touched: when one is, its
moments are first decayed by all the steps that they missed.

Symbols: γ ``lr``, λ ``weight_decay``, μ ``momentum``, t step, Δ steps since the row was last
touched, g its gradient.

::

    m ← β₁^Δ m + (1 − β₁) g          v ← β₂^Δ v + (1 − β₂) g²
    θ ← (1 − γλ) θ − γ m / (1 − β₁^t) / (√(v / (1 − β₂^t)) + ε)           Adam
    b ← μ^Δ b + g                    θ ← (1 − γλ) θ − γ b                  SGD

With ``state="freeze"`` Δ is 1: LazyAdam, and torch's SparseAdam.

Cost of a step: reading and writing the touched rows of parameter and moments; a dense gradient is
read once to find them, unless they are named. Memory: the base's, and four bytes per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

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
)
from kexue_lookahead.derivation import Group, distributed, local
from kexue_lookahead.rows import (
    TouchedRows,
    any_entry,
    check_rows,
    forget_rows,
    given_rows,
    powers,
)

__all__ = ["Lazy"]

_MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class Lazy(TouchedRows, Optimizer):
    r"""Adam or SGD with momentum that moves only the rows of embeddings that were sampled.

    Rows are those of the first dimension. Sampled are the rows of a sparse gradient
    (``nn.Embedding(sparse=True)``; sums over repeated ids are formed), those that ``touch`` names,
    or else those of a dense gradient that are not all 0; the kind of gradient may change from step
    to step. Finding rows in a dense gradient waits for the device once.

    The moments in ``optimizer.state[p]`` are those of the step in which a row was last touched,
    ``last``; ``materialize`` brings them up to date. Parameters are stepped one by one. The state
    of float16 and bfloat16 parameters is float32, and so is the arithmetic. Give other layers to
    another optimizer, or use ``with_lazy(base, lazy_include=("embed",))`` for all.

    Args:
        params: Parameters of shape ``[row, *any]``, real, or groups of them.
        lr: Step size γ, not negative.
        base: ``"adam"``, or ``"sgd"`` with momentum.
        state: ``"decay"``: the moments of other rows decay meanwhile, as in the post.
            ``"freeze"``: they stand still, as in LazyAdam.
        betas: β₁ and β₂ of Adam, in [0, 1).
        eps: ε of Adam, positive.
        momentum: μ of SGD, in [0, 1).
        weight_decay: λ of θ ← (1 − γλ) θ for the touched rows, apart from the gradient.
        maximize: Whether to go uphill.

    Raises:
        ArgumentError: If an argument is out of range, there are no parameters, one is complex, a
            scalar or there twice, or, on ``step``, a sparse gradient is not COO of rows, or a
            parameter is sharded otherwise than by rows; no parameter has moved then.

    Example:
        >>> import torch
        >>> from kexue_lookahead import Lazy
        >>> table = torch.nn.Embedding(1000, 4, sparse=True)
        >>> before = table.weight.detach().clone()
        >>> optimizer = Lazy(table.parameters(), lr=0.01)
        >>> table(torch.tensor([3, 7, 3])).sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(1).nonzero().flatten().tolist()
        [3, 7]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        base: Literal["adam", "sgd"] = "adam",
        state: Literal["decay", "freeze"] = "decay",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "base": base,
            "state": state,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        _check(defaults)
        super().__init__(some_parameters("Lazy", params), defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with their own settings.

        Args:
            param_group: ``params``, and whatever differs from the defaults.

        Raises:
            ArgumentError: As the constructor.
        """
        group = different_parameters("Lazy", self, param_group)
        _check({**self.defaults, **group})
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and (parameter.is_complex() or parameter.ndim == 0):
                found = f"{parameter.dtype} of shape {list(parameter.shape)}"
                raise ArgumentError(
                    f"`params` of Lazy must be real and have rows. Found {found}. "
                    "Optimise it by torch.optim.Adam.",
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
            ArgumentError: If the rows of a gradient cannot be told; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for _, p in moved:
            check_rows(self, p, sparse=True)
        for group, p in moved:
            self._prepare(group, p)
            if local(p).numel():
                rows, gradient = _sampled(local(p.grad), given_rows(self, p))
                _step(group, local(p), self.state[p], rows, gradient)
        forget_rows(self)
        return loss

    @torch.no_grad()
    def materialize(self) -> None:
        """Decay the moments of all rows to the present, as if there had been no waiting.

        What follows is the same with and without, to rounding. Afterwards ``exp_avg`` and
        ``exp_avg_sq`` are those that ``with_lazy(torch.optim.Adam)`` would have. With
        ``state="freeze"`` there is nothing to do.

        Example:
            >>> import torch
            >>> from kexue_lookahead import Lazy
            >>> table = torch.nn.Parameter(torch.zeros(2, 1))
            >>> optimizer = Lazy([table], base="sgd", lr=1.0, momentum=0.5)
            >>> for row in (0, 1, 1):
            ...     optimizer.zero_grad()
            ...     table[row].sum().backward()
            ...     optimizer.step()
            >>> optimizer.state[table]["momentum_buffer"].flatten().tolist()
            [1.0, 1.5]
            >>> optimizer.materialize()
            >>> optimizer.state[table]["momentum_buffer"].flatten().tolist()
            [0.25, 1.5]
        """
        for group in self.param_groups:
            for p in group["params"]:
                if "last" in self.state.get(p, ()):
                    _catch_up(group, self.state[p])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of whatever device.

        Args:
            state_dict: The state. Not modified, and not shared afterwards.
        """
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def _prepare(self, group: Group, parameter: Tensor) -> None:
        """Make the state, all 0, and count the step."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in _MOMENTS[group["base"]]:
                state[name] = torch.zeros_like(
                    parameter,
                    dtype=state_dtype(parameter),
                    memory_format=torch.contiguous_format,
                )
        if group["state"] == "decay":
            if "last" not in state:
                state["last"] = _counts(parameter, state["step"])
        elif "last" in state:  # a group that was switched to "freeze"
            _catch_up(group, state)
            del state["last"]
        state["step"] += 1

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2}, {"problem": "rosenbrock"})


def _check(settings: dict[str, Any]) -> None:
    """Raise ArgumentError at the first setting that is out of range."""
    lr, betas = settings["lr"], settings["betas"]
    one = not isinstance(lr, Tensor) or lr.numel() == 1
    decays = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    conditions = {
        "lr": (one and 0 <= lr < math.inf, "finite and not negative"),
        "base": (settings["base"] in _MOMENTS, "'adam' or 'sgd'"),
        "state": (settings["state"] in {"decay", "freeze"}, "'decay' or 'freeze'"),
        "betas": (decays, "two numbers in [0, 1)"),
        "eps": (0 < settings["eps"] < math.inf, "finite and positive"),
        "momentum": (0 <= settings["momentum"] < 1, "in [0, 1)"),
        "weight_decay": (0 <= settings["weight_decay"] < math.inf, "finite and not negative"),
    }
    check_settings("Lazy", settings, conditions)


def _decays(group: Group) -> tuple[float, ...]:
    """Return the decays of the moments, in their order."""
    return tuple(group["betas"]) if group["base"] == "adam" else (group["momentum"],)


def _catch_up(group: Group, state: dict[str, Any]) -> None:
    """Decay the moments of all rows to the present."""
    last = local(state["last"])
    missed = state["step"] - last
    for name, decay in zip(_MOMENTS[group["base"]], _decays(group), strict=True):
        moment = local(state[name])
        moment.mul_(powers(decay, missed, moment))
    last.fill_(state["step"])


def _counts(parameter: Tensor, step: int) -> Tensor:
    """Return the step for each row, sharded like the parameter."""
    part = local(parameter)
    steps = torch.full((len(part),), step, dtype=torch.int32, device=part.device)
    if not distributed(parameter):
        return steps
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    made: Tensor = DTensor.from_local(
        steps,
        sharded.device_mesh,
        sharded.placements,
        shape=torch.Size([len(parameter)]),
        stride=(1,),
        run_check=False,
    )
    return made


def _sampled(gradient: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of the step, ``[touched]``, and their gradients, ``[touched, *any]``."""
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    rows = any_entry(gradient).nonzero().flatten() if given is None else given
    return rows, gradient.index_select(0, rows)


def _step(group: Group, theta: Tensor, state: dict[str, Any], rows: Tensor, g: Tensor) -> None:
    """Step the sampled rows of one parameter; ``g`` is their gradient, ``[touched, *any]``."""
    names = _MOMENTS[group["base"]]
    g = g.to(local(state[names[0]]).dtype)
    if group["maximize"]:
        g = -g
    step = state["step"]
    missed = None  # Δ; None for 1
    if group["state"] == "decay":
        last = local(state["last"])
        missed = step - last.index_select(0, rows)
        last.index_fill_(0, rows, step)
    inputs = (g, g * g) if group["base"] == "adam" else (g,)
    moments = []
    for name, decay, added in zip(names, _decays(group), inputs, strict=True):
        kept = local(state[name])
        moment = kept.index_select(0, rows)
        moment.mul_(decay if missed is None else powers(decay, missed, moment))
        moment.add_(added, alpha=1 - decay if group["base"] == "adam" else 1)
        kept.index_copy_(0, rows, moment)
        moments.append(moment)
    if group["base"] == "adam":
        beta1, beta2 = group["betas"]
        root = math.sqrt(1 - beta2**step)
        # m̂ / (√v̂ + ε), with both corrections in one factor
        change = moments[0].div_(moments[1].sqrt_().add_(group["eps"] * root))
        factor = root / (1 - beta1**step)
    else:
        change, factor = moments[0], 1.0
    now = theta.index_select(0, rows).to(change.dtype)
    if group["weight_decay"]:
        now.mul_(1 - group["lr"] * group["weight_decay"])
    now.sub_(change.mul_(group["lr"] * factor))
    theta.index_copy_(0, rows, now.to(theta.dtype))
