"""Decoder inputs with some tokens replaced at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from kexue.core import ArgumentError, Example, Sampler, Samples
from kexue.core.component import PAD
from kexue.core.errors import did_you_mean
from kexue_exposure_bias.checks import check_ids, check_mask, check_share
from kexue_exposure_bias.randomness import BITS, Generators, coins, draw_bits, of_tokens

__all__ = ["Pool", "TokenReplacement"]

Pool = Literal["target", "source_target", "batch", "vocab"]

_OWNER = "TokenReplacement"


class TokenReplacement(nn.Module, Sampler):
    r"""Random replacement of the tokens that a decoder reads: ids [row, time] to the same.

    A decoder that is trained on true prefixes alone meets its own mistakes for the first time when
    it generates. Post 7259 lets it meet some while it is trained, without a second pass: with the
    probability ``prob`` a row is chosen, and in a chosen row each token is replaced with the
    probability ``rate`` by one that is drawn uniformly from all tokens of its pool, by default
    those of the same sequence. Labels stay as they are, and so does what an encoder reads.

    A layer in training, the identity in evaluation; :meth:`sample` draws whatever the mode.
    Some twenty kernels, no synchronisation, O(row time).

    The draws belong to the k-th replaceable token of a row, wherever it stands: on the CPU the same
    seed gives the same tokens however the batch is padded, and with one generator per row whatever
    else is in the batch (but for ``pool="batch"``).

    Deviations from the post: 30 % of the tokens are each token with probability 0.3, as in its
    code. That code differs from the text otherwise: it draws from source and target together,
    special tokens included (``pool="source_target"``), and replaces the end token, too. Donors
    may be equal to what they replace, as there; a row of n tokens, c_v of them v, so has fewer
    changed tokens than ``rate``: rate (1 - sum_v (c_v / n)^2).

    Args:
        prob: Share of rows that are chosen, in [0, 1].
        rate: Share of the tokens of a chosen row that are replaced, in [0, 1].
        pool: Where donors come from: ``"target"``, the row's own tokens; ``"source_target"``, the
            row's source and its own; ``"batch"``, all rows; ``"vocab"``, all ids below
            ``num_tokens``.
        exclude: Ids that are never replaced and never put in, such as start and end tokens.
        num_tokens: Size of the vocabulary; for ``pool="vocab"``.

    Raises:
        ArgumentError: If a share is outside [0, 1], the pool is unknown, an excluded id is
            negative, or ``num_tokens`` leaves nothing to draw from.

    Example:
        >>> import torch
        >>> from kexue_exposure_bias import TokenReplacement
        >>> replace = TokenReplacement(prob=1.0, rate=0.5, exclude=[1])  # 1 starts each sequence
        >>> inputs = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 4, -1, -1]])
        >>> replace(inputs, generator=torch.Generator().manual_seed(0))
        tensor([[ 1,  7,  6,  7,  8],
                [ 1,  4,  4, -1, -1]])
        >>> bool((replace.eval()(inputs) == inputs).all())
        True

    References:
        - https://kexue.fm/archives/7259, its section on building negative samples
    """

    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        prob: float = 0.5,
        rate: float = 0.3,
        *,
        pool: Pool = "target",
        exclude: Sequence[int] = (),
        num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.prob = check_share(_OWNER, "prob", prob)
        self.rate = check_share(_OWNER, "rate", rate)
        if pool not in get_args(Pool):
            raise ArgumentError(
                f"`pool` of {_OWNER} must be one of {', '.join(map(repr, get_args(Pool)))}. "
                f"Found {pool!r}.{did_you_mean(str(pool), get_args(Pool))}",
                argument="pool",
            )
        self.pool = pool
        self.exclude = _checked_exclude(exclude)
        self.num_tokens = _checked_size(num_tokens, pool, self.exclude)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        size = "" if self.num_tokens is None else f", num_tokens={self.num_tokens}"
        rest = f"pool={self.pool!r}, exclude={list(self.exclude)}{size}"
        return f"prob={self.prob:g}, rate={self.rate:g}, {rest}"

    def forward(
        self,
        tokens: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"] | None = None,
        *,
        source: Int[Tensor, "row source_time"] | None = None,
        source_mask: Bool[Tensor, "row source_time"] | None = None,
        generator: Generators = None,
    ) -> Int[Tensor, "row time"]:
        """Return what the decoder reads instead; in evaluation the tokens themselves.

        Args:
            tokens: The decoder's inputs, the target behind its start token; of any integer type.
            mask: True at real tokens; by default where ids are not negative. Padding is neither
                replaced nor a donor.
            source: What the encoder reads; for ``pool="source_target"``, and ignored otherwise.
            source_mask: As ``mask``, of the source.
            generator: Source of randomness, on the tokens' device: one for all rows, or a list
                with one per row; the global one by default.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, the source is missing, or a generator is
                on another device.
        """
        check_ids(_OWNER, "tokens", tokens)
        check_mask(_OWNER, "mask", mask, tokens.shape, "tokens")
        if not self.training:
            return tokens
        return self._replaced(tokens, mask, source, source_mask, generator)

    def sample(
        self,
        target: Int[Tensor, "row time"],
        num_samples: int = 1,
        *,
        mask: Bool[Tensor, "row time"] | None = None,
        source: Int[Tensor, "row source_time"] | None = None,
        source_mask: Bool[Tensor, "row source_time"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw several replacements of the same sequences, in training and evaluation alike.

        Args:
            target: Token ids, padded with -1 or masked.
            num_samples: How many draws of all rows.
            mask: True at real tokens; by default where ids are not negative.
            source: For ``pool="source_target"``, and ignored otherwise.
            source_mask: As ``mask``, of the source.
            generator: Source of randomness; the global one by default.

        Returns:
            ``values`` of shape ``[sample, row, time]``; as diagnostics the shares of rows and of
            real tokens that are not what they were.

        Raises:
            ArgumentError: If ``num_samples`` is negative, and as :meth:`forward`.
        """
        check_ids(_OWNER, "target", target)
        check_mask(_OWNER, "mask", mask, target.shape, "target")
        if not isinstance(num_samples, int) or num_samples < 0:
            raise ArgumentError(
                f"`num_samples` of {_OWNER} must be a whole number, at least 0. "
                f"Found {num_samples!r}.",
                argument="num_samples",
            )

        def again(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.repeat(num_samples, 1)

        ids = target.repeat(num_samples, 1)
        values = self._replaced(ids, again(mask), again(source), again(source_mask), generator)
        values = values.view(num_samples, *target.shape)
        changed = values != target
        real = int((target >= 0 if mask is None else mask).sum()) * num_samples
        diagnostics = {
            "changed_rows": float(changed.any(2).sum()) / max(1, num_samples * len(target)),
            "changed_tokens": float(changed.sum()) / max(1, real),
        }
        return Samples(values, diagnostics)

    def _replaced(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        source: Tensor | None,
        source_mask: Tensor | None,
        generator: Generators,
    ) -> Tensor:
        own = self._counts(tokens, mask)
        rank = own.cumsum(1)
        bits = draw_bits(_OWNER, tokens, generator)
        of_token = of_tokens(bits, rank)
        swapped = own & coins(bits[:, :1], self.prob) & coins(of_token, self.rate)
        choice = of_token & ((1 << BITS) - 1)
        if self.pool == "vocab":
            donors = self._any_id(choice).to(tokens.dtype)
        elif self.pool == "batch":
            donors = _kth(tokens.reshape(1, -1), own.reshape(1, -1), choice.reshape(1, -1))
            donors = donors.view_as(tokens)
        elif self.pool == "source_target":
            read = self._source(tokens, source, source_mask)
            donors = _kth(
                torch.cat([read, tokens], 1),
                torch.cat([self._counts(read, source_mask), own], 1),
                choice,
            )
        else:
            donors = _kth(tokens, own, choice)
        return torch.where(swapped, donors, tokens)

    def _counts(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return where a token may be replaced or a donor."""
        counts = tokens >= 0 if mask is None else mask
        for excluded in self.exclude:  # a few numbers: a tensor of them would be copied each time
            counts = counts & (tokens != excluded)
        return counts

    def _any_id(self, choice: Tensor) -> Tensor:
        """Return ids below ``num_tokens``, stepping over the excluded ones in rising order."""
        skipped = [i for i in self.exclude if i < (self.num_tokens or 0)]
        ids = choice * ((self.num_tokens or 0) - len(skipped)) >> BITS
        for excluded in skipped:
            ids = ids + (ids >= excluded)
        return ids

    def _source(self, tokens: Tensor, source: Tensor | None, mask: Tensor | None) -> Tensor:
        if source is None:
            raise ArgumentError(
                f"`source` of {_OWNER} must be given for pool='source_target'. Found None. "
                f"Without a source use pool='target'.",
                argument="source",
            )
        check_ids(_OWNER, "source", source)
        check_mask(_OWNER, "source_mask", mask, source.shape, "source")
        if len(source) != len(tokens):
            raise ArgumentError(
                f"`source` of {_OWNER} must have a row for each of the {len(tokens)} targets. "
                f"Found {len(source)}.",
                argument="source",
            )
        return source.to(tokens.dtype)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences of up to eight tokens, to be drawn five times."""
        target = torch.randint(2, 50, (3, 8), generator=generator)
        lengths = torch.tensor([8, 5, 1])
        target = target.where(torch.arange(8) < lengths[:, None], PAD)
        inputs: dict[str, Any] = {"target": target, "num_samples": 5}
        return Example({"prob": 0.8}, inputs)


def _kth(tokens: Tensor, counts: Tensor, choice: Tensor) -> Tensor:
    """Return, of the tokens that count, uniform draws.

    Args:
        tokens: Shape ``[row, place]``.
        counts: Shape ``[row, place]``, true at candidates.
        choice: Shape ``[row, time]``, uniform below 2^31.

    Returns:
        Shape ``[row, time]``; anything in rows without candidates.
    """
    rank = counts.cumsum(1)
    places = tokens.shape[1]  # one more takes what does not count
    candidates = tokens.new_zeros(len(tokens), places + 1)
    candidates.scatter_(1, torch.where(counts, rank - 1, places), tokens)
    k = choice * rank[:, -1:] >> BITS  # floor(u n), exactly: below n
    return candidates.gather(1, k)


def _checked_exclude(exclude: Sequence[int]) -> tuple[int, ...]:
    ids = list(exclude) if isinstance(exclude, Sequence) else [exclude]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ArgumentError(
            f"`exclude` of {_OWNER} must be token ids, whole numbers from 0. Found {exclude!r}.",
            argument="exclude",
        )
    return tuple(sorted(set(ids)))


def _checked_size(num_tokens: int | None, pool: str, exclude: tuple[int, ...]) -> int | None:
    if pool != "vocab":
        return num_tokens
    if not isinstance(num_tokens, int) or num_tokens <= sum(i < num_tokens for i in exclude):
        raise ArgumentError(
            f"`num_tokens` of {_OWNER} must be the size of the vocabulary for pool='vocab', and "
            f"more than its excluded ids. Found {num_tokens!r}.",
            argument="num_tokens",
        )
    return num_tokens
