"""What was replaced, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_replaced"]

_COLOURS = ((1.0, 1.0, 1.0), (0.85, 0.87, 0.9), (0.75, 0.22, 0.17))  # padding, kept, replaced


def draw_replaced(
    changed: Bool[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    figure: Figure,
    *,
    rows: int = 40,
    times: int = 100,
) -> None:
    """Draw which tokens of the first rows are other than they were.

    Args:
        changed: True at these.
        mask: True at real tokens.
        figure: An empty figure.
        rows: How many rows at most.
        times: How many positions at most.
    """
    kind = (mask.long() + (changed & mask).long())[:rows, :times].cpu()
    axes = figure.subplots()
    picture = torch.tensor(_COLOURS)[kind].numpy()
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set(xlabel="position (red: replaced)", ylabel="row")
