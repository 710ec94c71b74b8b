"""Shares of tracked parameters: against counts by hand, and the committed summary against its rows."""

from __future__ import annotations

import pytest

from benchmarks.tracked_share import MODELS, measured_name, row_of

HEAD = 256 * 40 + 40


def test_shares_of_graph_nets_by_hand() -> None:
    """gcn: all but the head, biases and norms. sage: two matrices are added in front of each norm, so neither alone."""
    gcn = row_of("gcn-3", MODELS["gcn-3"])
    weights = 128 * 256 + 2 * 256 * 256
    assert gcn["tracked_parameters"] == weights
    assert gcn["parameters"] == weights + 3 * 3 * 256 + HEAD
    assert gcn["share"] == weights / gcn["parameters"]
    assert (gcn["weights"], gcn["tracked_weights"], gcn["tracked_names"]) == (4, 3, ["linears.*.weight"])
    sage = row_of("sage-3", MODELS["sage-3"])
    assert (sage["parameters"], sage["tracked_parameters"]) == (2 * weights + 3 * 3 * 256 + HEAD, 0)


@pytest.mark.parametrize(("layer", "measured"), [(0, 0), (1, 1), (7, 1), (10, 1), (11, 2)])
def test_names_of_layers(layer: int, measured: int) -> None:
    name = "model.layers.{}.mlp.3.weight"
    assert measured_name(name.format(layer), 12, 3) == name.format(measured)
    assert measured_name("embedding.weight", 12, 3) == "embedding.weight"
