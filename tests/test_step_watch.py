"""Steps of any torch optimizer as a Recorder and layer_stats see them: against weights and gradients copied by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from elropt import (
    ELRSGD,
    Recorder,
    _step_watch,
    effective_lrs,
    find_scale_invariant,
    layer_stats,
    param_groups,
    record_next_step,
)
from elropt._step_watch import record_of, watch_of
from elropt.layer_table import LayerRow, LayerTable
from elropt.run_history import read_run

from .random_weights import SHAPES, named, tracked_group, train, weights


def angle_by_hand(before: Tensor, after: Tensor) -> float:
    """Kahan's formula, in float64: 2·atan2(‖ŵ' − ŵ‖, ‖ŵ' + ŵ‖)."""
    w, new = (t.detach().double().flatten().numpy() for t in (before, after))
    w, new = w / np.linalg.norm(w), new / np.linalg.norm(new)
    return float(2 * np.arctan2(np.linalg.norm(new - w), np.linalg.norm(new + w)))


def assert_row_is_by_hand(row: LayerRow, before: Tensor, after: Tensor, grad: Tensor) -> None:
    w, new, g = before.double(), after.detach().double(), grad.double()
    assert row.angle == pytest.approx(angle_by_hand(before, after), rel=1e-6, abs=1e-14)
    assert row.relative_update == pytest.approx(((new - w).norm() / w.norm()).item(), rel=1e-9)
    assert row.radial_update == pytest.approx((new.norm() / w.norm()).item() - 1, abs=1e-14, rel=1e-6)
    assert row.weight_norm == pytest.approx(w.norm().item(), rel=1e-6)
    assert row.grad_norm == pytest.approx(g.norm().item(), rel=1e-6)
    assert row.radial_cosine == pytest.approx(((w * g).sum() / (w.norm() * g.norm())).item(), abs=1e-6)


def net_and_data() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return net, torch.randn(16, 1, 6, 6), torch.randint(3, (16,))


def heavyball(name: str) -> Callable[..., Optimizer]:
    def build(params: Any, **options: Any) -> Optimizer:
        module = pytest.importorskip("heavyball", reason="heavyball is not installed")
        module.utils.compile_mode = None  # no compiler is needed
        return getattr(module, name)(params, **options)

    return build


def pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    def build(params: Any, **options: Any) -> Optimizer:
        module = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
        return getattr(module, name)(params, **options)

    return build


