"""LightningCLI: optimizer, groups and recording from a YAML file.

    python examples/with_lightning_cli.py fit --config examples/with_lightning_cli.yaml

`--model.optimizer.init_args.tracked_lr=0.003` changes a value, `--ckpt_path=last.ckpt` goes on from a checkpoint.
"""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elropt


class Net(LightningModule):
    def __init__(self, optimizer: OptimizerCallable, width: int = 32) -> None:
        super().__init__()
        hidden = [nn.Linear(8, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 4))
        self.example_input_array = torch.randn(64, 8)
        self.optimizer = optimizer  # a function of the groups

    def forward(self, x):
        return self.layers(x)

    def configure_optimizers(self):
        return self.optimizer(elropt.param_groups(self, self.example_input_array.to(self.device)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        inputs = torch.randn(512, 8)
        return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)


if __name__ == "__main__":
    LightningCLI(Net, seed_everything_default=0)
