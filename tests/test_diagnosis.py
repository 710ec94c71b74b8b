"""elropt.diagnosis: what it says of hand-made histories. Their figures follow from the formulas of docs/theory.md."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from elropt.diagnosis import TITLES, Finding, diagnose
from elropt.run_history import RunHistory

SGD = {"momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 0.0}
ADAMW = {"betas": [0.9, 0.99], "decoupled_weight_decay": True, "weight_decay": 0.0}


def history(
    angle: ArrayLike,
    *,
    every: int = 1,
    lr: ArrayLike = 0.1,
    weight_norm: ArrayLike = 1.0,
    grad_norm: ArrayLike = 1.0,
    weight_factor: ArrayLike = 1.0,
    grad_factor: ArrayLike = 1.0,
    optimizer: str = "torch.optim.sgd.SGD",
    tracked: list[bool] | None = None,
    control: str | None = None,
    **options: Any,
) -> RunHistory:
    """A run of the layers a, b, … with these angles [T, L] and param-group options; the rest is broadcast."""
    angle = np.asarray(angle, dtype=float)
    records, count = angle.shape
    shape = angle.shape
    columns = {
        name: np.broadcast_to(np.asarray(value, dtype=float), shape).copy()
        for name, value in {
            "lr": lr,
            "weight_norm": weight_norm,
            "grad_norm": grad_norm,
            "weight_factor": weight_factor,
            "grad_factor": grad_factor,
            "weight_decay": options.get("weight_decay", 0.0),
        }.items()
    }
    nothing = np.full(shape, np.nan)
    group = (ADAMW if "Adam" in optimizer else SGD) | options
    return RunHistory(
        steps=every * np.arange(records),
        names=list("abcdefgh"[:count]),
        elr=nothing,
        applied_lr=columns["lr"],
        elr_spread=nothing[:, 0],
        notes=[],
        angle=angle,
        relative_update=angle,
        radial_update=0 * angle,
        tracked=np.ones(count, dtype=bool) if tracked is None else np.array(tracked),
        radial_cosine=0 * angle,
        optimizer=optimizer,
        control=control,
        options=[[group] * count] * records,
        **columns,
    )


def constant(records: int = 200, layers: int = 3, angle: float = 0.01) -> np.ndarray:
    return np.full((records, layers), angle)


def warnings_of(run: RunHistory) -> list[Finding]:
    return [finding for finding in diagnose(run) if finding.severity == "warning"]


def the(kind: str, run: RunHistory) -> Finding:
    (finding,) = [finding for finding in diagnose(run) if finding.kind == kind]
    assert finding.kind in TITLES
    return finding


def numbers(text: str) -> list[float]:
    words = (word.strip(".,;:()%") for word in text.split())
    return [float(word) for word in words if word.replace(".", "").replace("e-", "").isdigit()]


def dying(after: float, start: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Angles and gradients of a run that dies at record 80; momentum turns the layers some steps longer."""
    alive = np.arange(200)[:, None] < start
    fading = 0.9 ** np.maximum(0, np.arange(200) - start)[:, None]
    return constant() * np.where(alive, 1, fading), np.where(alive, [1.0, 2.0, 3.0], after)


@pytest.mark.parametrize(("after", "said"), [(0.0, "are zero"), (1e-9, "are practically zero")])
def test_a_run_that_has_died_is_the_first_finding(after: float, said: str) -> None:
    angle, grad = dying(after)
    angle[3, 1] = 0.5  # earlier, and the cause
    finding = diagnose(history(angle, every=5, grad_norm=grad, lr=2.0, weight_decay=5e-4))[0]
    assert (finding.kind, finding.severity, finding.steps) == ("died", "warning", (400, 995))
    assert finding.layers == ("a", "b", "c")
    assert f"By step 400 the gradients of all 3 tracked layers {said}" in finding.what
    assert "only weight decay moves these weights" in finding.what
    assert "smaller learning rate, such as 0.2 instead of 2, or with a warm-up" in finding.advice
    no_decay = the("died", history(angle, grad_norm=grad))
    assert "nothing moves these weights" in no_decay.what


def test_a_dead_run_is_not_on_its_way_to_an_equilibrium() -> None:
    angle, grad = dying(0.0)
    shrinking = np.exp(np.linspace(0, -1, 200))[:, None]
    options: dict[str, Any] = {"weight_norm": shrinking, "lr": 0.1, "weight_decay": 5e-3}
    assert "transient" in {f.kind for f in diagnose(history(angle, **options))}
    assert "transient" not in {f.kind for f in diagnose(history(angle, grad_norm=grad, **options))}


