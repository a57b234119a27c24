"""What the components of this plugin share: an object that becomes a derived optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kexue.core import Example, Optimizer
from kexue_lookahead.derivation import Derivation

if TYPE_CHECKING:
    import torch

__all__ = ["Recipe"]


class Recipe(Optimizer):
    """A class whose constructor names a base and derivations, and becomes what they make.

    Its objects are not of its type, but of the one derived from the base; that counts as a subclass
    if it has the derivations, in this order, and perhaps others.
    """

    becomes: ClassVar[bool] = True

    made_of: ClassVar[tuple[type[Derivation], ...]] = ()
    """The types of the derivations, first to last."""

    made_from: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The base, where there is no choice."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        """Whatever has the base and the derivations is one, however it was made."""
        if "made_of" not in vars(cls) or not cls.made_of:
            return NotImplemented
        found = [type(d) for d in getattr(other, "derivations", ()) if type(d) in cls.made_of]
        base = getattr(other, "derived_from", None)
        fits = tuple(found) == cls.made_of and (cls.made_from is None or base is cls.made_from)
        return True if fits else NotImplemented

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return arguments that descend gently, on a built-in problem."""
        del generator
        return Example({"lr": 1e-2}, {"problem": "rosenbrock"})
