"""Optuna: a search over the rule and its learning rate, in the unit that the rule has.

    python examples/with_optuna.py

Start it again and it goes on: the study is in a file.
"""

from pathlib import Path

import optuna
import torch
from torch import nn

import elropt
from elropt.rules import RULES

RANGES = {"lr": (0.01, 1.0), "rad per step": (0.001, 0.1)}  # by unit; that of "sphere" depends on the net


def objective(trial):
    rules = [rule for rule, spec in RULES.items() if spec.lr_unit in RANGES]  # None is plain SGD
    rule = trial.suggest_categorical("rule", rules)
    unit = RULES[rule].lr_unit  # each unit is a parameter of its own
    value = trial.suggest_float(unit, *RANGES[unit], log=True)
    lr, tracked_lr = (value, None) if unit == "lr" else (0.1, value)
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    layers = [m for n in (8, 32) for m in (nn.Linear(n, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=tracked_lr)
    optimizer = elropt.ELRSGD(groups, lr=lr, momentum=0.9, rule=rule)
    loss = torch.tensor(0.0)
    for step in range(40):
        batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
        loss = nn.functional.cross_entropy(net(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            trial.report(loss.item(), step)
            if trial.should_prune():
                raise optuna.TrialPruned
    trial.set_user_attr("elr_spread", elropt.layer_stats(optimizer).elr_spread)
    return loss.item()


def main(folder="runs/optuna", trials=8, sampler=None):
    Path(folder).mkdir(parents=True, exist_ok=True)
    options = {"study_name": "rules", "storage": f"sqlite:///{folder}/study.db", "load_if_exists": True}
    study = optuna.create_study(sampler=sampler, **options)
    study.optimize(objective, n_trials=trials)
    print(study.best_params, study.best_value)
    return study


if __name__ == "__main__":
    main()
