"""Weight dynamics (source A of docs/theory.md): does E = ‖g‖/‖w‖ move as the model of `elropt.dynamics` says?

For plain SGD the growth of ‖w‖ is exact, so all that the model assumes is that c = ‖g‖·‖w‖ stays. Five measurements:
whole runs at a constant learning rate (`Trajectory`); one turn by a set angle (`Turn`); the spread after a few steps
against the learning rate (`Critical`); how gradients grow towards the input at initialization (`Explosion`). Logarithms
are natural. "Common" is a mean over layers, "individual" the standard deviation over layers around it; only the
individual part changes ratios of ELRs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullFormatter
from numpy.typing import ArrayLike, NDArray
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import elropt
from benchmarks import data, models, training
from benchmarks.statistics import Interval, interval
from benchmarks.studies.study import Study
from benchmarks.sweep import Row
from elropt import dynamics
from elropt.plots import COLORS, DEPTH, MARKERS, save

Array: TypeAlias = NDArray[np.float64]
Batch: TypeAlias = tuple[Tensor, Tensor]

EXPLOSION = math.sqrt(math.pi / (math.pi - 1))  # of gradient norms, per BN-ReLU layer
LRS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ANGLES = (0.0001, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)  # λE, the tangent
AFTER = (1, 2, 5)  # steps after which `Critical` looks at the spread
SMOOTHING = (0.0, 0.5, 0.9)
BINS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)  # of the largest λE of a step
TOLERANCE = math.log(1.3)
DRAWN_LAYERS = 12


@dataclasses.dataclass(frozen=True)
class Net:
    """A net (`models.build`), its data and its batches. A transformer gets QK-norm, and queries and keys no bias, so
    that their weights are scale-invariant on their own."""

    model: str
    batch_size: int = 128
    data: str = "digits"
    image_size: int | None = None
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A run of SGD at a constant learning rate; if `relative`, `lr` is in units of the first step's monotone one."""

    net: Net
    seed: int
    lr: float
    steps: int
    relative: bool = False
    momentum: float = 0.0
    kind: str = "trajectory"


@dataclasses.dataclass(frozen=True)
class Turn:
    """Turn layers by the same angle along their gradients, and see what becomes of c on the same batch."""

    net: Net
    seed: int
    angles: tuple[float, ...] = ANGLES
    layers: int = 10
    kind: str = "turn"


@dataclasses.dataclass(frozen=True)
class Critical:
    """The spread after `AFTER` steps, for learning rates from monotone/10 to 10·balance in steps of `factor`."""

    net: Net
    seed: int
    factor: float = 1.5
    kind: str = "critical"


@dataclasses.dataclass(frozen=True)
class Explosion:
    """Norms of gradients at initialization, layer by layer."""

    net: Net
    seed: int
    kind: str = "explosion"


Spec: TypeAlias = Trajectory | Turn | Critical | Explosion


# Measuring


def work(spec: Spec) -> Row:
    """The row of one spec."""
    works: dict[str, Callable[[Any], Row]] = {
        "trajectory": measure_trajectory,
        "turn": measure_turn,
        "critical": measure_critical,
        "explosion": measure_explosion,
    }
    return works[spec.kind](spec)


class Bench:
    """A net at its initialization, its tracked weights from the input to the output, and its batches."""

    def __init__(self, net: Net, seed: int) -> None:
        task = training.Task(net.model, data=net.data, image_size=net.image_size, device=net.device)
        self.dataset: data.Dataset = training.load(task)
        self.net, self.seed = net, seed
        options: dict[str, object] = {"qk_norm": True} if net.model.startswith("ln-transformer") else {}
        torch.manual_seed(seed)
        model = models.build(
            net.model, in_shape=self.dataset.in_shape, classes=self.dataset.classes, **options
        )
        for module in model.modules():
            if isinstance(module, models.Attention):
                module.query.bias = module.key.bias = None  # type: ignore[assignment]
        self.model = model.to(net.device)
        images, _ = next(self.dataset.batches("train", 32))
        groups = elropt.param_groups(self.model, images)
        self.weights: list[Tensor] = next(group["params"] for group in groups if group["scale_invariant"])

    def batches(self) -> Iterator[Batch]:
        """Shuffled batches without end."""
        for epoch in itertools.count():
            yield from self.dataset.batches("train", self.net.batch_size, seed=(self.seed, epoch))

    def norms(self, batch: Batch) -> Tensor:
        """Leave the gradients of a batch in `.grad`; ‖w‖ and ‖g‖ of the tracked weights and the loss, [2, L + 1]."""
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        grads = [weight.grad for weight in self.weights]
        rows = [[*torch._foreach_norm(self.weights), loss], [*torch._foreach_norm(grads), loss]]  # type: ignore[arg-type]
        return torch.stack([torch.stack(row) for row in rows]).detach()


def measure_trajectory(spec: Trajectory) -> Row:
    """Train, and compare what was measured with what the model says of it: see `compare`."""
    bench = Bench(spec.net, spec.seed)
    batches = bench.batches()
    batch = next(batches)
    norms = [bench.norms(batch)]
    E0 = _numpy(norms[0][1, :-1] / norms[0][0, :-1])
    lr = spec.lr * (float(dynamics.monotone_lr(E0)) if spec.relative else 1.0)
    optimizer = torch.optim.SGD(bench.model.parameters(), lr=lr, momentum=spec.momentum)
    same: dict[int, Tensor] = {}
    cosines: list[Tensor] = []
    due = set(recorded_steps(spec.steps))
    for step in range(spec.steps):
        if step in due and step > 0 and spec.momentum:
            buffers = [optimizer.state[weight]["momentum_buffer"] for weight in bench.weights]
            cosines.append(tangential_cosines(bench.weights, buffers).median())
        optimizer.step()
        if step in due:
            same[step] = bench.norms(batch)
        batch = next(batches)
        norms.append(bench.norms(batch))
    # [T + 1, 2, L + 1] up to the last step at which all is positive and finite
    measured = _numpy(torch.stack(norms))
    broken = np.flatnonzero(~(np.isfinite(measured).all((1, 2)) & (measured[:, :, :-1] > 0).all((1, 2))))
    end = int(broken[0]) if broken.size else len(measured)
    row: Row = {
        "lr": _significant(lr),
        "layers": len(E0),
        "monotone": _significant(float(dynamics.monotone_lr(E0))),
        "balance": _significant(float(dynamics.balance_lr(E0))),
        "finite": end == len(measured),
        "steps_measured": end - 1,
    }
    if end < 2:
        return row
    on_same = {step: _numpy(value)[:, :-1] for step, value in same.items() if step < end - 1}
    cosine = float(torch.stack(cosines).nanmean()) if cosines else math.nan
    w, g = measured[:end, 0, :-1], measured[:end, 1, :-1]
    row |= {"loss": [_significant(measured[0, 0, -1]), _significant(measured[end - 1, 0, -1])]}
    return row | rounded(compare(w, g, on_same, lr, spec.momentum, cosine, keep_layers=spec.seed == 0))


