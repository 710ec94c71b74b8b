"""All optimizers get the same hyper-parameters, and tensors that are told apart."""

from __future__ import annotations

import torch

from benchmarks.speed.optimizers import peer
from benchmarks.speed.workloads import WORKLOADS


def test_other_packages_get_the_same_hyper_parameters() -> None:
    workload = WORKLOADS["tiny"]()
    params = workload.make(torch.device("cpu"))
    optimizer = peer("torch.optim", "SGD", nesterov=True)(params, workload.tracked)
    (group,) = optimizer.param_groups
    expected = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    assert {name: group[name] for name in expected} == expected
