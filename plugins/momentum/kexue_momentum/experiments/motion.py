"""The ball in a bowl, a ravine and a double well: friction, speed, and what it passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kexue.core import Claim, Context, Figure, Report, Table
from kexue.core.lab.data import digits
from kexue.core.plots import paths
from kexue.core.text import spread
from kexue_momentum.dynamics import from_dynamics, optimal_rates, spectral_radius, to_dynamics
from kexue_momentum.experiments.threads import one_thread
from kexue_momentum.momentum import HalfNesterov, Momentum, Nesterov

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["motion"]

_POST = "https://kexue.fm/archives/5655"
_GAMMA = 0.05
_FRICTIONS = {"underdamped": 0.3, "critically damped": 2.0, "overdamped": 6.0}
_RAVINE = torch.tensor([1.0, 40.0], dtype=torch.float64)
_CONDITIONS = (10, 100, 400)


def motion(context: Context) -> Report:
    """Let the ball roll, and measure."""
    bowl = {name: _roll(_bowl, (1.0,), friction) for name, friction in _FRICTIONS.items()}
    speeds, rows = _speeds(context)
    wells = {name: _roll(_wells, (-1.6,), f) for name, f in (("λ = 0.3", 0.3), ("λ = 3", 3.0))}
    wells["gradient descent"] = _descend(_wells, (-1.6,))
    with one_thread():
        learned, curves = _regression(context)
    claims = [
        _damping(bowl),
        _stops(context),
        *speeds,
        _crossing(wells),
        learned,
    ]
    figures = [
        Figure(
            "The ball in a bowl",
            partial(_plot_bowl, bowl),
            "θ over time, L = θ²/2, dots by the optimizer and lines by the solution of the equation"
            " of motion. Critical damping, λ = 2, is fastest of all.",
        ),
        Figure(
            "The ball in a ravine",
            partial(_plot_ravine, context),
            "L = (x² + 40 y²)/2: 120 steps each of about the same α. Underdamped it swings, "
            "overdamped it creeps along the bottom; descent has the rate of the ball.",
        ),
        Figure(
            "Momentum and Nesterov's in the ravine",
            _plot_nesterov,
            "α = 0.02, β = 0.9, 60 steps; the further the gradient looks ahead, the sooner "
            "the swing across the ravine is over.",
        ),
        Figure(
            "Error over steps, condition number 100",
            partial(_plot_errors, context),
            "Polyak's rates beside other momenta at the same α, and gradient descent at its best.",
        ),
        Figure(
            "Two wells",
            partial(_plot_wells, wells),
            "From the left. Descent and strong friction end in the shallow well; with little "
            "friction the ball passes the hill.",
        ),
        Figure("Digits", partial(_plot_digits, curves), "Softmax regression on all images."),
    ]
    columns = ["κ", "method", "α", "β", "factor per step, measured", "theory", "steps to 1e-6"]
    tables = [Table("Speed on quadratics", columns, rows)]
    about = (
        "Quadratics have 50 curvatures from 1 to κ, equally spaced in the logarithm, and begin at "
        "a random point; the factor is the slope of log ‖θ‖ in the later half."
    )
    wells_are = "Two wells: L = (θ² − 1)²/4 − 0.3 θ, whose left minimum is the shallower one."
    return Report(claims, tables, figures, [about, wells_are])


# -- landscapes --------------------------------------------------------------------------------


def _bowl(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


def _valley(x: Tensor) -> Tensor:
    return (_RAVINE * x.square()).sum(-1) / 2


def _wells(x: Tensor) -> Tensor:
    return ((x.square() - 1).square() / 4 - 0.3 * x).sum(-1)


def _run(
    loss: Callable[[Tensor], Tensor],
    start: Iterable[float],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
) -> Tensor:
    """Return the way, ``[step, feature]``."""
    p = nn.Parameter(torch.tensor(list(start), dtype=torch.float64))
    optimizer = make([p])
    way = [p.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        way.append(p.detach().clone())
    return torch.stack(way)


def _roll(
    loss: Callable[[Tensor], Tensor], start: Iterable[float], friction: float, time: float = 20.0
) -> Tensor:
    rates = from_dynamics(_GAMMA, friction)
    make = partial(Momentum, lr=rates.lr, momentum=rates.momentum, half_step_start=True)
    return _run(loss, start, make, round(time / _GAMMA))


def _descend(loss: Callable[[Tensor], Tensor], start: Iterable[float]) -> Tensor:
    return _run(loss, start, partial(Momentum, lr=_GAMMA, momentum=0.0), 400)


# -- friction ----------------------------------------------------------------------------------


def _exact(friction: float, time: float) -> float:
    """Return θ of θ'' + λθ' = −θ, from rest at 1."""
    half = friction / 2
    if friction == 2:
        return (1 + time) * math.exp(-time)
    if friction < 2:
        w = math.sqrt(1 - half**2)
        return math.exp(-half * time) * (math.cos(w * time) + half / w * math.sin(w * time))
    slow, fast = -half + math.sqrt(half**2 - 1), -half - math.sqrt(half**2 - 1)
    return (fast * math.exp(slow * time) - slow * math.exp(fast * time)) / (fast - slow)


