"""elropt.Recorder: what it writes, when, and what happens if it cannot."""

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD, Recorder, effective_lrs, find_scale_invariant, layer_stats, record_next_step
from elropt.layer_table import LayerRow
from elropt.rules import RULES as SPECS
from elropt.run_history import read_run

from .every_rule import needs
from .random_weights import GRAD_SCALES, named, set_gradient, tracked_group, train, weights

RULES = [(rule, granularity) for rule, spec in SPECS.items() for granularity in spec.granularities]


def strict_records(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("every", [1, 3])
def test_recorder_writes_every_kth_step(tmp_path: Path, every: int) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    path = tmp_path / "new" / "folder" / "run.jsonl"

    with Recorder(optimizer, path, every=every) as recorder:
        tables = []
        generator = torch.Generator().manual_seed(1)
        for step in range(7):
            for p, scale in zip(params, GRAD_SCALES, strict=True):
                set_gradient(p, scale, generator)
            optimizer.step()
            if step % every == 0:
                tables.append(layer_stats(optimizer))
        assert recorder.step == 7

    records = strict_records(path)
    assert [record["step"] for record in records] == list(range(0, 7, every))
    for record, table in zip(records, tables, strict=True):
        assert record["elr_spread"] == pytest.approx(table.elr_spread)
        assert record["log_elr_std"] == pytest.approx(table.log_elr_std)
        assert list(record["layers"]) == ["a", "b", "c"]
        for layer in table:
            values = record["layers"][layer.name]
            assert values["elr"] == layer.elr
            assert values["weight_norm"] == layer.weight_norm
            assert set(values) == set(LayerRow.__dataclass_fields__) - {"name"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rule", "granularity"), RULES)
def test_recording_does_not_change_the_training(
    tmp_path: Path, rule: str | None, granularity: str, momentum: float
) -> None:
    results = []
    for record in (False, True):
        params = weights(dtype=torch.float32)
        options = {"lr": 0.05, "momentum": momentum, "rule": rule, "granularity": granularity, **needs(rule)}
        optimizer = ELRSGD(tracked_group(params), **options)
        if record:
            with Recorder(optimizer, tmp_path / "run.jsonl", every=2):
                train(optimizer, params, 12)
        else:
            train(optimizer, params, 12)
        results.append([p.detach().clone() for p in params])

    assert len(strict_records(tmp_path / "run.jsonl")) == 6
    for plain, recorded in zip(*results, strict=True):
        assert torch.equal(plain, recorded)


def test_recorder_goes_on_after_the_hand_over_of_the_warmup(tmp_path: Path) -> None:
    params = weights(scales=(1.0, 1.0, 1.0))
    optimizer = ELRSGD(tracked_group(params), lr=1e-3, rule="warmup")
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        train_equal = torch.Generator().manual_seed(2)
        for _ in range(5):
            before = [p.detach().clone() for p in params]
            for p in params:  # ‖g‖ = ‖w‖: all E are 1, there is nothing to equalize
                set_gradient(p, 1.0, train_equal)
                p.grad *= p.detach().norm() / p.grad.norm()
            optimizer.step()

    assert float(optimizer.state[params[0]]["handed_over"]) == 1
    records = strict_records(tmp_path / "run.jsonl")
    assert len(records) == 5
    last = records[-1]["layers"].values()
    assert [layer["elr"] for layer in last] == pytest.approx([1e-3] * 3, rel=1e-5)
    assert [layer["grad_factor"] for layer in last] == [1, 1, 1]
    assert [layer["weight_norm"] for layer in last] == pytest.approx([w.norm().item() for w in before])


def test_recorder_writes_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    params = weights()
    params[1].grad.fill_(math.nan)
    params[2].data.zero_()
    optimizer = ELRSGD(named(params), lr=0.1)
    with Recorder(optimizer, tmp_path / "run.jsonl"):
        optimizer.step()

    (record,) = strict_records(tmp_path / "run.jsonl")
    assert record["layers"]["b"]["grad_norm"] is None
    assert record["layers"]["c"]["relative_grad"] is None
    assert record["elr_spread"] == 1


def test_steps_without_gradients_are_counted_and_not_recorded(tmp_path: Path) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    grads = [p.grad for p in params]
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    assert [record["step"] for record in strict_records(tmp_path / "run.jsonl")] == [0, 2]


def test_close_removes_the_hooks_and_a_second_recorder_appends(tmp_path: Path) -> None:
    params = weights()
    optimizer = ELRSGD(tracked_group(params), lr=0.1)
    path = tmp_path / "run.jsonl"
    recorder = Recorder(optimizer, path, every=1)
    train(optimizer, params, 2)
    recorder.close()
    train(optimizer, params, 2)

    assert recorder.step == 2
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with Recorder(optimizer, path, every=1):
        train(optimizer, params, 1)
    assert [record["step"] for record in strict_records(path)] == [0, 1, 0]


@pytest.mark.parametrize("every", [0, -3])
def test_every_must_be_positive(tmp_path: Path, every: int) -> None:
    with pytest.raises(ValueError, match=f"every={every}"):
        Recorder(ELRSGD(weights()), tmp_path / "run.jsonl", every=every)
    assert not list(tmp_path.iterdir())


class Scalars:
    """Stands in for a SummaryWriter."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.values[tag, step] = value


def test_summary_writer_gets_the_scalars(tmp_path: Path) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    writer = Scalars()
    with Recorder(optimizer, tmp_path / "run.jsonl", every=2, writer=writer):
        train(optimizer, params, 3)

    records = {record["step"]: record for record in strict_records(tmp_path / "run.jsonl")}
    assert set(writer.values) == {
        (tag, step)
        for tag in (
            "elr_spread",
            "log_elr_std",
            "angle_spread",
            *(f"{c}/{n}" for n in "abc" for c in ("elr", "angle")),
        )
        for step in (0, 2)
    }
    for (tag, step), value in writer.values.items():
        record = records[step]
        column, _, layer = tag.partition("/")
        expected = record["layers"][layer][column] if layer else record[tag]
        assert value == expected


def test_tensorboard_reads_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    writer = SummaryWriter(str(tmp_path / "board"))
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1, writer=writer):
        train(optimizer, params, 2)
    writer.close()

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    records = strict_records(tmp_path / "run.jsonl")
    assert [event.value for event in events.Scalars("elr/b")] == pytest.approx(
        [record["layers"]["b"]["elr"] for record in records], rel=1e-6
    )


class Wrapper:
    """As accelerate, Lightning (`optimizer`) and fastai (`opt`) wrap an optimizer."""

    def __init__(self, name: str, inner: object) -> None:
        setattr(self, name, inner)


class Impostor(ELRSGD):
    """As Lightning's wrapper: an ELRSGD by its class, but what it is told does not reach the optimizer."""

    def __init__(self, inner: ELRSGD) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.optimizer, name)


WRAPPED: dict[str, Callable[[ELRSGD], object]] = {
    "accelerate": lambda o: Wrapper("optimizer", o),
    "fastai": lambda o: Wrapper("opt", o),
    "nested": lambda o: Wrapper("opt", Wrapper("optimizer", Wrapper("optimizer", o))),
    "lightning": Impostor,
    "scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_optimizers_are_looked_through(tmp_path: Path, how: str) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1, rule=None)
    wrapped = WRAPPED[how](optimizer)
    norms = [p.detach().norm().item() for p in params]
    with Recorder(wrapped, tmp_path / "run.jsonl", every=1):
        optimizer.step()
    record_next_step(wrapped)
    before = [p.detach().norm().item() for p in params]
    optimizer.step()

    (record,) = strict_records(tmp_path / "run.jsonl")
    assert [layer["weight_norm"] for layer in record["layers"].values()] == pytest.approx(norms)
    assert layer_stats(wrapped)["weight_norm"].tolist() == pytest.approx(before)  # not those after the step
    assert effective_lrs(wrapped) == effective_lrs(optimizer)


class WithoutHooks(torch.optim.Optimizer):
    """A torch optimizer by its class alone, as timm's Lookahead: nothing calls the hooks of its step."""

    def __init__(self) -> None:
        self.param_groups = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


def endless() -> object:
    """Every `.opt` is another wrapper."""

    class Endless:
        @property
        def opt(self) -> object:
            return Endless()

    return Endless()


def circle() -> object:
    wrapper = Wrapper("optimizer", None)
    wrapper.optimizer = Wrapper("opt", wrapper)  # type: ignore[attr-defined]
    return wrapper


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: WithoutHooks(), "WithoutHooks"),
        (lambda: Wrapper("opt", None), "Wrapper"),
        (lambda: [ELRSGD(weights())], "a list"),
        (endless, "Endless"),
        (circle, "Wrapper"),
    ],
)
def test_what_is_no_optimizer_is_refused_at_once(
    tmp_path: Path, make: Callable[[], object], name: str
) -> None:
    calls: list[Callable[[object], object]] = [
        lambda o: Recorder(o, tmp_path / "run.jsonl"),
        layer_stats,
        effective_lrs,
        record_next_step,
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"{name} is no torch optimizer .*: pass the optimizer itself"):
            call(make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["accelerate", "fastai", "nested"])
