"""Hugging Face Trainer with a ResNet: groups by `optimizer_cls_and_kwargs`, layers in the trainer's logs, resuming.

    python examples/with_transformers_resnet.py

Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from elropt.integrations.transformers import RecorderCallback, grouped_elrsgd


def main(folder="runs/transformers-resnet", steps=20):
    set_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    model = ResNetForImageClassification(config)
    images = torch.randn(128, 3, 16, 16)
    labels = images.mean((2, 3)).argmax(1)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    optimizer = {
        "batch": {"pixel_values": images[:16]},  # finds the groups
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "rule": "angle",
        "tracked_lr": 0.01,
    }
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=4,
        save_steps=10,
        report_to="none",
    )
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(grouped_elrsgd, optimizer))
    trainer.add_callback(RecorderCallback(every=4, log=trainer.log))  # writes elr.jsonl in the folder
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer


if __name__ == "__main__":
    main()