def test_what_only_looks_dead_has_not_died() -> None:
    def died(angle: np.ndarray, grad: ArrayLike, **options: Any) -> bool:
        return any(finding.kind == "died" for finding in diagnose(history(angle, grad_norm=grad, **options)))

    angle, grad = dying(0.0)
    assert died(angle, grad)
    to_zero = np.linspace(1, 0, 200)[:, None] ** 8
    assert not died(constant() * to_zero, 1e-3, lr=0.1 * to_zero)  # a schedule
    one_alive = grad.copy()
    one_alive[:, 1] = 1
    assert not died(angle, one_alive)
    revived = grad.copy()
    revived[-1] = 1
    assert not died(angle, revived)
    for start, expected in ((197, True), (198, False)):  # in two records any run may have no gradient
        gone = np.where(np.arange(200)[:, None] < start, 1.0, 0.0)
        assert died(constant() * gone, gone * [1, 1, 1]) == expected
    converging = np.geomspace(1, 1e-4, 200)[:, None] * [1, 1, 1]
    assert not died(constant() * converging, converging)
    assert not died(constant(), grad)  # an Adam goes on without
    assert not died(angle, np.where(np.arange(200)[:, None] < 80, 1.0, np.nan))
    norm = np.where(np.arange(200)[:, None] < 80, 1.0, 1e7)  # ‖g‖ is as 1/‖w‖
    assert not died(angle, np.where(norm > 1, 1e-7, 1.0), weight_norm=norm)
    assert not died(0 * angle, 0.0)  # it never lived


def test_a_quiet_run_has_no_warning() -> None:
    assert diagnose(history(constant())) == []
    assert warnings_of(history(constant(), weight_decay=1e-3)) == []
    assert diagnose(dataclasses.replace(history(constant()), angle=None)) == []


def test_a_layer_that_turns_too_far_is_named_with_a_learning_rate() -> None:
    angle = constant(50)
    angle[10, 1], angle[30, 1], angle[20, 2] = np.arctan(0.8), 0.4, 0.31
    finding = the("large_angle", history(angle, every=10, lr=0.2))
    assert (finding.layers, finding.steps, finding.severity) == (("b", "c"), (100, 300), "warning")
    assert "b turns by 0.67 rad in step 100" in finding.what
    assert "2 of 3 layers" in finding.what
    assert "3 of 50 recorded steps" in finding.what
    # a plain step of tangent 0.8 at lr 0.2 has tangent 0.1 at lr 0.025
    assert "about 0.02 instead of 0.2" in finding.advice

    # "equilibrium" turns by √(2λω/(1+μ)): a quarter of the angle is a sixteenth of λ
    angle = constant(50, angle=np.arctan(0.4))
    finding = the(
        "large_angle", history(angle, lr=0.16, optimizer="elropt.optimizer.ELRSGD", rule="equilibrium")
    )
    assert "about 0.01 instead of 0.16" in finding.advice


def test_an_untracked_weight_that_starts_at_zero_may_turn_far() -> None:
    angle = constant(50)
    angle[0, 0] = 1.5
    norm = np.ones((50, 3))
    norm[0, 0] = 0.0
    assert warnings_of(history(angle, weight_norm=norm, tracked=[False, True, True])) == []
    assert warnings_of(history(angle, weight_norm=1.0, tracked=[False, True, True]))


@pytest.mark.parametrize(("lr_rise", "grad_rise"), [(10.0, 1.0), (1.0, 10.0)])
def test_a_spike_is_named_with_its_cause(lr_rise: float, grad_rise: float) -> None:
    angle, lr, grad = constant(), np.full((200, 3), 0.1), np.full((200, 3), 2.0)
    angle[120] *= [8, 10, 1]
    lr[120], grad[120] = 0.1 * lr_rise, 2 * grad_rise
    finding = the("update_spike", history(angle, every=5, lr=lr, grad_norm=grad))
    assert (finding.layers, finding.steps) == (("b", "a"), (600, 600))
    assert "0.1 rad, 10 times as far as usual. 2 of 3 layers" in finding.what
    if lr_rise > 1:
        assert "learning rate was 10 times" in finding.what
        assert "schedule" in finding.advice
    else:
        assert "gradient was 10 times" in finding.what
        assert "about 7 for all" in finding.advice  # 2·√(3·2²)


