"""Attribution at a layer: embeddings, hooks, baselines of ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kexue.core.errors import ArgumentError
from kexue_integrated_gradients import integrated_gradients, token_scores
from kexue_integrated_gradients.layers import FromLayer


class Bag(nn.Module):
    """Words to classes, with a mask."""

    def __init__(self, words: int = 12, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, width)
        self.encoder = nn.GRU(width, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.embedding(ids), mask)

    def classify(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        states, _ = self.encoder(vectors)
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool)
        real = mask[..., None].to(states.dtype)
        out: Tensor = self.head((states * real).sum(1) / real.sum(1))
        return out


IDS = torch.tensor([[1, 2, 3, 4], [5, 5, 0, 1], [7, 11, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("max_rows", [None, 1, 2, 10])
def test_a_layer_is_the_function_of_its_output(max_rows: int | None) -> None:
    model = Bag().double()
    with torch.no_grad():
        vectors = model.embedding(IDS)
    wanted = integrated_gradients(model.classify, vectors, target=1, additional=(MASK,))
    for layer in ("embedding", model.embedding):
        found = integrated_gradients(
            model, IDS, target=1, layer=layer, additional=(MASK,), max_rows=max_rows
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert not any(m._forward_hooks for m in model.modules())


def test_padding_gets_nothing_and_changes_nothing() -> None:
    model = Bag().double()
    found = integrated_gradients(model, IDS, target=0, layer="embedding", additional=(MASK,))
    assert not found.values[~MASK].any()
    alone = integrated_gradients(model, IDS[2:, :2], target=0, layer="embedding")
    torch.testing.assert_close(found.values[2:, :2], alone.values)


def test_scores_of_tokens_add_up() -> None:
    found = integrated_gradients(Bag().double(), IDS, target=0, layer="embedding")
    scores = token_scores(found.values)
    assert scores.shape == IDS.shape
    torch.testing.assert_close(
        scores.sum(1), found.outputs - found.baseline_outputs, rtol=0, atol=1e-9
    )


def test_baselines_of_ids_go_through_the_layer() -> None:
    model = Bag().double()
    pad = model.embedding.weight[0].detach()
    wanted = integrated_gradients(model, IDS, pad, target=0, layer="embedding").values
    for baseline in (torch.zeros_like(IDS), torch.tensor(0)):
        found = integrated_gradients(model, IDS, baseline, target=0, layer="embedding")
        torch.testing.assert_close(found.values, wanted)
    assert not found.values[IDS == 0].any()
    both = integrated_gradients(model, IDS, [pad, 0.0], target=0, layer="embedding").values
    zero = integrated_gradients(model, IDS, target=0, layer="embedding").values
    torch.testing.assert_close(both, (wanted + zero) / 2)


def test_any_layer_will_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = integrated_gradients(model, x, target=0, layer="1")
    with torch.no_grad():
        hidden = model[1](model[0](x))
    torch.testing.assert_close(found.values, hidden * model.state_dict()["2.weight"][0])


class Twice(Bag):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.embedding(ids) + self.embedding(ids), mask)


class Never(Bag):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(nn.functional.embedding(ids, self.embedding.weight), mask)


class Turned(Bag):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.embedding(ids.T).transpose(0, 1), mask)


@pytest.mark.parametrize(
    ("model", "layer", "words"),
    [
        (Twice(), "embedding", "called once.*Found 2 calls"),
        (Never(), "embedding", "called once.*Found 0 calls"),
        (Turned(), "embedding", "one row per row of `inputs`"),
        (Bag(), "encoder", "floating-point tensor. Found tuple"),
        (Bag(), "embeding", "Did you mean 'embedding'"),
        (Bag(), "", "It has: embedding, encoder, head"),
    ],
)
def test_refuses_layers_that_cannot_be_replaced(model: Bag, layer: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        integrated_gradients(model, IDS, target=0, layer=layer)
    assert caught.value.argument == "layer"
    assert not any(m._forward_hooks for m in model.modules())


def test_refuses_torchscript() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        scripted = torch.jit.script(nn.Sequential(nn.Embedding(4, 2), nn.Flatten()))
    with pytest.raises(ArgumentError, match="must not be in TorchScript"):
        integrated_gradients(scripted, torch.tensor([[1]]), target=0, layer="0")


def test_a_model_from_a_layer_is_the_model() -> None:
    model = Bag().eval()
    seen = FromLayer(model, model.embedding)
    vectors = seen.output((IDS, MASK), 3, 2)
    torch.testing.assert_close(vectors, model.embedding(IDS).detach())
    torch.testing.assert_close(seen(vectors, IDS, MASK), model(IDS, MASK))
