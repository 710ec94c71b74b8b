"""The lists of tensors: their totals, and what is random about them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.workloads import NETWORKS, WORKLOADS, clone, param_groups
from elropt import ELRSGD


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet-56", 167, 853_018),
        ("resnet-50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("decoder-1b", 201, 1_100_048_384),
        ("decoder-1b-bf16", 201, 1_100_048_384),
        ("160x4", 160, 640),
        ("2000x4", 2000, 8000),
    ],
)
def test_totals(name: str, tensors: int, elements: int) -> None:
    workload = WORKLOADS[name]()
    assert (len(workload.shapes), workload.elements) == (tensors, elements)
    assert len(workload.tracked) == tensors
    assert workload.footprint == 3 * elements * (2 if name.endswith("bf16") else 4)


def test_the_2000_tensors_have_4_to_4096_elements() -> None:
    workload = WORKLOADS["2000-tensors"]()
    sizes = [shape[-1] for shape in workload.shapes]
    assert len(sizes) == 2000
    assert (min(sizes), max(sizes)) == (4, 4096)
    assert all(workload.tracked)


def test_convolutions_are_tracked_in_residual_nets() -> None:
    for name, convolutions in (("resnet-56", 55), ("resnet-50", 53)):
        workload = WORKLOADS[name]()
        assert sum(workload.tracked) == convolutions
        for shape, tracked in zip(workload.shapes, workload.tracked, strict=True):
            assert tracked == (len(shape) == 4)


def test_names_are_those_of_the_workloads() -> None:
    assert set(NETWORKS) <= set(WORKLOADS)
    for name, make in WORKLOADS.items():
        assert make().name == name


def test_gradients_are_orthogonal_and_of_many_sizes() -> None:
    workload = WORKLOADS["tiny"]()
    params = workload.make(torch.device("cpu"))
    assert [tuple(p.shape) for p in params] == list(workload.shapes)
    ratios = []
    for p, tracked in zip(params, workload.tracked, strict=True):
        assert p.grad is not None
        if p.grad.any():
            ratios.append((p.grad.norm() / p.norm()).item())
        if tracked:
            rows = (p * p.grad).flatten(1).sum(1).abs()
            assert (rows <= 1e-6 * (p * p.grad).abs().flatten(1).sum(1)).all()
    assert max(ratios) > 10 * min(ratios)
    again = workload.make(torch.device("cpu"))
    other = workload.make(torch.device("cpu"), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(params, other, strict=True))


def test_one_tracked_layer_of_several_has_no_gradient() -> None:
    for name, expected in (("tiny", 1), ("160x4", 1)):
        params = WORKLOADS[name]().make(torch.device("cpu"))
        assert sum(not p.grad.any() for p in params if p.grad is not None) == expected


def test_clones_share_nothing() -> None:
    params = WORKLOADS["tiny"]().make(torch.device("cpu"))
    for p, copy in zip(params, clone(params), strict=True):
        assert p.grad is not None
        assert copy.grad is not None
        assert torch.equal(p, copy)
        assert torch.equal(p.grad, copy.grad)
        assert p.data_ptr() != copy.data_ptr()
        assert p.grad.data_ptr() != copy.grad.data_ptr()


def test_the_warm_up_stays_active() -> None:
    workload = WORKLOADS["tiny"]()
    optimizer = ELRSGD(
        param_groups(workload.make(torch.device("cpu")), workload.tracked), lr=1e-3, momentum=0.9
    )
    for _ in range(200):
        optimizer.step()
    flags = [state["handed_over"] for state in optimizer.state.values() if "handed_over" in state]
    assert flags
    assert not any(flags)
