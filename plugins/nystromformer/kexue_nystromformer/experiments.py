"""What post 8180 and the paper claim: the inverse, the approximation, and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.device import make_generator
from kexue.core.errors import MissingDependencyError
from kexue.core.lab.data import digits
from kexue.core.text import spread
from kexue.core.training import adam
from kexue_nystromformer.attention import nystrom_attention
from kexue_nystromformer.landmarks import even_means
from kexue_nystromformer.layer import NystromAttention
from kexue_nystromformer.pseudo_inverse import pseudo_inverse

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["inverse", "photographs", "training"]

_POST = "https://kexue.fm/archives/8180"
_PAPER = "https://arxiv.org/abs/2102.03902"
_WIDTH = 64
_ITERATIONS = (2, 4, 6, 8, 12, 16, 20)
_LANDMARKS = (16, 32, 64, 128, 256)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


# -- the inverse ---------------------------------------------------------------------------------


def inverse(context: Context) -> Report:
    """Follow the iteration: the start, the limit, and attention on the way."""
    length = context.pick(512, 256)
    whole: list[list[float]] = []
    pooled: list[list[float]] = []
    limits, starts, sums = [], [], []
    for seed in context.seeds:
        generator = make_generator(seed)
        q, k, v = (torch.randn(1, 1, length, _WIDTH, generator=generator) for _ in range(3))
        weights = (_WIDTH**-0.5 * q @ k.mT).softmax(-1)
        wanted = weights @ v
        whole.append(
            [_error(weights @ (pseudo_inverse(weights, n) @ wanted), wanted) for n in _ITERATIONS]
        )
        few = partial(nystrom_attention, q, k, num_landmarks=_WIDTH)
        pooled.append([_error(few(v, iterations=n), wanted) for n in _ITERATIONS])
        limits.append(_error(_with_exact_inverse(q, k, v, _WIDTH), wanted))
        start = weights.double() @ pseudo_inverse(weights.double(), 0)
        rest = torch.eye(length, dtype=start.dtype) - start
        starts.append(1 - float(torch.linalg.matrix_norm(rest, 2)))
        ones = torch.ones(1, 1, length, 1)
        sums.append(float((few(ones, middle_matrix=False) - 1).abs().max()))
    at = {n: [row[i] for row in whole] for i, n in enumerate(_ITERATIONS)}
    six = [row[_ITERATIONS.index(6)] for row in pooled]
    claims = [
        Claim(
            "The start V₀ = Aᵀ / (‖A‖₁ ‖A‖∞) satisfies ‖I − A V₀‖ < 1.",
            f"{_POST}, section “迭代求逆阵”",
            f"1 − the spectral norm, {length} × {length} scores: {min(starts):.2g} or more",
            "Above 0.",
            min(starts) > 0,
        ),
        Claim(
            "With as many landmarks as positions, the product of the three matrices is softmax "
            "attention.",
            f"{_POST}, section “向标准靠近”",
            f"relative error after 6, 12 and 20 iterations: {spread(at[6])}, {spread(at[12])}, "
            f"{spread(at[20], 5)}",
            "Falling, and at most 1e-3 after 20.",
            all(a > b > c for a, b, c in zip(at[6], at[12], at[20], strict=True))
            and max(at[20]) <= 1e-3,
        ),
        Claim(
            "Six iterations are enough for the inverse.",
            f"{_PAPER}, section 3; {_POST}, section “迭代求逆阵”",
            f"relative error of attention with as many landmarks as positions: {spread(at[6])}",
            "At most 0.01.",
            max(at[6]) <= 0.01,
        ),
        Claim(
            "With fewer landmarks too, the true pseudo-inverse is nearer to softmax attention than "
            "six iterations.",
            f"{_POST}, section “向标准靠近”",
            f"relative error, {_WIDTH} landmarks of {length} random positions: true "
            f"{spread(limits)}, six iterations {spread(six)}",
            "Smaller on every seed.",
            all(a < b for a, b in zip(limits, six, strict=True)),
        ),
        Claim(
            "The product of the two softmaxes is normalised by itself.",
            f"{_POST}, section “双重Softmax”",
            f"greatest difference of a row's sum from 1: {max(sums):.2g}",
            "At most 1e-5.",
            max(sums) <= 1e-5,
        ),
    ]
    lines = {f"{length} landmarks (all positions)": whole, f"{_WIDTH} landmarks": pooled}
    means = {name: torch.tensor(rows).mean(0).tolist() for name, rows in lines.items()}
    columns = ["iterations", *means]
    rows = [[n, *(m[i] for m in means.values())] for i, n in enumerate(_ITERATIONS)]
    rows.append(["true inverse", 0.0, sum(limits) / len(limits)])
    return Report(
        claims,
        [Table("Relative error of attention, mean over seeds", columns, rows)],
        [
            Figure(
                "Error of attention against iterations",
                partial(_plot_iterations, means, sum(limits) / len(limits)),
                "With all positions as landmarks the error vanishes. With fewer, the iterations "
                "approach something that is worse than where they were.",
            )
        ],
        [
            (
                f"Queries, keys and values are independent N(0, 1), {length} positions of {_WIDTH} "
                "features: the hard case, since nothing can be pooled without loss."
            )
        ],
    )


def _with_exact_inverse(q: Tensor, k: Tensor, v: Tensor, m: int) -> Tensor:
    """Return Nyström attention with the pseudo-inverse by SVD, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5
    queries, keys = (even_means(x, m) for x in (q, k))
    middle = torch.linalg.pinv((scale * queries @ keys.mT).softmax(-1))
    right = F.scaled_dot_product_attention(queries, k, v)
    return F.scaled_dot_product_attention(q, keys, middle @ right).float()


