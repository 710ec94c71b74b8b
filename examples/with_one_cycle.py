"""`OneCycleLR` over ELRSGD: the tracked layers have a tenth of the learning rate of the others, at every step.

    python examples/with_one_cycle.py

`tracked_lr` stays in proportion to `group["lr"]`: the optimizer's `lr` must be the schedule's `max_lr`. Stop it at any
moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from torch import nn

import elropt


def main(folder="runs/one-cycle", steps=40, total_steps=40):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first):
        for step in range(first, steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % 20 == 0:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"step": step + 1, "schedule": schedule.state_dict(), **state}, path)
    return net


if __name__ == "__main__":
    main()
