"""Accelerate: groups before `accelerator.prepare`, a Recorder after it that reports to the trackers.

    python examples/with_accelerate.py
    accelerate launch examples/with_accelerate.py

Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elropt

EPOCHS = 4


def main(folder="runs/accelerate", epochs=EPOCHS):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)

    accelerator = Accelerator(log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("logs")
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    saved = sorted(Path(folder).glob("epoch-*"))
    if saved:
        accelerator.load_state(str(saved[-1]))

    first, file = len(saved), Path(folder, "elr.jsonl")
    with elropt.Recorder(  # the prepared optimizer: the Recorder finds ELRSGD in it
        optimizer, file, every=4, first_step=first * len(loader), on_record=accelerator.log
    ):
        for epoch in range(first, epochs):
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                optimizer.step()
            accelerator.save_state(f"{folder}/epoch-{epoch:04}")
    accelerator.end_training()
    return accelerator.unwrap_model(net)


if __name__ == "__main__":
    main()
