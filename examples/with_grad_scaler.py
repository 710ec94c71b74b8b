"""Mixed precision in float16: `autocast` and `GradScaler`, which is told to unscale before gradients are clipped.

    python examples/with_grad_scaler.py

A step that overflows changes nothing. Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

from pathlib import Path

import torch
from torch import nn

import elropt


def main(folder="runs/grad-scaler", steps=40):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    inputs = torch.randn(512, 8, device=device)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))
    net.to(device)

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    scaler = torch.amp.GradScaler(device)
    path, first = Path(folder, "checkpoint.pt"), 0
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])

    file = Path(folder, "elr.jsonl")
    with elropt.Recorder(optimizer, file, every=1, first_step=first) as recorder:
        for step in range(first, steps):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                loss = nn.functional.cross_entropy(net(inputs[batch]), labels[batch])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            recorder.step = step  # it would not count the steps that the scaler leaves out
            scaler.step(optimizer)
            scaler.update()
            if (step + 1) % 20 == 0:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"step": step + 1, "scaler": scaler.state_dict(), **state}, path)
    return net


if __name__ == "__main__":
    main()
