"""The constraint in the form of a transformers ``LogitsProcessor``."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from kexue.core import ArgumentError
from kexue_trie_decoding.index import TrieIndex
from kexue_trie_decoding.kernels import Array, copied, match, tensor, view

__all__ = ["TrieLogitsProcessor"]


class TrieLogitsProcessor:
    """Constrains transformers' ``generate`` to the entries of an index.

    For ``model.generate(…, logits_processor=[…])``, greedy, beams or sampling; in place of
    ``prefix_allowed_tokens_fn``, which is called in Python for every beam at every step. It takes
    any row order, remembers the nodes of the last step, and finds each row's by its tokens; what
    it does not find it walks again from the root.

    A row that leaves the tree, because there are more beams than continuations, may only end.

    Args:
        index: The entries; its end token must be the model's.
        start: How many tokens stand before the sequence: the prompt's, or for an encoder-decoder
            the start token. By default those of the first call, and then the object serves one
            call of ``generate``.

    Example:
        >>> import torch
        >>> from kexue_trie_decoding import TrieIndex, TrieLogitsProcessor
        >>> allowed = TrieLogitsProcessor(TrieIndex.build([[2, 3], [2, 4]], end_id=0), start=1)
        >>> allowed(torch.tensor([[9, 2]]), torch.zeros(1, 5))
        tensor([[-inf, -inf, -inf, 0., 0.]])

    Reference: Su, Seq2Seq+前缀树, 2021, https://kexue.fm/archives/8802.
    """

    def __init__(self, index: TrieIndex, *, start: int | None = None) -> None:
        self.index = index
        self.start = start
        self._seen: tuple[Array, Array] | None = None  # tokens [row, time], nodes [row]

    def __call__(
        self, input_ids: Int[Tensor, "row time"], scores: Float[Tensor, "row token"]
    ) -> Float[Tensor, "row token"]:
        """Return the scores with -inf at every token that leads out of the database.

        Args:
            input_ids: Prompt and tokens so far.
            scores: Logits or log-probabilities of the next token.

        Raises:
            ArgumentError: If rows that were given, not generated, begin no entry.
        """
        if self.start is None:
            self.start = input_ids.shape[1]
        if input_ids.shape[1] < self.start:
            raise ArgumentError(
                f"`input_ids` must hold the {self.start} tokens before the sequence. Found "
                f"{input_ids.shape[1]}. Give `start`, or make a TrieLogitsProcessor for each call "
                f"of generate.",
                argument="input_ids",
            )
        if self.index.device != scores.device:
            self.index, self._seen = self.index.to(scores.device), None
        ids = view(input_ids)[:, self.start :]
        nodes = self._nodes(ids)
        self._seen = copied(ids), nodes
        return self.index.masked(scores, nodes)

    def _nodes(self, ids: Array) -> Array:
        found = self._continued(ids)
        if found is not None:
            return found
        nodes = self._from_root(tensor(ids))
        lost = (nodes < 0).nonzero().flatten().tolist()
        if lost:
            raise ArgumentError(
                f"`input_ids` must continue as an entry of the database does. Row {lost[0]} does "
                f"not, from place {self.start}. Give `start`, the length of the prompt.",
                argument="input_ids",
            )
        return view(nodes)

    def _from_root(self, ids: Tensor) -> Tensor:
        """Walk; what stands behind the end token is padding."""
        ended = (ids == self.index.end_id).cumsum(1)
        behind = ended - (ids == self.index.end_id).long() > 0
        return self.index.walk(ids.masked_fill(behind, -1))

    def _continued(self, ids: Array) -> Array | None:
        """Return the nodes if every row is one of the last step's, in any order, and a token."""
        if self._seen is None or ids.shape[1] != self._seen[0].shape[1] + 1:
            return None
        before, nodes = self._seen
        if not len(nodes):
            return None
        rows = match(before, ids[:, :-1])
        return None if rows is None else self.index.tree.follow(nodes[rows], ids[:, -1])