def test_the_momentum_of_a_spike_is_the_same_spike() -> None:
    angle = constant()
    angle[100:, 0] *= 1 + 40 * 0.9 ** np.arange(100)
    assert the("update_spike", history(angle)).steps[0] == 100


@pytest.mark.parametrize("last", [False, True])
def test_a_learning_rate_that_rises_to_stay_is_no_spike(last: bool) -> None:
    angle, lr = constant(100, angle=1e-3), np.full((100, 3), 0.1)
    start = 97 if last else 50
    angle[start:], lr[start:] = 1e-2, 1.0
    assert warnings_of(history(angle, lr=lr)) == []


def test_the_first_steps_and_small_late_steps_are_no_spikes() -> None:
    angle = constant() * np.linspace(1, 0.001, 200)[:, None]
    angle[:5] *= 20
    angle[190, 0] *= 15  # far below what is usual in this run
    assert warnings_of(history(angle)) == []


def test_what_is_usual_follows_the_learning_rate() -> None:
    lr = np.linspace(1, 0.1, 60)[:, None] * np.ones(3)
    angle = 0.1 * lr
    angle[50, 0] *= 7  # in proportion to λ; 4.6 times the median of the angles before it
    assert the("update_spike", history(angle, lr=lr)).layers == ("a",)


def test_untracked_weights_alone_make_no_spike() -> None:
    angle = constant()
    angle[100, 0] *= 10
    assert warnings_of(history(angle, tracked=[False, True, True])) == []
    assert warnings_of(history(angle, tracked=[False] * 3))  # where nothing is tracked they count
    angle[100, 1] *= 10
    assert the("update_spike", history(angle, tracked=[False, True, True])).layers == ("a", "b")


def test_a_layer_that_hardly_turns_is_named_with_a_learning_rate() -> None:
    angle = constant(50) * [1, 1e-3, 1]
    finding = the("small_angle", history(angle, every=10, lr=0.2))
    assert (finding.layers, finding.steps) == (("b",), (0, 490))
    assert "more than 0.005 rad in all 500 steps" in finding.what
    assert "about 200 instead of 0.2" in finding.advice  # a thousand times 0.2
    assert not [f for f in diagnose(history(angle[:9], every=10)) if f.kind == "small_angle"]  # too short

    finding = the("small_angle", history(angle, every=10, weight_norm=[1.0, 1000.0, 1.0]))
    assert "Its norm is 1,000, that of the others 1" in finding.advice
    frozen = the("small_angle", history(0 * angle, every=10, lr=[0.0, 0.0, 0.0]))
    assert (frozen.severity, frozen.advice) == ("note", "")


def test_two_layers_a_factor_of_hundred_apart() -> None:
    angle = constant() * [1, 2, 1 / 150]
    finding = the("uneven_angles", history(angle, lr=0.2))
    assert (finding.layers, finding.steps, finding.severity) == (("c", "b"), (100, 199), "warning")
    assert "300 times" in finding.what
    assert "about 40 instead of 0.2" in finding.advice  # aims at √2 of the first layer's angle

    angle = constant()
    angle[:20, 1] /= 500
    early = the("uneven_angles", history(angle, every=2))
    assert (early.severity, early.steps, early.layers) == ("note", (0, 38), ("b", "a"))
    assert "after step 38" in early.what
    assert not warnings_of(history(constant() * [1, 2, 1 / 150], tracked=[True, True, False]))


def test_norms_that_grow_are_named_with_a_decay() -> None:
    growing = np.exp(np.linspace(0, np.log(3), 200))[:, None] * [1, 1, 0.5]
    finding = the("norm_growth", history(constant(angle=0.02), weight_norm=growing, lr=0.1))
    assert finding.layers == ("a", "b", "c")
    assert "factor of 3 " in finding.what
    assert "decay is 0" in finding.what
    # √(2λω/(1+μ)) = 0.02
    assert numbers(finding.advice)[0] == pytest.approx(0.02**2 * 1.9 / (2 * 0.1), rel=0.1)

    finding = the(
        "norm_growth",
        history(constant(angle=0.02), weight_norm=growing, lr=0.01, optimizer="torch.optim.adamw.AdamW"),
    )
    assert numbers(finding.advice)[0] == pytest.approx(0.02**2 * 1.9 / (2 * 0.01 * 0.1), rel=0.1)


