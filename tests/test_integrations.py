"""The parts of `elropt.integrations` that need no framework; the others are in tests/frameworks."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import elropt
from elropt.integrations.config import ELRSGDFactory

from .nets import bn_mlp


def test_a_factory_makes_the_optimizer_of_its_parts() -> None:
    net, inputs = bn_mlp(), torch.randn(16, 8)
    factory = ELRSGDFactory(
        lr=0.2, momentum=0.8, weight_decay=1e-3, rule="angle", tracked_lr=0.02, exclude=["0.*"], nesterov=True
    )
    groups = elropt.param_groups(net, inputs, weight_decay=1e-3, tracked_lr=0.02, exclude=["0.*"])
    expected = elropt.ELRSGD(groups, lr=0.2, momentum=0.8, rule="angle", nesterov=True)
    assert factory.make(net, inputs).param_groups == expected.param_groups
    assert factory.make(net, input=inputs).param_groups == expected.param_groups  # a batch that is a dict


def test_a_factory_has_the_defaults_of_elrsgd() -> None:
    net, inputs = bn_mlp(), torch.randn(16, 8)
    expected = elropt.ELRSGD(elropt.param_groups(net, inputs))
    assert ELRSGDFactory().make(net, inputs).param_groups == expected.param_groups


def test_a_factory_passes_errors_on() -> None:
    with pytest.raises(ValueError, match="tracked_lr is -1"):
        ELRSGDFactory(tracked_lr=-1.0).make(bn_mlp(), torch.randn(16, 8))
    with pytest.raises(TypeError, match="nestrov"):
        ELRSGDFactory(nestrov=True).make(bn_mlp(), torch.randn(16, 8))


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "elropt.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("elropt.integrations.lightning")
