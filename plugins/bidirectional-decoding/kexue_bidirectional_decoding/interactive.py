"""The interactive layer: each direction's states ask those of the other."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import ArgumentError

__all__ = ["InteractiveAttention", "visible"]

Heads = Float[Tensor, "row head time feature"]


def visible(
    time: int,
    lengths: Int[Tensor, " row"] | None = None,
    *,
    leak: str = "post",
    device: torch.device | None = None,
) -> Bool[Tensor, "row time time"]:
    """Return which of the partner's states j each position t may ask, counted from 0.

    State j of the partner has read its mark and the j last tokens of the text (as seen from here).
    With ``"post"`` it may be asked once t ≥ j, so that both directions are in step; in the second
    half of a text of n tokens it has then read token t, which is to be predicted there. ``"mask"``
    hides those, j > n − t − 1. The mark alone, j = 0, may always be asked.

    Args:
        time: Positions, the mark included.
        lengths: n of each row; the result has one row without them.
        leak: ``"post"`` or ``"mask"``.
        device: Where, if there are no lengths.

    Raises:
        ArgumentError: If ``leak`` is another word, or ``"mask"`` without lengths.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import visible
        >>> visible(4, torch.tensor([3]), leak="mask").int()[0].tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    """
    if leak not in {"post", "mask"}:
        raise ArgumentError(f"`leak` must be 'post' or 'mask'. Found {leak!r}.", argument="leak")
    if leak == "mask" and lengths is None:
        raise ArgumentError(
            "`lengths` must be given for leak='mask': which of the partner's states have read the "
            "token to be predicted depends on them. Found none.",
            argument="lengths",
        )
    steps = torch.arange(time, device=device if lengths is None else lengths.device)
    in_step = steps <= steps[:, None]  # [t, j]
    if lengths is None or leak == "post":
        return in_step.expand(1 if lengths is None else len(lengths), -1, -1)
    last = (lengths[:, None] - steps - 1).clamp(min=0)  # [row, t]
    return in_step & (steps <= last[..., None])


class InteractiveAttention(nn.Module):
    """Scaled dot-product attention between two decoders of one text, both ways.

    What the decoder from the left has made of the text so far asks what the one from the right has
    made of its end, and the other way round: queries of one, keys and values of the other, which
    share no weights. Neither has a bias or an output projection, as in the post's script.

    Args:
        width: Features, a multiple of ``heads``.
        heads: Heads.
        leak: ``"post"`` for plain teacher forcing, where in the second half of a text the partner
            has read what is to be predicted; ``"mask"`` hides those states, see :func:`visible`.

    Raises:
        ArgumentError: If ``width`` is no multiple of ``heads``, or ``leak`` another word.

    References:
        https://kexue.fm/archives/6877; Zhou, Zhang and Zong, Synchronous Bidirectional Neural
        Machine Translation, TACL 2019, https://arxiv.org/abs/1905.04847.

    Example:
        >>> import torch
        >>> from kexue_bidirectional_decoding import InteractiveAttention
        >>> layer = InteractiveAttention(16, heads=4, leak="mask")
        >>> left, right = layer(torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.tensor([4, 2]))
        >>> left.shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, width: int, heads: int = 8, *, leak: str = "post") -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ArgumentError(
                f"`width` must be a multiple of `heads`, {heads}. Found {width}.", argument="width"
            )
        visible(1, torch.ones(1, dtype=torch.long), leak=leak)
        self.heads = heads
        self.leak = leak
        # Per direction its queries, and the keys and values that the other asks.
        self.left = nn.Linear(width, 3 * width, bias=False)
        self.right = nn.Linear(width, 3 * width, bias=False)

    def project(
        self, features: Float[Tensor, "row time feature"], *, right: bool
    ) -> tuple[Heads, Heads, Heads]:
        """Return a direction's queries, and its keys and values for the other.

        Args:
            features: Its states.
            right: Whether they are those of the decoder from the right.
        """
        parts: Tensor = (self.right if right else self.left)(features)
        size = features.shape[-1] // self.heads
        heads = parts.view(*features.shape[:2], 3, self.heads, size)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(
        self,
        left: Float[Tensor, "row time feature"],
        right: Float[Tensor, "row time feature"],
        lengths: Int[Tensor, " row"] | None = None,
        *,
        partners: tuple[Tensor, Tensor] | None = None,
        steps: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "row time feature"], Float[Tensor, "row time feature"]]:
        """Return what each direction learns from the other.

        States behind a text's end change nothing at the others; what is returned there has no
        meaning, and is finite.

        Args:
            left: States from the left, the mark's first.
            right: States from the right, the end mark's first, padding behind as well.
            lengths: Tokens of each text, marks left out. Without them ``leak="mask"`` is an error
                in training; in evaluation all states in step are asked, as in decoding a text of
                unknown length.
            partners: States from the left and from the right that are asked instead of ``left`` and
                ``right``, such as those of decoders that have read pseudo-targets; same shape.
            steps: How many of each row's ``partners`` are real, ``[row]`` each; all by default.

        Raises:
            ArgumentError: If the shapes do not fit.
        """
        if left.ndim != 3 or left.shape != right.shape:
            raise ArgumentError(
                f"`right` must have the shape of `left`, [row, time, feature]. Found "
                f"{list(right.shape)} and {list(left.shape)}.",
                argument="right",
            )
        if partners is not None and any(part.shape != left.shape for part in partners):
            raise ArgumentError(
                f"`partners` must have the shape of `left`, {list(left.shape)}. Found "
                f"{list(partners[0].shape)} and {list(partners[1].shape)}.",
                argument="partners",
            )
        if lengths is not None and lengths.shape != left.shape[:1]:
            raise ArgumentError(
                f"`lengths` must have shape [{len(left)}], a number per row. Found "
                f"{list(lengths.shape)}.",
                argument="lengths",
            )
        unknown = lengths is None and not self.training
        leak = "post" if unknown else self.leak
        seen = visible(left.shape[1], lengths, leak=leak, device=left.device)[:, None]
        l_seen = r_seen = seen
        if steps is not None:
            places = torch.arange(left.shape[1], device=left.device)
            r_seen, l_seen = (seen & (places < count[:, None, None, None]) for count in steps)
        q_left, k_left, v_left = self.project(left, right=False)
        q_right, k_right, v_right = self.project(right, right=True)
        if partners is not None:
            _, k_left, v_left = self.project(partners[0], right=False)
            _, k_right, v_right = self.project(partners[1], right=True)
        return (
            _merged(F.scaled_dot_product_attention(q_left, k_right, v_right, l_seen)),
            _merged(F.scaled_dot_product_attention(q_right, k_left, v_left, r_seen)),
        )


def _merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)
