"""10⁵ steps: memory stays flat, norms stay what they are, and the iterates stay those of float64.

The synthetic problem pulls two copies of a run together, so rounding errors do not pile up and what is left of them
tells something: f_t(w) = −⟨ŵ, v_t⟩, ŵ = w/‖w‖, with targets v_t that scatter around one direction.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from elropt import ELRSGD, Recorder, kernels, layer_stats

from .nets import bn_mlp
from .oracle import Oracle

Array = NDArray[np.float64]

STEPS = 100_000
SAMPLES = 5
ROUNDING = 2.0**-23 * math.sqrt(STEPS)  # 4e-5: what independent errors of float32 add up to
SHAPES = [(6, 5), (4, 3, 2, 2)]
KERNEL_RULES = [("uniform", "layer"), ("angle", "layer"), ("sphere", "layer"), ("sphere", "network")]
HYPER: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-3}


def targets(rng: np.random.Generator, shape: tuple[int, ...], count: int = 97) -> Array:
    """[count, *shape]: one direction, and noise of half its length."""
    mean = rng.normal(size=shape)
    noise = rng.normal(size=(count, *shape)) / math.sqrt(mean.size)
    return mean / np.linalg.norm(mean) + noise / 2


def pull(w: Any, target: Any) -> Any:
    """Gradient of −⟨ŵ, target⟩, of arrays or tensors."""
    square = (w * w).sum()
    return ((w * target).sum() / square * w - target) / square**0.5


@dataclass(frozen=True)
class Footprint:
    """What a leak makes larger. `resident` is 0 where there is no /proc."""

    blocks: int  # of Python's allocator
    tensors: int
    resident: int  # bytes
    state: int  # bytes of a checkpoint

    @classmethod
    def of(cls, optimizer: ELRSGD) -> Footprint:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        gc.collect()
        tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        return cls(sys.getallocatedblocks(), tensors, 4096 * pages, file.getbuffer().nbytes)


def assert_flat(prints: list[Footprint], steps: int) -> None:
    """From the second on, when caches are filled: not one block in 10 steps, nor 16 bytes a step."""
    first, last = prints[1], prints[-1]
    assert len({p.state for p in prints}) == 1
    assert last.tensors <= first.tensors
    assert last.blocks - first.blocks < steps / 10
    assert last.resident - first.resident < 16 * steps


def tracked_params(rng: np.random.Generator, scales: tuple[float, ...]) -> list[nn.Parameter]:
    values = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, scales, strict=True)]
    return [nn.Parameter(torch.tensor(v, dtype=torch.float32)) for v in values]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "granularity", "lr"),
    [("uniform", "layer", 0.02), ("angle", "layer", 0.002), ("sphere", "network", 0.002)],
    ids=str,
)
def test_tracked_layers(rule: str, granularity: str, lr: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    params = tracked_params(rng, (0.5, 3.0))
    banks = [targets(rng, shape) for shape in SHAPES]
    weights = [p.detach().numpy() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad.numpy() for p in params if p.grad is not None]
    optimizer = ELRSGD(
        [{"params": params, "scale_invariant": True}], lr=lr, rule=rule, granularity=granularity, **HYPER
    )
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=STEPS // 8, eta_min=lr / 20)
    oracle = Oracle([w.astype(np.float64) for w in weights], rule=rule, granularity=granularity, **HYPER)
    prints = []
    with Recorder(optimizer, tmp_path / "run.jsonl", every=STEPS // 1000):
        for step in range(STEPS):
            now = [bank[step % len(bank)] for bank in banks]
            for g, w, v in zip(grads, weights, now, strict=True):
                g[...] = pull(w, v)
            sampled = step % (STEPS // SAMPLES) == 0
            before = [w.astype(np.float64) for w in weights] if sampled else []
            lr_now = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            oracle.step([pull(w, v) for w, v in zip(oracle.weights, now, strict=True)], lr_now)
            if sampled:
                assert_norms_are_kept(optimizer, oracle, before)
                prints.append(Footprint.of(optimizer))
    assert_flat(prints, STEPS)
    ours = oracle.same_norm([w.astype(np.float64) for w in weights])
    for a, b in zip(ours, oracle.weights, strict=True):
        assert np.linalg.norm(a - b) < ROUNDING * np.linalg.norm(b)
    assert (tmp_path / "run.jsonl").read_text().count("\n") == 1000


@pytest.mark.slow
def test_a_net_past_the_hand_over() -> None:
    """Long after it, the default rule is SGD to the bit."""
    net = bn_mlp(depth=2, width=6)
    optimizer = ELRSGD(net.parameters(), lr=0.1, **HYPER)
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=STEPS // 8, eta_min=0.005)
    batches = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(97)]

    def backward(net: nn.Module, step: int) -> None:
        x = batches[step % len(batches)]
        net.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()

    prints = []
    for step in range(STEPS):
        backward(net, step)
        optimizer.step()
        schedule.step()
        if step % (STEPS // SAMPLES) == 0:
            prints.append(Footprint.of(optimizer))
    assert_flat(prints, STEPS)
    assert optimizer.state[next(net.parameters())]["handed_over"] == 1
    sgd_net = copy.deepcopy(net)
    sgd = torch.optim.SGD(sgd_net.parameters(), lr=0.1, **HYPER)
    sgd.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares what it loads
    for step in range(500):
        for n, o in ((net, optimizer), (sgd_net, sgd)):
            backward(n, step)
            o.step()
    assert all(map(torch.equal, net.parameters(), sgd_net.parameters()))


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason="triton is not installed")
@pytest.mark.parametrize(("rule", "granularity"), KERNEL_RULES, ids=str)
def test_norms_that_the_kernels_carry(rule: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
    carry_norms(rule, granularity, "cuda" if torch.cuda.is_available() else "cpu", steps=200, every=1)


def carry_norms(rule: str, granularity: str, device: str, *, steps: int, every: int) -> None:
    """Steps of the kernels; every so often, compare the norms that a step has used with those of its weights."""
    rng = np.random.default_rng(0)
    params = [nn.Parameter(p.to(device)) for p in tracked_params(rng, (0.5, 3.0))]
    banks = [torch.tensor(targets(rng, shape), dtype=torch.float32, device=device) for shape in SHAPES]
    optimizer = ELRSGD(
        [{"params": params, "scale_invariant": True}],
        lr=0.02 if rule == "uniform" else 0.002, rule=rule, granularity=granularity, fused=True, **HYPER,
    )  # fmt: skip
    radius = torch.stack([p.detach().double().norm() for p in params])
    for step in range(steps):
        for p, bank in zip(params, banks, strict=True):
            p.grad = pull(p.detach(), bank[step % len(bank)])
        before = [p.detach().clone() for p in params] if step % every == 0 else []
        optimizer.step()
        if before:
            (rule_group,) = optimizer._rule_groups or []
            fused = rule_group.last.triton_step
            assert fused is not None
            used = fused.launches
            assert used.versions == ([p._version for p in params], [])  # so the next step carries them
            norms = torch.stack([w.double().norm() for w in before])
            torch.testing.assert_close(used.sums[0].double().sqrt(), norms, rtol=1e-5, atol=0)
            if rule in ("angle", "sphere"):
                kept, wanted = norms * used.a, radius
                if granularity == "network":
                    kept, wanted = kept.norm(), wanted.norm()
                torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=0)


def assert_norms_are_kept(optimizer: ELRSGD, oracle: Oracle, before: list[Array]) -> None:
    """The norms that the step has used, and those it has given the weights."""
    rows = list(layer_stats(optimizer))
    for row, w in zip(rows, before, strict=True):
        assert row.weight_norm == pytest.approx(np.linalg.norm(w), rel=1e-5)
    if oracle.rule in ("angle", "sphere"):
        on_sphere = [row.weight_factor * w for row, w in zip(rows, before, strict=True)]
        for norm, radius in zip(oracle.norms(on_sphere), oracle.radii, strict=True):
            assert norm == pytest.approx(radius, rel=1e-5)
