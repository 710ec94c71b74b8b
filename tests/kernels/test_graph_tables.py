"""Which tables a CUDA graph gets, without a GPU: here all memory is the CPU's. `tests/gpu/test_graphs.py` captures."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from elropt import kernels

if not kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

graph_tables = importlib.import_module("elropt.kernels.graph_tables")

BEFORE, MOVED = (1, 2), (3, 4)


def addresses_for(grad_pointers: Sequence[int]) -> list[np.ndarray]:
    return [np.array([[10, pointer, 30] for pointer in grad_pointers])]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(graph_tables, "_pinned_like", torch.empty_like)
    return graph_tables.GraphTables(1, torch.device("cuda"))


def step_outside_of_a_capture(tables: object, grad_pointers: Sequence[int]) -> list[torch.Tensor]:
    addresses = [torch.from_numpy(array) for array in addresses_for(grad_pointers)]
    tables.make_ready(grad_pointers, addresses)  # type: ignore[attr-defined]
    return addresses


def test_a_graph_has_tables_of_its_own_and_uploads_nothing_that_is_there(tables: object) -> None:
    of_steps = step_outside_of_a_capture(tables, BEFORE)
    of_graph = tables.take(BEFORE, addresses_for)  # type: ignore[attr-defined]
    assert not of_graph.uploads_addresses
    of_steps[0].zero_()
    assert torch.equal(of_graph.addresses[0], torch.from_numpy(addresses_for(BEFORE)[0]))


def test_a_graph_uploads_the_addresses_of_gradients_that_lie_elsewhere(tables: object) -> None:
    step_outside_of_a_capture(tables, BEFORE)
    of_graph = tables.take(MOVED, addresses_for)  # type: ignore[attr-defined]
    expected = torch.from_numpy(addresses_for(MOVED)[0])
    assert of_graph.uploads_addresses
    assert torch.equal(of_graph.host_addresses[0], expected)
    assert torch.equal(of_graph.addresses[0], expected)


def test_without_a_step_between_them_two_captures_share_tables_or_are_refused(tables: object) -> None:
    with pytest.raises(RuntimeError, match="run one step between two captures"):
        tables.refuse(BEFORE)  # type: ignore[attr-defined]
    step_outside_of_a_capture(tables, BEFORE)
    first = tables.take(BEFORE, addresses_for)  # type: ignore[attr-defined]
    tables.refuse(BEFORE)  # type: ignore[attr-defined]
    assert tables.take(BEFORE, addresses_for) is first  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="run one step between two captures"):
        tables.refuse(MOVED)  # type: ignore[attr-defined]
    step_outside_of_a_capture(tables, BEFORE)
    assert tables.take(MOVED, addresses_for) is not first  # type: ignore[attr-defined]
