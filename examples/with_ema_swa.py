"""Averages of the weights, EMA and SWA, by `AveragedModel`; `update_bn` before they are used.

    python examples/with_ema_swa.py

An average belongs to other activations than the net, so its BatchNorm statistics are computed anew. Stop it at any
moment and start it again: it goes on from the last epoch.
"""

from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import elropt

EPOCHS = 4


def main(folder="runs/ema-swa", epochs=EPOCHS):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    averages = {"ema": AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)), "swa": AveragedModel(net)}
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)  # the tracked layers end at a tenth of it
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule, **averages}
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["epoch"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first * len(loader)):
        for epoch in range(first, epochs):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                averages["ema"].update_parameters(net)
            if epoch >= EPOCHS // 2:
                averages["swa"].update_parameters(net)
                schedule.step()
            torch.save(
                {"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, path
            )
    for average in averages.values():
        update_bn(loader, average)
    return net, averages


if __name__ == "__main__":
    main()
