"""Gradient descent as the motion of a ball with friction: momentum, Nesterov's, and with heat.

``optimizer/momentum``, ``optimizer/nesterov``, ``optimizer/half-nesterov``, ``optimizer/langevin``,
and the relations between learning rate, momentum, time step and friction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from kexue.core import Component, Experiment, hookimpl

if TYPE_CHECKING:
    from kexue_momentum.dynamics import Dynamics as Dynamics
    from kexue_momentum.dynamics import Rates as Rates
    from kexue_momentum.dynamics import beta_for_lr as beta_for_lr
    from kexue_momentum.dynamics import from_dynamics as from_dynamics
    from kexue_momentum.dynamics import optimal_rates as optimal_rates
    from kexue_momentum.dynamics import spectral_radius as spectral_radius
    from kexue_momentum.dynamics import stability_limit as stability_limit
    from kexue_momentum.dynamics import to_dynamics as to_dynamics
    from kexue_momentum.langevin import Langevin as Langevin
    from kexue_momentum.momentum import HalfNesterov as HalfNesterov
    from kexue_momentum.momentum import Momentum as Momentum
    from kexue_momentum.momentum import Nesterov as Nesterov

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dynamics": [
            "Dynamics",
            "Rates",
            "beta_for_lr",
            "from_dynamics",
            "optimal_rates",
            "spectral_radius",
            "stability_limit",
            "to_dynamics",
        ],
        "langevin": ["Langevin"],
        "momentum": ["HalfNesterov", "Momentum", "Nesterov"],
    },
)

_POST = "Su, 从动力学角度看优化算法（一）：从SGD到动量加速, 2018, https://kexue.fm/archives/5655"
_POLYAK = (
    "Polyak, Some methods of speeding up the convergence of iteration methods, 1964, "
    "https://doi.org/10.1016/0041-5553(64)90137-5"
)
_SUTSKEVER = (
    "Sutskever et al., On the importance of initialization and momentum in deep learning, "
    "ICML 2013, https://proceedings.mlr.press/v28/sutskever13.html"
)
_WELLING = (
    "Welling and Teh, Bayesian Learning via Stochastic Gradient Langevin Dynamics, ICML 2011, "
    "https://icml.cc/2011/papers/398_icmlpaper.pdf"
)
_SMITH = (
    "Smith et al., Don't Decay the Learning Rate, Increase the Batch Size, 2017, "
    "https://arxiv.org/abs/1711.00489"
)


@hookimpl
def kexue_components() -> list[Component]:
    """Return the plugin's components."""
    target = "kexue_momentum.momentum"
    return [
        Component(
            "optimizer",
            "momentum",
            f"{target}:Momentum",
            "Gradient descent with momentum: the leapfrog scheme of a ball with friction.",
            references=(_POST, _POLYAK),
            tags=("momentum", "sgd"),
        ),
        Component(
            "optimizer",
            "nesterov",
            f"{target}:Nesterov",
            "Momentum whose gradient is taken where the velocity leads: at θ + βv.",
            references=(_POST, _SUTSKEVER),
            tags=("momentum", "sgd"),
        ),
        Component(
            "optimizer",
            "half-nesterov",
            f"{target}:HalfNesterov",
            "Momentum whose gradient is taken half-way: at θ + (β/2)v, as the post derives it.",
            references=(_POST,),
            tags=("momentum", "sgd"),
        ),
        Component(
            "optimizer",
            "langevin",
            "kexue_momentum.langevin:Langevin",
            "Gradient descent with noise of a temperature, with or without inertia: a sampler.",
            references=(_POST, _WELLING),
            tags=("sgd", "sampling", "noise"),
        ),
    ]


@hookimpl
def kexue_experiments() -> list[Experiment]:
    """Return what measures the claims."""
    where = "kexue_momentum.experiments"
    return [
        Experiment(
            "discretisation",
            f"{where}.discretisation:discretisation",
            "The schemes beside torch.optim.SGD and the equation of motion: order and stability.",
            references=(_POST,),
        ),
        Experiment(
            "motion",
            f"{where}.motion:motion",
            "The ball in a bowl, a ravine and a double well: friction, speed, and what it crosses.",
            references=(_POST, _POLYAK),
        ),
        Experiment(
            "noise",
            f"{where}.noise:noise",
            "Where noise leaves the ball: temperature, friction, batch size, on digits too.",
            references=(_POST, _SMITH),
        ),
    ]
