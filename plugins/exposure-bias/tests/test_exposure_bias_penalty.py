"""The gradient penalty beside autograd, finite differences and the formulas of the posts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import ArgumentError
from kexue_exposure_bias import GradientPenaltyEmbedding, gradient_penalty

VOCABULARY = 7


class Model(nn.Module):
    """Embedding, GRU, scores: what the decoder of a seq2seq model is."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 4, **options)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.output = nn.Linear(5, VOCABULARY)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.of(self.embedding(ids.clamp(min=0)))

    def of(self, embedded: Tensor) -> Tensor:
        logits: Tensor = self.output(self.gru(embedded)[0])
        return logits


def task(rows: int = 3, time: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, time + 1), generator=generator)
    mask = torch.arange(time) < torch.tensor([5, 3, 1])[:rows, None]
    return ids[:, :-1], ids[:, 1:].where(mask, -1), mask


@pytest.mark.parametrize("reduction", ["mean", "sum", "token_mean"])
def test_matches_the_formula_for_the_matrix(reduction: Any) -> None:
    model, (read, target, mask) = Model(), task()
    weight = model.embedding.weight
    found = GradientPenaltyEmbedding(0.7, reduction=reduction)(
        model(read), target, embedding=weight
    )
    losses = F.cross_entropy(model(read).transpose(1, 2), target, ignore_index=-1, reduction="sum")
    loss = losses / {"mean": 3, "sum": 1, "token_mean": int(mask.sum())}[reduction]
    (gradient,) = torch.autograd.grad(loss, weight)
    wanted = loss + 0.35 * gradient.square().sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_the_parameters_get_the_gradient_of_the_whole() -> None:
    """Finite differences in every parameter, the embedding included."""
    model, (read, target, _) = Model(), task()
    criterion = GradientPenaltyEmbedding(0.7)
    criterion(model(read), target, embedding=model.embedding.weight).backward()
    step = 1e-6
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        values: list[float] = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            for old, new in zip(model.parameters(), moved.parameters(), strict=True):
                if old is parameter:
                    new.data += sign * step * direction
            value = criterion(moved(read), target, embedding=moved.embedding.weight)
            values.append(value.item())
        slope = (values[0] - values[1]) / (2 * step)
        assert parameter.grad is not None
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_is_what_moved_embeddings_cost_to_first_order() -> None:
    """L + ε/2 |g|² = L(E + ε/2 g) + O(ε²), which is why the posts call it adversarial."""
    model, (read, target, _) = Model(), task()
    weight = model.embedding.weight
    plain = GradientPenaltyEmbedding(0.0)
    (gradient,) = torch.autograd.grad(plain(model(read), target), weight)
    errors = []
    for epsilon in (1e-2, 1e-3):
        moved = copy.deepcopy(model)
        moved.embedding.weight.data += epsilon / 2 * gradient
        penalised = GradientPenaltyEmbedding(epsilon)(model(read), target, embedding=weight)
        errors.append(abs((plain(moved(read), target) - penalised).item()))
    assert errors[1] < errors[0] / 50


def test_inputs_are_penalised_per_sequence() -> None:
    model, (read, target, mask) = Model(), task()
    embedded = model.embedding(read)
    criterion = GradientPenaltyEmbedding(0.7, reduction="none")
    found = criterion(model.of(embedded), target, mask, inputs=embedded)
    for i in range(3):
        alone = model.embedding(read[i : i + 1, : int(mask[i].sum())]).detach().requires_grad_()
        loss = F.cross_entropy(model.of(alone)[0], target[i][mask[i]], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, alone)
        wanted = loss + 0.35 * gradient.square().sum()
        assert found[i].item() == pytest.approx(wanted.item(), rel=1e-12)


def test_the_logits_need_no_graph() -> None:
    logits = torch.randn(3, 5, VOCABULARY, dtype=torch.float64)
    _, target, mask = task()
    with torch.no_grad():
        found = GradientPenaltyEmbedding(0.7, reduction="none")(logits, target, mask)
    free = logits.clone().requires_grad_()
    wanted = GradientPenaltyEmbedding(0.7, reduction="none")(free, target, mask, inputs=free)
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_penalties_of_several_tensors_add_up() -> None:
    model, (read, target, _) = Model(), task()
    weight, bias = model.embedding.weight, model.output.bias
    embedded = model.embedding(read)
    logits = model.of(embedded)

    def penalty(**wrt: Any) -> float:
        criterion = GradientPenaltyEmbedding(reduction="sum")
        plain = GradientPenaltyEmbedding(0.0, reduction="sum")(logits, target)
        return float((criterion(logits, target, **wrt) - plain).item())

    both = penalty(embedding=[weight, bias])
    assert both == pytest.approx(penalty(embedding=weight) + penalty(embedding=(bias,)))
    all_three = penalty(embedding=[weight, bias], inputs=embedded)
    assert all_three == pytest.approx(both + penalty(inputs=embedded))


def test_agrees_with_the_penalty_of_any_loss() -> None:
    model, (read, target, _) = Model(), task()
    loss = GradientPenaltyEmbedding(0.0)(model(read), target)
    added = loss + gradient_penalty(loss, model.embedding.weight, 0.3)
    whole = GradientPenaltyEmbedding(0.3)(model(read), target, embedding=model.embedding.weight)
    assert added.item() == pytest.approx(whole.item(), rel=1e-12)


