"""Classes of runs on records made by hand and on toys with a known answer; exponents of power laws."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.studies.study import SIZES
from benchmarks.studies.widths import run as widths
from benchmarks.studies.widths.run import Probe, Run, Setting, Task
from benchmarks.studies.widths.summarize import (
    CATASTROPHIC,
    CONTROLLED,
    STABLE,
    Edge,
    best_pilot,
    chosen_lrs,
    classify,
    classify_exponents,
    largest_stable,
    open_ends,
    slope,
    summarize,
)

TASK = Task(12, base_width=8, data="digits", image_size=None, limit=None)


def record(**end: Any) -> dict[str, list[Any]]:
    """Three recorded steps of a net with two hidden layers at which nothing happens, but for `end` at the last two."""
    start = {"logits": 1.0, "logit_grad": 0.9, "activations": [0.7, 0.8], "activation_grads": [0.1, 0.2]}
    return {name: [value, end.get(name, value), end.get(name, value)] for name, value in start.items()}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, STABLE),
        ({"logits": 9.0}, STABLE),
        ({"logits": 11.0}, CONTROLLED),
        (
            {"logits": 1e6, "activation_grads": [0.0, 0.0]},
            CONTROLLED,
        ),  # all images learned: no gradient is left
        ({"logits": 11.0, "logit_grad": 10.0}, CATASTROPHIC),  # as with MSE
        ({"activations": [0.7, 8.1]}, CATASTROPHIC),
        ({"activations": [0.06, 0.8]}, CATASTROPHIC),  # dead ReLUs
        ({"activation_grads": [1.1, 0.2]}, CATASTROPHIC),
        ({"logits": math.inf}, CATASTROPHIC),
        ({"activations": [0.7, math.nan]}, CATASTROPHIC),
    ],
    ids=str,
)
def test_class_of_a_record(end: dict[str, Any], expected: str) -> None:
    assert classify(record(**end)) == expected


def test_logits_that_diverge_and_come_back_have_diverged_in_control() -> None:
    columns = record()
    columns["logits"][1] = 50.0
    assert classify(columns) == CONTROLLED
    columns = record()
    columns["activations"][1] = [70.0, 0.8]
    assert classify(columns) == STABLE


def train_head(loss: str, lr: float) -> dict[str, list[Any]]:
    """Gradient descent on the last layer of a net whose two images have orthogonal features φ of norm 2."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(2 * torch.eye(2))
        net[2].weight.copy_(torch.tensor([[0.5, -0.5], [0.25, 1.0]]))
    probe = Probe(net, (torch.eye(2), torch.tensor([0, 1])), widths.LOSSES[loss])
    probe.record(0)
    optimizer = torch.optim.SGD(net[2].parameters(), lr=lr)
    for step in range(1, 41):
        optimizer.zero_grad()
        widths.LOSSES[loss](net(probe.images), probe.labels).backward()
        optimizer.step()
        if step in (1, 2, 4, 40):
            probe.record(step)
    return probe.columns


