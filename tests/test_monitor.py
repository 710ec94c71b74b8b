"""elropt.monitor against float64 norms and against what a step really does to the weights."""

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from elropt import ELRSGD, Recorder, effective_lrs, find_scale_invariant, layer_stats, record_next_step
from elropt.layer_table import LayerRow, LayerTable
from elropt.rules import GRANULARITIES
from elropt.run_history import read_run

RULES = [(rule, granularity) for rule, allowed in GRANULARITIES.items() for granularity in allowed]
SHAPES = ((7, 3), (5, 2, 3, 3), (4, 7))
GRAD_SCALES = (30.0, 1.0, 0.1)


def weights(
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    *,
    scales: tuple[float, ...] = GRAD_SCALES,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Random weights whose gradients are orthogonal to them, index by index of dimension 0."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape, scale in zip(shapes, scales, strict=True):
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        params.append(nn.Parameter(w.to(dtype)))
        set_gradient(params[-1], scale, generator)
    return params


def set_gradient(p: nn.Parameter, scale: float, generator: torch.Generator) -> None:
    w = p.detach().double().flatten(1)
    g = scale * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    g -= w * ((w * g).sum(1) / (w * w).sum(1))[:, None]
    p.grad = g.view_as(p).to(p.dtype)


def tracked_group(params: list[nn.Parameter], **options: object) -> list[dict[str, object]]:
    return [{"params": params, "scale_invariant": True, **options}]


def train(optimizer: ELRSGD, params: list[nn.Parameter], steps: int) -> None:
    """Steps with the gradients that a function of w/‖w‖ would have: the longer w, the smaller."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, scale in zip(params, GRAD_SCALES, strict=True):
            set_gradient(p, scale / float(p.detach().norm()), generator)
        optimizer.step()


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4
    ).map(tuple),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    rule=st.sampled_from([None, "warmup"]),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_and_cosine_are_those_of_float64(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, rule: str | None, maximize: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    optimizer = ELRSGD(tracked_group(params), lr=0.2, rule=rule, maximize=maximize)

    table = layer_stats(optimizer)

    assert len(table) == len(params)
    for row, p in zip(table, params, strict=True):
        w, g = p.detach().double(), p.grad.double()
        cosine = (w * g).sum() / (w.norm() * g.norm()) * (-1 if maximize else 1)
        assert row.weight_norm == pytest.approx(w.norm().item(), rel=1e-5)
        assert row.grad_norm == pytest.approx(g.norm().item(), rel=1e-5)
        assert row.relative_grad == pytest.approx((g.norm() / w.norm()).item(), rel=1e-5)
        assert row.radial_cosine == pytest.approx(cosine.item(), abs=1e-5)
        assert row.lr == pytest.approx(0.2)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("rule", "granularity"), RULES)
def test_elr_is_the_tangent_of_the_angle_that_the_step_turns_by(
    rule: str | None, granularity: str, when: str
) -> None:
    params = weights()
    optimizer = ELRSGD(tracked_group(params, lr=0.3), rule=rule, granularity=granularity)
    if when == "after":
        train(optimizer, params, 3)
        for p, scale in zip(params, GRAD_SCALES, strict=True):
            set_gradient(p, scale, torch.Generator().manual_seed(2))
    before = [p.detach().clone() for p in params]

    if when == "before":
        rows = layer_stats(optimizer).rows
        optimizer.step()
    else:
        optimizer.record_next_step()
        optimizer.step()
        rows = layer_stats(optimizer).rows

    pairs = list(zip(before, (p.detach() for p in params), strict=True))
    if granularity == "filter":
        pairs = [(w[i], after[i]) for w, after in pairs for i in range(len(w))]
    assert len(rows) == len(pairs)
    for row, (w, after) in zip(rows, pairs, strict=True):
        radial = (w * after).sum() / w.norm()
        tangent = (after - radial * w / w.norm()).norm() / radial
        assert row.elr == pytest.approx(tangent.item(), rel=1e-5)
        assert row.weight_factor == pytest.approx((radial / w.norm()).item(), rel=1e-5)
        assert row.weight_norm == pytest.approx(w.norm().item(), rel=1e-5)


def test_lr_may_be_a_tensor_and_differ_between_groups() -> None:
    params = weights()
    groups = [
        {"params": params[:1], "lr": torch.tensor(0.5), "scale_invariant": True},
        {"params": params[1:], "scale_invariant": True},
    ]

    table = layer_stats(ELRSGD(groups, lr=0.01, rule=None))

    np.testing.assert_allclose(table["lr"], [0.5, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(table["elr"], table["lr"] * table["relative_grad"], rtol=1e-6)


def test_named_parameters_give_the_names() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(5, 3)).sum().backward()

    named = layer_stats(ELRSGD(model.named_parameters(), lr=0.1))
    plain = layer_stats(ELRSGD(model.parameters(), lr=0.1))
    groups = [{"params": [model[0].weight]}, {"params": [model[1].bias, model[1].weight]}]
    grouped = layer_stats(ELRSGD(groups, lr=0.1))

    assert [row.name for row in named] == ["0.weight", "1.weight"]
    assert [row.name for row in plain] == ["0.0", "0.2"]
    assert [row.name for row in grouped] == ["0.0", "1.1"]


def test_filters_are_named_by_their_index() -> None:
    params = weights()
    group = [{"params": [("conv", params[1]), ("head", params[0])], "scale_invariant": True}]
    names = [row.name for row in layer_stats(ELRSGD(group, lr=0.1, rule="angle", granularity="filter"))]

    assert names == [f"conv[{i}]" for i in range(5)] + [f"head[{i}]" for i in range(7)]


def test_effective_lrs_are_those_of_the_tracked_layers() -> None:
    params = weights()
    groups = [
        {"params": [("tracked", params[0])], "scale_invariant": True},
        {"params": [("measured", params[1])]},
        {"params": [("excluded", params[2])], "scale_invariant": False},
    ]
    radial = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    radial.grad = radial.detach().clone()
    groups.append({"params": [("radial", radial)]})
    optimizer = ELRSGD(groups, lr=0.1, rule=None)

    expected = {
        name: 0.1 * p.grad.norm().item() / p.detach().norm().item()
        for name, p in (("tracked", params[0]), ("measured", params[1]))
    }
    assert effective_lrs(optimizer) == pytest.approx(expected, rel=1e-5)
    assert {row.name: row.tracked for row in layer_stats(optimizer)} == {
        "tracked": True,
        "measured": True,
        "radial": False,
    }


def test_layers_without_a_gradient_are_left_out_and_come_back() -> None:
    params = weights()
    optimizer = ELRSGD(
        [{"params": [(str(s), p) for s, p in zip("abc", params, strict=True)], "scale_invariant": True}]
    )
    generator = torch.Generator().manual_seed(3)

    params[1].grad = None
    optimizer.step()
    assert list(effective_lrs(optimizer)) == ["a", "c"]

    for p in params:
        set_gradient(p, 1.0, generator)
    optimizer.step()
    assert list(effective_lrs(optimizer)) == ["a", "b", "c"]


def test_without_any_gradient_it_says_what_to_do() -> None:
    optimizer = ELRSGD([nn.Parameter(torch.randn(3, 3))])
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        layer_stats(optimizer)
    with pytest.raises(RuntimeError, match="no layer has a gradient"):
        effective_lrs(optimizer)


HOST_READS = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero"}


class HostReads(TorchFunctionMode):
    """The calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST_READS:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Reads of single values, also those inside torch's own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [layer_stats, effective_lrs])
@pytest.mark.parametrize(("rule", "granularity"), RULES)
def test_one_host_read_in_all(rule: str | None, granularity: str, function) -> None:
    params = weights()
    groups = [
        {"params": params[:2], "scale_invariant": True, "lr": torch.tensor(0.1)},
        {"params": params[2:], "scale_invariant": True, "rule": None, "granularity": "layer"},
    ]
    optimizer = ELRSGD(groups, lr=0.1, rule=rule, granularity=granularity)
    optimizer.step()

    with HostReads() as reads, ScalarReads() as scalars:
        function(optimizer)

    assert reads.calls == ["cpu"]
    assert scalars.count == 0


def row(name: str = "w", **values: float | bool) -> LayerRow:
    numbers = dict.fromkeys((f for f in LayerRow.__dataclass_fields__ if f not in ("name", "tracked")), 1.0)
    return LayerRow(**{"name": name, "tracked": True, **numbers, **values})


def test_spread_and_deviation_are_over_tracked_layers_that_move() -> None:
    elrs = [0.5, 0.002, 0.03]
    table = LayerTable(
        [
            *(row(elr=elr) for elr in elrs),
            row(elr=1e9, tracked=False),
            row(elr=0.0),
            row(elr=math.nan),
            row(elr=math.inf),
        ]
    )

    assert table.elr_spread == pytest.approx(250)
    logs = [math.log(elr) for elr in elrs]
    mean = sum(logs) / 3
    assert table.log_elr_std == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in logs) / 3))
    assert table["elr"].shape == (7,)
    assert table["tracked"].tolist() == [True, True, True, False, True, True, True]