def _plot_iterations(means: Mapping[str, Sequence[float]], limit: float, canvas: Canvas) -> None:
    axes = canvas.subplots()
    for (name, errors), colour in zip(means.items(), ("#3465a4", "#cc0000"), strict=True):
        axes.plot(_ITERATIONS, errors, "o-", label=name, color=colour)
    axes.axhline(limit, ls="--", color="#cc0000", label=f"{_WIDTH} landmarks, true inverse")
    axes.set(xlabel="iterations", ylabel="relative error", yscale="log", xticks=_ITERATIONS)
    axes.legend()


# -- photographs ---------------------------------------------------------------------------------


def photographs(context: Context) -> Report:
    """Let the patches of two photographs attend to each other."""
    names = ("china.jpg", "flower.jpg")
    landmarks = context.pick(_LANDMARKS, _LANDMARKS[:3])
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        x = _patches(name)
        wanted = F.scaled_dot_product_attention(x, x, x)
        mean = x.mean(2, keepdim=True).expand_as(x)
        found[name] = {
            "with the inverse": [
                _error(nystrom_attention(x, x, x, num_landmarks=m), wanted) for m in landmarks
            ],
            "without": [
                _error(nystrom_attention(x, x, x, num_landmarks=m, middle_matrix=False), wanted)
                for m in landmarks
            ],
            "mean of all values": [_error(mean, wanted)] * len(landmarks),
        }
    claims = [
        Claim(
            f"The inverse in the middle brings the attention of {name} nearer to softmax attention "
            f"than the product without it.",
            f"{_POST}, section “向标准靠近”",
            "relative error with, and without: "
            + ", ".join(
                f"{a:.3f} and {b:.3f} ({m} landmarks)"
                for m, a, b in zip(
                    landmarks, lines["with the inverse"], lines["without"], strict=True
                )
            ),
            "Smaller with it, for any number of landmarks.",
            all(a < b for a, b in zip(lines["with the inverse"], lines["without"], strict=True)),
        )
        for name, lines in found.items()
    ]
    rows = [
        [name, m, *(errors[i] for errors in found[name].values())]
        for name in names
        for i, m in enumerate(landmarks)
    ]
    return Report(
        claims,
        [
            Table(
                "Relative error against softmax attention",
                ["photograph", "landmarks", *found[names[0]]],
                rows,
            )
        ],
        [
            Figure(
                "Error against the number of landmarks",
                partial(_plot_photographs, landmarks, found),
            )
        ],
        [
            (
                f"Queries, keys and values are the patches of 8 × 8 pixels, their first {_WIDTH} "
                "principal components, divided by one number so that their mean square is 1."
            )
        ],
    )