def test_growth_that_is_bounded_or_of_one_step_or_of_a_warmup_is_no_fault() -> None:
    growing = np.exp(np.linspace(0, np.log(3), 200))[:, None]
    # λω/(1−μ)·steps is 4: decay takes as much as growth brings
    assert not warnings_of(history(constant(), weight_norm=growing, lr=0.1, weight_decay=0.02))
    early = np.minimum(growing, growing[90])  # and then the decay, though weak, is all there is
    assert not warnings_of(history(constant(), weight_norm=early, lr=0.1, weight_decay=5e-4))
    assert warnings_of(history(constant(), weight_norm=growing, lr=0.1, weight_decay=5e-4))
    assert warnings_of(history(constant(), weight_norm=early))
    jump = np.where(np.arange(200)[:, None] > 50, 3.0, 1.0)
    assert not warnings_of(history(constant(), weight_norm=jump))
    rescaled = np.where(np.arange(200)[:, None] < 190, 1.01, 1.0)
    elrsgd: dict[str, Any] = {"optimizer": "elropt.optimizer.ELRSGD", "rule": "warmup"}
    assert not warnings_of(history(constant(), weight_norm=growing, weight_factor=rescaled, **elrsgd))
    assert not warnings_of(history(constant(), weight_norm=growing, optimizer="elropt.ELRSGD", rule="angle"))


def test_a_run_too_short_for_its_decay_is_no_warning() -> None:
    adamw: dict[str, Any] = {"lr": 2e-3, "optimizer": "torch.optim.adamw.AdamW"}
    usual = the("idle_decay", history(constant(), weight_decay=0.01, **adamw))
    assert usual.severity == "note"
    # 1/λω; and λω·200 = 0.5
    assert "The run is short: this decay needs about 50,000 steps to matter. In a run of that" in usual.advice
    assert "About 1 would matter in a run as short as this one" in usual.advice
    long = the("idle_decay", history(constant(), every=100, weight_decay=2e-4, **adamw))
    assert long.severity == "warning"  # 20,000 steps, of 2,500,000
    assert "needs about 2,500,000 steps" in long.advice
    decays = np.array([0.01, 5e-4, 0.01])
    run = dataclasses.replace(
        history(constant(), weight_decay=0.01, **adamw), weight_decay=decays + constant() * 0
    )
    assert [(f.severity, f.layers) for f in diagnose(run) if f.kind == "idle_decay"] == [
        ("warning", ("b",)),
        ("note", ("a", "c")),
    ]


def test_a_decay_that_does_nothing_is_named_with_one_that_would() -> None:
    finding = the("idle_decay", history(constant(), lr=0.1, weight_decay=1e-5))
    # λω/(1−μ) over 200 steps
    assert "0.2 % in all 200 steps" in finding.what
    assert "About 0.002 would matter" in finding.advice  # λω/(1−μ)·200 = 0.5
    finding = the(
        "idle_decay", history(constant(), lr=2e-3, weight_decay=0.04, optimizer="torch.optim.adamw.AdamW")
    )
    assert "1.6 % in all 200 steps" in finding.what
    assert "About 1 would matter" in finding.advice
    assert not warnings_of(history(constant(), lr=0.1, weight_decay=1e-3))

    of_update = {"optimizer": "elropt.optimizer.ELRSGD", "rule": "uniform", "elr_of": "update"}
    finding = the("idle_decay", history(constant(), lr=0.1, weight_decay=1e-5, **of_update))
    assert "0.2 % in all 200 steps" in finding.what  # its radial part is SGD's

    l2: dict[str, Any] = {
        "optimizer": "torch.optim.adam.Adam",
        "decoupled_weight_decay": False,
    }  # no such measure
    assert diagnose(history(constant(), weight_decay=1e-5, **l2)) == []
    kept = the("idle_decay", history(constant(), weight_decay=1e-3, control="angle"))
    assert kept.severity == "note"
    assert "keeps their norms" in kept.what


@pytest.mark.parametrize(
    ("options", "formula"),
    [({"momentum": 0.9}, "√(2λω/(1+μ))"), ({"momentum": 0.9, "dampening": 0.5}, "for independent gradients")],
    ids=str,
)
def test_a_formula_is_named_only_where_it_holds(options: dict[str, Any], formula: str) -> None:
    settled = np.sqrt(2 * 0.1 * 5e-3 * (1 - options.get("dampening", 0)) / 1.9)
    run = history(constant(1000, angle=settled / 2), lr=0.1, weight_decay=5e-3, **options)
    said = [finding.what for finding in diagnose(run) if "at the equilibrium of this" in finding.what]
    assert said
    assert all(f"it is {settled:.2g} rad ({formula})" in what for what in said)


