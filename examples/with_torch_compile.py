"""`torch.compile`: groups from the net before it is compiled. A step with a rule runs as it does without.

    python examples/with_torch_compile.py

The compiled net shares its parameters with the net. Save the net: the names of the compiled one begin with _orig_mod.
Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from torch import nn

import elropt


def main(folder="runs/torch-compile", steps=40, backend="inductor"):
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

    @torch.compile(backend=backend)
    def loss_of(x, y):
        return nn.functional.cross_entropy(net(x), y)

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first):
        for step in range(first, steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            loss_of(inputs[batch], labels[batch]).backward()
            optimizer.step()
            if (step + 1) % 20 == 0:
                state = {"step": step + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, path)
    return net


if __name__ == "__main__":
    main()
