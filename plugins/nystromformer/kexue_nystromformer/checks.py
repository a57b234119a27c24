"""What arguments must be, said once at the boundary."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError

__all__ = [
    "check_count",
    "check_features",
    "check_mask",
    "check_queries",
    "check_unsupported",
    "is_free",
    "is_plain",
    "padding_mask",
    "without_autocast",
]

_OWNER = "nystrom_attention"
_MEASURED = {torch.float32, torch.float64}


def check_count(owner: str, name: str, value: object, *, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Raises:
        ArgumentError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(
            f"`{name}` of {owner} must be a whole number of at least {least}. Found {value!r}.",
            argument=name,
        )


def check_unsupported(*, dropout_p: float, is_causal: bool) -> None:
    """Raise if something is asked for that Nyström attention cannot do.

    Raises:
        ArgumentError: If it is.
    """
    if is_causal:
        raise ArgumentError(
            f"`is_causal` of {_OWNER} must be False: landmarks are means over the whole sequence, "
            f"so every position would see its future. Use scaled_dot_product_attention.",
            argument="is_causal",
        )
    if dropout_p != 0:
        raise ArgumentError(
            f"`dropout_p` of {_OWNER} must be 0: the attention weights are never formed. "
            f"Found {dropout_p}; drop from the output instead.",
            argument="dropout_p",
        )


def check_queries(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless queries, keys and values are of one sequence.

    Raises:
        ArgumentError: If they are not.
    """
    if query.ndim != 4 or not query.is_floating_point() or query.shape[3] == 0:
        raise ArgumentError(
            f"`query` of {_OWNER} must be floating-point [batch, head, time, feature] with at "
            f"least one feature. Found {query.dtype} of shape {list(query.shape)}.",
            argument="query",
        )
    if key.ndim == 4 and key.shape[2] != query.shape[2]:
        raise ArgumentError(
            f"`key` of {_OWNER} must have as many positions as `query`, {query.shape[2]}. Found "
            f"{key.shape[2]}; for cross-attention use scaled_dot_product_attention.",
            argument="key",
        )
    if key.shape != query.shape:
        raise ArgumentError(
            f"`key` of {_OWNER} must have the shape of `query`, {list(query.shape)}. "
            f"Found {list(key.shape)}.",
            argument="key",
        )
    if value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ArgumentError(
            f"`value` of {_OWNER} must have shape [batch, head, time, any] = "
            f"{[*query.shape[:3], 'any']}. Found {list(value.shape)}.",
            argument="value",
        )
    for name, other in (("key", key), ("value", value)):
        if other.dtype != query.dtype:
            raise ArgumentError(
                f"`{name}` of {_OWNER} must have the dtype of `query`, {query.dtype}. "
                f"Found {other.dtype}.",
                argument=name,
            )


def padding_mask(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return an attention mask that hides the same positions from all as ``[batch, time]``.

    Raises:
        ArgumentError: If it does not.
    """
    if attn_mask is None:
        return None
    batch, _, time, _ = query.shape
    if attn_mask.dtype != torch.bool:
        raise ArgumentError(
            f"`attn_mask` of {_OWNER} must be bool, true at real positions. Found "
            f"{attn_mask.dtype}; scores cannot be added to, because they are never formed.",
            argument="attn_mask",
        )
    if (
        attn_mask.ndim != 4
        or attn_mask.shape[1:] != (1, 1, time)
        or len(attn_mask) not in (1, batch)
    ):
        raise ArgumentError(
            f"`attn_mask` of {_OWNER} must have shape [batch, 1, 1, time] = "
            f"{[batch, 1, 1, time]}, the same for all heads and queries. Found "
            f"{list(attn_mask.shape)}; `mask[:, None, None, :]` makes it of [batch, time].",
            argument="attn_mask",
        )
    return attn_mask[:, 0, 0].expand(batch, time)


def check_features(owner: str, features: Tensor, num_features: int) -> None:
    """Raise unless ``features`` are floating-point ``[batch, time, feature]``.

    Raises:
        ArgumentError: If they are not.
    """
    if features.ndim != 3 or features.shape[2] != num_features or not features.is_floating_point():
        raise ArgumentError(
            f"`features` of {owner} must be floating-point [batch, time, feature] = "
            f"[batch, time, {num_features}]. Found {features.dtype} of shape "
            f"{list(features.shape)}.",
            argument="features",
        )


def check_mask(owner: str, mask: Tensor | None, features: Tensor) -> None:
    """Raise unless ``mask`` is None or bool ``[batch, time]``.

    Raises:
        ArgumentError: If it is something else.
    """
    if mask is None:
        return
    if mask.shape != features.shape[:2]:
        raise ArgumentError(
            f"`mask` of {owner} must have shape [batch, time] = {list(features.shape[:2])}. "
            f"Found {list(mask.shape)}.",
            argument="mask",
        )
    if mask.dtype != torch.bool:
        raise ArgumentError(
            f"`mask` of {owner} must be bool, true at real positions. Found {mask.dtype}; convert "
            f"it with `mask.bool()`.",
            argument="mask",
        )


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors of numbers, and only autograd may follow what is done to them.

    A compiler, the transformations of ``torch.func`` and subclasses want to see known operations.
    """
    transformed = getattr(torch._C, "_are_functorch_transforms_active", bool)  # noqa: SLF001
    return (
        all(type(x) in {Tensor, nn.Parameter} for x in tensors)
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def is_free(*tensors: Tensor) -> bool:
    """Whether other operations than the known ones may compute with these, and are faster.

    They are where they have been measured: on a CPU, in float32 and float64.
    """
    return (
        is_plain(*tensors)
        and all(x.device.type == "cpu" and x.dtype in _MEASURED for x in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Keep matrix products in the type of their factors, on devices that could change it."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
