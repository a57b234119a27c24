# ruff: noqa: ARG002, ARG003, ARG004 -- a mutant takes what its contract says, and may ignore it
"""The conformance kit: it passes what is sound, and names exactly what is not.

Every mutant below breaks one thing; the kit must find that thing, or it finds nothing.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.core import (
    ArgumentError,
    Component,
    Decoder,
    DecodeResult,
    Example,
    Generator,
    Layer,
    Optimizer,
    Sampler,
    Samples,
    Similarity,
)
from kexue.core.component import PAD
from kexue.core.conformance import Finding, check_all, check_component, conformance
from kexue.core.conformance.asking import checks_of, run_check
from kexue.core.conformance.kit import Subject
from kexue.core.errors import ComponentNotFoundError
from kexue.core.interfaces.loss import Loss, reduce
from kexue.core.registry import Registry

if TYPE_CHECKING:
    from tests.conftest import Ran, Site

URL = "A post, https://example.org"


# -- what is sound --------------------------------------------------------------------------------


class SoundLoss(Loss):
    """Squared distance between probabilities and the true class.

    Args:
        scale: A factor.
        reduction: Over the rows.

    Example:
        >>> SoundLoss()(torch.zeros(1, 2), torch.tensor([0])).item()
        0.5
    """

    def __init__(self, scale: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.bias = nn.Parameter(torch.zeros(()))
        self.scale = scale

    def forward(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> Tensor:
        """Return the loss.

        Args:
            logits: Scores.
            target: Classes.
        """
        if logits.ndim != 2:
            raise ArgumentError(f"`logits` must have two axes. Found {logits.ndim}.")
        if target.shape != logits.shape[:1]:
            raise ArgumentError(f"`target` must have {len(logits)} rows. Found {target.shape}.")
        return reduce(self.rows(logits, target), self.reduction)

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        exact = logits if logits.dtype == torch.float64 else logits.float()
        p = (self.scale * exact).softmax(-1) + self.bias.to(exact.dtype)
        return (p - F.one_hot(target, logits.shape[-1])).square().sum(-1)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three rows of four classes."""
        logits = torch.randn(3, 4, generator=generator)
        return Example({"scale": 2.0}, {"logits": logits, "target": torch.tensor([0, 3, 1])})


class SoundLayer(Layer):
    """Each position minus the mean of its sequence.

    Args:
        num_features: Features.

    Example:
        >>> SoundLayer(1)(torch.tensor([[[1.0], [3.0]]])).flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(
        self,
        features: Float[Tensor, "batch time feature"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Tensor:
        """Return new features.

        Args:
            features: Features.
            mask: True at real positions.
        """
        if features.ndim != 3:
            raise ArgumentError(f"`features` must have three axes. Found {features.ndim}.")
        if mask is None:
            mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        if mask.shape != features.shape[:2]:
            raise ArgumentError(f"`mask` must have shape {list(features.shape[:2])}.")
        return self.centred(features, mask) * self.gain

    def centred(self, features: Tensor, mask: Tensor) -> Tensor:
        real = mask[..., None].to(features.dtype)
        mean = (features * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return (features - mean) * real

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences."""
        features = torch.randn(3, 5, 4, generator=generator)
        mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
        return Example({"num_features": 4}, {"features": features, "mask": mask})


