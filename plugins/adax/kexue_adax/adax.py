"""AdaX: Adam with a second moment that averages ever more of the past.

Choose it where Adam's steps stay restless at the end of a long run: the weight of the present
gradient in v̂ goes to 0, so that the rate of each parameter settles and the method ends as SGD with
momentum. Where gradients change their size for good, Adam forgets and AdaX does not.

Symbols: θ parameter, g gradient, t step, α learning rate, m and v moments, λ weight decay.

::

    m ← β₁ m + (1 − β₁) g                 (no bias correction)
    v ← (1 + β₂) v + β₂ g²                v̂ = v / ((1 + β₂)^t − 1)
    θ ← θ − α m / √(v̂ + ε)

v outgrows float32 after 900 000 steps, so it is never formed. v̂ is itself an average:

::

    v̂ ← β̂_t v̂ + (1 − β̂_t) g²              β̂_t = 1 − β₂ / ((1 + β₂)^t − 1)

with β̂_1 = 0 and β̂_t → 1. Since its weights add up to 1, v̂ + ε is the average of g² + ε, and that is
what is kept where ε is inside of the root. In float32 β̂_t is rounded first and 1 − β̂_t taken from
it, so that the weights still add up to 1; beyond 170 000 steps β̂_t is then 1, and v̂ constant.

All parameters of one device, type and step are stepped by a few kernels over lists of tensors, or
by a single one: torch's fused Adam is this step if it is given β̂_t for β₂ and a step so large that
its bias corrections are 1. No value is read back from the device.

Deviations: none in the formula; see the README for the codes of its authors.

References: Su 2020, https://kexue.fm/archives/7387, eq. (1) and section “等价形式变换”; Li, Zhang,
Wang and Luo 2020, https://arxiv.org/abs/2004.09740.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

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
from kexue_adax.stepping import Bucket, at_once, may_fuse, step_bucket
from kexue_adax.tensors import own_parts, pieces, touched

__all__ = ["AdaX", "AdaXW"]

_LEAST_EPS = 1e-30  # below, its share in an average is no normal number in float32
_TYPICAL = 0.1  # a growth rate above is taken for Adam's decay
_PLACES = ("inside", "outside", "raw")


class AdaX(Optimizer):
    r"""AdaX: θ ← θ − α m / √(v̂ + ε), where v̂ averages ever more of the past squared gradients.

    The state is two numbers per parameter, as Adam's; of float16 and bfloat16 parameters it is
    float32, and so is the arithmetic. The fused kernel needs no memory beside the state; lists
    need that of 2¹⁸ numbers (2²⁴ off the CPU), once, and once more each for ``maximize`` and for
    weight decay that is not decoupled. 16-bit parameters need it twice more with either. NaN and
    infinities in a gradient go into the state and the parameter, as in torch.optim; GradScaler
    skips such steps, and ``torch.nn.utils.clip_grad_norm_(…, error_if_nonfinite=True)`` refuses
    them.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them. Complex ones are stepped as pairs
            of real numbers.
        lr: Learning rate α, not negative.
        betas: Decay β₁ of the first moment, in [0, 1), and growth rate β₂ of the second one, in
            (0, 1); β₂ is no decay: Adam's 0.999 would be an error, and is warned of.
        eps: ε, at least 1e-30.
        weight_decay: λ, not negative.
        decoupled_weight_decay: Whether θ ← (1 − α λ) θ, apart from the gradient, instead of
            g + λ θ.
        eps_mode: Where ε stands: ``"inside"``, √(v̂ + ε), as in the post; ``"outside"``, √v̂ + ε;
            ``"raw"``, √v + ε, as in the code of the paper, which is √v̂ + ε / √((1 + β₂)^t − 1).
        maximize: Whether to go uphill.
        foreach: Whether kernels work on lists of tensors. None for yes, where the fused kernel does
            not work; False for tensor by tensor.
        fused: Whether torch's fused kernel for Adam is used. None for yes, unless ``foreach`` is
            given; it is left out where torch has none that does what is expected of it, and
            for tensors that are not contiguous.

    Raises:
        ArgumentError: If an argument is out of range, there are no parameters or one comes twice,
            or, on ``step``, a gradient is sparse.

    Warns:
        UserWarning: If β₂ is above 0.1.

    Example:
        >>> import torch
        >>> from kexue_adax import AdaX
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaX([weight], lr=0.5)
        >>> (weight * torch.tensor([1.0, -3.0])).sum().backward()
        >>> optimizer.step()
        >>> [round(x, 4) for x in weight.tolist()]
        [0.95, 1.05]
    """

    steps_apart: ClassVar[bool] = True
    """Nothing is remembered but of a parameter: kexue-lookahead may step some of them alone."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        eps_mode: str = "inside",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eps_mode": eps_mode,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        self._check(defaults)
        self._warn(betas[1], stacklevel=2 + (type(self) is AdaXW))
        super().__init__(some_parameters(self._name, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings.

        Args:
            param_group: ``params``, and whatever differs from the defaults.

        Raises:
            ArgumentError: As the constructor.
        """
        group = different_parameters(self._name, self, param_group)
        self._check({**self.defaults, **group})
        if "betas" in group:
            self._warn(group["betas"][1], stacklevel=2)
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
        moved = [(group, with_gradient(group["params"])) for group in self.param_groups]
        for group, parameters in moved:
            for bucket in self._buckets(group, parameters):
                step_bucket(group, bucket)
            touched(parameters)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of whatever device, ``foreach`` and ``fused``.

        Args:
            state_dict: The state. Not modified, and not shared afterwards.

        Raises:
            ArgumentError: If it holds the raw v of the paper's code.
        """
        for index, state in state_dict["state"].items():
            if "exp_avg_sq_hat" not in state:
                raise ArgumentError(
                    f"`state_dict` of {self._name} must hold exp_avg_sq_hat. Found "
                    f"{sorted(map(str, state))} for parameter {index}. If it is a state of the "
                    "paper's code, give kexue_adax.from_official(state_dict).",
                    argument="state_dict",
                )
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    # -- which parameters go together ------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise ArgumentError at the first setting that is out of range."""
        lr, betas = settings["lr"], settings["betas"]
        pair = isinstance(betas, (tuple, list)) and [isinstance(b, (int, float)) for b in betas]
        one = not isinstance(lr, Tensor) or lr.numel() == 1
        conditions = {
            "lr": (one and 0 <= lr < math.inf, "one number, finite and not negative"),
            "betas": (
                pair == [True, True] and 0 <= betas[0] < 1 and 0 < betas[1] < 1,
                "a decay in [0, 1) and a growth rate in (0, 1), for example (0.9, 1e-4)",
            ),
            "eps": (_LEAST_EPS <= settings["eps"] < math.inf, f"finite, at least {_LEAST_EPS:g}"),
            "weight_decay": (0 <= settings["weight_decay"] < math.inf, "finite and not negative"),
            "eps_mode": (settings["eps_mode"] in _PLACES, "'inside', 'outside' or 'raw'"),
            "fused": (
                not (settings["fused"] and settings["foreach"]),
                "left out with foreach=True",
            ),
        }
        check_settings(self._name, settings, conditions)

    def _warn(self, beta2: float, stacklevel: int) -> None:
        """Warn of Adam's decay in place of a growth rate."""
        if beta2 > _TYPICAL:
            warnings.warn(
                f"The second of `betas` of {self._name} is a growth rate, typically 1e-4. Found "
                f"{beta2!r}, which looks like a decay of Adam.",
                stacklevel=stacklevel + 1,
            )

    def _buckets(self, group: dict[str, Any], parameters: list[Tensor]) -> Iterator[Bucket]:
        """Count the step, and yield what is stepped together."""
        alike: dict[Any, Bucket] = {}
        for p in parameters:
            state = self.state[p]
            state["step"] = step = int(state.get("step", 0)) + 1
            if step == 1:
                dtype = state_dtype(p)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                state["exp_avg_sq_hat"] = torch.zeros_like(p, dtype=dtype)
            tensors = own_parts((p, p.grad, state["exp_avg"], state["exp_avg_sq_hat"]))
            weight = tensors[0]
            if not weight.numel():  # other processes have all of it
                continue
            fused = may_fuse(group, step, tensors)
            most = at_once(weight, fused=fused)
            alone = len(alike) if group["foreach"] is False and not fused else 0
            key = (weight.device, weight.dtype, tensors[1].dtype, step, fused, alone)
            for piece in pieces(tensors, most):
                bucket = alike.get(key)
                if bucket is not None and bucket.numbers + piece[0].numel() > most:
                    yield alike.pop(key)
                    bucket = None
                if bucket is None:
                    bucket = alike[key] = Bucket(step, fused)
                bucket.add(piece)
        yield from alike.values()

    @staticmethod
    def reads_parameters(group: dict[str, Any]) -> bool:
        """Return whether the steps of a group depend on its parameters but by their gradients.

        Args:
            group: One of ``param_groups``.
        """
        return bool(group["weight_decay"])

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2}, {"problem": "rosenbrock"})


class AdaXW(AdaX):
    r"""AdaX-W: AdaX with decoupled weight decay, at the rate and decay of the paper's code.

    Args:
        params: As of :class:`AdaX`, like all that follow.
        lr: Learning rate α, not negative.
        betas: Decay β₁, and growth rate β₂.
        eps: ε.
        weight_decay: λ of θ ← (1 − α λ) θ.
        eps_mode: Where ε stands.
        maximize: Whether to go uphill.
        foreach: Whether kernels work on lists of tensors.
        fused: Whether torch's fused kernel is used.

    Raises:
        ArgumentError: As :class:`AdaX`.

    Example:
        >>> import torch
        >>> from kexue_adax import AdaXW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaXW([weight], lr=0.5, weight_decay=0.2)
        >>> (weight * torch.tensor([1.0, -3.0])).sum().backward()
        >>> optimizer.step()
        >>> [round(x, 4) for x in weight.tolist()]
        [0.85, 0.95]
    """

    reads_parameters = staticmethod(AdaX.reads_parameters)
    steps_apart: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 5e-2,
        *,
        eps_mode: str = "inside",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay=True,
            eps_mode=eps_mode,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
