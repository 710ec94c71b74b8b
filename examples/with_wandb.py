"""Weights & Biases: `run.log` is the Recorder's on_record; curves elr/<layer>, angle/<layer> and the spreads.

    python examples/with_wandb.py && wandb sync runs/wandb/wandb/offline-run-*

Without `mode="offline"` it logs to the server, where `id` and `resume="allow"` continue the same run. Stop it at any
moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
import wandb
from torch import nn

import elropt


def main(folder="runs/wandb", steps=40):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])

    Path(folder).mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="elropt", mode="offline", dir=folder, id="with-wandb", resume="allow")
    file = Path(folder, "elr.jsonl")
    with run, elropt.Recorder(optimizer, file, every=4, first_step=first, on_record=run.log):
        for step in range(first, steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            run.log({"loss": loss.item()}, step=step)
            if (step + 1) % 20 == 0:
                state = {"step": step + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, path)
    return net


if __name__ == "__main__":
    main()
