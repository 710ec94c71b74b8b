"""Weight dynamics (source A of docs/theory.md): does E = ‖g‖/‖w‖ move as the model of `elropt.dynamics` says?

For plain SGD the growth of ‖w‖ is exact, so all that the model assumes is that c = ‖g‖·‖w‖ stays. Four measurements:
whole runs at a constant learning rate (`Trajectory`); one turn by a set angle (`Turn`); the spread after a few steps
against the learning rate (`Critical`); how gradients grow towards the input at initialization (`Explosion`). Logarithms
are natural. "Common" is a mean over layers, "individual" the standard deviation over layers around it; only the
individual part changes ratios of ELRs.

This module measures. `summarize` draws the conclusions from the rows, `report` makes tables and figures of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import elropt
from benchmarks.common import data, models, training
from benchmarks.common.sweep import Row
from benchmarks.common.training import rounded, significant
from benchmarks.common.warmups import gradient
from benchmarks.studies.dynamics.report import draw, tables
from benchmarks.studies.dynamics.summarize import SMOOTHING, summarize
from benchmarks.studies.study import Study
from elropt import dynamics

Array: TypeAlias = NDArray[np.float64]
Batch: TypeAlias = tuple[Tensor, Tensor]

LRS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ANGLES = (0.0001, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)  # λE, the tangent
AFTER = (1, 2, 5)  # steps after which `Critical` looks at the spread
DRAWN_LAYERS = 12  # of which a row has E and c


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
                for linear in (module.query, module.key):
                    linear.register_parameter("bias", None)
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
        grads = [gradient(weight) for weight in self.weights]
        norms = [torch._foreach_norm(of) for of in (self.weights, grads)]  # type: ignore[attr-defined]
        rows = [[*of, loss] for of in norms]
        return torch.stack([torch.stack(row) for row in rows]).detach()


def measure_trajectory(spec: Trajectory) -> Row:
    """Train, and compare what was measured with what the model says of it: see `compare`."""
    bench = Bench(spec.net, spec.seed)
    batches = bench.batches()
    batch = next(batches)
    norms = [bench.norms(batch)]
    E0 = _relative_grads(norms[0])
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
        "lr": significant(lr),
        "layers": len(E0),
        "monotone": significant(float(dynamics.monotone_lr(E0))),
        "balance": significant(float(dynamics.balance_lr(E0))),
        "finite": end == len(measured),
        "steps_measured": end - 1,
    }
    if end < 2:
        return row
    on_same = {step: _numpy(value)[:, :-1] for step, value in same.items() if step < end - 1}
    cosine = float(torch.stack(cosines).nanmean()) if cosines else math.nan
    w, g = measured[:end, 0, :-1], measured[:end, 1, :-1]
    row |= {"loss": [significant(measured[0, 0, -1]), significant(measured[end - 1, 0, -1])]}
    return row | rounded(compare(w, g, on_same, lr, spec.momentum, cosine, keep_layers=spec.seed == 0))


def tangential_cosines(weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> Tensor:
    """Per weight the cosine between its `.grad` and the part of its momentum that is orthogonal to it, [L]."""
    cosines = []
    for weight, buffer in zip(weights, buffers, strict=True):
        w, m, g = weight.detach().flatten(), buffer.flatten(), gradient(weight).flatten()
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
        log_std, spread: of E. model_…: of what follows from the first E alone; common_…: with the measured common
        change of c; independent_…: from the first E with the other closure of momentum. error_…: predicted against
        measured ln E, common and individual part. c_…: ln c against the first. Further those of `step_columns`
        without momentum, those of `growth_columns` with it.
    """
    E, c = g / w, g * w
    T = len(E) - 1
    at = [*sorted(on_same), T]
    log_c = np.log(c / c[0])
    predicted = {"model": dynamics.simulate(E[0], lr, T, momentum)}
    if momentum:
        predicted["independent"] = dynamics.simulate(E[0], lr, T, momentum, gradients="independent")
    else:
        common_c = np.repeat(np.exp(log_c.mean(1, keepdims=True)), E.shape[1], axis=1)
        predicted["common"] = with_sphere_grads(E[0], common_c, lr)
    columns: dict[str, Any] = {"at": at, "log_std": log_std(E[at]), "spread": dynamics.elr_spread(E[at])}
    columns["model_spread"] = dynamics.elr_spread(predicted["model"][at])
    for name, values in predicted.items():
        error = np.log(values[at] / E[at])
        columns[f"{name}_log_std"] = log_std(values[at])
        columns |= {f"{name}_error_common": error.mean(1), f"{name}_error_individual": error.std(1)}
    columns |= {"c_common": log_c[at].mean(1), "c_individual": log_c[at].std(1)}
    columns |= growth_columns(w, E, lr, momentum, cosine) if momentum else step_columns(E, c, on_same, lr)
    if keep_layers:
        kept = np.unique(np.linspace(0, E.shape[1] - 1, DRAWN_LAYERS).round().astype(int))
        columns |= {"kept": kept, "E": E[at][:, kept], "model_E": predicted["model"][at][:, kept]}
        columns |= {"c": c[at][:, kept]}
    return columns


def growth_columns(w: Array, E: Array, lr: float, momentum: float, cosine: float) -> dict[str, Any]:
    """Of `compare`, with momentum: ln ‖w‖² gained, the median of layers, measured and by closure."""
    growth = {"measured": np.median(2 * np.log(w[-1] / w[0]))}
    for name, value in {"aligned": 1.0, "independent": 0.0, "cosine": cosine}.items():
        growth[name] = np.median(log_growth(E[:-1], lr, momentum, value)[-1])
    return {"cosine": cosine, "growth": growth}


def step_columns(E: Array, c: Array, on_same: dict[int, Array], lr: float) -> dict[str, Any]:
    """Of `compare`, without momentum: what single steps do.

    turn_…, noise_…: change of ln c in one step on its own batch, and from that batch to the next. law_individual: what
    the model says that the step does to ln E, step_individual: what it did on its batch. max_lr_E: largest λE.
    rounding: largest error in ln E if every c is the measured one. forecast: error of ln c one step ahead, from its
    mean over the past with weights `SMOOTHING`, individual.
    """
    log_c, steps = np.log(c / c[0]), sorted(on_same)
    turn = np.stack([np.log(np.prod(on_same[step], axis=0) / c[step]) for step in steps])
    noise = np.stack([log_c[step + 1] - log_c[step] for step in steps]) - turn
    law = np.log1p((lr * E[steps]) ** 2)
    return {
        "rounding": np.abs(np.log(with_sphere_grads(E[0], c / c[0], lr) / E)).max(),
        "forecast": [_forecast_error(log_c, share) for share in SMOOTHING],
        "turn_common": turn.mean(1),
        "turn_individual": turn.std(1),
        "noise_common": noise.mean(1),
        "noise_individual": noise.std(1),
        "law_individual": law.std(1),
        "step_individual": (turn - law).std(1),
        "max_lr_E": lr * E[steps].max(1),
    }


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
    return _rms(errors)


def measure_turn(spec: Turn) -> Row:
    """Root mean square over layers of ln c'/c of a layer: if it turns alone, if all others turn, if all turn."""
    bench = Bench(spec.net, spec.seed)
    batch = next(bench.batches())
    w, g = bench.norms(batch)[:, :-1]
    start = [weight.detach().clone() for weight in bench.weights]
    step = [gradient(weight) * (a / b) for weight, a, b in zip(bench.weights, w, g, strict=True)]
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
    gradients = np.array([float(gradient(output).norm()) for output in outputs])
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