@pytest.mark.parametrize(
    ("optimizer", "options", "settled"),
    [
        ("torch.optim.sgd.SGD", {"momentum": 0.9}, np.sqrt(2 * 0.1 * 0.01 / 1.9)),
        ("torch.optim.adamw.AdamW", {"betas": [0.9, 0.99]}, np.sqrt(2 * 0.1 * 0.01 * 0.1 / 1.9)),
    ],
)
def test_equilibrium_and_transient_by_the_norms(
    optimizer: str, options: dict[str, Any], settled: float
) -> None:
    """ln‖w‖ relaxes to its equilibrium at the rate that decay has, and the angle as 1/‖w‖."""
    share = 0.1 * 0.01 * (10 if "sgd" in optimizer else 1)
    steps = np.arange(0, int(5 / share), 10)
    log_norm = np.exp(-2 * share * steps)[:, None] * [1.0, 0.8, 0.5]
    run = history(
        settled * np.exp(-log_norm),
        every=10,
        lr=0.1,
        weight_decay=0.01,
        weight_norm=np.exp(log_norm),
        optimizer=optimizer,
        **options,
    )
    found = the("in_equilibrium", run)
    assert found.severity == "note"
    assert f"is {settled:.2g} rad (" in found.what
    assert found.steps[1] == steps[-1]
    # d ln‖w‖/dt = −2·share·ln‖w‖ is half of share at ln‖w‖ = 1/4, in the middle of a window of 0.25/share steps
    assert found.steps[0] == pytest.approx((np.log(4) / 2 - 0.125) / share, abs=0.05 / share)
    assert not [f for f in diagnose(run) if f.kind == "transient"]

    early = len(steps) // 10
    short = history(
        settled * np.exp(-log_norm[:early]),
        every=10,
        lr=0.1,
        weight_decay=0.01,
        weight_norm=np.exp(log_norm[:early]),
        optimizer=optimizer,
        **options,
    )
    found = the("transient", short)
    assert "not in equilibrium at step" in found.what
    assert f"about {1 / share:,.0f} steps" in found.what
    assert not [f for f in diagnose(short) if f.kind == "in_equilibrium"]


def test_an_angle_that_agrees_before_the_norms_do_is_chance() -> None:
    settled = np.sqrt(2 * 0.1 * 5e-4 / 1.9)
    growing = np.exp(np.linspace(0, 0.4, 200))[:, None]  # of which decay takes back 0.1
    angle = constant() / 0.01 * settled * [1.0, 1.2, 1.6]
    what = the("transient", history(angle, weight_norm=growing, lr=0.1, weight_decay=5e-4)).what
    assert (
        f"{settled:.2g} rad (√(2λω/(1+μ))). Already at about this angle: 2 of 3. That is chance so far"
        in what
    )
    assert "their norms still move" in what
    what = the("transient", history(2 * angle, weight_norm=growing, lr=0.1, weight_decay=5e-4)).what
    assert "chance" not in what


def test_the_warmup_is_told_with_its_end() -> None:
    acts = np.arange(100)[:, None] < 30
    grad = np.where(acts, [50.0, 1.0, 2.0], [2.0, 1.0, 2.0])
    run = history(
        constant(100),
        every=2,
        grad_norm=grad,
        grad_factor=np.where(acts, 0.5, 1.0),
        optimizer="elropt.optimizer.ELRSGD",
        rule="warmup",
    )
    finding = the("rule", run)
    assert (finding.steps, finding.severity) == ((0, 60), "note")
    assert "handed over to plain SGD by step 60, at a factor of 2." in finding.what
    assert "factor of 50" in finding.what
    ongoing = history(constant(100), grad_factor=0.5, optimizer="elropt.optimizer.ELRSGD", rule="warmup")
    assert "has not handed over" in the("rule", ongoing).what


def test_weights_that_are_not_finite() -> None:
    norm = np.ones((200, 3))
    norm[150:, 2], norm[160:, 0] = np.nan, np.nan
    finding = the("not_finite", history(constant(), weight_norm=norm))
    assert (finding.layers, finding.steps) == (("c", "a"), (150, 199))
    assert "At step 150" in finding.what
