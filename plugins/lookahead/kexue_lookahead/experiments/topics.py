"""Lines of text with their topics, and a classifier of them with an embedding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Classifier", "padded", "sentences"]

_WIDTH = 32


class Classifier(nn.Module):
    """The mean of embeddings and a linear layer; word 0 fills up lines.

    Args:
        vocabulary: How many words.
        classes: How many topics.
    """

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, _WIDTH, padding_idx=0)
        self.out = nn.Linear(_WIDTH, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Return the scores of lines, ``[line, word]`` to ``[line, class]``."""
        counts = words.ne(0).sum(1, keepdim=True)
        scores: Tensor = self.out(self.embed(words).sum(1) / counts)
        return scores


def sentences() -> tuple[list[Tensor], Tensor, int]:
    """Return the words of lines as numbers from 1, the topics of the lines, and how many words.

    Topics are those with at least forty lines; lines that several topics share are left out.
    """
    from pydoc_data.topics import topics

    lines = {
        name: {" ".join(re.findall(r"[a-z_]+", line.lower())) for line in value.splitlines()}
        for name, value in topics.items()
    }
    owners = Counter(line for value in lines.values() for line in value)
    kept = {
        name: sorted(x for x in value if owners[x] == 1 and len(x.split()) >= 5)
        for name, value in sorted(lines.items())
    }
    kept = {name: value for name, value in kept.items() if len(value) >= 40}
    numbers: dict[str, int] = {}
    ids, labels = [], []
    for label, value in enumerate(kept.values()):
        for line in value:
            words = [numbers.setdefault(word, len(numbers) + 1) for word in line.split()]
            ids.append(torch.tensor(words))
            labels.append(label)
    return ids, torch.tensor(labels), len(numbers) + 1


def padded(lines: Sequence[Tensor]) -> Tensor:
    """Return lines as one tensor, ``[line, word]``, filled up by word 0."""
    return nn.utils.rnn.pad_sequence(list(lines), batch_first=True)
