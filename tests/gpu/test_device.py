"""What only a real device can show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elropt import ELRSGD, kernels

from ..nets import bn_mlp, invariant_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


def flagged(net: nn.Sequential) -> list[dict]:
    tracked = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in tracked)]
    return [{"params": tracked, "scale_invariant": True}, {"params": rest, "scale_invariant": False}]


@pytest.mark.parametrize("granularity", ["layer", "network"])
@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere"])
@pytest.mark.parametrize("project", [False, True])
def test_one_launch_and_two_launches_agree(
    rule: str, granularity: str, project: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if granularity == "network" and rule not in ("angle", "sphere"):
        pytest.skip("no such granularity")
    nets = []
    for programs in (0, 10**6):
        if programs == 0:
            monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
        else:
            monkeypatch.undo()
        net = bn_mlp(depth=6, width=96).cuda()
        lr = 0.01 if rule in ("angle", "sphere") else 0.05
        optimizer = ELRSGD(
            flagged(net), lr=lr, momentum=0.9, rule=rule, granularity=granularity, project=project, fused=True
        )
        train(net, optimizer, 10)
        rule_group = optimizer._rule_groups[0]  # type: ignore[index]
        assert rule_group.last.triton_step.launches.cooperates == (programs > 0)  # type: ignore[union-attr]
        nets.append(list(net.parameters()))
    for a, b in zip(*nets, strict=True):
        assert (a - b).norm() / b.norm() < 1e-3


@pytest.mark.parametrize("programs", [0, 10**6])
def test_runs_are_repeatable_to_the_bit(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if programs == 0:
        monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        sizes = (1, 50, 3000, 4000 if programs else 40000)
        params = [nn.Parameter(torch.randn(n, 37, device="cuda")) for n in sizes]
        optimizer = ELRSGD(
            [{"params": params, "scale_invariant": True}], lr=0.1, momentum=0.9, rule="uniform"
        )
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("forgotten", [False, True])
def test_carried_norms_have_the_bits_of_measured_ones(
    forgotten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 37, device="cuda")) for n in (1, 50, 3000)]
    optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=0.1, momentum=0.9, rule="uniform")
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        weights = [p.detach().clone() for p in params]
        if forgotten:
            optimizer._rule_groups = None
        optimizer.step()
    measured = kernels.measure(weights, [torch.ones_like(w) for w in weights])[0]
    used = optimizer._rule_groups[0].last.triton_step.launches.sums[0]  # type: ignore[index,union-attr]
    assert torch.equal(measured, used)


def test_many_programs_without_a_row_pass_the_gate() -> None:
    """200 small tensors that are not tracked, behind and before one that is: they wait, and are waited for."""
    params = [nn.Parameter(torch.randn(8, device="cuda")) for _ in range(200)]
    tracked = nn.Parameter(torch.randn(300, 300, device="cuda"))
    optimizer = ELRSGD(
        [{"params": params, "scale_invariant": False}, {"params": [tracked], "scale_invariant": True}],
        lr=1e-3, momentum=0.9, rule="angle", fused=True,
    )  # fmt: skip
    radius = tracked.norm().item()
    for _ in range(500):
        for p in (*params, tracked):
            p.grad = torch.ones_like(p)
        optimizer.step()
    torch.cuda.synchronize()
    assert optimizer._rule_groups[0].last.triton_step.launches.cooperates  # type: ignore[index,union-attr]
    assert tracked.norm().item() == pytest.approx(radius, rel=0.01)


def test_memory_is_flat() -> None:
    net = bn_mlp(depth=4, width=64).cuda()
    optimizer = ELRSGD(net.parameters(), lr=0.01, momentum=0.9, rule="uniform")
    train(net, optimizer, 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    train(net, optimizer, 50)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_tensor_beyond_2_to_the_31_elements() -> None:
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 11 GB")
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(w)
    for i in (0, 2**31 - 1, 2**31, n - 1):
        g[i] = 2.0
    sums = kernels.measure([w], [g])
    assert sums[1].item() == 16.0
    kernels.update(
        [w],
        [g],
        [None],
        lr=0.5,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
    )
    assert [w[i].item() for i in (0, 1, 2**31 - 1, 2**31, n - 2, n - 1)] == [-1.0, 0.0, -1.0, -1.0, 0.0, -1.0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rule", [None, "uniform", "angle"])
def test_several_devices(rule: str | None) -> None:
    results = []
    for devices in (("cuda:0", "cuda:1"), ("cuda:0", "cuda:0")):
        torch.manual_seed(0)
        values = [torch.randn(30, 20) for _ in range(4)]
        params = [nn.Parameter(v.to(devices[i % 2])) for i, v in enumerate(values)]
        optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=0.01, momentum=0.9, rule=rule)
        for step in range(4):
            for i, p in enumerate(params):
                g = torch.randn(30, 20, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = g.to(p.device)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
