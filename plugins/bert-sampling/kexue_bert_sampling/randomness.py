"""Random numbers by address: step, chain and place say which number it is, whatever else is drawn.

A generator of torch hands out numbers in the order in which they are asked for, so that a chain's
depend on how many chains stand beside it. Philox 4×32-10 maps a counter and a key to four words
without a state; all numbers of many steps are one call, and they are alike on every device.

Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011,
https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Randomness", "philox"]

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what the key grows by: the golden ratio and √3 - 1


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return four random words for each counter of four.

    Args:
        counter: Whole numbers below 2³² as int64, shapes that broadcast.
        key: Two words.

    Returns:
        Four tensors of whole numbers below 2³², of the shape that the counters have together.

    Example:
        >>> import torch
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        # the products have 64 bits: int64 wraps, and what >> copies into the high word is cut off
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (right >> 32) & _WORD ^ b ^ k,
            right & _WORD,
            (left >> 32) & _WORD ^ d ^ m,
            left & _WORD,
        )
        k, m = (k + _WEYL[0]) & _WORD, (m + _WEYL[1]) & _WORD
    return a, b, c, d


class Randomness:
    """All random numbers of a run, each with an address.

    Args:
        key: Two words that tell runs apart.
        device: Where the numbers are wanted.
        first: Number of the chain that is counted as 0.
    """

    def __init__(self, key: tuple[int, int], device: torch.device, *, first: int = 0) -> None:
        self.key, self.device, self.first = key, device, first

    @classmethod
    def of(
        cls, generator: torch.Generator | None, device: torch.device, *, first: int = 0
    ) -> Randomness:
        """Return the random numbers that two draws of a generator say.

        Args:
            generator: Where the key is from; the global generator by default.
            device: Where the numbers are wanted.
            first: Number of the chain that is counted as 0.
        """
        where = generator.device if generator is not None else torch.device("cpu")
        drawn = torch.randint(_WORD + 1, (2,), generator=generator, device=where).tolist()
        return cls((drawn[0], drawn[1]), device, first=first)

    def uniform(self, purpose: int, step: Tensor, chain: Tensor, place: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1) with 53 bits, in float64.

        Args:
            purpose: What they are for, so that two uses do not share numbers.
            step: Number of the step.
            chain: Number of the chain.
            place: Number of the place; broadcasts with the others.
        """
        counter = (step, chain + self.first, place, torch.full_like(place, purpose))
        high, low, _, _ = philox(counter, self.key)
        return ((high >> 5) * 2**26 + (low >> 6)).double() / 2.0**53