def test_wrapped_optimizers_of_torch_are_looked_through(tmp_path: Path, how: str) -> None:
    params = weights()
    optimizer = torch.optim.SGD(named(params), lr=0.1)
    wrapped = WRAPPED[how](optimizer)  # type: ignore[arg-type]
    with Recorder(wrapped, tmp_path / "run.jsonl", every=1):
        optimizer.step()
    assert len(strict_records(tmp_path / "run.jsonl")) == 1
    assert effective_lrs(wrapped) == effective_lrs(optimizer)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda recorder: pickle.loads(pickle.dumps(recorder)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_closed_and_the_original_goes_on(tmp_path: Path, how: str) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    path = tmp_path / "run.jsonl"
    recorder = Recorder(optimizer, path, every=1, on_record=lambda values, step: None)
    train(optimizer, params, 2)

    copied = COPIES[how](recorder)
    train(optimizer, params, 2)
    assert (copied.path, copied.every, copied.step, recorder.step) == (path, 1, 2, 4)
    copied.close()
    train(optimizer, params, 1)
    recorder.close()
    train(optimizer, params, 1)

    assert [record["step"] for record in strict_records(path)] == [0, 1, 2, 3, 4]


def test_a_model_that_holds_a_recorder_can_be_copied(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    optimizer = ELRSGD(net.parameters(), lr=0.1)
    net.recorder = Recorder(optimizer, tmp_path / "run.jsonl", every=1)  # type: ignore[assignment]
    twin, optimizer_too = copy.deepcopy((net, optimizer))
    net(torch.randn(8, 4)).square().sum().backward()
    twin(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    optimizer_too.step()

    assert find_scale_invariant(net, torch.randn(8, 4))["0.weight"] == "channel"
    assert [record["step"] for record in strict_records(tmp_path / "run.jsonl")] == [0]


def test_relative_paths_are_those_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder(optimizer, "run.jsonl", every=1):
        monkeypatch.chdir(tmp_path / "elsewhere")
        train(optimizer, params, 2)
    assert len(strict_records(tmp_path / "run.jsonl")) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("removed", [0, 1, 2, 200, 10**6])
def test_a_record_starts_on_a_line_of_its_own(tmp_path: Path, removed: int) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    path = tmp_path / "run.jsonl"
    with Recorder(optimizer, path, every=1):
        train(optimizer, params, 2)
    whole = path.read_text()
    last = len(whole.splitlines()[-1])
    path.write_text(
        whole[: len(whole) - min(removed, last)]
    )  # at least one character of the last line is left
    with Recorder(optimizer, path, every=1, first_step=2):
        train(optimizer, params, 2)

    run = read_run(path)
    assert run.steps.tolist() == ([0, 1, 2, 3] if removed < 2 else [0, 2, 3])
    assert len(run.notes) == (removed >= 2)


@pytest.mark.parametrize("cut_off", ["", '{"step": 1', "\0\0\0"])
def test_records_that_a_killed_run_has_left_are_written_again(tmp_path: Path, cut_off: str) -> None:
    """An earlier run in the same file stays, although its steps have larger numbers."""
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    path = tmp_path / "run.jsonl"
    for steps in (9, 6):
        with Recorder(optimizer, path, every=2):
            train(optimizer, params, steps)
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("a") as file:
        file.write(cut_off)
    with Recorder(optimizer, path, every=2, first_step=3):
        assert path.read_bytes() == b"".join(before[:7])
        train(optimizer, params, 4)
    assert [record["step"] for record in strict_records(path)] == [0, 2, 4, 6, 8, 0, 2, 4, 6]
    assert read_run(path).steps.tolist() == [0, 2, 4, 6]


class Broken(Scalars):
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        raise OSError("no space left on device")


def test_what_fails_after_the_step_is_a_warning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_recorded(**options: Any) -> list[Tensor]:
        params = weights()
        optimizer = ELRSGD(named(params), lr=0.1)
        with Recorder(optimizer, tmp_path / "new" / "run.jsonl", every=1, **options) as recorder:
            (tmp_path / "new" / "run.jsonl").unlink()
            (tmp_path / "new").rmdir()
            train(optimizer, params, 3)
        assert recorder.step == 3
        return [p.detach().clone() for p in params]

    def fail(values: dict[str, float], step: int) -> None:
        raise ValueError("never stops a training")

    good: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [
            train_recorded(writer=Broken(), on_record=fail),
            train_recorded(on_record=lambda v, step: good.append(step)),
        ]

    messages = [str(warning.message) for warning in caught]
    assert [warning.category for warning in caught] == [RuntimeWarning] * 4
    assert ["run.jsonl at step 0" in m for m in messages] == [True, False, False, True]
    assert "use its writer at step 0: OSError: no space left" in messages[1]
    assert "call on_record at step 0: ValueError: never stops" in messages[2]
    assert good == [0, 1, 2]
    params = weights()
    train(ELRSGD(named(params), lr=0.1), params, 3)
    for result in results:
        for p, recorded in zip(params, result, strict=True):
            assert torch.equal(p.detach(), recorded)


def test_recording_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    path = tmp_path / "new" / "run.jsonl"
    with Recorder(optimizer, path, every=1):
        train(optimizer, params, 1)
        path.rename(tmp_path / "away")
        path.parent.rmdir()
        with pytest.warns(RuntimeWarning, match=r"could not write .*run\.jsonl at step 1"):
            train(optimizer, params, 2)
        path.parent.mkdir()
        train(optimizer, params, 1)
    assert [record["step"] for record in strict_records(path)] == [3]


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    optimizer = ELRSGD(weights(), lr=0.1)
    with pytest.raises(OSError, match="directory"):
        Recorder(optimizer, tmp_path)
    for options in ({"writer": print}, {"writer": "board"}, {"on_record": "wandb"}):
        with pytest.raises(TypeError, match=r"on_record\({tag: value}, step=step\)"):
            Recorder(optimizer, tmp_path / "run.jsonl", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_function_gets_the_scalars_as_a_writer_does(tmp_path: Path) -> None:
    params = weights()
    optimizer = ELRSGD(named(params), lr=0.1)
    writer, logged = Scalars(), []

    def log(values: dict[str, float], step: int | None = None) -> None:
        logged.extend(((tag, step), value) for tag, value in values.items())

    with Recorder(optimizer, tmp_path / "run.jsonl", every=2, writer=writer, on_record=log):
        train(optimizer, params, 3)
    assert logged == list(writer.values.items())
    assert len(logged) == 2 * 9


def test_layers_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    params = weights()
    groups = [
        {"params": [("a", params[0]), ("a", params[1])], "scale_invariant": True},
        {"params": [("b", weights()[2])], "scale_invariant": True},
    ]
    optimizer = ELRSGD(groups, lr=0.1)
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        optimizer.step()
        optimizer.add_param_group({"params": [("a", params[2])], "scale_invariant": True})
        optimizer.step()

    expected = {"a": params[0], "a@0.1": params[1], "b": groups[1]["params"][0], "a@2.0": params[2]}
    first, second = strict_records(tmp_path / "run.jsonl")
    assert list(first["layers"]) == ["a", "a@0.1", "b"]
    assert list(second["layers"]) == list(expected)
    assert list(effective_lrs(optimizer)) == list(expected)
    assert read_run(tmp_path / "run.jsonl").names == list(expected)
    table = layer_stats(optimizer)
    for layer, p in zip(table, [params[0], params[1], groups[1]["params"][0], params[2]], strict=True):
        assert layer.grad_norm == pytest.approx(p.grad.norm().item(), rel=1e-5)  # type: ignore[union-attr]
