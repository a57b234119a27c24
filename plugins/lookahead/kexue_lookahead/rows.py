"""Which rows of a parameter a step is about, and how many steps they missed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue_lookahead.derivation import distributed

__all__ = [
    "TouchedRows",
    "any_entry",
    "check_rows",
    "forget_rows",
    "given_rows",
    "powers",
]

_GIVEN = "_lazy_rows"
_BLOCK = 2**17  # numbers


class TouchedRows:
    """What lazy updates add to an optimizer: it can be told which rows were sampled."""

    def touch(self: Any, parameter: Tensor, indices: Tensor) -> None:
        """Say which rows the next step is about, instead of looking for gradients that are not 0.

        A row that was sampled then counts as such even if its gradient is 0. Several calls add up;
        the step forgets them. It is for dense gradients: sparse ones name their rows.

        Args:
            parameter: One of the optimizer's, of shape ``[row, *any]``.
            indices: The rows of the batch, such as the ids of tokens, of any integer type and
                shape ``[*any]``; the same ones may come several times.

        Raises:
            ArgumentError: If the parameter is not the optimizer's, it is sharded, or the indices
                are no integers or, on a CPU, out of range.

        Example:
            >>> import torch
            >>> from kexue_lookahead import Lazy
            >>> table = torch.nn.Parameter(torch.zeros(3, 2))
            >>> optimizer = Lazy([table], lr=0.5)
            >>> table.grad = torch.ones(3, 2)
            >>> optimizer.touch(table, torch.tensor([2, 2]))
            >>> optimizer.step()
            >>> table[:, 0].abs().gt(0).tolist()
            [False, False, True]
        """
        if not any(parameter is p for group in self.param_groups for p in group["params"]):
            raise ArgumentError(
                "`parameter` must be one that this optimizer was built with. Found another, of "
                f"shape {list(parameter.shape)}. Pass the module's weight itself.",
                argument="parameter",
            )
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ArgumentError(
                f"`indices` must be integers. Found {indices.dtype}. "
                "Pass mask.nonzero() for a mask of rows.",
                argument="indices",
            )
        if distributed(parameter):
            raise ArgumentError(
                "`parameter` must be whole in each process. Found a sharded one. Leave `touch` "
                "out: its rows are found by their gradients.",
                argument="parameter",
            )
        flat = indices.flatten().to(parameter.device, torch.int64)
        if flat.device.type == "cpu" and flat.numel():
            low, high = (int(x) for x in torch.aminmax(flat))
            if low < 0 or high >= len(parameter):
                raise ArgumentError(
                    f"`indices` must be in [0, {len(parameter)}), the rows of the parameter. Found "
                    f"{low if low < 0 else high}.",
                    argument="indices",
                )
        vars(self).setdefault(_GIVEN, {}).setdefault(parameter, []).append(flat)


def given_rows(optimizer: Any, parameter: Tensor) -> Tensor | None:
    """Return the rows that ``touch`` named, each once, ``[touched]``; None if it was not called.

    Args:
        optimizer: The optimizer.
        parameter: One of its parameters.
    """
    given = vars(optimizer).get(_GIVEN, {}).get(parameter)
    return None if given is None else torch.cat(given).unique()  # type: ignore[no-untyped-call]


def forget_rows(optimizer: Any) -> None:
    """Forget what ``touch`` named.

    Args:
        optimizer: The optimizer.
    """
    vars(optimizer).pop(_GIVEN, None)


def any_entry(tensor: Tensor) -> Tensor:
    """Return which rows have an entry other than 0, NaN included: ``[row, *any]`` to ``[row]``.

    Args:
        tensor: The tensor; not empty.
    """
    if tensor.ndim == 1:
        return tensor.ne(0)
    flat = tensor.flatten(1)
    if tensor.device.type != "cpu":
        return flat.abs().amax(1).ne(0)
    # what |x| needs stays in the cache: new memory is dearer here than the work
    blocks = torch.split(flat, max(1, _BLOCK // flat.shape[1]))
    return torch.cat([block.abs().amax(1) for block in blocks]).ne(0)


def check_rows(optimizer: Any, parameter: Tensor, *, sparse: bool) -> None:
    """Refuse gradients whose rows cannot be told.

    Args:
        optimizer: The optimizer.
        parameter: One of its parameters, with a gradient.
        sparse: Whether sparse gradients, of rows, are welcome.

    Raises:
        ArgumentError: If it has no rows, is sharded otherwise than by rows, or has a sparse
            gradient that is not welcome, not of rows, or beside rows that ``touch`` named.
    """
    gradient = parameter.grad
    if gradient is None:
        return
    shape = list(parameter.shape)
    if parameter.ndim == 0:
        raise ArgumentError(
            "`params` of lazy updates must have rows. Found a scalar. Optimise it apart.",
            argument="params",
        )
    if gradient.layout is not torch.strided:
        if not sparse:
            raise ArgumentError(
                f"The gradients of `params` must be dense here. Found layout {gradient.layout} for "
                f"a parameter of shape {shape}. Use kexue_lookahead.Lazy, which takes both.",
                argument="params",
            )
        if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
            raise ArgumentError(
                "Sparse gradients of `params` must be COO of whole rows, like those of "
                f"nn.Embedding. Found layout {gradient.layout} for a parameter of shape {shape}. "
                "Make them dense.",
                argument="params",
            )
        if parameter in vars(optimizer).get(_GIVEN, {}):
            raise ArgumentError(
                "`parameter` of `touch` must have a dense gradient. Found a sparse one, which "
                "names its rows. Leave `touch` out.",
                argument="parameter",
            )
    if distributed(parameter):
        placements: Any = parameter.placements  # type: ignore[attr-defined]
        if any(p.is_shard() and p.dim != 0 for p in placements):
            raise ArgumentError(
                "Sharded `params` of lazy updates must be sharded by rows, as FSDP2 does. Found "
                f"{placements} for one of shape {shape}. Use Shard(0).",
                argument="params",
            )


def powers(base: float, exponents: Tensor, like: Tensor) -> Tensor:
    """Return base^exponent for each row, to be multiplied with rows.

    In float64 where there is such a type: the rounding of 0.999 to float32 alone is worth 6e-5
    after 1000 steps.

    Args:
        base: A decay, in [0, 1].
        exponents: Integers of shape ``[touched]``.
        like: Rows of shape ``[touched, *any]``, for device, type and number of dimensions.

    Returns:
        Shape ``[touched, 1, …]``.
    """
    wide = torch.float32 if exponents.device.type == "mps" else torch.float64
    found = torch.pow(base, exponents.to(wide)).to(like.dtype)
    return found.view(-1, *[1] * (like.ndim - 1))
