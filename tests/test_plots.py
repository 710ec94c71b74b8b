"""elropt.plots: what is drawn is the data, and nothing needs a display or pyplot."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from elropt import dynamics
from elropt.plots import (
    accuracy_against_lr,
    elr_over_steps,
    lr_over_steps,
    relative_grad_figure,
    run_figure,
    save,
    spread_over_steps,
)
from elropt.run_history import RunHistory

STEPS = np.arange(0, 50, 10)
ELRS = np.logspace(0, -4, 12)[None, :] * np.linspace(1, 0.5, len(STEPS))[:, None]


def new_axes() -> Axes:
    return Figure(layout="constrained").subplots()


def draw(ax: Axes) -> None:
    """Render everything; pytest turns matplotlib's warnings into errors."""
    ax.figure.draw_without_rendering()


def luminance(color: object) -> float:
    return float(np.dot([0.2126, 0.7152, 0.0722], np.square(to_rgb(color))))


def test_elr_has_a_line_per_layer_in_the_order_of_depth() -> None:
    ax = new_axes()
    elr_over_steps(ax, STEPS, ELRS)
    draw(ax)

    lines = ax.get_lines()
    assert len(lines) == 12
    for line, elr in zip(lines, ELRS.T, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), STEPS)
        np.testing.assert_array_equal(line.get_ydata(), elr)
    brightness = [luminance(line.get_color()) for line in lines]
    assert brightness == sorted(brightness)
    assert brightness[-1] < 0.75, "too pale for white paper"
    assert ax.get_yscale() == "log"
    assert ax.get_legend() is None


def test_elr_has_a_colorbar_over_the_layers() -> None:
    ax = new_axes()
    elr_over_steps(ax, STEPS, ELRS)
    draw(ax)
    _, bar = ax.figure.axes
    assert bar.get_ylim() == (1, 12)
    assert "layer" in bar.get_ylabel()

    alone = new_axes()
    elr_over_steps(alone, STEPS, ELRS[:, :1])
    assert alone.figure.axes == [alone]


def test_what_has_no_logarithm_leaves_a_gap() -> None:
    elrs = ELRS.copy()
    elrs[1, 0], elrs[2, 0], elrs[3, 0], elrs[:, 1] = 0, np.nan, np.inf, np.nan
    ax = new_axes()
    elr_over_steps(ax, STEPS, elrs)
    draw(ax)
    shown = [np.isfinite(line.get_ydata()).sum() for line in ax.get_lines()]
    assert shown == [2, 0] + [5] * 10


def test_a_single_step_is_visible() -> None:
    ax = new_axes()
    elr_over_steps(ax, STEPS[:1], ELRS[:1])
    draw(ax)
    assert {line.get_marker() for line in ax.get_lines()} == {"o"}


def test_equal_values_do_not_fill_the_axis_with_rounding_errors() -> None:
    for value in (1.0, 3e-3):
        ax = new_axes()
        elr_over_steps(ax, STEPS, value * (1 + 1e-7 * np.random.default_rng(0).normal(size=ELRS.shape)))
        draw(ax)
        low, high = ax.get_ylim()
        assert low < value / 1.2
        assert high > value * 1.2


def test_spread_has_a_legend_only_for_several_runs() -> None:
    spreads = {"SGD": (STEPS, [200, 50, 20, 10, 5]), "uniform": (STEPS[:2], [1.0, 1.0])}
    ax = new_axes()
    spread_over_steps(ax, spreads)
    draw(ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["SGD", "uniform"]
    by_label = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(by_label["SGD"].get_ydata(), [200, 50, 20, 10, 5])
    np.testing.assert_array_equal(by_label["uniform"].get_xdata(), [0, 10])
    assert by_label["SGD"].get_color() != by_label["uniform"].get_color()

    alone = new_axes()
    spread_over_steps(alone, {"run": (STEPS, [5, 4, 3, 2, 1])})
    assert alone.get_legend() is None


def test_applied_lr_is_one_line_if_the_layers_share_it() -> None:
    lr = 0.1 * np.linspace(1, 0, len(STEPS))
    shared = np.tile(lr[:, None], 3)
    shared[0, 1] = np.nan  # a layer that joined late
    ax = new_axes()
    lr_over_steps(ax, STEPS, shared)
    draw(ax)
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), lr)

    ax = new_axes()
    lr_over_steps(ax, STEPS, lr[:, None] * [1, 2, 3])
    assert [line.get_ydata()[0] for line in ax.get_lines()] == pytest.approx([0.1, 0.2, 0.3])


