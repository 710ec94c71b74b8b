"""FSDP2 in two processes: the weights of one process, and of a run that was stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import elropt

from . import plain_loop

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.path[:0] = [{root!r}, {examples!r}]
import torch
import with_fsdp2
torch.save(with_fsdp2.main(sys.argv[1], int(sys.argv[2])), f"{{sys.argv[1]}}/weights.pt")
"""


def start(folder: str, steps: int) -> subprocess.CompletedProcess[str]:
    Path("run.py").write_text(RUN.format(root=str(ROOT), examples=str(ROOT / "examples")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launch, "run.py", folder, str(steps)], capture_output=True, text=True)


def test_the_example_in_two_processes() -> None:
    for folder, steps in (("whole", 40), ("parts", 20), ("parts", 40)):
        done = start(folder, steps)
        assert done.returncode == 0, done.stderr
    whole, parts = (torch.load(f"{folder}/weights.pt") for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [record["step"] for record in b] == [*range(0, 40, 4)]
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]

    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.LayerNorm(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    assert groups[0]["param_names"] == ["0.weight", "3.weight"]
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 40))
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-3, atol=1e-4)
