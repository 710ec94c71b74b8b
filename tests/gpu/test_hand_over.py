"""On a GPU the host learns of the hand-over some steps late; when it does must not show in the results."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from elropt import ELRSGD
from elropt._warmup_end import WarmupEndPoll
from elropt.rules import growth_gain

from ..nets import bn_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(
    backend: dict[str, bool], steps: int, rises: Sequence[int] = (), tensor_lr: bool = False
) -> tuple[list[torch.Tensor], ELRSGD]:
    """`steps` of training; at each of `rises` the learning rate doubles."""
    net = bn_mlp().cuda()
    lr = torch.tensor(0.05, device="cuda") if tensor_lr else 0.05
    optimizer = ELRSGD(net.parameters(), lr=lr, momentum=0.9, **backend)
    for step in range(steps):
        if step in rises:
            optimizer.param_groups[0]["lr"] *= 2
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
    state = [t for p in net.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*net.parameters(), *state)], optimizer


@pytest.mark.parametrize("rises", [(), (85,), (70, 85, 86)], ids=str)
@pytest.mark.parametrize("backend", [{"foreach": True}, {"fused": True}, {}], ids=str)
def test_when_the_host_learns_of_it_does_not_matter(
    backend: dict[str, bool], rises: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    soon, optimizer = run(backend, 80)
    torch.cuda.synchronize()
    (rule_group,) = optimizer._rule_groups or []
    assert rule_group.warmup_end.warmup_is_over()
    soon, _ = run(backend, 90, rises)
    monkeypatch.setattr(WarmupEndPoll, "warmup_is_over", lambda self: False)
    never, _ = run(backend, 90, rises)
    for a, b in zip(soon, never, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_tensor_lr_that_rises_is_noticed_at_the_same_step_in_every_run(backend: dict[str, bool]) -> None:
    for steps, largest in ((91, 0.05), (90 + 34, 0.1)):
        runs = [run(backend, steps, [90], tensor_lr=True) for _ in range(2)]
        assert all(map(torch.equal, runs[0][0], runs[1][0]))
        optimizer = runs[0][1]
        seen = optimizer.state[optimizer.param_groups[0]["params"][0]]["largest_lr"].item()
        assert seen == pytest.approx(largest * growth_gain(0.9), rel=1e-5)
