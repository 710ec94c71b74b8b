"""Lightning Fabric: groups before `fabric.setup`, a Recorder after it.

    python examples/with_fabric.py

Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn

import elropt

BATCH = 64


def main(folder="runs/fabric", steps=40):
    fabric = Fabric(accelerator="cpu", loggers=CSVLogger(folder))
    fabric.seed_everything(0, verbose=False)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:BATCH], weight_decay=5e-4, tracked_lr=0.01)
    net, optimizer = fabric.setup(net, elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle"))
    state = {"net": net, "optimizer": optimizer, "step": 0}
    path = Path(folder, "checkpoint.pt")
    if path.exists():
        fabric.load(path, state)

    file = Path(folder, "elr.jsonl")
    with elropt.Recorder(optimizer, file, every=4, first_step=state["step"], on_record=fabric.log_dict):
        for step in range(state["step"], steps):
            batch = torch.arange(BATCH * step, BATCH * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(net(inputs[batch]), labels[batch]))
            optimizer.step()
            state["step"] = step + 1
            if state["step"] % 20 == 0:
                fabric.save(path, state)
    fabric.logger.finalize("success")
    return net


if __name__ == "__main__":
    main()
