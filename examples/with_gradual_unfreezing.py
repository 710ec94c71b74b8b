"""Gradual unfreezing: all layers are in the groups from the start, and frozen ones have no gradient.

    python examples/with_gradual_unfreezing.py

The groups are made before a layer is frozen, for `param_groups` leaves frozen parameters out. The optimizer passes over
a parameter without a gradient. Stop it at any moment and start it again: it goes on from the last epoch.
"""

from pathlib import Path

import torch
from torch import nn

import elropt

EPOCHS = 3


def main(folder="runs/gradual-unfreezing", epochs=EPOCHS):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    blocks = [net[5:], net[3:5], net[:3]]  # from the head down: one more is trained in each epoch
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["epoch"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first * 8):
        for epoch in range(first, epochs):
            for i, block in enumerate(blocks):
                block.requires_grad_(i <= epoch)
            for batch in torch.arange(len(inputs)).split(64):
                optimizer.zero_grad()  # to None, so that a frozen parameter stays where it is
                nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
                optimizer.step()
            state = {"epoch": epoch + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, path)
    return net


if __name__ == "__main__":
    main()
