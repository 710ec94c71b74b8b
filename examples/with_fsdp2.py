"""FSDP2: groups before `fully_shard`, then their parameters by name; checkpoints by torch.distributed.checkpoint.

    torchrun --nproc-per-node 2 examples/with_fsdp2.py

Norms are those of whole tensors, whatever the number of processes. Every process has a Recorder; rank 0 writes. Stop it
at any moment and start it again: it goes on from the last checkpoint, also on another number of processes.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import elropt


def main(folder="runs/fsdp2", steps=40):
    distributed.init_process_group("gloo")  # with GPUs: "nccl", and torch.cuda.set_device(local rank)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # on every rank, so that all find the same groups
    inputs = torch.randn(512, 8)
    labels = inputs[:, :4].argmax(1)
    hidden = [nn.Linear(8, 32, bias=False), nn.LayerNorm(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 4))

    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    fully_shard(net)
    for group in groups:
        group["params"] = [net.get_parameter(name) for name in group["param_names"]]
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")

    state = {"step": torch.tensor(0)}
    state["net"], state["optimizer"] = get_state_dict(net, optimizer)
    saved = sorted(Path(folder).glob("step-*"))
    if saved:
        dcp.load(state, checkpoint_id=saved[-1])
        set_state_dict(net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"])

    first = int(state["step"])
    with elropt.Recorder(optimizer, Path(folder, "elr.jsonl"), every=4, first_step=first):
        for step in range(first, steps):
            batch = (torch.arange(64 * step, 64 * (step + 1)) % len(inputs)).chunk(size)[rank]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            if (step + 1) % 20 == 0:
                model_state, optimizer_state = get_state_dict(net, optimizer)
                state = {"step": torch.tensor(step + 1), "net": model_state, "optimizer": optimizer_state}
                dcp.save(state, checkpoint_id=f"{folder}/step-{step + 1:06}")
    whole = {name: p.full_tensor() for name, p in net.state_dict().items()}
    distributed.destroy_process_group()
    return whole


if __name__ == "__main__":
    main()
