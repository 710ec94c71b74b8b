"""skorch: groups in `get_params_for_optimizer`, a Recorder in a callback, resuming with `partial_fit`.

python examples/with_skorch.py
"""

from pathlib import Path

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn

import elropt


class Net(NeuralNetClassifier):
    def get_params_for_optimizer(self, prefix, named_parameters):
        _, options = super().get_params_for_optimizer(prefix, named_parameters)
        return (elropt.param_groups(self.module_, torch.randn(64, 8)),), options


class Layers(Callback):
    """Records the layers, and the spread of their effective learning rates into the history of the net."""

    def __init__(self, path, every=4):
        self.path, self.every = path, every

    def on_train_begin(self, net, **_):
        done = sum(len(epoch["batches"]) for epoch in net.history)

        def to_history(scalars, step):
            net.history.record_batch("elr_spread", scalars["elr_spread"])

        self.recorder = elropt.Recorder(
            net.optimizer_, self.path, every=self.every, first_step=done, on_record=to_history
        )

    def on_train_end(self, net, **_):
        self.recorder.close()


def main(folder="runs/skorch", epochs=4):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = Net(
        nn.Sequential(*hidden, nn.Linear(32, 4)),
        criterion=nn.CrossEntropyLoss,
        optimizer=elropt.ELRSGD,
        optimizer__momentum=0.9,
        optimizer__rule="angle",
        optimizer__tracked_lr=0.01,  # of the scale-invariant layers, in radians
        optimizer__weight_decay=5e-4,  # not of norm gains and biases
        lr=0.1,
        batch_size=64,
        train_split=None,
        callbacks=[Layers(Path(folder, "elr.jsonl"))],
    ).initialize()
    files = {f"f_{part}": str(Path(folder, f"{part}.pt")) for part in ("params", "optimizer")}
    files["f_history"] = str(Path(folder, "history.json"))
    if all(Path(file).exists() for file in files.values()):
        net.load_params(**files)
    net.partial_fit(inputs, labels, epochs=epochs - len(net.history))
    net.save_params(**files)
    return net


if __name__ == "__main__":
    main()