def muon(params: Any, **options: Any) -> Optimizer:
    return torch.optim.Muon([p for p in params if p.dim() == 2], **options)


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}),
    "sgd foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "fused": True}),
    "tiny angles": (torch.optim.AdamW, {"lr": 1e-7, "weight_decay": 10.0}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "muon": (muon, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    "heavyball adamw": (heavyball("AdamW"), {"lr": 1e-3, "weight_decay": 0.1}),
    "heavyball soap": (heavyball("SOAP"), {"lr": 1e-3}),
    "pytorch-optimizer lion": (pytorch_optimizer("Lion"), {"lr": 1e-4, "weight_decay": 0.1}),
    "pytorch-optimizer lookahead": (
        lambda params, **options: pytorch_optimizer("Lookahead")(torch.optim.SGD(params, **options), k=2),
        {"lr": 0.1},
    ),
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_those_by_hand(tmp_path: Path, name: str, with_closure: bool) -> None:
    build, options = OPTIMIZERS[name]
    net, x, y = net_and_data()
    optimizer = build(net.parameters(), **options)
    ours = [p for group in optimizer.param_groups for p in group["params"] if p.dim() >= 2]
    grads: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        clip_grad_norm_(net.parameters(), 0.5)
        if not grads:
            grads.extend(p.grad.clone() for p in ours if p.grad is not None)
        return loss

    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        for _ in range(4):
            before = [p.detach().clone() for p in ours]
            grads.clear()
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            table = layer_stats(optimizer)
            assert len(table) == len(ours) > 0
            for row, p, w, g in zip(table, ours, before, grads, strict=True):
                assert_row_is_by_hand(row, w, p, g)
                assert row.lr == optimizer.param_groups[0]["lr"]
    assert (table["angle"] > 0).all()  # SOAP's first step does nothing


def test_sgd_has_the_table_of_elrsgd_without_a_rule() -> None:
    tables = []
    for build in (torch.optim.SGD, lambda params, **options: ELRSGD(params, rule=None, **options)):
        params = weights(dtype=torch.float32)
        optimizer: Any = build(named(params), lr=0.01, momentum=0.9, weight_decay=0.1, maximize=True)
        for _ in range(3):
            record_next_step(optimizer)
            train(optimizer, params, 1)
        tables.append(layer_stats(optimizer))

    for mine, other in zip(*tables, strict=True):
        for column in LayerRow.__dataclass_fields__:
            if column == "name" or column == "tracked":
                assert getattr(mine, column) == getattr(other, column)
            else:
                assert getattr(mine, column) == pytest.approx(getattr(other, column), rel=1e-5, abs=1e-6)


def test_only_plain_sgd_has_an_elr() -> None:
    params = weights(dtype=torch.float32)
    sgd = torch.optim.SGD(named(params), lr=0.1)
    adamw = torch.optim.AdamW(named(params), lr=0.1)
    norms = [(p.detach().norm().item(), p.grad.norm().item()) for p in params]  # type: ignore[union-attr]
    expected = {name: 0.1 * g / w for name, (w, g) in zip("abc", norms, strict=True)}
    assert effective_lrs(sgd) == pytest.approx(expected)
    assert effective_lrs(adamw) == pytest.approx(dict.fromkeys("abc", math.nan), nan_ok=True)


@pytest.mark.parametrize(
    ("rule", "elr_of"),
    [
        *((rule, "gradient") for rule in ("warmup", "uniform", "angle", "sphere")),
        *((rule, "update") for rule in ("uniform", "angle")),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_angles_of_elrsgd_are_between_stored_weights(rule: str, momentum: float, elr_of: str) -> None:
    params = weights()
    granularity = "filter" if rule == "angle" else "layer"
    options = {"elr_of": elr_of} if elr_of == "update" else {}
    optimizer = ELRSGD(
        tracked_group(params), lr=0.03, momentum=momentum, rule=rule, granularity=granularity, **options
    )
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        record_next_step(optimizer)
        train(optimizer, params, 1)
        table = layer_stats(optimizer)
        pairs = list(zip(before, (p.detach().clone() for p in params), strict=True))
        if granularity == "filter":
            pairs = [(w[i], new[i]) for w, new in pairs for i in range(len(w))]
        for row, (w, new) in zip(table, pairs, strict=True):
            assert row.angle == pytest.approx(angle_by_hand(w, new), rel=1e-6)
            assert row.relative_update == pytest.approx(((new - w).norm() / w.norm()).item(), rel=1e-9)
            assert row.radial_update == pytest.approx((new.norm() / w.norm()).item() - 1, rel=1e-6, abs=1e-14)
            if (rule, elr_of) == ("angle", "update"):
                assert row.angle == pytest.approx(0.03, rel=1e-5)


def test_without_a_recorded_step_angles_are_not_known() -> None:
    params = weights()
    for optimizer in (torch.optim.SGD(params, lr=0.1), ELRSGD(params, lr=0.1)):
        optimizer.step()
        assert np.isnan(layer_stats(optimizer)["angle"]).all()
        record_next_step(optimizer)
        assert np.isnan(layer_stats(optimizer)["angle"]).all()
        optimizer.step()
        assert (layer_stats(optimizer)["angle"] > 0).all()
        assert layer_stats(optimizer)["angle"].tolist() == layer_stats(optimizer)["angle"].tolist()
        optimizer.step()
        assert np.isnan(layer_stats(optimizer)["angle"]).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out(tmp_path: Path, fused: bool) -> None:
    params = weights(dtype=torch.float32)
    optimizer = torch.optim.SGD(named(params), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1) as recorder:
        tables: list[LayerTable] = []
        for step in range(3):
            loss = torch.stack([(p * i).sum() for i, p in enumerate(params, 1)]).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 1:
                params[0].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            tables.append(layer_stats(optimizer))
    assert tables[0]["grad_norm"].tolist() == pytest.approx(
        [i * p.numel() ** 0.5 for i, p in enumerate(params, 1)]
    )
    for table in (tables[0], tables[2]):
        assert (table["angle"] > 0).all()
    if fused:  # the optimizer is called, and does nothing
        assert tables[1]["angle"].tolist() == [0, 0, 0]
        assert tables[1]["relative_update"].tolist() == [0, 0, 0]
    assert recorder.step == (3 if fused else 2)


def test_groups_names_or_radial_tests_say_what_is_tracked(tmp_path: Path) -> None:
    net, x, y = net_and_data()
    found = find_scale_invariant(net, x)
    expected = {"0.weight": True, "4.weight": False}

    def tracked(optimizer: Optimizer, **options: Any) -> dict[str, bool]:
        with Recorder(optimizer, tmp_path / "run.jsonl", every=1, **options):
            for _ in range(12):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            table = layer_stats(optimizer, **options)
        return {row.name: row.tracked for row in table}

    assert tracked(torch.optim.AdamW(param_groups(net, x), lr=0.01)) == expected
    assert tracked(torch.optim.AdamW(net.named_parameters(), lr=0.01)) == expected
    by_name = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    assert tracked(by_name, tracked=found) == expected
    assert tracked(by_name, tracked=["4.weight"]) == {"0.weight": False, "4.weight": True}
    by_number = torch.optim.AdamW(net.parameters(), lr=0.01)
    assert tracked(by_number, tracked=[net[0].weight]) == {"0.0": True, "0.3": False}


def test_tracked_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    net, x, _ = net_and_data()
    numbered = torch.optim.SGD(net.parameters(), lr=0.1)
    with_names = torch.optim.SGD(net.named_parameters(), lr=0.1)
    elrsgd = ELRSGD(net.named_parameters(), lr=0.1)
    for optimizer, tracked, message in (
        (numbered, find_scale_invariant(net, x), "named_parameters"),
        (with_names, ["0.bias"], "'0.bias'"),
        (with_names, ["1.weight"], "two or more dimensions"),
        (with_names, [nn.Parameter(torch.ones(2, 2))], r"shape \[2, 2\]"),
        (elrsgd, ["0.weight"], "ELRSGD says itself"),
    ):
        with pytest.raises(ValueError, match=message):
            Recorder(optimizer, tmp_path / "run.jsonl", tracked=tracked)
        with pytest.raises(ValueError, match=message):
            layer_stats(optimizer, tracked=tracked)
    assert not list(tmp_path.iterdir())


def test_questions_leave_the_radial_tests_alone() -> None:
    asked, other = (torch.optim.SGD(weights(dtype=torch.float32), lr=0.01) for _ in range(2))
    for _ in range(20):
        layer_stats(asked)
    for optimizer in (asked, other):
        bad = optimizer.param_groups[0]["params"][0]
        bad.grad = bad.detach().clone()
        record_next_step(optimizer)
        optimizer.step()
    assert (
        layer_stats(asked)["tracked"].tolist()
        == layer_stats(other)["tracked"].tolist()
        == [False, True, True]
    )


def test_what_has_no_direction_or_gradient_is_left_out(tmp_path: Path) -> None:
    embedding = nn.Embedding(6, 4, sparse=True)
    embedding(torch.tensor([1, 1, 3])).square().sum().backward()
    lone, frozen = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3), requires_grad=False)
    wave, vector = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)), nn.Parameter(torch.ones(3))
    for p in (wave, vector):
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([embedding.weight, lone, frozen, wave, vector], lr=0.1)
    before = embedding.weight.detach().clone()
    grad = embedding.weight.grad.to_dense()  # type: ignore[union-attr]
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        optimizer.step()
        (row,) = layer_stats(optimizer)
    assert_row_is_by_hand(row, before, embedding.weight, grad)


