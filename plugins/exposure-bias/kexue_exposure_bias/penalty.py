"""Cross-entropy that is flat around the embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kexue.core import ArgumentError, Example
from kexue.core.interfaces.loss import Loss, reduce
from kexue_exposure_bias.checks import check_mask, check_number

__all__ = ["GradientPenaltyEmbedding", "gradient_penalty"]

_OWNER = "GradientPenaltyEmbedding"

Tensors = Tensor | Sequence[Tensor]


class GradientPenaltyEmbedding(Loss):
    r"""Cross-entropy plus a gradient penalty: logits and ids [batch, time] to R, per sequence.

    With L the cross-entropy of the next tokens and E the embedding matrix, the objective is

    .. math::
        L + \frac{\varepsilon}{2} \Big\| \frac{\partial L}{\partial E} \Big\|_F^2,

    to first order in epsilon what L becomes when the embeddings are moved by
    :math:`\varepsilon\, \partial L / \partial E`, uphill: adversarial training without a second
    pass forward (posts 7234 and 7259). A model that is right on a neighbourhood of what it reads
    is less led astray by a wrong token; but the token may lie far outside of it.

    Choose what the gradient is taken of by the arguments of :meth:`forward`:

    - ``embedding``, the matrix, as in the posts: one penalty on the gradient of the reduced loss;
    - ``inputs``, the embedded inputs: per sequence, the gradient of its own loss, the form that
      post 7234 derives before it simplifies;
    - neither: of the logits, the same at the last layer, where the gradient is softmax minus
      target; it needs no graph.

    Costs two to three plain steps with a graph: the gradient is differentiated again. That rules
    out operations without a second derivative: fused attention kernels (choose
    ``torch.nn.attention.SDPBackend.MATH``) and cuDNN's recurrences (switch off by
    ``torch.backends.cudnn.flags(enabled=False)``).

    Deviations from the posts: none for ``embedding`` with ``token_mean``; the posts' code sums over
    the matrix of a single embedding, here it may be several. The gradient grows with the loss, so
    epsilon means another thing for each reduction: the posts' 1 goes with ``token_mean``.

    Args:
        epsilon: Weight of the penalty, at least 0.
        reduction: ``"token_mean"`` over the real tokens of all, ``"mean"`` or ``"sum"`` over
            sequences, or ``"none"`` (not for ``embedding``, which all sequences share).

    Raises:
        ArgumentError: If ``epsilon`` is negative or not finite, or ``reduction`` unknown.

    Example:
        >>> import torch
        >>> from kexue_exposure_bias import GradientPenaltyEmbedding
        >>> embedding = torch.nn.Embedding(5, 4)
        >>> head = torch.nn.Linear(4, 5)
        >>> read, target = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
        >>> loss = GradientPenaltyEmbedding()(
        ...     head(embedding(read)), target, embedding=embedding.weight
        ... )
        >>> loss.backward()
        >>> GradientPenaltyEmbedding(reduction="none")(torch.zeros(1, 3, 2), target - target)
        tensor([2.8294])

    References:
        - https://kexue.fm/archives/7259, its section on adversarial training
        - https://kexue.fm/archives/7234
    """

    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum", "token_mean")

    def __init__(
        self,
        epsilon: float = 1.0,
        *,
        reduction: Literal["none", "mean", "sum", "token_mean"] = "token_mean",
    ) -> None:
        super().__init__(reduction)
        self.epsilon = check_number(_OWNER, "epsilon", epsilon)
        self._looked = False

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"epsilon={self.epsilon:g}, reduction={self.reduction!r}"

    def forward(
        self,
        logits: Float[Tensor, "batch time token"],
        target: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        embedding: Any = None,
        inputs: Any = None,
    ) -> Tensor:
        """Return the objective, in nats (squared nats per squared unit in the penalty).

        Args:
            logits: Scores of the next token; float16 and bfloat16 are computed in float32.
            target: Ids of the next tokens.
            mask: True at real tokens; by default where the target is not negative.
            embedding: The embedding matrix, or several, that ``logits`` were computed from.
            inputs: Tensors ``[batch, …]`` that ``logits`` were computed from, each row from its
                own: the outputs of embeddings.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, a target is out of range, ``logits``
                were not computed from what is to be differentiated, or cannot be differentiated
                twice, or gradients are switched off while there is something to differentiate.
        """
        mask = _checked(logits, target, mask)
        rows, slopes = _cross_entropy(logits, target, mask)
        penalised = rows
        if inputs is not None:
            penalised = rows + self._penalty(rows.sum(), inputs, "inputs", len(rows))
        elif embedding is None:
            penalised = rows + self.epsilon / 2 * slopes
        objective = self._reduced(penalised, mask)
        if embedding is None:
            return objective
        if self.reduction == "none":
            raise ArgumentError(
                f"`embedding` of {_OWNER} is shared by all sequences, which leaves no value per "
                f"sequence for reduction='none'. Use `inputs`, or another reduction.",
                argument="embedding",
            )
        return objective + self._penalty(self._reduced(rows, mask), embedding, "embedding")

    def _reduced(self, rows: Tensor, mask: Tensor) -> Tensor:
        if self.reduction == "token_mean":
            return rows.sum() / mask.sum().clamp(min=1)
        return reduce(rows, self.reduction)

    def _penalty(self, loss: Tensor, wrt: Any, name: str, rows: int | None = None) -> Tensor:
        """Return half epsilon times the squared norm of the gradient, in all or per row."""
        if not self.epsilon:
            return torch.zeros_like(loss)
        gradients = _gradients(_OWNER, loss, _tensors(_OWNER, wrt, name, rows), name)
        if not self._looked:
            _check_twice(_OWNER, gradients, name)
            self._looked = True
        squares = [_exact(g).square() for g in gradients]
        norms = [s.sum() if rows is None else s.flatten(1).sum(1) for s in squares]
        return self.epsilon / 2 * torch.stack(norms).sum(0)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences of up to five tokens out of six."""
        inputs: dict[str, Any] = {
            "logits": torch.randn(3, 5, 6, generator=generator),
            "target": torch.randint(6, (3, 5), generator=generator),
            "mask": torch.arange(5) < torch.tensor([5, 3, 1])[:, None],
        }
        return Example({}, inputs)


