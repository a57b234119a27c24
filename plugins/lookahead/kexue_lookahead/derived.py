"""Applies derivations to a class of optimizers, or to one optimizer."""

from __future__ import annotations

import copyreg
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar, cast, overload

import torch
from torch import Tensor

from kexue.core import ArgumentError, eagerly, saved_state
from kexue.core.errors import did_you_mean
from kexue_lookahead.bases import check_base, resolve_base
from kexue_lookahead.derivation import Derivation, Group, prefixes
from kexue_lookahead.fusing import fuse, lay_state
from kexue_lookahead.phases import take_step

__all__ = ["DerivedOptimizer", "become", "derive", "derived_class"]

T = TypeVar("T", bound=torch.optim.Optimizer)

_CLASSES: dict[tuple[type, tuple[Derivation, ...]], type[DerivedOptimizer]] = {}
_METACLASSES: dict[type, type] = {}


class DerivedOptimizer(torch.optim.Optimizer):
    """What all derived optimizers are, beside the optimizer that they are derived from.

    Made by :func:`derive`, never by itself.

    A step evaluates the closure once, then runs the phases of
    :mod:`kexue_lookahead.derivation`; hooks that were registered on the optimizer run once per call
    of ``step``. An error leaves the parameters as they were, unless the base fails on its way.
    GradScaler unscales before the step and leaves it out if a gradient is not finite, also for
    fused bases: nothing advances then. Without one, such gradients go where the base takes them.
    """

    derived_from: ClassVar[type[torch.optim.Optimizer]]
    """The class of optimizers that it is derived from."""

    derivations: ClassVar[tuple[Derivation, ...]] = ()
    """What was applied to it, first to last."""

    # -- groups and options ----------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with their own options, those of the derivations included.

        Args:
            param_group: ``params``, and whatever differs from the defaults.

        Raises:
            ArgumentError: If an option of a derivation is out of range.
        """
        options = self.__dict__.pop("_derived_options", None)
        if options is not None:  # the first group: torch has just set the base's defaults
            self.defaults.update(options)
        _check_options(self.derivations, {**self.defaults, **param_group})
        counters = {name: 0 for d in self.derivations for name in d.counters}
        super().add_param_group({**counters, **param_group})
        try:
            for derivation in self.derivations:
                derivation.check_group(self, self.param_groups[-1])
        except ArgumentError:
            self.param_groups.pop()
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: GradScaler is to unscale before ``step``, and to leave it out where it must."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Drop what fused bases say of themselves."""

    # -- the step --------------------------------------------------------------------------------

    @eagerly
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, with gradients; called once.

        Returns:
            What the closure returns; None without one.

        Raises:
            ArgumentError: If a derivation cannot work on the gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            take_step(self)
        return loss

    # -- saving and loading ----------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; also what the base's own did, then nothing was begun.

        Args:
            state_dict: The state. Not modified; the derivations' tensors are copied from it.
        """
        super().load_state_dict({**state_dict, "state": _of_base(self, state_dict["state"])})
        lay_state(self)
        for group in self.param_groups:
            for derivation in self.derivations:
                for name in derivation.options():
                    group.setdefault(name, self.defaults[name])
                for name in derivation.counters:
                    group.setdefault(name, 0)
        for parameter, key, value in saved_state(self, state_dict):
            if str(key).startswith(prefixes(self)):
                # torch would give it the type of the parameter, and may share its memory
                tensor = isinstance(value, Tensor)
                kept = value.to(parameter.device, copy=True) if tensor else value
                self.state[parameter][key] = kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; bases ask for all of theirs wherever they find a state."""
        everything = state.get("state", {})
        super().__setstate__({**state, "state": _of_base(self, everything)})
        for parameter, entries in everything.items():
            for key, value in entries.items():
                if str(key).startswith(prefixes(self)):
                    self.state[parameter][key] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by base and derivations: the class has no address of its own."""
        if type(self) is not derived_class(self.derived_from, self.derivations):
            return super().__reduce_ex__(protocol)
        return _blank, (self.derived_from, self.derivations), self.__getstate__()


def _of_base(optimizer: DerivedOptimizer, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what of a state is the base's: nothing of parameters that it has not seen yet."""
    theirs = prefixes(optimizer)
    found: dict[Any, Any] = defaultdict(dict)
    for owner, entries in state.items():
        kept = {key: x for key, x in entries.items() if not str(key).startswith(theirs)}
        if kept:
            found[owner] = kept
    return found


# -- deriving --------------------------------------------------------------------------------------


