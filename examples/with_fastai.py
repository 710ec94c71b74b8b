"""fastai: groups in `opt_func`, a Recorder around `fit_one_cycle`, resuming with `start_epoch`.

    python examples/with_fastai.py

Stop it at any moment and start it again: it goes on from the last epoch.
"""

from pathlib import Path

import torch
from fastai.callback.all import SaveModelCallback  # this import gives Learner fit_one_cycle
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elropt

EPOCHS = 4


def main(folder="runs/fastai"):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))

    def opt_func(params, lr):
        groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
        return OptimWrapper(opt=elropt.ELRSGD(groups, lr=lr, momentum=0.9, rule="angle"))

    save = SaveModelCallback(every_epoch=True, with_opt=True)
    learn = Learner(
        DataLoaders(loader, loader), net, nn.CrossEntropyLoss(), opt_func, lr=0.1, cbs=save, path=folder
    )
    learn.create_opt()
    done = len([*Path(folder, "models").glob("model_*.pth")])
    if done:
        learn.load(f"model_{done - 1}")
    with elropt.Recorder(learn.opt, Path(folder, "elr.jsonl"), every=4, first_step=done * len(loader)):
        learn.fit_one_cycle(EPOCHS, lr_max=0.1, start_epoch=done)
    return learn


if __name__ == "__main__":
    main()
