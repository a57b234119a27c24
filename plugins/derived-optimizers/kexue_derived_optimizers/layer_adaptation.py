"""Layer adaptation around any optimizer: θ ← θ − γ h ‖θ‖ / ‖h‖ for each parameter tensor.

However large the gradients, a tensor moves by γ times its own norm. Choose it for large batches,
where one rate must do for layers whose gradients differ by orders of magnitude. Over Adam with
weight decay it is LAMB, over SGD with momentum LARS.

Symbols: θ parameter tensor before the step, γ learning rate of this step, schedules and all,
u = −γh what the base and the derivations before it would add, φ clips to an interval, if there is
one, ε is added to ‖h‖.

::

    u ← u · γ φ(‖θ‖) / (‖u‖ + γε)        ‖·‖ = √Σ x² over the whole tensor, sharded or not
    u ← u                                where ‖θ‖ = 0 or ‖u‖ = 0

A tensor at zero, such as a bias at the start, takes the plain step of its base. Norms of float16
and bfloat16 are summed in float32; none is read back from the device. NaN and infinity pass
through.

Deviations: bert4keras takes the plain step also where ‖h‖ is below 1e-7; here only where it is 0.

Su 2019, section “层自适应”, https://kexue.fm/archives/7094; You et al., Large Batch Optimization
for Deep Learning: Training BERT in 76 minutes, ICLR 2020, algorithm 2,
https://arxiv.org/abs/1904.00962.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError, state_dtype
from kexue_derived_optimizers.options import as_patterns, check_patterns, require
from kexue_derived_optimizers.recipe import Recipe
from kexue_lookahead.derivation import Batch, Derivation, Group, distributed, matching
from kexue_lookahead.derived import DerivedOptimizer, become, derive

__all__ = ["LayerAdaptation", "LayerAdaptationDerivation", "with_layer_adaptation"]

T = TypeVar("T", bound=torch.optim.Optimizer)
Clamp = tuple[float, float] | None


def as_clamp(clamp: Any) -> Clamp:
    """Return an interval of norms as a pair.

    Args:
        clamp: None, or two numbers.

    Raises:
        ArgumentError: If it is no interval.
    """
    if clamp is None:
        return None
    holds = isinstance(clamp, Sequence) and not isinstance(clamp, str) and len(clamp) == 2
    holds = holds and 0 <= clamp[0] <= clamp[1] > 0
    expected = "None, or the least and the greatest norm, such as [0, 10]"
    require(holds, "layer_adaptation_clamp", clamp, expected)
    return float(clamp[0]), float(clamp[1])


@dataclass(frozen=True)
class LayerAdaptationDerivation(Derivation):
    """The derivation; see :func:`with_layer_adaptation` for its options."""

    layer_adaptation: bool = True
    layer_adaptation_clamp: Clamp = None
    layer_adaptation_eps: float = 0.0
    exclude_from_layer_adaptation: tuple[str, ...] = ()

    name: ClassVar[str] = "layer-adaptation"
    remembers: ClassVar[bool] = False
    scales: ClassVar[bool] = True
    fuses: ClassVar[frozenset[type]] = frozenset(
        {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD}
    )

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse an interval that is none, a negative ε, and patterns that are none.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: At the first one.
        """
        as_clamp(options["layer_adaptation_clamp"])
        eps = options["layer_adaptation_eps"]
        require(0 <= eps < math.inf, "layer_adaptation_eps", eps, "finite and not negative")
        check_patterns("exclude_from_layer_adaptation", options)

    def check_group(self, optimizer: DerivedOptimizer, group: Group) -> None:
        """Refuse patterns without names to choose from.

        Args:
            optimizer: The optimizer.
            group: The group.

        Raises:
            ArgumentError: If there are some.
        """
        self.selects(optimizer, group)

    def look(self, optimizer: DerivedOptimizer) -> None:
        """Refuse sparse gradients.

        Args:
            optimizer: The optimizer.

        Raises:
            ArgumentError: If there are any.
        """
        for group in optimizer.param_groups:
            params = group["params"]
            if all(p.grad is None or p.grad.layout is torch.strided for p in params):
                continue
            for p, selected in zip(params, self.selects(optimizer, group), strict=True):
                if selected and p.grad is not None and p.grad.layout is not torch.strided:
                    raise ArgumentError(
                        "The gradients of `params` must be dense for layer adaptation. Found "
                        f"layout {p.grad.layout} for a parameter of shape {list(p.shape)}. Build "
                        "its module with sparse=False, or put it into a group with "
                        "layer_adaptation=False.",
                        argument="params",
                    )

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> Sequence[bool]:
        """Return which parameters are adapted.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        option = "exclude_from_layer_adaptation"
        excluded = matching(group, group[option], option=option)
        return [bool(group["layer_adaptation"]) and not out for out in excluded]

    def update(self, batch: Batch) -> None:
        """Scale: u ← u · γ φ(‖θ‖) / (‖u‖ + γε).

        Args:
            batch: Parameters and their updates.
        """
        if not batch.immediate:
            batch.scale(_ratios(batch, _norms(batch.params), _norms(batch.updates)))
            return
        directions, factor = batch.directions
        wide = state_dtype(batch.params[0])
        rate, group = float(batch.group["lr"]), batch.group
        clamp, eps = group["layer_adaptation_clamp"], rate * group["layer_adaptation_eps"]
        ratios = []
        for p, direction in zip(batch.params, directions, strict=True):
            of_param, of_update = _norm(p, wide), abs(factor) * _norm(direction, wide)
            ratio = 1.0
            if of_param != 0 and of_update != 0:
                wanted = of_param if clamp is None else min(max(of_param, clamp[0]), clamp[1])
                ratio = rate * wanted / (of_update + eps)
            ratios.append(ratio)
        batch.scale(ratios)


def _norm(x: Tensor, wide: torch.dtype) -> float:
    """Return ‖x‖ on a CPU, where a dot product has all threads, and a norm has one."""
    if x.dtype is not wide or x.is_complex() or not x.is_contiguous():
        return float(torch.linalg.vector_norm(x, dtype=wide))
    row = x if x.ndim == 1 else x.view(-1)
    return math.sqrt(torch.dot(row, row).item())


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return norms where they are not to be waited for; those of DTensors over all shards."""
    wide = state_dtype(tensors[0])
    if distributed(tensors[0]):
        found = [torch.linalg.vector_norm(x, dtype=wide) for x in tensors]
        return torch.stack([norm.full_tensor() for norm in found])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))  # noqa: SLF001