def test_probe_by_hand() -> None:
    """Before the first step: W = [[½, −½], [¼, 1]], φ = 2·e, so f = [1, ½] and [−1, 2]."""
    columns = train_head("mse", 0.1)
    assert columns["at"] == [0, 1, 2, 4, 40]
    assert columns["loss_at"][0] == pytest.approx((0.5**2 + 1 + 1) / 2 / 2)  # errors [0, ½] and [−1, 1]
    assert columns["logits"][0] == pytest.approx(math.sqrt((1 + 0.25 + 1 + 4) / 4), rel=1e-3)
    assert columns["logit_grad"][0] == pytest.approx(math.sqrt((0.25 + 1 + 1) / 4))
    assert columns["activations"][0] == pytest.approx([math.sqrt((4 + 4) / 4)], rel=1e-3)
    # Wᵀχ of the two images: ½·[¼, 1] and [−½ + ¼, ½ + 1]
    squares = 0.125**2 + 0.5**2 + 0.25**2 + 1.5**2
    assert columns["activation_grads"][0] == pytest.approx([math.sqrt(squares / 4)], rel=1e-3)
    grad = math.sqrt(2.25)  # Σ χφᵀ/2, entries 0, ½, −1, 1
    assert columns["E"][0][1] == pytest.approx(grad / math.sqrt(0.25 + 0.25 + 1 / 16 + 1), rel=1e-3)
    assert columns["activation_change"][-1] == [0.0]
    # f − y is multiplied by 1 − lr·‖φ‖²/2 at every step
    assert columns["logit_grad"][2] == pytest.approx(0.8**2 * columns["logit_grad"][0], rel=1e-3)
    assert columns["logit_change"][1] == pytest.approx(0.2 * columns["logit_grad"][0], rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "lr", "expected"),
    [
        ("mse", 0.9, STABLE),  # the error is multiplied by 1 − 2·lr
        ("mse", 1.1, CATASTROPHIC),
        ("mse", 1e4, CATASTROPHIC),  # overflows
        ("cross_entropy", 1.1, STABLE),
        ("cross_entropy", 1e3, CONTROLLED),  # one step, and both images are right by thousands
    ],
)
def test_class_of_a_linear_model(loss: str, lr: float, expected: str) -> None:
    assert classify(train_head(loss, lr)) == expected


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ({"logit_change": 0.0, "activation_change": -0.5, "logit_grad": 0.0}, STABLE),
        ({"logit_change": 0.5, "activation_change": 0.0, "logit_grad": 0.0}, CONTROLLED),
        ({"logit_change": 0.5, "activation_change": 0.0, "logit_grad": 0.5}, CATASTROPHIC),
        ({"logit_change": 1.0, "activation_change": 0.5, "logit_grad": 0.0}, CATASTROPHIC),
        ({"logit_change": math.nan, "activation_change": math.nan, "logit_grad": 0.0}, CATASTROPHIC),
    ],
)
def test_class_of_exponents(exponents: dict[str, float], expected: str) -> None:
    assert classify_exponents(exponents) == expected


def run(
    width: int,
    lr: float,
    seed: int = 0,
    kind: str = STABLE,
    accuracy: float = 0.5,
    part: str = "val",
    **values: Any,
) -> dict[str, Any]:
    setting = {"optimizer": "sgd", "loss": "cross_entropy", "scaled": False, "model": "mlp-3"}
    spec = {
        "task": vars(TASK),
        "setting": setting,
        "width": width,
        "lr": lr,
        "seed": seed,
        "part": part,
        "alpha": None,
    }
    return {"spec": spec, "class": kind, "accuracy": accuracy, "classes": 10, "loss": 1.0, **values}


def test_edge_is_below_the_first_catastrophic_run() -> None:
    rows = [run(8, 1.0), run(8, 2.0, kind=CONTROLLED), run(8, 4.0, kind=CATASTROPHIC), run(8, 8.0)]
    assert largest_stable(rows[::-1]) == Edge(2.0, open=False)
    assert largest_stable(rows[:2]) == Edge(2.0, open=True)
    assert largest_stable(rows[2:]) is None


def test_ends_of_a_grid_are_open_at_the_best_or_at_an_edge() -> None:
    accuracies = {1.0: 0.3, 2.0: 0.5, 4.0: 0.4}
    rows = [run(8, lr, seed, accuracy=a) for lr, a in accuracies.items() for seed in (0, 1)]
    assert open_ends(rows, has_edge=False) == (False, False)
    assert open_ends(rows, has_edge=True) == (False, True)
    assert open_ends(rows[:4], has_edge=False) == (False, True)
    assert open_ends(rows[2:], has_edge=False) == (True, False)
    rows[0]["class"] = CATASTROPHIC
    assert open_ends(rows, has_edge=False) == (True, False)


def test_pilot_of_the_least_loss() -> None:
    rows = [run(8, lr, loss=loss) for lr, loss in ((1.0, 2.0), (2.0, 1.5), (4.0, None))]
    rows += [run(8, 8.0, kind=CATASTROPHIC, loss=0.1)]
    assert best_pilot(rows) == 2.0
    assert best_pilot([run(8, 2.0, kind=CATASTROPHIC), run(8, 1.0, kind=CATASTROPHIC)]) == 1.0


