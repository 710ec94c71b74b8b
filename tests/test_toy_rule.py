"""A rule is added with one entry in `RULES`, one torch function, one @jit function and one function of the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elropt import kernels
from elropt.rules import RULES, LayerControls, RuleInputs, RuleSpec, RuleState, log_relative_grad

from . import oracle
from .test_contract import BACKENDS, HYPER, TOLERANCES, assert_same, dtypes_of, run_both

if kernels.available():
    import triton
    import triton.language as tl

    from elropt.kernels import decide

    load_rows, finish_rows, log_e_of = decide.load_rows, decide.finish_rows, decide.log_relative_grad
    ROWS_PER_PASS = decide.ROWS_PER_PASS

    @triton.jit
    def cautious_rows(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_rows(inputs, start)
            s = tl.where(row.moving, 1.0 / (1.0 + tl.exp(log_e_of(row))), 1.0)
            finish_rows(inputs, row, s, None, None, 0, PROJECT)

    @triton.jit
    def shrinking_rows(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_rows(inputs, start)
            e = tl.exp(log_e_of(row))
            s = tl.where(row.moving, 1.0 / (1.0 + e), 1.0)
            a = tl.where(row.moving, (2.0 + e) / (3.0 + e), 1.0)
            finish_rows(inputs, row, s, a, None, 0, PROJECT)


def cautious(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """s = 1/(1+E)."""
    e = log_relative_grad(inputs.stats, inputs.moving).exp()
    return LayerControls(grad_factor=torch.where(inputs.moving, 1 / (1 + e), 1.0)), inputs.state


def shrinking(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """s = 1/(1+E) and a = (2+E)/(3+E)."""
    e = log_relative_grad(inputs.stats, inputs.moving).exp()
    a = torch.where(inputs.moving, (2 + e) / (3 + e), 1.0)
    return cautious(inputs)[0]._replace(weight_factor=a), inputs.state


def cautious_factors(w_norms: oracle.Norms, g_norms: oracle.Norms) -> oracle.Factors:
    return [(1 / (1 + g / w), np.ones(())) for w, g in zip(w_norms, g_norms, strict=True)]


def shrinking_factors(w_norms: oracle.Norms, g_norms: oracle.Norms) -> oracle.Factors:
    e = [g / w for w, g in zip(w_norms, g_norms, strict=True)]
    return [(1 / (1 + x), (2 + x) / (3 + x)) for x in e]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    granularities = ("layer", "filter")
    monkeypatch.setitem(RULES, "cautious", RuleSpec(cautious, granularities))
    monkeypatch.setitem(RULES, "shrinking", RuleSpec(shrinking, granularities, scales_weights=True))
    monkeypatch.setitem(oracle.FACTORS, "cautious", cautious_factors)
    monkeypatch.setitem(oracle.FACTORS, "shrinking", shrinking_factors)
    if kernels.available():
        monkeypatch.setitem(decide.RULES, "cautious", cautious_rows)
        monkeypatch.setitem(decide.RULES, "shrinking", shrinking_rows)


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("hyper", HYPER[2:], ids=str)
@pytest.mark.parametrize("granularity", ["layer", "filter"])
@pytest.mark.parametrize("rule", ["cautious", "shrinking"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_from_outside_is_right_on_every_backend(
    backend: str, rule: str, granularity: str, hyper: dict[str, Any], project: bool
) -> None:
    dtype = dtypes_of(backend)[0]
    ours, expected = run_both(backend, dtype, rule, granularity, 5, 0.01, project=project, **hyper)
    assert_same(ours, expected, TOLERANCES[dtype], (backend, rule, granularity, hyper, project))


@pytest.mark.usefixtures("rules")
@pytest.mark.skipif(not kernels.available(), reason="triton is not installed")
def test_without_a_jit_function_the_kernels_only_measure_and_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(decide.RULES, "shrinking")
    ours, expected = run_both("triton", torch.float32, "shrinking", "layer", 5, 0.01, momentum=0.9)
    assert_same(ours, expected, TOLERANCES[torch.float32], "shrinking")
