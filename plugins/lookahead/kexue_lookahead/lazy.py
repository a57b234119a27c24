"""Lazy updates: rows of a parameter whose gradient is 0 stay where they are.

A row of an embedding that is not in the batch has gradient 0, and momentum moves it all the same.
Here it is moved only when it was sampled. In the post's form (``"decay"``) its moments go on
decaying meanwhile; in the standard form (``"freeze"``, TensorFlow's LazyAdam and torch's
SparseAdam) they stand still, too, so that old gradients weigh more. Neither is faster in learning
than the base as a rule: see the claims in the README.

:func:`with_lazy` changes the updates of any optimizer, in passes over all rows. ``Lazy`` in
:mod:`kexue_lookahead.embedding` is Adam or SGD in time of the touched rows only.

Pitfalls: an L2 penalty in the loss gives every row a gradient; use decoupled weight decay. An
embedding that is also the output layer has a dense gradient. A sampled row whose gradient is
exactly 0 counts as not sampled, unless ``touch`` names it.

Su, Keras实现两个优化器：Lookahead和LazyOptimizer, 2019, https://kexue.fm/archives/6869.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_lookahead.derivation import Batch, Derivation, Group, local, matching
from kexue_lookahead.derived import DerivedOptimizer, derive
from kexue_lookahead.rows import TouchedRows, any_entry, check_rows, forget_rows, given_rows

__all__ = ["LazyDerivation", "with_lazy"]

T = TypeVar("T", bound=torch.optim.Optimizer)
State = Literal["decay", "freeze"]

_FROZEN = "_lazy_frozen"


@dataclass(frozen=True)
class LazyDerivation(Derivation):
    """The derivation; see :func:`with_lazy` for its options."""

    lazy: bool = True
    lazy_include: tuple[str, ...] = ()
    lazy_state: State = "decay"

    name: ClassVar[str] = "lazy"
    remembers: ClassVar[bool] = False
    mixin: ClassVar[type | None] = TouchedRows

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse an unknown way to treat the state.

        Args:
            options: Those of a group.

        Raises:
            ArgumentError: If it is neither.
        """
        if options["lazy_state"] not in {"decay", "freeze"}:
            raise ArgumentError(
                f"`lazy_state` of lazy must be 'decay' or 'freeze'. Found "
                f"{options['lazy_state']!r}.",
                argument="lazy_state",
            )
        if isinstance(options["lazy_include"], str):
            raise ArgumentError(
                "`lazy_include` of lazy must be a tuple of parts of names. Found "
                f"{options['lazy_include']!r}. Write ({options['lazy_include']!r},).",
                argument="lazy_include",
            )

    def check_group(self, optimizer: DerivedOptimizer, group: Group) -> None:
        """Refuse a choice by names where there are none.

        Args:
            optimizer: The optimizer.
            group: The group.

        Raises:
            ArgumentError: If the group has no names.
        """
        self.selects(optimizer, group)

    def selects(self, optimizer: DerivedOptimizer, group: Group) -> Sequence[bool]:
        """Return which parameters are updated lazily.

        Args:
            optimizer: The optimizer.
            group: One of its groups.
        """
        del optimizer
        if not group["lazy"]:
            return [False] * len(group["params"])
        if group["lazy_include"]:
            return matching(group, group["lazy_include"], option="lazy_include")
        return [p.ndim > 1 for p in group["params"]]

    def look(self, optimizer: DerivedOptimizer) -> None:
        """Refuse gradients whose rows cannot be told.

        Args:
            optimizer: The optimizer.

        Raises:
            ArgumentError: If one is sparse, or sharded otherwise than by rows.
        """
        for _, p in self._selected(optimizer):
            check_rows(optimizer, p, sparse=False)

    def begin(self, optimizer: DerivedOptimizer) -> None:
        """Keep the state that the base is about to change, where it is to be frozen.

        Args:
            optimizer: The optimizer.
        """
        frozen: dict[Tensor, dict[str, Tensor]] = {}
        for group, p in self._selected(optimizer):
            if group["lazy_state"] == "freeze":
                frozen[p] = {
                    key: value.clone()
                    for key, value in optimizer.state[p].items()
                    if _has_rows(value, p)
                }
        vars(optimizer)[_FROZEN] = frozen

    def update(self, batch: Batch) -> None:
        """Set the updates of rows that were not sampled to 0, and put their state back.

        Args:
            batch: Parameters and their updates.
        """
        frozen = vars(batch.optimizer)[_FROZEN]
        for p, grad, update in zip(batch.params, batch.grads, batch.updates, strict=True):
            part = local(update)
            if not part.numel():
                continue
            still = _still(given_rows(batch.optimizer, p), local(grad))
            if part.device.type == "cpu":
                rows = still.logical_not().nonzero().flatten()
                kept = part.index_select(0, rows)
                part.zero_().index_copy_(0, rows, kept)
            else:  # where finding the rows would wait for the device
                part.masked_fill_(_along(still, part), 0)
            for key, old in frozen.get(p, {}).items():
                new = local(batch.optimizer.state[p][key])
                new.copy_(torch.where(_along(still, new), local(old), new))

    def end(self, optimizer: DerivedOptimizer) -> None:
        """Forget the rows that were named.

        Args:
            optimizer: The optimizer.
        """
        forget_rows(optimizer)

    def release(self, optimizer: DerivedOptimizer) -> None:
        """Let go of the state that was kept.

        Args:
            optimizer: The optimizer.
        """
        vars(optimizer).pop(_FROZEN, None)

    def _selected(self, optimizer: DerivedOptimizer) -> list[tuple[Group, Tensor]]:
        return [
            (group, p)
            for group in optimizer.param_groups
            for p, chosen in zip(group["params"], self.selects(optimizer, group), strict=True)
            if chosen and p.grad is not None
        ]