def test_epsilon_zero_is_cross_entropy_without_a_graph() -> None:
    model, (read, target, _) = Model(), task()
    with torch.no_grad():
        found = GradientPenaltyEmbedding(0.0)(
            model(read), target, embedding=model.embedding.weight, inputs=model.embedding(read)
        )
        wanted = F.cross_entropy(model(read).transpose(1, 2), target, ignore_index=-1)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_padding_changes_nothing() -> None:
    model, (read, target, mask) = Model(), task()
    criterion = GradientPenaltyEmbedding(reduction="sum")

    def value(read: Tensor, target: Tensor, mask: Tensor | None) -> float:
        found = criterion(model(read), target, mask, embedding=model.embedding.weight)
        return float(found.item())

    wanted = value(read, target, mask)
    assert value(read, target, None) == pytest.approx(wanted, rel=1e-12)
    wide, further = (F.pad(t, (0, 4), value=2) for t in (read, target))
    assert value(wide, further, F.pad(mask, (0, 4))) == pytest.approx(wanted, rel=1e-12)


def test_garbage_behind_the_mask_is_not_seen() -> None:
    _, target, mask = task()
    logits = torch.randn(3, 5, VOCABULARY).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    GradientPenaltyEmbedding()(logits, target, mask).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype: torch.dtype) -> None:
    model, (read, target, _) = Model(torch.float32), task()
    wanted = GradientPenaltyEmbedding()(model(read), target, embedding=model.embedding.weight)
    half = copy.deepcopy(model).to(dtype)
    found = GradientPenaltyEmbedding()(half(read), target, embedding=half.embedding.weight)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no rows", "no times"])
def test_takes_what_is_empty(shape: tuple[int, int]) -> None:
    logits = torch.zeros(*shape, VOCABULARY, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.long)
    for reduction in GradientPenaltyEmbedding.reductions:
        criterion = GradientPenaltyEmbedding(reduction=reduction)  # type: ignore[arg-type]
        assert criterion(logits, target).sum().item() == 0
        assert criterion(logits, target, inputs=logits).sum().item() == 0


def test_explains_operations_without_a_second_derivative() -> None:
    embedding = nn.Embedding(VOCABULARY, 4)
    read, target, _ = task()

    def logits() -> Tensor:
        x = embedding(read)[:, None]
        mixed: Tensor = F.scaled_dot_product_attention(x, x, x)[:, 0]
        return F.pad(mixed, (0, VOCABULARY - 4))

    with pytest.raises(ArgumentError, match=r"`embedding` .* twice.*SDPBackend.MATH"):
        GradientPenaltyEmbedding()(logits(), target, embedding=embedding.weight)
    with pytest.raises(ArgumentError, match=r"`wrt` of gradient_penalty .* twice"):
        gradient_penalty(logits().square().sum(), embedding.weight)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        GradientPenaltyEmbedding()(logits(), target, embedding=embedding.weight).backward()
    assert embedding.weight.grad is not None


def test_rejects_sparse_gradients() -> None:
    model, (read, target, _) = Model(sparse=True), task()
    with pytest.raises(ArgumentError, match=r"`embedding` .* dense gradient.*`sparse=False`"):
        GradientPenaltyEmbedding()(model(read), target, embedding=model.embedding.weight)


def test_rejects_what_the_loss_does_not_depend_on() -> None:
    model, (read, target, _) = Model(), task()
    logits, weight = model(read), model.embedding.weight
    other = torch.zeros(3, requires_grad=True)
    criterion = GradientPenaltyEmbedding()
    for wrt, message in (
        ({"embedding": other}, "`embedding` .* does not depend"),
        ({"inputs": other}, "`inputs` .* does not depend"),
        ({"embedding": weight.detach()}, "`embedding` .* requires none"),
        ({"embedding": "weight"}, "`embedding` .* Found"),
        ({"embedding": []}, "`embedding` .* must not be empty"),
        ({"inputs": weight}, r"`inputs` .* row for each of the 3 .* shape \[7, 4\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            criterion(logits, target, **wrt)
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"`embedding` .*no_grad"):
        criterion(model(read), target, embedding=weight)
    with pytest.raises(ArgumentError, match=r"`embedding` .*'none'"):
        GradientPenaltyEmbedding(reduction="none")(logits, target, embedding=weight)
    with pytest.raises(ArgumentError, match=r"`loss` .* scalar. Found shape \[3, 5, 7\]"):
        gradient_penalty(logits, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3, 7)}, r"`logits` .* Found torch.float32 of shape \[3, 7\]"),
        ({"logits": torch.zeros(3, 5, 7).long()}, "`logits`"),
        ({"target": torch.zeros(3, 5)}, "`target` .* integer"),
        ({"target": torch.zeros(3, 4).long()}, "`target`"),
        ({"target": torch.full((3, 5), 7)}, r"`target` .* Found 7 at position \[0, 0\]"),
        ({"mask": torch.ones(3, 5)}, "`mask` .* boolean"),
    ],
)
def test_rejects_inputs(arguments: dict[str, Any], message: str) -> None:
    given = {"logits": torch.zeros(3, 5, 7), "target": torch.zeros(3, 5).long(), **arguments}
    with pytest.raises(ArgumentError, match=message):
        GradientPenaltyEmbedding()(**given)


@pytest.mark.parametrize("epsilon", [-1, float("inf"), float("nan"), "1", True])
def test_rejects_epsilon(epsilon: Any) -> None:
    with pytest.raises(ArgumentError, match="`epsilon`"):
        GradientPenaltyEmbedding(epsilon)
