"""What random configurations hardly reach: the end of the warm-up, what comes after it, and stochastic rounding."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from elropt import ELRSGD
from elropt.kernels import fused_step

from .driver import Emulator
from .machine import Cta, Schedule


def hand_over(emulator: Emulator) -> Iterator[str]:
    """All layers turn by nearly the same angle, so the warm-up soon ends: at the same step as in the specification,
    whatever the schedule, with one pass of `decide` over the rows or several."""
    cases = [*itertools.product([False, True], [2], range(4)), (False, 260, 0)]
    for project, n_rows, seed in cases:
        name = f"project={project}, {n_rows} rows, seed {seed}"
        generator = torch.Generator().manual_seed(seed)
        shapes = [(60, 40), (60, 40)] if n_rows == 2 else [(8, 8)] * n_rows
        params = [nn.Parameter(_unit(torch.randn(shape, generator=generator))) for shape in shapes]
        doubles = [nn.Parameter(p.detach().double()) for p in params]
        actual, expected = (
            ELRSGD(
                [{"params": of, "scale_invariant": True}], lr=0.01, momentum=0.9, project=project, **backend
            )
            for of, backend in ((params, {"fused": True}), (doubles, {"fused": False, "foreach": False}))
        )
        flags: list[tuple[float, float]] = []
        for step in range(4 if n_rows == 2 else 2):
            emulator.machine.schedule = Schedule(
                seed=100 * seed + step,
                by_warp=n_rows == 2 and seed % 2 == 1,
                quantum=[3, 50, 300][step % 3],
            )
            for p, q in zip(params, doubles, strict=True):
                g = torch.randn(p.shape, generator=generator)
                g = _unit(g - p.detach() * (p.detach() * g).sum() / p.detach().square().sum())
                p.grad = g * (1 + 0.02 * torch.rand((), generator=generator))
                q.grad = p.grad.double()
            actual.step()
            expected.step()
            ours, theirs = (
                o.state[o.param_groups[0]["params"][0]]["handed_over"] for o in (actual, expected)
            )
            flags.append((ours.item(), theirs.item()))
            error = max(
                ((p - q).abs().max() / q.abs().max()).item() for p, q in zip(params, doubles, strict=True)
            )
            if ours != theirs or error > 1e-5:
                yield f"{name}, step {step}: handed over {flags[-1]}, relative error {error:.1e}"
        if flags[-1] != (1.0, 1.0):
            yield f"{name}: the warm-up has not ended"
        yield from (f"{name}: {report}" for report in emulator.machine.reports)
        emulator.machine.reports.clear()


def late_news(emulator: Emulator) -> Iterator[str]:
    """A host that learns late that the warm-up is over goes on with the rule's kernels, as does a CUDA graph: no bit of
    parameters and state depends on it, not even where a record has everything measured."""
    runs = []
    for knows in (True, False):
        generator = torch.Generator().manual_seed(0)
        emulator.machine.schedule = Schedule(seed=int(knows), quantum=100)
        shapes = [(64, 64), (16, 8), (5, 1000)]
        tracked = [nn.Parameter(_unit(torch.randn(shape, generator=generator))) for shape in shapes]
        bias = nn.Parameter(torch.randn(300, generator=generator))
        groups = [
            {"params": tracked, "scale_invariant": True},
            {"params": [bias], "scale_invariant": False, "weight_decay": 1e-3},
        ]
        optimizer = ELRSGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        steps = []
        for step in range(5):
            for p in (*tracked, bias):
                p.grad = _unit(torch.randn(p.shape, generator=generator))
            if not knows and step > 0:
                (rule_group,) = optimizer._rule_groups or []
                rule_group.warmup_end.warmup_is_over = lambda: False  # type: ignore[method-assign]
            if not knows and step == 3:
                optimizer.record_next_step()
            optimizer.step()
            tensors = {("weight", i): p.detach().clone() for i, p in enumerate((*tracked, bias))}
            for i, p in enumerate((*tracked, bias)):
                tensors |= {(name, i): t.clone() for name, t in optimizer.state[p].items()}
            steps.append(tensors)
        runs.append(steps)
    if [step["handed_over", 0].item() for step in runs[0]] != [1.0] * len(runs[0]):
        yield "the warm-up has not ended at the first step"
    for step, (early, late) in enumerate(zip(*runs, strict=True)):
        for (name, i), t in early.items():
            if not torch.equal(t, late[name, i]):
                yield f"step {step}: {name} of {i} differs by {(t - late[name, i]).abs().max():.2g}"
    yield from emulator.machine.reports
    emulator.machine.reports.clear()


def _unit(t: Tensor) -> Tensor:
    return t / t.norm()


def rounding(emulator: Emulator) -> Iterator[str]:
    """The same step again and again: each result is a neighbour in bfloat16, their mean is the exact one, and the bits
    of one step say nothing about those of another."""
    n, lr = 4096 + 700, 1e-3
    for rule, offset, by_warp in itertools.product([None, "uniform"], [0, 1], [False, True]):
        name = f"rule={rule}, offset {offset}, by_warp={by_warp}"
        repeats = 3 if by_warp else 12
        emulator.machine.schedule = Schedule(seed=3, by_warp=by_warp)
        flat = torch.randn(n + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
        p = nn.Parameter(flat[offset : offset + n])
        start = p.detach().clone()
        optimizer = ELRSGD(
            [{"params": [p], "scale_invariant": True}], lr=lr, rule=rule, stochastic_rounding=7, fused=True
        )
        results = []
        for _ in range(repeats):
            with torch.no_grad():
                p.copy_(start)
            p.grad = torch.ones_like(p)
            optimizer.step()
            results.append(p.detach().double())
        rounded, exact = torch.stack(results), start.double() - lr
        ulp = (exact.abs().log2().floor() - 7).exp2()
        farthest = ((rounded - exact).abs() / ulp).max().item()
        if farthest >= 1.01:
            yield f"{name}: a result is {farthest:.3f} units of the last place off"
        error = (rounded.mean(dim=0) - exact) / ulp
        standard_error = (error.std() / n**0.5).item()
        if abs(error.mean().item()) > 5 * standard_error:
            yield f"{name}: the mean is off by {error.mean():.4f} ± {standard_error:.4f} units of the last place"
        up = (exact / ulp).remainder(1)
        agreement = up.square() + (1 - up).square()
        spread = (agreement * (1 - agreement)).sum().sqrt() / n
        for step in range(1, repeats):
            same = (rounded[0] == rounded[step]).double().mean()
            if abs(same - agreement.mean()) > 5 * spread:
                yield f"{name}: step {step} agrees with the first in {same:.3f}, by chance {agreement.mean():.3f}"
        yield from (f"{name}: {report}" for report in emulator.machine.reports)
        emulator.machine.reports.clear()


def bytes_on_updates(emulator: Emulator) -> Iterator[str]:
    """With ``elr_of="update"`` a step accesses each weight, gradient and momentum buffer as often as it says: 28 bytes
    per float32 element once the norms are known, 32 before; in one cooperative launch 24."""
    shapes = [(2, 4096), (5000,), (64, 64)]  # full chunks and parts
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(_unit(torch.randn(shape, generator=generator))) for shape in shapes]
    optimizer = ELRSGD(
        [{"params": params, "scale_invariant": True}],
        lr=0.1, momentum=0.9, weight_decay=1e-3, rule="equilibrium", fused=True,
    )  # fmt: skip
    is_cooperative = fused_step.max_programs(torch.device("cpu")) > 0
    accessed: Counter[str] = Counter()
    log = Cta.log

    def counting(cta: Cta, instruction: Any, strand: Any, lanes: Any, addresses: Any, *rest: Any) -> None:
        for name, t in emulator.tensors.items():
            inside = (addresses >= t.data_ptr()) & (addresses < t.data_ptr() + t.nbytes)
            accessed[name.split()[0]] += int(inside.sum()) * rest[0]
        log(cta, instruction, strand, lanes, addresses, *rest)

    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if step == 2:  # somebody writes to one
            with torch.no_grad():
                params[1].mul_(2.0)
        accessed.clear()
        Cta.log = counting
        try:
            optimizer.step()
        finally:
            Cta.log = log
        per_element = {name: n / sum(p.numel() for p in params) for name, n in accessed.items()}
        if is_cooperative:
            expected = {"weight": 8, "gradient": 4, "momentum": 12}  # m twice, the second time from the cache
        else:
            expected = {"weight": 8 if step == 1 else 12, "gradient": 8, "momentum": 12}
        if per_element != expected:
            yield f"step {step}: bytes per element {per_element}, not {expected}"
    yield from emulator.machine.reports
    emulator.machine.reports.clear()


SCENARIOS: dict[str, Callable[[Emulator], Iterator[str]]] = {
    "hand-over": hand_over,
    "late-news": late_news,
    "rounding": rounding,
    "bytes-on-updates": bytes_on_updates,
}
