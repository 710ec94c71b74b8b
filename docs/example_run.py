"""Records the run whose report is an example on the site: `python docs/example_run.py`, half a minute.

SGD trains a 30-layer MLP with BatchNorm on scikit-learn's digits, with a learning rate that its first layers do not
bear at the start. It needs the extra `benchmarks`.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import elropt
from benchmarks.common import models

RUN = Path(__file__).parent / "guide" / "example-run.jsonl"
STEPS = 300

digits = load_digits()
images = torch.tensor(digits.images / 16 - 0.3, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)

torch.manual_seed(0)
torch.set_num_threads(1)
model = models.build("bn-mlp-30", in_shape=(1, 8, 8), classes=10)
optimizer = torch.optim.SGD(elropt.param_groups(model, images[:64]), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
RUN.unlink(missing_ok=True)
with elropt.Recorder(optimizer, RUN, every=5) as recorder:
    for step in range(STEPS):
        if step > 50:
            recorder.every = 25
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