def gradient_penalty(loss: Tensor, wrt: Tensors, epsilon: float = 1.0) -> Tensor:
    r"""Return :math:`\frac{\varepsilon}{2} \| \partial L / \partial E \|^2` of any loss.

    For losses that a model computes itself: ``(loss + gradient_penalty(loss, weight)).backward()``.

    Args:
        loss: L, a scalar with its graph.
        wrt: E, one tensor or several that the loss was computed from.
        epsilon: Weight, at least 0.

    Raises:
        ArgumentError: If ``loss`` is not a scalar with a graph, was not computed from ``wrt``, or
            cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from kexue_exposure_bias import gradient_penalty
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> gradient_penalty(x.square().sum(), x)  # (2 x)^2 / 2
        tensor(18., grad_fn=<MulBackward0>)
    """
    owner = "gradient_penalty"
    check_number(owner, "epsilon", epsilon)
    if loss.numel() != 1:
        raise ArgumentError(
            f"`loss` of {owner} must be a scalar. Found shape {list(loss.shape)}. Reduce it first.",
            argument="loss",
        )
    gradients = _gradients(owner, loss, _tensors(owner, wrt, "wrt"), "wrt")
    _check_twice(owner, gradients, "wrt")
    return epsilon / 2 * torch.stack([_exact(g).square().sum() for g in gradients]).sum()


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cross_entropy(logits: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the squared norm of its gradient in the logits, summed over time."""
    log_p = torch.log_softmax(_exact(logits).masked_fill(~mask[..., None], 0.0), -1)
    chosen = target.long().where(mask, 0)[..., None]
    losses = -log_p.gather(-1, chosen)[..., 0]
    slopes = log_p.exp().scatter_add(-1, chosen, -torch.ones_like(log_p[..., :1]))  # p - y
    return (losses * mask).sum(1), (slopes.square().sum(-1) * mask).sum(1)


# -- what can be differentiated --------------------------------------------------------------------


def _tensors(owner: str, wrt: Any, name: str, rows: int | None = None) -> list[Tensor]:
    """Return one or several tensors as a list, refusing what cannot have a gradient."""
    tensors = [wrt] if isinstance(wrt, Tensor) or not isinstance(wrt, Iterable) else list(wrt)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            found = "one that requires none" if isinstance(tensor, Tensor) else repr(tensor)
            raise ArgumentError(
                f"`{name}` of {owner} must be a tensor that requires a gradient and that the loss "
                f"was computed from, or several. Found {found}.",
                argument=name,
            )
        if rows is not None and (not tensor.ndim or len(tensor) != rows):
            raise ArgumentError(
                f"`{name}` of {owner} must have a row for each of the {rows} sequences. Found "
                f"shape {list(tensor.shape)}. A matrix that all share is `embedding`.",
                argument=name,
            )
    if not tensors:
        raise ArgumentError(f"`{name}` of {owner} must not be empty.", argument=name)
    return tensors


def _gradients(owner: str, loss: Tensor, tensors: list[Tensor], name: str) -> list[Tensor]:
    """Return the gradients, to be differentiated again."""
    if not torch.is_grad_enabled() or not loss.requires_grad:
        raise ArgumentError(
            f"`{name}` of {owner} needs the graph that the loss was computed by. Found none. "
            f"Leave `torch.no_grad()`, or take the plain loss for validation.",
            argument=name,
        )
    found = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    gradients = []
    for gradient in found:
        if gradient is None:
            raise ArgumentError(
                f"`{name}` of {owner} must be what the loss was computed from. "
                f"Found a tensor that it does not depend on.",
                argument=name,
            )
        if gradient.layout != torch.strided:
            raise ArgumentError(
                f"`{name}` of {owner} must have a dense gradient. Found a sparse one. "
                f"Build the embedding with `sparse=False`.",
                argument=name,
            )
        gradients.append(gradient)
    return gradients


def _check_twice(owner: str, gradients: list[Tensor], name: str) -> None:
    """Look through the graph of the gradients for operations without a second derivative.

    They would fail in the caller's ``backward`` only, with a message that names no remedy.
    """
    ahead: list[Any] = [gradient.grad_fn for gradient in gradients]
    seen = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("NotImplemented"):
            raise ArgumentError(
                f"`{name}` of {owner} must be followed by operations that can be differentiated "
                f"twice. Found one that cannot, such as a fused kernel. For attention use "
                f"`with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, for recurrences "
                f"`torch.backends.cudnn.flags(enabled=False)`.",
                argument=name,
            )
        ahead += [following for following, _ in node.next_functions]


def _checked(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask of a call that fits."""
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ArgumentError(
            f"`logits` of {_OWNER} must be floating-point scores of shape [batch, time, token]. "
            f"Found {logits.dtype} of shape {list(logits.shape)}.",
            argument="logits",
        )
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if not whole or target.shape != logits.shape[:2]:
        raise ArgumentError(
            f"`target` of {_OWNER} must hold integer ids of shape [batch, time] = "
            f"{list(logits.shape[:2])}. Found {target.dtype} of shape {list(target.shape)}.",
            argument="target",
        )
    check_mask(_OWNER, "mask", mask, target.shape, "target")
    real = target >= 0 if mask is None else mask
    faults = ((target < 0) | (target >= logits.shape[2])) & real
    if faults.any():
        where = faults.nonzero()[0].tolist()
        raise ArgumentError(
            f"`target` of {_OWNER} must be ids below {logits.shape[2]}, the number of tokens, "
            f"where `mask` is true. Found {target[tuple(where)].item()} at position {where}.",
            argument="target",
        )
    return real
