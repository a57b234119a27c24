"""Which tags may follow each other, begin and end a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from kexue.core.errors import ArgumentError, did_you_mean

__all__ = ["SCHEMES", "Constraints", "scheme_constraints"]

SCHEMES: Mapping[str, Mapping[str, str]] = {
    "BMES": {"B": "begin", "M": "inside", "E": "end", "S": "single", "O": "outside"},
    "BMEWO": {"B": "begin", "M": "inside", "E": "end", "W": "single", "O": "outside"},
    "BIES": {"B": "begin", "I": "inside", "E": "end", "S": "single", "O": "outside"},
    "BIOES": {"B": "begin", "I": "inside", "E": "end", "S": "single", "O": "outside"},
    "BILOU": {"B": "begin", "I": "inside", "L": "end", "U": "single", "O": "outside"},
    "BIO": {"B": "begin", "I": "inside", "O": "outside"},
    "IOB2": {"B": "begin", "I": "inside", "O": "outside"},
}
"""The letters of each scheme and what they say of a position in a span."""


@dataclass(frozen=True, eq=False, slots=True)
class Constraints:
    """What is allowed.

    Args:
        start: ``[tag]``, true for tags that may be the first.
        transitions: ``[from, to]``, true for tags that may be neighbours.
        end: ``[tag]``, true for tags that may be the last.

    Raises:
        ArgumentError: If shapes do not fit or something is not bool.

    Example:
        >>> import torch
        >>> allowed = torch.tensor([[True, False], [True, True]])
        >>> Constraints(torch.tensor([True, False]), allowed, torch.tensor([True, True])).reach
        inf
    """

    start: Bool[Tensor, " tag"]
    transitions: Bool[Tensor, "tag tag"]
    end: Bool[Tensor, " tag"]

    def __post_init__(self) -> None:
        tags = len(self.start) if self.start.dim() == 1 else -1
        for name, value, shape in (
            ("start", self.start, (tags,)),
            ("transitions", self.transitions, (tags, tags)),
            ("end", self.end, (tags,)),
        ):
            if tuple(value.shape) != shape or value.dtype != torch.bool:
                raise ArgumentError(
                    f"`{name}` of Constraints must be bool, `start` and `end` of shape [tag] and "
                    f"`transitions` [tag, tag]. Found {value.dtype} {list(value.shape)}.",
                    argument=name,
                )

    @property
    def reach(self) -> float:
        """In how many steps exactly any tag leads to any other; infinite if in no number.

        The smallest power of the matrix without a zero. By Wielandt's theorem it is at most
        (tag - 1)² + 1 if there is one; powers beyond 2 tags are not looked for, no scheme has them.
        """
        step = self.transitions.float()
        paths = step
        for length in range(1, 2 * len(step) + 1):
            if bool(paths.all()):
                return length
            paths = (paths @ step).clamp(max=1)
        return torch.inf

    def __and__(self, other: Constraints) -> Constraints:
        """Return what both allow."""
        return Constraints(
            self.start & other.start,
            self.transitions & other.transitions,
            self.end & other.end,
        )


def scheme_constraints(tag_names: Sequence[str], scheme: str) -> Constraints:
    """Return what a tagging scheme allows.

    A tag is a letter, alone or with a type: ``B``, ``b``, ``B-PER``, ``B_PER``. With a letter for
    the end of a span (BMES and its relatives) a span is begin, inside …, end of one type, or a
    single; in BIO (IOB2) it is begin, inside … of one type. What is not inside a span may follow
    whatever closes one.

    Args:
        tag_names: The name of each tag, in order.
        scheme: One of :data:`SCHEMES`, in upper or lower case.

    Raises:
        ArgumentError: If the scheme is unknown or a name is not of it.

    Example:
        >>> scheme_constraints(["s", "b", "m", "e"], "BMES").transitions.int()
        tensor([[1, 1, 0, 0],
                [0, 0, 1, 1],
                [0, 0, 1, 1],
                [1, 1, 0, 0]], dtype=torch.int32)
    """
    letters = SCHEMES.get(scheme.upper())
    if letters is None:
        raise ArgumentError(
            f"`scheme` must be one of {', '.join(SCHEMES)}. Found {scheme!r}."
            f"{did_you_mean(scheme, SCHEMES)}",
            argument="scheme",
        )
    parsed = [_parse(name, scheme, letters) for name in tag_names]
    closes = "end" in letters.values()
    opening = torch.tensor([role not in {"inside", "end"} for role, _ in parsed])
    closing = torch.tensor([not closes or role not in {"begin", "inside"} for role, _ in parsed])
    within = torch.tensor(
        [
            [a in {"begin", "inside"} and b in {"inside", "end"} and x == y for b, y in parsed]
            for a, x in parsed
        ]
    )
    return Constraints(opening, within | (closing[:, None] & opening), closing)


def _parse(name: str, scheme: str, letters: Mapping[str, str]) -> tuple[str, str]:
    """Return role and type of a tag."""
    letter, kind = name[:1].upper(), name[1:]
    if letter not in letters or (kind and kind[0] not in "-_"):
        raise ArgumentError(
            f"`tag_names` of scheme {scheme} must be {', '.join(letters)}, alone or with a type "
            f"as in 'B-PER'. Found {name!r}; pass `constraints` for tags outside the scheme.",
            argument="tag_names",
        )
    return letters[letter], kind[1:]
