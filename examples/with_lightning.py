"""Lightning's Trainer: groups in `configure_optimizers`, layers to every logger by a callback, resuming by `ckpt_path`.

    python examples/with_lightning.py

Stop it at any moment and start it again: it goes on from the last epoch.
"""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elropt
from elropt.integrations.lightning import RecorderCallback

EPOCHS = 4


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [m for n in (8, 32) for m in (nn.Linear(n, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(32, 4))
        self.example_input_array = torch.randn(64, 8)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        batch = self.example_input_array.to(self.device)
        groups = elropt.param_groups(self, batch, weight_decay=5e-4, tracked_lr=0.01)
        optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def main(folder="runs/lightning"):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)
    callbacks = [
        RecorderCallback(Path(folder, "elr.jsonl"), every=4),
        ModelCheckpoint(folder, save_last=True),
    ]
    logger = CSVLogger(folder)
    trainer = Trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=logger, log_every_n_steps=4)
    last = Path(folder, "last.ckpt")
    trainer.fit(Net(), loader, ckpt_path=last if last.exists() else None)
    return trainer


if __name__ == "__main__":
    main()