def test_hooks_of_others_and_several_recorders(tmp_path: Path) -> None:
    params = weights()
    optimizer = torch.optim.SGD(named(params), lr=0.1)
    norms = [p.detach().norm() for p in params]

    def keep_norms(*_: object) -> None:
        with torch.no_grad():
            for p, norm in zip(params, norms, strict=True):
                p.mul_(norm / p.norm())

    tables: list[LayerTable] = []
    first = Recorder(
        optimizer,
        tmp_path / "a.jsonl",
        every=1,
        on_record=lambda v, step: tables.append(layer_stats(optimizer)),
    )
    second = Recorder(optimizer, tmp_path / "b.jsonl", every=2)
    optimizer.register_step_post_hook(keep_norms)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        train(optimizer, params, 1)  # type: ignore[arg-type]
        assert tables[-1]["angle"].tolist() == pytest.approx(
            [angle_by_hand(w, p) for w, p in zip(before, params, strict=True)], rel=1e-6
        )
        assert tables[-1]["radial_update"].tolist() == pytest.approx([0, 0, 0], abs=1e-14)
    first.close()
    second.close()
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.iterdir())] == [3, 2]
    assert not optimizer._optimizer_step_pre_hooks
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_recorder_may_be_closed_while_it_is_called(tmp_path: Path) -> None:
    params = weights()
    optimizer = torch.optim.SGD(named(params), lr=0.1)
    recorder = Recorder(
        optimizer, tmp_path / "run.jsonl", every=1, on_record=lambda v, step: recorder.close()
    )
    optimizer.step()
    optimizer.step()
    assert recorder.step == 1


