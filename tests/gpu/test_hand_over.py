"""On a GPU the host learns of the hand-over some steps late; when it does must not show in the results."""

from __future__ import annotations

import pytest
import torch

from elropt import ELRSGD
from elropt._warmup_end import WarmupEndPoll

from ..nets import bn_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(backend: dict[str, bool], steps: int) -> tuple[list[torch.Tensor], ELRSGD]:
    net = bn_mlp().cuda()
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, **backend)
    for step in range(steps):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
    state = [t for p in net.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*net.parameters(), *state)], optimizer


@pytest.mark.parametrize("backend", [{"foreach": True}, {"fused": True}, {}], ids=str)
def test_when_the_host_learns_of_it_does_not_matter(
    backend: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    soon, optimizer = run(backend, 80)
    torch.cuda.synchronize()
    (rule_group,) = optimizer._rule_groups or []
    assert rule_group.warmup_end.warmup_is_over()
    monkeypatch.setattr(WarmupEndPoll, "warmup_is_over", lambda self: False)
    never, _ = run(backend, 80)
    for a, b in zip(soon, never, strict=True):
        assert torch.equal(a, b)
