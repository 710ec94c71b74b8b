"""The reference is the net itself: what one step does to its activations and logits, at widths from 128 to 1024."""

import itertools
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import StepLR

from benchmarks.common import models
from elropt import ELRSGD, effective_lrs, param_groups, width_scaled_groups
from elropt.rules import RULES

from .every_rule import needs

WIDTHS = (128, 256, 512, 1024)
BATCH = 16

# Exponents of the width of what one step of a role alone changes: its own layer's outputs, and the logits. With
# cross-entropy a layer changes as much at any width, with MSE the logits do (docs/guide/width-scaling.md §2 and §3).
CHANGES = {
    "cross_entropy": {"input": (0.0, 0.5), "hidden": (0.0, 0.5), "output": (0.5, 0.5), "vector": (0.0, 0.5)},
    "mse": {"input": (-0.5, 0.0), "hidden": (-0.5, 0.0), "output": (0.0, 0.0), "vector": (-0.5, 0.0)},
}


class Mlp(nn.Module):
    """16 → n → n → 5 with biases, drawn as He et al. do."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.middle, self.head = (
            nn.Linear(16, width),
            nn.Linear(width, width),
            nn.Linear(width, 5),
        )
        for layer, gain in ((self.embed, 2), (self.middle, 2), (self.head, 1)):
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
            nn.init.zeros_(layer.bias)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        first = self.embed(x)
        second = self.middle(first.relu())
        return {"input": first, "vector": first, "hidden": second, "output": self.head(second.relu())}

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)["output"]


def loss_of(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if name == "cross_entropy":
        return F.cross_entropy(logits, labels)
    return (logits - 4 * F.one_hot(labels, 5)).square().sum(
        1
    ).mean() / 2  # targets well above the random logits


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (BATCH,), generator=generator)


def slope(values: Any) -> float:
    return float(np.polyfit(np.log(WIDTHS), np.log(values), 1)[0])


@pytest.mark.parametrize("role", ["input", "hidden", "output", "vector"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_of_a_role_changes_its_layer_and_the_logits_as_derived(
    optimizer: Any, loss: Any, role: str
) -> None:
    """The step is small, so that what it changes is linear in it; the random logits that a net starts with are taken
    off: so the loss has the same gradient with respect to them at every width."""
    x, labels = batch()
    own, logits = [], []
    for width in WIDTHS:
        changes = []
        for seed in range(4):
            net = Mlp(width, seed).double()
            groups = width_scaled_groups(net, 64, lr=1e-4, loss=loss, optimizer=optimizer)
            of_role = [group for group in groups if group["name"] == role]
            step = torch.optim.SGD(of_role) if optimizer == "sgd" else torch.optim.Adam(of_role, eps=1e-30)
            before = net.outputs(x)
            start = before["output"].detach()
            loss_of(loss, before["output"] - start, labels).backward()
            step.step()
            with torch.no_grad():
                after = net.outputs(x)
                changes.append([(after[at] - before[at]).square().mean().sqrt() for at in (role, "output")])
        mean = torch.tensor(changes).log().mean(0).exp()
        own.append(mean[0].item())
        logits.append(mean[1].item())
    expected = CHANGES["cross_entropy" if optimizer == "adam" else loss][role]
    assert (slope(own), slope(logits)) == pytest.approx(expected, abs=0.1)


def test_gradients_per_coordinate_fall_with_the_root_of_the_width() -> None:
    x, labels = batch()
    sizes = []
    for width in WIDTHS:
        net = Mlp(width).double()
        hidden = net.outputs(x)["hidden"].detach().requires_grad_()
        loss_of("cross_entropy", net.head(hidden.relu()), labels).backward()
        assert hidden.grad is not None
        sizes.append(hidden.grad.square().mean().sqrt().item())
    assert slope(sizes) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize(("loss", "logits"), [("cross_entropy", 0.5), ("mse", 0.0)])
def test_all_roles_together_for_some_steps(loss: Any, logits: float) -> None:
    """The logits grow as one step of each role lets them; with one learning rate for all layers they grow faster."""
    x, labels = batch()
    change: dict[str, list[list[float]]] = {"scaled": [], "global": []}
    for width in WIDTHS:
        for name, columns in change.items():
            changes = []
            for seed in range(4):
                net = Mlp(width, seed).double()
                before = net.outputs(x)
                groups: Any = width_scaled_groups(net, WIDTHS[0], lr=1e-3, loss=loss)
                optimizer = torch.optim.SGD(groups if name == "scaled" else net.parameters(), lr=1e-3)
                for _ in range(3):
                    optimizer.zero_grad()
                    loss_of(loss, net(x) - before["output"].detach(), labels).backward()
                    optimizer.step()
                with torch.no_grad():
                    after = net.outputs(x)
                    changes.append([(after[at] - before[at]).square().mean() for at in ("hidden", "output")])
            columns.append(torch.tensor(changes).mean(0).sqrt().tolist())
    hidden, output = (slope([line[i] for line in change["scaled"]]) for i in (0, 1))
    assert hidden < 0.15
    assert output == pytest.approx(logits, abs=0.15)
    assert slope([line[1] for line in change["global"]]) > output + 0.35


@settings(max_examples=30, deadline=None)
@given(
    base=st.integers(1, 512),
    width=st.integers(2, 48),
    depth=st.integers(2, 5),
    lr=st.floats(1e-6, 1e3),
    choice=st.sampled_from(
        [("sgd", "cross_entropy"), ("sgd", "mse"), ("adam", "cross_entropy"), ("adam", "mse")]
    ),
)
def test_every_parameter_once_at_a_power_of_the_width(
    base: int, width: int, depth: int, lr: float, choice: tuple[Any, Any]
) -> None:
    sizes = [3, *[width] * (depth - 1), 7]
    layers = OrderedDict((f"layer{i}", nn.Linear(*pair)) for i, pair in enumerate(itertools.pairwise(sizes)))
    net = nn.Sequential(layers)
    groups = width_scaled_groups(net, base, lr=lr, optimizer=choice[0], loss=choice[1])
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    held = [param for group in groups for param in group["params"]]
    assert all(net.get_parameter(name) is param for name, param in zip(names, held, strict=True))
    lrs = {group["name"]: group["lr"] for group in groups}
    expected = {  # of the docstring
        ("sgd", "cross_entropy"): (0.5, -0.5, -0.5, 0.5),
        ("sgd", "mse"): (0, -1, -1, 0),
        ("adam", "cross_entropy"): (0, -1, -0.5, 0),
        ("adam", "mse"): (0, -1, -0.5, 0),
    }[choice]
    for role, power in zip(("input", "hidden", "output", "vector"), expected, strict=True):
        if role in lrs:
            assert lrs[role] == pytest.approx(lr * (width / base) ** power)
    assert lrs["fixed"] == lr
    at_base = width_scaled_groups(net, width, lr=lr, optimizer=choice[0], loss=choice[1])
    assert {group["lr"] for group in at_base} == {lr}


def members(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups}


def test_roles_of_a_convolutional_net() -> None:
    net = models.build("plain-8-w16", in_shape=(3, 8, 8), classes=10)
    groups = width_scaled_groups(net, 4, lr=1.0)
    found = members(groups)
    assert found["input"] == ["stem.conv.weight"]
    assert found["output"] == ["head.weight"]
    assert found["fixed"] == ["head.bias"]
    assert len(found["hidden"]) == 6
    assert all(net.get_parameter(name).ndim == 1 for name in found["vector"])
    lrs = {group["name"]: group["lr"] for group in groups}
    assert lrs == {"input": 2.0, "hidden": 0.5, "output": 0.5, "vector": 2.0, "fixed": 1.0}  # m = 16/4


class Decoder(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6, 24))
        self.tokens = nn.Embedding(11, 24)
        self.block = nn.Linear(24, 24)
        self.head = nn.Linear(24, 11, bias=False)
        self.slope = nn.PReLU()
        if tied:
            self.head.weight = self.tokens.weight


def test_roles_by_pattern() -> None:
    groups = width_scaled_groups(
        Decoder(), 6, lr=1.0, input=["position", "tokens.*"]
    )  # 24 wide, as tokens are
    assert {group["name"]: group["lr"] for group in groups}["input"] == 2.0
    assert members(groups) == {
        "input": ["position", "tokens.weight"],
        "hidden": ["block.weight"],
        "output": ["head.weight"],
        "vector": ["block.bias"],
        "fixed": ["slope.weight"],
    }
    tokens = Decoder()
    del tokens.position
    groups = width_scaled_groups(tokens, 6, lr=1.0, optimizer="adam")
    assert {group["name"]: group["lr"] for group in groups}[
        "hidden"
    ] == 0.25  # the width is the embedding's, 24
    groups = width_scaled_groups(tokens, 6, lr=1.0, output=["block.weight"])
    assert members(groups)["output"] == ["block.weight"]
    assert members(groups)["fixed"] == ["block.bias", "slope.weight"]
    assert members(groups)["hidden"] == ["head.weight"]


def test_frozen_parameters_are_left_out_but_keep_their_role() -> None:
    net = Mlp(8)
    net.head.requires_grad_(False)
    net.embed.requires_grad_(False)
    assert members(width_scaled_groups(net, 4, lr=1.0)) == {
        "hidden": ["middle.weight"],
        "vector": ["middle.bias"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_width": 0}, "base_width=0 is not valid: it must be a finite number above 0"),
        ({"base_width": math.nan}, "base_width=nan"),
        ({"width": -1.0}, r"width=-1\.0"),
        ({"lr": -0.1}, r"lr=-0\.1 is not valid: it must be a finite number, at least 0"),
        ({"lr": math.inf}, "lr=inf"),
        (
            {"loss": "hinge"},
            "optimizer='sgd' with loss='hinge' is not known; choose one of optimizer='sgd' with",
        ),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        (
            {"input": ["nope*"]},
            "input has 'nope.*', which matches no weight matrix; the model has embed.weight",
        ),
        ({"output": ["head.bias"]}, "output has 'head.bias', which matches no weight matrix"),
        ({"output": ["*"]}, "'embed.weight' is both input-like and output-like"),
    ],
    ids=str,
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        width_scaled_groups(Mlp(8), **{"base_width": 4, "lr": 0.1, **arguments})


def test_errors_about_the_model() -> None:
    with pytest.raises(TypeError, match=r"input is the string 'embed.weight'; pass an iterable"):
        width_scaled_groups(Mlp(8), 4, lr=0.1, input="embed.weight")
    with pytest.raises(ValueError, match=r"model has 1 weight matrices"):
        width_scaled_groups(nn.Linear(3, 3), 4, lr=0.1)
    with pytest.raises(ValueError, match=r"'head\.weight' is both input-like"):
        width_scaled_groups(Decoder(tied=True), 6, lr=0.1, input=["tokens.weight"], output=["head.weight"])
    for width in (None, 24):
        with pytest.raises(ValueError, match=r"first weight matrix, 'position', is of no Linear.*input="):
            width_scaled_groups(Decoder(), 6, lr=0.1, width=width)
    with pytest.raises(ValueError, match=r"cannot be read off position, .*give width="):
        width_scaled_groups(Decoder(), 6, lr=0.1, input=["position"])
    normalized = Mlp(8)
    nn.utils.parametrizations.weight_norm(normalized.middle)
    with pytest.raises(ValueError, match=r"middle\.parametrizations.*remove the parametrization"):
        width_scaled_groups(normalized, 4, lr=0.1)
    frozen = Mlp(8).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to optimize"):
        width_scaled_groups(frozen, 6, lr=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_the_groups_and_a_scheduler_scales_them(rule: str | None) -> None:
    net = models.build("bn-mlp-4-w32", in_shape=(1, 4, 4), classes=5)
    optimizer = ELRSGD(width_scaled_groups(net, 8, lr=0.01), momentum=0.9, rule=rule, **needs(rule))
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    before = parameters_to_vector(net.parameters()).clone()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(16, 1, 4, 4)), torch.randint(5, (16,))).backward()
        optimizer.step()
        scheduler.step()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        k: v / 8 for k, v in lrs.items()
    }
    after = parameters_to_vector(net.parameters())
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("rule", ["uniform", "angle"])
def test_under_rules_for_angles_the_groups_set_the_ratios_of_the_angles(rule: str) -> None:
    torch.manual_seed(0)
    net = models.build("bn-mlp-4-w32", in_shape=(1, 4, 4), classes=5)
    x = torch.randn(16, 1, 4, 4)
    tracked = {name for g in param_groups(net, x) if g["scale_invariant"] for name in g["param_names"]}
    groups = [
        group | {"scale_invariant": set(group["param_names"]) <= tracked}
        for group in width_scaled_groups(net, 8, lr=0.01)
    ]
    optimizer = ELRSGD(groups, rule=rule)
    F.cross_entropy(net(x), torch.randint(5, (16,))).backward()
    weights = {name: net.get_parameter(name) for name in tracked}
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer.step()
    angle = {
        name: math.atan2((weight.detach() - old[name]).norm().item(), old[name].norm().item())
        for name, weight in weights.items()
    }
    first, *hidden = (name for name, _ in net.named_parameters() if name in tracked)
    for name in hidden:
        assert math.tan(angle[first]) / math.tan(angle[name]) == pytest.approx(
            4, rel=1e-4
        )  # m^½ / m^-½, m = 4
    if rule == "angle":
        assert math.tan(angle[first]) == pytest.approx(0.02, rel=1e-4)
    assert effective_lrs(optimizer)[first] == pytest.approx(math.tan(angle[first]), rel=1e-4)


def test_without_a_rule_it_is_sgd_on_the_groups() -> None:
    x, labels = batch()
    nets = [Mlp(32).double() for _ in range(2)]
    for net, make in zip(nets, (torch.optim.SGD, lambda groups: ELRSGD(groups, rule=None)), strict=True):
        optimizer = make(width_scaled_groups(net, 8, lr=0.01))
        for _ in range(2):
            optimizer.zero_grad()
            loss_of("cross_entropy", net(x), labels).backward()
            optimizer.step()
    torch.testing.assert_close(*(parameters_to_vector(net.parameters()) for net in nets), rtol=0, atol=0)
