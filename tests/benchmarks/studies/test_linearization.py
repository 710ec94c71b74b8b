"""The linearization study: runs that must agree with others or with plain training, and its statements on rows made by
hand. The whole study at its tiny size is in test_studies.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import training
from benchmarks.common.optimizers import METHODS
from benchmarks.common.training import Run, Task
from benchmarks.studies.linearization import run as study
from benchmarks.studies.linearization import summarize as conclusions
from benchmarks.studies.linearization.network import replace_relus_
from benchmarks.studies.linearization.run import Linearized, Shallow

TASK = Task("bn-mlp-4-w16", epochs=4)
SGD = METHODS["sgd"]
COLUMNS = ("accuracy", "path_length", "normalized_path_length", "nonlinear", "spread", "log_std")


@pytest.fixture(scope="module")
def after() -> dict[str, Any]:
    return study.work(Linearized(TASK, METHODS["warmup"], 0.1, 0, "after", (0.0, 0.02, 3.0)))


def test_a_heavier_penalty_makes_more_units_linear(after: dict[str, Any]) -> None:
    assert [point["weight"] for point in after["points"]] == [0.0, 0.02, 3.0]
    lengths = [point["path_length"] for point in after["points"]]
    assert lengths[0] == 3
    assert 0 <= lengths[2] <= lengths[1] <= 3
    assert lengths[2] == 0
    assert after["points"][2]["nonlinear"] == [0, 0, 0]
    for point in after["points"]:
        assert point["finite"]
        assert point["path_length"] == pytest.approx(
            sum(point["nonlinear"]), rel=1e-3
        )  # a chain, all of a width


def test_the_net_before_is_that_of_half_the_training(after: dict[str, Any]) -> None:
    """The schedule of the first half ends at zero, so it is a whole training of half the epochs."""
    half = training.train(Run(dataclasses.replace(TASK, epochs=2), METHODS["warmup"], 0.1, 0, "test"))
    assert after["before"]["accuracy"] == half["accuracy"]
    assert after["before"]["path_length"] == 3
    assert after["points"][0]["accuracy"] > after["before"]["accuracy"]


def test_points_of_a_run_do_not_touch_each_other(after: dict[str, Any]) -> None:
    alone = study.work(Linearized(TASK, METHODS["warmup"], 0.1, 0, "after", (3.0,)))
    assert alone["points"] == after["points"][2:]


def test_during_starts_from_the_initial_net() -> None:
    row = study.work(Linearized(TASK, SGD, 0.1, 0, "during", (0.0, 3.0)))
    assert row["before"]["accuracy"] < 0.3
    assert [point["path_length"] for point in row["points"]] == [3, 0]
    assert row["points"][0]["accuracy"] > 0.6


def test_a_net_with_all_its_relus_is_trained_as_any_other() -> None:
    point = study.work(Shallow(TASK, SGD, 0.1, 0, 3))["points"][0]
    assert point["accuracy"] == training.train(Run(TASK, SGD, 0.1, 0, "test"))["accuracy"]
    assert point["path_length"] == 3


@pytest.mark.parametrize("nonlinear", [0, 1])
def test_shallow_nets_keep_their_linear_layers(nonlinear: int) -> None:
    row = study.work(Shallow(TASK, SGD, 0.1, 0, nonlinear))
    point = row["points"][0]
    assert point["nonlinear"] == [0, 0, nonlinear]
    assert point["path_length"] == nonlinear
    assert point["finite"]
    assert row["log_std_at_start"] > 0


def test_a_run_that_diverges_says_so() -> None:
    row = study.work(Linearized(TASK, SGD, 1e38, 0, "after", (0.0,)))
    assert not row["points"][0]["finite"]
    assert 0 <= row["points"][0]["accuracy"] < 0.2


def test_relative_gradients_are_those_of_the_loss_without_penalty() -> None:
    """‖g‖/‖w‖ by hand, and the net, its statistics and its gradients stay as they are."""
    spec = Shallow(TASK, SGD, 0.1, 0, 3)
    dataset = training.load(TASK)
    model = study.build(spec, dataset)
    probe = study.Probe(TASK, model, dataset)
    replace_relus_(model, probe.images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    E = probe.relative_grads(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    images, labels = next(dataset.batches("train", study.GRADIENT_BATCH))
    logits = model(images).log_softmax(1)
    (-logits[torch.arange(len(labels)), labels].mean()).backward()
    weights = [p for name, p in model.named_parameters() if name.startswith("layer") and p.ndim == 2]
    expected = [p.grad.norm().item() / p.detach().norm().item() for p in weights if p.grad is not None]
    np.testing.assert_allclose(E, expected, rtol=1e-5)


@pytest.mark.parametrize(("kept", "expected"), [(0, []), (1, [6]), (3, [1, 3, 6]), (7, list(range(7)))])
def test_kept_layers_are_evenly_spaced(kept: int, expected: list[int]) -> None:
    assert study.kept_layers(7, kept) == expected


@pytest.mark.parametrize("kept", [-1, 8])
def test_no_more_layers_are_kept_than_there_are(kept: int) -> None:
    with pytest.raises(ValueError, match="of 7 layers 0 to 7"):
        study.kept_layers(7, kept)


# Statements on rows made by hand: two seeds, accuracy falls by `slope` points a unit of path length.

LENGTHS = {0.0: 4.0, 0.1: 3.0, 1.0: 1.0}


def rows() -> list[dict[str, Any]]:
    spec = {"task": dataclasses.asdict(TASK), "lr": 0.1}
    choosing = [
        {
            "spec": dataclasses.asdict(Run(TASK, METHODS[name], lr, 0)),
            "accuracy": accuracy,
            "classes": 10,
        }
        for name, best in (("sgd", 0.1), ("warmup", 0.3))
        for lr, accuracy in ((0.03, 0.5), (0.1, 0.6 + 0.1 * (best == 0.1)), (0.3, 0.6 + 0.1 * (best == 0.3)))
    ]
    linearized = [
        {
            "spec": {
                **spec,
                "method": dataclasses.asdict(METHODS[name]),
                "seed": seed,
                "when": when,
                "weights": list(LENGTHS),
            },
            "before": point(0.5, 4.0),
            "points": [
                {"weight": weight, **point((top - slope * (4 - length) + seed) / 100, length, weight)}
                for weight, length in LENGTHS.items()
            ],
        }
        for name, top in (("sgd", 60), ("warmup", 63))
        for when, slope in (("during", 4), ("after", 2))
        for seed in (100, 101)
    ]
    shallow = [
        {
            "spec": {**spec, "method": dataclasses.asdict(SGD), "seed": seed, "nonlinear": layers},
            "log_std_at_start": 0.1 * layers,
            "points": [point((40 + 2 * layers + seed) / 100, float(layers))],
        }
        for layers in (0, 3)
        for seed in (100, 101)
    ]
    return [*choosing, *linearized, *shallow]


def point(accuracy: float, length: float, weight: float = 0.0) -> dict[str, Any]:
    values = dict.fromkeys(COLUMNS, 0.0)
    return {
        **values,
        "accuracy": accuracy - 1,  # the seeds are 100 and 101
        "path_length": length,
        "normalized_path_length": length / 2,
        "log_std": 1 + weight,
    }


def test_accuracies_at_equal_path_length() -> None:
    ((_, found),) = conclusions.summarize(rows()).items()
    assert found["full_path_length"] == 4
    assert found["full_normalized_path_length"] == 2
    assert {name: chosen["lr"] for name, chosen in found["learning_rates"].items()} == {
        "sgd": 0.1,
        "warmup": 0.3,
    }
    assert [chosen["at_edge"] for chosen in found["learning_rates"].values()] == [False, True]
    at = {when: found["at_share"]["sgd"][when] for when in ("during", "after", "shallow")}
    # At a path length of 2, halfway between two weights; seeds differ by 1.
    assert at["during"]["0.5"]["mean"] == pytest.approx(60 - 4 * 2 + 0.5)
    assert at["after"]["0.5"]["mean"] == pytest.approx(60 - 2 * 2 + 0.5)
    assert at["shallow"]["0.5"]["mean"] == pytest.approx(40 + 2 * 2 + 0.5)
    assert at["during"]["0.25"]["mean"] == pytest.approx(60 - 4 * 3 + 0.5)
    for method in ("sgd", "warmup"):
        difference = found["after_minus_during"][method]
        assert difference["0.75"] == pytest.approx({"mean": 2, "low": 2, "high": 2, "n": 2})
        assert difference["0.1"]["n"] == 0  # 0.4 is below all path lengths
    assert found["warmup_minus_sgd"]["after"]["0.25"]["mean"] == pytest.approx(3)
    assert found["sgd_minus_shallow"]["during"]["0.5"]["mean"] == pytest.approx(52 - 44)
    assert found["log_std_change"]["sgd"]["during"]["mean"] == pytest.approx(1)
    assert found["points"]["sgd"]["after"]["1"]["accuracy"]["mean"] == pytest.approx(60 - 2 * 3 + 0.5)
    assert found["shallow"]["3"]["log_std_at_start"]["mean"] == pytest.approx(0.3)


def test_equal_path_lengths_count_with_their_mean() -> None:
    points = [
        {"seed": 0, "path_length": length, "accuracy": accuracy}
        for length, accuracy in ((0.0, 10.0), (4.0, 50.0), (4.0, 70.0))
    ]
    at = conclusions.at_shares(points, 4.0)
    assert at["0.5"][0] == pytest.approx(35)


def test_finals_take_the_best_learning_rate_and_fresh_seeds() -> None:
    plan = study.Plan([TASK], [SGD, METHODS["warmup"]], 1, 2, (0.0, 1.0), (0.0, 0.5))
    specs = study.finals([row for row in rows() if "part" in row["spec"]], plan)
    assert {spec.seed for spec in specs} == {100, 101}
    assert {(spec.method.name, spec.lr) for spec in specs} == {("sgd", 0.1), ("warmup", 0.3)}
    linearized = [spec for spec in specs if isinstance(spec, Linearized)]
    assert len(specs) == len(set(specs)) == 2 * (2 * 3 + 2)
    assert {spec.weights for spec in linearized if spec.when == "after"} == {(0.0, 1.0)}
    assert {spec.weights for spec in linearized if spec.when == "during"} == {(0.0,), (1.0,)}
    assert {spec.nonlinear for spec in specs if isinstance(spec, Shallow)} == {0, 2}  # of 3 layers
