"""elropt.run_history: what a Recorder wrote is read again, and files that something has damaged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from elropt import ELRSGD, Recorder, param_groups
from elropt.diagnosis import diagnose
from elropt.run_history import read_run

from .nets import bn_mlp, train


def record_run(path: Path) -> Path:
    """A real run of 6 steps; three layers are tracked, the head is not."""
    model = bn_mlp(depth=3)
    optimizer = ELRSGD(param_groups(model, torch.randn(16, 8)), lr=0.5, momentum=0.9)
    with Recorder(optimizer, path, every=2):
        train(model, optimizer, range(6))
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record_run(tmp_path / "run.jsonl")


def record(step: int, **layers: dict) -> str:
    default = {"tracked": True, "elr": 0.1, "lr": 0.5, "grad_factor": 0.5}
    return json.dumps({"step": step, "layers": {k: default | v for k, v in layers.items()}}) + "\n"


def test_layers_that_elrsgd_does_not_measure_are_named(recorded: Path, tmp_path: Path) -> None:
    history = read_run(recorded, all_layers=True)
    assert history.names == ["0.weight", "3.weight", "6.weight"]
    (note,) = history.notes
    assert note.startswith(
        "not in the record: 9.weight and 7 other parameters. "
    )  # 3 gains, 3 biases, the head's

    model = bn_mlp(depth=3)
    found = (
        ELRSGD(model.parameters(), lr=0.5),
        torch.optim.SGD(param_groups(model, torch.randn(16, 8)), lr=0.5),
    )
    for i, optimizer in enumerate(found):  # one tests the head itself, the other measures all
        with Recorder(optimizer, tmp_path / f"{i}.jsonl", every=2):
            train(model, optimizer, range(2))
        history = read_run(tmp_path / f"{i}.jsonl", all_layers=True)
        assert (len(history.names), history.notes) == (4, [])


def test_a_recorded_run_is_read_as_it_was_written(recorded: Path) -> None:
    history = read_run(recorded)
    records = [json.loads(line) for line in recorded.read_text().splitlines()]

    assert history.steps.tolist() == [0, 2, 4]
    assert history.names == ["0.weight", "3.weight", "6.weight"]
    assert history.notes == []
    for t, written in enumerate(records):
        layers = [written["layers"][name] for name in history.names]
        assert history.elr[t].tolist() == [layer["elr"] for layer in layers]
        assert history.applied_lr[t].tolist() == [layer["lr"] * layer["grad_factor"] for layer in layers]
        assert history.elr_spread[t] == pytest.approx(written["elr_spread"])
        for name in ("angle", "relative_update", "radial_update"):
            assert getattr(history, name)[t].tolist() == [layer[name] for layer in layers]
    assert (history.angle > 0).all()  # type: ignore[operator]


def test_norms_and_options_are_read_of_every_layer(tmp_path: Path) -> None:
    recorded = tmp_path / "run.jsonl"
    model = bn_mlp(depth=3)
    optimizer = ELRSGD(model.named_parameters(), lr=0.5, momentum=0.9, weight_decay=0.25)
    with Recorder(optimizer, recorded, every=2):
        train(model, optimizer, range(6))
    history = read_run(recorded, all_layers=True)
    records = [json.loads(line) for line in recorded.read_text().splitlines()]

    assert ["optimizer" in record for record in records] == [True, False, False]  # only where it changes
    assert history.optimizer == "elropt.optimizer.ELRSGD"
    assert history.control is None
    head = history.names.index("9.weight")
    tracked = [all(record["layers"][name]["tracked"] for record in records) for name in history.names]
    assert history.tracked.tolist() == tracked
    assert not tracked[head]
    for t, written in enumerate(records):
        for column in ("lr", "weight_norm", "grad_norm", "grad_factor", "weight_factor"):
            expected = [written["layers"][name][column] for name in history.names]
            np.testing.assert_array_equal(getattr(history, column)[t], np.array(expected, dtype=float))
    assert history.options[2][0]["rule"] == "warmup"
    assert history.options[2][head]["momentum"] == 0.9
    np.testing.assert_array_equal(history.weight_decay, np.full((3, 4), 0.25))


def test_options_are_those_of_each_record(tmp_path: Path) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    bias = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [("w", p)], "weight_decay": 0.25}, {"params": [("b", bias)]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.75), lr=0.5)
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        for step in range(4):
            p.grad = torch.ones(2, 2)
            if step == 2:
                groups = optimizer.param_groups
                groups[0]["weight_decay"], groups[0]["lr"], groups[1]["eps"] = 0.5, 0.125, math.nan
            optimizer.step()

    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert ["optimizer" in json.loads(line) for line in lines] == [True, False, True, False]
    history = read_run(tmp_path / "run.jsonl", all_layers=True)
    assert history.weight_decay.ravel().tolist() == [0.25, 0.25, 0.5, 0.5]
    assert history.lr.ravel().tolist() == [0.5, 0.5, 0.125, 0.125]
    assert history.options[0][0]["betas"] == [0.5, 0.75]
    assert history.options[3][0]["decoupled_weight_decay"] is True
    assert not {"params", "lr", "layers"} & set(history.options[0][0])


def test_options_of_other_libraries_do_not_make_a_file_unreadable(tmp_path: Path) -> None:
    """The key "layers", which a record has for names, one that is no text, and a "rule" that is none of ours."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.SGD(
        [{"params": [weight], "layers": 12, (1, 2): 3, "rule": [1]}], lr=0.1, momentum=0.5
    )
    weight.grad = torch.randn(4, 3)
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        optimizer.step()
    history = read_run(tmp_path / "run.jsonl", all_layers=True)
    assert history.names == ["0.0"]
    assert history.options[0][0]["momentum"] == 0.5
    assert diagnose(history) == []


