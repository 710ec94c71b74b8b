"""Hugging Face Trainer with a language model with QK-norm: `elropt.control` behind AdamW, groups from a dict batch.

    python examples/with_transformers_qwen3.py

The weights of queries and keys are scale-invariant in such a model (Qwen3, OLMo 2, Gemma 3): each turns by 0.01 rad in
a step, and AdamW trains the others. Stop it at any moment and start it again: it goes on from the last checkpoint.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import elropt
from elropt.integrations.transformers import RecorderCallback


def main(folder="runs/transformers-qwen3", steps=20):
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    tokens = torch.arange(16) * torch.randint(1, 4, (128, 1)) % 64
    data = [{"input_ids": row, "labels": row} for row in tokens]

    groups = elropt.param_groups(model, input_ids=tokens[:16], weight_decay=0.1)
    for group in groups:
        group["lr"] = 0.01 if group["scale_invariant"] else 1e-3  # radians per step; AdamW's
    optimizer = torch.optim.AdamW(groups)
    elropt.control(optimizer, rule="angle")

    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=4,
        save_steps=10,
        report_to="none",
    )
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.add_callback(RecorderCallback(every=4, log=trainer.log))  # writes elr.jsonl in the folder
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer


if __name__ == "__main__":
    main()
