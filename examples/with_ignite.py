"""PyTorch Ignite: a Recorder whose scalars become metrics of the engine; `Checkpoint` saves and resumes.

    python examples/with_ignite.py

Stop it at any moment and start it again: it goes on from the last epoch.
"""

from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elropt


def main(folder="runs/ignite", epochs=4):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")

    def update(engine, batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(update)
    parts = {"net": net, "optimizer": optimizer, "trainer": trainer}
    saver = DiskSaver(folder, require_empty=False)
    checkpoint = Checkpoint(parts, saver, filename_pattern="last.pt", n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    if (last := Path(folder, "last.pt")).exists():
        Checkpoint.load_objects(parts, torch.load(last))

    def to_metrics(scalars, step):
        trainer.state.metrics.update(scalars)  # ignite's loggers read metrics there

    file, done = Path(folder, "elr.jsonl"), trainer.state.iteration
    with elropt.Recorder(optimizer, file, every=4, first_step=done, on_record=to_metrics):
        trainer.run(loader, max_epochs=epochs)
    return trainer, net


if __name__ == "__main__":
    main()
