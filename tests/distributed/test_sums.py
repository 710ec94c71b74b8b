"""Sums over shards, in one process: the network is simulated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from elropt.sharding import Reduction, Reductions, sum_over_shards


def reduced(monkeypatch: pytest.MonkeyPatch, others: list[Tensor], mine: Tensor) -> Tensor:
    """`mine` and what `others` send, added in the order of the list."""

    def all_reduce(part: Tensor, group: Any) -> None:
        terms = [other.double() for other in group.others]
        sent = part.clone()
        part.zero_()
        for term in [*terms[: len(terms) // 2], sent[:-1], *terms[len(terms) // 2 :]]:
            part[:-1] += term
        part[-1] = len(terms) + 1

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    columns = torch.arange(mine.shape[1])
    group: Any = SimpleNamespace(others=others)
    shares = torch.full((mine.shape[1],), len(others) + 1.0, dtype=torch.float64)
    needed = Reductions([Reduction(group, columns, torch.device("cpu"))], shares)
    return sum_over_shards(mine, needed, slice(None), with_momentum=True)


def test_the_order_of_summation_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shards = [torch.rand(4, 1000) * 10.0 ** torch.randint(-3, 4, (4, 1000)) for _ in range(7)]
    expected = torch.stack(shards).double().sum(0).float()
    results = []
    for shift in range(6):
        others = [*shards[1:][shift:], *shards[1:][:shift]]
        results.append(reduced(monkeypatch, others, shards[0]))
    for result in results:
        assert torch.equal(result, expected)
    in_float32 = [sum(shards[i] for i in order) for order in (range(7), range(6, -1, -1))]
    assert not torch.equal(*in_float32)  # type: ignore[arg-type]