def _patches(name: str) -> Tensor:
    """Return the patches of one of scikit-learn's photographs, ``[1, 1, patch, component]``."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise MissingDependencyError(
            "The photographs", "scikit-learn", "pip install 'kexue[lab]'"
        ) from error
    image = torch.tensor(load_sample_image(name)).double() / 255
    patches = image.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).flatten(0, 1)
    centred = patches - patches.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:_WIDTH].T
    scaled: Tensor = components / components.square().mean().sqrt()
    return scaled.float()[None, None]


def _plot_photographs(
    landmarks: Sequence[int], found: Mapping[str, Mapping[str, Sequence[float]]], canvas: Canvas
) -> None:
    grid = canvas.subplots(1, len(found), sharey=True)
    for axes, (name, lines) in zip(grid, found.items(), strict=True):
        for label, errors in lines.items():
            axes.plot(landmarks, errors, "o-", label=label)
        axes.set(title=name, xlabel="landmarks", xscale="log", yscale="log")
        axes.set_xticks(landmarks, [str(m) for m in landmarks], minor=False)
        axes.minorticks_off()
    grid[0].set_ylabel("relative error")
    grid[0].legend()


# -- training --------------------------------------------------------------------------------------


class _Classifier(nn.Module):
    """Pixels with learned places, one block of attention, the mean."""

    def __init__(self, num_landmarks: int) -> None:
        super().__init__()
        self.pixel = nn.Linear(1, 32)
        self.place = nn.Parameter(0.5 * torch.randn(64, 32))
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = NystromAttention(32, 2, num_landmarks=num_landmarks)
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.out = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pixel(images.unsqueeze(-1)) + self.place
        x = x + self.attention(self.first(x))
        x = x + self.feed(self.second(x))
        scores: Tensor = self.out(x.mean(1))
        return scores


def training(context: Context) -> Report:
    """Train the same classifier with exact attention and with few landmarks."""
    data = digits()
    images, labels = torch.from_numpy(data.images).flatten(1), torch.from_numpy(data.labels)
    epochs = context.pick(6, 2)
    kinds = {"softmax attention": 64, "16 landmarks": 16}
    curves: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with context.progress.task("digits", len(kinds) * len(context.seeds)) as bar:
        for name, num_landmarks in kinds.items():
            for seed in context.seeds:
                curves[name].append(_train(images, labels, seed, epochs, num_landmarks))
                bar.advance()
    last = {name: [run[-1] for run in runs] for name, runs in curves.items()}
    exact, ours = last["softmax attention"], last["16 landmarks"]
    gap = sum(exact) / len(exact) - sum(ours) / len(ours)
    return Report(
        [
            Claim(
                "Trained with a quarter as many landmarks as positions, a model is as good as with "
                "softmax attention.",
                f"{_PAPER}, section 4; {_POST}, section “性能与效果”",
                f"test accuracy: softmax {spread(exact)}, Nyström {spread(ours)}",
                "On average at most 0.01 below.",
                gap <= 0.01,
            )
        ],
        [
            Table(
                f"Test accuracy after {epochs} epochs",
                ["attention", "accuracy"],
                [[name, spread(values)] for name, values in last.items()],
            )
        ],
        [Figure("Test accuracy while training", partial(_plot_training, curves))],
        [
            (
                "Digits as sequences of 64 pixels, 1397 to train and 400 to test; one block of "
                "width 32 with two heads, Adam with 1e-2 in batches of 64."
            )
        ],
    )


def _train(
    images: Tensor, labels: Tensor, seed: int, epochs: int, num_landmarks: int
) -> list[float]:
    """Return the accuracy on the test part after each epoch."""
    torch.manual_seed(seed)
    model = _Classifier(num_landmarks)
    order = torch.randperm(len(images), generator=make_generator(seed))
    train, test = order[:-400], order[-400:]
    optimizer = adam(model.parameters(), lr=1e-2)
    accuracies = []
    for _ in range(epochs):
        for rows in torch.split(train[torch.randperm(len(train))], 64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            right = model(images[test]).argmax(1) == labels[test]
        accuracies.append(float(right.double().mean()))
    return accuracies


def _plot_training(curves: Mapping[str, Sequence[Sequence[float]]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, runs in curves.items():
        values = torch.tensor(runs)
        epochs = range(1, values.shape[1] + 1)
        (line,) = axes.plot(epochs, values.mean(0), "o-", label=name)
        low, high = values.amin(0), values.amax(0)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="epoch", ylabel="accuracy, mean and range over seeds", xticks=list(epochs))
    axes.legend()