def become(
    optimizer: torch.optim.Optimizer,
    base: str | type[torch.optim.Optimizer],
    derivations: Iterable[Derivation],
    params: Any,
    *,
    lr: float | Tensor | None = None,
    base_options: Mapping[str, Any] | None = None,
) -> None:
    """Turn an object under construction into a derived optimizer.

    For components: their class says in its ``__init__`` what can be chosen, and the object that it
    makes is an instance of the class derived from the chosen base. Such a class has an attribute
    ``becomes = True``, by which :func:`derive` knows that its constructor ends here.

    Args:
        optimizer: The object, nothing of which has been set.
        base: A class of optimizers, or its name.
        derivations: What to apply, first to last.
        params: Parameters or groups.
        lr: Learning rate; None for the base's default.
        base_options: Further arguments of the base.

    Raises:
        ArgumentError: As :func:`derive`, or if the base does not take ``base_options``.
    """
    further, chosen = vars(optimizer).pop("_derived_further", ((), {}))
    cls = derive(resolve_base(base), *derivations, *further)
    given = {} if base_options is None else dict(base_options)
    known = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in given:
        if name in {"params", "lr"} or not (name in known or takes_any):
            raise ArgumentError(
                f"`base_options` must be arguments of the base other than params and lr. Found "
                f"{name!r}.{did_you_mean(name, known)}",
                argument="base_options",
            )
    if lr is not None:
        given["lr"] = lr
    given.update(chosen)
    optimizer.__class__ = cls
    cls.__init__(optimizer, params, **given)


@overload
def derive(base: type[T], *derivations: Derivation) -> type[T]: ...
@overload
def derive(base: T, *derivations: Derivation) -> T: ...
@overload
def derive(base: str, *derivations: Derivation) -> Any: ...


def derive(base: Any, *derivations: Derivation) -> Any:
    """Apply derivations to a class of optimizers, or to one optimizer.

    Args:
        base: A class, or the name of one, see :func:`~kexue_lookahead.bases.resolve_base`: the
            result is a subclass, the same for the same arguments, whose constructor takes the
            base's arguments and the derivations' options. Or an optimizer: it becomes a derived
            one in place, with its groups, state and hooks, and is returned.
        derivations: What to apply, first to last, after those that ``base`` has already.

    Raises:
        ArgumentError: If ``base`` is no optimizer or one that needs closures, a derivation is
            there twice, an option has the name of one of the base's, or a learning-rate scheduler
            has already been attached to the optimizer.
    """
    if isinstance(base, torch.optim.Optimizer):
        return _derive_in_place(base, derivations)
    base = resolve_base(base)
    check_base(base)
    if issubclass(base, DerivedOptimizer):
        base, derivations = base.derived_from, (*base.derivations, *derivations)
    return derived_class(base, tuple(derivations))


def _derive_in_place(optimizer: Any, derivations: tuple[Derivation, ...]) -> Any:
    if "step" in vars(optimizer):
        raise ArgumentError(
            "`base` must be derived from before anything else changes its `step`. Found an "
            f"{type(optimizer).__name__} with a learning-rate scheduler or a wrapper on it. "
            "Derive first, then build the scheduler on the result.",
            argument="base",
        )
    cls = derive(type(optimizer), *derivations)
    options = {name: value for d in derivations for name, value in d.options().items()}
    for group in optimizer.param_groups:
        _check_free(options, group, type(optimizer))
        for derivation in derivations:
            derivation.check_group(optimizer, {**group, **options})
    _check_options(derivations, {**optimizer.defaults, **options})
    _check_differentiable(optimizer.defaults)
    if "_step_supports_amp_scaling" in vars(optimizer):
        del optimizer._step_supports_amp_scaling  # noqa: SLF001
    optimizer.__class__ = cls
    optimizer.defaults.update(options)
    for group in optimizer.param_groups:
        group.update(options)
        group.update({name: 0 for d in derivations for name in d.counters})
    optimizer._patch_step_function()  # noqa: SLF001
    return optimizer


def derived_class(
    base: type[torch.optim.Optimizer], derivations: tuple[Derivation, ...]
) -> type[DerivedOptimizer]:
    """Return the class of optimizers derived from a plain one, always the same.

    Args:
        base: A class that is not derived itself.
        derivations: What was applied to it, first to last.

    Raises:
        ArgumentError: As :func:`derive`.
    """
    made = _CLASSES.get((base, derivations))
    if made is None:
        make = _make_deferred_class if getattr(base, "becomes", False) else _make_class
        made = _CLASSES.setdefault((base, derivations), make(base, derivations))
    return made


