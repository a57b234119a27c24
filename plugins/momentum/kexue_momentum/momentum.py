"""Momentum, and what looks ahead: by half a step, as the post derives, or by a whole one.

Choose `Nesterov` where oscillations have to be damped at a moderate learning rate, `Momentum` where
the learning rate is to be as large as it can, and `HalfNesterov` for what lies between; torch's own
``SGD(fused=True)`` where only speed on a CPU counts. Equations and state are in
:mod:`kexue_momentum.motion`, the relations to time step and friction in
:mod:`kexue_momentum.dynamics`.

Deviations: the post calls the α of momentum and its learning rate one; so do we. Its text takes
Nesterov's method for a second-order one of larger stability: neither is so, see the README.

References: Su 2018, https://kexue.fm/archives/5655; Polyak 1964,
https://doi.org/10.1016/0041-5553(64)90137-5; Sutskever et al. 2013,
https://proceedings.mlr.press/v28/sutskever13.html.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from kexue_momentum.motion import Motion

__all__ = ["HalfNesterov", "Momentum", "Nesterov"]


class Momentum(Motion):
    r"""Gradient descent with momentum: v ← βv − α∇L(θ), θ ← θ + v, eq. (16).

    It is the leapfrog scheme of θ'' + λθ' = −∇L(θ), of second order in the time step γ ≈ √α if it
    begins with half a step. At a constant learning rate it is ``torch.optim.SGD(momentum=β)``. When
    the learning rate changes, v stays by default, while torch's goes with the learning rate at
    once: see ``rescale_velocity``.

    One number of state per parameter, float32 for float16 and bfloat16, with arithmetic likewise;
    none at momentum 0, where it is gradient descent. Complex parameters are handled as pairs of
    real ones, sparse gradients refused. NaN and infinite gradients go into parameters and state, as
    in torch; GradScaler skips such steps. A scheduler may set a learning rate of 0.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them.
        lr: Learning rate α, positive; the square of a time step, about.
        momentum: β, in [0, 1). :func:`~kexue_momentum.from_dynamics` returns both from time step
            and friction: ``Momentum(params, *from_dynamics(0.1, friction=1.0))``.
        half_step_start: Whether the first step is that of a ball at rest, v = −γ²∇L/2 =
            −α∇L/(1 + β), in place of v = −α∇L.
        weight_decay: ω of g + ωθ in place of g, as in torch.
        rescale_velocity: What becomes of v when the learning rate changes by a factor r:
            ``"none"``: it stays; ``"lr"``: r v, as in ``torch.optim.SGD``; ``"dynamics"``: v/γ
            stays, the velocity of the ball, which is √r v at constant β. None stands for
            ``"dynamics"`` with ``keep_friction`` and ``"none"`` without. Not to be changed later.
        keep_friction: What becomes of β when the learning rate is another than this group was
            built with: None: it stays; ``"rule"``: 1 − (1 − β)√r, as the post recommends;
            ``"exact"``: that of the same friction, see :func:`~kexue_momentum.beta_for_lr`. Any
            scheduler of the learning rate can be used.
        maximize: Whether to go uphill.
        foreach: Whether parameters are moved together. None for yes.

    Raises:
        ArgumentError: If an argument is out of range, there are no parameters or one is there
            twice, or, on ``step``, a gradient is sparse.

    Example:
        >>> import torch
        >>> from kexue_momentum import Momentum
        >>> theta = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = Momentum([theta], lr=0.1, momentum=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (theta.square().sum() / 2).backward()
        ...     optimizer.step()
        >>> round(theta.item(), 4), round(optimizer.velocity(theta).item(), 4)
        (0.76, -0.14)
    """

    reads_parameters = staticmethod(Motion.reads_parameters)
    steps_apart: ClassVar[bool] = True  # as kexue-lookahead asks

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        half_step_start: bool = False,
        weight_decay: float = 0.0,
        rescale_velocity: str | None = None,
        keep_friction: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "half_step_start": half_step_start,
            "weight_decay": weight_decay,
            "rescale_velocity": rescale_velocity,
            "keep_friction": keep_friction,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)


class Nesterov(Motion):
    r"""Nesterov's momentum: v ← βv − αg, Θ ← Θ + βv − αg, with g = ∇L(Θ), Θ = θ + βv.

    The parameters that the model holds are Θ, ahead of θ by βv, which vanishes as the ball comes to
    rest; no second forward pass is needed. At a constant learning rate it is
    ``torch.optim.SGD(momentum=β, nesterov=True)``. It damps better than momentum and is stable up
    to smaller learning rates, αk < 2(1 + β)/(1 + 2β) for a curvature of k: see
    :func:`~kexue_momentum.stability_limit`.

    State, types of numbers and what is refused: as :class:`~kexue_momentum.Momentum`.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them.
        lr: Learning rate α, positive.
        momentum: β, in [0, 1).
        weight_decay: ω of g + ωΘ in place of g, as in torch.
        rescale_velocity: What becomes of v when the learning rate changes: ``"none"``: it stays;
            ``"lr"``: it goes with the learning rate, as in torch; ``"dynamics"``: v/γ stays. None
            stands for ``"dynamics"`` with ``keep_friction`` and ``"none"`` without. Not to be
            changed later.
        keep_friction: What becomes of β when the learning rate is another than this group was
            built with: None: it stays; ``"rule"``: 1 − (1 − β)√r, as the post recommends;
            ``"exact"``: that of the same friction in momentum's scheme.
        maximize: Whether to go uphill.
        foreach: Whether parameters are moved together. None for yes.

    Raises:
        ArgumentError: As :class:`~kexue_momentum.Momentum`.

    Example:
        >>> import torch
        >>> from kexue_momentum import Nesterov
        >>> theta = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = Nesterov([theta], lr=0.1, momentum=0.5)
        >>> (theta.square().sum() / 2).backward()
        >>> optimizer.step()
        >>> round(theta.item(), 4)
        0.85
    """

    look_ahead: ClassVar[float] = 1.0
    reads_parameters = staticmethod(Motion.reads_parameters)
    steps_apart: ClassVar[bool] = True  # as kexue-lookahead asks

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        rescale_velocity: str | None = None,
        keep_friction: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rescale_velocity": rescale_velocity,
            "keep_friction": keep_friction,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)


class HalfNesterov(Nesterov):
    r"""The post's Nesterov, eq. (20): v ← βv − α∇L(Θ), Θ = θ + (β/2)v, θ ← θ + v.

    The gradient is taken at about the middle of the step, which the implicit midpoint scheme (19)
    asks for. What the model holds is Θ: Θ ← Θ + v' + (β/2)(v' − v) = Θ + ((1 + β)/2) v' − (α/2) g,
    so that no second forward pass is needed. It is stable for αk < 2, as gradient descent is,
    whatever β. All arguments are those of :class:`~kexue_momentum.Nesterov`.

    Example:
        >>> import torch
        >>> from kexue_momentum import HalfNesterov
        >>> theta = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = HalfNesterov([theta], lr=0.1, momentum=0.5)
        >>> (theta.square().sum() / 2).backward()
        >>> optimizer.step()
        >>> round(theta.item(), 4)
        0.875
    """

    look_ahead: ClassVar[float] = 0.5
    reads_parameters = staticmethod(Motion.reads_parameters)
    steps_apart: ClassVar[bool] = True  # as kexue-lookahead asks