def _ratios(batch: Batch, of_params: Tensor, of_updates: Tensor) -> Tensor:
    """Return the factors, as ``update`` does by numbers."""
    group, rate = batch.group, batch.group["lr"]
    wanted = of_params
    if group["layer_adaptation_clamp"] is not None:
        wanted = of_params.clamp(*group["layer_adaptation_clamp"])
    ratios = rate * wanted / (of_updates + rate * group["layer_adaptation_eps"])
    return torch.where((of_params == 0) | (of_updates == 0), 1.0, ratios)


@overload
def with_layer_adaptation(
    base: type[T],
    *,
    layer_adaptation_clamp: Clamp = None,
    layer_adaptation_eps: float = 0.0,
    exclude_from_layer_adaptation: Sequence[str] = (),
) -> type[T]: ...
@overload
def with_layer_adaptation(
    base: T,
    *,
    layer_adaptation_clamp: Clamp = None,
    layer_adaptation_eps: float = 0.0,
    exclude_from_layer_adaptation: Sequence[str] = (),
) -> T: ...
@overload
def with_layer_adaptation(
    base: str,
    *,
    layer_adaptation_clamp: Clamp = None,
    layer_adaptation_eps: float = 0.0,
    exclude_from_layer_adaptation: Sequence[str] = (),
) -> type[torch.optim.Optimizer]: ...


