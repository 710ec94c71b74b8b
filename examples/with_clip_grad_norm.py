"""`clip_grad_norm_`: only the parameters that are not tracked, for the rule decides the step of the others anyway.

    python examples/with_clip_grad_norm.py

Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from torch import nn

import elropt


def main(folder="runs/clip-grad-norm", steps=40):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    untracked = [p for group in groups if not group["scale_invariant"] for p in group["params"]]
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first):
        for step in range(first, steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(untracked, 0.1)
            optimizer.step()
            if (step + 1) % 20 == 0:
                state = {"step": step + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, path)
    return net


if __name__ == "__main__":
    main()
