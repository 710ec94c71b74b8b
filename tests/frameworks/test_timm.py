"""timm: "elrsgd" in its registry, the plain loop's bits, a stop, and timm's scripts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import elropt

from . import plain_loop

timm = pytest.importorskip("timm")
from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402

import elropt.integrations.timm  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    fitted = example("with_timm").main("run")
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    labels = images.mean((2, 3)).argmax(1)
    net = timm.create_model("test_resnet", num_classes=3)
    groups = elropt.param_groups(net, images[:16], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    start = [group["lr"] for group in optimizer.param_groups]
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=0.01)
    lrs = []
    for epoch in range(4):
        schedule.step(epoch)
        lrs.append(optimizer.param_groups[0]["lr"])
        plain_loop.train(net, optimizer, plain_loop.cycle(images, labels, 4, size=16))
    plain_loop.assert_same_state(fitted, net)
    assert start == [0.1] * len(groups)
    records = plain_loop.records("run/elr.jsonl")
    assert [record["step"] for record in records] == [*range(0, 16, 2)]
    for record in records[1:]:  # in step 0 gains of 0 hide most layers
        layers = [layer for layer in record["layers"].values() if layer["tracked"]]
        assert [layer["elr"] for layer in layers] == pytest.approx(
            [0.1 * lrs[record["step"] // 4]] * len(layers), rel=1e-4
        )


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    main = example("with_timm").main
    whole = main("whole")
    main("parts", epochs=2)
    plain_loop.assert_same_state(main("parts"), whole)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]


def test_names_and_groups() -> None:
    """Without `param_group_fn` timm makes its two groups, and ELRSGD finds the tracked layers; lookahead works too."""
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    assert "elrsgd" in list_optimizers()
    options = {"lr": 0.05, "weight_decay": 1e-3, "rule": "angle", "tracked_lr": 0.01, "eps": 1e-8}
    optimizer = create_optimizer_v2(net, "elrsgd", **options)
    assert isinstance(optimizer, elropt.ELRSGD)
    found = {
        key: [group[key] for group in optimizer.param_groups] for key in ("weight_decay", "momentum", "lr")
    }
    assert found == {"weight_decay": [0.0, 1e-3], "momentum": [0.9, 0.9], "lr": [0.05, 0.05]}
    assert [group["tracked_lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert create_optimizer_v2(net, "elrsgd", lr=0.1, momentum=0.5).param_groups[0]["momentum"] == 0.5
    wrapped = create_optimizer_v2(net, "lookahead_elrsgd", lr=0.1)
    assert type(wrapped).__name__ == "Lookahead"
    assert [group["rule"] for group in wrapped.param_groups] == ["warmup"]
    with pytest.raises(TypeError, match="nestrov"):
        create_optimizer_v2(net, "elrsgd", lr=0.1, nestrov=True)


def test_scripts_of_timm_know_the_name(tmp_path: Path) -> None:
    """As train.py does: its arguments, modules beside it, and `if __name__ == "__main__"`."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("options = {'lr': 0.1}")
    (tmp_path / "scripts" / "train.py").write_text(
        "import sys, torch, beside\n"
        "import elropt.integrations.timm\n"  # once more is fine
        "from timm.optim import create_optimizer_v2\n"
        "if __name__ == '__main__':\n"
        "    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), sys.argv[2], **beside.options)\n"
        "    print(type(optimizer).__name__, sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "elropt.integrations.timm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)

    done = run("scripts/train.py", "--opt", "elrsgd")
    assert (done.stdout, done.stderr) == ("ELRSGD ['--opt', 'elrsgd']\n", "")
    without = run()
    assert without.returncode == 1
    assert "usage: python -m elropt.integrations.timm SCRIPT" in without.stderr


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "elropt.integrations.timm")
    with pytest.raises(ImportError, match="pip install 'timm"):
        importlib.import_module("elropt.integrations.timm")
