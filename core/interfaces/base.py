"""What every contract shares: capabilities, read by the command line and the conformance kit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from kexue.core.component import Example

__all__ = ["Contract"]


class Contract(ABC):
    """Base of all contracts.

    The class attributes are capabilities: what may be asked of a component, whatever its name.
    """

    trainable: ClassVar[bool] = False
    """Can be fitted to data by ``kexue fit``."""

    stochastic: ClassVar[bool] = False
    """Draws random numbers; its method takes ``generator``, and the same seed gives the same
    result."""

    differentiable: ClassVar[bool] = False
    """Gradients flow to the floating-point inputs and to the parameters."""

    needs_fitting: ClassVar[bool] = False
    """Does nothing before it was fitted."""

    needs_mask: ClassVar[bool] = False
    """Cannot be called without ``mask``."""

    compilable: ClassVar[bool] = True
    """Runs under ``torch.compile`` (graph breaks are allowed)."""

    half_precision: ClassVar[bool] = True
    """Takes float16 and bfloat16 inputs and gives finite results."""

    @classmethod
    @abstractmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return small valid arguments: of the constructor, and of the method the kind runs.

        A batch of at least three, float32, with ragged lengths where there is a mask.

        Args:
            generator: Source of randomness; the global one by default.
        """
