"""elropt.param_groups: which parameter is in which group, and that optimizers and schedulers take the groups."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from elropt import ELRSGD, equalize_, explain_scale_invariance, find_scale_invariant, param_groups
from tests.architectures import ARCHITECTURES, PreActivationResNet


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def test_param_groups_of_a_resnet() -> None:
    model = PreActivationResNet()
    x = ARCHITECTURES["pre-activation ResNet"].inputs()
    model.block2.conv2.requires_grad_(False)
    groups = param_groups(model, *x, weight_decay=5e-4, tracked_lr=0.01, exclude=["block2.conv?.weight"])
    params = dict(model.named_parameters())
    vectors = [n for n, p in params.items() if p.ndim < 2]
    expected: list[dict[str, Any]] = [
        {
            "name": "scale_invariant",
            "param_names": ["block1.conv1.weight"],
            "scale_invariant": True,
            "weight_decay": 5e-4,
            "tracked_lr": 0.01,
        },
        {
            "name": "other",
            "param_names": ["stem.weight", "block1.conv2.weight", "block2.conv1.weight", "head.weight"],
            "scale_invariant": False,
            "weight_decay": 5e-4,
        },
        {"name": "no_decay", "param_names": vectors, "scale_invariant": False, "weight_decay": 0.0},
    ]
    for group, wanted in zip(groups, expected, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == wanted
        assert [id(p) for p in group["params"]] == [id(params[n]) for n in wanted["param_names"]]


@every_architecture
def test_param_groups_hold_every_trainable_parameter_once(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        groups = param_groups(model, *architecture.inputs(), weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    kinds = architecture.kinds()
    for group in groups:
        assert group["params"]
        assert not {"lr", "tracked_lr"} & group.keys()
        for param_name, param in zip(group["param_names"], group["params"], strict=True):
            assert param is model.get_parameter(param_name)
            is_weight = param.ndim >= 2 and not param_name.endswith("original0")  # weight_norm's gain
            assert group["scale_invariant"] == (kinds[param_name] is not None and is_weight)
            assert group["weight_decay"] == (0.1 if is_weight else 0.0)


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: 0.5**t),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda t: 0.5),
    "StepLR": partial(lr_scheduler.StepLR, step_size=1),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[1]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=1),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.5),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=4),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_param_groups_work_with_sgd_and_every_scheduler(scheduler: str) -> None:
    architecture = ARCHITECTURES["linear + BatchNorm"]
    model, (x,) = architecture.build(), architecture.inputs()
    optimizer = SGD(param_groups(model, x, weight_decay=0.1, tracked_lr=0.02), lr=0.04, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == [0.04] * 3  # tracked_lr is ELRSGD's
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9] * 3
    schedule = SCHEDULERS[scheduler](optimizer)
    start = [g["lr"] for g in optimizer.param_groups]
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert all(
        now != then for now, then in zip([g["lr"] for g in optimizer.param_groups], start, strict=True)
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["name"] for g in optimizer.param_groups] == ["scale_invariant", "other", "no_decay"]


def test_the_weight_decay_of_the_optimizer_holds_unless_one_is_given() -> None:
    architecture = ARCHITECTURES["linear + BatchNorm"]
    model, (x,) = architecture.build(), architecture.inputs()
    decays = [
        [group["weight_decay"] for group in SGD(groups, lr=0.1, weight_decay=0.3).param_groups]
        for groups in (param_groups(model, x), param_groups(model, x, weight_decay=0.0))
    ]
    assert decays == [[0.3, 0.3, 0.0], [0.0, 0.0, 0.0]]


def test_param_groups_warn_when_nothing_is_tracked() -> None:
    plain, bn = ARCHITECTURES["plain"], ARCHITECTURES["linear + BatchNorm"]
    with pytest.warns(UserWarning, match=r"no parameter is tracked.*explain_scale_invariance"):
        groups = param_groups(plain.build(), *plain.inputs())
    assert [g["name"] for g in groups] == ["other", "no_decay"]
    with pytest.warns(UserWarning, match="no parameter is tracked"):
        groups = param_groups(bn.build(), *bn.inputs(), exclude=("*.weight",))
    assert [g["name"] for g in groups] == ["other", "no_decay"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude": ["head"]}, ValueError, r"exclude has 'head', which matches no parameter.*'head\.\*'"),
        ({"exclude": "0.weight"}, TypeError, r"exclude is the string '0\.weight'; pass an iterable"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1\.0 is not valid: it must be a finite number"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay=nan is not valid"),
        ({"weight_decay": "0.1"}, ValueError, "weight_decay='0.1' is not valid"),
        ({"tracked_lr": -0.1}, ValueError, r"tracked_lr=-0\.1 is not valid"),
    ],
)
def test_param_groups_reject(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    architecture = ARCHITECTURES["linear + BatchNorm"]
    with pytest.raises(error, match=message):
        param_groups(architecture.build(), *architecture.inputs(), **arguments)


def test_param_groups_of_a_frozen_model() -> None:
    architecture = ARCHITECTURES["linear + BatchNorm"]
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        param_groups(architecture.build().requires_grad_(False), *architecture.inputs())


def test_the_magnitude_of_weight_norm_is_a_gain() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    groups = {g["name"]: g for g in param_groups(model, torch.randn(8, 3, 8, 8), weight_decay=0.1)}
    assert groups["scale_invariant"]["param_names"] == ["0.parametrizations.weight.original1"]
    assert "0.parametrizations.weight.original0" in groups["no_decay"]["param_names"]
    assert groups["other"]["param_names"] == ["4.weight"]
    assert groups["no_decay"]["weight_decay"] == 0


def test_sparse_gradients_get_a_group_that_can_apply_them() -> None:
    model = nn.Sequential(
        nn.Embedding(20, 8, sparse=True), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)
    )
    ids = torch.randint(20, (64,))
    groups = {group["name"]: group for group in param_groups(model, ids, weight_decay=0.1)}
    assert groups["sparse"]["param_names"] == ["0.weight"]
    before = model[0].weight.detach().clone()
    optimizer = ELRSGD(list(groups.values()), lr=0.1)
    model(ids).square().sum().backward()
    expected = before - 0.1 * model[0].weight.grad.to_dense()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert equalize_(model, ids, loss=lambda y: y.exp().mean()).keys() == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "equilibrium", "granularity": "filter", "weight_decay": 5e-4},
        {"rule": "equilibrium", "granularity": "network", "weight_decay": 5e-4, "protect": True},
        {"rule": "angle", "elr_of": "update"},
        {"rule": "uniform", "project": True},
    ],
    ids=str,
)
def test_the_group_of_sparse_gradients_is_plain_SGD_whatever_the_rule_of_the_others(
    options: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    ids = torch.randint(20, (64,))
    optimizer = ELRSGD(param_groups(model, ids), lr=0.01, momentum=0.9, **options)
    model(ids).exp().mean().backward()
    expected = model[0].weight.detach() - 0.01 * model[0].weight.grad.to_dense()
    before = model[1].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert not torch.equal(model[1].weight, before)


def test_param_groups_want_a_model() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model is a generator, not a torch\.nn\.Module"):
        param_groups(model.parameters(), torch.ones(8, 2))  # type: ignore[arg-type]


def test_a_layer_in_front_of_a_frozen_norm_is_not_tracked() -> None:
    model = nn.Sequential(
        *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)),
    )
    x = torch.randn(64, 6)
    assert param_groups(model.eval(), x)[0]["param_names"] == ["0.weight", "3.weight"]  # as in training
    model.train()
    model[1].eval()
    groups = {group["name"]: group["param_names"] for group in param_groups(model, x)}
    assert groups["scale_invariant"] == ["3.weight"]
    assert groups["other"] == ["0.weight"]
    assert not model[1].training


@pytest.mark.parametrize("measure", [param_groups, find_scale_invariant, explain_scale_invariance])
def test_frozen_norms_of_a_model_in_eval_mode_are_named(measure: Callable[..., Any]) -> None:
    model = nn.Sequential(
        *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)),
    ).eval()
    x = torch.randn(64, 6)
    measure(model, x)  # no norm is frozen: no warning
    model[1].requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"eval mode.*1 of them are frozen \(1\).*call model\.train\(\), then"
    ) as seen:
        measure(model, x)
    assert seen[0].filename == __file__
    model.train()
    model[1].eval()
    measure(model, x)


def test_param_groups_warn_where_eps_matters() -> None:
    """MobileNets have eps = 1e-3 and depthwise weights that leave a small variance."""
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=1e-3), nn.ReLU(), nn.Linear(8, 3)
    )
    x = torch.randn(64, 6)
    assert param_groups(model, x)[0]["param_names"] == ["0.weight"]
    with torch.no_grad():
        model[0].weight.mul_(0.1)
    outputs = model(x).detach()
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved[0].weight.mul_(0.5)
    change = float((halved(x).detach() - outputs).norm() / outputs.norm())
    with pytest.warns(UserWarning, match=f"changes the outputs by {change:.1%}.*0\\.weight {change:.1%}"):
        param_groups(model, x)
