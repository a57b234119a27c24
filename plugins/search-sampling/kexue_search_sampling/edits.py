"""Insert, delete and replace: the moves of a chain of token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kexue.core import ArgumentError
from kexue.core.component import PAD
from kexue_search_sampling.proposals import Proposal

__all__ = ["EditProposal"]

_INSERT, _DELETE, _REPLACE = range(3)


class EditProposal(Proposal):
    """Inserts a token, deletes one, or replaces one, at a uniform place.

    Of the moves that a sequence of n tokens allows, one is chosen by its weight: p_ins(n),
    p_del(n), p_rep(n). A new token v comes from q(v). Inserting v leads from x to y in as many ways
    as deleting leads back, the length of the run of v in y, so these cancel in the correction:

        insert   log p_del(n + 1) / (p_ins(n) q(v))
        delete   log p_ins(n - 1) q(w) / p_del(n)
        replace  log q(w) / q(v)

    where w is the token that goes.

    Args:
        num_tokens: Tokens to choose from.
        max_length: Tokens of the longest sequence.
        min_length: Tokens of the shortest.
        weights: How often to insert, delete and replace.
        token_logits: Logits ``[token]`` of q; uniform by default. What q never draws is never
            left.

    Raises:
        ArgumentError: If the lengths, weights or logits are not of their form.
    """

    def __init__(
        self,
        num_tokens: int,
        max_length: int,
        *,
        min_length: int = 0,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        token_logits: Tensor | None = None,
    ) -> None:
        if num_tokens < 1 or not 0 <= min_length <= max_length or max_length < 1:
            raise ArgumentError(
                f"`max_length` of EditProposal must be at least 1 and `min_length`. "
                f"Found {max_length} and {min_length}, of {num_tokens} tokens.",
                argument="max_length",
            )
        three = len(weights) == 3 and min(weights) >= 0
        shares = _moves(max_length, min_length, weights if three else (0.0, 0.0, 0.0))
        if not (shares[min_length:].sum(1) > 0).all():
            raise ArgumentError(
                f"`weights` of EditProposal must be three numbers, not negative, that leave every "
                f"length a move. Found {list(weights)}.",
                argument="weights",
            )
        logits = torch.zeros(num_tokens) if token_logits is None else token_logits.detach()
        if logits.shape != (num_tokens,) or not (logits < torch.inf).all():
            raise ArgumentError(
                f"`token_logits` of EditProposal must have shape [{num_tokens}] and no NaN. Found "
                f"{list(logits.shape)}.",
                argument="token_logits",
            )
        self.num_tokens, self.min_length, self.max_length = num_tokens, min_length, max_length
        self.log_q = logits.double().log_softmax(0)
        self.log_moves = (shares / shares.sum(1, keepdim=True)).log()
        self._token_cdf = self.log_q.exp().cumsum(0)
        self._move_cdf = self.log_moves.exp().cumsum(1)[:, :2].contiguous()

    def randomness(
        self, points: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return three uniform numbers per step and chain: for the move, its place, its token."""
        return torch.rand(
            (steps, len(points), 3), generator=generator, dtype=torch.float64, device=points.device
        )

    def propose(self, points: Tensor, random: Tensor) -> tuple[Tensor, Tensor | None]:
        """Edit each sequence once."""
        log_q, log_moves = self.log_q.to(points.device), self.log_moves.to(points.device)
        lengths = (points != PAD).sum(1)
        move = (random[:, :1] >= self._move_cdf.to(points.device)[lengths]).sum(1)
        inserts, deletes = move == _INSERT, move == _DELETE
        place = (random[:, 1] * (lengths + inserts)).long()
        level = random[:, 2].contiguous()
        new = torch.searchsorted(self._token_cdf.to(points.device), level, right=True)
        new.clamp_(max=self.num_tokens - 1)  # rounding may leave the last sum below 1
        edited, old = _edited(points, place, new, inserts, deletes)
        after = lengths + inserts.long() - deletes.long()
        forward = log_moves[lengths].gather(1, move[:, None])[:, 0]
        back = torch.where(inserts, _DELETE, torch.where(deletes, _INSERT, _REPLACE))
        backward = log_moves[after.clamp(0, self.max_length)].gather(1, back[:, None])[:, 0]
        gain = torch.where(inserts, 0.0, log_q[old]) - torch.where(deletes, 0.0, log_q[new])
        return edited, backward - forward + gain

    def log_prob(self, proposed: Tensor, points: Tensor) -> Tensor:
        """Return log q(proposed | points), the sum over all edits that lead there."""
        log_q, log_moves = self.log_q.to(points.device), self.log_moves.to(points.device)
        lengths, after = (points != PAD).sum(1), (proposed != PAD).sum(1)
        share = log_moves[lengths].exp()
        q = torch.cat([log_q.exp(), log_q.new_zeros(1)])  # the last is that of PAD
        differs = proposed != points
        replaced = torch.where(differs.sum(1, keepdim=True) == 0, points != PAD, differs)
        count = lengths.double()
        ways = (q[proposed] * replaced).sum(1) * (differs.sum(1) <= 1) / count.clamp(min=1)
        found = share[:, _REPLACE] * ways * (lengths == after)
        deleted = _deletions(points, proposed).sum(1) / count.clamp(min=1)
        found += share[:, _DELETE] * deleted * (after == lengths - 1)
        inserted = (_deletions(proposed, points) * q[proposed]).sum(1) / (count + 1)
        found += share[:, _INSERT] * inserted * (after == lengths + 1)
        return found.log()


def _moves(max_length: int, min_length: int, weights: Sequence[float]) -> Tensor:
    """Return the weights of the moves that a length allows, shape ``[length, move]``."""
    lengths = torch.arange(max_length + 1)
    allowed = torch.stack([lengths < max_length, lengths > min_length, lengths > 0], 1)
    return allowed * torch.tensor(weights, dtype=torch.float64)


def _edited(
    points: Tensor, place: Tensor, new: Tensor, inserts: Tensor, deletes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the edited sequences and the tokens at the places before."""
    index = torch.arange(points.shape[1], device=points.device)
    at, moves_up, moves_down = place[:, None], inserts[:, None], deletes[:, None]
    source = index - (moves_up & (index > at)).long() + (moves_down & (index >= at)).long()
    padded = torch.cat([points, points.new_full((len(points), 1), PAD)], 1)
    edited = torch.where((index == at) & ~moves_down, new[:, None], padded.gather(1, source))
    return edited, padded.gather(1, at.clamp(max=points.shape[1]))[:, 0]


def _deletions(longer: Tensor, shorter: Tensor) -> Tensor:
    """Return ``[chain, place]``: whether ``longer`` without that token is ``shorter``."""
    chains, width = longer.shape
    index = torch.arange(width, device=longer.device)
    source = index + (index >= index[:, None]).long()  # [place, time]
    padded = torch.cat([longer, longer.new_full((chains, 1), PAD)], 1)
    without = padded[:, source.flatten()].view(chains, width, width)
    return (without == shorter[:, None]).all(2) & (longer != PAD)
