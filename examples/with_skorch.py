"""skorch: groups in `get_params_for_optimizer`, a Recorder around `partial_fit`, which also resumes.

    python examples/with_skorch.py

Started again, it trains four more epochs.
"""

from pathlib import Path

import torch
from skorch import NeuralNetClassifier
from torch import nn

import elropt


class Net(NeuralNetClassifier):
    def get_params_for_optimizer(self, prefix, named_parameters):
        _, options = super().get_params_for_optimizer(prefix, named_parameters)
        return (elropt.param_groups(self.module_, torch.randn(64, 8)),), options


def main(folder="runs/skorch", epochs=4):
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = Net(
        nn.Sequential(*hidden, nn.Linear(32, 4)),
        criterion=nn.CrossEntropyLoss,
        optimizer=elropt.ELRSGD,
        optimizer__momentum=0.9,
        optimizer__weight_decay=5e-4,  # not of norm gains and biases
        optimizer__rule="angle",
        optimizer__tracked_lr=0.01,  # of the scale-invariant layers, in radians
        lr=0.1,
        batch_size=64,
        train_split=None,
    ).initialize()
    parts = {f"f_{part}": str(Path(folder, part)) for part in ("params", "optimizer", "history")}
    if Path(parts["f_history"]).exists():
        net.load_params(**parts)

    def to_history(scalars, step):
        net.history.record_batch("elr_spread", scalars["elr_spread"])

    file, done = Path(folder, "elr.jsonl"), sum(len(epoch["batches"]) for epoch in net.history)
    with elropt.Recorder(net.optimizer_, file, every=4, first_step=done, on_record=to_history):
        net.partial_fit(inputs, inputs[:, :4].argmax(1), epochs=epochs)
    net.save_params(**parts)
    return net


if __name__ == "__main__":
    main()
