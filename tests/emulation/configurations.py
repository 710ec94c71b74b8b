"""Random configurations of `ELRSGD`: three steps in the emulator, compared with the specification in float64.

A configuration is drawn from its number, so that it can be run again. What the optimizer computes with the kernels is
compared after every step, then handed to the other, so that each step is judged alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from triton.compiler import CompilationError

from elropt import ELRSGD, kernels

from .driver import Emulator
from .machine import Schedule
from .memory import Fault
from .ptx import UnknownPTX

STEPS = 3
H100_PROGRAMS = 3 * 132  # that run at the same time
RULES = [
    (None, "layer"),
    ("warmup", "layer"),
    ("uniform", "layer"),
    ("uniform", "filter"),
    ("angle", "layer"),
    ("angle", "filter"),
    ("angle", "network"),
    ("sphere", "layer"),
    ("sphere", "filter"),
    ("sphere", "network"),
]
# of the configurations from number FIRST_ON_UPDATES on
FIRST_ON_UPDATES = 100
UPDATE_RULES = [
    (rule, granularity)
    for rule in ("equilibrium", "angle", "uniform")
    for granularity in ("layer", "filter", "network")
    if (rule, granularity) != ("uniform", "network")
]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
# Less than a chunk of 4096, exactly one or two, a bit more, channels_last, empty, 0-dim.
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (3, 7),
    (0, 4),
    (16, 257),
    (33, 3, 3, 3),
    (64, 64),
    (2, 4096),
    (5000,),
]
FILTER_SHAPES: list[tuple[int, ...]] = [(1,), (3, 7), (0, 4), (10, 27), (9, 3, 3, 3), (2, 4100), (1, 4097)]
RULE_STATE = ("sphere_grad_norm", "radius", "tracked", "handed_over")
# Relative, of what is stored. Approximate instructions, and float32 in another order than the specification's float64.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.02 * 2**-8, torch.float16: 1.05 * 2**-11}
STATE_TOLERANCE = 1e-5
SMALLEST_FLOAT16 = 2.0**-24


def attach(emulator: Emulator, *, cooperative: bool) -> None:
    """Let `elropt.kernels` take CPU tensors, and tell the emulator where a step's tables point to. With `cooperative`
    every step that may is one cooperative launch. These are all the places in the package that are replaced."""
    from elropt.kernels import fused_step, tables

    tables.DEVICE_TYPE = "cpu"
    fused_step.max_programs = lambda device: H100_PROGRAMS if cooperative else 0
    emulator.cooperative = {"cooperative_kernel"}
    if not hasattr(kernels.FusedStep, "step_without_emulator"):
        kernels.FusedStep.step_without_emulator = kernels.FusedStep.step  # type: ignore[attr-defined]

    def step_in_emulator(self: Any, *arguments: Any, **options: Any) -> None:
        emulator.tensors = {f"weight {i}": p.detach() for i, p in enumerate(self.params)}
        emulator.tensors |= {f"gradient {i}": p.grad for i, p in enumerate(self.params) if p.grad is not None}
        emulator.tensors |= {f"momentum buffer {i}": m for i, m in enumerate(self.buffers)}
        self.step_without_emulator(*arguments, **options)

    kernels.FusedStep.step = step_in_emulator


@dataclass(frozen=True)
class Configuration:
    """What is drawn. groups: options of the param groups, with their shapes and dtypes. odd: of the gradients, some are
    0, NaN, infinite or extreme. unaligned: tensors begin anywhere in memory."""

    number: int
    rule: str | None
    granularity: str
    project: bool
    elr_of: str | None
    groups: list[dict[str, Any]]
    amp: bool
    float32_gradients: bool
    odd: bool
    unaligned: bool

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in vars(self).items() if k not in ("groups", "number"))
        return f"configuration {self.number}: {options}" + "".join(f"\n    {group}" for group in self.groups)


def draw(number: int, *, cooperative: bool, small: bool) -> Configuration:
    """The rules take turns. `small`: fewer tensors. A step is cooperative where one launch can do it, so then all
    tensors have a dtype and a kind of step in common."""
    random_ = random.Random(number + 10_000 * cooperative)
    on_updates = number >= FIRST_ON_UPDATES
    rules = UPDATE_RULES if on_updates else RULES
    rule, granularity = rules[number % len(rules)]
    project = random_.random() < 0.4 and not on_updates
    common = random_.choice([*DTYPES, None if not cooperative else torch.float32])
    n_groups = random_.choice([1, 1, 2, 2, random_.randint(9, 12)])
    first: dict[str, Any] = _kind(random_)
    tensor_lr = random_.random() < 0.3
    groups = []
    for index in range(n_groups):
        kind = dict(first) if cooperative or index == 0 or random_.random() < 0.5 else _kind(random_)
        if index > 0 and kind["momentum"] != 0:
            kind["momentum"] = random_.choice([0.5, 0.9])
        shapes = FILTER_SHAPES if granularity == "filter" else SHAPES
        tensors = random_.randint(1, 3 if small else 6) if n_groups <= 2 else 1
        chosen = [random_.choice(shapes) for _ in range(tensors)]
        if index == 0 and 0 in chosen[0]:  # something must be left to compute
            chosen[0] = (3, 7)
        if not small and granularity != "filter" and random_.random() < 0.15:
            chosen += [(7, 5)] * random_.choice([20, 60, 270])  # more than one pass of `decide`
        lr = 0.05 * random_.choice([1, 1, 0.5])
        group = {
            **kind,
            "lr": torch.tensor(lr) if tensor_lr else lr,
            "weight_decay": random_.choice([1e-3 if rule == "equilibrium" else 0, 1e-3]),
            "shapes": chosen,
            "dtypes": [common or random_.choice(DTYPES) for _ in chosen],
        }
        # None: the optimizer finds out by itself (not by filter)
        scale_invariant = random_.choice([True, True, None if granularity != "filter" else True, False])
        if cooperative and index == 0:
            scale_invariant = True
        if scale_invariant is not None:
            group["scale_invariant"] = scale_invariant
        groups.append(group)
    return Configuration(
        number,
        rule,
        granularity,
        project,
        "update" if on_updates else None,
        groups,
        amp=random_.random() < 0.35,
        float32_gradients=random_.random() < 0.25,
        odd=random_.random() < 0.15,
        unaligned=random_.random() < 0.5,
    )


def _kind(random_: random.Random) -> dict[str, Any]:
    momentum = random_.choice([0, 0.9, 0.9])
    nesterov = momentum > 0 and random_.random() < 0.4
    dampening = 0.3 if momentum > 0 and not nesterov and random_.random() < 0.4 else 0
    return {
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": dampening,
        "maximize": random_.random() < 0.2,
    }


class Pair:
    """An optimizer that steps in the emulator, and its twin that steps on the reference, in float64."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.random = random.Random(configuration.number + 1_000_000)
        self.generator = torch.Generator().manual_seed(configuration.number)
        groups, twins = [], []
        for options in configuration.groups:
            options = dict(options)
            shapes, dtypes = options.pop("shapes"), options.pop("dtypes")
            params = [nn.Parameter(self.tensor(s, d)) for s, d in zip(shapes, dtypes, strict=True)]
            doubles = [
                nn.Parameter(p.detach().clone(memory_format=torch.preserve_format).double()) for p in params
            ]
            lr = options["lr"]
            groups.append({**options, "params": params})
            twins.append({**options, "params": doubles, "lr": lr.clone() if isinstance(lr, Tensor) else lr})
        rule: dict[str, Any] = {
            "rule": configuration.rule,
            "project": configuration.project,
            "granularity": configuration.granularity,
            "elr_of": configuration.elr_of,
        }
        self.actual = ELRSGD(groups, **rule, fused=True)
        self.expected = ELRSGD(twins, **rule, fused=False, foreach=False)
        self.params = [
            (p, q)
            for ours, theirs in zip(self.actual.param_groups, self.expected.param_groups, strict=True)
            for p, q in zip(ours["params"], theirs["params"], strict=True)
        ]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Random, dense; some are channels_last or transposed, which a row per filter does not take."""
        n = math.prod(shape)
        flat = self.flat(n, dtype)
        by_filter = self.configuration.granularity == "filter"
        if len(shape) == 4 and self.random.random() < 0.5:
            a, b, c, d = shape
            return flat.view(a, c, d, b).permute(0, 3, 1, 2)
        if len(shape) == 2 and not by_filter and self.random.random() < 0.2:
            return flat.view(shape[1], shape[0]).t()
        return flat.view(shape)

    def flat(self, n: int, dtype: torch.dtype) -> Tensor:
        start = self.random.choice([0, 1, 2, 3, 5]) if self.configuration.unaligned else 0
        return torch.randn(start + n + 8, generator=self.generator).to(dtype)[start : start + n]

    @property
    def chunks(self) -> int:
        """How many CTAs a step needs."""
        by_filter = self.configuration.granularity == "filter"
        rows = [p.shape[0] if by_filter and p.dim() > 0 else 1 for p, _ in self.params]
        return sum(
            n * -(-p.numel() // max(n, 1) // 4096) for n, (p, _) in zip(rows, self.params, strict=True)
        )

    def set_gradients(self, scale: float) -> None:
        """Mostly orthogonal to the weight, so that the layer stays tracked; a few parameters get none."""
        configuration, random_ = self.configuration, self.random
        missing = random_.randrange(len(self.params)) if random_.random() < 0.25 else None
        for index, (p, q) in enumerate(self.params):
            w = p.detach().float()
            g = 0.1 * torch.randn(p.shape, generator=self.generator)
            if p.numel() > 1 and configuration.granularity != "filter" and random_.random() < 0.7:
                g = g - w * ((w * g).sum() / w.square().sum())
            if configuration.odd and random_.random() < 0.2:
                g = g * random_.choice([0.0, 1e-30, 1e25, math.inf, math.nan])
            dtype = torch.float32 if configuration.float32_gradients else p.dtype
            grad = self.flat(p.numel(), dtype).as_strided(p.shape, p.stride())
            grad.copy_(scale * g)
            p.grad = q.grad = None
            if index != missing:
                if dtype != p.dtype:
                    p.grad_dtype = dtype
                p.grad, q.grad = grad, grad.double() / scale

    def differences(self, *, skipped: bool) -> Iterator[str]:
        """Of the two in parameters, momentum buffers and memory of the rule. Then the twin takes over
        the values."""
        for index, (p, q) in enumerate(self.params):
            ours, theirs = self.actual.state.get(p, {}), self.expected.state.get(q, {})
            pairs = {"weight": (p.detach(), q.detach())}
            m, n = ours.get("momentum_buffer"), theirs.get("momentum_buffer")
            is_marked = m is not None and n is None and (m == 0).all()  # new at a step that was skipped
            if (m is None) != (n is None) and not skipped and not is_marked:
                yield f"momentum buffer {index} exists {'only here' if n is None else 'only in the reference'}"
            if m is not None and n is not None:
                pairs["momentum buffer"] = (m, n)
            for name, (x, y) in pairs.items():
                yield from _difference(f"{name} {index} {tuple(p.shape)} {p.dtype}", x, y, TOLERANCE[x.dtype])
                y.copy_(x)
            for name in RULE_STATE:
                if name in ours and name in theirs:
                    yield from _difference(
                        f"{name} of {index}", ours[name], theirs[name], STATE_TOLERANCE, 1e-30
                    )
                    theirs[name].copy_(ours[name])


def _difference(
    name: str, actual: Tensor, expected: Tensor, rtol: float, atol: float | None = None
) -> Iterator[str]:
    """A message if an entry is further off than rounding allows. atol: None: 1e-5 of a typical entry."""
    limits = torch.finfo(actual.dtype)
    x, y = actual.double(), expected.double()
    y = torch.where(y.abs() > limits.max, y.sign() * math.inf, y)
    if atol is None:
        finite = y[y.isfinite()].abs()
        atol = 1e-5 * ((finite.mean().item() if len(finite) else 0.0) + 0.01)
        atol += SMALLEST_FLOAT16 if actual.dtype == torch.float16 else 0
    is_right = ((x - y).abs() <= rtol * y.abs() + atol) | (x == y) | (x.isnan() & y.isnan())
    if not is_right.all():
        wrong = ~is_right
        yield (
            f"wrong result: {name}: {int(wrong.sum())} of {wrong.numel()} differ, "
            f"{x[wrong][0].item():.9g} instead of {y[wrong][0].item():.9g}"
        )


def run(
    emulator: Emulator,
    configuration: Configuration,
    *,
    schedules: list[Schedule] | None = None,
    steps: int = STEPS,
) -> list[str]:
    """What was wrong in the steps. Each has its own schedule; in one, warps move by themselves."""
    pair = Pair(configuration)
    findings: list[str] = []
    is_small = pair.chunks <= 16
    for step in range(steps):
        drawn = Schedule(
            seed=10 * configuration.number + step,
            by_warp=step == STEPS - 1 and is_small,
            quantum=pair.random.choice([2, 20, 300]) if is_small else 300,
        )
        emulator.machine.schedule = drawn if schedules is None else schedules[step % len(schedules)]
        skipped = configuration.amp and step == 1
        pair.set_gradients(scale=8.0 if configuration.amp else 1.0)
        if configuration.amp:  # as torch.amp.GradScaler sets them
            pair.actual.grad_scale = torch.tensor(8.0)
            pair.actual.found_inf = torch.tensor(float(skipped))
        try:
            pair.actual.step()
        except (Fault, UnknownPTX, CompilationError) as error:
            innermost: BaseException = error
            while innermost.__cause__ is not None:
                innermost = innermost.__cause__
            findings.append(f"step {step}: {type(innermost).__name__}: {innermost}")
            break
        finally:
            findings += [
                f"step {step}: {report} ({n} times)" for report, n in emulator.machine.reports.items()
            ]
            emulator.machine.reports.clear()
        if not skipped:
            pair.expected.step()
        different = list(pair.differences(skipped=skipped))
        findings += [f"step {step}: {difference}" for difference in different]
        if findings:
            break
    return findings