class SoundDecoder(Decoder):
    """The best tag at each position.

    Example:
        >>> SoundDecoder().decode(torch.tensor([[[0.0, 1.0]]])).tolist()
        [[1]]
    """

    def decode(
        self,
        scores: Float[Tensor, "batch time tag"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> DecodeResult:
        """Return the tags.

        Args:
            scores: Scores.
            mask: True at real positions.
        """
        if scores.ndim != 3:
            raise ArgumentError(f"`scores` must have three axes. Found {scores.ndim}.")
        if mask is None:
            mask = scores.new_ones(scores.shape[:2], dtype=torch.bool)
        if mask.shape != scores.shape[:2]:
            raise ArgumentError(f"`mask` must have shape {list(scores.shape[:2])}.")
        return self.best(scores, mask)

    def best(self, scores: Tensor, mask: Tensor) -> DecodeResult:
        found = scores.max(-1)
        total = torch.where(mask, found.values, 0.0).sum(1)
        return DecodeResult(torch.where(mask, found.indices, PAD), total)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return three sequences."""
        scores = torch.randn(3, 5, 4, generator=generator)
        mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
        return Example({}, {"scores": scores, "mask": mask})


class SoundSampler(Sampler):
    """Classes in proportion to exp(logits).

    Example:
        >>> SoundSampler().sample(torch.tensor([0.0, -torch.inf]), 2).values.tolist()
        [0, 0]
    """

    def sample(
        self,
        target: Float[Tensor, "class"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw.

        Args:
            target: Logits.
            num_samples: How many.
            generator: Source of randomness.
        """
        if target.ndim != 1:
            raise ArgumentError(f"`target` must have one axis. Found {target.ndim}.")
        p = target.double().softmax(-1)
        return Samples(torch.multinomial(p, num_samples, replacement=True, generator=generator))

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return five logits."""
        return Example({}, {"target": torch.randn(5, generator=generator), "num_samples": 40})


class SoundSimilarity(Similarity):
    """The inner product.

    Example:
        >>> SoundSimilarity()(torch.ones(1, 2), torch.ones(1, 2)).tolist()
        [2.0]
    """

    def __call__(
        self, a: Float[Tensor, "batch feature"], b: Float[Tensor, "batch feature"]
    ) -> Tensor:
        """Compare row by row.

        Args:
            a: Vectors.
            b: As many vectors.
        """
        for name, rows in (("a", a), ("b", b)):
            if rows.ndim != 2:
                raise ArgumentError(f"`{name}` must have two axes. Found {rows.ndim}.")
        return (a.double() * b.double()).sum(-1).float()

    def matrix(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare every row with every row."""
        return (a.double() @ b.double().T).float()

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return two sets of vectors."""
        rows = torch.randn(2, 4, 3, generator=generator)
        return Example({}, {"a": rows[0], "b": rows[1]})


class SoundOptimizer(Optimizer):
    """Gradient descent with momentum.

    Args:
        params: Parameters.
        lr: Learning rate.

    Example:
        >>> SoundOptimizer([torch.nn.Parameter(torch.ones(1))]).step()
    """

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.move(parameter, group["lr"])
        return loss

    def move(self, parameter: Tensor, lr: float) -> None:
        if parameter.grad is not None:
            velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
            parameter.sub_(lr * velocity.mul_(0.5).add_(parameter.grad))

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return gentle arguments."""
        return Example({"lr": 1e-4}, {"problem": "rosenbrock"})


class SoundGenerator(Generator):
    """A Gaussian per feature.

    Args:
        num_features: Numbers per row.

    Example:
        >>> len(SoundGenerator(2).generate(3))
        3
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mean = nn.Parameter(torch.zeros(num_features))

    def loss(self, batch: Tensor) -> Tensor:
        return (batch - self.mean).square().sum(1).mean()

    def config(self) -> dict[str, Any]:
        return {"num_features": self.num_features}

    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw.

        Args:
            num_samples: How many.
            generator: Source of randomness.
        """
        mean = self.mean.detach()
        return mean + mean.new_empty(num_samples, self.num_features).normal_(generator=generator)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return rows around two."""
        data = 2 + torch.randn(40, 3, generator=generator)
        return Example({"num_features": 3}, {"data": data, "num_samples": 5})


SOUND = {
    "loss": SoundLoss,
    "layer": SoundLayer,
    "decoder": SoundDecoder,
    "sampler": SoundSampler,
    "similarity": SoundSimilarity,
    "optimizer": SoundOptimizer,
    "generator": SoundGenerator,
}


def subject_of(target: Any, kind: str = "", references: tuple[str, ...] = (URL,)) -> Subject:
    """Return a class or function of this file as a component under question."""
    kind = kind or next(k for k, sound in SOUND.items() if issubclass(target, sound))
    registry = Registry(discover=False)
    path = f"{target.__module__}:{target.__qualname__}"
    registry.register(Component(kind, "x", path, "One.", references), slug="toys")
    return Subject(registry, registry.get(f"{kind}/x"))


def found_in(subject: Subject) -> dict[str, Finding]:
    """Ask a component everything."""
    return {f.name: f for f in check_component(subject.registry, subject.component)}


def asked(subject: Subject, name: str) -> Finding:
    """Ask a component one thing."""
    (check,) = (check for check in checks_of(subject) if check.name == name)
    return run_check(subject, check)


ASKED = {
    "loss": {"gradients", "autocast", "reductions", "unknown reduction", "copies", "compiles"},
    "layer": {"padding is not seen", "same shape", "rows do not see each other", "gradients"},
    "decoder": {"result form", "padding is not seen", "rejects unknown parameters"},
    "sampler": {"seeded", "draws", "frequencies", "global state is not changed"},
    "similarity": {"pairs, matrix and search agree", "rows do not see each other"},
    "optimizer": {"lowers the loss", "resumes", "steps compile", "groups", "runs on files"},
    "generator": {"fits and generates", "its example runs"},
}


@pytest.mark.parametrize("kind", SOUND)
def test_passes_what_is_sound(kind: str) -> None:
    found = found_in(subject_of(SOUND[kind]))
    assert [f for f in found.values() if f.state == "failed"] == []
    passed = {name for name, f in found.items() if f.state == "passed"}
    assert passed >= ASKED[kind] | {"is documented", "its example runs"}


def test_draws_with_weights_count_by_them() -> None:
    assert [f for f in found_in(subject_of(Weighs)).values() if f.state == "failed"] == []


# -- mutants: one thing is wrong ------------------------------------------------------------------


class Undocumented(SoundLoss):
    pass


class SilentOnAnArgument(SoundLoss):
    """Says nothing of ``extra``."""

    def __init__(self, extra: int = 0, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        return Example({}, super().example(generator=generator).inputs)


class Shapeless(SoundLoss):
    """Says no shapes."""

    def forward(self, logits: Tensor, target: Int[Tensor, " batch"]) -> Tensor:
        """Return the loss.

        Args:
            logits: Scores.
            target: Classes.
        """
        return super().forward(logits, target)


class WithoutExample(SoundLoss):
    """Has no example."""


class WrongExample(SoundLoss):
    """Has one that is wrong.

    Example:
        >>> 1 + 1
        3
    """


class WithoutExampleData(SoundLoss):
    """Gives no example.

    Example:
        >>> 1
        1
    """

    example: Any = property()


class NotFinite(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits, target) / 0


class Coarse(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        coarse = logits.bfloat16() if logits.dtype == torch.float32 else logits
        return super().rows(coarse.to(logits.dtype), target)


class OverflowsInHalf(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        large = (logits.abs() + 11.5).exp() if logits.dtype == torch.float16 else logits.exp()
        return super().rows(logits, target) + 0 * large.sum(-1)


class LosesItsWeights(SoundLoss):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.device):
            self.scale += 1
        return super().to(*args, **kwargs)


class SeesOtherRows(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits - logits.mean(0), target)


class Scalar(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits, target).mean()


class RefusesNoRows(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits, target) + 0 * logits.max()


class SeesPadding(SoundLayer):
    def centred(self, features: Tensor, mask: Tensor) -> Tensor:
        return features * mask[..., None] - 0 * features + features.mean(1, keepdim=True)


class SeesLargePadding(SoundLayer):
    def centred(self, features: Tensor, mask: Tensor) -> Tensor:
        return super().centred(features, mask) + features.logsumexp(1, keepdim=True)


class AssumesContiguous(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        flat = logits.as_strided((logits.numel(),), (1,))
        return super().rows(flat.view_as(logits), target)


class WritesItsInput(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            logits.sub_(logits.amax(-1, keepdim=True))
        return super().rows(logits, target)


class MarksItsInput(SoundDecoder):
    def best(self, scores: Tensor, mask: Tensor) -> DecodeResult:
        found = super().best(scores, mask)
        scores.requires_grad_()
        return found


class IgnoresGenerator(SoundSampler):
    def sample(
        self, target: Float[Tensor, "class"], num_samples: int, *, generator: Any = None
    ) -> Samples:
        return super().sample(target, num_samples)


class NeverVaries(SoundSampler):
    def sample(
        self, target: Float[Tensor, "class"], num_samples: int, *, generator: Any = None
    ) -> Samples:
        fixed = torch.Generator().manual_seed(0)
        return super().sample(target, num_samples, generator=fixed)


class Detached(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits, target).detach()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class WrongGradient(SoundLoss):
    compilable: ClassVar[bool] = False

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        doubled: Tensor = _Doubled.apply(logits)  # type: ignore[no-untyped-call]
        return super().rows(doubled, target)


class OtherwiseCompiled(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        rows = super().rows(logits, target)
        return rows + 1 if torch.compiler.is_compiling() else rows


class Unpicklable(SoundLoss):
    def __init__(self, scale: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__(scale, reduction=reduction)
        self.function = lambda x: x


class HidesState(SoundLoss):
    def __init__(self, scale: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__(scale, reduction=reduction)
        self.hidden = torch.randn(())

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().rows(logits + self.hidden.to(logits.dtype) * logits.square(), target)


class AcceptsAnything(SoundLoss):
    def forward(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> Tensor:
        """Return the loss."""
        return reduce(self.rows(logits.expand(3, 4), target.expand(3)), self.reduction)


class RaisesSomething(SoundLoss):
    def forward(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> Tensor:
        """Return the loss."""
        if logits.ndim != 2 or target.shape != logits.shape[:1]:
            raise IndexError("out of range")
        return super().forward(logits, target)


class NamesNothing(SoundLoss):
    def forward(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> Tensor:
        """Return the loss."""
        if logits.ndim != 2 or target.shape != logits.shape[:1]:
            raise ValueError("wrong shape of a target or of logits")
        return super().forward(logits, target)


class SetsDefaultDtype(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return super().rows(logits, target)


class DrawsGlobally(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        torch.rand(())
        return super().rows(logits, target)


class NotOnFiles(SoundLoss):
    def __init__(self, weight: Tensor, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.register_buffer("weight", weight + 0)

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        return Example({"weight": torch.ones(2)}, super().example(generator=generator).inputs)


class ReducesWrongly(SoundLoss):
    def forward(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> Tensor:
        """Return the loss."""
        value = super().forward(logits, target)
        return value / 2 if self.reduction == "mean" else value


class AnyReduction(SoundLoss):
    def __init__(self, scale: float = 1.0, *, reduction: str = "mean") -> None:
        known = reduction if reduction in self.reductions else "mean"
        super().__init__(scale, reduction=known)


class BreaksUnderAutocast(SoundLoss):
    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        rows = super().rows(logits, target)
        return rows * 2 if torch.is_autocast_enabled("cpu") else rows


class ChangesShape(SoundLayer):
    def centred(self, features: Tensor, mask: Tensor) -> Tensor:
        return super().centred(features, mask)[:, 1:]


class ReturnsFloats(SoundDecoder):
    def best(self, scores: Tensor, mask: Tensor) -> DecodeResult:
        found = super().best(scores, mask)
        return DecodeResult(found.sequences.float(), found.scores)


class FillsPadding(SoundDecoder):
    def best(self, scores: Tensor, mask: Tensor) -> DecodeResult:
        found = super().best(scores, mask)
        return DecodeResult(found.sequences.clamp(min=0), found.scores)


class TakesAnyParameter(SoundDecoder):
    def __init__(self, **anything: Any) -> None: ...


class LearnsNothing(SoundDecoder, nn.Module):
    trainable: ClassVar[bool] = True

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, scores: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        return 0 * scores.sum()


class DrawsTooFew(SoundSampler):
    def sample(
        self,
        target: Float[Tensor, "class"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        return super().sample(target, num_samples - 1, generator=generator)


class DrawsUniformly(SoundSampler):
    def sample(
        self,
        target: Float[Tensor, "class"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        if target.ndim != 1:
            raise ArgumentError("`target` must have one axis.")
        return super().sample(0 * target, num_samples, generator=generator)


class Weighs(SoundSampler):
    """Draws uniformly, with weights that are the target's.

    Example:
        >>> Weighs().sample(torch.tensor([0.0, -torch.inf]), 4).weights.sum()
        tensor(1., dtype=torch.float64)
    """

    def sample(
        self,
        target: Float[Tensor, "class"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw.

        Args:
            target: Logits.
            num_samples: How many.
            generator: Source of randomness.
        """
        if target.ndim != 1:
            raise ArgumentError("`target` must have one axis.")
        values = torch.randint(len(target), (num_samples,), generator=generator)
        return Samples(values, weights=self.weigh(target.double()[values]))

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)


class WeighsNothing(Weighs):
    def weigh(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 1 / len(logits))


class WeighsTooMuch(Weighs):
    def weigh(self, logits: Tensor) -> Tensor:
        return 2 * logits.softmax(0)


class OrdersChainsWrongly(SoundSampler):
    def sample(
        self,
        target: Float[Tensor, "class"],
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Samples:
        found = super().sample(target, num_samples, generator=generator).values
        return Samples(found, chains=found.view(4, -1))


class SearchesBackwards(SoundSimilarity):
    def search(self, queries: Any, corpus: Any, k: int) -> tuple[Tensor, Tensor]:
        values, indices = self.matrix(queries, corpus).topk(k, dim=1, largest=False)
        return values, indices


class Disagrees(SoundSimilarity):
    def matrix(self, a: Tensor, b: Tensor) -> Tensor:
        return super().matrix(a, b) / 2


class Ascends(SoundOptimizer):
    def move(self, parameter: Tensor, lr: float) -> None:
        super().move(parameter, -lr)


class ForgetsTheLoss(SoundOptimizer):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        super().step(closure)


class CountsByItself(SoundOptimizer):
    count = 0

    def move(self, parameter: Tensor, lr: float) -> None:
        self.count += 1
        super().move(parameter, lr / self.count)


class MovesWhatHasNoGradient(SoundOptimizer):
    def move(self, parameter: Tensor, lr: float) -> None:
        parameter.mul_(1 - lr)
        super().move(parameter, lr)


class LoadsWhatHasBegun(SoundOptimizer):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["velocity"] = self.state[parameter]["velocity"].clone()


class IsCopiedInPart(SoundOptimizer):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": defaultdict(dict)}


class OtherwiseCompiledSteps(SoundOptimizer):
    def move(self, parameter: Tensor, lr: float) -> None:
        super().move(parameter, 2 * lr if torch.compiler.is_compiling() else lr)


class FitsNothing(SoundGenerator):
    def loss(self, batch: Tensor) -> Tensor:
        return 0 * self.mean.sum()


class GeneratesTooFew(SoundGenerator):
    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        return super().generate(num_samples, generator=generator)[1:]


class GeneratesTheSame(SoundGenerator):
    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        return super().generate(num_samples, generator=torch.Generator().manual_seed(0))


class IsSavedInPart(SoundGenerator):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.offset = torch.zeros(())

    def loss(self, batch: Tensor) -> Tensor:
        self.offset = self.offset + 1
        return super().loss(batch)

    def generate(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        return super().generate(num_samples, generator=generator) + self.offset


MUTANTS: dict[type, tuple[str, str]] = {
    Undocumented: ("is documented", "it must have a docstring"),
    SilentOnAnArgument: ("is documented", "the docstring must describe extra"),
    Shapeless: ("says its shapes", "the shape of logits is not said"),
    WithoutExample: ("its example runs", "the docstring must hold an example"),
    WrongExample: ("its example runs", "Expected: 3 Got: 2"),
    NotFinite: ("builds and runs", "`value` is not finite"),
    Coarse: ("all dtypes", "float32 against float64: `value` differs by"),
    OverflowsInHalf: ("all dtypes", "`value` is not finite"),
    LosesItsWeights: ("all devices", "cpu against cpu: `value` differs by"),
    SeesOtherRows: ("rows do not see each other", "row 0 alone: `value` differs by"),
    Scalar: ("rows do not see each other", r"3 rows give `value` of shape \[\], not one row each"),
    RefusesNoRows: ("empty batch", "RuntimeError"),
    SeesPadding: ("padding is not seen", "padded: `value` differs by"),
    SeesLargePadding: ("padding is not seen", "padded: `value` differs by"),
    AssumesContiguous: ("views", "views: `value` differs by"),
    WritesItsInput: ("inputs are not modified", "`logits` was modified"),
    MarksItsInput: ("inputs are not modified", "`scores` now requires a gradient"),
    IgnoresGenerator: ("seeded", "the same seed: `values` differs by"),
    NeverVaries: ("seeded", "four seeds give the same result: `generator` is not used"),
    Detached: ("gradients", "no gradient flows to logits, bias"),
    WrongGradient: ("gradients", "Jacobian mismatch for output 0 .*input 0, of logits, bias$"),
    OtherwiseCompiled: ("compiles", "compiled: `value` differs by 1"),
    Unpicklable: ("copies", "(AttributeError|PicklingError): .*lambda"),
    HidesState: ("copies", "state_dict: `value` differs by"),
    AcceptsAnything: ("rejects bad input", "`logits` with a missing axis is accepted"),
    RaisesSomething: (
        "rejects bad input",
        "a bad `logits` must raise an ArgumentError that names it. Found IndexError",
    ),
    NamesNothing: ("rejects bad input", "the error for a bad `logits` names no argument: wrong"),
    SetsDefaultDtype: ("global state is not changed", "torch's global state was .*float64"),
    DrawsGlobally: ("global state is not changed", "it draws from the global generator"),
    NotOnFiles: ("runs on files", "."),
    ReducesWrongly: ("reductions", "mean: `value` differs by"),
    AnyReduction: ("unknown reduction", "reduction='avg' is accepted"),
    BreaksUnderAutocast: ("autocast", "under autocast: `value` differs by"),
    ChangesShape: ("same shape", r"shape \[3, 5, 4\] became \[3, 4, 4\]"),
    ReturnsFloats: ("result form", "sequences must be int64. Found torch.float32"),
    FillsPadding: ("result form", "masked positions must hold -1"),
    TakesAnyParameter: ("rejects unknown parameters", "create takes any keyword"),
    LearnsNothing: ("trains a tagger", "F1 was .* on 16 lines it was fitted to"),
    DrawsTooFew: ("draws", "40 draws were asked for. Found 39"),
    DrawsUniformly: ("frequencies", "standard errors from its probability"),
    WeighsNothing: ("frequencies", "standard errors from its probability"),
    WeighsTooMuch: ("draws", "the weights must sum to 1. Found 2"),
    OrdersChainsWrongly: ("draws", "`values` must be those of `chains`, by draw"),
    SearchesBackwards: ("pairs, matrix and search agree", "search does not find the most alike"),
    Disagrees: ("pairs, matrix and search agree", "pairs differ from the matrix"),
    Ascends: ("lowers the loss", "the loss was .* after fifty steps"),
    ForgetsTheLoss: ("lowers the loss", r"`step\(closure\)` must return the loss"),
    CountsByItself: ("resumes", "a resumed run differs"),
    LoadsWhatHasBegun: ("resumes", "KeyError: 'velocity'"),
    IsCopiedInPart: ("resumes", "a pickled run differs"),
    OtherwiseCompiledSteps: ("steps compile", "a compiled step differs"),
    MovesWhatHasNoGradient: ("groups", "a parameter without a gradient was moved"),
    FitsNothing: ("fits and generates", "the loss was 0 and is 0 after five epochs"),
    GeneratesTooFew: ("fits and generates", r"three rows have shape \[2, 3\]"),
    GeneratesTheSame: ("fits and generates", "`generator` is not used"),
    IsSavedInPart: ("fits and generates", "another result once loaded"),
}
"""What is wrong, the check that must say so, and what it must say."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_names_what_is_wrong(mutant: type) -> None:
    name, reason = MUTANTS[mutant]
    finding = asked(subject_of(mutant), name)
    assert finding.state == "failed"
    assert re.search(reason, finding.reason), finding.reason


def test_every_check_has_a_mutant() -> None:
    names = {c.name for sound in SOUND.values() for c in checks_of(subject_of(sound))}
    assert names - {name for name, _ in MUTANTS.values()} == {"its known failures are checks"}


@pytest.mark.parametrize(
    ("references", "reason"),
    [((), "`references` of the component must name the source"), (("A post",), "an address")],
)
def test_names_a_missing_source(references: tuple[str, ...], reason: str) -> None:
    finding = asked(subject_of(SoundLoss, references=references), "is documented")
    assert reason in finding.reason


@pytest.mark.parametrize("mutant", [SetsDefaultDtype, DrawsGlobally])
def test_one_mutant_does_not_spoil_the_others(mutant: type) -> None:
    dtype, random = torch.get_default_dtype(), torch.get_rng_state()
    found = found_in(subject_of(mutant))
    failed = {name for name, f in found.items() if f.state == "failed"}
    assert failed >= {"global state is not changed"}
    assert failed <= {"global state is not changed", "its example runs", "is documented"}
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.get_rng_state(), random)


# -- what does not apply --------------------------------------------------------------------------


def sound_function(logits: Tensor, target: Tensor, *, scale: float = 1.0) -> Tensor:
    """Compare.

    Args:
        logits: Scores.
        target: Classes.
        scale: A factor.
    """
    return scale * (logits - target)


def test_asks_a_function_only_what_makes_sense() -> None:
    found = found_in(subject_of(sound_function, "loss"))
    states = {name: f.state for name, f in found.items() if f.state != "skipped"}
    assert states == {"is documented": "passed"}


class AnyAxes(SoundLayer):
    def forward(  # type: ignore[override]
        self, features: Float[Tensor, "*batch feature"]
    ) -> Tensor:
        """Return new features."""
        return features * self.gain

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        return Example({"num_features": 4}, {"features": torch.randn(3, 2, 4)})


def test_a_component_of_any_axes_need_not_refuse_fewer() -> None:
    assert asked(subject_of(AnyAxes), "rejects bad input").state == "passed"


class HalfPrecisionIsDeclined(OverflowsInHalf):
    half_precision: ClassVar[bool] = False


class CompilingIsDeclined(OtherwiseCompiled):
    compilable: ClassVar[bool] = False


def test_capabilities_decide_what_is_asked() -> None:
    assert asked(subject_of(HalfPrecisionIsDeclined), "all dtypes").state == "passed"
    assert asked(subject_of(CompilingIsDeclined), "compiles").state == "skipped"
    assert asked(subject_of(SoundDecoder), "gradients").state == "skipped"
    assert asked(subject_of(SoundDecoder), "trains a tagger").state == "skipped"
    assert asked(subject_of(SoundGenerator), "runs on files").state == "skipped"
    assert asked(subject_of(SoundLoss), "seeded").state == "skipped"


class DeclaresItsFailure(NotFinite):
    known_failures: ClassVar[Mapping[str, str]] = {"builds and runs": "the formula divides by 0"}


class DeclaresTooMuch(SoundLoss):
    known_failures: ClassVar[Mapping[str, str]] = {"views": "long mended", "vews": "misspelt"}


def test_a_declared_failure_is_skipped_with_its_reason() -> None:
    finding = asked(subject_of(DeclaresItsFailure), "builds and runs")
    assert (finding.state, finding.reason) == ("skipped", "the formula divides by 0")
    name = "its known failures are checks"
    assert asked(subject_of(DeclaresItsFailure), name).state == "passed"


def test_a_declaration_does_not_outlive_its_reason() -> None:
    subject = subject_of(DeclaresTooMuch)
    assert asked(subject, "views").reason == "declared as failing, but passes"
    assert asked(subject, "its known failures are checks").reason == "no check is named 'vews'"


def test_a_component_that_cannot_be_loaded_fails_every_check() -> None:
    registry = Registry(discover=False)
    registry.register(Component("loss", "x", "no_such_module:X", "One."), slug="toys")
    found = check_component(registry, registry.get("loss/x"))
    assert {f.state for f in found} == {"failed"}
    assert all("No module named 'no_such_module'" in f.reason for f in found)


# -- plugins --------------------------------------------------------------------------------------


def test_checks_plugins_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # where it is installed
    site.write("jax.py", "")
    site.add("kexue-heavy", "import jax\n" + site.components("probe/x"))
    site.add(
        "kexue-light",
        "@hookimpl\ndef kexue_interfaces():\n"
        "    return [Interface('probe', 'a:B', 'One.', 'go', 'a:c')]",
    )
    site.add("kexue-broken", "raise RuntimeError('out of order')")
    importlib.import_module("jax")  # what was imported before hides nothing

    registry = Registry()
    found = check_all(registry, ["light"])
    assert [(f.subject, f.name, f.state) for f in found] == [
        ("light", "loads", "passed"),
        ("light", "its manifest is light", "passed"),
    ]
    (loads,) = check_all(registry, ["broken"])
    assert (loads.state, loads.reason) == ("failed", "RuntimeError: out of order.")
    heavy = {f.name: f for f in check_all(registry, ["kexue-heavy"])}
    assert heavy["its manifest is light"].reason == "importing it imports jax"
    assert {f.subject for f in check_all(registry, ["probe/x"])} == {"probe/x"}
    with pytest.raises(ComponentNotFoundError, match="No component named 'nothing'"):
        check_all(registry, ["nothing"])


CLASS = """
from kexue.core import Layer, Example
import torch

class Method(Layer):
    \"\"\"Returns what it is given.

    Example:
        >>> 1
        1
    \"\"\"
    def forward(self, features):
        \"\"\"Return it.

        Args:
            features: Any, [batch, time, feature].
        \"\"\"
        return features

    @classmethod
    def example(cls, *, generator=None):
        return Example({}, {"features": torch.randn(3, 2, 2, generator=generator)})
"""

TESTS = """
from kexue.core.conformance import conformance

@conformance("third")
def test_third(check):
    check()

@conformance("broken")
def test_broken(check):
    check()
"""


def test_third_parties_use_it_in_their_own_tests(site: Site, shell: Callable[..., Ran]) -> None:
    hook = site.components("layer/third", target="kexue_third_method:Method")
    site.add("kexue-third", hook.replace("'One.'", "'One.', ('A post, https://example.org',)"))
    site.write("kexue_third_method.py", CLASS)
    site.add("kexue-broken", "raise RuntimeError('out of order')")
    site.write("tests/test_third.py", TESTS)
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '-rA', sys.path[1]]))"
    ran = shell("-c", code, environment=site.environment)
    assert ran.status == 1
    assert "PASSED site/tests/test_third.py::test_third[third-is-sound]" in ran.out
    assert "PASSED site/tests/test_third.py::test_third[layer/third-views]" in ran.out
    assert "FAILED site/tests/test_third.py::test_third[layer/third-rejects-bad-input]" in ran.out
    assert "layer/third: rejects bad input: `features` with a missing axis is accepted" in ran.out
    assert "FAILED site/tests/test_third.py::test_broken[broken-is-sound]" in ran.out
    assert "broken: loads: RuntimeError: out of order." in ran.out
    assert re.search(r"2 failed, \d+ passed, \d+ skipped", ran.out)


@conformance()
def test_installed(check: Callable[[], None]) -> None:
    check()
