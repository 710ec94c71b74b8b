"""elropt.inspection against autograd in float64."""

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD, effective_lrs, find_scale_invariant, param_groups
from elropt.inspection import inspect_model, random_label_loss


def net(depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 5))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_report_agrees_with_autograd_in_float64(momentum: float) -> None:
    torch.manual_seed(0)
    model, x, y = net().double(), torch.randn(16, 12).double(), torch.randint(5, (16,))

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y)

    report = inspect_model(model, x, loss=loss, lr=0.2, momentum=momentum)

    value = loss(model(x))
    value.backward()
    kinds = find_scale_invariant(model, x)
    expected = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    assert [weight.name for weight in report.weights] == list(expected)
    assert report.loss == pytest.approx(value.item())
    E = []
    for weight in report.weights:
        w, g = expected[weight.name].detach(), expected[weight.name].grad
        relative_grad = (g.norm() / w.norm()).item()
        assert weight.shape == tuple(w.shape)
        assert weight.invariance == kinds[weight.name]
        assert weight.tracked == (kinds[weight.name] is not None)
        assert weight.weight_norm == pytest.approx(w.norm().item())
        assert weight.grad_norm == pytest.approx(g.norm().item())
        assert weight.radial_cosine == pytest.approx(((w * g).sum() / w.norm() / g.norm()).item(), abs=1e-9)
        assert weight.relative_grad == pytest.approx(relative_grad)
        assert weight.elr == pytest.approx(0.2 * relative_grad)
        if weight.tracked:
            E.append(relative_grad)
    E.sort(reverse=True)
    assert len(E) == 3
    assert [weight.relative_grad for weight in report.tracked] == pytest.approx(E)
    assert report.elr_spread == pytest.approx(E[0] / E[-1])
    assert report.log_elr_std == pytest.approx(np.std(np.log(E)))
    assert report.balance_lr == pytest.approx((1 - momentum) / math.sqrt(E[0] * E[-1]))
    assert report.monotone_lr == pytest.approx((1 - momentum) / math.sqrt(E[0] * E[1]))


@pytest.mark.parametrize("lr", [1e-3, 0.3, 100.0])
def test_first_step_of_the_warmup_is_that_of_the_optimizer(lr: float) -> None:
    torch.manual_seed(0)
    model, x, y = net(depth=6), torch.randn(32, 12), torch.randint(5, (32,))

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y)

    report = inspect_model(model, x, loss=loss, lr=lr, momentum=0.9)

    optimizer = ELRSGD(param_groups(model, x), lr=lr, momentum=0.9)
    loss(model(x)).backward()
    optimizer.step()
    elrs = effective_lrs(optimizer)
    assert elrs == pytest.approx(dict.fromkeys(elrs, report.warmup_elr), rel=1e-4)
    assert report.warmup_ends == bool(optimizer.state[model[0].weight]["handed_over"] > 0)


def test_inspection_leaves_no_trace() -> None:
    model = net()
    model[3].eval()
    x = torch.randn(16, 12)
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)

    inspect_model(model, x, lr=0.1)

    assert torch.equal(torch.rand(3), expected_draw)
    assert model.training
    assert not model[3].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_frozen_and_dead_weights_are_left_out_and_named() -> None:
    model = net(depth=4)
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[4].weight.zero_()  # the gain behind model[3]
        model[4].bias.fill_(1.0)
    report = inspect_model(model, torch.randn(16, 12), lr=0.1)

    assert [weight.name for weight in report.weights if weight.tracked] == ["6.weight", "9.weight"]
    assert math.isnan(report.weights[0].grad_norm)
    assert report.weights[1].grad_norm == 0
    assert "frozen: 0.weight." in report.summary()
    assert "gradient is zero: 3.weight." in report.summary()


def test_one_tracked_weight_has_no_pair() -> None:
    report = inspect_model(net(depth=1), torch.randn(16, 12), lr=0.1)
    assert report.elr_spread == 1
    assert math.isnan(report.monotone_lr)
    turn = math.atan(report.tracked[0].elr)
    assert f"the only tracked weight, by {turn:.2g} rad, the arctangent of its ELR." in report.summary()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["monotone_lr"] is None


def test_summary_says_on_which_side_of_the_critical_learning_rates_lr_is() -> None:
    torch.manual_seed(0)
    model, x = net(depth=8), torch.randn(64, 12)

    def summary(lr: float) -> str:
        torch.manual_seed(1)
        return inspect_model(model, x, lr=lr).summary()

    torch.manual_seed(1)
    report = inspect_model(model, x, lr=0.1)
    assert report.monotone_lr < report.balance_lr
    below, between, above = (
        summary(lr) for lr in (report.monotone_lr / 2, math.sqrt(report.monotone_lr * report.balance_lr), 1e3)
    )
    assert "below both critical learning rates" in below
    assert "change places" in between
    assert "overshoots" in above
    turns = [float(turn) for turn in re.findall(r"by ([\d.]+) rad", above)]
    assert "rad, the arctangents of their ELRs;" in above  # beside a table that has the ELRs themselves
    assert turns[0] == pytest.approx(math.atan(1e3 * report.tracked[0].relative_grad), abs=0.05)
    assert report.tracked[0].name in above
    assert report.tracked[-1].name in above


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (torch.randn(4, 1), r"\[4, 1\]"),
        (torch.randn(4), r"\[4\]"),
        (torch.randn(4, 3, 5, 5), r"\[4, 3, 5, 5\]"),
        (torch.ones(4, 3, dtype=torch.int64), "int64"),
        ({"loss": 3}, "no tensor"),
    ],
)
def test_default_loss_wants_logits(outputs: object, found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}.*give a loss of your own"):
        random_label_loss(outputs)


def test_default_loss_is_cross_entropy_of_the_first_tensor() -> None:
    logits = torch.randn(6, 3)
    torch.manual_seed(3)
    labels = torch.randint(3, (6,))
    torch.manual_seed(3)
    value = random_label_loss({"logits": logits, "hidden": torch.ones(2)})
    assert value.item() == pytest.approx(-logits.log_softmax(1)[range(6), labels].mean().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
        ({"lr": 0.1, "perturb": -1.0}, "perturb=-1.0"),
        ({"lr": 0.1, "loss": lambda y: y}, r"loss returned a tensor of shape \(16, 5\)"),
        ({"lr": 0.1, "loss": lambda y: 3.0}, "loss returned 3.0"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_model(net(), torch.randn(16, 12), **options)
