"""Shares of tracked parameters: against counts by hand, and the committed summary against its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tracked_share
from benchmarks.tracked_share import MODELS, measured_name, row_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "tracked-share.json"
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


def test_committed_summary_follows_from_its_rows() -> None:
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    rows, summary = report["rows"], report["summary"]
    assert [row["model"] for row in rows] == list(MODELS)
    assert report["env"]["git_dirty"] is False
    assert {"torchvision", "timm", "transformers", "date", "cpu"} <= set(report["env"])
    for row in rows:
        assert row["family"] == MODELS[row["model"]].family
        assert row["share"] == row["tracked_parameters"] / row["parameters"] <= 1
        assert (row["tracked_weights"] == 0) == (row["share"] == 0) == (row["tracked_names"] == [])
    assert list(summary) == list(dict.fromkeys(row["family"] for row in rows))
    for family, found in summary.items():
        members = [row for row in rows if row["family"] == family]
        assert found["models"] == len(members)
        for share in ("share", "share_without_embeddings"):
            if found[share] is None:
                assert {row[share] for row in members} == {None}
            else:
                low, high = found[share]
                assert all(low <= row[share] <= high for row in members)
                assert {low, high} <= {row[share] for row in members}
    assert tracked_share.summarized(rows) == summary
