"""elropt.layer_table against float64 norms and against what a step really does to the weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from elropt import ELRSGD, effective_lrs, layer_stats
from elropt.layer_table import LayerRow, LayerTable
from elropt.rules import RULES as SPECS

from .every_rule import needs
from .random_weights import GRAD_SCALES, set_gradient, tracked_group, train, weights

RULES = [(rule, granularity) for rule, spec in SPECS.items() for granularity in spec.granularities]


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
    optimizer = ELRSGD(tracked_group(params, lr=0.3), rule=rule, granularity=granularity, **needs(rule))
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
    optimizer = ELRSGD(groups, lr=0.1, rule=rule, granularity=granularity, **needs(rule))
    optimizer.step()

    with HostReads() as reads, ScalarReads() as scalars:
        function(optimizer)

    assert reads.calls == ["cpu"]
    assert scalars.count == 0


def test_the_step_reads_nothing_even_when_it_records() -> None:
    params = weights()
    optimizer = ELRSGD(tracked_group(params), lr=0.1, rule=None)
    optimizer.record_next_step()
    with HostReads() as reads, ScalarReads() as scalars:
        optimizer.step()
    assert reads.calls == []
    assert scalars.count == 0
    assert isinstance(optimizer.layer_records()[0].stats.grad_sq, Tensor)


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
