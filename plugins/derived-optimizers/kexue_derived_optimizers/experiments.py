"""What post 7094 says of its derivations, checked to the last digits, each by itself.

Gradients are those of a perceptron on random data, or random themselves: identities hold anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Report
from kexue_derived_optimizers.accumulation import with_grad_accumulation
from kexue_derived_optimizers.layer_adaptation import with_layer_adaptation
from kexue_derived_optimizers.lookahead import with_lookahead
from kexue_derived_optimizers.weight_decay import with_weight_decay

__all__ = ["identities"]

_POST = "https://kexue.fm/archives/7094"
_DECAY_PAPER = "https://arxiv.org/abs/1711.05101"
_LAMB_PAPER = "https://arxiv.org/abs/1904.00962"

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_RATE, _DECAY, _EPS, _BETAS = 0.01, 0.1, 1e-6, (0.9, 0.999)
_STEPS = 12
_WINDOW = 4


def identities(context: Context) -> Report:
    """Compare each derivation with what it must be equal to."""
    ours, theirs = _windows(context)
    free, inside, outside = (_norms(context, after) for after in (None, False, True))
    claims = [
        *_about_accumulation(ours, theirs),
        *_about_decay(context),
        Claim(
            "Layer adaptation over Adam: every tensor moves by γ ‖θ‖.",
            f"{_POST}, section “层自适应”",
            f"greatest |‖Δθ‖ / γ‖θ‖ − 1|: {_furthest(free, 1):.1e}",
            "At most 1e-12.",
            _furthest(free, 1) <= 1e-12,
        ),
        Claim(
            "Decay inside the trust ratio leaves the length of the step to the norm of the "
            "parameters; decay after it does not.",
            f"{_POST}, answer of 2022-05-05",
            f"‖Δθ‖ / γ‖θ‖ is 1 within {_furthest(inside, 1):.1e} inside; after it, "
            f"{min(outside):.3f} to {max(outside):.3f}.",
            "1 within 1e-12 inside, more than 0.001 off after it.",
            _furthest(inside, 1) <= 1e-12 and _furthest(outside, 1) > 1e-3,
        ),
        _about_lamb(context),
        _about_slow_weights(context),
    ]
    return Report(claims, notes=[_SETTING])


_SETTING = (
    "float64. What bert4keras does is written out here from its code: accumulation whose step "
    "comes with the next window, and slow weights that start at 0 and are mixed in at iteration 0."
)


# -- material --------------------------------------------------------------------------------------


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def _data(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (rows,), generator=generator)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _distance(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def _apart(seed: int, left: Make, right: Make, steps: int = 20) -> float:
    """Return how far two optimizers come apart on the same batches."""
    models = [_model(seed), _model(seed)]
    for model, make in zip(models, (left, right), strict=True):
        batches = [_data(100 * seed + t, 32) for t in range(steps)]
        _train(model, make(list(model.parameters())), batches)
    return _distance(*(model.parameters() for model in models))


def _furthest(values: Iterable[float], wanted: float) -> float:
    return max(abs(value - wanted) for value in values)


# -- accumulation ----------------------------------------------------------------------------------


def _windows(context: Context) -> tuple[list[float], list[float]]:
    """Return how far small batches end from the large one: with ours, and the way of bert4keras."""
    ours, theirs = [], []
    for seed in context.seeds:
        large = [_data(100 * seed + t, 16 * _WINDOW) for t in range(10)]
        small = [
            part for x, y in large for part in zip(x.chunk(_WINDOW), y.chunk(_WINDOW), strict=True)
        ]
        whole, parts, late = (_model(seed) for _ in range(3))
        _train(whole, torch.optim.Adam(whole.parameters(), lr=_RATE), large)
        accumulating = with_grad_accumulation(torch.optim.Adam, grad_accum_steps=_WINDOW)
        _train(parts, accumulating(parts.parameters(), lr=_RATE), small)
        _train(late, _LateAdam(list(late.parameters())), small)
        ours.append(_distance(whole.parameters(), parts.parameters()))
        theirs.append(_distance(whole.parameters(), late.parameters()))
    return ours, theirs


class _LateAdam(torch.optim.Optimizer):
    """Adam accumulating as bert4keras does: t counts calls, the step uses the last window's sum."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.own = params
        self.t = 0
        self.sums, self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(3))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the step of the last window if a new one begins, and add the gradient."""
        del closure
        begins = self.t % _WINDOW == 0
        self.t += 1
        for p, total, m, v in zip(self.own, self.sums, self.m, self.v, strict=True):
            if begins:
                mean = total / _WINDOW
                m.lerp_(mean, 1 - _BETAS[0])
                v.lerp_(mean**2, 1 - _BETAS[1])
                u = (m / (1 - _BETAS[0] ** self.t)) / (
                    (v / (1 - _BETAS[1] ** self.t)).sqrt() + 1e-8
                )
                p.sub_(_RATE * u)
                total.zero_()
            if p.grad is not None:
                total.add_(p.grad)


def _about_accumulation(ours: Sequence[float], theirs: Sequence[float]) -> list[Claim]:
    return [
        Claim(
            f"{_WINDOW} small batches are one large batch, Adam's bias correction included.",
            f"{_POST}, section “梯度累积”",
            f"after 10 updates parameters differ by {max(ours):.1e}",
            "At most 1e-12.",
            max(ours) <= 1e-12,
        ),
        Claim(
            "The code of bert4keras accumulates to another trajectory than the large batch's.",
            "bert4keras, optimizers.py; comment of 2020-07-04 on the post",
            f"after 10 updates parameters differ by {min(theirs):.1e} to {max(theirs):.1e}",
            "More than 1e-3.",
            min(theirs) > 1e-3,
        ),
    ]


# -- weight decay ----------------------------------------------------------------------------------


def _about_decay(context: Context) -> list[Claim]:
    adam: Any = torch.optim.Adam
    sgd: Any = torch.optim.SGD
    decayed_adam, decayed_sgd = (
        with_weight_decay(base, weight_decay_rate=_DECAY) for base in (adam, sgd)
    )

    def most(left: Make, right: Make) -> list[float]:
        return [_apart(seed, left, right) for seed in context.seeds]

    of_adamw = most(
        partial(decayed_adam, lr=_RATE),
        partial(torch.optim.AdamW, lr=_RATE, weight_decay=_DECAY),
    )
    of_l2 = most(partial(decayed_adam, lr=_RATE), partial(adam, lr=_RATE, weight_decay=_DECAY))
    # as a loop it multiplies θ; the fused kernel would be given the very term it is compared with
    looped = partial(decayed_sgd, lr=0.1, foreach=False)
    of_sgd = most(looped, partial(sgd, lr=0.1, weight_decay=_DECAY))
    of_momentum = most(
        partial(decayed_sgd, lr=0.1, momentum=0.9),
        partial(sgd, lr=0.1, momentum=0.9, weight_decay=_DECAY),
    )
    return [
        Claim(
            "Weight decay over Adam is AdamW.",
            f"{_POST}, section “权重衰减”; {_DECAY_PAPER}, algorithm 2",
            f"from torch.optim.AdamW after 20 steps: {max(of_adamw):.1e}",
            "0, bit for bit.",
            max(of_adamw) == 0,
        ),
        Claim(
            "In SGD, weight decay is an L2 term in the loss.",
            f"{_POST}, section “权重衰减”",
            f"SGD and its L2 term, after 20 steps: {max(of_sgd):.1e}; with momentum 0.9: "
            f"{min(of_momentum):.1e} or more.",
            "At most 1e-12 without momentum. (With it, the post does not say: more than 1e-3.)",
            max(of_sgd) <= 1e-12 and min(of_momentum) > 1e-3,
        ),
        Claim(
            "In Adam, weight decay is no L2 term in the loss.",
            f"{_POST}, section “权重衰减”; {_DECAY_PAPER}, proposition 2",
            f"Adam and its L2 term, after 20 steps: {min(of_l2):.1e} or more",
            "More than 1e-3.",
            min(of_l2) > 1e-3,
        ),
    ]


# -- layer adaptation ------------------------------------------------------------------------------


def _norms(context: Context, with_decay_after: bool | None) -> list[float]:
    """Return ‖Δθ‖ / γ‖θ‖ of all tensors and steps; None is without decay."""
    make: Any = torch.optim.Adam
    if with_decay_after is False:
        make = with_weight_decay(make, weight_decay_rate=_DECAY)
    make = with_layer_adaptation(make)
    if with_decay_after:
        make = with_weight_decay(make, weight_decay_rate=_DECAY)
    found = []
    for seed in context.seeds:
        model = _model(seed)
        optimizer = make(model.parameters(), lr=_RATE)
        for t in range(10):
            before = [p.detach().clone() for p in model.parameters()]
            _train(model, optimizer, [_data(100 * seed + t, 32)])
            for p, old in zip(model.parameters(), before, strict=True):
                found.append(float((p.detach() - old).norm() / (_RATE * old.norm())))
    return found


def _about_lamb(context: Context) -> Claim:
    """Compare with algorithm 2 of the paper, written out tensor by tensor."""
    errors = []
    lamb = with_layer_adaptation(with_weight_decay(torch.optim.Adam, weight_decay_rate=_DECAY))
    for seed in context.seeds:
        model = _model(seed)
        twin = [p.detach().clone() for p in model.parameters()]
        m, v = ([torch.zeros_like(x) for x in twin] for _ in range(2))
        optimizer = lamb(model.parameters(), lr=_RATE, betas=_BETAS, eps=_EPS)
        for t in range(1, 21):
            _train(model, optimizer, [_data(100 * seed + t, 32)])
            for i, p in enumerate(model.parameters()):
                if p.grad is None:
                    continue
                m[i] = _BETAS[0] * m[i] + (1 - _BETAS[0]) * p.grad
                v[i] = _BETAS[1] * v[i] + (1 - _BETAS[1]) * p.grad**2
                first, second = m[i] / (1 - _BETAS[0] ** t), v[i] / (1 - _BETAS[1] ** t)
                r = first / (second.sqrt() + _EPS) + _DECAY * twin[i]
                twin[i] = twin[i] - _RATE * twin[i].norm() / r.norm() * r
        errors.append(_distance(model.parameters(), twin))
    return Claim(
        "Layer adaptation over weight decay over Adam is LAMB.",
        f"{_POST}, section “层自适应”; {_LAMB_PAPER}, algorithm 2",
        f"from the formula after 20 steps: {max(errors):.1e}",
        "At most 1e-12.",
        max(errors) <= 1e-12,
    )


# -- Lookahead -------------------------------------------------------------------------------------


def _about_slow_weights(context: Context) -> Claim:
    theirs, ours = [], []
    for seed in context.seeds:
        model = _model(seed)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = with_lookahead(torch.optim.Adam)(model.parameters(), lr=1e-3)
        _train(model, optimizer, [_data(seed, 32)])
        fast = torch.cat([p.detach().flatten() for p in model.parameters()])
        ours.append(float(fast.norm() / start.norm()))
        theirs.append(float((0.5 * fast).norm() / start.norm()))  # 0 + α (θ − 0) at iteration 0
    return Claim(
        "Slow weights that start at 0, as in bert4keras, halve the model in the first step.",
        "bert4keras, optimizers.py",
        f"‖θ‖ after the first step over ‖θ‖ before: {min(theirs):.4f} to {max(theirs):.4f}; ours "
        f"{min(ours):.4f} to {max(ours):.4f}.",
        "Within 0.02 of 0.5; ours within 0.04 of 1.",
        _furthest(theirs, 0.5) <= 0.02 and _furthest(ours, 1) <= 0.04,
    )
