"""Lookahead: k steps of any optimizer, then a share α of the way that they went.

Choose it to steady a noisy base at a high learning rate, such as SGD with momentum in small
batches. Around a well-tuned Adam it often changes nothing, and slows down short trainings.

Symbols: θ parameter (fast weights), φ slow weights, k ``slow_steps``, α ``slow_step_size``.

::

    φ ← θ                      before the first step
    θ ← base(θ)                k times
    φ ← φ + α (θ − φ),  θ ← φ

Memory: one number per parameter. Time: 16 bytes per number every k steps in float32 on a CPU, 20
elsewhere, beside the 28 of each step of Adam.

Deviations: the reference in Keras starts φ at 0 and mixes before the first step, so that it scales
the initial weights by 1 − α; here, as in post and paper, φ starts at θ. The paper speaks of the
inner optimizer's state in general; ``pullback`` is about its momentum, and second moments and step
counts always go on.

Su, Keras实现两个优化器：Lookahead和LazyOptimizer, 2019, https://kexue.fm/archives/6869; Zhang,
Lucas, Hinton and Ba, Lookahead Optimizer: k steps forward, 1 step back, NeurIPS 2019, algorithm 1,
https://arxiv.org/abs/1907.08610.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError, Example, Optimizer, check_settings, state_dtype
from kexue_lookahead.derivation import Derivation, Group, batches, local
from kexue_lookahead.derived import DerivedOptimizer, become, derive
from kexue_lookahead.mixing import mix

__all__ = ["Lookahead", "LookaheadDerivation", "SlowWeights", "with_lookahead"]

T = TypeVar("T", bound=torch.optim.Optimizer)
Pullback = Literal["none", "reset", "average"]

_PREFIX = "lookahead."
_SLOW = f"{_PREFIX}slow"
_POSITION = "lookahead_position"
_MOMENTA = ("momentum_buffer", "exp_avg", "momentum")
"""What optimizers call their first moment."""


class SlowWeights:
    """What Lookahead adds to an optimizer: its slow weights can be looked at."""

    @contextmanager
    def slow_weights(self: Any) -> Iterator[None]:
        """Put the slow weights φ in the place of the parameters, for evaluation or saving.

        At the end of a cycle both are the same, and before the first step nothing is done. The
        parameters come back on leaving.

        Raises:
            ArgumentError: If it is entered again, or ``step`` is called, before it was left.

        Example:
            >>> import torch
            >>> from kexue_lookahead import with_lookahead
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = with_lookahead(torch.optim.SGD)([weight], lr=0.25, slow_steps=2)
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> with optimizer.slow_weights():
            ...     weight.tolist()
            [1.0, 1.0]
            >>> weight.tolist()
            [0.75, 0.75]
        """
        _check_outside(self)
        with_slow = [p for g in self.param_groups for p in _begun(self, g)]
        self._lookahead_fast = [p.detach().clone() for p in with_slow]
        try:
            with torch.no_grad():
                for p in with_slow:
                    p.copy_(self.state[p][_SLOW])
            yield
        finally:
            with torch.no_grad():
                for p, fast in zip(with_slow, self._lookahead_fast, strict=True):
                    p.copy_(fast)
            del self._lookahead_fast


def _check_outside(optimizer: Any) -> None:
    if "_lookahead_fast" in vars(optimizer):
        raise ArgumentError(
            "`slow_weights` must be left before the next step, and before it is entered again. "
            "Found it entered. Put training outside of the `with` block.",
            argument="slow_weights",
        )


@dataclass(frozen=True)
class LookaheadDerivation(Derivation):
    """The derivation; see :func:`with_lookahead` for its options."""

    slow_steps: int = 5
    slow_step_size: float = 0.5
    pullback: Pullback = "none"

    name: ClassVar[str] = "lookahead"
    counters: ClassVar[tuple[str, ...]] = (_POSITION,)
    fuses: ClassVar[frozenset[type]] = frozenset({torch.optim.SGD})
    mixin: ClassVar[type | None] = SlowWeights

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse k < 1, α outside of (0, 1], and unknown ways to treat the momentum.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: At the first one.
        """
        k, size, pullback = (options[x] for x in ("slow_steps", "slow_step_size", "pullback"))
        conditions = {
            "slow_steps": (type(k) is int and k >= 1, "an int of at least 1"),
            "slow_step_size": (0 < size <= 1, "in (0, 1]"),
            "pullback": (pullback in {"none", "reset", "average"}, "'none', 'reset' or 'average'"),
        }
        check_settings("lookahead", options, conditions)

    def look(self, optimizer: DerivedOptimizer) -> None:
        """Refuse to step on the slow weights.

        Args:
            optimizer: The optimizer.

        Raises:
            ArgumentError: Within ``slow_weights``.
        """
        _check_outside(optimizer)

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> Sequence[bool]:
        """Return which parameters will not be where the base alone would have them.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        return [group["slow_step_size"] < 1] * len(group["params"])

    def begin(self, optimizer: DerivedOptimizer) -> None:
        """Keep θ as φ where there is none yet, and a gradient for the first time.

        Args:
            optimizer: The optimizer.
        """
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and _SLOW not in (state := optimizer.state[p]):
                    state[_SLOW] = p.detach().to(state_dtype(p), copy=True)

    def end(self, optimizer: DerivedOptimizer) -> None:
        """Count, and every k steps of a group mix its weights.

        Args:
            optimizer: The optimizer.
        """
        for group in optimizer.param_groups:
            if group["pullback"] == "average":
                _begin_momenta(optimizer, group)
            group[_POSITION] += 1
            if group[_POSITION] >= group["slow_steps"]:
                group[_POSITION] = 0
                _mix(optimizer, group)


def _begun(optimizer: Any, group: Group) -> list[Tensor]:
    """Return the parameters of a group that have slow weights; the others get no empty state."""
    return [p for p in group["params"] if _SLOW in optimizer.state.get(p, ())]


def _momenta(state: dict[str, Any]) -> list[str]:
    """Return under which keys the base keeps a first moment."""
    return [key for key in _MOMENTA if isinstance(state.get(key), Tensor)]


def _begin_momenta(optimizer: DerivedOptimizer, group: Group) -> None:
    """Start slow momenta at 0; at once, because checkpoints of shards ask for all of the state."""
    for p in _begun(optimizer, group):
        state = optimizer.state[p]
        for key in _momenta(state):
            if f"{_PREFIX}{key}" not in state:
                state[f"{_PREFIX}{key}"] = torch.zeros_like(state[key])


def _mix(optimizer: DerivedOptimizer, group: Group) -> None:
    """End the cycle of a group."""
    share = group["slow_step_size"]  # α
    for batch in batches(optimizer, group, _begun(optimizer, group)):
        states = [optimizer.state[p] for p in batch.params]
        mix(batch.params, [s[_SLOW] for s in states], share)
        pairs = [(s, key) for s in states for key in _momenta(s)]
        if not pairs or group["pullback"] == "none":
            continue
        momenta = [local(s[key]) for s, key in pairs]
        if group["pullback"] == "reset":
            torch._foreach_zero_(momenta)
        else:
            mix(momenta, [s[f"{_PREFIX}{key}"] for s, key in pairs], share)


@overload
def with_lookahead(
    base: type[T],
    *,
    slow_steps: int = 5,
    slow_step_size: float = 0.5,
    pullback: Pullback = "none",
) -> type[T]: ...
@overload
def with_lookahead(
    base: T,
    *,
    slow_steps: int = 5,
    slow_step_size: float = 0.5,
    pullback: Pullback = "none",
) -> T: ...
@overload
def with_lookahead(
    base: str,
    *,
    slow_steps: int = 5,
    slow_step_size: float = 0.5,
    pullback: Pullback = "none",
) -> Any: ...


def with_lookahead(
    base: Any,
    *,
    slow_steps: int = 5,
    slow_step_size: float = 0.5,
    pullback: Pullback = "none",
) -> Any:
    """Give an optimizer slow weights: after every k steps, only a share α of them counts.

    The options are entries of the parameter groups, too: a group may have its own, and its own
    cycle, which starts when the group joins. The slow weights are in
    ``optimizer.state[p]["lookahead.slow"]``, in float32 for float16 and bfloat16 parameters; they
    start at the parameters of the first step that has a gradient for them, and parameters that have
    none in later steps are mixed like the others. Whoever changes the parameters between two steps
    by hand (not through ``load_state_dict`` of model and optimizer) finds them mixed with the old
    slow ones.

    Below it SGD takes torch's fused kernel where it can, unless ``foreach`` or ``fused`` is given
    or α is 1.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        slow_steps: k, the steps of the base between two of the slow weights; at least 1.
        slow_step_size: α in (0, 1]. At 1 the trajectory is the base's.
        pullback: What happens then to the base's momentum (first moment): ``"none"``, it goes on;
            ``"reset"`` to 0; ``"average"``, it is mixed like the weights, with a slow one that
            starts at 0. Where the base has no momentum, nothing happens.

    Returns:
        A class that takes the base's arguments and these options, or the optimizer.

    Raises:
        ArgumentError: If an option is out of range, or as
            :func:`~kexue_lookahead.derived.derive`.

    Example:
        >>> import torch
        >>> from kexue_lookahead import with_lookahead
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> LookaheadSGD = with_lookahead(torch.optim.SGD, slow_steps=2)
        >>> optimizer = LookaheadSGD([weight], lr=0.25)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.sum().backward()
        ...     optimizer.step()
        >>> weight.tolist()
        [0.75, 0.75]
        >>> isinstance(optimizer, torch.optim.SGD)
        True
    """
    derivation = LookaheadDerivation(slow_steps, slow_step_size, pullback)
    return derive(base, derivation)


class Lookahead(SlowWeights, Optimizer):
    r"""Lookahead around any optimizer: φ ← φ + α (θ − φ) and θ ← φ after every k of its steps.

    The object is an instance of the base as well: its state, its options in the groups, and what it
    takes of gradients are the base's. See :func:`with_lookahead` for the rest.

    Args:
        params: Parameters of shape ``[*any]``, or groups of them, with names or without.
        lr: Learning rate of the base; None for its default.
        base: The optimizer that takes the k steps: a class; a name of ``torch.optim``, such as
            ``"adam"`` or ``"sgd"``; or a registered component, such as ``"adafactor"``.
        base_options: Its further arguments by name, for example ``{"momentum": 0.9}``.
        slow_steps: k, the steps between two of the slow weights; at least 1.
        slow_step_size: α in (0, 1]. At 1 the trajectory is the base's.
        pullback: What happens to the base's momentum when the weights are mixed: ``"none"``,
            ``"reset"`` to 0, or ``"average"`` with a slow one.

    Raises:
        ArgumentError: If an option is out of range, or ``base`` is no optimizer, or one that needs
            closures.

    Example:
        >>> import torch
        >>> from kexue_lookahead import Lookahead
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Lookahead([weight], lr=0.25, base="sgd", slow_steps=2)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.sum().backward()
        ...     optimizer.step()
        >>> weight.tolist()
        [0.75, 0.75]
    """

    becomes: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        base: str | type[torch.optim.Optimizer] = "adam",
        base_options: Mapping[str, Any] | None = None,
        slow_steps: int = 5,
        slow_step_size: float = 0.5,
        pullback: Literal["none", "reset", "average"] = "none",
    ) -> None:
        derivation = LookaheadDerivation(slow_steps, slow_step_size, pullback)
        become(self, base, [derivation], params, lr=lr, base_options=base_options)

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        """Whatever has slow weights is one, however it was made."""
        if cls is not Lookahead:
            return NotImplemented
        kinds: Iterable[Derivation] = getattr(other, "derivations", ())
        return True if any(isinstance(d, LookaheadDerivation) for d in kinds) else NotImplemented

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2}, {"problem": "rosenbrock"})
