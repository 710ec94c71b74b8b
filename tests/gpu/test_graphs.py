"""A step captured in a CUDA graph is the step that runs eagerly, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD

from ..nets import bn_mlp, invariant_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RULES: list[tuple[str | None, bool]] = [
    (None, False),
    (None, True),
    ("warmup", False),
    ("uniform", False),
    ("angle", False),
    ("sphere", True),
]


def make(
    rule: str | None, project: bool, lr: Tensor, *, many_groups: bool = False, **options: Any
) -> tuple[nn.Sequential, ELRSGD]:
    net = bn_mlp(depth=5, width=64).cuda()
    tracked = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in tracked)]
    groups = [{"params": tracked, "scale_invariant": True}, {"params": rest, "scale_invariant": False}]
    if many_groups:  # their hyper-parameters lie in a table
        groups = [{**group, "params": [p]} for group in groups for p in group["params"]]
    return net, ELRSGD(
        groups, lr=lr, momentum=0.9, weight_decay=1e-3, rule=rule, project=project, fused=True, **options
    )


def gradient(p: Tensor, step: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 * step + p.numel())
    return torch.randn(p.shape, device="cuda", generator=generator)


def tensors(params: list[nn.Parameter], optimizer: ELRSGD) -> dict[str, Tensor]:
    named = {f"parameter {i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        named |= {f"{name} of parameter {i}": t.clone() for name, t in optimizer.state[p].items()}
    return named


def first_difference(eager: list[dict[str, Tensor]], graphed: list[dict[str, Tensor]]) -> str:
    """The tensors that differ at the first step at which any does, and by how much; "" if none does."""
    for step, (ours, theirs) in enumerate(zip(eager, graphed, strict=True)):
        different = [
            f"{name} {tuple(t.shape)} by up to {(t - theirs[name]).abs().max().item():.3g}"
            for name, t in ours.items()
            if not torch.equal(t, theirs[name])
        ]
        if different:
            over = ours.get("handed_over of parameter 0")
            return f"step {step}, handed over {over}: " + "; ".join(different)
    return ""


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("rule", "project", "many_groups"), [*((*rule, False) for rule in RULES), ("uniform", False, True)]
)
def test_replays_with_a_changing_lr_equal_eager_steps(
    rule: str | None, project: bool, many_groups: bool, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the end of the warm-up too: the host knows of it at the last eager steps, and no graph does."""
    if not together:
        monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
    runs = []
    for graphed in (False, True):
        lr = torch.tensor(0.01, device="cuda")
        net, optimizer = make(rule, project, lr, many_groups=many_groups)
        params = list(net.parameters())
        for p in params:
            p.grad = torch.empty_like(p)

        def set_up(step: int, lr: Tensor = lr, params: list[nn.Parameter] = params) -> None:
            lr.fill_(0.01 / (step + 1))
            for p in params:
                p.grad.copy_(gradient(p, step))  # type: ignore[union-attr]

        steps = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                set_up(step)
                optimizer.step()
                steps.append(tensors(params, optimizer))
            if graphed:
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=stream):
                    optimizer.step()
            for step in range(3, 40):
                set_up(step)
                if graphed:
                    graph.replay()
                else:
                    optimizer.step()
                steps.append(tensors(params, optimizer))
                if step == 35:  # whatever the host has asked for is there
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        if rule == "warmup" and not graphed:
            (rule_group,) = optimizer._rule_groups or []
            assert rule_group.warmup_end.warmup_is_over()
        runs.append(steps)
    assert first_difference(*runs) == ""


@pytest.mark.parametrize("rule", ["warmup", "uniform"])
def test_a_whole_training_step_with_gradients_made_in_the_graph(rule: str) -> None:
    """The gradients lie elsewhere than in the eager steps before, and eager steps go on after it."""
    results = []
    for graphed in (False, True):
        lr = torch.tensor(0.05, device="cuda")
        net, optimizer = make(rule, False, lr)
        x = torch.zeros(32, 8, device="cuda")

        def train(net: nn.Sequential = net, optimizer: ELRSGD = optimizer, x: Tensor = x) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
            optimizer.step()

        def batch(step: int, x: Tensor = x) -> None:
            x.copy_(torch.randn(32, 8, generator=torch.Generator().manual_seed(step)))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                batch(step)
                train()
            if graphed:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                optimizer.zero_grad()
                with torch.cuda.graph(graph, stream=stream):
                    train()
            for step in range(3, 12):
                batch(step)
                if graphed and step < 9:
                    graph.replay()
                else:
                    train()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_without_a_step_before_it_is_refused() -> None:
    net, optimizer = make("uniform", False, torch.tensor(0.1, device="cuda"))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run one step"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()  # nothing has been left behind
    torch.cuda.synchronize()
