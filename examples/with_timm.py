"""timm: "elrsgd" in `create_optimizer_v2`, with groups by `param_group_fn`, and timm's scheduler.

    python examples/with_timm.py

timm's own scripts: python -m elropt.integrations.timm train.py DATA --opt elrsgd --opt-kwargs rule=angle
"""

from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import elropt
import elropt.integrations.timm  # registers "elrsgd"

EPOCHS = 4


def main(folder="runs/timm", epochs=EPOCHS):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    labels = images.mean((2, 3)).argmax(1)
    model = timm.create_model("test_resnet", num_classes=3)

    def groups(model):
        return elropt.param_groups(model, images[:16], weight_decay=5e-4, tracked_lr=0.01)

    optimizer = create_optimizer_v2(model, "elrsgd", lr=0.1, rule="angle", param_group_fn=groups)
    schedule = CosineLRScheduler(optimizer, t_initial=EPOCHS, warmup_t=1, warmup_lr_init=0.01)
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["epoch"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=2, first_step=4 * first):
        for epoch in range(first, epochs):
            schedule.step(epoch)
            for batch in torch.arange(64).split(16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            state = {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, path)
    return model


if __name__ == "__main__":
    main()
