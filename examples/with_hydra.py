"""Hydra: optimizer and groups from a YAML file.

python examples/with_hydra.py
python examples/with_hydra.py optimizer.rule=uniform optimizer.tracked_lr=null +optimizer.nesterov=true
python examples/with_hydra.py --multirun optimizer.tracked_lr=0.003,0.01,0.03
"""

from pathlib import Path

import hydra
import torch
from torch import nn

import elropt


def train(config):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, config.width, bias=False), nn.BatchNorm1d(config.width), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(config.width, 4))
    optimizer = hydra.utils.instantiate(config.optimizer)(elropt.param_groups(net, inputs[:64]))
    first_step, path = 0, Path(config.folder, "checkpoint.pt")
    if path.exists():
        checkpoint = torch.load(path)
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]
    with elropt.Recorder(optimizer, Path(config.folder, "elr.jsonl"), every=4, first_step=first_step):
        for step in range(first_step, config.steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": config.steps}, path)
    return net


if __name__ == "__main__":
    hydra.main(version_base=None, config_path=".", config_name="with_hydra")(train)()
