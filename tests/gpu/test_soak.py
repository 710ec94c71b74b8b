"""10⁵ steps of the kernels: the norms that the update leaves for the next step are those of the weights."""

from __future__ import annotations

import pytest
import torch

from ..test_soak import KERNEL_RULES, STEPS, carry_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("rule", "granularity"), KERNEL_RULES, ids=str)
def test_norms_that_the_kernels_carry(rule: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elropt.kernels.fused_step.max_programs", lambda device: 0)
    carry_norms(rule, granularity, "cuda", steps=STEPS // 100, every=1)
    before = torch.cuda.memory_allocated()
    carry_norms(rule, granularity, "cuda", steps=STEPS, every=1000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
