"""Decoupled weight decay around any optimizer: θ ← θ − γh − γλθ.

Choose it in place of an L2 term in the loss wherever the optimizer is adaptive: there the gradient
of the term is divided by its own history, and the two differ. For SGD without momentum they do not.

Symbols: θ parameter, before the step on the right; γ learning rate of this step, schedules and all;
h what the base would subtract at rate 1; λ decay rate.

Where nothing else changes the updates of a group, all of which decays, Adam of torch is told to do
it on its way, as AdamW is, and SGD without momentum, whose own term is the same: no pass more.
Other bases that do not read their parameters have θ multiplied by 1 − γλ before their step, in
place, which over Adam is the same to the last bit; SGD then takes its fused kernel where it can,
unless ``foreach`` or ``fused`` is given. In all other cases −γλθ is added to the update, in the
order of derivation.

Deviations: none. As in bert4keras, everything decays unless it is excluded.

Su 2019, section “权重衰减”, https://kexue.fm/archives/7094; Loshchilov and Hutter, Decoupled Weight
Decay Regularization, ICLR 2019, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from kexue_derived_optimizers.options import as_patterns, check_patterns, require
from kexue_derived_optimizers.recipe import Recipe
from kexue_lookahead.derivation import Batch, Derivation, Group, matching
from kexue_lookahead.derived import DerivedOptimizer, become, derive
from kexue_lookahead.fusing import may_fuse

__all__ = ["WeightDecay", "WeightDecayDerivation", "with_weight_decay"]

T = TypeVar("T", bound=torch.optim.Optimizer)

_TAKEN = "_weight_decay_taken"  # groups whose base decays them during a step


@dataclass(frozen=True)
class WeightDecayDerivation(Derivation):
    """The derivation; see :func:`with_weight_decay` for its options."""

    weight_decay_rate: float = 0.01
    exclude_from_weight_decay: tuple[str, ...] = ()

    name: ClassVar[str] = "weight-decay"
    remembers: ClassVar[bool] = False
    direct: ClassVar[bool] = True
    fuses: ClassVar[frozenset[type]] = frozenset({torch.optim.SGD})

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a rate that is negative or not finite, and patterns that are none.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: At the first one.
        """
        rate = options["weight_decay_rate"]
        require(0 <= rate < math.inf, "weight_decay_rate", rate, "finite and not negative")
        check_patterns("exclude_from_weight_decay", options)

    def check_group(self, optimizer: DerivedOptimizer, group: Group) -> None:
        """Refuse patterns without names to choose from.

        Args:
            optimizer: The optimizer.
            group: The group.

        Raises:
            ArgumentError: If there are some.
        """
        self.selects(optimizer, group)

    def begin(self, optimizer: DerivedOptimizer) -> None:
        """Let the base decay the groups that it can.

        Args:
            optimizer: The optimizer.
        """
        for group in optimizer.param_groups:
            if self._is_the_bases(optimizer, group):
                rate = group["weight_decay_rate"]
                its = {"weight_decay": rate, "weight_decay_rate": 0.0}
                sgd = optimizer.derived_from is torch.optim.SGD
                its["fused" if sgd else "decoupled_weight_decay"] = True
                kept = {name: group[name] for name in its}
                vars(optimizer).setdefault(_TAKEN, []).append((group, kept))
                group.update(its)

    def release(self, optimizer: DerivedOptimizer) -> None:
        """Put the options of those groups back.

        Args:
            optimizer: The optimizer.
        """
        for group, kept in vars(optimizer).pop(_TAKEN, []):
            group.update(kept)

    def _is_the_bases(self, optimizer: DerivedOptimizer, group: Group) -> bool:
        """Whether the base can decay a whole group, and nothing but the decay is to be done."""
        base = optimizer.derived_from
        if base is torch.optim.SGD:
            can = not group["momentum"] and may_fuse(group)
        elif base in {torch.optim.Adam, torch.optim.AdamW}:
            can = "decoupled_weight_decay" in group  # older torch has none
        else:
            can = False
        return (
            can
            and not group["weight_decay"]
            and all(self.selects(optimizer, group))
            and not any(
                d is not self and d.changes_updates() and any(d.selects(optimizer, group))
                for d in optimizer.derivations
            )
        )

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> Sequence[bool]:
        """Return which parameters decay.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        option = "exclude_from_weight_decay"
        excluded = matching(group, group[option], option=option)
        return [bool(group["weight_decay_rate"]) and not out for out in excluded]

    def update(self, batch: Batch) -> None:
        """Add the decay: u ← u − γλθ.

        Args:
            batch: Parameters and their updates.
        """
        rate = batch.group["lr"] * batch.group["weight_decay_rate"]
        if isinstance(rate, Tensor):
            decay = torch._foreach_mul(batch.params, rate)  # noqa: SLF001
            torch._foreach_sub_(batch.updates, decay)
        else:
            torch._foreach_add_(batch.updates, batch.params, alpha=-rate)

    def directly(self, batch: Batch) -> None:
        """Decay: θ ← (1 − γλ) θ.

        Args:
            batch: Parameters.
        """
        kept = 1 - batch.group["lr"] * batch.group["weight_decay_rate"]
        torch._foreach_mul_(batch.params, kept)


@overload
def with_weight_decay(
    base: type[T],
    *,
    weight_decay_rate: float = 0.01,
    exclude_from_weight_decay: Sequence[str] = (),
) -> type[T]: ...
@overload
def with_weight_decay(
    base: T,
    *,
    weight_decay_rate: float = 0.01,
    exclude_from_weight_decay: Sequence[str] = (),
) -> T: ...
@overload
def with_weight_decay(
    base: str,
    *,
    weight_decay_rate: float = 0.01,
    exclude_from_weight_decay: Sequence[str] = (),
) -> type[torch.optim.Optimizer]: ...


def with_weight_decay(
    base: Any,
    *,
    weight_decay_rate: float = 0.01,
    exclude_from_weight_decay: Sequence[str] = (),
) -> Any:
    """Let the parameters of an optimizer decay: θ ← θ − γh − γλθ.

    The options are entries of the parameter groups, too: a group may have its own. A rate of 0 is
    the base, bit for bit. The base's own ``weight_decay``, if it has one, is another option, and
    should be 0.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        weight_decay_rate: λ, finite and not negative; multiplied by the learning rate.
        exclude_from_weight_decay: Parts of the names of parameters that do not decay, for example
            ``("bias", "norm")``, in upper or lower case; the optimizer is then to be built on
            ``model.named_parameters()``.

    Returns:
        A class that takes the base's arguments and these options, or the optimizer.

    Raises:
        ArgumentError: If an option is out of range, there are patterns and no names, or as
            :func:`~kexue_lookahead.derived.derive`.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import with_weight_decay
        >>> layer = torch.nn.Linear(2, 1)
        >>> AdamW = with_weight_decay(torch.optim.Adam, exclude_from_weight_decay=("bias",))
        >>> optimizer = AdamW(layer.named_parameters(), lr=0.5, weight_decay_rate=0.5)
        >>> before = layer.weight.detach().clone(), layer.bias.detach().clone()
        >>> layer.weight.grad, layer.bias.grad = torch.zeros(1, 2), torch.zeros(1)
        >>> optimizer.step()
        >>> torch.equal(layer.weight, 0.75 * before[0]), torch.equal(layer.bias, before[1])
        (True, True)
    """
    patterns = as_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
    return derive(base, WeightDecayDerivation(weight_decay_rate, patterns))


class WeightDecay(Recipe):
    r"""Decoupled weight decay around any optimizer: θ ← θ − γh − γλθ.

    The object is an instance of the base as well: its state, its options in the groups, and what it
    takes of gradients are the base's. See :func:`with_weight_decay` for the rest.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ of the base; None for its default.
        base: The optimizer: a class; a name of ``torch.optim``, such as ``"adam"`` or ``"sgd"``; or
            a registered component, such as ``"adafactor"``.
        base_options: Its further arguments by name, for example ``{"momentum": 0.9}``.
        weight_decay_rate: λ, finite and not negative; multiplied by the learning rate.
        exclude_from_weight_decay: Parts of the names of parameters that do not decay.

    Raises:
        ArgumentError: If an option is out of range, there are patterns and no names, or ``base`` is
            no optimizer, or one that needs closures.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import WeightDecay
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = WeightDecay([weight], lr=0.5, base="sgd", weight_decay_rate=0.5)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.25, 0.25]
    """

    made_of = (WeightDecayDerivation,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        base: str | type[torch.optim.Optimizer] = "adam",
        base_options: Mapping[str, Any] | None = None,
        weight_decay_rate: float = 0.01,
        exclude_from_weight_decay: Sequence[str] = (),
    ) -> None:
        patterns = as_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        derivation = WeightDecayDerivation(weight_decay_rate, patterns)
        become(self, base, [derivation], params, lr=lr, base_options=base_options)