def _damping(bowl: Mapping[str, Tensor]) -> Claim:
    errors, passes, late = {}, {}, {}
    for name, way in bowl.items():
        line = way[:, 0].tolist()
        exact = [_exact(_FRICTIONS[name], _GAMMA * i) for i in range(len(line))]
        errors[name] = max(abs(a - b) for a, b in zip(line, exact, strict=True))
        big = [x for x in line if abs(x) > 1e-6]
        passes[name] = sum(a * b < 0 for a, b in pairwise(big))
        late[name] = max(abs(x) for x in line[200:])
    said = ", ".join(f"{n} (λ = {_FRICTIONS[n]:g}) {passes[n]}" for n in bowl)
    fastest = min(late, key=lambda n: late[n])
    return Claim(
        "Momentum is a ball with friction: it swings below λ = 2√k, creeps above, and is fastest "
        "at it.",
        f"{_POST}, section “GD+Momentum”",
        f"k = 1, γ = {_GAMMA}: at most {max(errors.values()):.1e} from the exact motion; passages "
        f"of 0: {said}; greatest |θ| from a time of 10 on: "
        + ", ".join(f"{late[n]:.1g}" for n in bowl)
        + ".",
        "Within 1e-3; passages only if underdamped; critical damping nearest to 0.",
        max(errors.values()) <= 1e-3
        and passes["underdamped"] > 1
        and passes["critically damped"] == passes["overdamped"] == 0
        and fastest == "critically damped",
    )


