"""Inside torch.compile: SGD by foreach is traced, everything else runs as it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from elropt import ELRSGD

from .nets import bn_mlp

pytestmark = pytest.mark.filterwarnings("default")  # of torch.compile's own

CASES: list[dict[str, Any]] = [
    {"rule": None, "foreach": True},
    {"rule": None, "foreach": False, "fused": False},
    {"rule": "warmup"},
    {"rule": "uniform", "foreach": True, "project": True},
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training(**options: Any) -> tuple[nn.Sequential, ELRSGD, Callable[[], torch.Tensor]]:
    net = bn_mlp(depth=3, width=8)
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, **options)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        return loss

    return net, optimizer, train


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_compiled_training_step_does_what_an_eager_one_does(options: dict[str, Any]) -> None:
    results = []
    for compiled in (False, True):
        net, _, train = training(**options)
        step = torch.compile(train, backend="eager") if compiled else train
        for _ in range(12):
            step()
        results.append(list(net.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def graphs_of_step(options: dict[str, Any]) -> tuple[int, list[str]]:
    """Of a compiled first `step`: how many graphs, and why it was cut."""
    net, optimizer, _ = training(**options)
    net(torch.randn(32, 8)).sum().backward()
    explained = torch._dynamo.explain(optimizer.step)()
    return explained.graph_count, [str(reason.reason) for reason in explained.break_reasons]


def test_sgd_by_foreach_is_one_graph_and_rules_are_not_traced() -> None:
    """In a process of its own: dynamo remembers functions that other tests have compiled too often, and skips them."""
    code = f"""
import json
from {__name__} import graphs_of_step
print(json.dumps([graphs_of_step({{"rule": rule, "foreach": True}}) for rule in (None, "uniform")]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (count, reasons), (count_with_rule, _) = json.loads(run.stdout.splitlines()[-1])
    assert count == 1, reasons
    assert all("graph_break()" in reason for reason in reasons)  # torch's own, around every optimizer's step
    assert count_with_rule == 0