def test_slope_of_a_power_law() -> None:
    assert slope([8, 16, 64], [3 * w**-0.5 for w in (8, 16, 64)]) == pytest.approx(-0.5)
    assert slope([8, 16, 64, 128], [8.0, 16.0, math.nan, 128.0]) == pytest.approx(1)
    assert math.isnan(slope([8, 16, 64], [1.0, 1.0, 0.0]))


def test_exponents_of_a_study_with_a_known_law() -> None:
    """Best at 4·width^−½, catastrophic above 30·width^−1; the largest width's grid ends below its edge."""
    lrs = [2.0**power for power in range(-6, 4)]
    rows = [
        run(
            width,
            lr,
            seed,
            CATASTROPHIC if lr > 30 / width and width < 128 else STABLE,
            0.9 - 0.05 * math.log2(lr * width**0.5 / 4) ** 2,
        )
        for width in (8, 16, 32, 64, 128)
        for lr in lrs
        for seed in (0, 1)
    ]
    rows += [
        run(w, lr, 1000 + s, accuracy=a, part="test")
        for w, lr, a in ((32, 0.5, 0.8), (32, 1.0, 0.7))
        for s in (0, 1)
    ]
    found = summarize(rows)["settings"]["SGD, CE"]
    assert found["best_exponent"].mean == pytest.approx(-0.5)
    assert found["edge_exponent"].mean == pytest.approx(-1)
    assert found["widths"]["128"]["edge"] is None
    assert found["widths"]["128"]["edge_open"] == 2
    assert found["widths"]["16"]["edge"].mean == pytest.approx(1)
    assert found["predicted"] == -0.5
    chosen = chosen_lrs([row for row in rows if row["spec"]["part"] == "val"])
    assert chosen[8]["own"] == chosen[32]["base"]
    assert chosen[32]["own"] in (0.5, 1.0)
    json.dumps(found)


def test_the_base_widths_rate_loses_on_a_wider_net() -> None:
    rows = [
        run(w, lr, accuracy=a)
        for w, best in ((8, 1.0), (32, 0.5))
        for lr, a in ((best / 2, 0.2), (best, 0.9), (best * 2, 0.3))
    ]
    rows += [
        run(32, lr, 1000 + s, accuracy=a + 0.01 * s, part="test")
        for lr, a in ((0.5, 0.8), (1.0, 0.7))
        for s in (0, 1, 2)
    ]
    found = summarize(rows)["settings"]["SGD, CE"]["transfer"]["32"]
    assert (found["own_lr"], found["base_lr"]) == (0.5, 1.0)
    assert found["own"].mean == pytest.approx(81)
    assert found["difference"].mean == pytest.approx(-10)


def test_a_run_is_repeatable_and_a_check_scales_its_learning_rate() -> None:
    spec = Run(TASK, Setting("sgd"), 16, 0.1, 3)
    first, second = (json.dumps(widths.work(spec)) for _ in range(2))
    assert first == second
    check = widths.work(Run(TASK, Setting("sgd"), 32, 0.1, 0, "check", alpha=0.5))
    assert check["lr"] == [0.05] * 3
    assert "accuracy" not in check
    scaled = widths.work(Run(TASK, Setting("sgd", scaled=True), 32, 0.1, 0, "pilot"))
    assert scaled["lr"] == [0.2, 0.05, 0.05]
    angle = widths.work(Run(TASK, Setting("angle", model="bn-mlp-3"), 16, 0.01, 0, "pilot"))
    assert angle["lr"] == [0.01, 0.01, widths.OTHER_LR]


def test_a_run_that_overflows_is_catastrophic_and_valid_json() -> None:
    row = widths.work(Run(TASK, Setting("sgd", "mse"), 16, 1e30, 0))
    assert row["class"] == CATASTROPHIC
    assert row["at"][-1] < TASK.steps


@pytest.mark.parametrize("size", SIZES)
def test_first_stages_have_no_run_twice(size: str) -> None:
    for stage in widths.stages(size, "cpu")[:2]:
        specs = stage([])
        assert len(set(specs)) == len(specs)
        assert all(widths.describe(spec) for spec in specs)