def test_what_cannot_be_measured_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    optimizer = torch.optim.SGD(named(params), lr=0.1)
    before = [p.detach().clone() for p in params]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with Recorder(optimizer, tmp_path / "run.jsonl", every=1) as recorder:
        monkeypatch.setattr("elropt._step_watch.weight_change", fail)
        with pytest.warns(RuntimeWarning, match="measure the layers at step 0: RuntimeError: out of memory"):
            optimizer.step()
        monkeypatch.undo()
        optimizer.step()
    assert recorder.step == 2
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1
    assert not any(torch.equal(w, p) for w, p in zip(before, params, strict=True))


def test_a_step_that_raises_is_not_recorded(tmp_path: Path) -> None:
    params = weights()
    optimizer = torch.optim.SGD(named(params), lr=0.1)

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with Recorder(optimizer, tmp_path / "run.jsonl", every=1) as recorder:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)  # type: ignore[arg-type]
        assert recorder.step == 0
        optimizer.step()
        assert recorder.step == 1
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1


def test_lbfgs_has_the_gradient_of_its_first_evaluation() -> None:
    w = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    before = w.detach().clone()
    record_next_step(optimizer)
    optimizer.step(closure)  # type: ignore[arg-type]
    (row,) = layer_stats(optimizer)
    assert_row_is_by_hand(row, before, w, 4 * before**3)


def test_nothing_is_kept_of_a_step_that_is_not_recorded(tmp_path: Path) -> None:
    params = weights(SHAPES)
    optimizer = torch.optim.SGD(params, lr=0.1)
    clones = []
    real = Tensor.clone

    def clone(self: Tensor, **options: Any) -> Tensor:
        clones.append(self.shape)
        return real(self, **options)

    with pytest.MonkeyPatch.context() as patch, Recorder(optimizer, tmp_path / "run.jsonl", every=3):
        patch.setattr(Tensor, "clone", clone)
        counts = []
        for _ in range(4):
            optimizer.step()
            counts.append(len(clones))
    assert counts == [3, 3, 3, 6]


@pytest.mark.parametrize("inside", [False, True])
def test_a_recorder_closed_after_a_failed_step_keeps_no_copy_of_the_weights(
    tmp_path: Path, inside: bool
) -> None:
    net, x, _ = net_and_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder(optimizer, tmp_path / "run.jsonl", every=1)
    watch = watch_of(optimizer)

    def fails() -> float:
        if inside:
            recorder.close()
        raise MemoryError

    net(x).sum().backward()
    with pytest.raises(MemoryError):
        optimizer.step(fails)
    recorder.close()
    assert watch._snapshot is None
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert not torch.equal(before[0], next(net.parameters()))
    assert watch.record is None
    assert (tmp_path / "run.jsonl").read_text() == ""


def test_a_question_makes_no_watch() -> None:
    net, x, _ = net_and_data()
    optimizer = torch.optim.AdamW(net.parameters())
    net(x).sum().backward()
    layer_stats(optimizer)
    assert record_of(optimizer) is None
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer not in _step_watch._watches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 is not valid: it must be a whole number, at least 1"),
        ({"every": 2.5}, "every=2.5 is not valid: it must be a whole number"),
        ({"first_step": -3}, "first_step=-3 is not valid: it must be a whole number, at least 0"),
        ({"first_step": 4.0}, r"first_step=4\.0 is not valid"),
        ({"every": "3"}, "every='3' is not valid"),
        ({"every": True}, "every=True is not valid"),
    ],
    ids=str,
)
def test_steps_are_whole_numbers(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        Recorder(optimizer, tmp_path / "folder" / "run.jsonl", **options)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("first", [np.int64(4), torch.tensor(4)], ids=str)
def test_a_number_of_a_step_may_come_from_a_checkpoint(tmp_path: Path, first: Any) -> None:
    net, x, y = net_and_data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=np.float32(0.01), weight_decay=np.float32(0.5))
    path = tmp_path / "run.jsonl"
    with Recorder(optimizer, path, every=np.int64(2), first_step=first, tracked=[net[0].weight]):
        for _ in range(3):
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    run = read_run(path)
    assert run.steps.tolist() == [4, 6]
    assert int(first) == 4  # as it was
    assert run.weight_decay == pytest.approx(0.5)
    assert run.lr == pytest.approx(0.01)