def _stops(context: Context) -> Claim:
    """Without friction the energy stays; the leapfrog scheme itself is run, which needs β = 1."""
    steps = context.pick(10_000, 2000)
    x, v = 1.0, 0.5 * _GAMMA**2  # the half-step start
    energies = []
    for _ in range(steps):
        v -= _GAMMA**2 * x
        x += v
        middle = x - v / 2
        energies.append((middle**2 + (v / _GAMMA) ** 2) / 2)
    late = max(energies[-steps // 10 :])
    frictional = _roll(_bowl, (1.0,), 0.3, 150.0)[-100:, 0].abs().max()
    return Claim(
        "Without friction the ball never stops; with it, it does.",
        f"{_POST}, section “如何加速？”",
        f"β = 1: energy {min(energies):.4f} to {max(energies):.4f} over {steps} steps, {late:.4f} "
        f"at last, from 0.5; λ = 0.3: |θ| at most {float(frictional):.1e} at a time of 145 to 150.",
        "Energy within 1 % of 0.5; below 1e-9.",
        all(abs(e - 0.5) <= 0.005 for e in energies) and float(frictional) < 1e-9,
    )


# -- speed -------------------------------------------------------------------------------------


def _errors(
    seeds: Sequence[int],
    condition: int,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
) -> list[list[float]]:
    """Return, for each seed, ‖θ‖ over the steps, 1 at first."""
    curvatures = torch.logspace(0, math.log10(condition), 50, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start = torch.stack([torch.randn(50, generator=g, dtype=torch.float64) for g in generators])
    p = nn.Parameter(start / start.norm(dim=1, keepdim=True))
    optimizer = make([p])
    norms = [p.detach().norm(dim=1)]
    for _ in range(steps):
        p.grad = curvatures * p.detach()
        optimizer.step()
        norms.append(p.detach().norm(dim=1))
    found: list[list[float]] = torch.stack(norms, 1).tolist()
    return found


def _factor(norms: Sequence[float]) -> float:
    """Return the mean factor per step in the later half of what is above 1e-13."""
    kept = [x for x in norms if x > 1e-13]
    first, last = len(kept) // 2, len(kept) - 1
    return float((kept[last] / kept[first]) ** (1 / (last - first)))


def _steps_to(norms: Sequence[float], target: float) -> int | None:
    return next((i for i, x in enumerate(norms) if x <= target), None)


def _speeds(context: Context) -> tuple[list[Claim], list[list[Any]]]:
    rows: list[list[Any]] = []
    worst = 0.0
    for condition in context.pick(_CONDITIONS, _CONDITIONS[:2]):
        best = optimal_rates(1.0, condition)
        descent = 2 / (1 + condition)
        plan = {
            "gradient descent": (Momentum, descent, 0.0, (condition - 1) / (condition + 1)),
            "momentum": (Momentum, *best, math.sqrt(best.momentum)),
        }
        for name, (cls, lr, momentum, theory) in plan.items():
            steps = math.ceil(math.log(1e-8) / math.log(theory))
            make = partial(cls, lr=lr, momentum=momentum)
            runs = _errors(context.seeds, condition, make, steps)
            factors = [_factor(norms) for norms in runs]
            worst = max(worst, *(abs(math.log(f) / math.log(theory) - 1) for f in factors))
            taken = [_steps_to(norms, 1e-6) for norms in runs]
            shown = ", ".join("–" if t is None else str(t) for t in taken)
            rows.append([condition, name, lr, momentum, spread(factors, 4), theory, shown])
    found, grid = _best_momentum(context)
    same = _same_rate(context)
    ratios = [slow / fast for fast, slow in same]
    radii = [spectral_radius(0.01, b, 1.0) for b in (0.9, 0.0)]
    return [
        Claim(
            "With Polyak's rates errors shrink by (√κ − 1)/(√κ + 1) a step, with descent's best "
            "by (κ − 1)/(κ + 1).",
            "Polyak 1964",
            f"slope of log ‖θ‖ over theory's, κ = {_range(rows)}: "
            f"off by at most {100 * worst:.1f} %.",
            "within 15 %, the multiplicity of the root included",
            worst <= 0.15,
        ),
        Claim(
            "There is a best momentum for a condition number, and it is Polyak's.",
            "Polyak 1964",
            f"κ = 100, α of Polyak: of {grid} those nearest to 0 after 150 steps are "
            + ", ".join(f"{b:.3f}" for b in found)
            + f" (one per seed), Polyak's β is {optimal_rates(1.0, 100.0).momentum:.3f}.",
            "The grid's nearest to Polyak's.",
            all(abs(b - optimal_rates(1.0, 100.0).momentum) <= 0.0151 for b in found),
        ),
        Claim(
            "At the same learning rate momentum needs fewer steps than gradient descent.",
            f"{_POST}, section “如何加速？”",
            f"κ = 100, α = 0.01, β = 0.9: ‖θ‖ ≤ 1e-4 after {', '.join(str(a) for a, _ in same)} "
            f"steps, where descent takes {', '.join(str(b) for _, b in same)}: "
            f"{spread(ratios, 2)} times as many. Factors on the slowest direction: {radii[0]:.4f} "
            f"and {radii[1]:.4f}.",
            "At least twice as many.",
            min(ratios) >= 2,
        ),
    ], rows


def _range(rows: Sequence[Sequence[Any]]) -> str:
    conditions = sorted({row[0] for row in rows})
    return f"{conditions[0]} to {conditions[-1]}"


def _best_momentum(context: Context) -> tuple[list[float], str]:
    lr, best = optimal_rates(1.0, 100.0)
    momenta = [best + 0.03 * k for k in range(-4, 5)]
    at_last = {
        b: [n[-1] for n in _errors(context.seeds, 100, partial(Momentum, lr=lr, momentum=b), 150)]
        for b in momenta
    }
    found = [min(momenta, key=lambda b: at_last[b][i]) for i in range(len(context.seeds))]
    return found, f"{len(momenta)} momenta from {momenta[0]:.3f} to {momenta[-1]:.3f}"


def _same_rate(context: Context) -> list[tuple[int, int]]:
    """Return the steps of momentum and of descent, per seed."""
    counts = []
    for momentum in (0.9, 0.0):
        make = partial(Momentum, lr=0.01, momentum=momentum)
        runs = _errors(context.seeds, 100, make, 1000)
        counts.append([_steps_to(norms, 1e-4) or 10**9 for norms in runs])
    return list(zip(*counts, strict=True))


# -- what it passes, what it learns ------------------------------------------------------------


def _crossing(wells: Mapping[str, Tensor]) -> Claim:
    ends = {name: float(way[-1, 0]) for name, way in wells.items()}
    gamma, _ = to_dynamics(*from_dynamics(_GAMMA, 0.3))
    return Claim(
        "With little friction the ball passes a minimum in which gradient descent stays.",
        f"{_POST}, section “如何加速？”",
        f"from −1.6, γ = {gamma:.2g}: "
        + ", ".join(f"{n} ends at {x:.2f}" for n, x in ends.items())
        + ".",
        "λ = 0.3 on the right, the others on the left.",
        ends["λ = 0.3"] > 0 and ends["λ = 3"] < 0 and ends["gradient descent"] < 0,
    )


def _regression(context: Context) -> tuple[Claim, dict[str, list[float]]]:
    """Softmax regression on the digits: steps to a loss, at the same rate."""
    images = digits()
    x = torch.from_numpy(images.images).flatten(1).double()
    y = torch.from_numpy(images.labels)
    one_hot = nn.functional.one_hot(y, 10).double()
    steps = context.pick(400, 150)
    plan: dict[str, tuple[type[Any], float]] = {
        "gradient descent": (Momentum, 0.0),
        "momentum": (Momentum, 0.9),
        "half Nesterov": (HalfNesterov, 0.9),
        "Nesterov": (Nesterov, 0.9),
    }
    curves: dict[str, list[float]] = {}
    for name, (cls, momentum) in plan.items():
        weight = nn.Parameter(x.new_zeros(64, 10))
        optimizer = cls([weight], lr=0.3, momentum=momentum)
        losses = []
        for _ in range(steps):
            log_p = torch.log_softmax(x @ weight.detach(), -1)
            losses.append(-float((log_p * one_hot).sum()) / len(x))
            weight.grad = x.T @ (log_p.exp() - one_hot) / len(x)
            optimizer.step()
        curves[name] = losses
    target = curves["gradient descent"][-1]
    taken = {name: _steps_to(line, target) for name, line in curves.items()}
    ours = [t for name, t in taken.items() if name != "gradient descent" and t is not None]
    claim = Claim(
        "At the same learning rate momentum and Nesterov's need fewer steps, on digits too.",
        f"{_POST}, section “如何加速？”",
        f"softmax regression on all digits, α = 0.3, β = 0.9: the loss of {target:.4f}, which "
        f"gradient descent has after {steps - 1} steps, after "
        + ", ".join(f"{t} ({n})" for n, t in taken.items() if n != "gradient descent")
        + ".",
        "At most half the steps.",
        len(ours) == 3 and max(ours) <= (steps - 1) / 2,
    )
    return claim, curves


# -- pictures ----------------------------------------------------------------------------------


def _plot_bowl(bowl: Mapping[str, Tensor], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, way in bowl.items():
        line = way[:, 0].tolist()
        times = [_GAMMA * i for i in range(len(line))]
        (drawn,) = axes.plot(
            times, [_exact(_FRICTIONS[name], t) for t in times], linewidth=1, label=name
        )
        axes.plot(times[::8], line[::8], ".", color=drawn.get_color(), markersize=4)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="time", ylabel="θ")
    axes.legend()


def _plot_ravine(context: Context, canvas: Canvas) -> None:
    del context
    start = (-4.0, 0.8)
    gamma = 0.1
    ways = {}
    for name, friction in _FRICTIONS.items():
        rates = from_dynamics(gamma, friction)
        make = partial(Momentum, lr=rates.lr, momentum=rates.momentum, half_step_start=True)
        ways[f"{name}, λ = {friction:g}"] = _run(_valley, start, make, 120)
    ways["gradient descent"] = _run(
        _valley, start, partial(Momentum, lr=gamma**2, momentum=0.0), 120
    )
    _ways(canvas, ways)


def _plot_nesterov(canvas: Canvas) -> None:
    plan: dict[str, Any] = {
        "momentum": Momentum,
        "half Nesterov": HalfNesterov,
        "Nesterov": Nesterov,
    }
    start = (-4.0, 0.8)
    _ways(
        canvas,
        {n: _run(_valley, start, partial(c, lr=0.02, momentum=0.9), 60) for n, c in plan.items()},
    )


def _ways(canvas: Canvas, ways: Mapping[str, Tensor]) -> None:
    paths(canvas, _valley, ways)
    axes = canvas.axes[0]
    axes.set(xlabel="x", ylabel="y")
    axes.legend(fontsize="small", loc="upper right")


def _plot_errors(context: Context, canvas: Canvas) -> None:
    del context
    lr, best = optimal_rates(1.0, 100.0)
    lines = {
        "gradient descent, α = 2/101": (2 / 101, 0.0),
        f"β = {best - 0.2:.2f}": (lr, best - 0.2),
        f"Polyak's, β = {best:.2f}": (lr, best),
        f"β = {best + 0.2:.2f}": (lr, best + 0.2),
    }
    axes = canvas.subplots()
    for name, (rate, momentum) in lines.items():
        make = partial(Momentum, lr=rate, momentum=momentum)
        axes.plot(_errors([0], 100, make, 150)[0], label=name)
    axes.plot(
        [math.sqrt(best) ** i for i in range(151)], ":", color="black", label="√β to the step"
    )
    axes.set(xlabel="step", ylabel="‖θ‖", yscale="log")
    axes.legend(fontsize="small")


def _plot_wells(wells: Mapping[str, Tensor], canvas: Canvas) -> None:
    left, right = canvas.subplots(1, 2)
    grid = torch.linspace(-1.8, 1.8, 200, dtype=torch.float64)[:, None]
    left.plot(grid[:, 0].tolist(), _wells(grid).tolist(), color="grey")
    left.set(xlabel="θ", ylabel="L")
    for name, way in wells.items():
        right.plot([_GAMMA * i for i in range(len(way))], way[:, 0].tolist(), label=name)
        left.plot(way[-1, 0].item(), _wells(way[-1:]).item(), "o", label=name)
    right.set(xlabel="time", ylabel="θ")
    right.legend(fontsize="small")


def _plot_digits(curves: Mapping[str, Sequence[float]], canvas: Canvas) -> None:
    axes = canvas.subplots()
    for name, line in curves.items():
        axes.plot(range(len(line)), line, label=name)
    axes.set(xlabel="step", ylabel="loss, nats", xscale="log", yscale="log")
    axes.legend()