def with_layer_adaptation(
    base: Any,
    *,
    layer_adaptation_clamp: Clamp = None,
    layer_adaptation_eps: float = 0.0,
    exclude_from_layer_adaptation: Sequence[str] = (),
) -> Any:
    """Let each parameter tensor move by γ times its own norm: θ ← θ − γ h ‖θ‖ / ‖h‖.

    The options are entries of the parameter groups, too: a group may have its own, and switch the
    derivation off by ``layer_adaptation=False``. Gradients must be dense. What is applied before
    is part of h, what is applied after is not scaled: for LAMB, decay first.

    A class derived from torch's Adam, AdamW or SGD has it take its fused kernel where it can,
    unless ``foreach`` or ``fused`` is given.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        layer_adaptation_clamp: The interval that ‖θ‖ is clipped to, its least and greatest value;
            LAMB's φ. None for no clipping.
        layer_adaptation_eps: ε, added to ‖h‖; not negative.
        exclude_from_layer_adaptation: Parts of the names of parameters that take the plain step,
            for example ``("bias", "norm")``, in upper or lower case; the optimizer is then to be
            built on ``model.named_parameters()``.

    Returns:
        A class that takes the base's arguments and these options, or the optimizer.

    Raises:
        ArgumentError: If an option is out of range, there are patterns and no names, or as
            :func:`~kexue_lookahead.derived.derive`; in ``step``, if a gradient is sparse.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import with_layer_adaptation
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = with_layer_adaptation(torch.optim.SGD)([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.0, 1000.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [3.0, 3.5]
    """
    patterns = as_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
    clamp = as_clamp(layer_adaptation_clamp)
    return derive(base, LayerAdaptationDerivation(True, clamp, layer_adaptation_eps, patterns))


class LayerAdaptation(Recipe):
    r"""Layer adaptation around any optimizer: θ ← θ − γ h ‖θ‖ / ‖h‖ for each parameter tensor.

    The object is an instance of the base as well: its state, its options in the groups, and what it
    takes of gradients are the base's. See :func:`with_layer_adaptation` for the rest.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate γ of the base, the share of its norm that a tensor moves by; None for the
            base's default.
        base: The optimizer: a class; a name of ``torch.optim``, such as ``"adam"`` or ``"sgd"``; or
            a registered component, such as ``"adafactor"``.
        base_options: Its further arguments by name, for example ``{"momentum": 0.9}``.
        layer_adaptation_clamp: The interval that ‖θ‖ is clipped to, its least and greatest value.
            None for no clipping.
        layer_adaptation_eps: ε, added to ‖h‖; not negative.
        exclude_from_layer_adaptation: Parts of the names of parameters that take the plain step.

    Raises:
        ArgumentError: If an option is out of range, there are patterns and no names, or ``base`` is
            no optimizer, or one that needs closures; in ``step``, if a gradient is sparse.

    Example:
        >>> import torch
        >>> from kexue_derived_optimizers import LayerAdaptation
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LayerAdaptation([weight], lr=0.1, base="sgd")
        >>> weight.grad = torch.tensor([0.0, 1000.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [3.0, 3.5]
    """

    made_of = (LayerAdaptationDerivation,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        base: str | type[torch.optim.Optimizer] = "adam",
        base_options: Mapping[str, Any] | None = None,
        layer_adaptation_clamp: tuple[float, float] | None = None,
        layer_adaptation_eps: float = 0.0,
        exclude_from_layer_adaptation: Sequence[str] = (),
    ) -> None:
        patterns = as_patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        clamp = as_clamp(layer_adaptation_clamp)
        derivation = LayerAdaptationDerivation(True, clamp, layer_adaptation_eps, patterns)
        become(self, base, [derivation], params, lr=lr, base_options=base_options)