def test_accuracy_is_sorted_by_lr_and_banded() -> None:
    results = {
        "SGD": ([0.1, 0.01, 1.0], [0.9, 0.8, np.nan], [0.85, 0.7, np.nan], [0.95, 0.85, np.nan]),
        "angle": ([0.02, 0.2], [0.96, 0.95], [0.95, 0.94], [0.97, 0.96]),
    }
    ax = new_axes()
    accuracy_against_lr(ax, results, xlabel="radians per step")
    draw(ax)

    sgd, angle = ax.get_lines()
    np.testing.assert_array_equal(sgd.get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_array_equal(sgd.get_ydata(), [0.8, 0.9, np.nan])
    assert sgd.get_marker() != angle.get_marker()
    assert sgd.get_color() != angle.get_color()
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.7)
    assert band[:, 1].max() == pytest.approx(0.95)
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "radians per step"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["SGD", "angle"]


def test_wrong_data_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[4\] and \[5, 12\]"):
        elr_over_steps(new_axes(), STEPS[:4], ELRS)
    with pytest.raises(ValueError, match=r"\[T, L\].*\[5\] and \[5\]"):
        elr_over_steps(new_axes(), STEPS, ELRS[:, 0])
    with pytest.raises(ValueError, match=r"\[0\] and \[0\]"):
        spread_over_steps(new_axes(), {"run": ([], [])})
    with pytest.raises(ValueError, match=r"'SGD' must be positive.*-1"):
        accuracy_against_lr(new_axes(), {"SGD": ([0.1, -1.0], [0, 1], [0, 1], [0, 1])})


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("new/b.svg", b"<?xml"), ("c.PDF", b"%PDF")]
)
def test_save_writes_what_the_suffix_says(tmp_path: Path, name: str, start: bytes) -> None:
    fig = relative_grad_figure(dynamics.simulate([100, 10, 1], 0.1, 5))
    save(fig, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    assert len(content) > 5000


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_save_refuses_other_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        save(Figure(), tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_run_figure_has_three_panels_on_one_step_axis() -> None:
    run = RunHistory(
        steps=STEPS,
        names=[f"layer{i}" for i in range(12)],
        elr=ELRS,
        applied_lr=np.full_like(ELRS, 0.1),
        elr_spread=ELRS.max(1) / ELRS.min(1),
        notes=[],
    )
    fig = run_figure(run)
    fig.draw_without_rendering()
    elr, spread, lr = fig.axes[:3]
    assert [len(ax.get_lines()) for ax in (elr, lr)] == [12, 1]
    np.testing.assert_allclose(spread.get_lines()[0].get_ydata(), 1e4)
    assert elr.get_xlim() == spread.get_xlim() == lr.get_xlim()


@pytest.mark.parametrize("has_elr", [True, False])
def test_angles_are_drawn_beside_the_elr(has_elr: bool) -> None:
    run = RunHistory(
        steps=STEPS,
        names=[f"layer{i}" for i in range(12)],
        elr=ELRS if has_elr else np.full_like(ELRS, np.nan),
        applied_lr=np.full_like(ELRS, 0.1),
        elr_spread=np.full(len(STEPS), 1e4),
        notes=[],
        angle=3 * ELRS**0.5,
    )
    fig = run_figure(run)
    fig.draw_without_rendering()
    panels = {ax.get_ylabel(): ax for ax in fig.axes}
    angles = np.array([line.get_ydata() for line in panels["angle of the step (rad)"].get_lines()])
    np.testing.assert_allclose(angles, 3 * ELRS.T**0.5)
    spreads = {line.get_label(): line.get_ydata() for line in panels["spread (max / min)"].get_lines()}
    np.testing.assert_allclose(spreads["angle"], 1e2)
    assert ("effective learning rate (rad)" in panels) == ("ELR" in spreads) == has_elr


def test_relative_grads_are_drawn_from_the_start() -> None:
    E = dynamics.simulate([100, 10, 1], 0.1, 5)
    top, bottom = relative_grad_figure(E).axes[:2]
    np.testing.assert_array_equal([line.get_ydata() for line in top.get_lines()], E.T)
    np.testing.assert_allclose(bottom.get_lines()[0].get_ydata(), dynamics.elr_spread(E))
    assert re.search("1/lr", top.get_ylabel())


def test_pyplot_and_its_global_state_are_left_alone() -> None:
    code = "import sys, elropt.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import elropt.plots"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'pip install "elropt[cli]"' in result.stderr
