"""`elropt.control` on a real device: by the kernels, without waiting, with one copy of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from elropt import control, controller, kernels

from ..test_control import angles
from ..test_host_reads import no_host_reads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def controlled(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Parameter, Any]:
    w = nn.Parameter(torch.randn(1024, 1024, device="cuda", dtype=dtype))
    optimizer = torch.optim.SGD([{"params": [w], "scale_invariant": True}], lr=0.01, momentum=0.9)
    control(optimizer, **options)
    w.grad = torch.randn_like(w)
    return w, optimizer


@pytest.mark.parametrize("granularity", ["layer", "filter", "network"])
def test_turns_by_lr_with_the_kernels(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    choose = controller.choose_backend

    def choose_and_note(*args: Any, **kwargs: Any) -> Any:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(controller, "choose_backend", choose_and_note)
    w, optimizer = controlled(granularity=granularity)
    for _ in range(3):
        before = w.detach().clone()
        w.grad = torch.randn_like(w)
        optimizer.step()
        torch.testing.assert_close(
            angles(before, w, granularity),
            torch.full_like(angles(before, w, granularity), 0.01),
            rtol=1e-5,
            atol=0,
        )
    assert all(backend is kernels for backend in chosen)


@pytest.mark.parametrize("rule", ["angle", "uniform"])
def test_waits_for_nothing(rule: str) -> None:
    _, optimizer = controlled(rule=rule)
    optimizer.step()  # compiles
    with no_host_reads():
        optimizer.step()


def test_one_copy_of_the_weights() -> None:
    w, optimizer = controlled()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - held < 1.5 * w.numel() * w.element_size()


def test_a_capture_is_refused() -> None:
    _, optimizer = controlled()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        optimizer.step()
