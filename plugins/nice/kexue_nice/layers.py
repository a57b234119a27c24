"""The parts of NICE: perceptron, additive coupling, diagonal scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.core import ArgumentError

__all__ = ["AdditiveCoupling", "DiagonalScale", "perceptron"]


class AdditiveCoupling(nn.Module):
    """Add to one part of a vector any function of the other part, which is kept.

    h1 = x1, h2 = x2 + m(x1) (eq. 7 of the post; paper, section 3.2). The Jacobian is triangular
    with ones on the diagonal, so the log-determinant is 0 and nothing has to be computed for it.

    Args:
        shift: m, a module from the kept part to a shift of the other, ``[batch, kept]`` to
            ``[batch, changed]``; it need not be invertible.
        sign: 1 to add, -1 to subtract when going forward. The post's encoder subtracts.

    Raises:
        ArgumentError: If ``sign`` is neither.

    Example:
        >>> import torch
        >>> from kexue_nice import AdditiveCoupling
        >>> coupling = AdditiveCoupling(torch.nn.Linear(2, 3))
        >>> kept, changed = torch.randn(4, 2), torch.randn(4, 3)
        >>> h = coupling(kept, changed)
        >>> torch.allclose(coupling.inverse(kept, h), changed, atol=1e-6)
        True
    """

    def __init__(self, shift: nn.Module, *, sign: int = 1) -> None:
        super().__init__()
        if sign not in {1, -1}:
            raise ArgumentError(
                f"`sign` of AdditiveCoupling must be 1 or -1. Found {sign!r}.", argument="sign"
            )
        self.shift = shift
        self.sign = sign

    def forward(
        self, kept: Float[Tensor, "batch kept"], changed: Float[Tensor, "batch changed"]
    ) -> Float[Tensor, "batch changed"]:
        """Return the changed part.

        Args:
            kept: x1.
            changed: x2.
        """
        return torch.add(changed, self.shift(kept), alpha=self.sign)

    def inverse(
        self, kept: Float[Tensor, "batch kept"], changed: Float[Tensor, "batch changed"]
    ) -> Float[Tensor, "batch changed"]:
        """Undo :meth:`forward` (eq. 9).

        Args:
            kept: h1.
            changed: h2.
        """
        return torch.sub(changed, self.shift(kept), alpha=self.sign)


class DiagonalScale(nn.Module):
    """Multiply each feature by a positive number: z = s h (eq. 14; paper, section 3.3).

    It is the inverse of a learned standard deviation 1 / s of the prior: features with a large s
    hardly vary.

    Args:
        num_features: Numbers per row.

    Example:
        >>> import torch
        >>> from kexue_nice import DiagonalScale
        >>> DiagonalScale(3).log_det.item()
        0.0
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(num_features))  # log s

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of the Jacobian, the sum of log s; at least in float32."""
        return self.log_scale.sum(dtype=torch.promote_types(self.log_scale.dtype, torch.float32))

    def forward(self, h: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch feature"]:
        """Return z.

        Args:
            h: Rows.
        """
        return h * self.log_scale.exp()

    def inverse(self, z: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch feature"]:
        """Return h.

        Args:
            z: Rows.
        """
        return z * torch.exp(-self.log_scale)

    @torch.no_grad()
    def match(self, h: Float[Tensor, "batch feature"], std: float) -> None:
        """Set the scales such that the features of z have a given standard deviation.

        Features that hardly vary are taken to have a thousandth of the mean deviation.

        Args:
            h: Rows.
            std: The standard deviation.
        """
        found = h.std(0, correction=0)
        least = 1e-3 * found.square().mean().sqrt()
        found = torch.where(least > 0, found.clamp_min(least), torch.ones_like(found))
        self.log_scale.copy_(std / found).log_()


def perceptron(sizes: Sequence[int], *, relu_output: bool = False) -> nn.Sequential:
    """Return linear layers with ReLUs between them.

    Args:
        sizes: Numbers of input, hidden and output units.
        relu_output: Whether a ReLU follows the last layer too.
    """
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if relu_output else layers[:-1]))