def _make_deferred_class(
    base: type[torch.optim.Optimizer], derivations: tuple[Derivation, ...]
) -> type[DerivedOptimizer]:
    """Return a class that leaves it to the constructor of a component to apply the derivations."""
    signature = inspect.signature(base)
    options: dict[str, Any] = {}
    for derivation in derivations:
        _check_free(derivation.options(), {**signature.parameters, **options}, base)
        options |= derivation.options()
    _check_options(derivations, options)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        chosen = {name: kwargs.pop(name, options[name]) for name in options}
        after, chosen_after = vars(self).pop("_derived_further", ((), {}))
        vars(self)["_derived_further"] = ((*derivations, *after), {**chosen, **chosen_after})
        base.__init__(self, *args, **kwargs)

    __init__.__signature__ = _shown(signature, options)  # type: ignore[attr-defined]
    words = "".join(word.capitalize() for d in derivations for word in d.name.split("-"))
    body: dict[str, Any] = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"{base.__name__}, then {', then '.join(d.name for d in derivations)}.",
        "derived_from": base,
        "derivations": derivations,
    }
    made = _metaclass(type(base))(f"{base.__name__}With{words}", (base,), body)
    return cast("type[DerivedOptimizer]", made)


def _make_class(
    base: type[torch.optim.Optimizer], derivations: tuple[Derivation, ...]
) -> type[DerivedOptimizer]:
    names = [d.name for d in derivations]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(
                f"`base` must not have {name} already. Found {base.__name__} with "
                f"{', '.join(names)}. Apply each derivation once.",
                argument="base",
            )
    options: dict[str, Any] = {}
    signature = inspect.signature(base)
    for derivation in derivations:
        _check_free(derivation.options(), {**signature.parameters, **options}, base)
        options |= derivation.options()
    _check_options(derivations, options)
    mixins = [d.mixin for d in derivations if d.mixin is not None]
    words = "".join(word.capitalize() for name in names for word in name.split("-"))
    body: dict[str, Any] = {
        "__init__": _constructor(signature, options),
        "__module__": __name__,
        "__doc__": f"{base.__name__} with {', then '.join(names)}.",
        "derived_from": base,
        "derivations": derivations,
    }
    made = _metaclass(type(base))(
        f"{base.__name__}With{words}", (*mixins, DerivedOptimizer, base), body
    )
    return cast("type[DerivedOptimizer]", made)


def _constructor(signature: inspect.Signature, options: dict[str, Any]) -> Callable[..., None]:
    """Return an ``__init__`` that takes the base's arguments and the options."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self._derived_options = {name: kwargs.pop(name, options[name]) for name in options}
        _check_options(self.derivations, self._derived_options)
        _check_differentiable(kwargs)
        if any(self.derived_from in derivation.fuses for derivation in self.derivations):
            params = args[0] if args else kwargs.pop("params")
            args = (fuse(self.derived_from, self.derivations, params, kwargs), *args[1:])
        super(DerivedOptimizer, self).__init__(*args, **kwargs)

    __init__.__signature__ = _shown(signature, options)  # type: ignore[attr-defined]
    return __init__


def _shown(signature: inspect.Signature, options: dict[str, Any]) -> inspect.Signature:
    """Return the signature of a constructor that takes options beside the base's arguments."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    extra = [inspect.Parameter(n, keyword, default=v) for n, v in options.items()]
    rest = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    last = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return signature.replace(parameters=[own, *rest, *extra, *last])


def _metaclass(kind: type) -> type:
    """Return a metaclass whose classes pickle by base and derivations."""
    if kind not in _METACLASSES:
        made = type(f"Derived{kind.__name__}", (kind,), {})
        copyreg.pickle(made, _reduce_class)
        _METACLASSES[kind] = made
    return _METACLASSES[kind]


def _reduce_class(cls: type[DerivedOptimizer]) -> str | tuple[Any, ...]:
    if "derivations" not in vars(cls):
        return cls.__qualname__  # a subclass with an address of its own
    return derived_class, (cls.derived_from, cls.derivations)


def _blank(base: type[torch.optim.Optimizer], derivations: tuple[Derivation, ...]) -> Any:
    cls = derived_class(base, derivations)
    return cls.__new__(cls)


def _check_free(options: dict[str, Any], taken: Any, base: type) -> None:
    for name in options:
        if name in taken:
            raise ArgumentError(
                f"`{name}` must not be an option of the base, because a derivation has that name "
                f"too. Found it in {base.__name__}.",
                argument="base",
            )


def _check_differentiable(settings: dict[str, Any]) -> None:
    if settings.get("differentiable"):
        raise ArgumentError(
            "`differentiable` of a derived optimizer must be False. Found True. Differentiate "
            "through the base alone.",
            argument="differentiable",
        )


def _check_options(derivations: Iterable[Derivation], options: dict[str, Any]) -> None:
    for derivation in derivations:
        derivation.check(options)
