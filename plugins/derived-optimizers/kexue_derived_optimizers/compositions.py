"""LAMB, LARS and AdamW with a schedule: compositions of the derivations that have names.

::

    LAMB      Adam, then weight decay, then layer adaptation     u = −γ (m̂/(√v̂ + ε) + λθ)
    LARS      SGD with momentum, then layer adaptation           u = −γ m, m ← βm + g + λθ
    AdamW-LR  Adam, then weight decay, then a piecewise-linear rate

and θ ← θ + u γ φ(‖θ‖) / ‖u‖ in the first two. LAMB's decay is within the norm, since the norm is
what controls how far a tensor moves; to decay after it, derive in the other order.

Deviations: no φ by default, as in the post; the paper leaves it open, and its code has φ(x) = x.
Biases and normalisations are excluded only on request. LARS is algorithm 1 of the LAMB paper, the
trust ratio after the momentum; You et al. 2017 (https://arxiv.org/abs/1708.03888) have it before,
times a coefficient of 0.001.

Su 2019, https://kexue.fm/archives/7094; You et al. 2020, https://arxiv.org/abs/1904.00962.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.core import Example
from kexue_derived_optimizers.layer_adaptation import LayerAdaptationDerivation, as_clamp
from kexue_derived_optimizers.options import as_patterns
from kexue_derived_optimizers.piecewise_linear import PiecewiseLinearLRDerivation, as_knots
from kexue_derived_optimizers.recipe import Recipe
from kexue_derived_optimizers.weight_decay import WeightDecayDerivation
from kexue_lookahead.derived import become
from kexue_lookahead.fusing import as_fused

__all__ = ["LAMB", "LARS", "AdamWLR"]


class LAMB(Recipe):
    r"""LAMB: Adam with weight decay, each tensor moved by γ times its own norm.

    u = m̂ / (√v̂ + ε) + λθ, θ ← θ − γ φ(‖θ‖) u / ‖u‖, with Adam's bias corrections. An instance of
    ``torch.optim.Adam``, made by the two derivations.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ, the share of its norm that a tensor moves by.
        betas: Decays of the moments, in [0, 1).
        eps: ε of Adam.
        weight_decay_rate: λ, finite and not negative.
        exclude_from_weight_decay: Parts of the names of parameters that do not decay, such as
            ``["bias", "norm"]``.
        layer_adaptation_clamp: φ, the interval that ‖θ‖ is clipped to; None for no clipping.
        exclude_from_layer_adaptation: Parts of the names of parameters that take Adam's step.
        maximize: Whether to go uphill.
        foreach: Whether Adam works on all parameters at once; None lets it choose.
        fused: Whether Adam is one kernel. None for yes, unless ``foreach`` is given, where all
            parameters are float32 or float64, whole, and on a CPU or CUDA.

    Raises:
        ArgumentError: If an option is out of range, or there are patterns and no names; in
            ``step``, if a gradient is sparse.
        ValueError: If Adam refuses one of its own.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import LAMB
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay_rate=0.0)
        >>> weight.grad = torch.tensor([0.0, 1000.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [3.0, 3.5]
    """

    made_of = (WeightDecayDerivation, LayerAdaptationDerivation)
    made_from = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        weight_decay_rate: float = 0.01,
        exclude_from_weight_decay: Sequence[str] = (),
        layer_adaptation_clamp: tuple[float, float] | None = None,
        exclude_from_layer_adaptation: Sequence[str] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        own = {"betas": betas, "eps": eps, "maximize": maximize, "foreach": foreach, "fused": fused}
        undecayed = as_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        plain = as_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        derivations = [
            WeightDecayDerivation(weight_decay_rate, undecayed),
            LayerAdaptationDerivation(True, as_clamp(layer_adaptation_clamp), 0.0, plain),
        ]
        become(self, torch.optim.Adam, derivations, params, lr=lr, base_options=own)


class LARS(Recipe):
    r"""LARS: SGD with momentum, each tensor moved by γ times its own norm.

    m ← βm + g + λθ, θ ← θ − γ φ(‖θ‖) m / ‖m‖. An instance of ``torch.optim.SGD``, made by the
    derivation.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ, the share of its norm that a tensor moves by.
        momentum: β, in [0, 1).
        weight_decay: λ of torch's SGD, an L2 term: it is part of the momentum, as in the paper.
        nesterov: Whether the step is that of Nesterov's momentum.
        layer_adaptation_clamp: φ, the interval that ‖θ‖ is clipped to; None for no clipping.
        exclude_from_layer_adaptation: Parts of the names of parameters that take SGD's step, such
            as ``["bias", "norm"]``.
        maximize: Whether to go uphill.
        foreach: Whether SGD works on all parameters at once; None lets it choose.
        fused: Whether SGD is one kernel. None for yes, unless ``foreach`` is given, where all
            parameters are float32 or float64, whole, and on a CPU or CUDA.

    Raises:
        ArgumentError: If an option is out of range, or there are patterns and no names; in
            ``step``, if a gradient is sparse.
        ValueError: If SGD refuses one of its own.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.0, 1000.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [3.0, 3.5]
    """

    made_of = (LayerAdaptationDerivation,)
    made_from = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        layer_adaptation_clamp: tuple[float, float] | None = None,
        exclude_from_layer_adaptation: Sequence[str] = (),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        params, fused = as_fused(params, foreach=foreach, fused=fused)
        own = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        plain = as_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        derivation = LayerAdaptationDerivation(True, as_clamp(layer_adaptation_clamp), 0.0, plain)
        become(self, torch.optim.SGD, [derivation], params, lr=lr, base_options=own)


class AdamWLR(Recipe):
    r"""Adam with decoupled weight decay and a piecewise-linear learning rate.

    θ ← θ − γ ρ_t (m̂ / (√v̂ + ε) + λθ). An instance of ``torch.optim.Adam``, made by the two
    derivations; with ``lr_schedule={0: 1}`` it is AdamW of torch, bit for bit.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ.
        betas: Decays of the moments, in [0, 1).
        eps: ε of Adam.
        weight_decay_rate: λ, finite and not negative.
        exclude_from_weight_decay: Parts of the names of parameters that do not decay, such as
            ``["bias", "norm"]``.
        lr_schedule: ρ by its knots, ``{step: ratio}``; straight between them and from (0, 0) to the
            first, constant after the last. By default ``{1000: 1}``, a warm-up of a thousand steps.
        lr_schedule_offset: t of the first update, 0 or more.
        maximize: Whether to go uphill.
        foreach: Whether Adam works on all parameters at once; None lets it choose.
        fused: Whether Adam is one kernel; None lets it choose.

    Raises:
        ArgumentError: If an option is out of range, or there are patterns and no names.
        ValueError: If Adam refuses one of its own.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import AdamWLR
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamWLR([weight], lr=0.5, lr_schedule={2: 1.0}, weight_decay_rate=0.0)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     weight.sum().backward()
        ...     optimizer.step()
        >>> [round(x, 4) for x in weight.tolist()]
        [0.25, 0.25]
    """

    made_of = (WeightDecayDerivation, PiecewiseLinearLRDerivation)
    made_from = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay_rate: float = 0.01,
        exclude_from_weight_decay: Sequence[str] = (),
        lr_schedule: Mapping[int, float] | Sequence[tuple[int, float]] = ((1000, 1.0),),
        lr_schedule_offset: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        own = {"betas": betas, "eps": eps, "maximize": maximize, "foreach": foreach, "fused": fused}
        undecayed = as_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        derivations = [
            WeightDecayDerivation(weight_decay_rate, undecayed),
            PiecewiseLinearLRDerivation(as_knots(lr_schedule), lr_schedule_offset),
        ]
        become(self, torch.optim.Adam, derivations, params, lr=lr, base_options=own)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2, "lr_schedule": {10: 1.0}}, {"problem": "rosenbrock"})