def tangential_cosines(weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> Tensor:
    """Per weight the cosine between its `.grad` and the part of its momentum that is orthogonal to it, [L]."""
    cosines = []
    for weight, buffer in zip(weights, buffers, strict=True):
        w, m, g = weight.detach().flatten(), buffer.flatten(), weight.grad.flatten()  # type: ignore[union-attr]
        cosines.append(F.cosine_similarity(m - (m @ w) / (w @ w) * w, g, dim=0))
    return torch.stack(cosines)


def compare(
    w: Array,
    g: Array,
    on_same: dict[int, Array],
    lr: float,
    momentum: float = 0.0,
    cosine: float = math.nan,
    keep_layers: bool = False,
) -> dict[str, Any]:
    """Measured norms against the model.

    Args:
        w, g: ‖w‖ and ‖g‖ before every step, the first batch's before the first, [T + 1, L].
        on_same: step → ‖w‖ and ‖g‖ after that step on the batch of that step, [2, L].
        cosine: how gradients are directed, for the third closure of momentum.
        keep_layers: also E, c and the model's E of some layers.

    Returns:
        columns over the recorded steps `at` (of `on_same` and the end), and numbers for the whole run:
        log_std, spread (also `model_…` from the first E alone, `common_…` with the measured common change of c).
        error_…: predicted against measured ln E, common and individual part. c_…: ln c against the first.
        turn_…, noise_…: change of ln c in one step on its own batch, and from that batch to the next. law_individual:
        what the model says that the step does to ln E, step_individual: what it did on its batch. max_lr_E: largest
        λE. rounding: largest error in
        ln E if every c is the measured one. forecast: error of ln c one step ahead, from its mean over the past with
        weights `SMOOTHING`, individual. growth: ln ‖w‖² gained, measured and by closure (momentum only).
    """
    E, c = g / w, g * w
    T = len(E) - 1
    at = [*sorted(on_same), T]
    log_c = np.log(c / c[0])
    common_c = np.repeat(np.exp(log_c.mean(1, keepdims=True)), E.shape[1], axis=1)
    forecasts = {"aligned": dynamics.simulate(E[0], lr, T, momentum)}
    if momentum:
        forecasts["independent"] = dynamics.simulate(E[0], lr, T, momentum, gradients="independent")
    else:
        forecasts["common"] = with_sphere_grads(E[0], common_c, lr)
    model = forecasts.pop("aligned")
    columns: dict[str, Any] = {"at": at, "log_std": log_std(E[at]), "spread": dynamics.elr_spread(E[at])}
    columns |= {"model_log_std": log_std(model[at]), "model_spread": dynamics.elr_spread(model[at])}
    columns |= {f"{name}_log_std": log_std(values[at]) for name, values in forecasts.items()}
    for name, values in {"model": model, **forecasts}.items():
        error = np.log(values[at] / E[at])
        columns |= {f"{name}_error_common": error.mean(1), f"{name}_error_individual": error.std(1)}
    columns |= {"c_common": log_c[at].mean(1), "c_individual": log_c[at].std(1)}
    if momentum:
        measured = 2 * np.log(w[-1] / w[0])
        columns["cosine"] = cosine
        columns["growth"] = {"measured": np.median(measured)} | {
            name: np.median(log_growth(E[:-1], lr, momentum, value)[-1])
            for name, value in {"aligned": 1.0, "independent": 0.0, "cosine": cosine}.items()
        }
    else:
        with_c = with_sphere_grads(E[0], c / c[0], lr)
        columns["rounding"] = np.abs(np.log(with_c / E)).max()
        columns["forecast"] = [_forecast_error(log_c, share) for share in SMOOTHING]
        after = {step: np.log(w1 * g1 / c[step]) for step, (w1, g1) in on_same.items()}
        steps = sorted(after)
        turn = np.stack([after[step] for step in steps])
        noise = np.stack([log_c[step + 1] - log_c[step] - after[step] for step in steps])
        law = np.log1p((lr * E[steps]) ** 2)
        columns |= {"turn_common": turn.mean(1), "turn_individual": turn.std(1), "law_individual": law.std(1)}
        columns |= {"noise_common": noise.mean(1), "noise_individual": noise.std(1)}
        columns |= {"step_individual": (turn - law).std(1), "max_lr_E": lr * E[steps].max(1)}
    if keep_layers:
        kept = np.unique(np.linspace(0, E.shape[1] - 1, DRAWN_LAYERS).round().astype(int))
        columns |= {"kept": kept, "E": E[at][:, kept], "model_E": model[at][:, kept], "c": c[at][:, kept]}
    return columns


def with_sphere_grads(E0: Array, c: Array, lr: float) -> Array:
    """The model with c given: E of the steps 0 … T, [T + 1, L], from c relative to the first one, [T + 1, L].

    The growth of ‖w‖ is that of plain SGD. With c = 1 it is `dynamics.simulate`.
    """
    E, norm_sq = np.empty_like(c), np.ones_like(E0)
    for step in range(len(c)):
        E[step] = E0 * c[step] / norm_sq
        norm_sq = norm_sq * (1 + (lr * E[step]) ** 2)
    return E


def log_growth(E: Array, lr: float, momentum: float, cosine: float) -> Array:
    """ln(‖w‖²/‖w₀‖²) after steps 0 … T of SGD with momentum whose E [T, L] are given, [T + 1, L].

    `cosine` is that between a gradient and the tangential part of the momentum: 1 is the closure "aligned" of
    `dynamics.simulate`, 0 is "independent" (docs/theory.md §6).
    """
    radial = tangential = np.zeros(E.shape[1])
    growth = np.zeros((len(E) + 1, E.shape[1]))
    for step, E_step in enumerate(E):
        p_r, p_t_old = momentum * radial, momentum * tangential
        p_t = np.sqrt(np.maximum(p_t_old**2 + 2 * cosine * p_t_old * E_step + E_step**2, 0))
        factor = (1 - lr * p_r) ** 2 + (lr * p_t) ** 2
        radial, tangential = (p_r - lr * (p_r**2 + p_t**2)) / factor, p_t / factor
        growth[step + 1] = growth[step] + np.log(factor)
    return growth


def _forecast_error(log_c: Array, share: float) -> float:
    """Root mean square over steps of the individual part of ln c [T + 1, L] less its exponential mean so far."""
    mean, errors = log_c[0], []
    for now in log_c[1:]:
        errors.append((now - mean).std())
        mean = share * mean + (1 - share) * now
    return float(np.sqrt(np.mean(np.square(errors))))


def measure_turn(spec: Turn) -> Row:
    """|ln c'/c| of a layer if it turns alone, if all others turn, if all turn: mean squares over layers, roots."""
    bench = Bench(spec.net, spec.seed)
    batch = next(bench.batches())
    w, g = bench.norms(batch)[:, :-1]
    start = [weight.detach().clone() for weight in bench.weights]
    step = [weight.grad * (a / b) for weight, a, b in zip(bench.weights, w, g, strict=True)]  # type: ignore[operator]
    count = len(start)
    chosen = np.unique(np.linspace(0, count - 1, spec.layers).round().astype(int)).tolist()

    def change(angle: float, turned: set[int]) -> Array:
        with torch.no_grad():
            for index, weight in enumerate(bench.weights):
                weight.copy_(start[index] - angle * step[index] if index in turned else start[index])
        w1, g1 = bench.norms(batch)[:, :-1]
        return np.log(_numpy(w1 * g1) / _numpy(w * g))

    everything = set(range(count))
    columns: dict[str, list[float]] = {key: [] for key in ("own", "others", "all_common", "all_individual")}
    for angle in spec.angles:
        together = change(angle, everything)
        columns["own"].append(_rms([change(angle, {layer})[layer] for layer in chosen]))
        columns["others"].append(_rms([change(angle, everything - {layer})[layer] for layer in chosen]))
        columns["all_common"].append(abs(together.mean()))
        columns["all_individual"].append(together.std())
    return {"layers": count, **rounded(columns)}


def measure_critical(spec: Critical) -> Row:
    """Spread after `AFTER` steps at every learning rate, relative to that of the same batch before any step.

    "same": on the first batch again and again; "fresh": on a new one for each step; "alone": the same, but only tracked
    weights are trained. NaN where an E is not positive and finite.
    """
    bench = Bench(spec.net, spec.seed)
    batches = list(itertools.islice(bench.batches(), max(AFTER) + 1))
    initial = {name: value.clone() for name, value in bench.model.state_dict().items()}
    E0 = _relative_grads(bench.norms(batches[0]))
    monotone, balance = float(dynamics.monotone_lr(E0)), float(dynamics.balance_lr(E0))
    lrs = monotone / 10 * spec.factor ** np.arange(math.log(100 * balance / monotone, spec.factor) + 1)
    row: Row = {"monotone": monotone, "balance": balance, "layers": len(E0), "lrs": lrs, "after": list(AFTER)}
    row["initial_spread"] = dynamics.elr_spread(E0)
    model = np.stack([dynamics.simulate(E0, lr, max(AFTER))[list(AFTER)] for lr in lrs])  # [N, K, L]
    row["model_spread"] = dynamics.elr_spread(model) / dynamics.elr_spread(E0)
    everything = list(bench.model.parameters())
    for name, used, trained in (
        ("same", [batches[0]] * len(batches), everything),
        ("fresh", batches, everything),
        ("alone", batches, bench.weights),
    ):
        bench.model.load_state_dict(initial)
        before = [_spread(_relative_grads(bench.norms(used[after]))) for after in AFTER]
        row[f"{name}_spread"] = []
        for lr in lrs:
            bench.model.load_state_dict(initial)
            optimizer = torch.optim.SGD(trained, lr=float(lr))
            bench.norms(used[0])
            spreads = []
            for step in range(1, max(AFTER) + 1):
                optimizer.step()
                norms = bench.norms(used[step])
                spreads += [_spread(_relative_grads(norms))] if step in AFTER else []
            row[f"{name}_spread"].append(
                [after / start for after, start in zip(spreads, before, strict=True)]
            )
    return rounded(row)


def measure_explosion(spec: Explosion) -> Row:
    """Per-layer growth factors, towards the input, of ‖∂L/∂z‖ (z: what a layer's weight puts out) and of c."""
    bench = Bench(spec.net, spec.seed)
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    tracked = {id(weight) for weight in bench.weights}
    hooks = [
        module.register_forward_hook(keep)
        for module in bench.model.modules()
        if id(getattr(module, "weight", None)) in tracked
    ]
    w, g = _numpy(bench.norms(next(bench.batches())))[:, :-1]
    for hook in hooks:
        hook.remove()
    gradients = np.array([float(output.grad.norm()) for output in outputs])  # type: ignore[union-attr]
    shapes = [tuple(weight.shape) for weight in bench.weights]
    row = {"gradient_factor": growth_factor(gradients, shapes), "c_factor": growth_factor(w * g, shapes)}
    return rounded({"layers": len(shapes), **row, "gradients": gradients, "c": w * g})


def growth_factor(norms: ArrayLike, shapes: Sequence[tuple[int, ...]]) -> float:
    """How much norms [L] grow per layer towards the first: exp of minus the slope of ln norm against the index.

    Fitted over the middle half of each stretch of at least 6 layers of equal shape; stretches count by their length.
    NaN without such a stretch.
    """
    logs, slopes, lengths, start = np.log(np.asarray(norms, dtype=np.float64)), [], [], 0
    for _, stretch in itertools.groupby(shapes):
        length = len(list(stretch))
        if length >= 6:
            middle = np.arange(start + length // 4, start + length - length // 4)
            slopes.append(np.polyfit(middle, logs[middle], 1)[0])
            lengths.append(length)
        start += length
    return float(np.exp(-np.average(slopes, weights=lengths))) if slopes else math.nan


def recorded_steps(steps: int) -> list[int]:
    """Up to 16 steps below `steps`: 0, and the others evenly in the logarithm."""
    chosen = {0, *np.geomspace(1, max(steps - 1, 1), 15).round().astype(int).tolist()}
    return sorted(step for step in chosen if step < steps)


def half_life(steps: ArrayLike, values: ArrayLike) -> float:
    """The step from which on values stay at most half of the first; NaN if the last does not. Between steps linear."""
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not 2 * values[-1] <= values[0] > 0:
        return math.nan
    above = int(np.flatnonzero(values > values[0] / 2)[-1])
    share = (values[above] - values[0] / 2) / (values[above] - values[above + 1])
    return float(steps[above] + share * (steps[above + 1] - steps[above]))


def log_std(E: Array) -> Array:
    """Standard deviation of ln E over the last axis."""
    return np.log(E).std(axis=-1)


def _spread(E: Array) -> float:
    return training.spread(E) if (np.isfinite(E) & (E > 0)).all() else math.nan


def _relative_grads(norms: Tensor) -> Array:
    return _numpy(norms[1, :-1] / norms[0, :-1])


def _rms(values: ArrayLike) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def rounded(value: Any) -> Any:
    """The same as plain values, floats with 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return _significant(value) if isinstance(value, float) else value


# What to measure


def plan(size: str, device: str) -> list[Spec]:
    """All specs of a size; the longest first, so that no process is left with one at the end."""
    if size == "tiny":
        net = Net("bn-mlp-8-w16", 64, device=device)
        return [
            *(Trajectory(net, seed, lr, 12) for seed in range(2) for lr in (0.01, 1.0)),
            Trajectory(net, 0, 1.0, 12, relative=True),
            *(Trajectory(net, seed, 0.1, 12, momentum=0.9) for seed in range(2)),
            *(Turn(net, seed, (0.1, 1.0), 3) for seed in range(2)),
            *(Critical(net, seed, 4.0) for seed in range(2)),
            *(Explosion(net, seed) for seed in range(2)),
        ]
    if size == "small":
        runs = {
            Net("plain-110-w8", 64, device=device): 50,
            Net("bn-mlp-110-w64", device=device): 100,
            Net("plain-56-w8", 64, device=device): 100,
            Net("ln-transformer-6-w32", 64, device=device): 100,
            Net("bn-mlp-30-w64", device=device): 400,
            Net("plain-20-w8", 64, device=device): 150,
            Net("bn-mlp-10-w64", device=device): 600,
        }
        wide = [(f"bn-mlp-30-w{width}", 1024) for width in (64, 256, 1024)]
        wide += [("bn-mlp-30-w256", 32), ("bn-mlp-30-w256", 128), ("bn-mlp-110-w256", 1024)]
        wide += [(f"plain-56-w{width}", 512) for width in (8, 16, 32)]
        seeds, wide_seeds, wide_data = 3, 5, "digits"
    else:
        runs = {
            Net(model, 128, "cifar10", device=device): steps
            for model, steps in {
                "plain-110-w16": 1000,
                "plain-56-w16": 2000,
                "plain-20-w16": 5000,
                "ln-transformer-6-w128": 5000,
            }.items()
        }
        digits = {"bn-mlp-110-w256": 2000, "bn-mlp-30-w256": 5000, "bn-mlp-10-w256": 5000}
        runs |= {Net(model, device=device): steps for model, steps in digits.items()}
        wide = [
            (f"bn-mlp-30-w{width}", batch) for width in (256, 1024, 4096) for batch in (32, 128, 1024, 8192)
        ]
        wide += [(f"plain-56-w{width}", batch) for width in (16, 32, 64) for batch in (128, 1024)]
        seeds, wide_seeds, wide_data = 5, 5, "cifar10"
    specs: list[Spec] = []
    for net, steps in runs.items():
        deep = "-56" in net.model or "-110" in net.model
        for seed in range(seeds):
            specs += [
                Trajectory(net, seed, lr, steps) for lr in (LRS[::2] if deep and size == "small" else LRS)
            ]
            specs += [Trajectory(net, seed, lr, steps, relative=True) for lr in (0.1, 1.0, 10.0) if deep]
            specs += [Critical(net, seed, 3.0 if deep else 1.5)]
            specs += [Turn(net, seed, layers=4 if deep else 10)]
            if "-20" in net.model or "-30" in net.model:
                specs += [Trajectory(net, seed, lr, steps, momentum=0.9) for lr in (0.01, 0.1)]
    for model, batch in wide:
        net = Net(model, batch, wide_data, device=device)
        specs += [Explosion(net, seed) for seed in range(wide_seeds)]
    return specs


# What is concluded


def summarize(rows: list[Row]) -> dict[str, Any]:
    """All conclusions; see the tables for what they mean. Intervals are over seeds."""
    plain = [row for row in _of_kind(rows, "trajectory") if not row["spec"]["momentum"] and "at" in row]
    return {
        "trajectories": {
            model: {label: summarize_runs(runs) for label, runs in _grouped(of_model, _lr_label).items()}
            for model, of_model in _grouped(plain, _model).items()
        },
        "largest_rounding": max((row["rounding"] for row in plain), default=None),
        "one_step": one_step_law(plain),
        "change_of_c": change_of_c(plain),
        "turn": {m: summarize_turns(turns) for m, turns in _grouped(_of_kind(rows, "turn"), _model).items()},
        "critical": {
            m: summarize_critical(found) for m, found in _grouped(_of_kind(rows, "critical"), _model).items()
        },
        "explosion": {
            f"{model}, batch {batch}": {
                key: interval([row[f"{key}_factor"] for row in of_net]) for key in ("gradient", "c")
            }
            for (model, batch), of_net in _grouped(
                _of_kind(rows, "explosion"), lambda row: (_model(row), row["spec"]["net"]["batch_size"])
            ).items()
        },
        "momentum": summarize_momentum(rows),
    }


def summarize_runs(runs: list[Row]) -> dict[str, Any]:
    """Of runs that differ in their seeds: start, end, and the model's end."""

    def ends(key: str) -> Interval:
        return interval([row[key][-1] for row in runs])

    return {
        "runs": len(runs),
        "ended_early": sum(not row["finite"] for row in runs),
        "steps": max(row["steps_measured"] for row in runs),
        "max_lr_E": geometric_interval([row["max_lr_E"][0] for row in runs]),
        "of_monotone": geometric_interval([row["lr"] / row["monotone"] for row in runs]),
        "error": geometric_interval(
            [
                math.exp(math.hypot(row["model_error_common"][-1], row["model_error_individual"][-1]))
                for row in runs
            ]
        ),
        "ratio_error": geometric_interval([math.exp(row["model_error_individual"][-1]) for row in runs]),
        "ratio_error_common": geometric_interval(
            [math.exp(row["common_error_individual"][-1]) for row in runs]
        ),
        "log_std_start": interval([row["log_std"][0] for row in runs]),
        "log_std_end": ends("log_std"),
        "model_log_std_end": ends("model_log_std"),
        "common_log_std_end": ends("common_log_std"),
        "half_life": _median_or_none([half_life(row["at"], row["log_std"]) for row in runs]),
        "model_half_life": _median_or_none([half_life(row["at"], row["model_log_std"]) for row in runs]),
        "loss_end": interval([row["loss"][-1] for row in runs]),
    }


def one_step_law(runs: list[Row]) -> dict[str, Any]:
    """The ratio law over one step, per net and for all, by the largest λE of the step (the intervals of `BINS`).

    Medians over steps, intervals over seeds: turn is the standard deviation over layers of ln E' − ln E'(model) on the
    same batch, noise what the next batch adds. within: share of steps with turn within 30 %. explained: share of the
    sum of squares of the changes of ln ratios (same batch) that the law explains; below 0 it were better to say that
    nothing changes. None where there are no steps.
    """
    names = ("max_lr_E", "turn_individual", "noise_individual", "step_individual")
    found = {}
    for model, of_model in {**_grouped(runs, _model), "all": runs}.items():
        by_seed = {
            seed: np.array([np.concatenate([row[name] for row in of_seed]) for name in names], dtype=float)
            for seed, of_seed in _grouped(of_model, lambda row: row["spec"]["seed"]).items()
        }
        found[model] = []
        for low, high in itertools.pairwise(BINS):
            chosen = [steps[1:, (low <= steps[0]) & (steps[0] < high)] for steps in by_seed.values()]
            chosen = [steps for steps in chosen if steps.size]
            turn, _, whole = np.concatenate([np.zeros((3, 0)), *chosen], axis=1)
            found[model].append(
                {
                    "steps": turn.size,
                    "turn": interval([np.median(steps[0]) for steps in chosen]),
                    "noise": interval([np.median(steps[1]) for steps in chosen]),
                    "within": interval([np.mean(steps[0] <= TOLERANCE) for steps in chosen]),
                    "explained": float(1 - (turn**2).sum() / (whole**2).sum()),
                }
                if turn.size
                else None
            )
    return found


def change_of_c(runs: list[Row]) -> dict[str, Any]:
    """Per net: how much of the change of ln c all layers share, as a share of its mean square; over one step by turning
    ("turn"), from batch to batch ("noise"), and over whole runs, with λE ≤ 1 at every recorded step and others.
    forecast: error of ln c one step ahead by the weights of `SMOOTHING`, relative to the first of them.
    """

    def shared(pairs: Sequence[tuple[float, float]]) -> float | None:
        common, individual = np.square(np.array(pairs, dtype=float)).sum(0) if pairs else (0.0, 0.0)
        return float(common / (common + individual)) if common + individual > 0 else None

    found = {}
    for model, of_model in _grouped(runs, _model).items():
        columns: dict[str, Any] = {}
        for name in ("turn", "noise"):
            pairs = [
                pair
                for row in of_model
                for pair in zip(row[f"{name}_common"], row[f"{name}_individual"], strict=True)
            ]
            columns[name] = shared(pairs)
        ends = [(row["c_common"][-1], row["c_individual"][-1], max(row["max_lr_E"]) <= 1) for row in of_model]
        columns["run_small"] = shared([end[:2] for end in ends if end[2]])
        columns["run_large"] = shared([end[:2] for end in ends if not end[2]])
        relative = np.array([row["forecast"] for row in of_model], dtype=float)
        columns["forecast"] = [geometric_interval(column) for column in (relative / relative[:, :1]).T]
        found[model] = columns
    return found


def summarize_turns(turns: list[Row]) -> dict[str, Any]:
    """By angle, and the angle at which c of a layer that turns alone, and with all others, has changed by 30 %."""
    angles = turns[0]["spec"]["angles"]
    keys = ("own", "others", "all_common", "all_individual")
    found: dict[str, Any] = {"angles": angles}
    for key in keys:
        found[key] = [interval(values) for values in np.array([row[key] for row in turns], dtype=float).T]
    for key, columns in {"own": ["own"], "all": ["all_common", "all_individual"]}.items():
        reached = []
        for row in turns:
            total = np.sqrt(sum(np.square(np.array(row[column], dtype=float)) for column in columns))
            reached.append(first_crossing(angles, total, TOLERANCE))
        found[f"{key}_30_percent"] = geometric_interval(reached)
    return found


def summarize_critical(found: list[Row]) -> dict[str, Any]:
    """Per number of steps and kind of batches: the learning rate with the smallest spread, and the first above it at
    which the spread is larger than at the start; each over balance and over monotone, with the model's best."""
    result: dict[str, Any] = {
        "initial_spread": geometric_interval([row["initial_spread"] for row in found]),
        "balance_over_monotone": geometric_interval([row["balance"] / row["monotone"] for row in found]),
    }
    for name, (index, after) in itertools.product(("same", "fresh", "alone"), enumerate(found[0]["after"])):
        best, model_best, grows, smallest, at_formula = [], [], [], [], {"balance": [], "monotone": []}
        for row in found:
            lrs = np.array(row["lrs"])
            ratio, model = (np.array(row[key], float)[:, index] for key in (f"{name}_spread", "model_spread"))
            best.append(lrs[np.nanargmin(ratio)])
            smallest.append(np.nanmin(ratio))
            model_best.append(lrs[np.nanargmin(model)])
            from_best = slice(int(np.nanargmin(ratio)), None)
            grows.append(first_crossing(lrs[from_best], ratio[from_best], 1.0))
            for formula, values in at_formula.items():
                values.append(math.exp(np.interp(math.log(row[formula]), np.log(lrs), np.log(ratio))))
        balance, monotone = (np.array([row[formula] for row in found]) for formula in ("balance", "monotone"))
        result[f"{name} {after}"] = {
            "best_over_balance": geometric_interval(best / balance),
            "best_over_monotone": geometric_interval(best / monotone),
            "model_best_over_balance": geometric_interval(model_best / balance),
            "grows_over_balance": geometric_interval(grows / balance),
            "grows_over_monotone": geometric_interval(grows / monotone),
            "never_grows": int(np.isnan(grows).sum()),
            "smallest": geometric_interval(smallest),
            "at_balance": geometric_interval(at_formula["balance"]),
            "at_monotone": geometric_interval(at_formula["monotone"]),
        }
    return result


def summarize_momentum(rows: list[Row]) -> dict[str, Any]:
    """Per net and learning rate: ln ‖w‖² gained over the measured, and typical errors of E, by closure."""
    runs = [row for row in _of_kind(rows, "trajectory") if row["spec"]["momentum"] and "at" in row]
    found: dict[str, Any] = {}
    for (model, label), of_net in _grouped(runs, lambda row: (_model(row), _lr_label(row))).items():
        growth = {
            name: geometric_interval(
                [_number(row["growth"][name]) / row["growth"]["measured"] for row in of_net]
            )
            for name in ("aligned", "independent", "cosine")
        }
        errors = {
            name: geometric_interval(
                [
                    math.exp(math.hypot(row[f"{key}_error_common"][-1], row[f"{key}_error_individual"][-1]))
                    for row in of_net
                ]
            )
            for name, key in {"aligned": "model", "independent": "independent"}.items()
        }
        found[f"{model}, lr {label}"] = {
            "cosine": interval([_number(row["cosine"]) for row in of_net]),
            "growth": growth,
            "measured_growth": geometric_interval([row["growth"]["measured"] for row in of_net]),
            "error": errors,
            "log_std_end": interval([row["log_std"][-1] for row in of_net]),
            "aligned_log_std_end": interval([row["model_log_std"][-1] for row in of_net]),
            "independent_log_std_end": interval([row["independent_log_std"][-1] for row in of_net]),
        }
    return found


def geometric_interval(values: ArrayLike) -> Interval:
    """`interval` of the logarithms, taken back; of the values that are positive and finite."""
    values = np.asarray(values, dtype=np.float64)
    mean, low, high, n = interval(np.log(values[np.isfinite(values) & (values > 0)]))
    return Interval(math.exp(mean), math.exp(low), math.exp(high), n)


def first_crossing(x: ArrayLike, y: ArrayLike, level: float) -> float:
    """The first positive x, linear in ln x and ln y between the points, at which y exceeds `level`; NaN if none does.

    A y that is not finite counts as beyond the level, from its own x on.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    beyond = np.flatnonzero(~(y <= level))
    if not beyond.size:
        return math.nan
    index = int(beyond[0])
    if index == 0 or not np.isfinite(y[index]):
        return float(x[index])
    (x0, x1), (y0, y1) = np.log(x[index - 1 : index + 1]), np.log(y[index - 1 : index + 1])
    return float(np.exp(x0 + (x1 - x0) * (math.log(level) - y0) / (y1 - y0)))


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["spec"]["kind"] == kind]


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _model(row: Row) -> str:
    return row["spec"]["net"]["model"]


def _lr_label(row: Row) -> str:
    return f"{row['spec']['lr']:g}{' × monotone' if row['spec']['relative'] else ''}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _median_or_none(values: Sequence[float | None]) -> float | None:
    """The median with those that were not reached as the largest; None if it is one of them."""
    median = float(np.median([math.inf if value is None or math.isnan(value) else value for value in values]))
    return median if math.isfinite(median) else None


# What is shown


def tables(rows: list[Row], summary: dict[str, Any]) -> list[RenderableType]:
    """A table for each question."""
    return [
        _trajectory_table(summary),
        _one_step_table(summary),
        _turn_table(summary),
        _c_table(summary),
        _critical_table(summary),
        _explosion_table(summary),
        _momentum_table(summary),
    ]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _trajectory_table(summary: dict[str, Any]) -> Table:
    lines = []
    for model, by_lr in summary["trajectories"].items():
        for label, it in by_lr.items():
            early = f" ({it['ended_early']} of {it['runs']} ended early)" if it["ended_early"] else ""
            lines.append(
                [
                    f"{model}, {it['steps']} steps{early}",
                    label,
                    f"{it['max_lr_E'].mean:.2g}",
                    f"×{it['error'].mean:.2g}",
                    f"×{it['ratio_error'].mean:.2g}",
                    f"×{it['ratio_error_common'].mean:.2g}",
                    f"{it['log_std_start'].mean:.2f} → {it['log_std_end']:.2f}",
                    f"→ {it['model_log_std_end'].mean:.2f}",
                    f"{_steps(it['half_life'])} / {_steps(it['model_half_life'])}",
                ]
            )
    columns = ["net", "lr", "λE₁ at step 0", "error of E", "of ratios", "of ratios, common c(t)"]
    columns += ["std of ln E", "model", "halved at step: measured / model"]
    title = (
        "Does E follow the model, and do ratios of ELRs tend to 1 under a constant lr? "
        "(errors: root mean square over layers at the end, ×1.3 is 30 %; means of seeds, intervals 95 %)"
    )
    return _table(title, columns, lines)


def _steps(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _one_step_table(summary: dict[str, Any]) -> Table:
    def cells(entries: list[dict[str, Any] | None], show: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["–" if entry is None else show(entry) for entry in entries]

    lines = [
        [model, *cells(entries, lambda it: f"{it['turn'].mean:.2f} ({it['noise'].mean:.2f})")]
        for model, entries in summary["one_step"].items()
    ]
    for label, key in {"all, within 30 %": "within", "all, explained": "explained"}.items():
        entries = summary["one_step"]["all"]
        lines.append(
            [
                label,
                *cells(entries, lambda it, key=key: f"{it[key].mean if key == 'within' else it[key]:.0%}"),
            ]
        )
    columns = ["largest λE of the step", *(f"{low:g} – {high:g}" for low, high in itertools.pairwise(BINS))]
    title = (
        "Up to which angle does the ratio law hold over one step? Error of ln ratios on the same batch (what the next "
        "batch adds), medians; share of steps within 30 %; share of the change that the law explains"
    )
    return _table(title, columns, lines)


def _turn_table(summary: dict[str, Any]) -> Table:
    angles = list(dict.fromkeys(angle for it in summary["turn"].values() for angle in it["angles"]))
    lines = []
    for model, it in summary["turn"].items():
        pairs = zip(it["own"], it["others"], strict=True)
        cells = dict(
            zip(it["angles"], (f"{own.mean:.2g} / {others.mean:.2g}" for own, others in pairs), strict=True)
        )
        reached = [f"{it[f'{key}_30_percent']:.2g}" for key in ("own", "all")]
        lines.append([model, *(cells.get(angle, "–") for angle in angles), *reached])
    columns = [
        "tangent of the angle",
        *(f"{angle:g}" for angle in angles),
        "30 %: it alone",
        "30 %: all turn",
    ]
    title = (
        "How constant is c? Change of ln c of a layer that turns alone / while all others turn, root mean square over "
        "layers; the angle from which c has changed by 30 %"
    )
    return _table(title, columns, lines)


def _c_table(summary: dict[str, Any]) -> Table:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    lines = []
    for model, it in summary["change_of_c"].items():
        shares = [percent(it[key]) for key in ("turn", "noise", "run_small", "run_large")]
        lines.append([model, *shares, *(f"{value.mean:.2f}" for value in it["forecast"][1:])])
    columns = ["net", "one step", "next batch", "run, λE ≤ 1", "run, λE > 1"]
    columns += [f"c smoothed by {share:g}" for share in SMOOTHING[1:]]
    title = (
        "Can an extension mend it? Share of the change of ln c that all layers have in common; error of c one step "
        "ahead if smoothed, over not smoothed"
    )
    return _table(title, columns, lines)


def _critical_table(summary: dict[str, Any]) -> Table:
    lines = []
    for model, it in summary["critical"].items():
        for key in (key for key in it if key.endswith((" 1", " 5")) and key != "same 5"):
            entry = it[key]
            grows = entry["grows_over_balance"]
            never = f"never in {entry['never_grows']}" if entry["never_grows"] else ""
            lines.append(
                [
                    f"{model}, spread {it['initial_spread'].mean:.2g}",
                    key,
                    f"{entry['best_over_balance']:.2g}",
                    f"{entry['model_best_over_balance'].mean:.2g}",
                    f"{entry['best_over_monotone'].mean:.2g}",
                    ", ".join([*([f"{grows:.2g}"] if grows.n else []), *([never] if never else [])]),
                    f"{entry['smallest'].mean:.2g}",
                    f"{entry['at_balance'].mean:.2g}",
                    f"{entry['at_monotone'].mean:.2g}",
                ]
            )
    columns = [
        "net",
        "batch, steps",
        "best lr / balance",
        "model's",
        "best lr / monotone",
        "grows from, / balance",
    ]
    columns += ["spread left: at the best lr", "at balance", "at monotone"]
    title = (
        "Which learning rate closes the spread best after 1 or 5 steps, and from which on does it grow? "
        "(same: one batch; fresh: new batches; alone: the same, only tracked weights trained)"
    )
    return _table(title, columns, lines)


def _explosion_table(summary: dict[str, Any]) -> Table:
    lines = [
        [net, f"{it['gradient']:.4f}", f"{it['c']:.4f}", str(it["c"].n)]
        for net, it in summary["explosion"].items()
    ]
    title = (
        f"By which factor per layer do gradients grow towards the input? Theory: √(π/(π−1)) = {EXPLOSION:.4f}"
    )
    return _table(title, ["net", "‖∂L/∂z‖", "c", "seeds"], lines)


def _momentum_table(summary: dict[str, Any]) -> Table:
    lines = [
        [
            net,
            f"{it['cosine'].mean:.3f}",
            f"{it['measured_growth'].mean:.2g}",
            *(f"{it['growth'][name]:.3g}" for name in ("aligned", "independent", "cosine")),
            *(f"×{it['error'][name].mean:.2g}" for name in ("aligned", "independent")),
        ]
        for net, it in summary["momentum"].items()
    ]
    columns = ["net", "cos(g, m)", "ln ‖w‖² gained", "aligned / measured", "independent", "with the cosine"]
    columns += ["error of E, aligned", "independent"]
    return _table("Momentum 0.9: which closure is closer to a real net?", columns, lines)


def draw(rows: list[Row], summary: dict[str, Any], out: Path) -> list[Path]:
    """The figures for which there are rows."""
    plain = [row for row in _of_kind(rows, "trajectory") if not row["spec"]["momentum"] and "at" in row]
    figures = {
        "layers": _layers_figure(plain),
        "spread": _spread_figure(plain),
        "one-step": _one_step_figure(plain, summary),
        "critical": _critical_figure(rows),
        "explosion-momentum": _explosion_momentum_figure(rows, summary),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"dynamics-{name}.png")
        save(figure, paths[-1])
    return paths


def _layers_figure(runs: list[Row]) -> Figure:
    """E of some layers over the steps, measured and predicted from the first step alone.

    Of every family of nets the deepest with at most 30 layers, at three learning rates that it survived.
    """
    drawn = _grouped([row for row in runs if "E" in row and row["finite"]], _model)
    chosen: dict[str, tuple[int, str]] = {}
    for model in drawn:
        family, depth = re.match(r"(.+?)-(\d+)", model).groups()  # type: ignore[union-attr]
        if int(depth) <= 30:
            chosen[family] = max(chosen.get(family, (0, "")), (int(depth), model))
    figure = Figure(figsize=(11, 2.7 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots(max(len(chosen), 1), 3, squeeze=False)
    for line, (_, model) in zip(axes, chosen.values(), strict=False):
        left = sorted(drawn[model], key=lambda row: row["lr"])
        for ax, target in zip(line, (0.05, 0.5, 5.0), strict=True):
            if not left:
                ax.set_visible(False)
                continue
            nearest = min(left, key=lambda row: abs(math.log(row["max_lr_E"][0] / target)))
            left = left[left.index(nearest) + 1 :]
            steps = np.array(nearest["at"][:-1]) + 1
            E, predicted = (
                nearest["lr"] * np.array(nearest[key], dtype=float)[:-1] for key in ("E", "model_E")
            )
            for layer, color in enumerate(DEPTH(np.linspace(0, 1, E.shape[1]))):
                ax.plot(steps, E[:, layer], color=color, linewidth=1.2)
                ax.plot(steps, predicted[:, layer], color=color, linewidth=0.9, linestyle="--")
            ax.set(xscale="log", yscale="log", title=f"{model}, lr {nearest['lr']:.2g}", xlabel="step + 1")
            _finish(ax)
        line[0].set_ylabel("λE (rad)")
    handles = [Line2D([], [], color=DEPTH(0.0), label="measured, first layer")]
    handles += [Line2D([], [], color=DEPTH(1.0), label="measured, last layer")]
    handles += [Line2D([], [], color="0.4", linestyle="--", label="model, from step 0 alone")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _spread_figure(runs: list[Row]) -> Figure:
    """Standard deviation of ln E over the steps, one colour for each learning rate."""
    absolute = _grouped([row for row in runs if not row["spec"]["relative"]], _model)
    columns = min(len(absolute), 4)
    lines = -(-len(absolute) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    lrs = sorted({row["spec"]["lr"] for row in runs if not row["spec"]["relative"]})
    colors = dict(zip(lrs, itertools.cycle(COLORS), strict=False))
    for ax, (model, of_model) in zip(axes, absolute.items(), strict=False):
        for lr, of_lr in _grouped(of_model, lambda row: row["spec"]["lr"]).items():
            longest = max(of_lr, key=lambda row: row["steps_measured"])
            alike = [row for row in of_lr if row["at"] == longest["at"]]
            for key, style in {"log_std": "-", "model_log_std": "--"}.items():
                mean = np.mean([row[key] for row in alike], axis=0)
                ax.plot(np.array(longest["at"][:-1]) + 1, mean[:-1], style, color=colors[lr], linewidth=1.2)
        ax.set(xscale="log", yscale="log", title=model)
        _finish(ax)
    for ax in axes[len(absolute) :]:
        ax.set_visible(False)
    for index in range(0, len(absolute), columns):
        axes[index].set_ylabel("standard deviation of ln E")
    for ax in axes[: len(absolute)]:
        ax.set_xlabel("step + 1")
    handles = [Line2D([], [], color=colors[lr], label=f"lr {lr:g}") for lr in lrs]
    handles.append(Line2D([], [], color="0.4", label="measured"))
    handles.append(Line2D([], [], color="0.4", linestyle="--", label="model"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _one_step_figure(runs: list[Row], summary: dict[str, Any]) -> Figure:
    """Error of the ratio law over one step, and change of c, against the angle."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    law, turn = figure.subplots(1, 2)
    looks = dict(
        zip(summary["one_step"], zip(itertools.cycle(COLORS), itertools.cycle(MARKERS)), strict=False)
    )
    decades = 10.0 ** np.arange(-6, 4)
    for model, of_model in _grouped(runs, _model).items():
        color, marker = looks[model]
        x, y = (
            np.concatenate([row[column] for row in of_model]).astype(float)
            for column in ("max_lr_E", "turn_individual")
        )
        law.scatter(x, y, s=5, alpha=0.15, linewidths=0, color=color, marker=marker)
        inside = [(x >= low) & (x < high) for low, high in itertools.pairwise(decades)]
        medians = [np.median(y[mask]) if mask.any() else math.nan for mask in inside]
        law.plot(decades[:-1] * 10**0.5, medians, color=color, marker=marker, markersize=4.5, label=model)
    law.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    law.text(0.02, TOLERANCE, "30 %", transform=law.get_yaxis_transform(), va="bottom", color="0.3")
    law.set(xlim=(decades[0], decades[-1]), ylim=(1e-3, 10), xlabel="largest λE of the step")
    law.set_ylabel("error of ln ratios in one step, same batch")
    law.legend(frameon=False, fontsize="x-small", loc="lower right")
    for model, it in summary["turn"].items():
        color, marker = looks.get(model, ("0.4", "o"))
        for key, line in {"own": "-", "others": "--"}.items():
            means = [value.mean for value in it[key]]
            turn.plot(it["angles"], means, line, color=color, marker=marker, markersize=4)
    turn.plot([], [], "-", color="0.4", label="the layer alone turns")
    turn.plot([], [], "--", color="0.4", label="all others turn")
    turn.set(xlabel="tangent of the angle", ylabel="change of ln c of a layer")
    turn.legend(frameon=False, fontsize="small")
    for ax in (law, turn):
        ax.axhline(TOLERANCE, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log")
        _finish(ax)
    return figure


def _critical_figure(rows: list[Row]) -> Figure:
    """Spread after one and after five steps against the learning rate over balance."""
    found = _grouped(_of_kind(rows, "critical"), _model)
    columns = min(max(len(found), 1), 4)
    lines = -(-max(len(found), 1) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, (model, of_model) in zip(axes, found.items(), strict=False):
        for row in of_model:
            x = np.array(row["lrs"]) / row["balance"]
            for index, after in enumerate(row["after"]):
                color = COLORS[index]
                ax.plot(x, np.array(row["fresh_spread"], dtype=float)[:, index], color=color, linewidth=1)
                if row is of_model[0]:
                    ax.plot(x, np.array(row["model_spread"])[:, index], "--", color=color, linewidth=0.9)
                    ax.plot([], [], color=color, label=f"after {after} step{'s' if after > 1 else ''}")
            ax.axvline(row["monotone"] / row["balance"], color="0.6", linewidth=0.6)
        ax.axvline(1, color="0.2", linewidth=0.8)
        ax.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", title=model, xlabel="lr / balance")
        _finish(ax)
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    for index in range(0, len(found), columns):
        axes[index].set_ylabel("spread / initial spread")
    handles = [
        *axes[0].get_legend_handles_labels()[0],
        Line2D([], [], color="0.4", linestyle="--", label="model, seed 0"),
    ]
    handles += [Line2D([], [], color="0.2", label="balance"), Line2D([], [], color="0.6", label="monotone")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _explosion_momentum_figure(rows: list[Row], summary: dict[str, Any]) -> Figure:
    """Growth factors of gradients per layer; growth of norms with momentum by closure."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(summary["explosion"])
    for offset, (key, label) in enumerate({"gradient": "‖∂L/∂z‖", "c": "c"}.items()):
        values = [summary["explosion"][name][key] for name in names]
        y = np.arange(len(names)) + 0.2 * offset - 0.1
        means, lows, highs = (
            np.array([getattr(v, part) for v in values]) for part in ("mean", "low", "high")
        )
        style: dict[str, Any] = {
            "fmt": MARKERS[offset],
            "color": COLORS[offset],
            "markersize": 4.5,
            "label": label,
        }
        left.errorbar(means, y, xerr=(means - lows, highs - means), **style)
    left.axvline(EXPLOSION, color="0.2", linewidth=0.8, linestyle="--", label="√(π/(π−1))")
    left.set_yticks(range(len(names)), names, fontsize="small")
    left.invert_yaxis()
    left.set_xlabel("growth per layer towards the input")
    left.legend(frameon=False, fontsize="small")
    runs = [row for row in _of_kind(rows, "trajectory") if row["spec"]["momentum"] and "at" in row]
    for offset, name in enumerate(("aligned", "independent")):
        x = [row["growth"]["measured"] for row in runs]
        y = [_number(row["growth"][name]) for row in runs]
        right.scatter(x, y, s=18, color=COLORS[offset], marker=MARKERS[offset], label=name)
    if runs:
        ends = [
            min(row["growth"]["measured"] for row in runs),
            max(row["growth"]["measured"] for row in runs),
        ]
        right.plot(ends, ends, color="0.4", linewidth=0.8, linestyle=":", label="measured = predicted")
    right.set(xscale="log", yscale="log", xlabel="ln ‖w‖² gained, measured (median of layers)")
    right.set_ylabel("predicted from the measured E")
    right.set_title("momentum 0.9")
    right.legend(frameon=False, fontsize="small")
    for ax in (left, right):
        _finish(ax)
    return figure


def _finish(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.title.set_fontsize("medium")
    if ax.get_xscale() == "log":
        ax.xaxis.set_minor_formatter(NullFormatter())
    if ax.get_yscale() == "log":
        low, high = ax.get_ylim()
        few = high / low < 30
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)) if few else NullFormatter())


def describe(spec: Spec) -> str:
    """A few words for the progress bar."""
    lr = f", lr {spec.lr:g}{' × monotone' if spec.relative else ''}" if isinstance(spec, Trajectory) else ""
    return f"{spec.kind} {spec.net.model}{lr}"


DYNAMICS = Study(
    name="dynamics",
    question="Do the effective learning rates of real nets move as the model of docs/theory.md says?",
    work=work,
    stages=lambda size, device: [lambda _rows: plan(size, device)],
    summarize=summarize,
    tables=tables,
    draw=draw,
    describe=describe,
)
