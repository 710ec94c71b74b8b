"""Optuna: each rule is searched in its own unit, and a study goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

optuna = pytest.importorskip("optuna")


def test_the_example_searches_each_rule_in_its_unit(example: Callable[[str], ModuleType]) -> None:
    module = example("with_optuna")
    module.main("run", trials=4, sampler=optuna.samplers.RandomSampler(seed=0))
    study = module.main("run", trials=4, sampler=optuna.samplers.RandomSampler(seed=1))
    assert len(study.trials) == 8  # the second call went on
    rules = {trial.params["rule"] for trial in study.trials}
    assert len(rules) > 1
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    for trial in done:
        rule = trial.params["rule"]
        assert set(trial.params) == {"rule", "rad per step" if rule == "angle" else "lr"}
        if rule in ("uniform", "angle"):
            assert trial.user_attrs["elr_spread"] == pytest.approx(1.0, rel=1e-4)
    assert study.best_value == min(trial.value for trial in done)
    loss = module.objective(optuna.trial.FixedTrial(study.best_params))
    assert loss == study.best_value
