"""Gradient descent in a heat bath: momentum with the noise that its friction calls for.

Choose it to draw parameters from exp(−L/T), or to leave poor minima early in training; for a
minimum alone, lower the temperature in the end.

With velocity v, learning rate α, momentum β and temperature T,

::

    v ← βv − α∇L(θ) + √(2αT(1 − β)) ξ        θ ← θ + v        ξ standard normal

At β = 0 this is θ ← θ − α∇L + √(2αT) ξ, the Euler scheme of Langevin's equation (8), known as
SGLD. With β from (15) it is the leapfrog scheme of Kramers' equation (21) with σ² = 2λT. The law in
the long run is exp(−L/T) as α → 0; of L = kθ²/2 the variance is exactly
(T/k) / (1 − αk/(2(1 + β))).

Deviation: the post's (9) gives exp(−L/σ²) for noise σξ; with ξ of unit strength it is
exp(−2L/σ²), that is T = σ²/2. And at λ = 0 the post's (22) is no law in the long run: without
friction noise heats the ball for ever. Temperature, in place of σ, says what one gets.

References: Su 2018, https://kexue.fm/archives/5655, eq. (8), (9), (21), (22); Welling and Teh 2011,
https://icml.cc/2011/papers/398_icmlpaper.pdf.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from kexue_momentum.motion import Motion, Plan

__all__ = ["Langevin"]


class Langevin(Motion):
    r"""Gradient descent with noise: θ ← θ − α∇L + √(2αT) ξ, or with momentum beside it.

    In the long run parameters are drawn from exp(−L/T). To sample a posterior, let L be its
    negative log-density, and T = 1. The noise of minibatches comes on top.

    Noise is drawn for whole parameters, in their order, from one generator, so that it does not
    depend on ``foreach`` and on how parameters are sharded; for DTensors every process draws all of
    it. Replicas (DDP) and processes stay together only if their generators have the same state:
    call ``torch.manual_seed`` first, or give ``generator``. ``state_dict`` holds the state of the
    generator.

    No state at momentum 0. Complex parameters have noise in both parts. Otherwise as
    :class:`~kexue_momentum.Momentum`.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them.
        lr: Learning rate α, positive.
        temperature: T, in units of the loss; 0 for no noise.
        momentum: β, in [0, 1); above 0 for Kramers' equation.
        weight_decay: ω of g + ωθ in place of g: a normal prior of variance T/ω.
        rescale_velocity: As of :class:`~kexue_momentum.Momentum`.
        keep_friction: As of :class:`~kexue_momentum.Momentum`.
        maximize: Whether to go uphill: to draw from exp(L/T).
        generator: Source of randomness, on any device; by default one on that of the first
            parameter, whose seed is drawn from torch's global one.
        foreach: Whether parameters are moved together. None for yes.

    Raises:
        ArgumentError: As :class:`~kexue_momentum.Momentum`.

    Example:
        >>> import torch
        >>> from kexue_momentum import Langevin
        >>> theta = torch.nn.Parameter(torch.zeros(10_000))
        >>> generator = torch.Generator().manual_seed(0)
        >>> optimizer = Langevin([theta], lr=0.1, temperature=0.5, generator=generator)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     (theta.square().sum() / 2).backward()
        ...     optimizer.step()
        >>> f"{theta.var().item():.1f}"
        '0.5'
    """

    stochastic: ClassVar[bool] = True
    reads_parameters = staticmethod(Motion.reads_parameters)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        temperature: float = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rescale_velocity: str | None = None,
        keep_friction: str | None = None,
        maximize: bool = False,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "temperature": temperature,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rescale_velocity": rescale_velocity,
            "keep_friction": keep_friction,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        if generator is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            device = parameters[0].device if parameters else torch.device("cpu")
            seed = int(torch.randint(2**62, (), device="cpu"))
            generator = torch.Generator(device).manual_seed(seed)
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the generator under ``"generator"``."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Args:
            state_dict: The state. Without ``"generator"``, as after sharded checkpoints, the
                generator is left as it is, and so it is where the states of the two kinds of
                generators do not fit.
        """
        super().load_state_dict(state_dict)
        saved = state_dict.get("generator")
        if saved is not None and saved.shape == self.generator.get_state().shape:
            self.generator.set_state(saved.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    def _conditions(self, settings: dict[str, Any]) -> dict[str, tuple[bool, str]]:
        holds = 0 <= settings["temperature"] < math.inf
        return {
            **super()._conditions(settings),
            "temperature": (holds, "finite and not negative"),
        }

    def _gradients(self, group: dict[str, Any], plan: Plan, parameters: list[Tensor]) -> list[Any]:
        """Add the noise to the gradients: √(2T(1 − β)/α) ξ each."""
        found = super()._gradients(group, plan, parameters)
        if not group["temperature"] or not plan.alpha:
            return found
        scale = math.sqrt(2 * group["temperature"] * (1 - plan.beta) / plan.alpha)
        noise = [self._noise(p, g.dtype) for p, g in zip(parameters, found, strict=True)]
        return list(torch._foreach_add(found, noise, alpha=scale))  # noqa: SLF001

    def _noise(self, parameter: Any, dtype: torch.dtype) -> Tensor:
        """Return this process's part of the noise of a parameter."""
        noise = torch.empty(parameter.shape, dtype=dtype, device=self.generator.device)
        (torch.view_as_real(noise) if noise.is_complex() else noise).normal_(
            generator=self.generator
        )
        noise = noise.to(parameter.device)
        if not hasattr(parameter, "to_local"):
            return noise
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        own: Tensor = distribute_tensor(noise, mesh, placements, src_data_rank=None).to_local()
        return own