def test_of_files_that_do_not_describe_the_optimizer_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(record(0, a={}, b={"tracked": False, "weight_norm": 2.0}))
    history = read_run(path, all_layers=True)
    assert (history.names, history.tracked.tolist()) == (["a", "b"], [True, False])
    assert (history.optimizer, history.options) == ("", ())
    np.testing.assert_array_equal(history.weight_norm, [[math.nan, 2.0]])
    np.testing.assert_array_equal(history.weight_decay, [[math.nan] * 2])
    assert read_run(path).names == ["a"]

    path.write_text(record(0, a={"tracked": False}))
    assert read_run(path, all_layers=True).names == ["a"]
    path.write_text(json.dumps({"step": 0, "layers": {}}))
    with pytest.raises(ValueError, match="no layer: only weights"):
        read_run(path, all_layers=True)


def test_files_without_angles_are_read_and_gaps_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(record(0, a={}) + record(1, a={}))
    old = read_run(path)
    assert (old.angle, old.relative_update, old.radial_update) == (None, None, None)

    path.write_text(record(0, a={"angle": 0.5}) + record(1, a={"angle": None}) + record(2, a={}))
    new = read_run(path)
    np.testing.assert_array_equal(new.angle, [[0.5], [math.nan], [math.nan]])
    path.write_text(record(0, a={"angle": "wide"}))
    with pytest.raises(ValueError, match="not a record"):
        read_run(path)


def test_null_is_nan_and_absent_layers_leave_gaps(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(
        record(0, a={}, b={"elr": None}, lost={"tracked": True})
        + record(1, a={"elr": 0.0}, b={"elr": 0.2, "grad_factor": None}, lost={"tracked": False})
        + record(2, b={"elr": 0.2}, late={"elr": 0.8})
        + record(3, a={"elr": None})
    )
    history = read_run(path)
    nan = math.nan
    assert history.names == ["a", "b", "late"]
    np.testing.assert_array_equal(
        history.elr, [[0.1, nan, nan], [nan, 0.2, nan], [nan, 0.2, 0.8], [nan, nan, nan]]
    )
    np.testing.assert_array_equal(history.applied_lr[1], [0.25, nan, nan])
    np.testing.assert_allclose(history.elr_spread, [1, 1, 4, nan])


def test_lines_that_a_killed_run_cut_off_are_skipped_with_a_note(recorded: Path) -> None:
    whole = read_run(recorded)
    text = recorded.read_text()
    recorded.write_text(text[:-30])
    history = read_run(recorded)
    assert history.notes == [f"{recorded}, line 3: cut off, skipped"]
    np.testing.assert_array_equal(history.elr, whole.elr[:2])

    recorded.write_text(text[:-30] + text)  # the next run appended to the broken line
    history = read_run(recorded)
    assert history.steps.tolist() == [2, 4]
    assert len(history.notes) == 2

    recorded.write_text(
        text + '{"st\n' + "\0" * 9 + "\n" + record(6, a={})
    )  # begun, and after a power failure
    history = read_run(recorded)
    assert history.steps.tolist() == [0, 2, 4, 6]
    assert [note.split(", ", 1)[1] for note in history.notes] == [
        f"line {n}: cut off, skipped" for n in (4, 5)
    ]


def test_of_several_runs_in_a_file_the_last_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(record(0, a={}) + record(5, a={}) + record(0, b={"elr": 0.3}))
    history = read_run(path)
    assert history.names == ["b"]
    assert history.steps.tolist() == [0]
    assert history.notes == [f"{path} holds 2 runs; this is the last"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: no step was recorded"),
        (b'{"step": 0, "lay', "holds no complete record"),
        (b"epoch,loss\n1,2.0\n", "line 1: not JSON"),
        (b'{"epoch": 1}\n', "line 1: not a record of elropt.Recorder"),
        (b"[1, 2]\n", "line 1: not a record"),
        (b'{"step": "0", "layers": {}}\n', "line 1: not a record"),
        (b'{"step": 0, "layers": {"a": {"elr": 1}}}\n', "line 1: not a record"),
        (b'{"step": 0, "layers": {"a": 3}}\n', "line 1: not a record"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not a text file"),
        (b'{"step": 0, "optimizer": 3, "layers": {}}\n', "line 1: not a record"),
        (b'{"step": 0, "optimizer": {"groups": [{}]}, "layers": {}}\n', "line 1: not a record"),
        (record(0, a={"weight_norm": "long"}).encode(), "line 1: not a record"),
        (record(0, a={"tracked": False}).encode(), "no layer that was tracked"),
    ],
)
def test_errors_say_what_is_wrong_with_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run(path)