def test_nothing_tracked_has_no_spread() -> None:
    table = LayerTable([row(tracked=False)])
    assert math.isnan(table.elr_spread)
    assert math.isnan(table.log_elr_std)


def test_unknown_column_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="relative_grad"):
        LayerTable([row()])["elrs"]


def test_table_prints_every_layer_and_the_spread() -> None:
    text = str(LayerTable([row("block.conv", elr=0.25), row("head", elr=0.125, tracked=False)]))
    lines = text.splitlines()
    assert len(lines) == 4
    assert {"block.conv", "yes", "0.25"} <= set(lines[1].split())
    assert {"head", "no", "0.125"} <= set(lines[2].split())
    assert "elr_spread 1," in lines[3]


def strict_records(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def named(params: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": [(str(s), p) for s, p in zip("abc", params, strict=True)], "scale_invariant": True}]


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
        optimizer = ELRSGD(
            tracked_group(params), lr=0.05, momentum=momentum, rule=rule, granularity=granularity
        )
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
        (tag, step) for tag in ("elr_spread", "log_elr_std", "elr/a", "elr/b", "elr/c") for step in (0, 2)
    }
    for (tag, step), value in writer.values.items():
        record = records[step]
        expected = record["layers"][tag[-1]]["elr"] if tag.startswith("elr/") else record.get(tag)
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


def test_the_step_reads_nothing_even_when_it_records() -> None:
    params = weights()
    optimizer = ELRSGD(tracked_group(params), lr=0.1, rule=None)
    optimizer.record_next_step()
    with HostReads() as reads, ScalarReads() as scalars:
        optimizer.step()
    assert reads.calls == []
    assert scalars.count == 0
    assert isinstance(optimizer.layer_records()[0].stats.grad_sq, Tensor)


@pytest.mark.parametrize("rule", [None, "warmup"])
def test_nothing_to_show_is_an_empty_table(rule: str | None) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ELRSGD([p], lr=0.1, rule=rule)
    with pytest.raises(RuntimeError, match="backward"):
        layer_stats(optimizer)
    p.grad = torch.ones(3)
    optimizer.step()
    assert len(layer_stats(optimizer)) == 0
    assert effective_lrs(optimizer) == {}


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
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))]), r"torch\.optim\.sgd\.SGD"),
        (lambda: Wrapper("opt", None), "Wrapper"),
        (lambda: [ELRSGD(weights())], "a list"),
        (endless, "Endless"),
        (circle, "Wrapper"),
    ],
)
def test_what_is_no_elrsgd_is_refused_at_once(tmp_path: Path, make: Callable[[], object], name: str) -> None:
    calls: list[Callable[[object], object]] = [
        lambda o: Recorder(o, tmp_path / "run.jsonl"),
        layer_stats,
        effective_lrs,
        record_next_step,
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"{name} is no ELRSGD .*: pass the ELRSGD itself"):
            call(make())
    assert not list(tmp_path.iterdir())


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
    assert len(logged) == 2 * 5


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
