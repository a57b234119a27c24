r"""The distribution of how many classes are chosen, by a tree of products of polynomials.

If class i is chosen with probability p_i, independently, then the coefficient j of
:math:`\prod_i (1 - p_i + p_i x)` is the probability that j classes are chosen. The product is
taken pairwise, in halves, up to a degree: :math:`O(K k)` multiplications for K classes and degree
k, in log K rounds. All terms are positive, so nothing cancels.

Nodes have the shape ``[coefficient, node, batch]``: every operation runs over contiguous planes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["count_tree", "inclusion_odds"]


def count_tree(leaves: Tensor, degree: int) -> list[Tensor]:
    """Return the levels of the product tree, the leaves first.

    Args:
        leaves: 1 - p and p, shape ``[2, class, batch]``.
        degree: The highest power that is kept, at least 1.

    Returns:
        Nodes ``[coefficient, node, batch]``; the last level has one node.
    """
    levels = [leaves]
    while (nodes := levels[-1]).shape[1] > 1:
        half = nodes.shape[1] // 2
        product = _multiply(nodes[:, :half], nodes[:, half : 2 * half], degree)
        if nodes.shape[1] % 2:  # the odd one goes up as it is
            single = pad(nodes[:, -1:], (0, 0, 0, 0, 0, len(product) - len(nodes)))
            product = torch.cat([product, single], dim=1)
        levels.append(product)
    return levels


def inclusion_odds(levels: list[Tensor], seed: Tensor) -> Tensor:
    """Return the derivative of a weighted sum of the root's coefficients by the leaves.

    Args:
        levels: What :func:`count_tree` returns.
        seed: The weights, shape ``[coefficient, batch]``.

    Returns:
        Shape ``[2, class, batch]``: the factors of 1 - p and of p of each class.
    """
    outer = seed.unsqueeze(1)
    for nodes in reversed(levels[:-1]):
        length, count, batch = nodes.shape
        half = count // 2
        pairs = nodes[:, : 2 * half].view(length, 2, half, batch)
        inner = _correlate(outer[:, None, :half], pairs)
        single = outer[:length, half:]  # empty unless the count is odd
        outer = torch.cat([inner[:, 1], inner[:, 0], single], dim=1)
    return outer


def _multiply(left: Tensor, right: Tensor, degree: int) -> Tensor:
    """Return the product, c_n = sum_i a_i b_{n-i}, up to the degree."""
    terms = len(right)
    length = min(len(left) + terms - 1, degree + 1)
    product = left.new_zeros(length, *left.shape[1:])
    for i, coefficient in enumerate(left.unbind()):
        span = min(terms, length - i)
        product[i : i + span].addcmul_(coefficient, right[:span])
    return product


def _correlate(outer: Tensor, nodes: Tensor) -> Tensor:
    """Return the adjoint of the product, a_i = sum_j c_{i+j} b_j, by b in the place of b."""
    length, terms = len(outer), len(nodes)
    result = torch.zeros_like(nodes)
    for j, coefficient in enumerate(nodes.unbind()):
        span = min(terms, length - j)
        result[:span].addcmul_(coefficient, outer[j : j + span])
    return result
