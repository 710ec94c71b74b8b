"""What users do to optimizers between steps, and what may not break them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from elropt import ELRSGD, Recorder, effective_lrs, layer_stats

from .nets import backward, bn_mlp, invariant_weights

TRACKED = {"scale_invariant": True}


def invariant_gradient(w: Tensor, c: float = 1.0) -> Tensor:
    """A random direction orthogonal to w, with ‖g‖·‖w‖ = c."""
    w = w.detach()
    d = torch.randn_like(w)
    d -= (d * w).sum() / w.square().sum() * w
    return c * d / d.norm() / w.norm()


def weights(*scales: float) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 4) * scale) for scale in scales]


def step(optimizer: ELRSGD, params: list[nn.Parameter]) -> None:
    for w in params:
        w.grad = invariant_gradient(w)
    optimizer.step()


def handed_over(optimizer: ELRSGD, w: nn.Parameter) -> bool:
    return bool(optimizer.state[w]["handed_over"] > 0)


@pytest.mark.parametrize("missing", ["None", "zero", "nan", "inf"])
def test_the_warmup_waits_for_layers_that_cannot_be_judged(missing: str) -> None:
    ws = weights(1, 30)
    optimizer = ELRSGD([{"params": ws, **TRACKED}], lr=0.01)
    faulty = {"None": None, "zero": 0.0, "nan": math.nan, "inf": math.inf}[missing]
    step(optimizer, ws)
    for _ in range(60):
        ws[0].grad = invariant_gradient(ws[0])
        ws[1].grad = None if faulty is None else torch.full_like(ws[1], faulty)
        if missing in ("nan", "inf"):
            kept = ws[1].detach().clone()
        optimizer.step()
        if missing in ("nan", "inf"):
            with torch.no_grad():
                ws[1].copy_(kept)
    assert not handed_over(optimizer, ws[0])
    for _ in range(80):
        step(optimizer, ws)
    assert handed_over(optimizer, ws[0])


def test_alternating_networks_keep_it_armed() -> None:
    nets = [bn_mlp(depth=4), bn_mlp(depth=4, seed=1)]
    with torch.no_grad():
        for w in invariant_weights(nets[1]):
            w.mul_(30)
    optimizer = ELRSGD([*nets[0].parameters(), *nets[1].parameters()], lr=0.05, momentum=0.9)
    for t in range(60):
        for net in nets:
            net.zero_grad()
        backward(nets[t % 2], t)
        optimizer.step()
    assert not handed_over(optimizer, invariant_weights(nets[0])[0])


def test_one_huge_gradient_is_forgotten() -> None:
    ws = weights(20, 20)
    optimizer = ELRSGD([{"params": ws, **TRACKED}], lr=1e-3)
    ws[0].grad, ws[1].grad = invariant_gradient(ws[0]), invariant_gradient(ws[1], 1e19)
    kept = copy.deepcopy(ws)
    optimizer.step()
    with torch.no_grad():
        for w, k in zip(ws, kept, strict=True):
            w.copy_(k)
    assert torch.isfinite(optimizer.state[ws[1]]["sphere_grad_norm"]).all()


def test_groups_and_parameters_replaced_between_steps() -> None:
    a, b = weights(1, 30)
    optimizer = ELRSGD([{"params": [a], **TRACKED}, {"params": [b], **TRACKED}], lr=0.01, rule="angle")
    step(optimizer, [a, b])
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [b], [a]
    for _ in range(3):
        step(optimizer, [a, b])
    assert b.norm() > 10 * a.norm()  # radii belong to parameters, not to places
    (new,) = weights(3)
    optimizer.param_groups[0]["params"] = [new]
    kept = b.detach().clone()
    step(optimizer, [a, b, new])
    assert torch.equal(b.detach(), kept)
    del optimizer.param_groups[1]
    kept = a.detach().clone()
    step(optimizer, [a, new])
    assert torch.equal(a.detach(), kept)


def test_state_that_users_clear_or_set() -> None:
    (w,) = weights(1)
    optimizer = ELRSGD([{"params": [w], **TRACKED}], lr=0.01, rule="angle")
    step(optimizer, [w])
    optimizer.state.clear()
    step(optimizer, [w])
    assert {"radius", "tracked", "handed_over"} <= set(optimizer.state_dict()["state"][0])
    optimizer.state[w]["radius"] = torch.tensor([100.0])
    step(optimizer, [w])
    assert w.norm().item() == pytest.approx(100, rel=1e-3)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere"])
def test_rule_state_is_float32_whatever_torchs_default(rule: str, default_dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.randn(4, 4, dtype=torch.float32))
    optimizer = ELRSGD([{"params": [w], **TRACKED}], lr=0.01, rule=rule)
    step(optimizer, [w])
    layer_stats(optimizer)
    assert {value.dtype for value in optimizer.state[w].values()} == {torch.float32}


def test_looking_in_inference_mode_does_no_harm() -> None:
    (w,) = weights(1)
    optimizer = ELRSGD([w], lr=0.1)
    w.grad = invariant_gradient(w)
    with torch.inference_mode():
        layer_stats(optimizer)
    step(optimizer, [w])
    assert torch.isfinite(w).all()


def test_hooks_after_loading_see_the_restored_state() -> None:
    w = nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer = ELRSGD([{"params": [w], **TRACKED}], lr=0.01, rule="angle")
    w.grad = torch.randn_like(w)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen: list[Tensor] = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[w]["radius"].clone()))
    optimizer.register_load_state_dict_post_hook(lambda o: layer_stats(o) and None)
    optimizer.load_state_dict(saved)
    assert torch.equal(seen[0], saved["state"][0]["radius"])
    optimizer.step()
    assert torch.equal(optimizer.state[w]["radius"], saved["state"][0]["radius"])


@pytest.mark.parametrize("foreach", [False, True])
def test_recording_never_breaks_a_step(foreach: bool, tmp_path: Any) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = ELRSGD(net.parameters(), lr=0.1, momentum=1.0, rule=None, foreach=foreach)
    with Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
    assert (tmp_path / "run.jsonl").read_text().count("\n") == 2


def test_dampening_above_one() -> None:
    w, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = ELRSGD([{"params": [w], **TRACKED}, {"params": [b]}], lr=0.1, momentum=0.9, dampening=1.5)
    b.grad = torch.ones(4)
    step(optimizer, [w])
    assert torch.isfinite(b).all()


def test_a_tensor_hyper_parameter_that_becomes_zero() -> None:
    (w,) = weights(1)
    optimizer = ELRSGD(
        [{"params": [w], **TRACKED}], lr=0.1, rule=None, project=True, weight_decay=torch.tensor(0.5)
    )
    step(optimizer, [w])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = w.detach().clone()
    step(optimizer, [w])
    moved = w.detach() - before
    assert abs((moved * before).sum()) < 1e-5 * moved.norm() * before.norm()


def test_a_record_keeps_the_lr_of_its_step() -> None:
    (w,) = weights(1)
    optimizer = ELRSGD([{"params": [("w", w)], **TRACKED}], lr=torch.tensor(0.1), rule="angle")
    schedule = StepLR(optimizer, 1, 0.1)
    step(optimizer, [w])
    schedule.step()
    assert effective_lrs(optimizer)["w"] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_parameters() -> None:
    (w,) = weights(1)
    with pytest.raises(ValueError, match="same parameter twice"):
        ELRSGD([{"params": [w, w]}], rule="uniform")
    w.grad = torch.ones_like(w)
    ELRSGD([{"params": [w, w]}], rule=None).step()


@pytest.mark.parametrize("flag", [0, 1, "yes", torch.tensor(True)], ids=str)
def test_flags_are_bools(flag: Any) -> None:
    with pytest.raises(ValueError, match="scale_invariant"):
        ELRSGD([{"params": weights(1), "scale_invariant": flag}])


def test_sparse_with_decay_is_refused_before_anything_moves() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    optimizer = ELRSGD(net.parameters(), lr=0.1, weight_decay=0.1, rule=None)
    net[0](net[1](torch.tensor([1, 2]))).sum().backward()
    before = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="weight_decay=0"):
        optimizer.step()
    assert torch.equal(net[0].weight.detach(), before)