def _has_rows(value: Any, parameter: Tensor) -> bool:
    """Whether an entry of the state has a row for each of the parameter's."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(parameter)


def _still(given: Tensor | None, gradient: Tensor) -> Tensor:
    """Return which rows were not sampled, ``[row]``."""
    if given is None:
        return any_entry(gradient).logical_not_()
    still = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
    return still.index_fill_(0, given, value=False)


def _along(flags: Tensor, like: Tensor) -> Tensor:
    """View ``[row]`` as ``[row, 1, …]``."""
    return flags.view(-1, *[1] * (like.ndim - 1))


@overload
def with_lazy(
    base: type[T],
    *,
    lazy: bool = True,
    lazy_include: tuple[str, ...] = (),
    lazy_state: State = "decay",
) -> type[T]: ...
@overload
def with_lazy(
    base: T,
    *,
    lazy: bool = True,
    lazy_include: tuple[str, ...] = (),
    lazy_state: State = "decay",
) -> T: ...
@overload
def with_lazy(
    base: str,
    *,
    lazy: bool = True,
    lazy_include: tuple[str, ...] = (),
    lazy_state: State = "decay",
) -> Any: ...


def with_lazy(
    base: Any,
    *,
    lazy: bool = True,
    lazy_include: tuple[str, ...] = (),
    lazy_state: State = "decay",
) -> Any:
    """Make an optimizer leave rows alone whose gradient is 0, for dense gradients.

    What the base adds to such a row is dropped, whatever it is made of; its state goes on as ever.
    Other derivations that change updates act on what this one leaves, or before it, in the order of
    application: ``with_weight_decay(with_lazy(Adam))`` decays all rows,
    ``with_lazy(with_weight_decay(Adam))`` those that were sampled. With gradient accumulation the
    sum of the window decides.

    Args:
        base: A class of optimizers, the name of one (``"adam"``), or an optimizer, which becomes a
            derived one in place.
        lazy: Whether it applies; a group may switch it off.
        lazy_include: Parts of the names of the parameters that it is for, such as ``("embed",)``;
            they need ``model.named_parameters()``. By default all with two dimensions or more, of
            shape ``[row, *any]``; rows of linear layers with a dead unit are then left alone, too.
        lazy_state: ``"decay"``: moments of such rows go on, as in the post. ``"freeze"``: what the
            base keeps for each row stands still with it, as in LazyAdam; this copies the state.

    Returns:
        A class that takes the base's arguments and these options, or the optimizer; it has a method
        ``touch`` to name rows.

    Raises:
        ArgumentError: If an option is out of range, as :func:`~kexue_lookahead.derived.derive`, or
            on ``step`` if a gradient is sparse, or sharded otherwise than by rows.

    Example:
        >>> import torch
        >>> from kexue_lookahead import with_lazy
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = with_lazy(torch.optim.Adam)([table], lr=0.5)
        >>> for row in (0, 2):
        ...     optimizer.zero_grad()
        ...     table[row].sum().backward()
        ...     optimizer.step()
        >>> table[:, 0].abs().gt(0).tolist()
        [True, False, True]
        >>> round(float(table[0, 0].detach()), 6)
        -0.5
    """
    return derive(base, LazyDerivation(lazy, lazy_include, lazy_state))
