"""Statistics of the benchmarks against closed forms and hand-made curves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common import statistics
from benchmarks.studies import comparison
from benchmarks.studies.radians import run as radians


def test_interval_is_that_of_all_resamples() -> None:
    values = [1.0, 2.0, 6.0]
    means = np.array([np.mean(chosen) for chosen in itertools.product(values, repeat=3)])
    found = statistics.interval(values)
    assert found.mean == 3.0
    assert found.n == 3
    # The exact 2.5 % and 97.5 % points of the 27 resamples.
    assert found.low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"))
    assert f"{found:.1f}" == "3.0 [1.0, 6.0]"


def test_interval_of_equal_few_and_no_values() -> None:
    assert statistics.interval([2.0, 2.0]) == (2.0, 2.0, 2.0, 2)
    one = statistics.interval([2.0])
    assert one.mean == 2.0
    assert math.isnan(one.low)
    assert math.isnan(statistics.interval([]).mean)


def test_geometric_interval_leaves_out_what_has_no_logarithm() -> None:
    found = statistics.geometric_interval([1.0, 100.0, 0.0, math.nan, math.inf])
    assert found.n == 2
    assert found.mean == pytest.approx(10)
    assert math.isnan(statistics.geometric_interval([]).mean)


def test_paired_differences_are_by_seed() -> None:
    found = statistics.paired({0: 3.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 2.0, 8: -100.0})
    assert found == (1.0, 1.0, 1.0, 2)


CURVE = statistics.curve([(0.1, 80.0), (0.1, 84.0), (0.01, 50.0), (1.0, 70.0), (10.0, 10.0)])


def test_curve_sorts_and_averages() -> None:
    np.testing.assert_array_equal(CURVE.lrs, [0.01, 0.1, 1, 10])
    np.testing.assert_array_equal(CURVE.mean, [50, 82, 70, 10])
    np.testing.assert_array_equal(CURVE.low, [50, 80, 70, 10])
    np.testing.assert_array_equal(CURVE.high, [50, 84, 70, 10])
    assert CURVE.best_lr == 0.1


def test_usable_range_interpolates_in_the_logarithm() -> None:
    found = statistics.usable_range(CURVE, 66.0)
    assert found is not None
    assert found.low == pytest.approx(10**-1.5)
    assert found.high == pytest.approx(10 ** (4 / 60))
    assert (found.cut_low, found.cut_high) == (False, False)
    assert found.width == pytest.approx(10 ** (1.5 + 4 / 60))


def test_usable_range_says_where_the_grid_ends() -> None:
    found = statistics.usable_range(CURVE, 40.0)
    assert found is not None
    assert (found.low, found.cut_low, found.cut_high) == (0.01, True, False)
    assert str(found).startswith("≥ ×")
    assert statistics.usable_range(CURVE, 82.1) is None
    assert statistics.usable_range(CURVE, math.nan) is None  # as where there is no SGD to compare with


def test_usable_range_is_the_stretch_around_the_best() -> None:
    dip = statistics.curve([(1.0, 90.0), (10.0, 20.0), (100.0, 95.0), (1000.0, 20.0)])
    found = statistics.usable_range(dip, 80.0)
    assert found is not None
    assert 10 < found.low < 100 < found.high < 1000


@given(st.floats(-3, 3), st.floats(0.5, 20), st.sampled_from([3, 5, 9]))
def test_the_top_of_a_parabola_is_found(center: float, curvature: float, points: int) -> None:
    lrs = np.exp(np.linspace(-4, 4, points))
    accuracy = 90 - curvature * (np.log(lrs) - center) ** 2
    if accuracy.argmax() in (0, points - 1):
        assert comparison.top(lrs, accuracy) in (lrs[0], lrs[-1])
    else:
        assert comparison.top(lrs, accuracy) == pytest.approx(math.exp(center), rel=1e-6)


def test_one_learning_rate_for_all() -> None:
    curves = [{0.1: 90.0, 1.0: 80.0}, {0.1: 60.0, 1.0: 65.0, 10.0: 99.0}]
    found = radians.one_for_all(curves)
    assert found == {"lr": 0.1, "mean_loss": 19.5, "worst_loss": 39.0}
